//! How a handle ends: closed, taken over, dropped, or left behind in a fork's child.
//!
//! # Invariants
//!
//! - After `shut` no thread of the handle runs, but one that a hanging disk keeps.
//! - Memory goes back only where the newest checkpoint is durable elsewhere.

use std::{sync::atomic::Ordering, time::Duration};

use super::{Checkpointer, Inner, Running};
use crate::{
    clock::Deadline,
    error::{Error, Result},
    observe::locked,
    place::{Place, start_lock_path},
    save::Save,
};

/// Why an older handle of this process does nothing more.
pub(super) const TAKEN_OVER: &str = "a newer Checkpointer of this process has taken over this run";

/// How long a handle that is closed or dropped waits for its disk thread.
const STOP_WAIT: Duration = Duration::from_secs(1);

impl Running {
    /// Ends the disk tier's thread. It stops at its next block; a disk that hangs in a system call
    /// keeps it, and is left behind after `wait`.
    pub(super) fn stop(
        self,
        place: &Place,
        failed: Vec<u64>,
        fenced: Option<&Error>,
        wait: Duration,
    ) -> Result<()> {
        self.cascade.stop(failed, fenced);
        let deadline = Deadline::after(&*place.clock, wait);
        loop {
            let seen = place.signal.seen();
            if self.over.load(Ordering::Acquire) || self.thread.is_finished() {
                break;
            }
            let Some(left) = deadline.left(&*place.clock) else {
                return Err(deadline.passed("the end of the disk tier's thread", "the disk hangs"));
            };
            place.signal.wait(seen, left.min(Duration::from_millis(50)));
        }
        if self.thread.join().is_err() {
            return Err(Error::Bug("the disk tier's thread panicked".into()));
        }
        Ok(())
    }
}

impl Checkpointer {
    /// One slice of closing: waits up to `timeout` for what is on its way. True: closed, everything
    /// that could reach disk is there or has failed. False: not yet, call again. `now`: do not wait
    /// for disk.
    ///
    /// # Errors
    /// A fork's child.
    pub fn close(&self, timeout: Duration, now: bool) -> Result<bool> {
        self.inner.check_pid()?;
        let place = &self.inner.place;
        let deadline = Deadline::after(&*place.clock, timeout);
        let cascade = locked(&self.inner.running).as_ref().map(|r| r.cascade.clone());
        loop {
            let seen = place.signal.seen();
            let publishing = self.inner.publishing.load(Ordering::Acquire) > 0;
            if !publishing && (now || cascade.as_ref().is_none_or(|c| !c.is_busy())) {
                break;
            }
            let Some(left) = deadline.left(&*place.clock) else { return Ok(false) };
            place.signal.wait(seen, left.min(Duration::from_millis(50)));
        }
        self.inner.shut(!now);
        Ok(true)
    }
}

impl Inner {
    /// Waits until every save that goes on behind is published or has failed.
    pub(super) fn quiet(&self, wait: Duration) -> Result<()> {
        let deadline = Deadline::after(&*self.place.clock, wait);
        loop {
            let seen = self.place.signal.seen();
            if self.publishing.load(Ordering::Acquire) == 0 {
                return Ok(());
            }
            let Some(left) = deadline.left(&*self.place.clock) else {
                return Err(deadline.passed("the end of a copy of the state", ""));
            };
            self.place.signal.wait(seen, left);
        }
    }

    /// Another handle of this process takes the rank over: nothing of this one runs on.
    pub(super) fn taken_over(&self) -> Result<()> {
        self.quiet(self.place.config.slot_wait)?;
        self.shut(false);
        Ok(())
    }

    /// Steps of saves that failed here.
    pub(super) fn failed_steps(&self) -> Vec<u64> {
        locked(&self.saves).values().filter(|s| s.is_void()).map(Save::step).collect()
    }

    /// Ends the threads and gives the locks up. Memory goes back only where the newest checkpoint
    /// is durable elsewhere.
    fn shut(&self, clean: bool) {
        if self.place.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        self.place.arena.close();
        let preparing = locked(&self.preparing).take();
        if preparing.is_some_and(|thread| thread.join().is_err()) {
            self.place.observer.error(
                "stop_failed",
                None,
                "the thread that prepares slots panicked",
            );
        }
        let running = locked(&self.running).take();
        if let Some(running) = running {
            let cascade = running.cascade.clone();
            let current = self.ownership.is_current();
            let failed = if current { self.failed_steps() } else { Vec::new() };
            // What is in RAM is the newer handle's: it carries it on.
            let fenced = (!current).then(|| Error::Fenced { why: TAKEN_OVER.into() });
            let stopped = running.stop(&self.place, failed, fenced.as_ref(), STOP_WAIT);
            if let Err(e) = &stopped {
                self.place.observer.error("stop_failed", None, e.chain());
            }
            let durable = cascade.newest().is_some_and(|k| cascade.sealed() == Some(k.step.0));
            if clean
                && durable
                && current
                && stopped.is_ok()
                && let Err(e) = self.place.arena.give_back()
            {
                let text = format!("memory was not given back: {}", e.chain());
                self.place.observer.warn("give_back_failed", None, text);
            }
        }
        self.place.observer.close();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.pid == std::process::id() {
            self.shut(false);
            if self.start_lock.take().is_some_and(|lock| lock.is_current()) {
                // A dead start's lock file is of no use; left behind it would be swept at the next.
                let path = start_lock_path(&self.place.config.destination, &self.place.start);
                let _ = crate::tier::publish::remove(&path);
            }
            return;
        }
        // A fork's child has neither the threads nor the locks, and its slots are not mapped
        // (MADV_DONTFORK): nothing of this may run or be unmapped here.
        std::mem::forget(self.place.arena.clone());
        if let Ok(mut copier) = self.copier.try_lock() {
            std::mem::forget(copier.take());
        }
        if let Ok(mut running) = self.running.try_lock() {
            std::mem::forget(running.take());
        }
        if let Ok(mut preparing) = self.preparing.try_lock() {
            std::mem::forget(preparing.take());
        }
    }
}
