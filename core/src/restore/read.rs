//! One shard that can be read, and what is done about its damaged copies: told, and mended from the
//! good ones.
//!
//! A tensor that several ranks hold lies in one rank's shard: the others bring that shard along.
//!
//! It owns the copies. It does not own how bytes come into memory (`reading`).
//!
//! # Invariants
//!
//! - A copy is mended with bytes that were checked, and dying in the middle leaves damaged what was.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::{
    asks::{Care, Further, Over, Rest},
    reading::Reading,
    survey::{BadCopy, ShardCopy, mark_bad},
};
use crate::{
    commit::read_manifest,
    error::{Error, Result},
    manifest::{ShardManifest, TensorEntry},
    names::{CheckpointKey, Rank, Step},
    observe::{Observer, add, locked},
    packed,
    snapshot::{copy::Memory, map::SlotMap},
    tier::{
        Payload, Source, Tier, TierKind,
        buffer::{AlignedBuf, padded},
        create_same, label,
    },
};

/// Chunks in flight from a file: a disk wants a few requests, and four of 4 MiB are 16 MiB.
pub(crate) const READERS: usize = 4;

/// Where one shard can be read, nearest first.
#[derive(Clone, Debug)]
pub struct Restorable {
    /// Which checkpoint.
    pub key: CheckpointKey,
    /// Which rank's shard.
    pub rank: Rank,
    pub(crate) tiers: Vec<Arc<dyn Tier>>,
    pub(crate) copies: Vec<ShardCopy>,
    pub(crate) bad: Vec<BadCopy>,
    /// The slot of this process that holds it, mapped.
    pub(crate) slot: Option<Arc<SlotMap>>,
    pub(crate) observer: Observer,
    /// The owner of the run mends; a mere reader does not write.
    pub(crate) mends: bool,
    /// A rank of the run that finds no good copy says so to the next decision.
    pub(crate) marks: bool,
    /// Who does either, where this process does not.
    pub(crate) care: Option<Arc<dyn Care>>,
    /// Whom it matters to that it has been read.
    pub(crate) over: Option<Arc<Over>>,
    /// Looks for copies further away, where those that are known are not enough.
    pub(crate) further: Option<Further>,
    /// The shards of other ranks that have tensors of this one. They are only read.
    pub others: Vec<Restorable>,
    /// Finds those of the ranks that are not among them, where boxes of a tensor may lie in any.
    pub(crate) rest: Option<Rest>,
}

/// How a read went.
#[derive(Clone, Debug)]
pub struct ReadReport {
    /// The tier that most bytes came from: the nearest with a good manifest.
    pub tier: TierKind,
    /// One sentence for each damaged copy.
    pub damaged: Vec<String>,
}

impl Restorable {
    /// A shard with these copies in these tiers, which is only read.
    pub(crate) fn of(
        key: CheckpointKey,
        rank: Rank,
        tiers: Vec<Arc<dyn Tier>>,
        (copies, bad): (Vec<ShardCopy>, Vec<BadCopy>),
        observer: Observer,
    ) -> Self {
        Self {
            key,
            rank,
            tiers,
            copies,
            bad,
            slot: None,
            observer,
            mends: false,
            marks: false,
            care: None,
            over: None,
            further: None,
            others: Vec::new(),
            rest: None,
        }
    }

    /// The shards of other ranks of the checkpoint.
    ///
    /// # Errors
    /// No tier that this process reaches has a good copy of one's manifest.
    pub fn find_rest(&self, ranks: &[Rank]) -> Result<Vec<Self>> {
        match &self.rest {
            Some(rest) => rest.find(ranks),
            None => Err(Error::Bug(format!("{}: nobody knows other ranks' shards", self.key))),
        }
    }

    /// Completed training steps.
    #[must_use]
    pub fn step(&self) -> Step {
        self.key.step
    }

    /// The payload of the first copy.
    ///
    /// # Errors
    /// The tier did not answer.
    pub(crate) fn open_first(&self) -> Result<Box<dyn Source>> {
        let payload = self.manifest().payload.stored_file();
        self.tier(0).open(&self.key.file(payload))
    }

    /// The shard's description.
    #[must_use]
    pub fn manifest(&self) -> &ShardManifest {
        &self.copies[0].manifest
    }

    /// What this rank has of the checkpoint: the tensors of its shard, then those that it leaves to others.
    /// Of a tensor that is cut, its boxes.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorEntry> {
        let elsewhere = self.others.iter().flat_map(|other| {
            let names = self.left_to(other.rank);
            other.manifest().tensors.iter().filter(move |t| names.contains(t.name.as_str()))
        });
        self.manifest().tensors.iter().chain(elsewhere)
    }

    /// The ranks that store tensors of this one.
    pub(crate) fn leaves_to(&self) -> BTreeSet<Rank> {
        let elsewhere = self.manifest().replicated.iter().flat_map(|r| r.elsewhere(self.rank.0));
        elsewhere.map(|tensor| Rank(tensor.saver)).collect()
    }

    /// The tensors of this rank that `saver` stores.
    #[must_use]
    pub fn left_to(&self, saver: Rank) -> HashSet<&str> {
        let elsewhere = self.manifest().replicated.iter().flat_map(|r| r.elsewhere(self.rank.0));
        elsewhere.filter(|t| t.saver == saver.0).map(|t| t.name.as_str()).collect()
    }

    /// The manifest's bytes, as they lie.
    #[must_use]
    pub fn manifest_bytes(&self) -> &[u8] {
        &self.copies[0].bytes
    }

    /// Copies the tensors named in `targets` into the caller's memory. Others are not read.
    ///
    /// # Errors
    /// [`Error::Lost`] where some chunk is good in no tier. The targets then hold old and new
    /// bytes.
    ///
    /// # Safety
    /// Each target is writable memory of exactly the tensor's bytes, apart from all others, and no
    /// thread touches it until this returns.
    pub unsafe fn read(
        &self,
        targets: &HashMap<String, Memory>,
        threads: Option<usize>,
    ) -> Result<ReadReport> {
        let mut reading = Reading::of(self.clone());
        // SAFETY: the caller's promise.
        unsafe { reading.fill(targets, threads) }?;
        Ok(reading.finish())
    }

    pub(super) fn tier(&self, copy: usize) -> &dyn Tier {
        &*self.tiers[self.copies[copy].tier]
    }

    pub(super) fn chunks_in_words(&self, copy: usize, bad: &BTreeSet<usize>) -> String {
        let payload = self.copies[copy].manifest.payload.stored_file();
        let file = label(self.tier(copy), &self.key.file(payload));
        let shown: Vec<String> = bad.iter().take(4).map(ToString::to_string).collect();
        let more = if bad.len() > 4 { ", ..." } else { "" };
        let s = if bad.len() == 1 { "" } else { "s" };
        format!(
            "{file} is damaged: chunk{s} {}{more} of {}",
            shown.join(", "),
            self.manifest().payload.chunks.len()
        )
    }

    pub(super) fn lost(&self, damaged: &[String]) -> Error {
        Error::Lost { step: self.key.step, rank: self.rank, why: damaged.join("; ") }
    }

    /// The same with the copies that are further away; false: there are none.
    pub(super) fn look_further(&mut self) -> Result<bool> {
        let Some(further) = self.further.take() else { return Ok(false) };
        let (tiers, mut copies) = further.look()?;
        copies.retain(|copy| copy.bytes.as_slice() == self.manifest_bytes());
        self.add_copies(tiers, copies);
        Ok(true)
    }

    /// Copies behind those that are here.
    pub(crate) fn add_copies(&mut self, tiers: Vec<Arc<dyn Tier>>, copies: Vec<ShardCopy>) {
        let first = self.tiers.len();
        self.tiers.extend(tiers);
        self.copies.extend(copies.into_iter().map(|c| ShardCopy { tier: first + c.tier, ..c }));
    }

    /// The next decision passes this step over: this rank found no good copy.
    pub(crate) fn mark_lost(&self) {
        // Decisions are made by what lies beside the records of this node, not by a bucket.
        let home = self.tiers.iter().rev().find(|tier| tier.kind() != TierKind::Object);
        match (&self.care, home) {
            _ if !self.marks => {}
            (Some(care), _) => care.lost(self.rank),
            (None, Some(home)) => mark_bad(&**home, &self.observer, &self.key, self.rank),
            (None, None) => {}
        }
    }

    pub(super) fn tell(&self, report: &ReadReport) {
        for why in &report.damaged {
            self.observer.warn(
                "damaged_copy",
                Some(self.key.step.0),
                format!("{}: {why}; another copy was used", self.key.step),
            );
        }
    }

    /// Puts good bytes where bad ones were found. What cannot be mended is told and stays as it
    /// was.
    pub(crate) fn mend(&self, damaged: &[BTreeSet<usize>]) {
        if let Some(care) = &self.care {
            if !self.bad.is_empty() || damaged.iter().any(|chunks| !chunks.is_empty()) {
                care.mend(self.rank, damaged);
            }
            return;
        }
        for (copy, chunks) in damaged.iter().enumerate().filter(|(_, chunks)| !chunks.is_empty()) {
            let mended = chunks.iter().try_for_each(|chunk| self.mend_chunk(copy, *chunk));
            self.tell_mended(self.copies[copy].tier, mended);
        }
        // A copy whose manifest was bad, or whose payload was gone or short, is made anew.
        for bad in &self.bad {
            let Some(tier) = self.tiers.iter().position(|t| t.kind() == bad.tier) else { continue };
            self.tell_mended(tier, self.replace(&*self.tiers[tier]));
        }
    }

    /// Puts good bytes, of whichever copy, where bad ones were found in the first copies.
    ///
    /// # Errors
    /// Some are good nowhere, or could not be written.
    pub(crate) fn mend_all(&self, damaged: &[BTreeSet<usize>]) -> Result<()> {
        for (copy, chunks) in damaged.iter().enumerate().filter(|(_, chunks)| !chunks.is_empty()) {
            chunks.iter().try_for_each(|chunk| self.mend_chunk(copy, *chunk))?;
            self.tell_mended(self.copies[copy].tier, Ok(()));
        }
        Ok(())
    }

    fn tell_mended(&self, tier: usize, mended: Result<()>) {
        let (step, tier) = (Some(self.key.step.0), &self.tiers[tier]);
        match mended {
            Ok(()) => {
                add(&self.observer.counters.repairs, 1);
                let text =
                    format!("{}: the copy in the {} tier was mended", self.key.step, tier.kind());
                self.observer.info("repaired", step, text);
            }
            Err(e) => {
                let text = format!(
                    "{}: the copy in the {} tier could not be mended: {}",
                    self.key.step,
                    tier.kind(),
                    e.chain()
                );
                self.observer.warn("repair_failed", step, text);
            }
        }
    }

    fn mend_chunk(&self, copy: usize, chunk: usize) -> Result<()> {
        let mut buffer = AlignedBuf::new(1);
        let good = self.good_chunk(&Opened::default(), copy, chunk, &mut buffer)?;
        let payload = &self.copies[copy].manifest.payload;
        if payload.stored.is_some() {
            let what = format!("mend a chunk of {}, which is compressed", payload.stored_file());
            return Err(Error::Io { what, source: std::io::ErrorKind::Unsupported.into() });
        }
        let offset = chunk as u64 * payload.chunk_bytes;
        self.tier(copy).mend(&self.key.file(&payload.file), offset, good)
    }

    /// A checked chunk from any copy but `not`.
    fn good_chunk<'a>(
        &self,
        opened: &Opened,
        not: usize,
        chunk: usize,
        buffer: &'a mut AlignedBuf,
    ) -> Result<&'a [u8]> {
        let (mut len, mut trouble) = (None, None);
        for index in (0..self.copies.len()).filter(|i| *i != not) {
            let payload = &self.copies[index].manifest.payload;
            let source = match opened.get(self, index) {
                Ok(source) => source,
                Err(e) => {
                    trouble = Some(e);
                    continue;
                }
            };
            if read_chunk(&*source, payload, chunk, buffer)
                .is_ok_and(|bytes| crc32fast::hash(bytes) == payload.chunks[chunk])
            {
                len = usize::try_from(payload.chunk_len(chunk)).ok();
                break;
            }
        }
        match len {
            Some(len) => Ok(&buffer[..len]),
            None => Err(trouble.unwrap_or_else(|| {
                self.lost(&[format!("chunk {chunk} is good in no other copy")])
            })),
        }
    }

    /// True where the copy's manifest is not the one that was read before: the job took the slot.
    pub(super) fn is_retired(&self, copy: usize) -> bool {
        match read_manifest(self.tier(copy), &self.key, self.rank, None) {
            Ok((_, bytes)) => bytes != *self.copies[copy].bytes,
            Err(e) => e.is_not_found() || matches!(e, Error::Damaged { .. }),
        }
    }

    /// Makes a copy good whose manifest is bad, or whose payload is gone or short. A payload of the
    /// right length is mended where it lies: it may be a slot that is mapped.
    fn replace(&self, tier: &dyn Tier) -> Result<()> {
        let (manifest, bytes) = (self.manifest(), &self.copies[0].bytes);
        let name = self.key.file(&manifest.payload.file);
        let there = match tier.open(&name) {
            Ok(source) => Some(source).filter(|s| s.len() == manifest.payload.length),
            Err(e) if e.is_not_found() => None,
            Err(e) => return Err(e),
        };
        tier.delete(&self.key.manifest(self.rank))?;
        match there {
            Some(source) => {
                let (mut buffer, opened) = (AlignedBuf::new(1), Opened::default());
                for chunk in 0..manifest.payload.chunks.len() {
                    let read = read_chunk(&*source, &manifest.payload, chunk, &mut buffer);
                    let crc = manifest.payload.chunks[chunk];
                    if !read.is_ok_and(|bytes| crc32fast::hash(bytes) == crc) {
                        let good = self.good_chunk(&opened, usize::MAX, chunk, &mut buffer)?;
                        tier.mend(&name, chunk as u64 * manifest.payload.chunk_bytes, good)?;
                    }
                }
                create_same(tier, &self.key.manifest(self.rank), bytes).map(drop)
            }
            // A cache need not have it: the next save fills it again.
            None if tier.kind() == TierKind::Ram => Ok(()),
            None => {
                tier.delete(&name)?;
                let receipt = tier.put(&name, &self.payload())?;
                crate::commit::publish_shard(tier, &manifest.identity, bytes, receipt)
            }
        }
    }

    /// The shard as a payload that checks each block: for copying it elsewhere.
    #[must_use]
    pub fn payload(&self) -> impl Payload + '_ {
        let kept = Mutex::new((None, AlignedBuf::new(1)));
        CheckedPayload { shard: self, opened: Opened::default(), kept }
    }

    /// Reads every byte of every copy and says what is wrong with each: the whole of `verify`.
    ///
    /// # Errors
    /// None; what a tier does not answer is among the findings.
    pub fn verify(&self) -> Vec<BadCopy> {
        let mut findings = self.bad.clone();
        for index in 0..self.copies.len() {
            let payload = &self.copies[index].manifest.payload;
            let tier = self.tier(index);
            let source = match packed::open(tier, &self.key, payload) {
                Ok(source) => source,
                Err(e) => {
                    findings.push(BadCopy { tier: tier.kind(), why: e.chain() });
                    continue;
                }
            };
            let next = AtomicUsize::new(0);
            let bad = Mutex::new(Vec::new());
            let work = || {
                let mut buffer = AlignedBuf::new(1);
                loop {
                    let chunk = next.fetch_add(1, Ordering::Relaxed);
                    let Some(crc) = payload.chunks.get(chunk) else { break };
                    if !read_chunk(&*source, payload, chunk, &mut buffer)
                        .is_ok_and(|bytes| crc32fast::hash(bytes) == *crc)
                    {
                        locked(&bad).push(chunk);
                    }
                }
            };
            run_on(READERS.min(payload.chunks.len()), &work);
            let bad: BTreeSet<usize> = locked(&bad).drain(..).collect();
            if !bad.is_empty() {
                let why = self.chunks_in_words(index, &bad);
                findings.push(BadCopy { tier: tier.kind(), why });
            }
        }
        findings
    }
}

/// Copies that were opened, each once: a bucket is asked for an object's length each time, and reads ahead
/// only for who reads on.
#[derive(Default)]
struct Opened(Mutex<HashMap<usize, Arc<dyn Source>>>);

impl Opened {
    fn get(&self, shard: &Restorable, copy: usize) -> Result<Arc<dyn Source>> {
        if let Some(source) = locked(&self.0).get(&copy) {
            return Ok(source.clone());
        }
        let payload = &shard.copies[copy].manifest.payload;
        let source: Arc<dyn Source> = packed::open(shard.tier(copy), &shard.key, payload)?.into();
        Ok(locked(&self.0).entry(copy).or_insert(source).clone())
    }
}

/// A shard read from whichever copy is good, block by block.
struct CheckedPayload<'a> {
    shard: &'a Restorable,
    opened: Opened,
    /// The chunk that was checked last, where blocks are not chunks: several blocks of a large one
    /// are read once.
    kept: Mutex<(Option<usize>, AlignedBuf)>,
}

impl Payload for CheckedPayload<'_> {
    fn len(&self) -> u64 {
        self.shard.manifest().payload.length
    }

    fn block<'a>(
        &'a self,
        offset: u64,
        len: usize,
        scratch: &'a mut AlignedBuf,
    ) -> Result<&'a [u8]> {
        let payload = &self.shard.manifest().payload;
        let chunk = usize::try_from(offset / payload.chunk_bytes).unwrap_or(usize::MAX);
        let len = padded(len);
        scratch.ensure(len);
        if offset.is_multiple_of(payload.chunk_bytes)
            && len == padded(usize::try_from(payload.chunk_len(chunk)).unwrap_or(0))
        {
            let opened = &self.opened;
            let good = self.shard.good_chunk(opened, usize::MAX, chunk, scratch)?.len();
            scratch[good..].fill(0);
        } else {
            self.gather(offset, &mut scratch[..len])?;
        }
        Ok(&scratch[..len])
    }

    fn crc32(&self, offset: u64, len: u64) -> Option<u32> {
        self.shard.manifest().payload.crc32(offset, len)
    }
}

impl CheckedPayload<'_> {
    /// Fills `into` from `offset` out of chunks of another size, each checked; what lies past the
    /// payload's end is zeros.
    fn gather(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let payload = &self.shard.manifest().payload;
        let mut kept = locked(&self.kept);
        let (known, buffer) = &mut *kept;
        let mut done = 0;
        while done < into.len() && offset + (done as u64) < payload.length {
            let at = offset + done as u64;
            let chunk = usize::try_from(at / payload.chunk_bytes).unwrap_or(usize::MAX);
            if *known != Some(chunk) {
                *known = None;
                self.shard.good_chunk(&self.opened, usize::MAX, chunk, buffer)?;
                *known = Some(chunk);
            }
            let end = usize::try_from(payload.chunk_len(chunk)).unwrap_or(0);
            let from = usize::try_from(at % payload.chunk_bytes).unwrap_or(end);
            let n = (end - from).min(into.len() - done);
            into[done..done + n].copy_from_slice(&buffer[from..from + n]);
            done += n;
        }
        into[done..].fill(0);
        Ok(())
    }
}

/// One chunk into an aligned buffer, unchecked.
pub(crate) fn read_chunk<'a>(
    source: &dyn Source,
    payload: &crate::manifest::PayloadInfo,
    chunk: usize,
    buffer: &'a mut AlignedBuf,
) -> Result<&'a [u8]> {
    let len = usize::try_from(payload.chunk_len(chunk)).unwrap_or(0);
    buffer.ensure(len);
    let offset = chunk as u64 * payload.chunk_bytes;
    if offset + len as u64 > source.len() {
        return Err(Error::damaged(payload.file.clone(), "it is shorter than its manifest says"));
    }
    source.read_at(offset, &mut buffer[..padded(len)])?;
    Ok(&buffer[..len])
}

pub(crate) fn run_on(threads: usize, work: &(impl Fn() + Sync)) {
    if threads <= 1 {
        return work();
    }
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
}
