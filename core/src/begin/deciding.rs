//! How the leader decides what an attempt resumes from, and records it.
//!
//! # Invariants
//!
//! - Every tier and every live agent was asked, and what of the last attempt is not seen is waited for.
//! - A checkpoint that is not the newest is resumed from only by a rollback: else the newer ones would be in
//!   nobody's way and the first save would use their slots.
//! - A rollback to what a collector took at that moment abandons nothing: it is withdrawn.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::{Begin, Elsewhere, roster::Roster};
use crate::{
    attempt::{self, AttemptRecord, Attempts},
    clock::Deadline,
    commit::Listing,
    error::{Error, Hint, Result},
    names::{AttemptRef, CheckpointKey, Id, Rank, ranks},
    peers::{
        Peers,
        remote::{Remote, look_at_all},
    },
    place::Place,
    record,
    restore::{
        decide::{Decision, Wholes, Wish, answering, decide, decide_once, whole_before},
        survey::survey,
    },
    sys::host,
    tier::{Tier, TierKind},
};

/// A wait that takes longer is told.
const TELL_AFTER: Duration = Duration::from_secs(5);

/// How often agents that are alive and do not answer are asked again.
pub(super) const AGAIN: Duration = Duration::from_millis(250);

/// All that a decision looks at.
struct Around<'a> {
    place: &'a Place,
    remotes: Vec<Arc<Remote>>,
    bucket: Option<&'a dyn Tier>,
    /// What does not answer, where the caller goes on without it.
    silent: Vec<String>,
}

impl<'a> Around<'a> {
    fn look(place: &'a Place, wish: &Wish) -> Result<Self> {
        let mut silent = Vec::new();
        let remotes = elsewhere(place, wish, &mut silent)?;
        let bucket = answering_bucket(place, wish, &mut silent)?;
        Ok(Self { place, remotes, bucket, silent })
    }

    fn own(&self) -> [&dyn Tier; 2] {
        [&*self.place.disk, &*self.place.ram]
    }

    fn then_far<'b>(&'b self, near: [&'b dyn Tier; 2]) -> Vec<&'b dyn Tier> {
        let far = self.remotes.iter().map(|remote| &**remote as &dyn Tier);
        near.into_iter().chain(far).chain(self.bucket).collect()
    }

    fn nearest_first(&self) -> Vec<&dyn Tier> {
        self.then_far([&*self.place.ram, &*self.place.disk])
    }

    fn durable_first(&self) -> Vec<&dyn Tier> {
        self.then_far(self.own())
    }

    /// Where records are made. A bucket decides for all clusters that write there.
    fn deciding(&self) -> Vec<&dyn Tier> {
        self.bucket.into_iter().chain(self.own()).collect()
    }

    fn attempts(&self, wish: &Wish) -> Result<Attempts> {
        Attempts::load(&answering(&self.durable_first(), wish, &mut Vec::new())?)
    }
}

/// Rank 0: its own record of this decision, whose answer was lost with the agent that made it.
/// A tier that does not answer is met again, with its hint, by the decision that follows.
pub(super) fn own_record(place: &Place, decision: u32) -> Option<AttemptRecord> {
    let attempts = Attempts::load(&[&*place.disk]).ok()?;
    let newest = attempts.newest()?;
    let ours = newest.attempt.id == place.start && newest.decision == decision;
    let rank = Rank(place.config.rank);
    let claimed = attempt::is_claimed_by(&*place.disk, &newest.attempt, rank, &place.nonce);
    (ours && claimed.is_ok_and(|ours| ours)).then(|| newest.clone())
}

/// Rank 0: decides and records. Beside it what it saw of other nodes.
pub(super) fn record_decision(
    place: &Place,
    how: &Begin,
    decision: u32,
) -> Result<(AttemptRecord, Elsewhere)> {
    let mut around = Around::look(place, &how.wish)?;
    let silent = std::mem::take(&mut around.silent);
    let tiers = around.nearest_first();
    let attempts = around.attempts(&how.wish)?;
    keep_records(&attempts, &around.durable_first(), &around.own())?;
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
    let remotes = &around.remotes;
    let fallback = match decided.parent.filter(|_| !remotes.is_empty()) {
        Some(parent) => whole_before(&tiers, &attempts, &parent.key(), &mut wholes)?,
        None => None,
    };
    let places = match decided.parent.filter(|_| !how.fresh) {
        Some(parent) => places(place, remotes, &parent.key())?,
        None => BTreeMap::new(),
    };
    let seen = Elsewhere { fallback, holders: holders(remotes)?, places };
    let decided = if how.fresh { Decision { parent: None, ..decided } } else { decided };
    tell_world(place, &decided);
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
        withdraws: None,
        savers: place.config.savers.clone(),
        replicated: !place.config.replicated.is_empty(),
        host: host(),
        pid: std::process::id(),
        created_unix_ms: place.clock.unix_ms(),
        passed_over: decided.passed_over,
    };
    Ok((attempt::create(&around.deciding(), draft)?, seen))
}

/// Rank 0: withdraws the rollback `record`, which nobody has followed, since what it was to go back to is
/// gone. The record that says so leads no lineage, and resumes where the one before did: that stays pinned.
pub(super) fn withdraw(place: &Place, wish: &Wish, record: &AttemptRecord) -> Result<()> {
    let around = Around::look(place, wish)?;
    let attempts = around.attempts(wish)?;
    let before = attempts.records().iter().rev().find(|r| r.attempt.number < record.attempt.number);
    let number = record.attempt.number + 1;
    let draft = AttemptRecord {
        attempt: AttemptRef { number, ..record.attempt },
        parent: before.and_then(|before| before.parent),
        rollback: false,
        withdraws: Some(record.attempt.number),
        created_unix_ms: place.clock.unix_ms(),
        passed_over: vec![format!("what {} was to go back to: it is gone", record.attempt)],
        ..record.clone()
    };
    place.check_closed()?;
    // Where somebody else has that number, he has begun, and is not to be ended for this.
    let text = match attempt::create_once(&around.deciding(), &draft)? {
        true => "is withdrawn: what it was to go back to is gone, and nothing is abandoned",
        false => "could not be withdrawn: another start came after it",
    };
    let parent = record.parent.map(|parent| parent.step);
    place.observer.warn("withdrawn", parent, format!("the rollback of {} {text}", record.attempt));
    Ok(())
}

/// Rank 0: withdraws a rollback whose leader, on this host, died before it could do so.
pub(super) fn withdraw_dead(place: &Place, wish: &Wish) -> Result<()> {
    let Some(record) = Attempts::load(&[&*place.disk])?.newest().cloned() else { return Ok(()) };
    let Some(parent) = record.parent.filter(|_| record.rollback && record.host == host()) else {
        return Ok(());
    };
    // The leader of that attempt: this one may save from other ranks.
    let leader = record.savers.first().copied().unwrap_or(place.config.leader());
    if attempt::is_claimed(&*place.disk, &record.attempt, Rank(leader))? {
        return Ok(());
    }
    let tiers = [Some(&place.disk), Some(&place.ram), place.bucket.as_ref()];
    let is_deleted = |tier: &&Arc<dyn Tier>| {
        Listing::of(&***tier, &parent.key()).is_ok_and(|listing| listing.deleted)
    };
    if tiers.into_iter().flatten().any(|tier| is_deleted(&tier)) {
        withdraw(place, wish, &record)?;
    }
    Ok(())
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

/// Ranks that are others than those that saved it take from all of it what is cut, and what a rank has alone
/// from the nearest.
fn tell_world(place: &Place, decided: &Decision) {
    let Some(parent) = decided.parent.filter(|_| decided.savers != place.config.savers) else {
        return;
    };
    let (theirs, ours) = (&decided.savers, &place.config.savers);
    let text = format!(
        "{} was saved by {} ranks ({}), this job saves from {} ({}): tensors that are cut are put together \
         anew, and of what each rank has alone it takes the nearest rank's",
        parent.key(),
        theirs.len(),
        ranks(theirs),
        ours.len(),
        ranks(ours)
    );
    place.observer.warn("other_ranks", Some(parent.step), text);
}
