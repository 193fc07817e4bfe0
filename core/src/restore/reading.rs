//! Reading one shard into memory: every chunk checked, from the nearest tier that has it whole.
//!
//! In one part or several: memory for a whole state is not always there at once, as where it goes on
//! to a device.
//!
//! # Invariants
//!
//! - A byte that does not match its checksum in one tier is taken from the next; in none: an error.
//! - A damaged copy is told once for each restore, in however many parts it is read.
//! - Bytes that come from a device reach the caller's memory only after they were checked; what lies
//!   in memory (a slot, the page cache) is copied on the way, and what was damaged is taken again
//!   from the next copy.
//! - Nothing but this process's own slots is read through a map: the rest by calls, which return an
//!   error where the file is cut short and a load would kill the process.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::{
    asks::Over,
    read::{READERS, ReadReport, Restorable, read_chunk, run_on},
    reshard::Catalog,
};
use crate::{
    error::{Error, ErrorKind, Result},
    names::Rank,
    observe::{add, locked},
    packed,
    snapshot::copy::{Memory, Piece, Plan, restore, restore_chunk, restore_passing, threads_for},
    tier::{Source, TierKind, buffer::AlignedBuf},
};

/// Read from memory at a time: what was read is still in the second-level cache when it is checked and
/// copied on. A map of the file takes longer: its pages are put into the page table and taken out again
/// (a new process, 1 GiB in a slot, two cores of an AMD EPYC: 155 ms this way, 220 ms by a map).
const PIECE_BYTES: usize = 256 << 10;

/// One copy, as far as it was read.
#[derive(Default)]
struct Read {
    source: Option<Box<dyn Source>>,
    good: usize,
    bad: BTreeSet<usize>,
    /// Those of them that were mended meanwhile.
    mended: BTreeSet<usize>,
    /// Why it is bad, where one thing is wrong with all of it.
    trouble: Option<String>,
}

/// Chunks that no copy had.
struct Left {
    chunks: Vec<usize>,
    /// The job took the slot meanwhile.
    retired: bool,
    /// A tier that did not answer.
    unanswered: Option<Error>,
}

/// The reading of one rank's tensors: its shard, and what others store for it.
pub struct Reading {
    pub(super) from: Restorable,
    /// As `from.copies`.
    read: Vec<Read>,
    /// Of the other ranks whose shards are known: those that store tensors of this one, and where boxes of a
    /// tensor were looked for, all.
    pub(super) others: Vec<Reading>,
    /// The tensors that others store, and who does.
    pub(super) left: HashMap<String, Rank>,
    /// The boxes in all of them, once some were asked for.
    pub(super) catalog: Option<Catalog>,
    _ends: Ends,
}

/// Says that the reading is over, also where it failed.
struct Ends(Option<Arc<Over>>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.iter().for_each(|over| over.say());
    }
}

impl Reading {
    /// Nothing is read yet.
    #[must_use]
    pub fn of(from: Restorable) -> Self {
        let read = from.copies.iter().map(|_| Read::default()).collect();
        let elsewhere = from.manifest().replicated.iter().flat_map(|r| r.elsewhere(from.rank.0));
        let left = elsewhere.map(|tensor| (tensor.name.clone(), Rank(tensor.saver))).collect();
        let others = from.others.iter().cloned().map(Self::of).collect();
        let _ends = Ends(from.over.clone());
        Self { from, read, others, left, catalog: None, _ends }
    }

    /// Copies the tensors named in `targets` into the caller's memory. Chunks of others are not
    /// read.
    ///
    /// # Errors
    /// [`Error::Lost`] where some chunk is good in no tier. The targets then hold old and new
    /// bytes.
    ///
    /// # Safety
    /// Each target is writable memory of exactly the tensor's bytes, apart from all others, and no
    /// thread touches it until this returns.
    pub unsafe fn fill(
        &mut self,
        targets: &HashMap<String, Memory>,
        threads: Option<usize>,
    ) -> Result<()> {
        let mut by_rank: BTreeMap<Rank, HashMap<String, Memory>> = BTreeMap::new();
        for (name, memory) in targets {
            let rank = self.left.get(name).copied().unwrap_or(self.from.rank);
            by_rank.entry(rank).or_default().insert(name.clone(), memory.clone());
        }
        // SAFETY: the caller's promise: a name is in one shard's part.
        unsafe { self.fill_by_rank(by_rank, threads) }
    }

    /// # Safety
    /// As [`fill`](Self::fill).
    pub(super) unsafe fn fill_by_rank(
        &mut self,
        targets: BTreeMap<Rank, HashMap<String, Memory>>,
        threads: Option<usize>,
    ) -> Result<()> {
        for (rank, targets) in targets {
            let shard = self.shard(rank)?;
            // SAFETY: the caller's promise.
            unsafe { shard.fill_own(&targets, threads) }?;
        }
        Ok(())
    }

    /// This rank's shard, or another one that is known.
    pub(super) fn shard(&mut self, rank: Rank) -> Result<&mut Self> {
        if rank == self.from.rank {
            return Ok(self);
        }
        let known = self.others.iter_mut().find(|other| other.from.rank == rank);
        known.ok_or_else(|| Error::Bug(format!("{rank}'s shard is not known")))
    }

    /// # Safety
    /// As [`fill`](Self::fill), for the targets that this shard has.
    unsafe fn fill_own(
        &mut self,
        targets: &HashMap<String, Memory>,
        threads: Option<usize>,
    ) -> Result<()> {
        let plan = self.plan(targets)?;
        let all: Vec<usize> = (0..plan.chunks()).filter(|c| plan.wants(*c)).collect();
        // SAFETY: the caller's promise.
        let mut left = unsafe { self.read_copies(&plan, all, threads) };
        if !left.chunks.is_empty() && !left.retired && (self.fetch() || self.look_further()?) {
            // SAFETY: the caller's promise.
            left = unsafe { self.read_copies(&plan, left.chunks, threads) };
        }
        if left.chunks.is_empty() {
            return Ok(());
        }
        if left.retired {
            let what = format!("{}, which its job retired while it was read,", self.from.key);
            return Err(Error::NotFound { what });
        }
        if let Some(e) = left.unanswered {
            return Err(e); // A tier that did not answer may have good bytes: nothing is marked bad.
        }
        self.from.mark_lost();
        Err(self.from.lost(&self.sentences()))
    }

    /// Has what is good in no copy of this node mended from other nodes.
    fn fetch(&mut self) -> bool {
        let Some(care) = self.from.care.as_ref().filter(|_| self.from.mends) else { return false };
        let damaged: Vec<_> = self.read.iter().map(|copy| &copy.bad - &copy.mended).collect();
        if !care.fetch(self.from.rank, &damaged) {
            return false;
        }
        for (copy, mended) in self.read.iter_mut().zip(damaged) {
            copy.mended.extend(mended);
        }
        true
    }

    /// Knows copies further away, from here on.
    fn look_further(&mut self) -> Result<bool> {
        let found = self.from.look_further()?;
        self.read.resize_with(self.from.copies.len(), Read::default);
        Ok(found)
    }

    /// From one copy after the other, nearest first.
    ///
    /// # Safety
    /// As [`fill`](Self::fill), for the targets that this shard has.
    unsafe fn read_copies(
        &mut self,
        plan: &Plan,
        mut left: Vec<usize>,
        threads: Option<usize>,
    ) -> Left {
        let (mut retired, mut unanswered) = (false, None);
        for index in 0..self.read.len() {
            if left.is_empty() {
                break;
            }
            let wanted = left.len();
            // SAFETY: the caller's promise.
            let (bad, trouble) = unsafe { self.read_copy(index, plan, &left, threads) };
            self.read[index].good += wanted - bad.len();
            if !bad.is_empty() && !self.from.mends && self.from.is_retired(index) {
                retired = true; // Its job went on meanwhile: gone, not damaged.
            } else if !bad.is_empty() {
                let before = &mut self.read[index];
                let new = bad.iter().filter(|chunk| before.bad.insert(**chunk)).count();
                add(&self.from.observer.counters.checksum_failures, new as u64);
                if let Some(e) = trouble {
                    before.trouble.get_or_insert_with(|| e.chain());
                    // Neither damaged nor gone: it did not answer, or there was no room to bring it.
                    if !matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) {
                        unanswered.get_or_insert(e);
                    }
                }
            }
            left = bad;
        }
        Left { chunks: left, retired, unanswered }
    }

    /// Tells what was damaged, once, and mends it.
    #[must_use]
    pub fn finish(self) -> ReadReport {
        self.end().1
    }

    /// And how many chunks came from the tier that it names.
    fn end(mut self) -> (usize, ReadReport) {
        let others = std::mem::take(&mut self.others);
        let (mut most, mut report) = self.end_own();
        for (chunks, other) in others.into_iter().map(Self::end) {
            report.damaged.extend(other.damaged);
            if chunks > most {
                (most, report.tier) = (chunks, other.tier);
            }
        }
        (most, report)
    }

    fn end_own(self) -> (usize, ReadReport) {
        let most = self.read.iter().map(|copy| copy.good).max().unwrap_or(0);
        let nearest = self.read.iter().position(|copy| copy.good == most).unwrap_or(0);
        let report = ReadReport { tier: self.from.tier(nearest).kind(), damaged: self.sentences() };
        self.from.tell(&report);
        if self.from.mends {
            let bad: Vec<_> = self.read.iter().map(|copy| &copy.bad - &copy.mended).collect();
            self.from.mend(&bad);
        }
        (most, report)
    }

    fn sentences(&self) -> Vec<String> {
        let bad = self.read.iter().enumerate().filter(|(_, copy)| !copy.bad.is_empty());
        let found = bad.map(|(index, copy)| {
            let chunks = || self.from.chunks_in_words(index, &copy.bad);
            copy.trouble.clone().unwrap_or_else(chunks)
        });
        self.from.bad.iter().map(|b| b.why.clone()).chain(found).collect()
    }

    fn plan(&self, targets: &HashMap<String, Memory>) -> Result<Plan> {
        let manifest = self.from.manifest();
        let size = |n: u64| usize::try_from(n).map_err(|_| Error::Bug("a 32-bit machine".into()));
        let mut pieces = Vec::with_capacity(manifest.tensors.len() + 2);
        let mut at = 0;
        let skip_to = |pieces: &mut Vec<Piece>, at: &mut usize, to: usize| {
            if to > *at {
                let len = to - *at;
                pieces.push(Piece {
                    offset: *at,
                    len,
                    memory: Memory::Skip,
                    now: false,
                    tag: None,
                });
            }
            *at = to;
        };
        for tensor in &manifest.tensors {
            let (begin, end) = (size(tensor.at[0])?, size(tensor.at[1])?);
            skip_to(&mut pieces, &mut at, begin);
            let memory = targets.get(&tensor.name).cloned().unwrap_or(Memory::Skip);
            pieces.push(Piece { offset: begin, len: end - begin, memory, now: false, tag: None });
            at = end;
        }
        skip_to(&mut pieces, &mut at, size(manifest.payload.length)?);
        Plan::new(pieces, size(manifest.payload.length)?, size(manifest.payload.chunk_bytes)?)
    }

    /// Reads chunks from one copy; returns those that are not good there, and why if it is one
    /// reason.
    unsafe fn read_copy(
        &mut self,
        index: usize,
        plan: &Plan,
        chunks: &[usize],
        threads: Option<usize>,
    ) -> (Vec<usize>, Option<Error>) {
        let from = &self.from;
        let payload = &from.copies[index].manifest.payload;
        let is_ram = from.tier(index).kind() == TierKind::Ram;
        if let (true, Some(slot)) = (is_ram && index == 0, &from.slot) {
            let threads = threads.unwrap_or_else(|| threads_for(plan.len()));
            let bytes = slot.bytes(plan.len());
            // SAFETY: the slot has the payload's bytes; the caller's promise covers the targets.
            let bad = unsafe { restore(plan, bytes.as_ptr(), &payload.chunks, threads) };
            return (bad.into_iter().map(|c| c as usize).collect(), None);
        }
        let before = &mut self.read[index].source;
        let source = match before {
            Some(source) => source,
            None => match packed::open(from.tier(index), &from.key, payload) {
                Ok(source) => before.insert(source),
                Err(e) => return (chunks.to_vec(), Some(e)),
            },
        };
        let source = &**source;
        let next = AtomicUsize::new(0);
        let bad = Mutex::new(Vec::new());
        let trouble = Mutex::new(None);
        let work = || {
            let mut buffer = AlignedBuf::new(PIECE_BYTES);
            while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                let (range, crc) = (plan.chunk(*chunk), payload.chunks[*chunk]);
                let good = if source.is_cached(range.start as u64, range.len()) {
                    let read = |at: usize, into: &mut [u8]| source.read_at(at as u64, into);
                    let piece = &mut buffer[..PIECE_BYTES];
                    // SAFETY: the caller's promise; each chunk is one thread's.
                    unsafe { restore_passing(plan, *chunk, crc, piece, read) }
                } else {
                    read_chunk(source, payload, *chunk, &mut buffer)
                        // SAFETY: the caller's promise; each chunk is one thread's.
                        .map(|bytes| unsafe { restore_chunk(plan, *chunk, bytes, crc) })
                };
                match good {
                    Ok(true) => {}
                    Ok(false) => locked(&bad).push(*chunk),
                    Err(e) => {
                        locked(&trouble).get_or_insert(e);
                        locked(&bad).push(*chunk);
                    }
                }
            }
        };
        // Waiting for a disk takes no core; copying from memory takes one each, as from a slot.
        let cached = chunks.first().is_some_and(|c| {
            let range = plan.chunk(*c);
            source.is_cached(range.start as u64, range.len())
        });
        let copiers = || threads.unwrap_or_else(|| threads_for(plan.len()));
        let readers = if cached { copiers() } else { READERS };
        run_on(readers.min(chunks.len()), &work);
        let mut bad = std::mem::take(&mut *locked(&bad));
        bad.sort_unstable();
        (bad, locked(&trouble).take())
    }
}
