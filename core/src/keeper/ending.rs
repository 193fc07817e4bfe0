//! How an owner ends: closed, taken over, dropped, or left behind in a fork's child.
//!
//! # Invariants
//!
//! - After `shut` no thread of the owner runs, but one that a hanging disk keeps.
//! - Memory goes back only where the newest checkpoint is durable elsewhere.
//! - An owner that hands over gives nothing up and tells nobody: the next one goes on with the attempt.

use std::{sync::atomic::Ordering, time::Duration};

use super::{Behind, Keeper, Running, TAKEN_OVER};
use crate::{
    clock::Deadline,
    error::{Error, Result},
    observe::locked,
    place::{Place, start_lock_path},
};

/// How long an owner that is closed or dropped waits for its disk thread.
const STOP_WAIT: Duration = Duration::from_secs(1);

/// How an owner ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Closed: memory goes back where the newest checkpoint is durable elsewhere.
    Clean,
    /// Its slots stay; what is on its way is given up.
    Now,
    /// Its slots stay, and the next owner of the same attempt goes on with what is on its way.
    HandOver,
}

impl Running {
    /// Ends the threads. They stop at their next block; a disk that hangs in a system call keeps one,
    /// which is left behind after `wait`.
    pub(super) fn stop(self, place: &Place, fenced: Option<&Error>, wait: Duration) -> Result<()> {
        self.cascade.stop(fenced);
        self.join(place, wait)
    }

    fn join(self, place: &Place, wait: Duration) -> Result<()> {
        let deadline = Deadline::after(&*place.clock, wait);
        loop {
            let seen = place.signal.seen();
            let over = |t: &Behind| t.over.load(Ordering::Acquire) || t.thread.is_finished();
            if self.threads.iter().all(over) {
                break;
            }
            let Some(left) = deadline.left(&*place.clock) else {
                let what = "the end of the threads that carry shards";
                return Err(deadline.passed(what, "the disk hangs, or another node"));
            };
            place.signal.wait(seen, left.min(Duration::from_millis(50)));
        }
        for behind in self.threads {
            if behind.thread.join().is_err() {
                return Err(Error::Bug("a thread that carries shards panicked".into()));
            }
        }
        Ok(())
    }
}

impl Keeper {
    /// Ends the threads.
    pub(crate) fn shut(&self, ending: Ending) {
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
            // What is in RAM is the newer handle's: it carries it on.
            let fenced = (!current).then(|| Error::Fenced { why: TAKEN_OVER.into() });
            match ending {
                Ending::HandOver => cascade.hand_over(),
                Ending::Clean | Ending::Now => cascade.stop(fenced.as_ref()),
            }
            let stopped = running.join(&self.place, STOP_WAIT);
            if let Err(e) = &stopped {
                self.place.observer.error("stop_failed", None, e.chain());
            }
            let durable = cascade.newest().is_some() && cascade.is_durable();
            if ending == Ending::Clean
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

impl Keeper {
    /// The start of the job that this rank led is over: nobody finds its record by its lock.
    pub(crate) fn end_start(&self) {
        if locked(&self.start_lock).take().is_some_and(|lock| lock.is_current()) {
            // A dead start's lock file is of no use; left behind it would be swept at the next.
            let path = start_lock_path(&self.place.config.home(), &self.place.start);
            let _ = crate::tier::publish::remove(&path);
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if self.place.is_ours() {
            self.shut(Ending::Now);
            self.end_start();
            return;
        }
        // A fork's child has neither the threads nor the locks, and its slots are not mapped
        // (MADV_DONTFORK): nothing of this may run or be unmapped here.
        std::mem::forget(self.place.arena.clone());
        if let Ok(mut running) = self.running.try_lock() {
            std::mem::forget(running.take());
        }
        if let Ok(mut preparing) = self.preparing.try_lock() {
            std::mem::forget(preparing.take());
        }
    }
}
