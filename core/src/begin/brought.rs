//! Other ranks' shards of what an attempt resumes from, for a trainer whose tensors are cut elsewhere than
//! they were: their manifests, from wherever they are, and their bytes where they are wanted.
//!
//! # Invariants
//!
//! - What is looked for changes nothing: no mark, no mend.
//! - What is brought here is forgotten when it was read, and is brought again where it is asked for again.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::{
    fetched::{Seen, bring_here, fetch_shard},
    found::{copies_in, find_shard_in},
};
use crate::{
    attempt::AttemptRecord,
    commit::Listing,
    error::{Error, Result},
    names::{CheckpointKey, Rank},
    peers::remote::{Remote, look_at_all},
    place::Place,
    restore::{
        read::Restorable,
        survey::{Found, copies},
    },
    tier::Tier,
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
            let manifest = far.manifest(place, record, key, rank)?;
            found.insert(rank, Whereabouts::Elsewhere(manifest));
        }
    }
    let known = ranks.iter().filter_map(|rank| found.remove(rank)).collect::<Vec<_>>();
    Ok(known)
}

/// One of them in files of this node; true: it was brought here for this.
///
/// # Errors
/// It is nowhere, or there is no room for it here.
pub(crate) fn bring(
    place: &Place,
    record: &AttemptRecord,
    key: &CheckpointKey,
    rank: Rank,
) -> Result<(Restorable, bool)> {
    match here(place, record, key, rank) {
        Err(e) if is_elsewhere(&e) => {}
        found => return found.map(|shard| (shard, false)),
    }
    if let Some(peers) = &place.peers {
        match fetch_shard(place, peers, record, (key, rank), &Seen::Nowhere, Duration::ZERO) {
            Ok(true) => return here(place, record, key, rank).map(|shard| (shard, true)),
            Ok(false) => {}
            Err(e) if place.bucket.is_none() => return Err(e),
            Err(e) => tracing::warn!("{key}, {rank}: no copy from other nodes: {}", e.chain()),
        }
    }
    let Some(bucket) = &place.bucket else { return Err(nowhere(key, rank)) };
    let there = find_shard_in(place, record, key, (rank, false), &[bucket])?;
    bring_here(place, &there)?;
    here(place, record, key, rank).map(|shard| (shard, true))
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

    fn manifest(
        &self,
        place: &Place,
        record: &AttemptRecord,
        key: &CheckpointKey,
        rank: Rank,
    ) -> Result<Vec<u8>> {
        let tiers: Vec<&dyn Tier> = self.remotes.iter().map(|tier| &**tier as &dyn Tier).collect();
        let (good, _) = copies(&tiers, &self.found, rank, Some(&record.run_id))?;
        if let Some(first) = good.first() {
            return Ok(first.bytes.to_vec());
        }
        let Some(bucket) = &place.bucket else { return Err(nowhere(key, rank)) };
        let (_, good) = copies_in(bucket.clone(), key, rank, &record.run_id)?;
        good.first().map(|copy| copy.bytes.to_vec()).ok_or_else(|| nowhere(key, rank))
    }
}
