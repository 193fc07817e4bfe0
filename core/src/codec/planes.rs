//! Elements taken apart into planes, byte 0 of each, byte 1 of each and so on, and put together again.
//!
//! A float is turned left by a bit before: its sign leaves the top, and byte planes end where the
//! exponent does, exactly in bf16 and fp32. The exponents of a trained tensor are few; its signs and the
//! bits below the exponent are noise, and are told apart from them here.
//!
//! The loops are written for the vectoriser: bounds are checked before them. Elements of four bytes and more
//! take half the time where it may use AVX2, so there is a second copy of everything for processors that
//! have it.

macro_rules! elements {
    ($split:ident, $merge:ident, $word:ty, $bytes:literal) => {
        #[inline(always)]
        fn $split<const TURN: u32>(elements: &[[u8; $bytes]], planes: &mut [u8]) {
            let mut rest = planes;
            let mut planes: [&mut [u8]; $bytes] =
                std::array::from_fn(|_| rest.split_off_mut(..elements.len()).unwrap_or_default());
            for (at, element) in elements.iter().enumerate() {
                let turned = <$word>::from_le_bytes(*element).rotate_left(TURN).to_le_bytes();
                for (plane, byte) in planes.iter_mut().zip(turned) {
                    plane[at] = byte;
                }
            }
        }

        #[inline(always)]
        fn $merge<const TURN: u32>(planes: &[&[u8]; $bytes], elements: &mut [[u8; $bytes]]) {
            let planes = planes.map(|plane| &plane[..elements.len()]);
            for (at, element) in elements.iter_mut().enumerate() {
                let mut turned = [0; $bytes];
                for (byte, plane) in turned.iter_mut().zip(planes) {
                    *byte = plane[at];
                }
                *element = <$word>::from_le_bytes(turned).rotate_right(TURN).to_le_bytes();
            }
        }
    };
}

elements!(split_2, merge_2, u16, 2);
elements!(split_4, merge_4, u32, 4);
elements!(split_8, merge_8, u64, 8);

/// Writes the planes of whole elements one after the other, the least significant first. `width` is 2, 4
/// or 8; `planes` has the length of `bytes`.
pub(super) fn split(bytes: &[u8], width: usize, float: bool, planes: &mut [u8]) {
    assert_eq!(bytes.len(), planes.len(), "planes of other elements");
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: this processor has AVX2.
        return unsafe { split_avx2(bytes, width, float, planes) };
    }
    split_any(bytes, width, float, planes);
}

/// The inverse of [`split`]: `planes` are `width` slices, each of one byte an element.
pub(super) fn merge(planes: &[&[u8]; 8], width: usize, float: bool, into: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: this processor has AVX2.
        return unsafe { merge_avx2(planes, width, float, into) };
    }
    merge_any(planes, width, float, into);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn split_avx2(bytes: &[u8], width: usize, float: bool, planes: &mut [u8]) {
    split_any(bytes, width, float, planes);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn merge_avx2(planes: &[&[u8]; 8], width: usize, float: bool, into: &mut [u8]) {
    merge_any(planes, width, float, into);
}

#[inline(always)]
fn split_any(bytes: &[u8], width: usize, float: bool, planes: &mut [u8]) {
    match (width, float) {
        (2, false) => split_2::<0>(bytes.as_chunks().0, planes),
        (2, true) => split_2::<1>(bytes.as_chunks().0, planes),
        (4, false) => split_4::<0>(bytes.as_chunks().0, planes),
        (4, true) => split_4::<1>(bytes.as_chunks().0, planes),
        (8, false) => split_8::<0>(bytes.as_chunks().0, planes),
        (8, true) => split_8::<1>(bytes.as_chunks().0, planes),
        _ => unreachable!("elements of {width} bytes have no planes"),
    }
}

#[inline(always)]
fn merge_any(planes: &[&[u8]; 8], width: usize, float: bool, into: &mut [u8]) {
    let [a, b, c, d, ..] = *planes;
    match (width, float) {
        (2, false) => merge_2::<0>(&[a, b], into.as_chunks_mut().0),
        (2, true) => merge_2::<1>(&[a, b], into.as_chunks_mut().0),
        (4, false) => merge_4::<0>(&[a, b, c, d], into.as_chunks_mut().0),
        (4, true) => merge_4::<1>(&[a, b, c, d], into.as_chunks_mut().0),
        (8, false) => merge_8::<0>(planes, into.as_chunks_mut().0),
        (8, true) => merge_8::<1>(planes, into.as_chunks_mut().0),
        _ => unreachable!("elements of {width} bytes have no planes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponent_of_a_float_is_a_plane() {
        let bf16: Vec<u8> =
            [1.5_f32, -1.0, 0.75].iter().flat_map(|x| x.to_le_bytes()[2..].to_vec()).collect();
        let mut planes = [0; 6];
        split(&bf16, 2, true, &mut planes);
        assert_eq!(planes, [0x80, 0x01, 0x80, 127, 127, 126]);

        let fp32: Vec<u8> = [1.5_f32, -1.0, 0.75].iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut planes = [0; 12];
        split(&fp32, 4, true, &mut planes);
        assert_eq!(planes, [0, 1, 0, 0, 0, 0, 0x80, 0, 0x80, 127, 127, 126]);
    }

    #[test]
    fn elements_come_back_from_their_planes() {
        for width in [2, 4, 8] {
            for float in [false, true] {
                for count in [0, 1, 3, 31, 32, 63, 64, 100, 5000] {
                    let bytes: Vec<u8> =
                        (0..count * width).map(|at| (at * at / 7 + at) as u8).collect();
                    let mut planes = vec![0; bytes.len()];
                    split(&bytes, width, float, &mut planes);
                    let mut slices: [&[u8]; 8] = [&[]; 8];
                    for (slice, plane) in slices.iter_mut().zip(planes.chunks(count.max(1))) {
                        *slice = plane;
                    }
                    let mut back = vec![0xFF; bytes.len()];
                    merge(&slices, width, float, &mut back);
                    assert!(back == bytes, "{count} elements of {width} bytes, float {float}");

                    let mut slowly = vec![0; bytes.len()];
                    split_any(&bytes, width, float, &mut slowly);
                    assert!(slowly == planes, "AVX2 or not is a difference");
                    back.fill(0xFF);
                    merge_any(&slices, width, float, &mut back);
                    assert!(back == bytes, "AVX2 or not is a difference");
                }
            }
        }
    }
}
