//! Tables whose keys are addresses of Python objects or of memory.

use std::hash::{BuildHasherDefault, Hasher};

/// For tables by address: nobody chooses addresses to make them collide.
pub(crate) type ByAddress = BuildHasherDefault<AddressHasher>;

/// One multiplication, for a table that is asked two thousand times in a millisecond.
#[derive(Default)]
pub(crate) struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_usize(usize::from(*byte));
        }
    }

    fn write_usize(&mut self, address: usize) {
        // Addresses are multiples of 16 or 64: the golden ratio brings their bits to the top and, by
        // the rotation, to the bottom, which are what the table looks at.
        let mixed = (self.0 ^ address as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed.rotate_left(26);
    }
}
