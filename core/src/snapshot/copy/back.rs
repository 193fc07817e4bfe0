//! Out of a slot, a buffer or a file, into the live tensors.

use crc32fast::Hasher;

use super::{Address, Moved, Plan, Work, on_threads, pass};

/// Copies the slot into the live tensors, checking each chunk; returns the bad ones, sorted. What
/// was copied from a bad chunk is rubbish: the caller takes it from another tier with
/// [`restore_chunk`], or fails. [`Memory::InPlace`] pieces are checked and not copied; chunks
/// without a wanted byte are not read.
///
/// # Panics
///
/// If there is not one checksum for each chunk, or a tensor
/// [`overlaps`](crate::snapshot::strided::Strided::overlaps) itself.
///
/// # Safety
///
/// `slot` is readable for `plan.len()` bytes. All other memory of the plan is writable, apart from
/// the slot and from each other. Until this returns no other thread touches it or writes to the
/// slot.
#[must_use]
pub unsafe fn restore(plan: &Plan, slot: *const u8, crcs: &[u32], threads: usize) -> Vec<u32> {
    assert_eq!(crcs.len(), plan.chunks(), "one checksum for each chunk");
    assert!(!plan.overlaps, "a tensor whose elements share memory cannot be restored into");
    let slot = Address::read_only(slot);
    let work = Work { to_slot: false, moved: Moved::All, checksum: true };
    let mut bad = on_threads(plan.chunks(), threads, |chunk| {
        if !plan.wants(chunk) {
            return None;
        }
        // SAFETY: the slot has `plan.len()` bytes and is only read; each chunk is given to one
        // thread, and no two chunks share a byte of memory.
        let (crc, _) = unsafe {
            let range = plan.chunk(chunk);
            pass(plan, range.clone(), slot.get().add(range.start), work)
        };
        (crc != crcs[chunk]).then_some(chunk as u32)
    });
    bad.sort_unstable();
    bad
}

/// [`restore`] of one chunk that is read piece by piece, each copied and checked while the cache still
/// has it: `read` fills a piece from so many bytes into the payload. False: the chunk is damaged, and
/// what was copied is rubbish; so it is after an error of `read`.
///
/// # Panics
///
/// If there is no such chunk, or a tensor [`overlaps`](crate::snapshot::strided::Strided::overlaps) itself.
///
/// # Errors
///
/// Those of `read`.
///
/// # Safety
///
/// As [`restore_chunk`].
pub unsafe fn restore_passing<E>(
    plan: &Plan,
    chunk: usize,
    crc: u32,
    buffer: &mut [u8],
    mut read: impl FnMut(usize, &mut [u8]) -> Result<(), E>,
) -> Result<bool, E> {
    assert!(!plan.overlaps, "a tensor whose elements share memory cannot be restored into");
    let work = Work { to_slot: false, moved: Moved::All, checksum: true };
    let mut sum = Hasher::new();
    let whole = plan.chunk(chunk);
    for start in whole.clone().step_by(buffer.len()) {
        let range = start..whole.end.min(start + buffer.len());
        let piece = &mut buffer[..range.len()];
        read(start, piece)?;
        // SAFETY: `piece` is as long as the range and is only read; the rest is the caller's promise.
        let (crc, _) = unsafe { pass(plan, range.clone(), piece.as_mut_ptr(), work) };
        sum.combine(&Hasher::new_with_initial_len(crc, range.len() as u64));
    }
    Ok(sum.finalize() == crc)
}

/// Checks one chunk that came from a file or a peer, and only if it is good copies it into the live
/// tensors. False: it is not, or not of the right length, and nothing was touched.
///
/// # Panics
///
/// If there is no such chunk, or a tensor [`overlaps`](crate::snapshot::strided::Strided::overlaps) itself.
///
/// # Safety
///
/// All memory of the plan in this chunk is writable and apart from `bytes`, and until this returns
/// no other thread touches it. Two threads may restore two chunks at once.
#[must_use]
pub unsafe fn restore_chunk(plan: &Plan, chunk: usize, bytes: &[u8], crc: u32) -> bool {
    assert!(!plan.overlaps, "a tensor whose elements share memory cannot be restored into");
    if bytes.len() != plan.chunk(chunk).len() || crc32fast::hash(bytes) != crc {
        return false;
    }
    let work = Work { to_slot: false, moved: Moved::All, checksum: false };
    // SAFETY: `bytes` is as long as the chunk and is only read; the rest is promised by the caller.
    unsafe { pass(plan, plan.chunk(chunk), bytes.as_ptr().cast_mut(), work) };
    true
}
