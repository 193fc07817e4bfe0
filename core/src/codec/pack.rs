//! A chunk into its stored form.

use std::io::Cursor;

use zstd::{bulk::Compressor, zstd_safe::compress_bound};

use super::{PLANE_HEAD, PLANE_MIN, Part, SAVED_MIN, SEGMENT, Scratch, VERSION, planes};

/// The stored form of a chunk, or `None` where it is better kept as it is. It lies in the scratch until
/// that is used again.
///
/// # Panics
/// The parts are not those of the chunk: their lengths do not add up to its, or it has 4 GiB.
#[must_use]
pub fn compress<'a>(chunk: &[u8], parts: &[Part], scratch: &'a mut Scratch) -> Option<&'a [u8]> {
    let bytes: usize = parts.iter().map(|part| part.bytes).sum();
    assert_eq!(bytes, chunk.len(), "parts of another chunk");
    assert!(u32::try_from(bytes).is_ok(), "a chunk of {bytes} bytes");
    let limit = chunk.len() - chunk.len().div_ceil(SAVED_MIN);
    scratch.stored.clear();
    scratch.stored.push(VERSION);
    let mut rest = chunk;
    let mut parts = parts.iter().copied().filter(|part| part.bytes > 0).peekable();
    while let Some(mut run) = parts.next() {
        // Neighbours of a kind are one run, so that many small tensors are not many small planes.
        while let Some(next) = parts.next_if(|next| joins(&run, next)) {
            run.bytes += next.bytes;
        }
        let (bytes, after) = rest.split_at(run.bytes);
        rest = after;
        scratch.stored.push(run.kind());
        scratch.stored.extend_from_slice(&(run.bytes as u32).to_le_bytes());
        for segment in bytes.chunks(SEGMENT * run.width) {
            scratch.pack(segment, run);
            if scratch.stored.len() > limit {
                return None;
            }
        }
    }
    (scratch.stored.len() <= limit).then_some(&scratch.stored)
}

fn joins(run: &Part, next: &Part) -> bool {
    run.kind() == next.kind() && run.bytes.is_multiple_of(run.width)
}

impl Scratch {
    fn pack(&mut self, segment: &[u8], run: Part) {
        let count = segment.len() / run.width;
        let (elements, tail) = segment.split_at(count * run.width);
        let planes = if run.width == 1 {
            elements
        } else {
            let planes = &mut self.planes[..elements.len()];
            planes::split(elements, run.width, run.float, planes);
            planes
        };
        let zstd = if run.float { &mut self.floats } else { &mut self.others };
        for plane in planes.chunks_exact(count.max(1)) {
            let tried = plane.len() >= PLANE_MIN && (!run.float || promising(plane));
            if !(tried && squeeze(plane, zstd, &mut self.stored)) {
                self.stored.extend_from_slice(&head(plane.len()));
                self.stored.extend_from_slice(plane);
            }
        }
        self.stored.extend_from_slice(tail);
    }
}

fn head(len: usize) -> [u8; PLANE_HEAD] {
    let [a, b, c, _] = (len as u32).to_le_bytes();
    [a, b, c]
}

/// Appends a frame of the plane and its length, or leaves `stored` as it is where that saves too little.
fn squeeze(plane: &[u8], zstd: &mut Compressor<'_>, stored: &mut Vec<u8>) -> bool {
    let begin = stored.len();
    // Always the same room: what zstd does may depend on how much it has.
    stored.reserve(PLANE_HEAD + compress_bound(plane.len()));
    stored.extend_from_slice(&head(0));
    let mut end = Cursor::new(&mut *stored);
    end.set_position((begin + PLANE_HEAD) as u64);
    match zstd.compress_to_buffer(plane, &mut end) {
        Ok(len) if len <= plane.len() - plane.len().div_ceil(SAVED_MIN) => {
            stored[begin..begin + PLANE_HEAD].copy_from_slice(&head(len));
            true
        }
        _ => {
            stored.truncate(begin);
            false
        }
    }
}

/// Whether some bytes of a plane are so much more frequent than others that compressing may save
/// something: of a sample of it, as short as a page, in pieces as long as a cache line.
fn promising(plane: &[u8]) -> bool {
    const LINE: usize = 64;
    const LINES: usize = 64;
    const SAMPLE: usize = LINE * LINES;
    // Two bytes of the sample are equal once in 256 where each is as frequent as any other; once in 220
    // says that an entropy below 7.8 bits is likely, and chance does not say so of noise.
    const EQUAL_MIN: usize = SAMPLE * SAMPLE / 220;
    if plane.len() < 2 * SAMPLE {
        return true;
    }
    let mut counts = [[0_u16; 256]; 2];
    let (lines, _) = plane.as_chunks::<LINE>();
    for line in lines.iter().step_by(lines.len() / LINES).take(LINES) {
        for pair in line.as_chunks::<2>().0 {
            counts[0][usize::from(pair[0])] += 1;
            counts[1][usize::from(pair[1])] += 1;
        }
    }
    let [even, odd] = counts;
    let squares = even.iter().zip(odd).map(|(a, b)| (usize::from(*a) + usize::from(b)).pow(2));
    squares.sum::<usize>() - SAMPLE > EQUAL_MIN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_not_promising_and_a_few_zeros_in_it_are() {
        let mut state = 1_u64;
        let mut noise = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        for _ in 0..200 {
            let mut plane: Vec<u8> = (0..SEGMENT).map(|_| noise()).collect();
            assert!(!promising(&plane));
            plane[SEGMENT / 2..][..SEGMENT / 16].fill(0);
            assert!(promising(&plane));
        }
    }
}
