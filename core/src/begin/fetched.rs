//! A shard that this node does not have comes from nodes that do, into a slot of its own: then it is
//! restored as any other.

use std::{sync::Arc, time::Duration};

use tierkeep_proto::peer::{self as wire, reply::Answer, request::Ask};

use super::{AGAIN, Elsewhere};
use crate::{
    attempt::AttemptRecord,
    clock::Deadline,
    commit::{Listing, publish_shard},
    error::{Error, ErrorKind, Result},
    names::{CheckpointKey, Rank},
    observe::add,
    peers::{
        Incoming, Peers,
        fetch::fetch,
        odd,
        remote::{Remote, look_at, look_at_all},
    },
    place::Place,
    restore::{
        read::Restorable,
        survey::{Found, ShardCopy, copies},
    },
    snapshot::{arena::Memory, slot::SlotPayload},
    tier::{Tier, TierKind},
    wire::convert,
};

/// How long it may take until this agent knows of all others.
const SEEN_WITHIN: Duration = Duration::from_secs(20);

/// The longest pause between two looks at all of them.
const AGAIN_MAX: Duration = Duration::from_secs(4);

/// Where the shards of the decided step were seen.
pub(super) enum Seen<'a> {
    /// The leader, which decided.
    Here(&'a Elsewhere),
    /// Another rank: the leader's agent is asked.
    Asked(&'a str),
    /// There are no other nodes.
    Nowhere,
}

impl Seen<'_> {
    /// On other nodes; none: it is not known.
    fn places(&self, peers: &Peers, record: &AttemptRecord, rank: Rank) -> Vec<(String, TierKind)> {
        let mut places = match self {
            Self::Here(elsewhere) => elsewhere.places.get(&rank.0).cloned().unwrap_or_default(),
            Self::Asked(node) => asked(peers, node, record, rank).unwrap_or_else(|e| {
                tracing::debug!("{node} does not say who holds {rank}: {}", e.chain());
                Vec::new()
            }),
            Self::Nowhere => Vec::new(),
        };
        let me = peers.network.me();
        places.retain(|(node, _)| *node != me); // It was looked for here.
        places
    }
}

fn asked(
    peers: &Peers,
    node: &str,
    record: &AttemptRecord,
    rank: Rank,
) -> Result<Vec<(String, TierKind)>> {
    let holders = wire::Holders { attempt: record.attempt.dir(), rank: rank.0 };
    // A leader on this node is asked like any other: nobody else knows its answer.
    let Answer::Places(said) = peers.ask(node, Ask::Holders(holders))? else {
        return Err(odd(node));
    };
    let place = |place: wire::Place| Ok((place.node, convert::tier_kind(place.tier)?));
    said.places.into_iter().map(place).collect()
}

/// Fetches the shard of `rank`; false: no other node has it. Those that had it when the leader decided are
/// asked, and all where that does not do.
///
/// # Errors
/// A node that may have it does not answer, or there is no room for it here.
pub(super) fn fetch_shard(
    place: &Place,
    peers: &Peers,
    record: &AttemptRecord,
    (key, rank): (&CheckpointKey, Rank),
    seen: &Seen<'_>,
) -> Result<bool> {
    // The leader saw it whole: where this agent does not see it, gossip has not told it of all nodes yet.
    let deadline = Deadline::after(&*place.clock, SEEN_WITHIN.min(place.config.attempt_wait));
    let mut pause = AGAIN;
    loop {
        let mut tried = Ok(false);
        let known = seen.places(peers, record, rank);
        if !known.is_empty() {
            let looked = look_at(peers, &known, Some(key));
            tried = fetch_now(place, peers, record, (key, rank), looked);
        }
        if !matches!(tried, Ok(true)) {
            tried = fetch_now(place, peers, record, (key, rank), look_at_all(peers));
        }
        match tried {
            Ok(false) if deadline.left(&*place.clock).is_some() => {}
            Err(e)
                if e.kind() == ErrorKind::Unavailable && deadline.left(&*place.clock).is_some() =>
            {
                tracing::debug!("{key}: {}; trying again", e.chain());
            }
            other => return other,
        }
        place.check_closed()?;
        place.clock.pause(pause);
        pause = (2 * pause).min(AGAIN_MAX); // All were asked.
    }
}

/// The shard with its copies on other nodes behind those that are here.
///
/// # Errors
/// None of them has it.
pub(crate) fn with_remotes(peers: &Peers, here: &Restorable) -> Result<Restorable> {
    let nodes = peers.others().into_iter();
    let tiers = [TierKind::Ram, TierKind::Disk];
    let all: Vec<_> = nodes.flat_map(|node| tiers.map(|kind| (node.name.clone(), kind))).collect();
    let (remotes, _) = look_at(peers, &all, Some(&here.key));
    let far: Vec<&dyn Tier> = remotes.iter().map(|remote| &**remote as &dyn Tier).collect();
    let listings = far.iter().map(|tier| Listing::of(*tier, &here.key)).collect::<Result<_>>()?;
    let found = Found { key: here.key.clone(), listings };
    let run_id = here.manifest().identity.run_id;
    let (mut good, _) = copies(&far, &found, here.rank, Some(&run_id))?;
    good.retain(|copy| copy.bytes.as_slice() == here.manifest_bytes());
    if good.is_empty() {
        let what = format!("{}'s shard of {} on another node", here.rank, here.key);
        return Err(Error::NotFound { what });
    }
    let mut both = here.clone();
    let first = both.tiers.len();
    both.tiers.extend(remotes.into_iter().map(|remote| remote as Arc<dyn Tier>));
    both.copies.extend(good.into_iter().map(|c| ShardCopy { tier: first + c.tier, ..c }));
    Ok(both)
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
        over: None,
        others: Vec::new(),
    };
    let manifest = there.manifest();
    let name = key.file(&manifest.payload.file);
    let receipt = place.ram.put(&name, &there.payload())?;
    publish_shard(&*place.ram, &manifest.identity, there.manifest_bytes(), receipt)?;
    add(&place.observer.counters.peer_fetched_bytes, manifest.payload.length);
    Ok(())
}

/// Fetches it from tiers that were looked at, and knows who did not answer.
fn fetch_now(
    place: &Place,
    peers: &Peers,
    record: &AttemptRecord,
    (key, rank): (&CheckpointKey, Rank),
    (remotes, silent): (Vec<Arc<Remote>>, Vec<(String, Error)>),
) -> Result<bool> {
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
    let filling = place.arena.acquire(payload.length, Memory::AsWritten, &may_go)?;
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
    add(&place.observer.counters.peer_fetched_bytes, payload.length);
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
