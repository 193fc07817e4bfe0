//! Other ranks' shards of what an attempt resumes from, for a trainer whose tensors are cut elsewhere than
//! they were: their manifests, from wherever they are, and their bytes where they are wanted.
//!
//! # Invariants
//!
//! - What is looked for changes nothing: no mark, no mend.
//! - What is brought here is no copy that anybody counts on: it has no name that others could find.

use std::{collections::BTreeMap, sync::Arc};

use super::found::find_shard_in;
use crate::{
    attempt::AttemptRecord,
    commit::Listing,
    error::{Error, Result},
    names::{CheckpointKey, Id, Rank},
    peers::remote::{Remote, look_at_all},
    place::Place,
    restore::{
        read::Restorable,
        survey::{Found, copies},
    },
    tier::{Source, Tier},
};

/// Where another rank's shard is.
pub(crate) enum Whereabouts {
    /// In files of this node.
    Here(Box<Restorable>),
    /// On other nodes or in the bucket; its manifest.
    Elsewhere(Vec<u8>),
}

/// The shards of these ranks, in their order.
///
/// # Errors
/// One is nowhere, as far as nodes and bucket answer.
pub(crate) fn find_others(
    place: &Place,
    record: &AttemptRecord,
    key: &CheckpointKey,
    ranks: &[Rank],
) -> Result<Vec<Whereabouts>> {
    let mut found: BTreeMap<Rank, Whereabouts> = BTreeMap::new();
    let mut missing = Vec::new();
    for rank in ranks {
        match here(place, record, key, *rank) {
            Ok(shard) => drop(found.insert(*rank, Whereabouts::Here(Box::new(shard)))),
            Err(e) if is_elsewhere(&e) => missing.push(*rank),
            Err(e) => return Err(e),
        }
    }
    if !missing.is_empty() {
        let far = Far::look(place, key)?;
        for rank in missing {
            let manifest = far.shard(place, record, key, rank)?.manifest_bytes().to_vec();
            found.insert(rank, Whereabouts::Elsewhere(manifest));
        }
    }
    let known = ranks.iter().filter_map(|rank| found.remove(rank)).collect::<Vec<_>>();
    Ok(known)
}

/// The payload of one of them in a file of this node, which is nobody else's: what is brought here has no
/// name once it is open, and is gone when the reader closes it.
///
/// # Errors
/// It is nowhere, or there is no room for it here.
pub(crate) fn open(
    place: &Place,
    record: &AttemptRecord,
    key: &CheckpointKey,
    rank: Rank,
) -> Result<Box<dyn Source>> {
    match here(place, record, key, rank) {
        Ok(shard) => return shard.open_first(),
        Err(e) if is_elsewhere(&e) => {}
        Err(e) => return Err(e),
    }
    let there = Far::look(place, key)?.shard(place, record, key, rank)?;
    let name = format!("_brought/{}-{}", Id::random()?, there.manifest().payload.file);
    let brought = place.ram.put(&name, &there.payload()).and_then(|_| place.ram.open(&name));
    let gone = place.ram.delete(&name);
    let source = brought?;
    gone.map(|()| source)
}

fn here(
    place: &Place,
    record: &AttemptRecord,
    key: &CheckpointKey,
    rank: Rank,
) -> Result<Restorable> {
    find_shard_in(place, record, key, (rank, false), &[&place.ram, &place.disk])
}

fn is_elsewhere(error: &Error) -> bool {
    matches!(error, Error::Lost { .. } | Error::NotFound { .. })
}

fn nowhere(key: &CheckpointKey, rank: Rank) -> Error {
    let why = "no node that answers has it, nor a bucket".into();
    Error::Lost { step: key.step, rank, why }
}

/// The other nodes' tiers, looked at once for all ranks.
struct Far {
    remotes: Vec<Arc<Remote>>,
    found: Found,
}

impl Far {
    fn look(place: &Place, key: &CheckpointKey) -> Result<Self> {
        let remotes = place.peers.as_ref().map_or_else(Vec::new, |peers| look_at_all(peers).0);
        let listings =
            remotes.iter().map(|tier| Listing::of(&**tier, key)).collect::<Result<_>>()?;
        Ok(Self { remotes, found: Found { key: key.clone(), listings } })
    }

    fn shard(
        &self,
        place: &Place,
        record: &AttemptRecord,
        key: &CheckpointKey,
        rank: Rank,
    ) -> Result<Restorable> {
        let tiers: Vec<&dyn Tier> = self.remotes.iter().map(|tier| &**tier as &dyn Tier).collect();
        let (good, bad) = copies(&tiers, &self.found, rank, Some(&record.run_id))?;
        if good.is_empty() {
            let Some(bucket) = &place.bucket else { return Err(nowhere(key, rank)) };
            return find_shard_in(place, record, key, (rank, false), &[bucket]);
        }
        let tiers = self.remotes.iter().map(|tier| tier.clone() as Arc<dyn Tier>).collect();
        Ok(Restorable::of(key.clone(), rank, tiers, (good, bad), place.observer.clone()))
    }
}
