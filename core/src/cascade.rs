//! From RAM to disk and to other nodes, behind the training: one step at a time, the same step on every
//! rank.
//!
//! One thread a rank; others carry to other nodes (`to_peers`), and from disk to the bucket (`to_object`).
//! It watches its rank's shards until all ranks have theirs in RAM; the leader then records which step goes
//! to disk next (the newest that is complete in RAM), every rank writes its shard of that step and keeps its
//! slot until the step is sealed or given up.
//!
//! A rank that does not save has a cascade too: one that carries nothing and watches (`watching`).
//!
//! It decides which slot may be used again (`release`). It does not own how bytes are written (`tier`),
//! when a checkpoint exists (`commit`) or what is deleted (`retain`).
//!
//! # Invariants
//!
//! - A step is carried by all ranks or given up by all; no rank drops it alone: a rank that wants the
//!   slot of a step that the leader may choose says so first, and the first word counts.
//! - A step that was complete in RAM is told as such on every rank, also on one that looks late.
//! - A newer attempt's record ends this cascade: a late writer completes nothing.

mod again;
pub(crate) mod asked;
mod below;
mod in_bucket;
mod leaving;
mod needed;
mod release;
mod scrub;
mod sending;
mod standing;
pub(crate) mod strangers;
mod to_disk;
pub(crate) mod to_object;
mod to_peers;
mod watching;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use self::{sending::Sending, standing::Standing, to_object::Far, to_peers::Copies};
use crate::{
    agree::{Agreements, InRam, Own},
    attempt::{self, AttemptRecord},
    clock::{Deadline, SharedClock},
    config::Config,
    error::{Error, Result},
    manifest::Identity,
    names::{CheckpointKey, Rank, Step, ranks},
    observe::{Observer, locked},
    peers::Peers,
    save::{Level, Save},
    signal::Signal,
    snapshot::slot::SlotPayload,
    tier::Tier,
};

/// How often a rank looks for what other ranks did, while it waits for them.
const POLL: Duration = Duration::from_millis(5);
/// The same where ranks are spread: what others do is told, so only deadlines are looked for.
const POLL_TOLD: Duration = Duration::from_millis(100);
/// Between two tries of a step that a disk refused, at first; then twice as long each time.
const AGAIN_PAUSE: Duration = Duration::from_secs(1);
/// A restore has the memory's and the disk's bandwidth to itself for so long: what it reads is in RAM
/// here, and where it came from.
const READ_WITHIN: Duration = Duration::from_secs(60);
/// How often it looks with nothing in flight.
const IDLE: Duration = Duration::from_secs(1);

/// One shard that this rank has in RAM.
#[derive(Clone, Debug)]
pub(crate) struct Shard {
    pub(crate) key: CheckpointKey,
    pub(crate) identity: Identity,
    pub(crate) payload: SlotPayload,
    pub(crate) manifest: Arc<Vec<u8>>,
    pub(crate) save: Save,
    /// Its manifest is in RAM.
    pub(crate) published: bool,
    /// All ranks have theirs in RAM.
    pub(crate) complete: bool,
    /// The leader was told that it is in RAM, where the ranks are spread.
    pub(crate) told: bool,
    /// Of a copy that this process did not take: checked before it goes anywhere.
    pub(crate) chunks: Option<Vec<u32>>,
}

#[derive(Debug)]
struct Carry {
    step: u64,
    deadline: Deadline,
    own_done: bool,
    /// The leader was told so, where the ranks are spread.
    told: bool,
}

#[derive(Debug, Default)]
struct Work {
    shards: BTreeMap<u64, Shard>,
    /// On a rank that does not save: the saving ranks' checkpoints that it was called for.
    watched: BTreeMap<u64, Save>,
    /// The checkpoint that is complete in RAM and newest, of this attempt or what it resumed from.
    newest: Option<CheckpointKey>,
    carry: Option<Carry>,
    /// What is on its way to other nodes, and what is there.
    copies: Copies,
    /// The newest step that was ever chosen for disk.
    chosen: Option<u64>,
    sealed: Option<u64>,
    joined: bool,
    /// While this rank's trainer reads what it resumes from, which waits here meanwhile: until then at most.
    read_until: Option<Deadline>,
    /// What this attempt resumed from is not sealed on disk: the leader lets it go there first.
    parent_waits: bool,
    /// Steps of this attempt that were given up for disk: what lies there of them is rubbish.
    given_up: BTreeSet<u64>,
    /// Every shard that was found was looked at once: what is newest is known.
    judged: bool,
    /// A step that was given up for disk and is to be tried again, when that is next allowed, and the
    /// pause after that.
    again: Option<u64>,
    again_after: Duration,
    again_pause: Duration,
    /// A shard came since the last look for a newer attempt.
    unchecked: bool,
    fenced: bool,
    /// The newer attempt is this process start's own: a rollback that another rank was quicker with.
    fenced_by_us: bool,
    /// The disk tier did not answer at the last turn: nothing is kept for it.
    trouble: Option<String>,
    stop: bool,
    /// Stopped for the next owner of the same attempt: what fails here now is not given up.
    handed_over: bool,
    /// Steps whose saves failed here and are not tried again: the other ranks need not wait for them.
    /// True: they know.
    failed: BTreeMap<u64, bool>,
}

impl Work {
    /// Everything that somebody may wait for.
    fn saves(&self) -> impl Iterator<Item = &Save> {
        self.shards.values().map(|shard| &shard.save).chain(self.watched.values())
    }
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
    /// The bucket behind the disk, and what of it the attempt resumed from is to go there first.
    pub(crate) far: Option<Far>,
    pub(crate) first_for_bucket: Option<u64>,
    /// The step that the attempt resumed from, where the bucket has it.
    pub(crate) in_bucket: Option<u64>,
    /// The other agents, and how many of them are to have each shard.
    pub(crate) peers: Option<Peers>,
    pub(crate) replicas: usize,
    /// The newest whole checkpoint before the one that the attempt resumed from: it stays until that one
    /// is on other nodes again.
    pub(crate) fallback: Option<CheckpointKey>,
    /// Nodes that hold something of this rank.
    pub(crate) holders: Vec<String>,
    /// This is the trainer's own process.
    pub(crate) is_embedded: bool,
}

/// The way of one attempt's checkpoints to disk.
pub(crate) struct Cascade {
    parts: Parts,
    work: Mutex<Work>,
    /// Locked for moments, also while `work` is; never the other way round.
    sending: Mutex<Sending>,
    /// The job stops after this step; `u64::MAX` while nobody has asked.
    last: AtomicU64,
    /// This step goes to disk though its turn would not come; `u64::MAX`: none.
    hurried: AtomicU64,
    /// A node of this run is to go away.
    leaving: AtomicBool,
    /// What goes before its turn then. Nothing else is locked after it.
    pace: Mutex<leaving::Pace>,
}

impl std::fmt::Debug for Cascade {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cascade").field("work", &*locked(&self.work)).finish_non_exhaustive()
    }
}

impl Cascade {
    /// `parent_waits`: what this attempt resumed from is not sealed on disk; `found`: shards that
    /// this rank's slots hold of it, and of this attempt where it goes on under a new owner; `is_read`:
    /// a trainer is about to read it.
    ///
    /// # Errors
    /// The directory of the decisions did not answer.
    pub(crate) fn new(
        parts: Parts,
        parent_waits: bool,
        found: Vec<Shard>,
        is_read: bool,
    ) -> Result<Arc<Self>> {
        let newest = parts.record.parent.map(|p| p.key());
        let shards = found.into_iter().map(|shard| (shard.key.step.0, shard)).collect();
        let copies = Copies::known(&parts.holders);
        let read_until = is_read.then(|| Deadline::after(&*parts.clock, READ_WITHIN));
        let unchecked = true;
        let work =
            Work { copies, newest, parent_waits, read_until, shards, unchecked, ..Work::default() };
        let (last, hurried) = (AtomicU64::new(u64::MAX), AtomicU64::new(u64::MAX));
        let sending = Mutex::new(Sending::beginning_with(parts.first_for_bucket, parts.in_bucket));
        let (work, leaving) = (Mutex::new(work), AtomicBool::new(false));
        let pace = Mutex::default();
        let cascade = Arc::new(Self { parts, work, sending, last, hurried, leaving, pace });
        cascade.resume_carry()?;
        Ok(cascade)
    }

    pub(crate) fn agreements(&self) -> &Agreements {
        &self.parts.agreements
    }

    /// The job stops after `step`, by a decision that all ranks know or will: that step and what may
    /// follow goes to disk.
    pub(crate) fn stop_after(&self, step: u64) {
        if self.last.fetch_min(step, Ordering::AcqRel) <= step {
            return; // Known.
        }
        let whole: Vec<u64> = {
            let work = locked(&self.work);
            work.saves().for_each(|save| self.mark_due(save));
            work.shards.values().filter(|s| s.complete).map(|s| s.key.step.0).collect()
        };
        if self.is_bucket_only() {
            whole.into_iter().for_each(|step| self.offer_to_bucket(step));
        }
        self.parts.signal.notify();
    }

    /// True for the step that the job stops after, and what may follow.
    pub(crate) fn is_last(&self, step: u64) -> bool {
        step >= self.last.load(Ordering::Acquire)
    }

    /// Says in `save` that it goes to disk, where it does.
    pub(crate) fn mark_due(&self, save: &Save) {
        match (&self.parts.peers, self.parts.replicas) {
            (Some(_), 1..) => save.set_due_for_peers(),
            (peers, _) => {
                let why = match peers {
                    None => "it goes to no other node: there is no agent here that has others",
                    Some(_) => "it goes to no other node: replicas = 0",
                };
                let (step, why) = (Step(save.step()), why.into());
                save.fail(Level::Peer, &Error::Skipped { step, why });
            }
        }
        if self.is_due(save.step()) {
            save.set_due_for_disk();
        }
        if self.is_bucket_only() {
            save.lack_disk();
        }
        self.mark_due_for_bucket(save);
    }

    /// A shard is about to be published in RAM: known here before anybody can see its manifest.
    pub(crate) fn announce(&self, shard: Shard) {
        let mut work = locked(&self.work);
        work.read_until = None; // It trains.
        self.mark_due(&shard.save);
        work.shards.insert(shard.key.step.0, shard);
    }

    /// The announced shard is in RAM.
    pub(crate) fn confirm(&self, step: u64) {
        let mut work = locked(&self.work);
        if let Some(shard) = work.shards.get_mut(&step) {
            shard.published = true;
            shard.save.reach(Level::Ram, true);
        }
        work.unchecked = true;
        if self.parts.config.savers.len() == 1 {
            self.completed(&mut work, step);
        }
        drop(work);
        // Who watches may look only when the slot has been used again.
        if self.parts.config.savers.len() == 1
            && let Err(e) = self.parts.agreements.in_ram(step, InRam::Whole)
        {
            tracing::warn!("that step {step} is in RAM could not be recorded: {}", e.chain());
        }
        self.parts.signal.notify();
    }

    /// The announced shard could not be published.
    pub(crate) fn withdraw(&self, step: u64) {
        locked(&self.work).shards.remove(&step);
        self.parts.signal.notify();
    }

    /// It goes to disk, if its turn comes.
    fn is_due(&self, step: u64) -> bool {
        self.is_scheduled(step) || (!self.is_bucket_only() && self.is_hurried(step))
    }

    /// The same, as all ranks know it.
    fn is_scheduled(&self, step: u64) -> bool {
        !self.is_bucket_only()
            && (step.is_multiple_of(self.parts.config.disk_every)
                || self.is_parent(step)
                || self.is_last(step))
    }

    fn is_parent(&self, step: u64) -> bool {
        self.parts.record.parent.is_some_and(|p| p.step == step)
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
        if self.is_bucket_only() {
            self.offer_to_bucket(step);
        }
    }

    fn is_own(&self, key: &CheckpointKey) -> bool {
        key.attempt.is(&self.parts.record.attempt)
    }

    /// The thread's whole life.
    pub(crate) fn run(&self) {
        let mut told: Option<String> = None;
        loop {
            let seen = self.parts.signal.seen();
            self.tell_failed();
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
                Err(_) if self.is_handed_over() => return,
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
            let polls = busy && !self.parts.config.is_lone();
            let pause = if told.is_some() {
                IDLE
            } else if polls {
                self.poll()
            } else {
                IDLE
            };
            self.parts.signal.wait(seen, pause);
        }
    }

    /// How often it is looked for what other ranks did.
    fn poll(&self) -> Duration {
        if self.parts.agreements.is_spread() { POLL_TOLD } else { POLL }
    }

    /// On this thread: whoever closes waits for no directory that does not answer.
    fn tell_failed(&self) {
        let untold: Vec<u64> = {
            let work = locked(&self.work);
            work.failed.iter().filter(|(_, told)| !**told).map(|(step, _)| *step).collect()
        };
        for step in untold {
            let why = format!("its save failed on rank {}", self.parts.config.rank);
            if let Err(e) = self.parts.agreements.in_ram(step, InRam::GivenUp(why)) {
                tracing::warn!("that step {step} failed could not be recorded: {}", e.chain());
                return; // The next turn tries again.
            }
            locked(&self.work).failed.entry(step).and_modify(|told| *told = true);
        }
    }

    /// One look at everything; true where something moved. A stage that fails does not keep the
    /// others from their turn.
    pub(crate) fn turn(&self) -> Result<bool> {
        if self.is_fenced() {
            return Ok(false);
        }
        if !self.parts.config.saves() {
            return self.watch();
        }
        let judged = self.watch_ram();
        if judged.is_ok() {
            locked(&self.work).judged = true;
        }
        let stages = [
            judged,
            self.carry_again(),
            self.join(),
            self.watch_disk(),
            self.watch_passed(),
            self.choose(),
            self.carry(),
            self.watch_disk(),
        ];
        let moved = stages.iter().any(|s| matches!(s, Ok(true)));
        let failed = stages.into_iter().find_map(Result::err);
        let trouble = failed.as_ref().map(Error::chain);
        let before = std::mem::replace(&mut locked(&self.work).trouble, trouble);
        if before.is_some() != failed.is_some() {
            self.parts.signal.notify();
        }
        let Some(error) = failed else { return Ok(moved) };
        if self.is_handed_over() {
            return Err(error);
        }
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
        self.tell_leader()?;
        let open: Vec<Shard> =
            locked(&self.work).shards.values().filter(|s| !s.complete).cloned().collect();
        let mut moved = false;
        for shard in open {
            match self.in_ram(&shard.key)? {
                Standing::Whole => {
                    self.completed(&mut locked(&self.work), shard.key.step.0);
                    moved = true;
                }
                Standing::GivenUp(why) => {
                    self.fail_incomplete(&shard, why); // By a rank, so by all.
                    moved = true;
                }
                Standing::Missing(missing) => {
                    shard.save.set_waiting_for(ranks(&missing));
                    // Whoever is missing may have gone on to a newer attempt.
                    self.check_fence()?;
                }
            }
        }
        if moved {
            self.parts.signal.notify();
        }
        Ok(moved)
    }

    /// Where the ranks are spread, nobody sees that this rank's shards are in RAM but from its word.
    fn tell_leader(&self) -> Result<()> {
        if !self.parts.agreements.is_spread() {
            return Ok(());
        }
        let untold: Vec<u64> = {
            let work = locked(&self.work);
            let untold = work.shards.values().filter(|s| s.published && !s.told);
            untold.filter(|s| self.is_own(&s.key)).map(|s| s.key.step.0).collect()
        };
        for step in untold {
            self.parts.agreements.say_own(step, self.parts.config.rank, Own::InRam)?;
            if let Some(shard) = locked(&self.work).shards.get_mut(&step) {
                shard.told = true;
            }
        }
        Ok(())
    }

    /// The other ranks that save.
    fn others(&self) -> Vec<u32> {
        let own = self.parts.config.rank;
        self.parts.config.savers.iter().copied().filter(|rank| *rank != own).collect()
    }

    /// The first complete checkpoint of this attempt is recorded: from then on it leads the
    /// lineage.
    fn join(&self) -> Result<bool> {
        let due = {
            let work = locked(&self.work);
            let own = work.shards.values().any(|s| s.complete && self.is_own(&s.key));
            own && !work.joined && (self.parts.config.leads() || self.parts.agreements.is_spread())
        };
        if due {
            attempt::join(&*self.parts.disk, &self.parts.record.attempt)?;
            locked(&self.work).joined = true;
        }
        Ok(due)
    }
}

/// Nobody: a rank whose shard is there and cannot be compared.
fn whom(list: &[u32]) -> String {
    if list.is_empty() { "another rank".into() } else { ranks(list) }
}
