//! A shard that this node does not have comes from nodes that do, or from the bucket, into a slot of its own:
//! then it is restored as any other.

use std::{
    os::unix::fs::FileExt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tierkeep_proto::peer::{self as wire, reply::Answer, request::Ask};

use super::{AGAIN, Elsewhere};
use crate::{
    attempt::AttemptRecord,
    chunk::CHUNK_BYTES,
    clock::Deadline,
    commit::{Listing, publish_shard},
    error::{Doing, Error, ErrorKind, Result},
    manifest::ShardManifest,
    names::{CheckpointKey, Rank},
    observe::{add, locked},
    peers::{
        Incoming, Peers,
        fetch::fetch,
        odd,
        remote::{Remote, look_at, look_at_all},
    },
    place::Place,
    restore::{
        read::{READERS, Restorable, run_on},
        survey::{Found, ShardCopy, copies},
    },
    snapshot::{
        arena::{Filling, Memory},
        slot::{Slot, SlotPayload},
    },
    tier::{Payload, Tier, TierKind, buffer::AlignedBuf},
    wire::convert,
};

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

/// Fetches the shard of `rank`; false: within `patience` no other node has it. Those that had it when the
/// leader decided are asked, and all where that does not do.
///
/// # Errors
/// A node that may have it does not answer, or there is no room for it here.
pub(super) fn fetch_shard(
    place: &Place,
    peers: &Peers,
    record: &AttemptRecord,
    (key, rank): (&CheckpointKey, Rank),
    seen: &Seen<'_>,
    patience: Duration,
) -> Result<bool> {
    let deadline = Deadline::after(&*place.clock, patience);
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
        if Listing::of(&*place.ram, key)?.manifests.contains(&rank) {
            return Ok(true); // Another rank of this node has it by now.
        }
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
    both.add_copies(remotes.into_iter().map(|remote| remote as Arc<dyn Tier>).collect(), good);
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
    let tiers = remotes.iter().map(|remote| remote.clone() as Arc<dyn Tier>).collect();
    let copies = (copies, Vec::new());
    let there = Restorable::of(key.clone(), rank, tiers, copies, place.observer.clone());
    add(&place.observer.counters.peer_fetched_bytes, copy_beside(place, &there)?);
    Ok(())
}

/// Its bytes, once they lie in a file of its own.
fn copy_beside(place: &Place, there: &Restorable) -> Result<u64> {
    let manifest = there.manifest();
    let name = there.key.file(&manifest.payload.file);
    let receipt = place.ram.put(&name, &there.payload())?;
    publish_shard(&*place.ram, &manifest.identity, there.manifest_bytes(), receipt)?;
    Ok(manifest.payload.length)
}

/// A shard that only the bucket has comes into a slot of this rank; another rank's, into a file beside.
///
/// # Errors
/// The bucket does not answer, some of it is good there no more, or there is no room for it here.
pub(super) fn bring_here(place: &Place, there: &Restorable) -> Result<()> {
    let begun = place.clock.monotonic();
    let (key, payload) = (&there.key, &there.manifest().payload);
    if there.rank.0 == place.config.rank {
        let slot = acquire(place, key, payload.length)?;
        fill(slot.slot(), &there.payload())?;
        keep(place, there.manifest(), there.manifest_bytes(), key, slot)?;
    } else {
        copy_beside(place, there)?;
    }
    add(&place.observer.counters.object_fetched_bytes, payload.length);
    let took = place.clock.monotonic().saturating_sub(begun);
    tell_fetched(place, key, payload.length, "the bucket", took);
    Ok(())
}

/// Writes a payload that checks itself into a slot, several chunks at a time.
fn fill(slot: &Slot, payload: &dyn Payload) -> Result<()> {
    let (next, trouble) = (AtomicU64::new(0), Mutex::new(None));
    let work = || {
        let mut scratch = AlignedBuf::new(1);
        while locked(&trouble).is_none() {
            let offset = next.fetch_add(1, Ordering::Relaxed) * CHUNK_BYTES;
            if offset >= payload.len() {
                return;
            }
            let len = usize::try_from((payload.len() - offset).min(CHUNK_BYTES)).unwrap_or(0);
            let written = payload.block(offset, len, &mut scratch).and_then(|block| {
                let write = slot.file().write_all_at(&block[..len], offset);
                write.doing(|| "write to a slot".into())
            });
            if let Err(e) = written {
                locked(&trouble).get_or_insert(e);
            }
        }
    };
    run_on(READERS, &work);
    let trouble = locked(&trouble).take();
    trouble.map_or(Ok(()), Err)
}

/// A slot for a shard of this rank.
fn acquire(place: &Place, key: &CheckpointKey, len: u64) -> Result<Filling> {
    // What else lies in this rank's slots here is older, or of no lineage: the decision is recorded.
    let may_go = |held: &CheckpointKey| held != key;
    let filling = place.arena.acquire(len, Memory::AsWritten, &may_go)?;
    filling.ok_or_else(|| Error::Bug("no slot is free before a restore".into()))
}

/// What arrived in a slot is this rank's shard from here on.
fn keep(
    place: &Place,
    manifest: &ShardManifest,
    bytes: &[u8],
    key: &CheckpointKey,
    filling: Filling,
) -> Result<()> {
    let (identity, payload) = (&manifest.identity, &manifest.payload);
    let slot = SlotPayload { slot: filling.slot().clone(), len: payload.length };
    // A payload of this name without a good manifest is nobody's.
    let name = key.file(&payload.file);
    place.ram.delete(&key.manifest(Rank(identity.rank)))?;
    place.ram.delete(&name)?;
    let receipt = place.ram.put(&name, &slot)?;
    publish_shard(&*place.ram, identity, bytes, receipt)?;
    place.arena.hold(filling, key.clone());
    Ok(())
}

fn tell_fetched(place: &Place, key: &CheckpointKey, bytes: u64, from: &str, took: Duration) {
    let bytes = crate::snapshot::budget::human(bytes);
    let text = format!("{}: {bytes} came from {from} in {:.2} s", key.step, took.as_secs_f64());
    place.observer.info("fetched", Some(key.step.0), text);
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
    let holders: Vec<_> = good.iter().map(|copy| remotes[copy.tier].clone()).collect();
    if rank.0 != place.config.rank {
        return copy_here(place, key, rank, (&remotes, good)).map(|()| true);
    }
    let length = manifest.payload.length;
    let filling = acquire(place, key, length)?;
    let incoming = Incoming::new(filling, manifest.clone(), first.bytes.to_vec(), false);
    let told = fetch(peers, key, &holders, &incoming)?;
    for why in &told.trouble {
        place.observer.warn("damaged_copy", Some(key.step.0), format!("{key}: {why}"));
    }
    let filling = incoming.take().ok_or_else(|| Error::Bug("a fetch that ended twice".into()))?;
    keep(place, &manifest, &first.bytes, key, filling)?;
    add(&place.observer.counters.peer_fetched_bytes, length);
    let took = place.clock.monotonic().saturating_sub(begun);
    let from: Vec<&str> = holders.iter().map(|holder| holder.node.as_str()).collect();
    tell_fetched(place, key, length, &from.join(" and "), took);
    Ok(true)
}
