//! An attempt that goes on under a new owner (`keeper::again`): where its ranks are, and what the trainer
//! still waits for.
//!
//! # Invariants
//!
//! - A level that is told was seen, or recorded by a rank that saw it.

use super::{
    Carry, Cascade,
    sending::Now,
    to_peers::{not_on_peers, passed_over_for_peers},
};
use crate::{
    agree::{InRam, Lane},
    clock::Deadline,
    error::{Error, Result},
    names::Step,
    observe::locked,
    restore::survey::survey,
    save::{Level, Save},
};

impl Cascade {
    /// A rank whose owner died goes on with the step that the ranks are at, and comes back to none that
    /// they are done with.
    pub(super) fn resume_carry(&self) -> Result<()> {
        if !self.parts.config.saves() {
            return Ok(()); // It carries nothing, and would wait for itself when it closes.
        }
        let agreements = &self.parts.agreements;
        self.resume_sending()?;
        let Some(step) = agreements.chosen(Lane::Disk)? else { return Ok(()) };
        let gave_up = agreements.gave_up(step)?.is_some();
        // What was resumed from may be whole on this node's disk alone: the leader waits for all to say so.
        let sealed = match agreements.is_spread() {
            true => agreements.was_sealed(step)?,
            false => self.is_sealed(&self.key_of(step))?,
        };
        let deadline = Deadline::after(&*self.parts.clock, self.parts.config.disk_wait);
        let mut work = locked(&self.work);
        work.chosen = Some(step);
        if sealed {
            work.sealed = Some(step);
        } else if !gave_up {
            work.carry = Some(Carry { step, deadline, own_done: false, told: false });
        }
        Ok(())
    }

    /// What the trainer still waits for, of an attempt that goes on under a new owner.
    ///
    /// The save is known to the threads first, and only then it is looked where its step is: they have been
    /// at work for a moment, and what they tell from here on reaches it.
    pub(crate) fn take_up(&self, save: &Save) -> Result<()> {
        let step = save.step();
        self.doubt_sent(step);
        self.mark_due(save);
        let (shard_is_complete, newer) = {
            let mut work = locked(&self.work);
            let carried = work.carry.as_ref().map(|carry| carry.step);
            let newer = work.chosen.filter(|chosen| *chosen > step && carried != Some(step));
            let known = work.shards.get_mut(&step).map(|shard| {
                shard.save = save.clone();
                shard.complete
            });
            (known, newer)
        };
        let sealed = self.is_sealed(&self.key_of(step))?;
        if sealed {
            save.reach(Level::Ram, false);
            save.reach(Level::Disk, false);
        } else if let Some(why) = self.gave_up(step)? {
            let why = format!("it was given up for disk: {why}");
            save.fail(Level::Disk, &Error::Skipped { step: Step(step), why });
        }
        self.take_up_copies(save, shard_is_complete.is_some())?;
        if let Some(complete) = shard_is_complete {
            save.reach(Level::Ram, !complete);
            if let Some(InRam::GivenUp(why)) = self.parts.agreements.was_in_ram(step)? {
                save.fail(Level::Ram, &Error::Skipped { step: Step(step), why });
            }
            if let Some(newer) = newer {
                self.pass_over(save, newer); // Unless it is there: what is reached stays so.
            }
            self.parts.signal.notify();
            return Ok(());
        }
        if sealed {
            return Ok(());
        }
        // Its slot was used again, for which it had to be complete, or given up.
        match self.parts.agreements.was_in_ram(step)? {
            Some(InRam::GivenUp(why)) => {
                save.fail(Level::Ram, &Error::Skipped { step: Step(step), why });
            }
            said => {
                if said.is_some() || self.parts.config.savers.len() == 1 {
                    save.reach(Level::Ram, false);
                }
                // What of it is in the bucket, the bucket is asked.
                save.fail_but_in_bucket(&its_slot_is_gone(step));
            }
        }
        Ok(())
    }

    /// Why it was given up for disk, by all ranks or, where that could not be recorded, by this one.
    fn gave_up(&self, step: u64) -> Result<Option<String>> {
        let said = self.parts.agreements.gave_up(step)?;
        let here = locked(&self.work).given_up.contains(&step);
        Ok(said.or_else(|| here.then(|| "the disk did not answer".into())))
    }

    /// The same for copies on other nodes: who waits is told what was recorded, or that nothing will be.
    fn take_up_copies(&self, save: &Save, has_shard: bool) -> Result<()> {
        let step = save.step();
        if !save.is_due_for_peers() || !save.is_pending(Level::Peer) {
            return Ok(());
        }
        let (whole, newer) = {
            let copies = &locked(&self.work).copies;
            if copies.now.as_ref().is_some_and(|now| now.step == step) && has_shard {
                return Ok(()); // On its way: it will be told.
            }
            let whole = copies.whole.as_ref().is_some_and(|key| *key == self.key_of(step));
            (whole, copies.chosen.filter(|chosen| *chosen > step))
        };
        match self.parts.agreements.was_on_peers(step)? {
            Some(InRam::GivenUp(why)) => save.fail(Level::Peer, &not_on_peers(step, &why)),
            Some(InRam::Whole) => save.reach(Level::Peer, false),
            None if whole => save.reach(Level::Peer, false),
            None => {
                if let Some(newer) = newer {
                    save.fail(Level::Peer, &passed_over_for_peers(step, newer));
                } else if !has_shard {
                    save.fail(Level::Peer, &its_slot_is_gone(step));
                }
            }
        }
        Ok(())
    }

    /// Goes on where an owner before this one was, of the same attempt.
    fn resume_sending(&self) -> Result<()> {
        let Some(far) = &self.parts.far else { return Ok(()) };
        let agreements = &self.parts.agreements;
        let sent = agreements.chosen(Lane::Bucket)?;
        let open = match sent {
            Some(step) => agreements.was_in_bucket(step)?.is_none(),
            None => false,
        };
        let found = survey(&[&*self.parts.disk])?.into_iter();
        let sealed = found.filter(|f| self.is_own(&f.key) && f.listings.iter().any(|l| l.sealed));
        let due = sealed.map(|f| f.key.step.0).filter(|step| self.is_due_for_bucket(far, *step));
        let mut sending = locked(&self.sending);
        sending.next = due.max().max(sending.next);
        sending.chosen = sent;
        let deadline = Deadline::after(&*self.parts.clock, far.settings.wait);
        let now = |step| Now::new(step, deadline, self.parts.config.saves());
        sending.now = sent.filter(|_| open).map(now);
        Ok(())
    }

    /// A save of an owner before this one, whose way to the bucket is not known.
    fn doubt_sent(&self, step: u64) {
        if self.parts.far.is_some() {
            locked(&self.sending).doubtful.insert(step);
        }
    }
}

fn its_slot_is_gone(step: u64) -> Error {
    let why = "its agent went away, and a newer step has its slot".into();
    Error::Skipped { step: Step(step), why }
}
