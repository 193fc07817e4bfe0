//! The cascade of a rank that does not save: it has no shard, carries nothing, and tells this rank's
//! waiters what became of the saving ranks' checkpoints.
//!
//! What it cannot see for itself any more (a slot is used again, retention has deleted a step) it
//! takes from the decisions that the saving ranks record. They are forgotten once a newer step is
//! sealed: who comes later than that is told that the step failed, though it may not have.
//!
//! # Invariants
//!
//! - A level that is told was seen, or recorded by a rank that saw it.
//! - Nothing is decided here, but that a step is in RAM, which whoever sees it may record.

use super::Cascade;
use crate::{
    agree::{InRam, Lane, Saving},
    commit::Listing,
    error::{Error, Result},
    names::{Step, ranks},
    observe::locked,
    save::{Level, Save},
};

/// Checkpoints that one rank can wait for at once.
const WATCHED_MAX: usize = 4096;

impl Cascade {
    /// This rank would have saved `save` by now: from here on it follows the others' checkpoint.
    pub(crate) fn follow(&self, save: &Save) {
        self.mark_due(save);
        save.reach(Level::Staged, false);
        let mut work = locked(&self.work);
        work.unchecked = true;
        work.watched.insert(save.step(), save.clone());
        let old = if work.watched.len() > WATCHED_MAX { work.watched.pop_first() } else { None };
        drop(work);
        if let Some((step, old)) = old {
            let why = format!("{WATCHED_MAX} newer ones are waited for");
            old.fail(Level::Ram, &Error::Skipped { step: Step(step), why });
        }
        self.parts.signal.notify();
    }

    /// One look at everything that is waited for; true where something moved.
    pub(super) fn watch(&self) -> Result<bool> {
        if std::mem::take(&mut locked(&self.work).unchecked) {
            self.check_fence()?;
        }
        let open: Vec<Save> =
            locked(&self.work).watched.values().filter(|s| s.is_open()).cloned().collect();
        if open.is_empty() {
            return Ok(false);
        }
        // Before any seal is looked for: the leader goes on only when it is done with a step.
        let carried = self.parts.agreements.chosen(Lane::Disk)?;
        let mut moved = false;
        for save in &open {
            moved |= self.watch_in_ram(save)?;
            if save.is_open() {
                moved |= self.watch_on_disk(save, carried)?;
            }
        }
        let mut work = locked(&self.work);
        let newest = work.watched.last_key_value().map(|(step, _)| *step);
        work.watched.retain(|step, save| {
            let stays = save.is_open() || Some(*step) == newest;
            if !stays && save.is_pending(Level::Disk) {
                self.pass_over(save, *step); // It is not due for disk.
            }
            stays
        });
        Ok(moved)
    }

    fn watch_in_ram(&self, save: &Save) -> Result<bool> {
        if !save.is_pending(Level::Ram) {
            return Ok(false);
        }
        let (step, agreements) = (save.step(), &self.parts.agreements);
        if agreements.was_saving(step)? == Some(Saving::Skip) {
            save.skip("a rank that saves had every slot in use");
            return Ok(true);
        }
        // Before the decision is looked for: whoever completes a newer step has decided this one.
        let newer = self.newest().filter(|newest| newest.step.0 > step);
        let key = self.key_of(step);
        let missing = self.missing_in_ram(&key)?;
        let said = match self.said_in_ram(&key, &missing)? {
            None if self.is_sealed(&key)? => Some(InRam::Whole),
            said => said,
        };
        let why = match (said, newer) {
            (Some(InRam::Whole), _) => {
                save.set_waiting_for(String::new());
                save.reach(Level::Ram, false);
                let mut work = locked(&self.work);
                if work.newest.as_ref().is_none_or(|n| *n < key || !self.is_own(n)) {
                    work.newest = Some(key);
                }
                return Ok(true);
            }
            (Some(InRam::GivenUp(why)), _) => why,
            (None, Some(newer)) => {
                format!("{} has no shard of it left, {} is complete", ranks(&missing), newer.step)
            }
            (None, None) => {
                save.set_waiting_for(ranks(&missing));
                // Whoever is missing may have gone on to a newer attempt.
                self.check_fence()?;
                return Ok(false);
            }
        };
        save.fail(Level::Ram, &Error::Skipped { step: Step(step), why });
        Ok(true)
    }

    fn watch_on_disk(&self, save: &Save, carried: Option<u64>) -> Result<bool> {
        let step = save.step();
        let key = self.key_of(step);
        if save.is_pending(Level::Ram) {
            return Ok(false);
        }
        if self.is_sealed(&key)? {
            save.set_waiting_for(String::new());
            save.reach(Level::Disk, false);
            let mut work = locked(&self.work);
            work.sealed = work.sealed.max(Some(step));
            return Ok(true);
        }
        if let Some(why) = self.parts.agreements.gave_up(step)? {
            let why = format!("it was given up for disk: {why}");
            save.fail(Level::Disk, &Error::Skipped { step: Step(step), why });
            return Ok(true);
        }
        if self.parts.agreements.was_passed_over(Lane::Disk, step)? {
            self.pass_over(save, self.newest().map_or(step, |newest| newest.step.0));
            return Ok(true);
        }
        match carried {
            Some(newer) if newer > step => {
                self.pass_over(save, newer);
                return Ok(true);
            }
            Some(same) if same == step => {
                let listing = Listing::of(&*self.parts.disk, &key)?;
                let missing = listing.missing(&self.parts.config.savers);
                if !missing.is_empty() {
                    save.set_waiting_for(ranks(&missing));
                }
            }
            _ => save.set_waiting_for(ranks(&self.parts.config.savers)),
        }
        self.check_fence()?;
        Ok(false)
    }
}
