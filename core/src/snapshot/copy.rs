//! The one pass that copies a training state into a slot and checksums it, and its mirror that
//! copies a slot back into the live tensors and checks it.
//!
//! A shard is `len` bytes of payload, cut in chunks that count from byte 0, each with a CRC-32. A
//! [`Plan`] says where every byte of it lies in memory. Threads take chunks from a counter, so one
//! that the scheduler holds up delays one chunk, not its share.
//!
//! Owns: the plan's arithmetic, the copy, the checksums, the threads of one call. Does not own: the
//! slot's life (`snapshot::arena`), the header's bytes (they are a piece like any other, often
//! [`Memory::InPlace`]), moving bytes off a GPU, or what to do about damage (`restore`).
//!
//! # Invariants
//!
//! - Chunk checksums are those of the payload bytes, and combine to the checksum of the whole.
//! - Two phases give the same slot and checksums as one.
//! - Any number of threads gives the same slot and checksums.
//! - Restoring gives back what was captured, and touches no other byte.
//! - A damaged chunk is reported, exactly it.
//! - A chunk without a wanted byte is not read.
//! - A damaged chunk in a buffer never reaches a tensor. (One that is read piece by piece does, and is
//!   reported.)
//! - A tagged piece's checksum is that of its bytes, however chunks cut it, and changes no other.
//! - A panic on a copying thread reaches the caller.
//!
//! # Which bytes are checksummed
//!
//! Small and strided pieces are checksummed in the slot, 8 KiB after 8 KiB, from the cache that the
//! copy just filled. Long contiguous ones are written past the cache, so their checksum is taken
//! from the *source* just after it was copied. As nobody writes to it meanwhile, which the caller
//! promises, these are the same. Where the promise is broken, a write between copy and checksum
//! gives a checksum that the slot does not have: an error at restore, as is a bit that the slot
//! loses on the way in. A write before the copy is saved like any other byte: no checksum can see
//! that a state is half of the next step.
//!
//! # Measured
//!
//! Medians of ratios to memcpy of the same pieces into the same pre-faulted memory in /dev/shm, 15
//! interleaved rounds of benches/copy.rs, Intel Xeon (family 6 model 207, AVX-512), 2 cores:
//!
//! | f32 parameters and moments, 444 pieces, 1,052 MiB | 1 thread | 2 threads |
//! |---|---|---|
//! | memcpy, no checksum | 1.00 | 0.56 |
//! | capture | 0.82 | 0.42 |
//! | restore | 0.83 | 0.43 |
//! | restore_chunk of each: check, then copy | 1.27 | |
//!
//! 2,000 tensors of 1 KiB: capture 1.09 (0.14 ms), restore 1.06. 64 MiB that a 260 MiB third-level
//! cache still holds: capture 1.16, restore 1.06; with the sources flushed capture 0.77 (one run of
//! 9 rounds).
//!
//! Tried for the long pieces, 1 thread, 5 rounds: through the cache in blocks of 8, 16, 32, 64 KiB
//! 1.18, 1.17, 1.21, 1.27. Past it with AVX2 in blocks of 4, 8, 16, 32, 64 KiB 0.88, 0.84, 0.87,
//! 0.91, 0.92, with prefetch 0.80 at 8 KiB (without a checksum 0.79: it is free). AVX-512 0.78, and
//! 0.75 with four pages at a time: too little for a second loop. Checksum before copy 0.90 at best
//! with AVX2. A fused checksum was not tried: crc32fast uses VPCLMULQDQ, and nothing is left to
//! win.

use std::{
    ops::Range,
    panic,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use crc32fast::Hasher;

pub use self::{
    back::{restore, restore_chunk, restore_passing},
    excerpt::Excerpt,
    plan::{Memory, Piece, Plan},
};
use super::strided::Address;

/// Copied, then checksummed, at a time: both ends and what the prefetcher ran ahead fit the
/// smallest first-level cache in use, 32 KiB.
const BLOCK_BYTES: usize = 8 << 10;

/// The same for a strided piece: sixteen rows of a transpose, so that all of a cache line is used,
/// in half of a 512 KiB second-level cache.
const BLOCK_BYTES_STRIDED: usize = 256 << 10;

/// From here on a contiguous piece is written past the cache. 512 MiB in pieces of 4, 8, 16, 64 KiB
/// took 0.79, 0.74, 0.72, 0.72 of memcpy that way and 0.99, 0.99, 1.01, 1.02 through it; below one
/// block the fence begins to show, and such tensors are few.
const STREAM_BYTES_MIN: usize = BLOCK_BYTES;

/// A thread costs some 50 us to start; 4 MiB take five to ten times that to copy.
const THREAD_BYTES_MIN: usize = 4 << 20;

/// Checksums of what a device brings are taken at 7 GB/s a thread (an H100's host, 16 cores), and its
/// DMA brings 54 GB/s. With eight ranks on a node that is half of its usual cores at most, for the
/// moment in which all of them wait.
const THREADS_MAX: usize = 8;

/// What a capture found.
#[derive(Debug, Default)]
pub struct Sums {
    /// A CRC-32 for each chunk.
    pub chunks: Vec<u32>,
    /// Those of tagged pieces, in no order.
    pub parts: Vec<Part>,
}

/// The CRC-32 of a run of bytes of a tagged piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Part {
    /// The piece's.
    pub tag: usize,
    /// First byte in the piece.
    pub at: usize,
    /// Bytes.
    pub len: usize,
    /// Their checksum.
    pub crc: u32,
}

/// The checksums of tagged pieces, from all their parts; of a piece of no bytes there is none, and
/// its checksum is 0, as it is of no bytes.
///
/// # Panics
///
/// If a part is missing, or its tag is not below `tags`.
#[must_use]
pub fn whole(mut parts: Vec<Part>, tags: usize) -> Vec<u32> {
    parts.sort_unstable();
    let mut sums: Vec<(Hasher, usize)> = vec![(Hasher::new(), 0); tags];
    for part in parts {
        let (sum, done) = &mut sums[part.tag];
        assert_eq!(*done, part.at, "a part of piece {} is missing", part.tag);
        sum.combine(&Hasher::new_with_initial_len(part.crc, part.len as u64));
        *done += part.len;
    }
    sums.into_iter().map(|(sum, _)| sum.finalize()).collect()
}

/// Copies the whole state into the slot; returns a checksum for each chunk.
///
/// # Panics
///
/// If a piece is [`Memory::Skip`] or [`Memory::Excerpts`]: a checkpoint has no bytes that nobody saved.
///
/// # Safety
///
/// `slot` is writable for `plan.len()` bytes and [`Memory::InPlace`] bytes are already there. All
/// other memory of the plan is readable and apart from the slot. Until this returns no other thread
/// writes to any of these, nor reads the slot. (See the module on what a writer that breaks this
/// brings about.)
#[must_use]
pub unsafe fn capture(plan: &Plan, slot: *mut u8, threads: usize) -> Sums {
    // SAFETY: the caller's promise is that of `capture_chunks`.
    unsafe { capture_chunks(plan, slot, 0..plan.chunks(), threads) }
}

/// [`capture`] of some chunks: the others may still be on their way into the slot.
///
/// # Panics
///
/// If a piece is [`Memory::Skip`], or there are no such chunks.
///
/// # Safety
///
/// As [`capture`], for the bytes of these chunks.
#[must_use]
pub unsafe fn capture_chunks(
    plan: &Plan,
    slot: *mut u8,
    chunks: Range<usize>,
    threads: usize,
) -> Sums {
    let work = Work { to_slot: true, moved: Moved::All, checksum: true };
    // SAFETY: the caller's promise is that of `capture_all`.
    unsafe { capture_all(plan, slot, chunks, threads, work) }
}

/// First of two phases, on the trainer's thread: copies the pieces marked `now`, and no more.
///
/// # Panics
///
/// If a piece is [`Memory::Skip`].
///
/// # Safety
///
/// As [`capture`], but only for the pieces marked `now`.
pub unsafe fn capture_now(plan: &Plan, slot: *mut u8, threads: usize) {
    let work = Work { to_slot: true, moved: Moved::Now, checksum: false };
    // SAFETY: only pieces marked `now` are touched, in memory and in the slot.
    let _ = unsafe { capture_all(plan, slot, 0..plan.chunks(), threads, work) };
}

/// Second of two phases, on any thread: copies the other pieces, and checksums everything, what
/// [`capture_now`] brought from the slot.
///
/// # Panics
///
/// If a piece is [`Memory::Skip`].
///
/// # Safety
///
/// As [`capture`], but memory of the pieces marked `now` is not touched: `capture_now` has
/// returned, with the same plan and slot, and what it did happens before this call.
#[must_use]
pub unsafe fn capture_rest(plan: &Plan, slot: *mut u8, threads: usize) -> Sums {
    let work = Work { to_slot: true, moved: Moved::Rest, checksum: true };
    // SAFETY: only pieces not marked `now` are read outside the slot.
    unsafe { capture_all(plan, slot, 0..plan.chunks(), threads, work) }
}

/// # Safety
///
/// As [`capture`], for the pieces of these chunks that `work` moves.
unsafe fn capture_all(
    plan: &Plan,
    slot: *mut u8,
    chunks: Range<usize>,
    threads: usize,
    work: Work,
) -> Sums {
    assert!(!plan.skips, "a capture with bytes to skip");
    let slot = Address::new(slot);
    let mut sums = Sums { chunks: vec![0; chunks.len()], parts: Vec::new() };
    let found = on_threads(chunks.len(), threads, |index| {
        let chunk = chunks.start + index;
        // SAFETY: the slot has `plan.len()` bytes, and each chunk is given to one thread.
        let sum = unsafe {
            let range = plan.chunk(chunk);
            pass(plan, range.clone(), slot.get().add(range.start), work)
        };
        Some((index, sum))
    });
    for (index, (crc, parts)) in found {
        sums.chunks[index] = crc;
        sums.parts.extend(parts);
    }
    sums
}

/// How many threads to give a copy that the trainer waits for: 1 where starting another costs more
/// than it saves, at most eight, and at most half of the cores, for the others load data or serve
/// other ranks. The calling thread is one of them.
#[must_use]
pub fn threads_for(bytes: usize) -> usize {
    // Asking reads control group files, which takes longer than a small copy.
    static CORES: OnceLock<usize> = OnceLock::new();
    let cores = *CORES.get_or_init(|| thread::available_parallelism().map_or(1, usize::from));
    threads_among(bytes, cores)
}

fn threads_among(bytes: usize, cores: usize) -> usize {
    // Two or three cores are all taken: the trainer, who would use one, is waiting.
    let share = if cores < 4 { cores } else { cores / 2 };
    (bytes / THREAD_BYTES_MIN).min(share).clamp(1, THREADS_MAX)
}

/// What one pass over a chunk does.
#[derive(Clone, Copy)]
struct Work {
    to_slot: bool,
    moved: Moved,
    checksum: bool,
}

#[derive(Clone, Copy)]
enum Moved {
    All,
    Now,
    Rest,
}

impl Work {
    fn moves(self, piece: &Piece) -> bool {
        match self.moved {
            Moved::All => true,
            Moved::Now => piece.now,
            Moved::Rest => !piece.now,
        }
    }
}

/// The checksum of a chunk, which follows the copy at a distance of at most one block.
struct Checksum {
    hasher: Option<Hasher>,
    /// Of what lies before the last cut; `hasher` goes on from there.
    before: Option<Hasher>,
    /// Start of the chunk in the slot.
    slot: *const u8,
    done: usize,
}

impl Checksum {
    /// Takes in slot bytes up to `upto`, if there are `least` or more.
    ///
    /// # Safety
    ///
    /// The chunk is readable up to `upto`, and nobody writes to it.
    unsafe fn follow(&mut self, upto: usize, least: usize) {
        let n = upto - self.done;
        if let Some(hasher) = &mut self.hasher
            && n >= least
        {
            // SAFETY: `done <= upto`, inside the chunk, and promised readable.
            hasher.update(unsafe { std::slice::from_raw_parts(self.slot.add(self.done), n) });
            self.done = upto;
        }
    }

    /// Begins anew at `upto`; the checksum since the last cut.
    ///
    /// # Safety
    ///
    /// As [`follow`](Self::follow).
    unsafe fn cut(&mut self, upto: usize) -> u32 {
        // SAFETY: the caller's promise.
        unsafe { self.follow(upto, 1) };
        let Some(hasher) = &mut self.hasher else { return 0 };
        let since = std::mem::take(hasher);
        match &mut self.before {
            Some(before) => before.combine(&since),
            None => self.before = Some(since.clone()),
        }
        since.finalize()
    }

    fn finish(self) -> u32 {
        match (self.before, self.hasher) {
            (Some(mut before), Some(since)) => {
                before.combine(&since);
                before.finalize()
            }
            (_, hasher) => hasher.map_or(0, Hasher::finalize),
        }
    }
}

/// Moves a range of the payload, a chunk or a part of one, between memory and `slot`, where the range
/// starts, and returns its checksum, and those of the tagged pieces in it.
///
/// # Safety
///
/// The range's bytes in `slot` are readable, and writable if `work.to_slot`. The memory of the
/// pieces that `work` moves is readable, or writable if not `work.to_slot`. They are apart, and
/// nobody else touches what is written or writes to what is read.
unsafe fn pass(plan: &Plan, range: Range<usize>, slot: *mut u8, work: Work) -> (u32, Vec<Part>) {
    let hasher = work.checksum.then(Hasher::new);
    let mut checksum = Checksum { hasher, before: None, slot, done: 0 };
    let mut parts = Vec::new();
    for piece in plan.pieces_in(&range) {
        let start = piece.offset.max(range.start);
        let n = piece.end().min(range.end) - start;
        let (within, at) = (start - piece.offset, start - range.start);
        // SAFETY: [within, within + n) is inside the piece and [at, at + n) inside the chunk, for
        // both of which the caller vouches; what is before `at` has been moved.
        unsafe {
            if piece.tag.is_some() {
                checksum.cut(at);
            }
            match &piece.memory {
                _ if !work.moves(piece) => {}
                Memory::InPlace | Memory::Skip => {}
                Memory::Strided(tensor) => {
                    blocks(at, n, BLOCK_BYTES_STRIDED, &mut checksum, |done, m| {
                        let flat = slot.add(at + done);
                        match work.to_slot {
                            true => tensor.gather(within + done, flat, m),
                            false => tensor.scatter(within + done, flat, m),
                        }
                    });
                }
                // `Plan::skips` keeps it from being captured.
                Memory::Excerpts(excerpts) => {
                    blocks(at, n, BLOCK_BYTES, &mut checksum, |done, m| {
                        let flat = slot.add(at + done);
                        excerpts.iter().for_each(|box_| box_.scatter(within + done, flat, m));
                    });
                }
                Memory::Bytes(memory) => {
                    let ends = (memory.get().add(within), slot.add(at));
                    let (from, to) = if work.to_slot { ends } else { (ends.1, ends.0) };
                    if n >= STREAM_BYTES_MIN && stream::available() {
                        checksum.follow(at, 1);
                        stream::copy(from, to, n, checksum.hasher.as_mut());
                        checksum.done = at + n;
                    } else {
                        blocks(at, n, BLOCK_BYTES, &mut checksum, |done, m| {
                            std::ptr::copy_nonoverlapping(from.add(done), to.add(done), m);
                        });
                    }
                }
            }
            if let (Some(tag), true) = (piece.tag, work.checksum) {
                parts.push(Part { tag, at: within, len: n, crc: checksum.cut(at + n) });
            }
        }
    }
    // SAFETY: the whole chunk has been moved or was in place.
    unsafe { checksum.follow(range.len(), 1) };
    (checksum.finish(), parts)
}

/// Moves `n` bytes block by block, with the checksum behind.
///
/// # Safety
///
/// `[at, at + n)` is inside the chunk, what is before it has been moved, and `shift(done, m)` moves
/// `m` bytes of it.
unsafe fn blocks(
    at: usize,
    n: usize,
    block: usize,
    checksum: &mut Checksum,
    shift: impl Fn(usize, usize),
) {
    let mut done = 0;
    while done < n {
        let m = block.min(n - done);
        shift(done, m);
        done += m;
        // SAFETY: `shift` moved everything up to here.
        unsafe { checksum.follow(at + done, BLOCK_BYTES) };
    }
}

/// Gives the numbers below `count` to `threads` threads, the calling one among them, and collects
/// what `work` found, in no order. Fewer threads where the system gives no more.
pub(super) fn on_threads<T: Send>(
    count: usize,
    threads: usize,
    work: impl Fn(usize) -> Option<T> + Sync,
) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let take = || {
        let claim = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|n| *n < count);
        std::iter::from_fn(claim).filter_map(&work).collect::<Vec<T>>()
    };
    thread::scope(|scope| {
        let helpers: Vec<_> = (1..threads.min(count))
            .map_while(|_| {
                thread::Builder::new().name("tierkeep-copy".into()).spawn_scoped(scope, take).ok()
            })
            .collect();
        let mut found = take();
        for helper in helpers {
            found.extend(helper.join().unwrap_or_else(|payload| panic::resume_unwind(payload)));
        }
        found
    })
}

/// The mirror: out of a slot, a buffer or a file.
mod back;
/// A box of a tensor, out of the payload.
mod excerpt;
/// Where every byte of a payload lies in memory.
mod plan;
/// Copying past the cache. A slot is not read again soon, and a store that goes through the cache
/// first fetches the line it is about to overwrite: half as much again for the memory to do.
mod stream;

#[cfg(test)]
mod tests;
