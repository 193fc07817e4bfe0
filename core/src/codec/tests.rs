//! The promises of `codec.rs`, on chunks of every kind and on stored forms that nobody made.

use proptest::prelude::*;

use super::*;
use crate::error::ErrorKind;

/// Bytes like those of a trained tensor: normally distributed floats, cut to `width` bytes.
fn weights(count: usize, width: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut uniform = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    let mut bytes = Vec::new();
    for _ in 0..count {
        let normal = (0..12).map(|_| uniform()).sum::<f32>() - 6.0 + uniform() * 1e-4;
        match width {
            8 => bytes.extend_from_slice(&f64::from(normal * 0.02).to_le_bytes()),
            width => bytes.extend_from_slice(&(normal * 0.02).to_le_bytes()[4 - width..]),
        }
    }
    bytes
}

fn noise(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut byte = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..count).map(|_| byte()).collect()
}

fn float(bytes: usize, width: usize) -> Part {
    Part { bytes, width, float: true }
}

fn packed(chunk: &[u8], parts: &[Part]) -> Option<Vec<u8>> {
    compress(chunk, parts, &mut Scratch::new().unwrap()).map(<[u8]>::to_vec)
}

fn unpacked(stored: &[u8], len: usize) -> Result<Vec<u8>> {
    let mut chunk = vec![0xA5; len];
    decompress(stored, &mut chunk, &mut Scratch::new().unwrap()).map(|()| chunk)
}

/// A few kinds of bytes, in the lengths where segments and elements begin and end.
fn piece() -> impl Strategy<Value = (Vec<u8>, usize, bool)> {
    let count = prop_oneof![0_usize..200, 4000..9000_usize, SEGMENT - 3..SEGMENT + 3];
    let width = prop::sample::select(vec![1_usize, 2, 4, 8]);
    (count, width, 0_usize..8, 0_u8..4, any::<bool>(), any::<u64>()).prop_map(
        |(count, width, cut, kind, float, seed)| {
            let mut bytes = match kind {
                0 => weights(count, width.max(2), seed),
                1 => noise(count * width, seed),
                2 => vec![seed as u8; count * width],
                _ => (0..count * width).map(|at| (at / width) as u8).collect(),
            };
            bytes.truncate((count * width).saturating_sub(cut % width));
            (bytes, width, float)
        },
    )
}

fn chunk() -> impl Strategy<Value = (Vec<u8>, Vec<Part>)> {
    prop::collection::vec(piece(), 0..5).prop_map(|pieces| {
        let parts = pieces.iter().map(|(bytes, width, float)| Part {
            bytes: bytes.len(),
            width: *width,
            float: *float,
        });
        let parts = parts.collect();
        (pieces.into_iter().flat_map(|(bytes, ..)| bytes).collect(), parts)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn what_was_compressed_comes_back((chunk, parts) in chunk()) {
        let mut used = Scratch::new().unwrap();
        let first = compress(&weights(5000, 2, 3), &[float(10_000, 2)], &mut used);
        prop_assert!(first.is_some());
        let again = compress(&chunk, &parts, &mut used).map(<[u8]>::to_vec);
        let stored = packed(&chunk, &parts);
        prop_assert_eq!(&again, &stored, "a used scratch and a new one differ");
        if let Some(stored) = stored {
            prop_assert!(stored.len() <= chunk.len() - chunk.len().div_ceil(SAVED_MIN));
            prop_assert!(unpacked(&stored, chunk.len()).unwrap() == chunk);
            for len in [0, 1, chunk.len() - 1, chunk.len() + 1, 2 * chunk.len()] {
                if len != chunk.len() {
                    prop_assert!(unpacked(&stored, len).is_err());
                }
            }
        }
    }

    #[test]
    fn damage_is_an_error_or_other_bytes(
        (chunk, parts) in chunk(),
        at in any::<prop::sample::Index>(),
        flip in 1_u8..,
        cut in any::<prop::sample::Index>(),
    ) {
        let Some(stored) = packed(&chunk, &parts) else { return Ok(()) };
        for at in [at.index(stored.len()), at.index(stored.len().min(16))] {
            let mut flipped = stored.clone();
            flipped[at] ^= flip;
            let _ = unpacked(&flipped, chunk.len());
        }
        let cut = &stored[..cut.index(stored.len())];
        let error = unpacked(cut, chunk.len()).unwrap_err();
        prop_assert_eq!(error.kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn garbage_is_damage(
        mut bytes in prop::collection::vec(any::<u8>(), 0..300),
        version in any::<bool>(),
        kind in 0_u8..8,
        run in 0_u32..300,
        len in 0_usize..300,
    ) {
        if version && bytes.len() > 6 {
            bytes[0] = VERSION;
            bytes[1] = kind;
            bytes[2..6].copy_from_slice(&run.to_le_bytes());
        }
        if let Err(error) = unpacked(&bytes, len) {
            prop_assert_eq!(error.kind(), ErrorKind::Corrupt);
        }
    }
}

#[test]
fn floats_save_what_their_exponents_take() {
    for (width, ratio) in [(2, 0.70), (4, 0.86)] {
        let chunk = weights((4 << 20) / width, width, 7);
        let stored = packed(&chunk, &[float(chunk.len(), width)]).unwrap();
        assert!((stored.len() as f64) < ratio * chunk.len() as f64, "{width}: {}", stored.len());
        assert!(unpacked(&stored, chunk.len()).unwrap() == chunk);
    }
}

#[test]
fn noise_stays_as_it_is() {
    let chunk = noise(1 << 20, 5);
    for width in [1, 2, 4, 8] {
        for float in [false, true] {
            assert_eq!(packed(&chunk, &[Part { bytes: chunk.len(), width, float }]), None);
        }
    }
    assert_eq!(packed(&[], &[]), None);
    assert_eq!(packed(b"short", &[Part::plain(5)]), None);
}

#[test]
fn small_tensors_of_a_kind_are_one_run() {
    let chunk = weights(100_000, 2, 9);
    let many = vec![float(200, 2); 1000];
    assert_eq!(packed(&chunk, &many), packed(&chunk, &[float(200_000, 2)]));
}

#[test]
fn a_frame_that_claims_much_takes_no_memory() {
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    let mut stored = vec![VERSION, 0];
    stored.extend_from_slice(&((SEGMENT as u32).to_le_bytes()));
    stored.extend_from_slice(&(bomb.len() as u32).to_le_bytes()[..3]);
    stored.extend_from_slice(&bomb);
    let error = unpacked(&stored, SEGMENT).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}

#[test]
fn damage_says_what_is_wrong() {
    let why = |stored: &[u8], len| unpacked(stored, len).unwrap_err().to_string();
    assert_eq!(why(&[2], 1), "a compressed chunk is damaged: version 2, where 1 is known");
    assert_eq!(why(&[], 1), "a compressed chunk is damaged: 0 bytes instead of 1");
}

fn tensor(dtype: &str, at: [u64; 2]) -> TensorEntry {
    let (name, dtype) = (String::new(), dtype.to_owned());
    TensorEntry { name, dtype, shape: Vec::new(), global_shape: None, offset: None, at }
}

#[test]
fn parts_follow_the_tensors_into_each_chunk() {
    let tensors = [
        tensor("I64", [100, 116]),
        tensor("F32", [116, 116]),
        tensor("F32", [117, 157]),
        tensor("C64", [157, 165]),
        tensor("BF16", [165, 171]),
    ];
    let plain = Part::plain;
    let int = |bytes| Part { bytes, width: 8, float: false };
    assert_eq!(
        parts_of(&tensors, 0..200),
        [plain(100), int(16), plain(1), float(40, 4), float(8, 4), float(6, 2), plain(29)]
    );
    assert_eq!(parts_of(&tensors, 0..64), [plain(64)]);
    assert_eq!(parts_of(&tensors, 64..128), [plain(36), int(16), plain(1), float(11, 4)]);
    // The third byte of an element begins the chunk.
    assert_eq!(
        parts_of(&tensors, 128..192),
        [plain(1), float(28, 4), float(8, 4), float(6, 2), plain(21)]
    );
    assert_eq!(parts_of(&tensors, 118..119), [plain(1)]);
    assert_eq!(parts_of(&tensors, 192..200), [plain(8)]);
}
