//! What others ask of a cascade: how far it is, and to end.

use std::{collections::BTreeSet, time::Duration};

use super::{Cascade, Shard, Work};
use crate::{
    error::Error,
    names::{AttemptRef, CheckpointKey, Step},
    observe::locked,
    peers::send::PeerReceipt,
    save::{Level, Save},
};

/// The newest failed steps that are told to the others.
const FAILED_KEPT: usize = 256;

/// How far a rank is on its way to the bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToBucket {
    /// The newest step that this owner saw sealed there, all ranks' shards.
    pub sealed: Option<u64>,
    /// The step that is on its way there.
    pub sending: Option<u64>,
    /// The newest step that is to go next.
    pub next: Option<u64>,
    /// Why the bucket does not take what is sent, where that is so.
    pub trouble: Option<String>,
    /// For how long it has not.
    pub trouble_for: Option<Duration>,
}

impl Cascade {
    /// True until the newest step that can still reach disk has reached it or failed.
    pub(crate) fn is_busy(&self) -> bool {
        let work = locked(&self.work);
        if work.fenced {
            return false;
        }
        let waits = |s: &Shard| {
            let for_peers = s.save.is_due_for_peers() && s.save.is_pending(Level::Peer);
            !s.complete || for_peers || self.may_be_chosen(&work, s.key.step.0)
        };
        work.carry.is_some()
            || self.is_sending()
            || work.copies.now.is_some()
            || work.shards.values().any(waits)
            || work.watched.values().any(Save::is_open)
    }

    /// The trainer has read what it resumes from, or will not.
    pub(crate) fn was_read(&self) {
        if locked(&self.work).read_until.take().is_some() {
            self.parts.signal.notify();
        }
    }

    pub(super) fn is_being_read(&self, work: &Work) -> bool {
        let until = work.read_until.as_ref();
        until.is_some_and(|until| until.left(&*self.parts.clock).is_some())
    }

    /// Ends the thread at its next block: another owner goes on with the same attempt, so nothing is
    /// given up and nobody is told anything.
    pub(crate) fn hand_over(&self) {
        let mut work = locked(&self.work);
        work.stop = true;
        work.handed_over = true;
        drop(work);
        self.parts.signal.notify();
    }

    /// Ends the thread at its next block, and tells everybody who still waits. `fenced`: by whom this
    /// rank was taken over.
    pub(crate) fn stop(&self, fenced: Option<&Error>) {
        let mut work = locked(&self.work);
        work.stop = true;
        for save in work.saves() {
            let why = "the Checkpointer was closed before".into();
            let closed = Error::Skipped { step: Step(save.step()), why };
            save.fail(Level::Ram, fenced.unwrap_or(&closed));
        }
        drop(work);
        self.end_sending(fenced);
        self.parts.signal.notify();
    }

    pub(crate) fn is_fenced_by_us(&self) -> bool {
        locked(&self.work).fenced_by_us
    }

    pub(crate) fn is_fenced(&self) -> bool {
        locked(&self.work).fenced
    }

    /// The newest step that this rank knows to be sealed on disk.
    pub(crate) fn sealed(&self) -> Option<u64> {
        locked(&self.work).sealed
    }

    /// The newest step of which all ranks have their copies on other nodes.
    pub(crate) fn on_peers(&self) -> Option<u64> {
        locked(&self.work).copies.whole.as_ref().map(|key| key.step.0)
    }

    /// How many copies this rank's shard is to have on other nodes, and how many nodes that are `alive` have
    /// the last one that was sent.
    pub(crate) fn copies(&self, alive: &BTreeSet<String>) -> (usize, usize) {
        let there = |receipt: &&PeerReceipt| alive.contains(&receipt.node);
        let there = locked(&self.work).copies.receipts.iter().filter(there).count();
        (self.parts.replicas, there)
    }

    /// True where what is newest in RAM is sealed on disk, or in the bucket where there is no disk; or
    /// nothing is there.
    pub(crate) fn is_durable(&self) -> bool {
        if !self.parts.config.saves() {
            return true;
        }
        let work = locked(&self.work);
        if !work.judged {
            return false; // Found in RAM, perhaps, and not looked at.
        }
        match &work.newest {
            Some(key) if self.is_bucket_only() => self.in_bucket() == Some(key.step.0),
            Some(key) => {
                work.sealed == Some(key.step.0)
                    || (self.is_parent(key.step.0) && !work.parent_waits)
            }
            None => true,
        }
    }

    /// True while something is on its way to disk, or is about to be, whoever still trains.
    pub(crate) fn is_carrying(&self) -> bool {
        let work = locked(&self.work);
        let chosen = |s: &Shard| s.complete && self.may_be_chosen(&work, s.key.step.0);
        !work.fenced && (work.carry.is_some() || work.shards.values().any(chosen))
    }

    /// The step that is on its way to disk.
    pub(crate) fn carrying(&self) -> Option<u64> {
        locked(&self.work).carry.as_ref().map(|carry| carry.step)
    }

    /// Why the disk tier does not answer, where it does not.
    pub(crate) fn trouble(&self) -> Option<String> {
        locked(&self.work).trouble.clone()
    }

    /// How far it is on its way to the bucket; nothing, where there is none.
    pub(crate) fn to_bucket(&self) -> ToBucket {
        locked(&self.sending).view(self.parts.clock.monotonic())
    }

    /// The attempt that it carries.
    pub(crate) fn attempt(&self) -> AttemptRef {
        self.parts.record.attempt
    }

    /// Steps whose saves failed here and are not tried again: the other ranks need not wait.
    pub(crate) fn give_up_steps(&self, failed: &[u64]) {
        let mut work = locked(&self.work);
        failed.iter().for_each(|step| {
            work.failed.entry(*step).or_default();
        });
        while work.failed.len() > FAILED_KEPT {
            work.failed.pop_first();
        }
        drop(work);
        self.parts.signal.notify();
    }

    pub(crate) fn newest(&self) -> Option<CheckpointKey> {
        locked(&self.work).newest.clone()
    }
}
