//! A shard that this node does not have comes from nodes that do, into a slot of its own: then it is
//! restored as any other.

use std::{sync::Arc, time::Duration};

use super::AGAIN;
use crate::{
    attempt::AttemptRecord,
    clock::Deadline,
    commit::{Listing, publish_shard},
    error::{Error, ErrorKind, Result},
    names::{CheckpointKey, Rank},
    peers::{
        Incoming, Peers,
        fetch::fetch,
        remote::{Remote, look_at_all},
    },
    place::Place,
    restore::{
        read::Restorable,
        survey::{Found, ShardCopy, copies},
    },
    snapshot::slot::SlotPayload,
    tier::Tier,
};

/// How long it may take until this agent knows of all others.
const SEEN_WITHIN: Duration = Duration::from_secs(20);

/// Fetches the shard of `rank`; false: no other node has it.
///
/// # Errors
/// A node that may have it does not answer, or there is no room for it here.
pub(super) fn fetch_shard(
    place: &Place,
    peers: &Peers,
    record: &AttemptRecord,
    key: &CheckpointKey,
    rank: Rank,
) -> Result<bool> {
    // The leader saw it whole: where this agent does not see it, gossip has not told it of all nodes yet.
    let deadline = Deadline::after(&*place.clock, SEEN_WITHIN.min(place.config.attempt_wait));
    loop {
        match fetch_now(place, peers, record, key, rank) {
            Ok(false) if deadline.left(&*place.clock).is_some() => {}
            Err(e)
                if e.kind() == ErrorKind::Unavailable && deadline.left(&*place.clock).is_some() =>
            {
                tracing::debug!("{key}: {}; trying again", e.chain());
            }
            other => return other,
        }
        place.check_closed()?;
        place.clock.pause(AGAIN);
    }
}

/// The shard of another rank, which this one reads only: a file of its own in the run's ram tier. Its rank
/// lets it go with the next attempt.
fn copy_here(
    place: &Place,
    key: &CheckpointKey,
    rank: Rank,
    (remotes, copies): (&[Arc<Remote>], Vec<ShardCopy>),
) -> Result<()> {
    let there = Restorable {
        key: key.clone(),
        rank,
        tiers: remotes.iter().map(|remote| remote.clone() as Arc<dyn Tier>).collect(),
        copies,
        bad: Vec::new(),
        slot: None,
        observer: place.observer.clone(),
        mends: false,
        marks: false,
        care: None,
        others: Vec::new(),
    };
    let manifest = there.manifest();
    let name = key.file(&manifest.payload.file);
    let receipt = place.ram.put(&name, &there.payload())?;
    publish_shard(&*place.ram, &manifest.identity, there.manifest_bytes(), receipt)
}

fn fetch_now(
    place: &Place,
    peers: &Peers,
    record: &AttemptRecord,
    key: &CheckpointKey,
    rank: Rank,
) -> Result<bool> {
    let (remotes, silent) = look_at_all(peers);
    let tiers: Vec<&dyn Tier> = remotes.iter().map(|remote| &**remote as &dyn Tier).collect();
    let listings = tiers.iter().map(|tier| Listing::of(*tier, key)).collect::<Result<_>>()?;
    let found = Found { key: key.clone(), listings };
    if found.deleted() {
        return Ok(false);
    }
    let (good, bad) = copies(&tiers, &found, rank, Some(&record.run_id))?;
    for bad in &bad {
        let text = format!("{key}: {}", bad.why);
        place.observer.warn("damaged_copy", Some(key.step.0), text);
    }
    let Some(first) = good.first() else {
        return match silent.into_iter().next() {
            Some((_, e)) => Err(e), // It may have it.
            None => Ok(false),
        };
    };
    let begun = place.clock.monotonic();
    let manifest = (*first.manifest).clone();
    let (identity, payload) = (manifest.identity.clone(), manifest.payload.clone());
    let holders: Vec<_> = good.iter().map(|copy| remotes[copy.tier].clone()).collect();
    // What else lies in this rank's slots here is older, or of no lineage: the decision is recorded.
    let may_go = |held: &CheckpointKey| held != key;
    if rank.0 != place.config.rank {
        return copy_here(place, key, rank, (&remotes, good)).map(|()| true);
    }
    let filling = place.arena.acquire(payload.length, &may_go)?;
    let filling = filling.ok_or_else(|| Error::Bug("no slot is free before a restore".into()))?;
    let incoming = Incoming::new(filling, manifest, first.bytes.to_vec(), false);
    let told = fetch(peers, key, &holders, &incoming)?;
    for why in &told.trouble {
        place.observer.warn("damaged_copy", Some(key.step.0), format!("{key}: {why}"));
    }
    let filling = incoming.take().ok_or_else(|| Error::Bug("a fetch that ended twice".into()))?;
    let slot = SlotPayload { slot: filling.slot().clone(), len: payload.length };
    // A payload of this name without a good manifest is nobody's.
    let name = key.file(&payload.file);
    place.ram.delete(&key.manifest(rank))?;
    place.ram.delete(&name)?;
    let receipt = place.ram.put(&name, &slot)?;
    publish_shard(&*place.ram, &identity, &first.bytes, receipt)?;
    place.arena.hold(filling, key.clone());
    let took = place.clock.monotonic().saturating_sub(begun);
    let from: Vec<&str> = holders.iter().map(|holder| holder.node.as_str()).collect();
    place.observer.info(
        "fetched",
        Some(key.step.0),
        format!(
            "{}: {} came from {} in {:.2} s",
            key.step,
            crate::snapshot::budget::human(payload.length),
            from.join(" and "),
            took.as_secs_f64()
        ),
    );
    Ok(true)
}
