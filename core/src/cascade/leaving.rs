//! What goes before its turn: a host is to go away, or nobody will save anything newer.
//!
//! # Invariants
//!
//! - The newest step first; nothing older goes for its own sake.
//! - A host that stays after all has its schedules back.
//! - What goes before its turn takes a fifth of the time at most, but for the first step.

use std::{sync::atomic::Ordering, time::Duration};

use super::{AGAIN_PAUSE, Cascade};
use crate::observe::locked;

/// After a step that went before its turn the next one waits so many times as long as that took.
const PAUSE: u32 = 4;

/// How far the steps are that go before their turn, because a node is to go away.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// The last such step, and since when it is to go.
    hurried: Option<(u64, Duration)>,
    /// No other one before.
    not_before: Duration,
}

impl Cascade {
    /// What is newest in RAM goes to disk, whatever the schedule says: this host goes away, or nobody
    /// will save anything newer. Where it was given up for disk before, it is tried again, now and then
    /// for as long as this is asked.
    pub(crate) fn hurry(&self) {
        let Some(newest) = self.newest() else { return };
        let step = newest.step.0;
        let now = self.parts.clock.monotonic();
        let mut work = locked(&self.work);
        let before = self.hurried.swap(step, Ordering::AcqRel);
        work.read_until = None;
        work.shards.get(&step).iter().for_each(|shard| self.mark_due(&shard.save));
        let given_up = work.carry.is_none() && work.given_up.contains(&step);
        let again = given_up && work.again.is_none() && now >= work.again_after;
        if again {
            work.again = Some(step);
            work.again_pause = (2 * work.again_pause).clamp(AGAIN_PAUSE, 60 * AGAIN_PAUSE);
            work.again_after = now + work.again_pause;
        }
        drop(work);
        if again || before != step {
            if self.is_bucket_only() {
                self.offer_to_bucket(step);
            }
            self.parts.signal.notify();
        }
    }

    /// A node that has a rank of this run is to go away, or stays after all. While it is to go, what is
    /// newest goes to disk and from there to the bucket, whatever the schedules say: the node's own disk
    /// goes with it.
    ///
    /// The leader chooses for all ranks, so it is told whoever's node it is. The first step goes at once;
    /// those after it pause, for the cordon of one node may last for days and is not to slow all the others
    /// down.
    pub(crate) fn leave(&self, leaving: bool) {
        let before = self.leaving.swap(leaving, Ordering::AcqRel);
        if !leaving {
            if before {
                *locked(&self.pace) = Pace::default();
                self.hurried.store(u64::MAX, Ordering::Release);
                self.parts.signal.notify();
            }
            return;
        }
        // What is on disk already was not due for the bucket when it came.
        if !before && let Some(step) = self.sealed() {
            self.offer_to_bucket(step);
        }
        let now = self.parts.clock.monotonic();
        let (there, busy) = match self.is_bucket_only() {
            true => (self.in_bucket(), self.is_sending()),
            false => (self.sealed(), self.carrying().is_some()),
        };
        let Some(newest) = self.newest().map(|key| key.step.0) else { return };
        let mut pace = locked(&self.pace);
        if let Some((_, since)) = pace.hurried.filter(|(step, _)| there >= Some(*step)) {
            (pace.hurried, pace.not_before) = (None, now + PAUSE * now.saturating_sub(since));
        }
        if now < pace.not_before || busy || there >= Some(newest) {
            return;
        }
        if pace.hurried.is_none_or(|(step, _)| step != newest) {
            pace.hurried = Some((newest, now));
        }
        drop(pace);
        self.hurry();
    }

    pub(super) fn leaves(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }

    pub(super) fn is_hurried(&self, step: u64) -> bool {
        step == self.hurried.load(Ordering::Acquire)
    }
}
