//! A checkpoint copied, checked, to another run directory: for a job that goes on elsewhere, or
//! from RAM to disk before a reboot, with the job down.
//!
//! # Invariants
//!
//! - Each chunk is checked as it is read, from whichever copy is good.
//! - The seal is last: dying anywhere leaves no checkpoint there, and copying again finishes it.
//! - Nothing is copied into another run, nor under a live process.
//! - What is there already with the same bytes is left; nothing is overwritten.

use std::{path::Path, time::Duration};

use crate::{
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
    tier::{Payload, Tier, buffer::AlignedBuf, create_same, disk::DiskTier, label},
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

/// Copies the shards of `savers` at `key` into the run directory `to`, and seals them there.
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
    let shards: Vec<Restorable> =
        savers.iter().map(|r| from.shard(key, Rank(*r))).collect::<Result<_>>()?;
    check_place(&to, ram_root, &record)?;
    let disk = DiskTier::open(&to)?;
    let mut locks = Vec::new();
    for rank in savers {
        let path = to.join(format!("_locks/rank-{rank:06}"));
        let what = format!("rank {rank} of {}", to.display());
        locks.push(Ownership::take(&path, &what, Duration::ZERO, &SystemClock)?);
    }
    if Listing::of(&disk, key)?.deleted {
        return Err(Error::invalid(format!(
            "{key} is being deleted in {}: `tierkeep gc` finishes that",
            to.display()
        )));
    }
    let name = attempt_file(key.attempt.number);
    if !create_same(&disk, &name, &record_bytes)? {
        return Err(Error::invalid(format!(
            "{} is another attempt {}: copy to a new directory",
            label(&disk, &name),
            key.attempt.number
        )));
    }
    let mut copied = Copied { written: vec![], present: vec![], bytes: 0 };
    for shard in &shards {
        copy_shard(shard, &disk, &mut copied, progress)?;
    }
    match gather(&disk, key, savers)? {
        Gathered::Complete(complete) => complete.seal(&disk).map(|_| copied),
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
fn check_place(to: &Path, ram_root: Option<&Path>, record: &attempt::AttemptRecord) -> Result<()> {
    let there = match Reader::open(to, ram_root) {
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

fn copy_shard(
    shard: &Restorable,
    disk: &DiskTier,
    copied: &mut Copied,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<()> {
    let (key, rank, manifest) = (&shard.key, shard.rank, shard.manifest());
    let payload = key.file(&manifest.payload.file);
    if Listing::of(disk, key)?.manifests.contains(&rank) {
        is_there(shard, disk)?;
        progress(manifest.payload.length);
        copied.present.push(rank);
        return Ok(());
    }
    // A copy that died left it without a manifest: nobody counts on it, and the lock is ours.
    disk.delete(&payload)?;
    let receipt = disk.put(&payload, &Told { payload: &shard.payload(), progress })?;
    publish_shard(disk, &manifest.identity, shard.manifest_bytes(), receipt)?;
    copied.written.push(rank);
    copied.bytes += manifest.payload.length;
    Ok(())
}

/// The same shard lies there, every byte of it good.
fn is_there(shard: &Restorable, disk: &DiskTier) -> Result<()> {
    let place: std::sync::Arc<dyn Tier> = std::sync::Arc::new(DiskTier::reader(disk.root()));
    let there = Reader::of(vec![place]).shard(&shard.key, shard.rank)?;
    if there.manifest_bytes() != shard.manifest_bytes() {
        return Err(Error::invalid(format!(
            "{} is another shard than the one to copy: copy to a new directory",
            label(disk, &shard.key.manifest(shard.rank))
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
}
