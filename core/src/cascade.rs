//! From RAM to disk, behind the training: one step at a time, the same step on every rank.
//!
//! One thread a rank. It watches its rank's shards until all ranks have theirs in RAM; the leader
//! then records which step goes to disk next (the newest that is complete in RAM), every rank
//! writes its shard of that step and keeps its slot until the step is sealed or given up.
//!
//! It decides which slot may be used again. It does not own how bytes are written (`tier`), when a
//! checkpoint exists (`commit`) or what is deleted (`retain`).
//!
//! # Invariants
//!
//! - A slot is never taken from the newest complete checkpoint, nor from one that is on its way to
//!   disk, nor from one that the leader is about to choose.
//! - A step is carried by all ranks or given up by all; no rank drops it alone.
//! - A newer attempt's record ends this cascade: a late writer completes nothing.

mod to_disk;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use crate::{
    agree::Agreements,
    attempt::{self, AttemptRecord},
    clock::{Deadline, SharedClock},
    commit::Listing,
    config::Config,
    error::{Error, Result},
    manifest::Identity,
    names::{CheckpointKey, Rank},
    observe::{Observer, locked},
    save::{Level, Save},
    signal::Signal,
    snapshot::arena::SlotPayload,
    tier::{Payload, Tier},
};

/// How often a rank looks for what other ranks did, while it waits for them.
const POLL: Duration = Duration::from_millis(5);
/// How often it looks with nothing in flight.
const IDLE: Duration = Duration::from_millis(500);

/// One shard that this rank has in RAM.
#[derive(Clone, Debug)]
pub(crate) struct Shard {
    pub(crate) key: CheckpointKey,
    pub(crate) identity: Identity,
    pub(crate) payload: SlotPayload,
    pub(crate) manifest: Arc<Vec<u8>>,
    pub(crate) save: Save,
    /// All ranks have theirs in RAM.
    pub(crate) complete: bool,
}

#[derive(Debug)]
struct Carry {
    step: u64,
    deadline: Deadline,
    own_done: bool,
}

#[derive(Debug, Default)]
struct Work {
    shards: BTreeMap<u64, Shard>,
    /// The checkpoint that is complete in RAM and newest, of this attempt or what it resumed from.
    newest: Option<CheckpointKey>,
    carry: Option<Carry>,
    /// The newest step that was ever chosen for disk.
    chosen: Option<u64>,
    sealed: Option<u64>,
    joined: bool,
    /// A shard came since the last look for a newer attempt.
    unchecked: bool,
    fenced: bool,
    /// The disk tier did not answer at the last turn: nothing is kept for it.
    trouble: bool,
    stop: bool,
}

/// The parts that it works with.
pub(crate) struct Parts {
    pub(crate) config: Config,
    pub(crate) record: AttemptRecord,
    pub(crate) ram: Arc<dyn Tier>,
    pub(crate) disk: Arc<dyn Tier>,
    pub(crate) agreements: Agreements,
    pub(crate) observer: Observer,
    pub(crate) clock: SharedClock,
    pub(crate) signal: Arc<Signal>,
}

/// The way of one attempt's checkpoints to disk.
pub(crate) struct Cascade {
    parts: Parts,
    work: Mutex<Work>,
}

impl std::fmt::Debug for Cascade {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cascade").field("work", &*locked(&self.work)).finish_non_exhaustive()
    }
}

impl Cascade {
    /// `resumed`: this rank's slot still holds the shard it restored; it goes to disk if it is not
    /// there.
    pub(crate) fn new(parts: Parts, resumed: Option<Shard>) -> Arc<Self> {
        let mut work = Work { newest: parts.record.parent.map(|p| p.key()), ..Work::default() };
        if let Some(shard) = resumed {
            work.shards.insert(shard.key.step.0, shard);
        }
        Arc::new(Self { parts, work: Mutex::new(work) })
    }

    pub(crate) fn agreements(&self) -> &Agreements {
        &self.parts.agreements
    }

    /// A shard was published in RAM.
    pub(crate) fn push(&self, shard: Shard) {
        shard.save.reach(Level::Ram, true);
        let mut work = locked(&self.work);
        let step = shard.key.step.0;
        work.shards.insert(step, shard);
        work.unchecked = true;
        if self.parts.config.savers.len() == 1 {
            self.completed(&mut work, step);
        }
        drop(work);
        self.parts.signal.notify();
    }

    /// Whether the slot that holds `key` may be taken for the next snapshot.
    pub(crate) fn may_go(&self, key: &CheckpointKey) -> bool {
        let work = locked(&self.work);
        let on_its_way = work.carry.as_ref().is_some_and(|c| self.key_of(c.step) == *key);
        if work.newest.as_ref() == Some(key) || on_its_way {
            return false;
        }
        let Some(shard) = work.shards.get(&key.step.0).filter(|s| s.key == *key) else {
            return true; // Of an older attempt, and not what this one resumed from.
        };
        let newest = work.newest.as_ref().map_or(0, |k| k.step.0);
        let step = key.step.0;
        // The leader may choose it at this moment.
        let next = work.carry.is_none()
            && shard.complete
            && self.is_due(step)
            && work.chosen.is_none_or(|c| step > c)
            && !work.fenced
            && !work.trouble;
        step < newest && !next
    }

    /// Gives up the oldest shard that other ranks never completed, so that its slot can be used.
    pub(crate) fn give_up_straggler(&self) -> Result<bool> {
        let found = {
            let work = locked(&self.work);
            let carried = work.carry.as_ref().map(|c| c.step);
            let open = |s: &&Shard| !s.complete && carried != Some(s.key.step.0);
            work.shards.values().find(open).cloned()
        };
        let Some(shard) = found else { return Ok(false) };
        let missing = self.missing_in_ram(&shard.key)?;
        if missing.is_empty() {
            return Ok(false);
        }
        let error = Error::Skipped {
            step: shard.key.step,
            why: format!("{} never saved it", ranks(&missing)),
        };
        self.parts.observer.error("incomplete", Some(shard.key.step.0), error.to_string());
        shard.save.fail(Level::Ram, &error);
        let mut work = locked(&self.work);
        work.shards.remove(&shard.key.step.0);
        Ok(true)
    }

    fn is_due(&self, step: u64) -> bool {
        step.is_multiple_of(self.parts.config.disk_every) || self.is_parent(step)
    }

    fn is_parent(&self, step: u64) -> bool {
        self.parts.record.parent.is_some_and(|p| p.step == step)
    }

    fn missing_in_ram(&self, key: &CheckpointKey) -> Result<Vec<u32>> {
        Ok(Listing::of(&*self.parts.ram, key)?.missing(&self.parts.config.savers))
    }

    fn completed(&self, work: &mut Work, step: u64) {
        let Some(shard) = work.shards.get_mut(&step) else { return };
        shard.complete = true;
        shard.save.set_waiting_for(String::new());
        shard.save.reach(Level::Ram, false);
        let key = shard.key.clone();
        if work.newest.as_ref().is_none_or(|n| *n < key || !self.is_own(n)) {
            work.newest = Some(key);
        }
    }

    fn is_own(&self, key: &CheckpointKey) -> bool {
        key.attempt.is(&self.parts.record.attempt)
    }

    /// True until the newest step that can still reach disk has reached it or failed.
    pub(crate) fn is_busy(&self) -> bool {
        let work = locked(&self.work);
        if work.fenced {
            return false;
        }
        let waits = |s: &Shard| {
            !s.complete
                || (self.is_due(s.key.step.0) && work.chosen.is_none_or(|c| s.key.step.0 > c))
        };
        work.carry.is_some() || work.shards.values().any(waits)
    }

    pub(crate) fn stop(&self) {
        locked(&self.work).stop = true;
        self.parts.signal.notify();
    }

    pub(crate) fn is_fenced(&self) -> bool {
        locked(&self.work).fenced
    }

    /// The newest step that this rank knows to be sealed on disk.
    pub(crate) fn sealed(&self) -> Option<u64> {
        locked(&self.work).sealed
    }

    pub(crate) fn newest(&self) -> Option<CheckpointKey> {
        locked(&self.work).newest.clone()
    }

    /// The thread's whole life.
    pub(crate) fn run(&self) {
        let mut told: Option<String> = None;
        loop {
            let seen = self.parts.signal.seen();
            if locked(&self.work).stop {
                return;
            }
            let busy = match self.turn() {
                Ok(progress) => {
                    told = None;
                    if progress {
                        continue;
                    }
                    self.is_busy()
                }
                Err(e) => {
                    // The same trouble is told once, not at every turn.
                    let text = e.chain();
                    if told.as_deref() != Some(&text) {
                        self.parts.observer.error("disk_failed", None, text.clone());
                        told = Some(text);
                    }
                    false
                }
            };
            let polls = busy && self.parts.config.savers.len() > 1;
            let pause = if told.is_some() {
                IDLE
            } else if polls {
                POLL
            } else {
                IDLE
            };
            self.parts.signal.wait(seen, pause);
        }
    }

    /// One look at everything; true where something moved. A stage that fails does not keep the
    /// others from their turn.
    pub(crate) fn turn(&self) -> Result<bool> {
        if self.is_fenced() {
            return Ok(false);
        }
        let stages =
            [self.watch_ram(), self.join(), self.choose(), self.carry(), self.watch_disk()];
        let moved = stages.iter().any(|s| matches!(s, Ok(true)));
        let failed = stages.into_iter().find_map(Result::err);
        let before = std::mem::replace(&mut locked(&self.work).trouble, failed.is_some());
        if before != failed.is_some() {
            self.parts.signal.notify();
        }
        let Some(error) = failed else { return Ok(moved) };
        // Retries are behind us. Training waits for no disk that does not answer: the step is given
        // up here, for all ranks if that can be recorded, and its slot is free.
        let carried = locked(&self.work).carry.as_ref().map(|c| c.step);
        if let Some(step) = carried {
            let why = format!("{}: {}", Rank(self.parts.config.rank), error.chain());
            let _ = self.parts.agreements.give_up(step, &why);
            self.abandon(step, &why);
        }
        Err(error)
    }

    /// Looks for the other ranks' shards.
    fn watch_ram(&self) -> Result<bool> {
        if std::mem::take(&mut locked(&self.work).unchecked) {
            self.check_fence()?;
        }
        let open: Vec<Shard> =
            locked(&self.work).shards.values().filter(|s| !s.complete).cloned().collect();
        let mut moved = false;
        for shard in open {
            let missing = self.missing_in_ram(&shard.key)?;
            if missing.is_empty() || self.is_parent(shard.key.step.0) {
                self.completed(&mut locked(&self.work), shard.key.step.0);
                moved = true;
            } else {
                shard.save.set_waiting_for(ranks(&missing));
                // Whoever is missing may have gone on to a newer attempt.
                self.check_fence()?;
            }
        }
        if moved {
            self.parts.signal.notify();
        }
        Ok(moved)
    }

    /// The first complete checkpoint of this attempt is recorded: from then on it leads the
    /// lineage.
    fn join(&self) -> Result<bool> {
        let due = {
            let work = locked(&self.work);
            let own = work.shards.values().any(|s| s.complete && self.is_own(&s.key));
            own && !work.joined && self.parts.config.leads()
        };
        if due {
            attempt::join(&*self.parts.disk, &self.parts.record.attempt)?;
            locked(&self.work).joined = true;
        }
        Ok(due)
    }
}

/// `rank 3`, `ranks 3, 5 and 2 more`
pub(crate) fn ranks(list: &[u32]) -> String {
    let shown: Vec<String> = list.iter().take(4).map(ToString::to_string).collect();
    match list.len() {
        1 => format!("rank {}", list[0]),
        n if n <= 4 => format!("ranks {}", shown.join(", ")),
        n => format!("ranks {} and {} more", shown.join(", "), n - 4),
    }
}
