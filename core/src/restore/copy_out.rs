//! A checkpoint copied, checked, to another run directory or a bucket: for a job that goes on elsewhere,
//! for a backup, or from RAM to disk before a reboot, with the job down.
//!
//! # Invariants
//!
//! - Each chunk is checked as it is read, from whichever copy is good.
//! - The seal is last: dying anywhere leaves no checkpoint there, and copying again finishes it.
//! - Nothing is copied into another run, nor under a live process.
//! - What is there already with the same bytes is left; nothing is overwritten.

use std::{path::Path, sync::Arc, time::Duration};

use crate::{
    at_once::try_at_once,
    attempt,
    clock::SystemClock,
    commit::{Gathered, Listing, gather, publish_shard},
    config,
    error::{Error, Result},
    manifest::replicated::differences_in_words,
    names::{CheckpointKey, Rank, attempt_file, check_run_name},
    ownership::Ownership,
    reader::Reader,
    restore::read::Restorable,
    snapshot::slot::Slot,
    tier::{
        Payload, Tier, TierKind,
        buffer::AlignedBuf,
        create_same,
        disk::DiskTier,
        label,
        object::{
            self,
            address::{Options, is_url},
        },
    },
};

/// What was copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copied {
    /// Ranks whose shard was written.
    pub written: Vec<Rank>,
    /// Ranks whose shard was there already, read back and good.
    pub present: Vec<Rank>,
    /// Bytes written.
    pub bytes: u64,
}

/// Copies the shards of `savers` at `key` into the run directory `to`, or a bucket that is reached with
/// `options`, and seals them there.
/// `progress` is told the bytes as they go.
///
/// # Errors
/// A shard has no good copy, `to` holds something else or is owned by a live process, or it may not
/// be written.
pub fn copy_out(
    from: &Reader,
    key: &CheckpointKey,
    savers: &[u32],
    to: &Path,
    ram_root: Option<&Path>,
    options: &Options,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Copied> {
    let to = config::absolute(to)?;
    check_run_name(to.file_name().and_then(|n| n.to_str()).unwrap_or(""))?;
    let tiers: Vec<&dyn Tier> = from.tiers().into_iter().rev().collect();
    let (record, record_bytes) = attempt::read(&tiers, key.attempt.number)?;
    if !key.attempt.is(&record.attempt) {
        return Err(Error::NotFound { what: format!("the record of the attempt of {key}") });
    }
    // All shards are found before a byte is written.
    let ranks: Vec<Rank> = savers.iter().copied().map(Rank).collect();
    let shards = from.shards(key, &ranks)?;
    check_place(&to, ram_root, options, &record)?;
    let url = to.to_str().filter(|text| is_url(text));
    let place: Arc<dyn Tier> = match url {
        Some(url) => object::open(url, options)?,
        None => Arc::new(DiskTier::open(&to)?),
    };
    let mut locks = Vec::new();
    // A bucket has no locks: whoever copies there writes under names of the shard's own writer, the same
    // bytes, and records that are there stay.
    for rank in savers.iter().filter(|_| url.is_none()) {
        let path = to.join(format!("_locks/rank-{rank:06}"));
        let what = format!("rank {rank} of {}", to.display());
        locks.push(Ownership::take(&path, &what, Duration::ZERO, &SystemClock)?);
    }
    if Listing::of(&*place, key)?.deleted {
        return Err(Error::invalid(format!(
            "{key} is being deleted in {}: `tierkeep gc` finishes that",
            to.display()
        )));
    }
    let name = attempt_file(key.attempt.number);
    if !create_same(&*place, &name, &record_bytes)? {
        return Err(Error::invalid(format!(
            "{} is another attempt {}: copy to a new directory",
            label(&*place, &name),
            key.attempt.number
        )));
    }
    let copied = copy_shards(&shards, &place, progress)?;
    match gather(&*place, key, savers)? {
        Gathered::Complete(complete) => complete.seal(&*place).map(|_| copied),
        Gathered::Missing(ranks) => {
            Err(Error::Bug(format!("{key}: ranks {ranks:?} vanished from {}", to.display())))
        }
        Gathered::Differ(list) => {
            Err(Error::Broken { what: key.to_string(), why: differences_in_words(&list) })
        }
        Gathered::Deleted => Err(Error::Fenced { why: format!("{key} is being deleted") }),
    }
}

/// The place is free, or belongs to the same run.
fn check_place(
    to: &Path,
    ram_root: Option<&Path>,
    options: &Options,
    record: &attempt::AttemptRecord,
) -> Result<()> {
    let there = match Reader::open_with(to, ram_root, options) {
        Err(e) if e.is_not_found() => return Ok(()),
        other => other?,
    };
    if let Some(other) = there.attempts()?.newest() {
        if other.run_id == record.run_id {
            return Ok(());
        }
        let addresses: Vec<String> = there.tiers().iter().map(|t| t.address()).collect();
        return Err(Error::invalid(format!(
            "{} holds another run: give a new directory (looked in {})",
            to.display(),
            addresses.join(" and ")
        )));
    }
    let foreign = there.tiers().into_iter().find_map(|tier| match tier.list("") {
        Ok(entries) => {
            let ours = |name: &str| name.starts_with('_') || name.starts_with('.');
            entries.into_iter().find(|e| !ours(&e.name)).map(|e| Ok(label(tier, &e.name)))
        }
        Err(e) => Some(Err(e)),
    });
    match foreign.transpose()? {
        Some(name) => Err(Error::invalid(format!(
            "{} is not empty and holds no run ({name} is there): give a new directory",
            to.display()
        ))),
        None => Ok(()),
    }
}

/// Small shards that go at once to or from a bucket, which answers each request after a while. Of larger
/// ones one has as many requests on their way as the link takes, and as many buffers.
const AT_ONCE: usize = 8;
const SMALL_BYTES: u64 = 32 << 20;

fn copy_shards(
    shards: &[Restorable],
    place: &Arc<dyn Tier>,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Copied> {
    let far = |tier: &Arc<dyn Tier>| tier.kind() == TierKind::Object;
    let is_far = far(place) || shards.iter().flat_map(|shard| &shard.tiers).any(far);
    let is_small = |shard: &Restorable| shard.manifest().payload.length <= SMALL_BYTES;
    let most = if is_far && shards.iter().all(is_small) { AT_ONCE } else { 1 };
    let done = try_at_once(most, shards, |shard| copy_shard(shard, place, progress))?;
    let mut copied = Copied { written: vec![], present: vec![], bytes: 0 };
    for (shard, written) in shards.iter().zip(done) {
        if written {
            copied.written.push(shard.rank);
            copied.bytes += shard.manifest().payload.length;
        } else {
            copied.present.push(shard.rank);
        }
    }
    Ok(copied)
}

/// False: it was there already.
fn copy_shard(
    shard: &Restorable,
    place: &Arc<dyn Tier>,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<bool> {
    let (key, rank, manifest) = (&shard.key, shard.rank, shard.manifest());
    let payload = key.file(&manifest.payload.file);
    if Listing::of(&**place, key)?.manifests.contains(&rank) {
        is_there(shard, place)?;
        progress(manifest.payload.length);
        return Ok(false);
    }
    // A copy that died left it without a manifest: nobody counts on it, and the lock is ours. In a bucket
    // it is whole, or not there.
    if place.kind() != TierKind::Object {
        place.delete(&payload)?;
    }
    let receipt = place.put(&payload, &Told { payload: &shard.payload(), progress })?;
    publish_shard(&**place, &manifest.identity, shard.manifest_bytes(), receipt)?;
    Ok(true)
}

/// The same shard lies there, every byte of it good.
fn is_there(shard: &Restorable, place: &Arc<dyn Tier>) -> Result<()> {
    let there = Reader::of(vec![place.clone()]).shard(&shard.key, shard.rank)?;
    if there.manifest_bytes() != shard.manifest_bytes() {
        return Err(Error::invalid(format!(
            "{} is another shard than the one to copy: copy to a new directory",
            label(&**place, &shard.key.manifest(shard.rank))
        )));
    }
    match there.verify().into_iter().next() {
        None => Ok(()),
        Some(bad) => Err(Error::Lost { step: shard.key.step, rank: shard.rank, why: bad.why }),
    }
}

/// A payload whose bytes are told as they are handed out.
struct Told<'a, P> {
    payload: &'a P,
    progress: &'a (dyn Fn(u64) + Sync),
}

#[deny(clippy::missing_trait_methods)]
impl<P: Payload> Payload for Told<'_, P> {
    fn len(&self) -> u64 {
        self.payload.len()
    }

    fn block<'a>(
        &'a self,
        offset: u64,
        len: usize,
        scratch: &'a mut AlignedBuf,
    ) -> Result<&'a [u8]> {
        let block = self.payload.block(offset, len, scratch)?;
        (self.progress)((len as u64).min(self.len().saturating_sub(offset)));
        Ok(block)
    }

    fn is_empty(&self) -> bool {
        self.payload.is_empty()
    }

    fn block_bytes(&self) -> u64 {
        self.payload.block_bytes()
    }

    fn crc32(&self, offset: u64, len: u64) -> Option<u32> {
        self.payload.crc32(offset, len)
    }

    fn slot(&self) -> Option<&Slot> {
        self.payload.slot()
    }
}
