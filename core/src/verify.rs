//! Reading every byte of every copy, with the job down or up: what `verify` stands on.
//!
//! It mends nothing and stops at nothing: what one file does not give is said, the next is read.
//!
//! # Invariants
//!
//! - One flipped bit in any attempt record, seal, manifest or payload is found, in whatever tier it
//!   lies, and told by file and chunk; in a bucket's payload by what the bucket says of the file, unless
//!   every byte is asked for.
//! - A copy that a live job retired while it was read is not damage.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::{
    attempt::{self, AttemptRecord},
    commit::{Listing, read_manifest, read_seal, same_checkpoint},
    error::{Error, Result},
    manifest::{
        PayloadInfo, Seal, ShardManifest, decode,
        replicated::{differences, differences_in_words},
    },
    names::{ATTEMPTS, CheckpointKey, Id, Rank, SEAL, attempt_file},
    observe::locked,
    packed,
    reader::Reader,
    restore::{
        read::{READERS, read_chunk, run_on},
        survey::{Found, survey},
    },
    tier::{Source, Tier, TierKind, buffer::AlignedBuf, label},
};

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Gravity {
    /// Worth a line, nothing is wrong: an unfinished step, a file that a dead writer left.
    Note,
    /// It could not be read or is of a newer format: nothing can be said about its bytes.
    Unreadable,
    /// Bytes differ from what was written, or are gone.
    Damage,
}

/// One thing that was found.
#[derive(Clone, Debug)]
pub struct Finding {
    /// How much it matters.
    pub gravity: Gravity,
    /// Where.
    pub tier: TierKind,
    /// The file or directory, by its whole path.
    pub file: String,
    /// The chunks of it, where it is about chunks.
    pub chunks: Vec<usize>,
    /// What is wrong.
    pub why: String,
}

/// All about one checkpoint.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Which.
    pub key: CheckpointKey,
    /// Every rank can be restored, from one tier or another.
    pub restorable: bool,
    /// Bytes of payload that were read, all copies together.
    pub bytes: u64,
    /// Bytes of payload that were not read: the store has the file with the checksum that it should have.
    pub told_bytes: u64,
    /// What was found.
    pub findings: Vec<Finding>,
}

impl Verdict {
    /// Every copy in every tier is as it was written, and all ranks are there.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.restorable && self.findings.iter().all(|f| f.gravity == Gravity::Note)
    }
}

/// The attempt records of all tiers.
#[derive(Clone, Debug, Default)]
pub struct Records {
    /// Those with a good copy, oldest first.
    pub good: Vec<AttemptRecord>,
    /// What was found.
    pub findings: Vec<Finding>,
}

/// Reads every attempt record of every tier, and looks whether every checkpoint has one.
///
/// # Errors
/// A tier cannot be listed.
pub fn verify_records(reader: &Reader) -> Result<(Records, Vec<Found>)> {
    let tiers = reader.tiers();
    let found = survey(&tiers)?;
    let mut records = Records::default();
    let mut by_number: BTreeMap<u32, Vec<(usize, AttemptRecord, Vec<u8>)>> = BTreeMap::new();
    for (index, tier) in tiers.iter().enumerate() {
        let entries = tier.list(ATTEMPTS)?;
        for lone in entries.iter().filter_map(|e| e.name.strip_suffix(".copy")) {
            let name = format!("{lone}.json");
            if !entries.iter().any(|e| e.name == name) {
                let (name, why) =
                    (format!("{ATTEMPTS}/{name}"), "it is missing, its copy is there");
                records.findings.push(damage(*tier, &name, why));
            }
        }
        for entry in entries {
            let name = format!("{ATTEMPTS}/{}", entry.name);
            let Some(number) = attempt::number_of(&entry.name).filter(|_| name.contains('.'))
            else {
                continue;
            };
            match attempt::read_file(*tier, &name, number) {
                Ok((record, bytes)) => {
                    by_number.entry(number).or_default().push((index, record, bytes));
                }
                Err(e) => records.findings.extend(finding(*tier, &name, &e)),
            }
        }
    }
    let run_id = by_number.values().flatten().next().map(|(_, r, _)| r.run_id);
    for copies in by_number.into_values() {
        let (_, first, first_bytes) = &copies[0];
        for (index, record, bytes) in &copies {
            let name = attempt_file(record.attempt.number);
            let why = if Some(record.run_id) != run_id {
                "it is of another run than the oldest record"
            } else if bytes != first_bytes {
                "it differs from the copy in the other tier"
            } else {
                continue;
            };
            records.findings.push(damage(tiers[*index], &name, why));
        }
        records.good.push(first.clone());
    }
    let mut told = BTreeSet::new();
    for f in &found {
        let known = records.good.iter().any(|r| f.key.attempt.is(&r.attempt));
        let name = attempt_file(f.key.attempt.number);
        let bad = records.findings.iter().any(|x| x.file.ends_with(&name));
        if !known && !bad && told.insert(name.clone()) {
            let why = format!("it is missing, and {} is there", f.key);
            records.findings.push(damage(reader.home(), &name, &why));
        }
    }
    Ok((records, found))
}

/// What is read of payloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Every byte of every copy.
    Bytes,
    /// The same, but for copies in a bucket that keeps checksums: of them what the bucket says.
    Told,
}

/// Reads every copy of one checkpoint. `progress` is told the payload bytes as they are read, or vouched
/// for.
#[must_use]
pub fn verify(
    reader: &Reader,
    found: &Found,
    run_id: Option<&Id>,
    depth: Depth,
    progress: &(dyn Fn(u64) + Sync),
) -> Verdict {
    let mut work = Work {
        key: &found.key,
        run_id,
        depth,
        progress,
        verdict: Verdict {
            key: found.key.clone(),
            restorable: false,
            bytes: 0,
            told_bytes: 0,
            findings: Vec::new(),
        },
        first: None,
        manifests: BTreeMap::new(),
        lost: BTreeMap::new(),
    };
    if found.deleted() {
        work.note(reader.home(), &found.key.dir(), "it is being deleted");
        return work.verdict;
    }
    for (tier, listing) in reader.tiers().into_iter().zip(&found.listings) {
        if !listing.is_empty() {
            work.tier(tier, listing);
        }
    }
    work.finish(reader, found.sealed())
}

struct Work<'a> {
    key: &'a CheckpointKey,
    run_id: Option<&'a Id>,
    depth: Depth,
    progress: &'a (dyn Fn(u64) + Sync),
    verdict: Verdict,
    first: Option<ShardManifest>,
    /// The manifest of a rank in the nearest tier that has a good one.
    manifests: BTreeMap<Rank, Vec<u8>>,
    /// Chunks of a rank that are good in no tier that was read so far.
    lost: BTreeMap<Rank, BTreeSet<usize>>,
}

impl Work<'_> {
    fn note(&mut self, tier: &dyn Tier, name: &str, why: &str) {
        let found = Finding { gravity: Gravity::Note, ..damage(tier, name, why) };
        self.verdict.findings.push(found);
    }

    fn tier(&mut self, tier: &dyn Tier, listing: &Listing) {
        let seal = if listing.sealed { self.seal(tier, listing) } else { None };
        let mut named = BTreeSet::new();
        for rank in &listing.manifests {
            let before = self.verdict.findings.len();
            self.shard(tier, *rank, seal.as_ref(), &mut named);
            if self.verdict.findings.len() > before && self.was_retired(tier, *rank) {
                self.verdict.findings.truncate(before);
                self.note(tier, &self.key.manifest(*rank), "it was retired while it was read");
            }
        }
        if let (true, None, Some(first)) = (listing.sealed, &seal, &self.first) {
            // The seal cannot say who is missing; the saver set can.
            let savers = first.identity.savers.iter().map(|r| Rank(*r));
            for rank in savers.filter(|r| !listing.manifests.contains(r)).collect::<Vec<_>>() {
                let name = self.key.manifest(rank);
                self.verdict.findings.push(damage(tier, &name, "it is missing"));
            }
        }
        for file in listing.payloads.values().flatten().filter(|f| !named.contains(*f)) {
            self.note(tier, &self.key.file(file), "no good manifest names it");
        }
    }

    fn seal(&mut self, tier: &dyn Tier, listing: &Listing) -> Option<Seal> {
        let name = self.key.file(SEAL);
        let seal = match read_seal(tier, self.key) {
            Ok(seal) => seal?,
            Err(e) => {
                self.verdict.findings.extend(finding(tier, &name, &e));
                return None;
            }
        };
        if self.run_id.is_some_and(|id| *id != seal.run_id) {
            let why = format!("it is of run {}", seal.run_id);
            self.verdict.findings.push(damage(tier, &name, &why));
        }
        for rank in seal.ranks().filter(|r| !listing.manifests.contains(r)) {
            let why = "it is missing, and the seal names it";
            self.verdict.findings.push(damage(tier, &self.key.manifest(rank), why));
        }
        Some(seal)
    }

    /// One copy: its manifest, then every chunk.
    fn shard(
        &mut self,
        tier: &dyn Tier,
        rank: Rank,
        seal: Option<&Seal>,
        named: &mut BTreeSet<String>,
    ) {
        let name = self.key.manifest(rank);
        let (manifest, bytes) = match read_manifest(tier, self.key, rank, seal) {
            Ok(read) => read,
            Err(e) => return self.verdict.findings.extend(finding(tier, &name, &e)),
        };
        named.insert(manifest.payload.stored_file().to_owned());
        let why = self.misfit(&manifest, rank, &bytes);
        let payload = self.key.file(manifest.payload.stored_file());
        let source = packed::open(tier, self.key, &manifest.payload);
        let mut bad = (0..manifest.payload.chunks.len()).collect();
        match source {
            Err(e) if e.is_not_found() => {
                self.verdict.findings.push(damage(tier, &payload, "it is missing"));
            }
            Err(e) => self.verdict.findings.extend(finding(tier, &payload, &e)),
            Ok(source) => bad = self.payload(tier, &payload, &*source, &manifest.payload),
        }
        if let Some(why) = why {
            self.verdict.findings.push(damage(tier, &name, &why));
            return;
        }
        match self.lost.get_mut(&rank) {
            Some(lost) => lost.retain(|chunk| bad.contains(chunk)),
            None => drop(self.lost.insert(rank, bad)),
        }
        self.manifests.entry(rank).or_insert(bytes);
        self.first.get_or_insert(manifest);
    }

    /// Why a manifest, good by itself, does not belong to the others.
    fn misfit(&self, manifest: &ShardManifest, rank: Rank, bytes: &[u8]) -> Option<String> {
        let identity = &manifest.identity;
        if self.run_id.is_some_and(|id| *id != identity.run_id) {
            return Some(format!("it is of run {}", identity.run_id));
        }
        if self.manifests.get(&rank).is_some_and(|nearer| nearer != bytes) {
            return Some("it differs from the copy in the other tier".into());
        }
        let savers = self.first.as_ref().map_or(&identity.savers, |m| &m.identity.savers);
        same_checkpoint(manifest, self.first.as_ref(), savers).err()
    }

    fn payload(
        &mut self,
        tier: &dyn Tier,
        name: &str,
        source: &dyn Source,
        info: &PayloadInfo,
    ) -> BTreeSet<usize> {
        if source.len() != info.length {
            let why = format!("it has {} bytes, its manifest says {}", source.len(), info.length);
            self.verdict.findings.push(damage(tier, name, &why));
        }
        if self.depth == Depth::Told
            && let Some(told) = source.crc32()
        {
            (self.progress)(info.length);
            if told == info.stored_crc() {
                self.verdict.told_bytes = self.verdict.told_bytes.saturating_add(info.length);
                return BTreeSet::new();
            }
            let why =
                format!("the store has it with CRC-32 {told:08x}, not {:08x}", info.stored_crc());
            self.verdict.findings.push(damage(tier, name, &why));
            return (0..info.chunks.len()).collect();
        }
        let next = AtomicUsize::new(0);
        let bad = Mutex::new(BTreeMap::new());
        let progress = self.progress;
        let work = || {
            let mut buffer = AlignedBuf::new(1);
            loop {
                let chunk = next.fetch_add(1, Ordering::Relaxed);
                let Some(crc) = info.chunks.get(chunk) else { break };
                match read_chunk(source, info, chunk, &mut buffer) {
                    Ok(bytes) if crc32fast::hash(bytes) == *crc => {}
                    Ok(_) => drop(locked(&bad).insert(chunk, None)),
                    Err(e) => drop(locked(&bad).insert(chunk, Some(e))),
                }
                progress(info.chunk_len(chunk));
            }
        };
        run_on(READERS.min(info.chunks.len()), &work);
        self.verdict.bytes = self.verdict.bytes.saturating_add(info.length.min(source.len()));
        let bad = std::mem::take(&mut *locked(&bad));
        self.chunk_findings(tier, name, info, &bad);
        bad.into_keys().collect()
    }

    fn chunk_findings(
        &mut self,
        tier: &dyn Tier,
        name: &str,
        info: &PayloadInfo,
        bad: &BTreeMap<usize, Option<Error>>,
    ) {
        let is_io = |e: &Option<Error>| e.as_ref().is_some_and(|e| gravity(e) != Gravity::Damage);
        let damaged: Vec<usize> =
            bad.iter().filter(|(_, e)| !is_io(e)).map(|(chunk, _)| *chunk).collect();
        if !damaged.is_empty() {
            let why = format!("{} of {}", chunks_in_words(&damaged), info.chunks.len());
            let found = Finding { chunks: damaged, ..damage(tier, name, &why) };
            self.verdict.findings.push(found);
        }
        let unread: Vec<usize> = bad.iter().filter(|(_, e)| is_io(e)).map(|(c, _)| *c).collect();
        if let Some(Some(e)) = unread.first().and_then(|chunk| bad.get(chunk)) {
            let why = format!("{}: {}", chunks_in_words(&unread), e.chain());
            let found = damage(tier, name, &why);
            let found = Finding { gravity: Gravity::Unreadable, chunks: unread, ..found };
            self.verdict.findings.push(found);
        }
    }

    /// A live job took the slot, or a collector came: the manifest goes before the bytes do.
    fn was_retired(&self, tier: &dyn Tier, rank: Rank) -> bool {
        Listing::of(tier, self.key).is_ok_and(|now| {
            now.deleted || (tier.kind() == TierKind::Ram && !now.manifests.contains(&rank))
        })
    }

    fn finish(mut self, reader: &Reader, sealed: bool) -> Verdict {
        let Some(first) = self.first.take() else { return self.verdict };
        let savers = &first.identity.savers;
        let missing: Vec<u32> =
            savers.iter().copied().filter(|r| !self.lost.contains_key(&Rank(*r))).collect();
        if !missing.is_empty() && !sealed {
            let why = format!("it is not complete: {} missing", crate::names::ranks(&missing));
            self.note(reader.home(), &self.key.dir(), &why);
        }
        let differences = self.differences();
        if let (true, false) = (missing.is_empty(), differences.is_empty()) {
            let why = differences_in_words(&differences);
            self.note(reader.home(), &self.key.dir(), &format!("it never was a checkpoint: {why}"));
            return self.verdict;
        }
        self.verdict.restorable = missing.is_empty() && self.lost.values().all(BTreeSet::is_empty);
        self.verdict
    }
}

impl Work<'_> {
    /// Where the ranks differ in what several of them hold.
    fn differences(&self) -> Vec<String> {
        let read = |(rank, bytes): (&Rank, &Vec<u8>)| decode(bytes, "", self.key, *rank).ok();
        let manifests: Vec<ShardManifest> = self.manifests.iter().filter_map(read).collect();
        differences(&manifests)
    }
}

/// `chunk 3`, `chunks 3, 5, 6, 7, ...`
fn chunks_in_words(bad: &[usize]) -> String {
    let shown: Vec<String> = bad.iter().take(8).map(ToString::to_string).collect();
    let more = if bad.len() > 8 { ", ..." } else { "" };
    let s = if bad.len() == 1 { "" } else { "s" };
    format!("chunk{s} {}{more}", shown.join(", "))
}

fn damage(tier: &dyn Tier, name: &str, why: &str) -> Finding {
    Finding {
        gravity: Gravity::Damage,
        tier: tier.kind(),
        file: label(tier, name),
        chunks: Vec::new(),
        why: why.into(),
    }
}

/// What an error about one file says; nothing where the file simply went.
fn finding(tier: &dyn Tier, name: &str, error: &Error) -> Option<Finding> {
    let found = damage(tier, name, "");
    match error {
        Error::Damaged { file, why } => {
            Some(Finding { file: file.clone(), why: why.clone(), ..found })
        }
        e if e.is_not_found() => None,
        e => Some(Finding { gravity: gravity(e), why: e.chain(), ..found }),
    }
}

/// A medium that cannot give the bytes back has lost them; one that may not be asked has not.
fn gravity(error: &Error) -> Gravity {
    match error {
        Error::Damaged { .. } => Gravity::Damage,
        Error::Io { source, .. } if source.raw_os_error() == Some(libc::EIO) => Gravity::Damage,
        _ => Gravity::Unreadable,
    }
}
