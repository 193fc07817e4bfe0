//! Which slot may be used again, and what its waiters are told.
//!
//! # Invariants
//!
//! - A slot is never taken from the newest complete checkpoint, nor from one that is on its way to
//!   disk, to other nodes or, where there is no disk, to the bucket, nor from one that the leader is about
//!   to choose.
//! - The newest step that other nodes hold stays here too until they hold a newer one: what they hold is
//!   one copy fewer each time that a node is lost. Where there are too few nodes, nothing is kept for them.
//! - No directory is asked with the cascade locked.

use super::{Cascade, Shard, Work, standing::Standing, to_peers::passed_over_for_peers, whom};
use crate::{
    agree::{InRam, Lane},
    error::{Error, Result},
    names::CheckpointKey,
    observe::locked,
    save::Level,
};

impl Cascade {
    /// Gives the slot that holds `key` up for the next snapshot, if it may be: the shard is then
    /// known here no more, and can be chosen for nothing.
    pub(crate) fn release(&self, key: &CheckpointKey) -> bool {
        let step = key.step.0;
        let (shard, newest, trouble, carries) = {
            let work = locked(&self.work);
            if self.is_needed(&work, key) {
                return false;
            }
            let Some(shard) = work.shards.get(&step).filter(|s| s.key == *key) else {
                return true; // Of an older attempt, and not what this one resumed from.
            };
            let newest = work.newest.as_ref().map_or(0, |k| k.step.0);
            if step >= newest {
                return false;
            }
            (shard.clone(), newest, work.trouble.is_some(), work.carry.is_some())
        };
        // With nothing locked: a directory that does not answer keeps this save waiting, and no look at
        // this rank.
        let complete = shard.complete || matches!(self.in_ram(key), Ok(Standing::Whole));
        // The leader may choose it at this moment.
        let may_go = !complete
            || ((!self.may_be_chosen(&locked(&self.work), step)
                || self.passed(step, trouble, carries))
                && (!self.may_be_sent(step) || self.is_passed_for_bucket(step)));
        let gone = {
            let mut work = locked(&self.work);
            if !may_go || self.is_needed(&work, key) {
                return false;
            }
            work.shards.remove(&step)
        };
        if let Some(shard) = gone {
            self.drop_shard(&shard, newest);
        }
        true
    }

    fn is_needed(&self, work: &Work, key: &CheckpointKey) -> bool {
        let on_its_way = work.carry.as_ref().is_some_and(|c| self.key_of(c.step) == *key);
        work.newest.as_ref() == Some(key)
            || on_its_way
            || self.is_kept_for_peers(work, key)
            || self.is_kept_for_bucket(key)
    }

    pub(super) fn may_be_chosen(&self, work: &Work, step: u64) -> bool {
        self.is_due(step) && work.chosen.is_none_or(|c| step > c) && !work.fenced
    }

    /// Whether all ranks know that a step which the leader may choose will not go to disk. While
    /// another step is on its way this rank may say so itself: the disk is slower than the saves.
    fn passed(&self, step: u64, trouble: bool, carries: bool) -> bool {
        let agreements = &self.parts.agreements;
        if trouble {
            let _ = agreements.pass_over(Lane::Disk, step);
            return true; // Nothing is kept for a disk that does not answer.
        }
        // What goes before its turn here the leader may never choose: it is asked for by this rank alone.
        let is_own_wish = !self.parts.config.leads() && !self.is_scheduled(step);
        let passed = match carries || is_own_wish {
            true => agreements.pass_over(Lane::Disk, step),
            false => agreements.was_passed_over(Lane::Disk, step),
        };
        passed.unwrap_or(false)
    }

    /// Tells the waiters of a shard that is dropped what will not come any more.
    pub(super) fn drop_shard(&self, shard: &Shard, newer: u64) {
        if !shard.complete {
            let who = match self.in_ram(&shard.key) {
                Ok(Standing::Whole) => None,
                Ok(Standing::GivenUp(why)) => Some(why),
                Ok(Standing::Missing(missing)) => {
                    Some(format!("{} did not save it", whom(&missing)))
                }
                Err(_) => Some("another rank did not save it".into()),
            };
            match who {
                None => shard.save.reach(Level::Ram, false),
                Some(why) => {
                    self.tell_incomplete(shard, format!("{why}, step {newer} is complete"))
                }
            }
        }
        self.pass_over(&shard.save, newer);
        shard.save.fail(Level::Peer, &passed_over_for_peers(shard.key.step.0, newer));
    }

    /// Gives up the oldest shard that other ranks never completed, so that its slot can be used.
    pub(crate) fn give_up_straggler(&self) -> Result<bool> {
        let found = {
            let work = locked(&self.work);
            let carried = work.carry.as_ref().map(|c| c.step);
            let open = |s: &&Shard| s.published && !s.complete && carried != Some(s.key.step.0);
            work.shards.values().find(open).cloned()
        };
        let Some(shard) = found else { return Ok(false) };
        let step = shard.key.step.0;
        let Standing::Missing(missing) = self.in_ram(&shard.key)? else { return Ok(false) };
        let why = format!("{} did not save it in time", whom(&missing));
        let said = self.parts.agreements.in_ram(step, InRam::GivenUp(why.clone()))?;
        if said != InRam::GivenUp(why.clone()) {
            return Ok(false); // Another rank has decided: so shall we, at the next turn.
        }
        self.fail_incomplete(&shard, why);
        Ok(true)
    }

    pub(super) fn fail_incomplete(&self, shard: &Shard, why: String) {
        // As it is now: a trainer that came back may wait for it by another handle.
        let removed = locked(&self.work).shards.remove(&shard.key.step.0);
        self.tell_incomplete(removed.as_ref().unwrap_or(shard), why);
        self.parts.signal.notify();
    }

    fn tell_incomplete(&self, shard: &Shard, why: String) {
        let error = Error::Skipped { step: shard.key.step, why };
        self.parts.observer.error("incomplete", Some(shard.key.step.0), error.to_string());
        shard.save.fail(Level::Ram, &error);
    }
}
