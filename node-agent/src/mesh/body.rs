//! Blocks of bytes on their way out, in buffers that come back: a fresh one for each block would cost more
//! in page faults than the network does.

use std::sync::{Arc, Mutex, PoisonError};

use ::bytes::Bytes;

/// A few of them are on their way at a time, and all of these fit a core's second cache: the kernel copies
/// into a buffer that is there at two to three times the speed.
pub(super) const BLOCK_BYTES: usize = 64 << 10;

/// What a connection collects before it writes, and reads at a time: for the same reason.
pub(super) const BUFFER_BYTES: usize = 128 << 10;

/// Buffers that are not in use.
#[derive(Clone, Debug, Default)]
pub(super) struct Blocks(Arc<Mutex<Vec<Vec<u8>>>>);

/// More of them are given back to the system.
const KEPT: usize = 32;

/// A block that is on its way.
struct Block {
    buffer: Vec<u8>,
    len: usize,
    home: Blocks,
}

impl AsRef<[u8]> for Block {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let mut kept = self.home.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT {
            kept.push(std::mem::take(&mut self.buffer));
        }
    }
}

impl Blocks {
    /// A block of `len` bytes, [`BLOCK_BYTES`] at most, filled by `fill`.
    pub(super) fn filled<E>(
        &self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Bytes, E> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut buffer = kept.unwrap_or_else(|| vec![0; BLOCK_BYTES]);
        let filled = fill(&mut buffer[..len]);
        let block = Block { buffer, len, home: self.clone() };
        filled.map(|()| Bytes::from_owner(block))
    }
}
