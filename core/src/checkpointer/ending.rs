//! How a handle ends: closed, taken over, dropped, or left behind in a fork's child.
//!
//! # Invariants
//!
//! - A handle ends after the copies that it has in hand: their guards go with it.

use std::{sync::atomic::Ordering, time::Duration};

use super::{Checkpointer, Inner};
use crate::{clock::Deadline, error::Result, observe::locked, owner::Closing, save::Save};

impl Checkpointer {
    /// One slice of closing: waits up to `timeout` for what is on its way. True: closed, everything
    /// that could reach disk is there or has failed. False: not yet, call again. `now`: do not wait
    /// for disk.
    ///
    /// # Errors
    /// A fork's child.
    pub fn close(&self, timeout: Duration, now: bool) -> Result<bool> {
        self.end(timeout, if now { Closing::Now } else { Closing::Done })
    }

    /// The same for a process that failed: an agent keeps what is in RAM for whoever is started in its place,
    /// and gives it back in time. Without an agent it goes back at once, as with [`close`](Self::close).
    ///
    /// # Errors
    /// A fork's child.
    pub fn close_failed(&self, timeout: Duration) -> Result<bool> {
        self.end(timeout, Closing::Failed)
    }

    fn end(&self, timeout: Duration, how: Closing) -> Result<bool> {
        let place = self.inner.desk();
        place.check_pid()?;
        let deadline = Deadline::after(&*place.clock, timeout);
        let going = self.inner.owner.going();
        self.inner.give_up_failed(u64::MAX);
        loop {
            let seen = place.signal.seen();
            let publishing = self.inner.publishing.load(Ordering::Acquire) > 0;
            if !publishing
                && (how == Closing::Now || going.as_ref().is_none_or(|going| !going.is_busy()))
            {
                break;
            }
            let Some(left) = deadline.left(&*place.clock) else { return Ok(false) };
            place.signal.wait(seen, left.min(Duration::from_millis(50)));
        }
        self.inner.shut(how);
        Ok(true)
    }
}

impl Inner {
    /// Waits until every save that goes on behind is published or has failed.
    pub(super) fn quiet(&self, wait: Duration) -> Result<()> {
        let desk = self.desk();
        let deadline = Deadline::after(&*desk.clock, wait);
        loop {
            let seen = desk.signal.seen();
            if self.publishing.load(Ordering::Acquire) == 0 {
                return Ok(());
            }
            let Some(left) = deadline.left(&*desk.clock) else {
                return Err(deadline.passed("the end of a copy of the state", ""));
            };
            desk.signal.wait(seen, left);
        }
    }

    /// Another handle of this process takes the rank over: nothing of this one runs on.
    pub(super) fn taken_over(&self) -> Result<()> {
        self.quiet(self.desk().config.slot_wait)?;
        self.owner.taken_over();
        self.shut(Closing::Now);
        Ok(())
    }

    /// Tells of the steps before `end` whose saves failed here and will not be tried again: the other
    /// ranks wait for them, with a slot in use.
    pub(super) fn give_up_failed(&self, end: u64) {
        let Some(going) = self.owner.going().filter(|_| self.desk().config.saves()) else { return };
        let untold = |(step, save): (&u64, &Save)| save.take_untold().then_some(*step);
        let failed: Vec<u64> = locked(&self.saves).range(..end).filter_map(untold).collect();
        if !failed.is_empty() {
            going.give_up(&failed);
        }
    }

    /// Ends the owner. Memory goes back only where the newest checkpoint is durable elsewhere.
    fn shut(&self, how: Closing) {
        self.give_up_failed(u64::MAX);
        self.owner.shut(how);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.desk().is_ours() {
            self.shut(Closing::Now);
            return;
        }
        // A fork's child has not the thread.
        if let Ok(mut copier) = self.copier.try_lock() {
            std::mem::forget(copier.take());
        }
    }
}
