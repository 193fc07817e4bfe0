//! One checkpoint on its way out, as its waiters see it.
//!
//! # Invariants
//!
//! - A level that is reached stays reached, one that failed stays failed.
//! - When a wait returns true, the checkpoint has that level.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tierkeep_proto::trainer as wire;

use crate::{
    error::{Error, Result},
    observe::locked,
    signal::Signal,
    wire::convert,
};

/// What a waiter can wait for. Facts, not a ladder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Level {
    /// The copy is taken: the state may change again.
    Staged,
    /// It survives the process.
    Ram,
    /// It survives the node.
    Peer,
    /// It survives a reboot.
    Disk,
    /// It survives the cluster.
    Object,
}

impl Level {
    /// Its name in messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Staged => "staged",
            Self::Ram => "ram",
            Self::Peer => "peer",
            Self::Disk => "disk",
            Self::Object => "object",
        }
    }
}

#[derive(Debug, Default)]
enum Stage {
    #[default]
    Pending,
    Reached,
    Failed(Error),
}

#[derive(Debug, Default)]
struct Stages {
    staged: Stage,
    ram: Stage,
    peer: Stage,
    disk: Stage,
    object: Stage,
    ram_own: Stage,
    peer_own: Stage,
    disk_own: Stage,
    object_own: Stage,
    bytes: u64,
    peer_bytes: u64,
    disk_bytes: u64,
    object_bytes: u64,
    skipped: Option<String>,
    /// It was this rank alone that passed it over.
    alone: bool,
    /// The other ranks were told that it failed here.
    told: bool,
    waiting_for: String,
}

impl Stages {
    fn stage(&mut self, level: Level, own: bool) -> &mut Stage {
        match (level, own) {
            (Level::Staged, _) => &mut self.staged,
            (Level::Ram, false) => &mut self.ram,
            (Level::Ram, true) => &mut self.ram_own,
            (Level::Peer, false) => &mut self.peer,
            (Level::Peer, true) => &mut self.peer_own,
            (Level::Disk, false) => &mut self.disk,
            (Level::Disk, true) => &mut self.disk_own,
            (Level::Object, false) => &mut self.object,
            (Level::Object, true) => &mut self.object_own,
        }
    }
}

/// Numbers that a progress bar pulls.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of this rank's shard.
    pub bytes: u64,
    /// Of the bytes of all its copies on other nodes, those that were sent.
    pub peer_bytes: u64,
    /// Of them, written to disk.
    pub disk_bytes: u64,
    /// Of them, sent to the bucket.
    pub object_bytes: u64,
    /// The levels that the whole checkpoint has reached.
    pub staged: bool,
    /// It survives the process.
    pub ram: bool,
    /// It survives the node.
    pub peer: bool,
    /// It survives a reboot.
    pub disk: bool,
    /// It survives the cluster.
    pub object: bool,
    /// Why nothing was saved, where nothing was.
    pub skipped: Option<String>,
    /// The first failure, with its causes.
    pub error: Option<String>,
}

#[derive(Debug)]
struct Shared {
    step: u64,
    due_for_disk: AtomicBool,
    due_for_peers: AtomicBool,
    due_for_object: AtomicBool,
    stages: Mutex<Stages>,
    changed: Condvar,
    /// Told of each change too: somebody passes them on.
    signal: Option<Arc<Signal>>,
}

impl Shared {
    fn tell(&self) {
        self.changed.notify_all();
        if let Some(signal) = &self.signal {
            signal.notify();
        }
    }
}

/// Keeps the handles of the newest saves, `most` of them and those of which something may still become
/// true; the steps of the others, which are forgotten.
pub(crate) fn forget_decided(saves: &mut BTreeMap<u64, Save>, most: usize) -> Vec<u64> {
    let surplus = saves.len().saturating_sub(most);
    let decided = saves.iter().filter(|(_, save)| !save.is_open());
    let mut gone: Vec<u64> = decided.take(surplus).map(|(step, _)| *step).collect();
    // Whatever a peer claims to wait for, there is an end to it.
    let still = saves.len() - gone.len();
    let open = saves.iter().filter(|(_, save)| save.is_open());
    gone.extend(open.take(still.saturating_sub(16 * most)).map(|(step, _)| *step));
    gone.iter().for_each(|step| {
        saves.remove(step);
    });
    gone
}

/// One checkpoint on its way out.
#[derive(Clone, Debug)]
pub struct Save {
    shared: Arc<Shared>,
}

impl Save {
    pub(crate) fn new(step: u64) -> Self {
        Self::make(step, None)
    }

    /// One whose changes `signal` tells.
    pub(crate) fn told_by(step: u64, signal: Arc<Signal>) -> Self {
        Self::make(step, Some(signal))
    }

    fn make(step: u64, signal: Option<Arc<Signal>>) -> Self {
        let shared = Shared {
            step,
            due_for_disk: AtomicBool::new(false),
            due_for_peers: AtomicBool::new(false),
            due_for_object: AtomicBool::new(false),
            stages: Mutex::default(),
            changed: Condvar::new(),
            signal,
        };
        Self { shared: Arc::new(shared) }
    }

    /// Completed training steps.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.shared.step
    }

    /// True where its step is one that goes to disk. The last step of a job that was asked to stop
    /// may become one.
    #[must_use]
    pub fn is_due_for_disk(&self) -> bool {
        self.shared.due_for_disk.load(Ordering::Acquire)
    }

    pub(crate) fn set_due_for_disk(&self) {
        if !self.shared.due_for_disk.swap(true, Ordering::AcqRel)
            && let Some(signal) = &self.shared.signal
        {
            signal.notify();
        }
    }

    /// True where it goes to other nodes, unless a newer one does.
    #[must_use]
    pub fn is_due_for_peers(&self) -> bool {
        self.shared.due_for_peers.load(Ordering::Acquire)
    }

    pub(crate) fn set_due_for_peers(&self) {
        self.shared.due_for_peers.store(true, Ordering::Release);
    }

    /// True where it goes to the bucket, unless a newer one does.
    #[must_use]
    pub fn is_due_for_object(&self) -> bool {
        self.shared.due_for_object.load(Ordering::Acquire)
    }

    pub(crate) fn set_due_for_object(&self) {
        if !self.shared.due_for_object.swap(true, Ordering::AcqRel)
            && let Some(signal) = &self.shared.signal
        {
            signal.notify();
        }
    }

    /// As another process sees it.
    pub(crate) fn state(&self) -> wire::SaveState {
        let mut stages = locked(&self.shared.stages);
        let mut stage = |level, own| match stages.stage(level, own) {
            Stage::Pending => None,
            Stage::Reached => Some(wire::Stage { reached: true, failure: None }),
            Stage::Failed(e) => {
                Some(wire::Stage { reached: false, failure: Some(convert::failure(e)) })
            }
        };
        wire::SaveState {
            step: self.step(),
            ram: stage(Level::Ram, false),
            ram_own: stage(Level::Ram, true),
            disk: stage(Level::Disk, false),
            disk_own: stage(Level::Disk, true),
            peer: stage(Level::Peer, false),
            peer_own: stage(Level::Peer, true),
            object: stage(Level::Object, false),
            object_own: stage(Level::Object, true),
            due_for_object: self.is_due_for_object(),
            object_bytes: stages.object_bytes,
            due_for_disk: self.is_due_for_disk(),
            due_for_peers: self.is_due_for_peers(),
            disk_bytes: stages.disk_bytes,
            peer_bytes: stages.peer_bytes,
            waiting_for: stages.waiting_for.clone(),
            skipped: stages.skipped.clone().unwrap_or_default(),
        }
    }

    /// How it is, but for what failed.
    pub(crate) fn reached(&self) -> wire::SaveState {
        let mut state = self.state();
        let levels = [&mut state.ram, &mut state.disk, &mut state.peer, &mut state.object];
        let own =
            [&mut state.ram_own, &mut state.disk_own, &mut state.peer_own, &mut state.object_own];
        for stage in levels.into_iter().chain(own) {
            stage.take_if(|stage| stage.failure.is_some());
        }
        state
    }

    /// Takes over what another process saw. What is known already stays.
    pub(crate) fn learn(&self, state: wire::SaveState) {
        if state.due_for_disk {
            self.set_due_for_disk();
        }
        if state.due_for_peers {
            self.set_due_for_peers();
        }
        if state.due_for_object {
            self.set_due_for_object();
        }
        if !state.skipped.is_empty() {
            self.skip(&state.skipped);
        }
        self.set_waiting_for(state.waiting_for);
        let mut stages = locked(&self.shared.stages);
        stages.disk_bytes = stages.disk_bytes.max(state.disk_bytes);
        stages.peer_bytes = stages.peer_bytes.max(state.peer_bytes);
        stages.object_bytes = stages.object_bytes.max(state.object_bytes);
        let told = [
            (Level::Ram, false, state.ram),
            (Level::Ram, true, state.ram_own),
            (Level::Disk, false, state.disk),
            (Level::Disk, true, state.disk_own),
            (Level::Peer, false, state.peer),
            (Level::Peer, true, state.peer_own),
            (Level::Object, false, state.object),
            (Level::Object, true, state.object_own),
        ];
        for (level, own, said) in told {
            let (Some(said), stage) = (said, stages.stage(level, own)) else { continue };
            match (stage, said.failure) {
                (stage @ Stage::Pending, Some(failure)) => {
                    *stage = Stage::Failed(convert::error(failure));
                }
                (stage @ Stage::Pending, None) if said.reached => *stage = Stage::Reached,
                _ => {}
            }
        }
        drop(stages);
        self.shared.tell();
    }

    /// Waits up to `timeout` for a level; of this rank's shard alone where `own` says so. False:
    /// not yet.
    ///
    /// # Errors
    /// The level was not and will not be reached.
    pub fn poll(&self, level: Level, own: bool, timeout: Duration) -> Result<bool> {
        let mut stages = locked(&self.shared.stages);
        if matches!(stages.stage(level, own), Stage::Pending) && !timeout.is_zero() {
            let waited = self.shared.changed.wait_timeout_while(stages, timeout, |s| {
                matches!(s.stage(level, own), Stage::Pending)
            });
            stages = waited.map_or_else(|e| e.into_inner().0, |w| w.0);
        }
        match stages.stage(level, own) {
            Stage::Pending => Ok(false),
            Stage::Reached => Ok(true),
            Stage::Failed(e) => Err(e.shared()),
        }
    }

    /// What a wait that ran out should name: `rank 3`, or nothing.
    #[must_use]
    pub fn waiting_for(&self) -> String {
        locked(&self.shared.stages).waiting_for.clone()
    }

    /// The numbers now.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let mut stages = locked(&self.shared.stages);
        let mut error = None;
        let (for_peers, for_object) = (self.is_due_for_peers(), self.is_due_for_object());
        let for_disk = self.is_due_for_disk() || !for_object;
        let mut reached = |level| match stages.stage(level, false) {
            Stage::Reached => true,
            Stage::Pending => false,
            // Where it was to go nowhere else, that it did not is no failure.
            Stage::Failed(_) if level == Level::Peer && !for_peers => false,
            Stage::Failed(_) if level == Level::Object && !for_object => false,
            Stage::Failed(_) if level == Level::Disk && !for_disk => false,
            Stage::Failed(e) => {
                error.get_or_insert(e.chain());
                false
            }
        };
        let (staged, ram, peer, disk, object) = (
            reached(Level::Staged),
            reached(Level::Ram),
            reached(Level::Peer),
            reached(Level::Disk),
            reached(Level::Object),
        );
        Progress {
            bytes: stages.bytes,
            peer_bytes: stages.peer_bytes,
            disk_bytes: stages.disk_bytes,
            object_bytes: stages.object_bytes,
            staged,
            ram,
            peer,
            disk,
            object,
            skipped: stages.skipped.clone(),
            error: if stages.skipped.is_some() { None } else { error },
        }
    }

    pub(crate) fn reach(&self, level: Level, own: bool) {
        let mut stages = locked(&self.shared.stages);
        *stages.stage(level, own) = Stage::Reached;
        if !own && level != Level::Staged {
            *stages.stage(level, true) = Stage::Reached;
        }
        drop(stages);
        self.shared.tell();
    }

    /// Fails every level that is not reached, from `level` on.
    pub(crate) fn fail(&self, level: Level, error: &Error) {
        let on_disk =
            matches!(locked(&self.shared.stages).stage(Level::Disk, false), Stage::Reached);
        let from: &[Level] = match level {
            Level::Staged => &[Level::Staged, Level::Ram, Level::Peer, Level::Disk, Level::Object],
            // A checkpoint that is not complete in RAM is never chosen for anywhere else.
            Level::Ram => &[Level::Ram, Level::Peer, Level::Disk, Level::Object],
            Level::Peer => &[Level::Peer],
            // Nor one for the bucket that is not on disk; one that is there may be on its way.
            Level::Disk if on_disk => &[],
            Level::Disk => &[Level::Disk, Level::Object],
            Level::Object => &[Level::Object],
        };
        self.fail_levels(from, error);
    }

    /// Fails what is not reached nearer than the bucket.
    pub(crate) fn fail_but_in_bucket(&self, error: &Error) {
        self.fail_levels(&[Level::Ram, Level::Peer, Level::Disk], error);
        if !self.is_due_for_object() {
            self.fail_levels(&[Level::Object], error);
        }
    }

    /// There is no disk: what goes to the bucket goes there from RAM.
    pub(crate) fn lack_disk(&self) {
        let why = "it goes to no disk: there is none here".into();
        let step = crate::names::Step(self.step());
        self.fail_levels(&[Level::Disk], &Error::Skipped { step, why });
    }

    fn fail_levels(&self, levels: &[Level], error: &Error) {
        let mut stages = locked(&self.shared.stages);
        for level in levels {
            for own in [false, true] {
                let stage = stages.stage(*level, own);
                if matches!(stage, Stage::Pending) {
                    *stage = Stage::Failed(error.shared());
                }
            }
        }
        drop(stages);
        self.shared.tell();
    }

    /// True while it may still reach RAM, or other nodes, disk or the bucket where it is to go there.
    pub(crate) fn is_open(&self) -> bool {
        self.is_pending(Level::Ram)
            || (self.is_due_for_peers() && self.is_pending(Level::Peer))
            || (self.is_due_for_disk() && self.is_pending(Level::Disk))
            || (self.is_due_for_object() && self.is_pending(Level::Object))
    }

    pub(crate) fn is_pending(&self, level: Level) -> bool {
        matches!(locked(&self.shared.stages).stage(level, false), Stage::Pending)
    }

    /// Passed over here, by a decision of no other rank.
    pub(crate) fn skip_alone(&self, why: &str) {
        locked(&self.shared.stages).alone = true;
        self.skip(why);
    }

    /// Passed over by all ranks.
    pub(crate) fn skip(&self, why: &str) {
        locked(&self.shared.stages).skipped = Some(why.into());
        let error = Error::Skipped { step: crate::names::Step(self.step()), why: why.into() };
        self.reach(Level::Staged, false);
        self.fail(Level::Ram, &error);
    }

    pub(crate) fn set_bytes(&self, bytes: u64) {
        locked(&self.shared.stages).bytes = bytes;
    }

    pub(crate) fn add_disk_bytes(&self, bytes: u64) {
        locked(&self.shared.stages).disk_bytes += bytes;
    }

    pub(crate) fn add_object_bytes(&self, bytes: u64) {
        locked(&self.shared.stages).object_bytes += bytes;
    }

    pub(crate) fn add_peer_bytes(&self, bytes: u64) {
        locked(&self.shared.stages).peer_bytes += bytes;
    }

    pub(crate) fn set_waiting_for(&self, who: String) {
        let mut stages = locked(&self.shared.stages);
        if stages.waiting_for != who {
            stages.waiting_for = who;
            drop(stages);
            self.shared.tell();
        }
    }

    /// True where a level failed or a copy did not happen: a second save of the step may try again.
    pub(crate) fn is_void(&self) -> bool {
        matches!(locked(&self.shared.stages).ram_own, Stage::Failed(_))
    }

    /// True, once: it came to nothing by what happened on this rank alone.
    pub(crate) fn take_untold(&self) -> bool {
        let mut stages = locked(&self.shared.stages);
        let agreed = stages.skipped.is_some() && !stages.alone;
        let void = matches!(stages.ram_own, Stage::Failed(_));
        void && !agreed && !std::mem::replace(&mut stages.told, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_save_that_waits_is_not_forgotten_for_newer_ones_that_are_decided() {
        let mut saves: BTreeMap<u64, Save> = BTreeMap::new();
        for step in 0..100 {
            let save = Save::new(step);
            if step != 3 {
                save.skip("every slot is in use");
            }
            saves.insert(step, save);
            forget_decided(&mut saves, 8);
        }
        assert!(saves.len() == 8 && saves.contains_key(&3), "{:?}", saves.keys());
        for step in 100..1000 {
            saves.insert(step, Save::new(step));
            forget_decided(&mut saves, 8);
        }
        assert_eq!(saves.len(), 16 * 8, "whatever is claimed");
    }
}
