//! What a rank gets back of the decided step: its shard as it lies here, from other nodes, or from the
//! bucket.
//!
//! # Invariants
//!
//! - A rank that finds no good copy anywhere says so in `bad/`; one that finds a good one says nothing.
//! - The bucket is asked for what neither this node nor another one has.

use std::sync::Arc;

use super::fetched::{Seen, fetch_shard};
use crate::{
    attempt::AttemptRecord,
    commit::Listing,
    error::{Error, Result},
    names::{CheckpointKey, Rank},
    place::Place,
    restore::{
        read::Restorable,
        survey::{Found, copies, look_again, mark_bad},
    },
    tier::Tier,
};

pub(super) fn find_shard(
    place: &Place,
    record: &AttemptRecord,
    key: &CheckpointKey,
    seen: &Seen<'_>,
) -> Result<Restorable> {
    let (rank, saves) = (Rank(place.config.shard_rank()), place.config.saves());
    let mut own = find_shard_of(place, record, key, (rank, saves), seen)?;
    // Each rank mends its own shard alone, but whoever cannot restore says so: the shard's own rank
    // may not read what is lost.
    let savers = own.leaves_to().into_iter();
    let others = savers.map(|saver| find_shard_of(place, record, key, (saver, false), seen));
    own.others = others.collect::<Result<_>>()?;
    Ok(own)
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
        match fetch_shard(place, peers, record, (key, rank), seen) {
            Ok(true) => found = find(&near),
            Ok(false) => {}
            Err(e) if place.bucket.is_none() => return Err(e),
            Err(e) => tracing::warn!("{key}, {rank}: no copy from other nodes: {}", e.chain()),
        }
    }
    if let Some(bucket) = place.bucket.as_ref().filter(|_| is_lost(&found)) {
        found = find(&[&place.ram, &place.disk, bucket]);
    }
    if matches!(found, Err(Error::Lost { .. })) && place.config.saves() {
        mark_bad(&*place.disk, &place.observer, key, rank);
    }
    found
}

fn find_shard_in(
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
    Ok(Restorable {
        key: key.clone(),
        rank,
        tiers,
        copies: good,
        bad,
        slot: None,
        observer: place.observer.clone(),
        mends,
        marks,
        care: None,
        over: None,
        others: Vec::new(),
    })
}
