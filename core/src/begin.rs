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
//! - A decision that is asked for again because its answer was lost is the same decision.
//! - `fresh` and rollbacks are recorded as such: what they leave behind is abandoned at once.

pub(crate) mod brought;
mod deciding;
pub(crate) mod fetched;
pub(crate) mod found;
mod joined;
pub(crate) mod roster;

use std::{collections::BTreeMap, time::Duration};

use self::{
    deciding::{AGAIN, own_record, record_decision, withdraw, withdraw_dead},
    fetched::Seen,
    found::{find_shard, savers_of},
    joined::{Asking, join_elsewhere},
};
use crate::{
    attempt::{self, AttemptRecord, Attempts},
    clock::Deadline,
    commit::Listing,
    error::{Error, ErrorKind, Result},
    names::{AttemptDir, CheckpointKey, Rank},
    ownership::is_held,
    place::{Place, start_lock_path},
    restore::{decide::Wish, read::Restorable},
    sys::host,
    tier::TierKind,
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
        return lead(place, how, decision, &deadline);
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
                // collector between record and look: rank 0 will record another. By its kind: what
                // the leader's agent says comes from another node.
                Err(e) if e.kind() == ErrorKind::Fenced || e.is_not_found() => refused = Some(e),
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

/// Rank 0.
fn lead(place: &Place, how: &Begin, decision: u32, deadline: &Deadline) -> Result<Started> {
    withdraw_dead(place, &how.wish)?;
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
            Err(e) => {
                if e.is_not_found()
                    && record.rollback
                    && let Err(e) = withdraw(place, &how.wish, &record)
                {
                    let text = format!("the rollback of {}: {}", record.attempt, e.chain());
                    place.observer.error("not_withdrawn", None, text);
                }
                if !e.is_not_found() || deadline.left(&*place.clock).is_none() {
                    return Err(e);
                }
                tracing::warn!("{}; deciding again", e.chain());
                place.clock.pause(AGAIN);
            }
        }
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
    /// The ranks that save now did not save it: none of them has its shard to carry on. It stays where it is
    /// until a newer one is complete.
    pub(crate) is_others: bool,
}

impl Stands {
    pub(crate) fn of(place: &Place, record: &AttemptRecord) -> Result<Self> {
        let Some(key) = record.parent.map(|parent| parent.key()) else {
            return Ok(Self::default());
        };
        let bucket = place.bucket.as_ref().and_then(|bucket| Listing::of(&**bucket, &key).ok());
        let in_bucket = bucket.as_ref().is_some_and(|l| l.sealed);
        let savers = savers_of(place, &key)?;
        let is_whole = |l: &Listing| l.sealed || l.missing(&savers).is_empty();
        let on_disk = Listing::of(&*place.disk, &key)?.sealed;
        let whole_in_bucket = bucket.as_ref().is_some_and(is_whole);
        Ok(Self { on_disk, in_bucket, whole_in_bucket, is_others: savers != record.savers })
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
