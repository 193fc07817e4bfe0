//! Checksums of tensors that another rank stores: they are read and not copied.
//!
//! # Invariants
//!
//! - A checksum is that of the bytes as they would lie in a payload, whatever the strides.
//! - Each tensor is read in the phase in which it would be copied: nobody waits longer for it, and
//!   nothing is read that may be changed again.

use crc32fast::Hasher;

use super::copy::{Memory, Part, on_threads};
use crate::error::{Error, Result};

/// One thread's work at a time.
const UNIT_BYTES: usize = 4 << 20;
/// What a strided tensor is gathered into, to be read from the second-level cache.
const SCRATCH_BYTES: usize = 64 << 10;

/// One tensor that this rank has and does not store.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// The number that its checksum goes by.
    pub(crate) tag: usize,
    /// Bytes.
    pub(crate) len: usize,
    /// Where they are.
    pub(crate) memory: Memory,
    /// Read while the trainer waits.
    pub(crate) now: bool,
}

/// The tensors of one state that other ranks store.
#[derive(Clone, Debug, Default)]
pub(crate) struct Witness {
    seen: Vec<Seen>,
}

impl Witness {
    /// # Errors
    /// A tensor is not as long as it should be, or lies where it cannot be read.
    pub(crate) fn new(mut seen: Vec<Seen>) -> Result<Self> {
        for tensor in &mut seen {
            if let Memory::Strided(strided) = &tensor.memory {
                if strided.len() != tensor.len {
                    let (is, has) = (tensor.len, strided.len());
                    return Err(Error::Bug(format!("{has} bytes by strides, {is} by shape")));
                }
                if let Some(start) = strided.contiguous() {
                    tensor.memory = Memory::Bytes(start);
                }
            }
            if !matches!(tensor.memory, Memory::Bytes(_) | Memory::Strided(_)) {
                return Err(Error::Bug("a tensor without memory is looked at".into()));
            }
        }
        Ok(Self { seen })
    }

    /// Bytes that are read in this phase.
    pub(crate) fn bytes(&self, now: bool) -> usize {
        self.seen.iter().filter(|s| s.now == now).map(|s| s.len).sum()
    }

    /// The checksums of the tensors that are read in this phase, in parts.
    ///
    /// # Safety
    /// Their memory is readable, and nobody writes to it until this returns.
    pub(crate) unsafe fn look(&self, now: bool, threads: usize) -> Vec<Part> {
        let of_phase = self.seen.iter().filter(|s| s.now == now && s.len > 0);
        let units: Vec<(&Seen, usize)> =
            of_phase.flat_map(|s| (0..s.len).step_by(UNIT_BYTES).map(move |at| (s, at))).collect();
        on_threads(units.len(), threads, |index| {
            let (seen, at) = units[index];
            let len = UNIT_BYTES.min(seen.len - at);
            // SAFETY: [at, at + len) is inside the tensor; the caller's promise.
            let crc = unsafe { checksum(&seen.memory, at, len) };
            Some(Part { tag: seen.tag, at, len, crc })
        })
    }
}

/// # Safety
/// Those bytes of the memory are readable, and nobody writes to them.
unsafe fn checksum(memory: &Memory, at: usize, len: usize) -> u32 {
    match memory {
        // SAFETY: the caller's promise.
        Memory::Bytes(start) => unsafe {
            crc32fast::hash(std::slice::from_raw_parts(start.get().add(at), len))
        },
        Memory::Strided(strided) => {
            let mut scratch = vec![0; SCRATCH_BYTES.min(len)];
            let mut hasher = Hasher::new();
            for done in (0..len).step_by(SCRATCH_BYTES) {
                let n = SCRATCH_BYTES.min(len - done);
                // SAFETY: the scratch has `n` bytes; the caller's promise.
                unsafe { strided.gather(at + done, scratch.as_mut_ptr(), n) };
                hasher.update(&scratch[..n]);
            }
            hasher.finalize()
        }
        Memory::InPlace | Memory::Skip | Memory::Excerpts(_) => unreachable!("refused by `new`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        snapshot::{
            copy::whole,
            strided::{Address, Strided},
        },
        testing::contract::pattern,
    };

    #[test]
    fn a_checksum_is_that_of_the_payload_bytes_in_the_phase_of_the_copy() {
        let flat = pattern(2 * UNIT_BYTES + 5, 1);
        let (rows, columns) = (1000, 600);
        let matrix = pattern(rows * columns * 4, 2);
        let transposed: Vec<u8> = (0..columns)
            .flat_map(|c| (0..rows).map(move |r| (r * columns + c) * 4))
            .flat_map(|at| matrix[at..at + 4].to_vec())
            .collect();
        let address = Address::read_only(matrix.as_ptr());
        let strides = [4, columns as isize * 4];
        let strided = Strided::new(address, 4, &[columns, rows], &strides).unwrap();
        let seen = vec![
            Seen {
                tag: 0,
                len: flat.len(),
                memory: Memory::Bytes(Address::read_only(flat.as_ptr())),
                now: true,
            },
            Seen { tag: 1, len: transposed.len(), memory: Memory::Strided(strided), now: false },
            Seen {
                tag: 2,
                len: 0,
                memory: Memory::Bytes(Address::read_only(flat.as_ptr())),
                now: false,
            },
        ];
        let witness = Witness::new(seen).unwrap();
        assert_eq!((witness.bytes(true), witness.bytes(false)), (flat.len(), transposed.len()));
        for threads in 1..4 {
            // SAFETY: the vectors live here, and no thread writes to them.
            let (mut parts, late) =
                unsafe { (witness.look(true, threads), witness.look(false, threads)) };
            assert!(parts.iter().all(|p| p.tag == 0) && late.iter().all(|p| p.tag == 1));
            parts.extend(late);
            let sums = [crc32fast::hash(&flat), crc32fast::hash(&transposed), 0];
            assert_eq!(whole(parts, 3), sums);
        }
    }
}
