//! Memory of ranks that this job has no more: a run that goes on with fewer ranks, or with other ones that
//! save.
//!
//! # Invariants
//!
//! - Of what the attempt resumes from nothing is taken before the leader has read it; and where it is not
//!   durable itself, not before a newer checkpoint is sealed on disk.
//! - Nothing is taken from a rank that lives.

use std::{collections::BTreeSet, time::Duration};

use super::Cascade;
use crate::{
    clock::Clock,
    config::Config,
    error::{Error, Result},
    names::{CheckpointKey, Rank, parse_payload_name},
    ownership::{Ownership, rank_lock},
    restore::survey::survey,
    snapshot::arena::SLOTS,
    tier::Tier,
};

impl Cascade {
    /// The leader, in the process of its trainer: gives back the memory of such ranks on this node. (An agent
    /// does so for every rank whose trainer is gone.)
    pub(crate) fn clear_strangers(&self) {
        if self.parts.is_embedded && self.parts.config.leads() {
            clear_strangers(&*self.parts.ram, &self.parts.config, &*self.parts.clock, None);
        }
    }
}

/// Gives back what ranks that are no more have in this node's RAM, but for their shards of `keep`.
pub(crate) fn clear_strangers(
    ram: &dyn Tier,
    config: &Config,
    clock: &dyn Clock,
    keep: Option<&CheckpointKey>,
) {
    if let Err(e) = try_to_clear(ram, config, clock, keep) {
        tracing::warn!("memory of ranks that are no more was not cleared: {}", e.chain());
    }
}

fn try_to_clear(
    ram: &dyn Tier,
    config: &Config,
    clock: &dyn Clock,
    keep: Option<&CheckpointKey>,
) -> Result<()> {
    for rank in strangers(ram, config)? {
        let what = format!("{rank} of {}", config.destination.display());
        let lock = rank_lock(&config.home(), rank);
        match Ownership::take(&lock, &what, Duration::ZERO, clock) {
            Ok(_lock) => clear(ram, rank, keep)?,
            Err(Error::Fenced { .. }) => {} // It lives: of an older start, which will end.
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Ranks that have files in this node's RAM, and save no more.
fn strangers(ram: &dyn Tier, config: &Config) -> Result<BTreeSet<Rank>> {
    let mut ranks = BTreeSet::new();
    for found in survey(&[ram])? {
        for listing in &found.listings {
            ranks.extend(listing.manifests.iter().chain(listing.payloads.keys()).copied());
        }
    }
    for entry in ram.list(SLOTS)? {
        let number = entry.name.strip_prefix("rank-").and_then(|rest| rest.get(..6));
        ranks.extend(number.and_then(|digits| digits.parse().ok()).map(Rank));
    }
    ranks.retain(|rank| !config.savers.contains(&rank.0));
    Ok(ranks)
}

/// Deletes what a rank has in RAM, each manifest before its payload.
fn clear(ram: &dyn Tier, rank: Rank, keep: Option<&CheckpointKey>) -> Result<()> {
    for found in survey(&[ram])?.into_iter().filter(|found| Some(&found.key) != keep) {
        let files = ram.list(&found.key.dir())?;
        let ours = |name: &str| parse_payload_name(name) == Some(rank);
        ram.delete(&found.key.manifest(rank))?;
        for file in files.iter().filter(|file| ours(&file.name)) {
            ram.delete(&found.key.file(&file.name))?;
        }
        // Only where nothing else lies there.
        for dir in [found.key.dir(), crate::names::step_dir(found.key.step)] {
            let _ = ram.delete(&dir);
        }
    }
    let prefix = format!("rank-{:06}-", rank.0);
    let mut slots = ram.list(SLOTS)?.into_iter().filter(|slot| slot.name.starts_with(&prefix));
    slots.try_for_each(|slot| ram.delete(&format!("{SLOTS}/{}", slot.name)))
}
