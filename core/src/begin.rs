//! How an attempt begins: rank 0 decides and records, the others find its record; all claim, and
//! all obey.
//!
//! # Invariants
//!
//! - A rank follows a record only if a live rank 0 holds that start's lock, or the start's id was
//!   given to it.
//! - After recording, rank 0 looks whether the parent is still there; if a collector took it, a
//!   successor is recorded.
//! - Rank 0's claim says that the record stands: no rank follows a record that will be succeeded.
//! - A checkpoint that is not the newest is resumed from only by a rollback: else the newer ones
//!   would be in nobody's way and the first save would use their slots.
//! - A decision that is asked for again because its answer was lost is the same decision.
//! - `fresh` and rollbacks are recorded as such: what they leave behind is abandoned at once.

pub(crate) mod fetched;
pub(crate) mod found;
mod joined;
pub(crate) mod roster;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use self::{
    fetched::Seen,
    found::find_shard,
    joined::{Asking, join_elsewhere},
    roster::Roster,
};
use crate::{
    attempt::{self, AttemptRecord, Attempts},
    clock::Deadline,
    commit::Listing,
    error::{Error, ErrorKind, Hint, Result},
    names::{AttemptDir, AttemptRef, CheckpointKey, Id, Rank, ranks},
    ownership::is_held,
    peers::{
        Peers,
        remote::{Remote, look_at_all},
    },
    place::{Place, start_lock_path},
    record,
    restore::{
        decide::{Decision, Wholes, Wish, answering, decide, decide_once, whole_before},
        read::Restorable,
        survey::survey,
    },
    sys::host,
    tier::{Tier, TierKind},
};

/// How an attempt is to begin.
#[derive(Clone, Debug, Default)]
pub struct Begin {
    /// Which checkpoint, if not the newest.
    pub wish: Wish,
    /// Abandon what is newer than the wished step.
    pub rollback: bool,
    /// Begin at step 0 and abandon what is there.
    pub fresh: bool,
    /// Begin at step 0 only where nothing is there: a save without a restore.
    pub only_new: bool,
}

/// An attempt that has begun.
pub(crate) struct Started {
    pub(crate) record: AttemptRecord,
    pub(crate) restorable: Option<Restorable>,
    /// What is known of other nodes.
    pub(crate) elsewhere: Elsewhere,
    /// Where what it resumes from is sealed.
    pub(crate) stands: Stands,
}

/// What the leader saw of other nodes when it decided; of this rank alone, where it is not the leader.
#[derive(Clone, Debug, Default)]
pub(crate) struct Elsewhere {
    /// The newest whole checkpoint before the one that is resumed from.
    pub(crate) fallback: Option<CheckpointKey>,
    /// The nodes that hold something of each rank in RAM.
    pub(crate) holders: BTreeMap<u32, Vec<String>>,
    /// Where each rank's shard of the one that is resumed from lies.
    pub(crate) places: BTreeMap<u32, Vec<(String, TierKind)>>,
}

/// How often a rank looks for rank 0's record.
const POLL: Duration = Duration::from_millis(10);

/// The same where its agent is told of it.
const POLL_TOLD: Duration = Duration::from_millis(50);

pub(crate) fn begin(place: &Place, how: &Begin, decision: u32) -> Result<Started> {
    let deadline = Deadline::after(&*place.clock, place.config.attempt_wait);
    if place.config.leads() {
        let mut earlier = own_record(place, decision);
        let mut tries = 0;
        // The step that was decided on can go while we decide: then decide again.
        loop {
            let decided = match earlier.take() {
                Some(record) => Ok((record, Elsewhere::default())),
                None => record_decision(place, how, decision),
            };
            let (record, elsewhere) = match decided {
                // A node that answered a moment ago is gone: the others are looked at anew.
                Err(e)
                    if place.peers.is_some()
                        && e.kind() == ErrorKind::Unavailable
                        && tries < TRIES
                        && deadline.left(&*place.clock).is_some() =>
                {
                    tracing::warn!("{}; deciding again", e.chain());
                    tries += 1;
                    place.clock.pause(AGAIN);
                    place.check_closed()?;
                    earlier = own_record(place, decision);
                    continue;
                }
                other => other?,
            };
            clear_old(place, &record);
            match join_attempt(place, &record, &Seen::Here(&elsewhere)) {
                Ok(started) => return Ok(Started { elsewhere, ..started }),
                Err(e) if e.is_not_found() && deadline.left(&*place.clock).is_some() => {
                    tracing::warn!("{}; deciding again", e.chain());
                }
                Err(e) => return Err(e),
            }
            place.check_closed()?;
        }
    }
    let (mut refused, mut asking) = (None, Asking::default());
    loop {
        let seen = place.signal.seen();
        let joined = match place.peers.as_ref().filter(|_| place.is_spread()) {
            Some(peers) => join_elsewhere(place, peers, decision, &mut asking).transpose(),
            None => {
                let record = leaders_record(place, decision)?;
                record.map(|record| join_attempt(place, &record, &Seen::Nowhere))
            }
        };
        if let Some(joined) = joined {
            match joined {
                // Claimed by a process of an older start that is still dying, or taken by a
                // collector between record and look: rank 0 will record another.
                Err(e) if matches!(e, Error::Fenced { .. }) || e.is_not_found() => {
                    refused = Some(e)
                }
                other => return other,
            }
        }
        if deadline.left(&*place.clock).is_none() {
            return Err(refused.unwrap_or_else(|| no_record(place, &deadline)));
        }
        match place.is_spread() {
            true => place.signal.wait(seen, POLL_TOLD),
            false => place.clock.pause(POLL),
        }
        // Ctrl-C left this call behind on its thread, and the handle was closed.
        place.check_closed()?;
    }
}

/// How often the leader looks again where a node goes away while it decides.
const TRIES: usize = 8;

fn no_record(place: &Place, deadline: &Deadline) -> Error {
    let config = &place.config;
    deadline.passed(
        format!(
            "an attempt record of rank {} in {} (seen from host {})",
            config.leader(),
            config.destination.display(),
            host()
        ),
        format!(
            "rank {} has not begun, or {}",
            config.leader(),
            match place.is_spread() {
                true => "its agent and this one do not reach each other",
                false =>
                    "does not share this directory (several nodes need a shared one, or agents that \
                     gossip, and the same attempt id on all ranks)",
            }
        ),
    )
}

/// Rank 0: its own record of this decision, whose answer was lost with the agent that made it.
/// A tier that does not answer is met again, with its hint, by the decision that follows.
fn own_record(place: &Place, decision: u32) -> Option<AttemptRecord> {
    let attempts = Attempts::load(&[&*place.disk]).ok()?;
    let newest = attempts.newest()?;
    let ours = newest.attempt.id == place.start && newest.decision == decision;
    let rank = Rank(place.config.rank);
    let claimed = attempt::is_claimed_by(&*place.disk, &newest.attempt, rank, &place.nonce);
    (ours && claimed.is_ok_and(|ours| ours)).then(|| newest.clone())
}

/// Rank 0: decides and records. Beside it what it saw of other nodes.
fn record_decision(
    place: &Place,
    how: &Begin,
    decision: u32,
) -> Result<(AttemptRecord, Elsewhere)> {
    let mut silent = Vec::new();
    let remotes = elsewhere(place, &how.wish, &mut silent)?;
    let far = || remotes.iter().map(|remote| &**remote as &dyn Tier);
    let durable_first: [&dyn Tier; 2] = [&*place.disk, &*place.ram];
    let bucket = answering_bucket(place, &how.wish, &mut silent)?;
    let near: [&dyn Tier; 2] = [&*place.ram, &*place.disk];
    let tiers: Vec<&dyn Tier> = near.into_iter().chain(far()).chain(bucket).collect();
    let all: Vec<&dyn Tier> = durable_first.into_iter().chain(far()).chain(bucket).collect();
    let attempts = Attempts::load(&answering(&all, &how.wish, &mut Vec::new())?)?;
    keep_records(&attempts, &all, &durable_first)?;
    let mut wholes = Wholes::default();
    let mut decided = decide_once(&tiers, &*place.disk, &attempts, &how.wish, &mut wholes)?;
    decided.passed_over.splice(0..0, silent);
    if how.only_new && decided.has_history {
        return Err(Error::invalid(format!(
            "{} already has checkpoints or attempts: a save that follows no restore would begin anew",
            place.config.destination.display()
        ))
        .with_hint(Hint::RestoreFirst));
    }
    let chosen = how.wish.step.is_some() || how.wish.attempt.is_some();
    if chosen && !how.rollback {
        check_newest(place, &tiers, &attempts, &decided)?;
    }
    let fallback = match decided.parent.filter(|_| !remotes.is_empty()) {
        Some(parent) => whole_before(&tiers, &attempts, &parent.key(), &mut wholes)?,
        None => None,
    };
    let places = match decided.parent.filter(|_| !how.fresh) {
        Some(parent) => places(place, &remotes, &parent.key())?,
        None => BTreeMap::new(),
    };
    let seen = Elsewhere { fallback, holders: holders(&remotes)?, places };
    let decided = if how.fresh { Decision { parent: None, ..decided } } else { decided };
    check_world(place, &decided)?;
    for why in &decided.passed_over {
        place.observer.warn("passed_over", None, format!("passed over {why}"));
    }
    let newest = attempts.newest();
    let draft = AttemptRecord {
        format: record::FORMAT,
        required_features: Vec::new(),
        run_id: newest.map_or_else(Id::random, |r| Ok(r.run_id))?,
        attempt: AttemptRef { number: newest.map_or(0, |r| r.attempt.number) + 1, id: place.start },
        decision,
        parent: decided.parent,
        rollback: how.rollback || (how.fresh && decided.has_history),
        savers: place.config.savers.clone(),
        replicated: !place.config.replicated.is_empty(),
        host: host(),
        pid: std::process::id(),
        created_unix_ms: place.clock.unix_ms(),
        passed_over: decided.passed_over,
    };
    // A bucket decides for all clusters that write there.
    let decides: Vec<&dyn Tier> = bucket.into_iter().chain(durable_first).collect();
    Ok((attempt::create(&decides, draft)?, seen))
}

/// The bucket, if there is one that answers.
fn answering_bucket<'a>(
    place: &'a Place,
    wish: &Wish,
    passed_over: &mut Vec<String>,
) -> Result<Option<&'a dyn Tier>> {
    let Some(bucket) = &place.bucket else { return Ok(None) };
    Ok(answering(&[&**bucket], wish, passed_over)?.first().copied())
}

/// Which nodes hold something of which rank in RAM.
fn holders(remotes: &[Arc<Remote>]) -> Result<BTreeMap<u32, Vec<String>>> {
    let mut holders: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for remote in remotes.iter().filter(|remote| remote.is_ram()) {
        for found in survey(&[&**remote])? {
            for rank in found.listings.iter().flat_map(|listing| &listing.manifests) {
                let nodes = holders.entry(rank.0).or_default();
                if nodes.last() != Some(&remote.node) {
                    nodes.push(remote.node.clone());
                }
            }
        }
    }
    Ok(holders)
}

/// Where each rank's shard of a checkpoint lies, on this node too.
fn places(
    place: &Place,
    remotes: &[Arc<Remote>],
    key: &CheckpointKey,
) -> Result<BTreeMap<u32, Vec<(String, TierKind)>>> {
    let Some(peers) = &place.peers else { return Ok(BTreeMap::new()) };
    let me = peers.network.me();
    let here = [(&me, TierKind::Ram, &*place.ram), (&me, TierKind::Disk, &*place.disk)];
    let far = remotes.iter().map(|remote| {
        let kind = if remote.is_ram() { TierKind::Ram } else { TierKind::Disk };
        (&remote.node, kind, &**remote as &dyn Tier)
    });
    let mut places: BTreeMap<u32, Vec<(String, TierKind)>> = BTreeMap::new();
    for (node, kind, tier) in here.into_iter().chain(far) {
        for rank in Listing::of(tier, key)?.manifests {
            places.entry(rank.0).or_default().push((node.clone(), kind));
        }
    }
    Ok(places)
}

/// A wait that takes longer is told.
const TELL_AFTER: Duration = Duration::from_secs(5);

/// How often agents that are alive and do not answer are asked again.
const AGAIN: Duration = Duration::from_millis(250);

/// The tiers of all live agents. One that does not answer, and is not missed by the others either, may
/// have a newer checkpoint; so may nodes of the last attempt that nobody sees.
fn elsewhere(
    place: &Place,
    wish: &Wish,
    passed_over: &mut Vec<String>,
) -> Result<Vec<Arc<Remote>>> {
    let Some(peers) = &place.peers else { return Ok(Vec::new()) };
    let deadline = Deadline::after(&*place.clock, place.config.attempt_wait);
    let (patience, mut told) = (Deadline::after(&*place.clock, TELL_AFTER), false);
    loop {
        let settled = peers.network.is_settled();
        let (found, silent) = look_at_all(peers);
        let who = match silent.first() {
            Some((node, e)) => format!("{node}: {}", e.chain()),
            None => match missing_nodes(place, peers, &found)? {
                Some(missing) => format!("{}, of the last attempt", missing.join(", ")),
                None if settled => return Ok(found),
                None => "agents that gossip has not found yet".into(),
            },
        };
        place.check_closed()?;
        if !told && patience.left(&*place.clock).is_none() {
            told = true;
            place.observer.warn("waiting", None, format!("the restore waits for {who}"));
        }
        if deadline.left(&*place.clock).is_none() {
            if wish.accept_older {
                passed_over.push(format!("not all nodes answer: {who}"));
                return Ok(found);
            }
            let what = "an answer of every node that may hold a newer checkpoint";
            return Err(deadline.passed(what, who).with_hint(Hint::AcceptOlder));
        }
        place.clock.pause(AGAIN);
    }
}

/// Nodes of the last attempt that are not seen, where they are too many.
fn missing_nodes(
    place: &Place,
    peers: &Peers,
    found: &[Arc<Remote>],
) -> Result<Option<Vec<String>>> {
    let far = found.iter().map(|remote| &**remote as &dyn Tier);
    let tiers: Vec<&dyn Tier> = [&*place.ram, &*place.disk].into_iter().chain(far).collect();
    let Some(roster) = Roster::newest(&tiers)? else { return Ok(None) };
    let seen = found.iter().map(|remote| remote.node.clone());
    Ok(roster.missing(&seen.chain([peers.network.me()]).collect()))
}

/// What other nodes know of the run's attempts is known here too, from now on.
fn keep_records(attempts: &Attempts, all: &[&dyn Tier], own: &[&dyn Tier]) -> Result<()> {
    if all.len() == own.len() {
        return Ok(());
    }
    for record in attempts.records() {
        let (_, bytes) = attempt::read(all, record.attempt.number)?;
        own.iter().try_for_each(|tier| attempt::keep(*tier, record, &bytes))?;
    }
    let joined = attempts.joined().iter();
    joined.copied().try_for_each(|number| attempt::join_number(own[0], number))
}

/// Removes what earlier attempts left for their own ranks: decisions, claims, the locks of dead
/// starts. None of it matters to anybody any more; what cannot be removed stays.
fn clear_old(place: &Place, record: &AttemptRecord) {
    let root = &place.config.home();
    let own = record.attempt.dir();
    for kind in ["_decisions", "_claims"] {
        for entry in place.disk.list(kind).unwrap_or_default() {
            let older = AttemptDir::parse(&entry.name)
                .is_some_and(|dir| dir.number < record.attempt.number && entry.name != own);
            if older && let Err(e) = std::fs::remove_dir_all(root.join(kind).join(&entry.name)) {
                tracing::debug!("{kind}/{} stays: {e}", entry.name);
            }
        }
    }
    for entry in place.disk.list("_locks").unwrap_or_default() {
        let path = root.join("_locks").join(&entry.name);
        if entry.name.starts_with("start-") && matches!(is_held(&path), Ok(false)) {
            let _ = crate::tier::publish::remove(&path);
        }
    }
}

/// A resume from an older checkpoint must be meant.
fn check_newest(
    place: &Place,
    tiers: &[&dyn Tier],
    attempts: &Attempts,
    decided: &Decision,
) -> Result<()> {
    let newest = decide(tiers, &*place.disk, attempts, &Wish::default())?.parent;
    match (newest, decided.parent) {
        (Some(newest), Some(chosen)) if newest != chosen => Err(Error::invalid(format!(
            "{} is not where this run resumes, {} is: to go back is to abandon what is newer",
            chosen.key(),
            newest.key()
        ))
        .with_hint(Hint::Rollback)),
        _ => Ok(()),
    }
}

fn check_world(place: &Place, decided: &Decision) -> Result<()> {
    match decided.parent {
        Some(parent) if decided.savers != place.config.savers => {
            Err(Error::Mismatch(vec![format!(
                "{} was saved by {} ranks ({}), this job saves from {} ({}): the ranks that save must be \
                 the same",
                parent.key(),
                decided.savers.len(),
                ranks(&decided.savers),
                place.config.savers.len(),
                ranks(&place.config.savers)
            )]))
        }
        _ => Ok(()),
    }
}

/// The record that the live rank 0 made for this decision, if it is there.
fn leaders_record(place: &Place, decision: u32) -> Result<Option<AttemptRecord>> {
    let attempts = Attempts::load(&[&*place.disk, &*place.ram])?;
    let of_start = |r: &&AttemptRecord| match &place.config.attempt_id {
        Some(start) => r.attempt.id == *start,
        None => true,
    };
    let Some(record) = attempts.records().iter().rev().find(of_start) else { return Ok(None) };
    if record.decision < decision {
        return Ok(None);
    }
    let known = place.config.attempt_id.is_some()
        || is_held(&start_lock_path(&place.config.home(), &record.attempt.id))?;
    let stands =
        known && attempt::is_claimed(&*place.disk, &record.attempt, Rank(place.config.leader()))?;
    Ok(stands.then(|| record.clone()))
}

/// Every rank: claims its place and finds its shard of the decided step. One that does not save
/// finds another rank's, and leaves it as it is.
fn join_attempt(place: &Place, record: &AttemptRecord, seen: &Seen<'_>) -> Result<Started> {
    check_same(place, record)?;
    let rank = Rank(place.config.rank);
    let find = || match record.parent {
        None => Ok(None),
        Some(parent) => find_shard(place, record, &parent.key(), seen).map(Some),
    };
    let claim = || attempt::claim(&*place.disk, &record.attempt, rank, &place.nonce);
    let restorable = if place.config.leads() {
        let found = find();
        if !found.as_ref().is_err_and(Error::is_not_found) {
            claim()?;
        }
        found?
    } else {
        claim()?;
        find()?
    };
    let stands = Stands::of(place, record)?;
    Ok(Started { record: record.clone(), restorable, elsewhere: Elsewhere::default(), stands })
}

/// Where what an attempt resumes from is sealed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stands {
    pub(crate) on_disk: bool,
    /// As far as it is known: a bucket that is away now is asked again when it is written to.
    pub(crate) in_bucket: bool,
    /// Every rank's shard is there: whoever sent the last one may have died before the seal.
    pub(crate) whole_in_bucket: bool,
}

impl Stands {
    pub(crate) fn of(place: &Place, record: &AttemptRecord) -> Result<Self> {
        let Some(key) = record.parent.map(|parent| parent.key()) else {
            return Ok(Self::default());
        };
        let bucket = place.bucket.as_ref().and_then(|bucket| Listing::of(&**bucket, &key).ok());
        let in_bucket = bucket.as_ref().is_some_and(|l| l.sealed);
        let is_whole = |l: &Listing| l.sealed || l.missing(&record.savers).is_empty();
        let on_disk = Listing::of(&*place.disk, &key)?.sealed;
        Ok(Self { on_disk, in_bucket, whole_in_bucket: bucket.as_ref().is_some_and(is_whole) })
    }
}

/// All ranks of an attempt say the same about it.
fn check_same(place: &Place, record: &AttemptRecord) -> Result<()> {
    let rank = Rank(place.config.rank);
    if record.savers != place.config.savers {
        return Err(Error::invalid(format!(
            "rank {} says that ranks {:?} save, {rank} says {:?}",
            place.config.leader(),
            record.savers,
            place.config.savers
        )));
    }
    if record.replicated == place.config.replicated.is_empty() {
        let (who, who_not) = match record.replicated {
            true => (Rank(place.config.leader()), rank),
            false => (rank, Rank(place.config.leader())),
        };
        return Err(Error::invalid(format!(
            "{who} declares replicated tensors, {who_not} does not: all ranks say the same"
        )));
    }
    Ok(())
}
