//! What a rank gets back of the decided step: its shard as it lies here, from other nodes, or from the
//! bucket.
//!
//! # Invariants
//!
//! - A rank that finds no good copy anywhere says so in `bad/`; one that finds a good one says nothing.
//! - The bucket is asked for what neither this node nor another one has.
//! - Where agents run, a shard is read from the bucket by its own rank's agent, and others have it from
//!   there: each byte once for the whole cluster.

use std::{sync::Arc, time::Duration};

use super::fetched::{Seen, bring_here, fetch_shard};
use crate::{
    attempt::{AttemptRecord, Attempts},
    commit::Listing,
    config::nearest_saver,
    error::{Error, Result},
    names::{CheckpointKey, Id, Rank},
    place::Place,
    restore::{
        asks::{Copies, Further},
        read::Restorable,
        survey::{Found, copies, look_again, mark_bad},
    },
    tier::Tier,
};

/// How long it may take until this agent knows of all others: the leader saw the shard, so where this one
/// does not, gossip has not told it of all nodes yet.
const SEEN_WITHIN: Duration = Duration::from_secs(20);

pub(super) fn find_shard(
    place: &Place,
    record: &AttemptRecord,
    key: &CheckpointKey,
    seen: &Seen<'_>,
) -> Result<Restorable> {
    let rank = Rank(nearest_saver(&savers_of(place, key)?, place.config.rank));
    let mends = place.config.saves() && rank.0 == place.config.rank;
    let mut own = find_shard_of(place, record, key, (rank, mends), seen)?;
    // Each rank mends its own shard alone, but whoever cannot restore says so: the shard's own rank
    // may not read what is lost.
    let savers = own.leaves_to().into_iter();
    let others = savers.map(|saver| find_shard_of(place, record, key, (saver, false), seen));
    own.others = others.collect::<Result<_>>()?;
    Ok(own)
}

/// The ranks that saved a checkpoint: those that save in its attempt, which may be others than now.
pub(super) fn savers_of(place: &Place, key: &CheckpointKey) -> Result<Vec<u32>> {
    let savers = |tiers: &[&dyn Tier]| -> Result<Option<Vec<u32>>> {
        Ok(Attempts::load(tiers)?.find(&key.attempt).map(|record| record.savers.clone()))
    };
    // RAM may not answer, and the disk may have lost it.
    let found = match savers(&[&*place.disk])? {
        Some(found) => Some(found),
        None => savers(&[&*place.ram])?,
    };
    found.ok_or_else(|| Error::NotFound {
        what: format!("the record of attempt {}, which saved {},", key.attempt.number, key.step),
    })
}

/// The shard as it lies here; where it does not, it is fetched from other nodes, and only what they have not
/// is read from the bucket.
fn find_shard_of(
    place: &Place,
    record: &AttemptRecord,
    key: &CheckpointKey,
    (rank, mends): (Rank, bool),
    seen: &Seen<'_>,
) -> Result<Restorable> {
    let near = [&place.ram, &place.disk];
    let find = |tiers: &[&Arc<dyn Tier>]| find_shard_in(place, record, key, (rank, mends), tiers);
    let is_lost = |found: &Result<Restorable>| {
        matches!(found, Err(Error::Lost { .. } | Error::NotFound { .. }))
    };
    let mut found = find(&near);
    if let Some(peers) = place.peers.as_ref().filter(|_| is_lost(&found)) {
        let patience = patience(place, key, rank);
        match fetch_shard(place, peers, record, (key, rank), seen, patience) {
            Ok(true) => found = find(&near),
            Ok(false) => {}
            Err(e) if place.bucket.is_none() => return Err(e),
            Err(e) => tracing::warn!("{key}, {rank}: no copy from other nodes: {}", e.chain()),
        }
    }
    if let Some(bucket) = place.bucket.as_ref().filter(|_| is_lost(&found)) {
        found = find(&[&place.ram, &place.disk, bucket]);
        if place.is_hosted
            && let Ok(there) = &found
        {
            // What turns out to be damaged on its way is lost, and marked as such.
            found = bring_here(place, there).and_then(|()| find(&near));
        }
    }
    if matches!(found, Err(Error::Lost { .. })) && place.config.saves() {
        mark_bad(&*place.disk, &place.observer, key, rank);
    }
    let further = place.bucket.as_ref().filter(|_| !place.is_hosted).map(|bucket| {
        let (bucket, key, run_id) = (bucket.clone(), key.clone(), record.run_id);
        Further::new(move || copies_in(bucket.clone(), &key, rank, &run_id))
    });
    found.map(|found| Restorable { further, ..found })
}

/// How long other nodes are asked for a shard.
fn patience(place: &Place, key: &CheckpointKey, rank: Rank) -> Duration {
    let in_bucket = |bucket: &Arc<dyn Tier>| {
        Listing::of(&**bucket, key).is_ok_and(|listing| listing.manifests.contains(&rank))
    };
    match place.bucket.as_ref().is_some_and(in_bucket) {
        // Once: what they have not is there.
        true if rank.0 == place.config.rank => Duration::ZERO,
        // Its own rank's agent has it from there in a moment.
        true => place.config.attempt_wait,
        false => SEEN_WITHIN.min(place.config.attempt_wait),
    }
}

/// Good copies of a shard in a bucket.
fn copies_in(
    bucket: Arc<dyn Tier>,
    key: &CheckpointKey,
    rank: Rank,
    run_id: &Id,
) -> Result<Copies> {
    let mut listing = Listing::of(&*bucket, key)?;
    look_again(&*bucket, key, &mut listing)?;
    let found = Found { key: key.clone(), listings: vec![listing] };
    let (good, _) = copies(&[&*bucket], &found, rank, Some(run_id))?;
    Ok((vec![bucket], good))
}

/// The shard with its copies in the bucket behind those that are here.
///
/// # Errors
/// The bucket has none, or does not answer.
pub(crate) fn with_bucket(bucket: &Arc<dyn Tier>, here: &Restorable) -> Result<Restorable> {
    let run_id = here.manifest().identity.run_id;
    let (tiers, mut good) = copies_in(bucket.clone(), &here.key, here.rank, &run_id)?;
    good.retain(|copy| copy.bytes.as_slice() == here.manifest_bytes());
    if good.is_empty() {
        let what = format!("{}'s shard of {} in the bucket", here.rank, here.key);
        return Err(Error::NotFound { what });
    }
    let mut both = here.clone();
    both.add_copies(tiers, good);
    Ok(both)
}

pub(super) fn find_shard_in(
    place: &Place,
    record: &AttemptRecord,
    key: &CheckpointKey,
    (rank, mends): (Rank, bool),
    among: &[&Arc<dyn Tier>],
) -> Result<Restorable> {
    let marks = place.config.saves();
    let (mut tiers, mut listings, mut silent) = (Vec::new(), Vec::new(), None);
    for tier in among {
        let listing = Listing::of(&***tier, key).and_then(|mut listing| {
            look_again(&***tier, key, &mut listing)?;
            Ok(listing)
        });
        match listing {
            Ok(listing) => {
                tiers.push((*tier).clone());
                listings.push(listing);
            }
            // The step is decided: one good copy elsewhere is enough.
            Err(e) => silent = Some(e),
        }
    }
    let borrowed: Vec<&dyn Tier> = tiers.iter().map(|t| &**t).collect();
    let found = Found { key: key.clone(), listings };
    let gone = found.deleted() || found.listings.iter().all(Listing::is_empty);
    let (good, bad) = if gone {
        (vec![], vec![])
    } else {
        copies(&borrowed, &found, rank, Some(&record.run_id))?
    };
    match (good.is_empty(), silent) {
        (true, Some(e)) => return Err(e), // It may have a good one: nothing is marked bad.
        (false, Some(e)) => {
            let text = format!("a tier does not answer, another one is used: {}", e.chain());
            place.observer.warn("tier_silent", Some(key.step.0), text);
        }
        (_, None) => {}
    }
    if gone {
        return Err(Error::NotFound {
            what: format!("{key}, which {} resumes from,", record.attempt),
        });
    }
    if good.is_empty() {
        let why = if bad.is_empty() {
            "none has it".into()
        } else {
            bad.iter().map(|b| b.why.clone()).collect::<Vec<_>>().join("; ")
        };
        return Err(Error::Lost { step: key.step, rank, why });
    }
    let found = Restorable::of(key.clone(), rank, tiers, (good, bad), place.observer.clone());
    Ok(Restorable { mends, marks, ..found })
}
