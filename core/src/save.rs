//! One checkpoint on its way out, as its waiters see it.
//!
//! # Invariants
//!
//! - A level that is reached stays reached, one that failed stays failed.
//! - When a wait returns true, the checkpoint has that level.

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::{
    error::{Error, Result},
    observe::locked,
};

/// What a waiter can wait for. Facts, not a ladder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Level {
    /// The copy is taken: the state may change again.
    Staged,
    /// It survives the process.
    Ram,
    /// It survives a reboot.
    Disk,
}

impl Level {
    /// Its name in messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Staged => "staged",
            Self::Ram => "ram",
            Self::Disk => "disk",
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
    disk: Stage,
    ram_own: Stage,
    disk_own: Stage,
    bytes: u64,
    disk_bytes: u64,
    skipped: Option<String>,
    waiting_for: String,
}

impl Stages {
    fn stage(&mut self, level: Level, own: bool) -> &mut Stage {
        match (level, own) {
            (Level::Staged, _) => &mut self.staged,
            (Level::Ram, false) => &mut self.ram,
            (Level::Ram, true) => &mut self.ram_own,
            (Level::Disk, false) => &mut self.disk,
            (Level::Disk, true) => &mut self.disk_own,
        }
    }
}

/// Numbers that a progress bar pulls.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of this rank's shard.
    pub bytes: u64,
    /// Of them, written to disk.
    pub disk_bytes: u64,
    /// The levels that the whole checkpoint has reached.
    pub staged: bool,
    /// It survives the process.
    pub ram: bool,
    /// It survives a reboot.
    pub disk: bool,
    /// Why nothing was saved, where nothing was.
    pub skipped: Option<String>,
    /// The first failure, with its causes.
    pub error: Option<String>,
}

#[derive(Debug)]
struct Shared {
    step: u64,
    due_for_disk: AtomicBool,
    stages: Mutex<Stages>,
    changed: Condvar,
}

/// One checkpoint on its way out.
#[derive(Clone, Debug)]
pub struct Save {
    shared: Arc<Shared>,
}

impl Save {
    pub(crate) fn new(step: u64) -> Self {
        let shared = Shared {
            step,
            due_for_disk: AtomicBool::new(false),
            stages: Mutex::default(),
            changed: Condvar::new(),
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
        self.shared.due_for_disk.store(true, Ordering::Release);
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
        let mut reached = |level| match stages.stage(level, false) {
            Stage::Reached => true,
            Stage::Pending => false,
            Stage::Failed(e) => {
                error.get_or_insert(e.chain());
                false
            }
        };
        let (staged, ram, disk) =
            (reached(Level::Staged), reached(Level::Ram), reached(Level::Disk));
        Progress {
            bytes: stages.bytes,
            disk_bytes: stages.disk_bytes,
            staged,
            ram,
            disk,
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
        self.shared.changed.notify_all();
    }

    /// Fails every level that is not reached, from `level` on.
    pub(crate) fn fail(&self, level: Level, error: &Error) {
        let mut stages = locked(&self.shared.stages);
        let from: &[Level] = match level {
            Level::Staged => &[Level::Staged, Level::Ram, Level::Disk],
            // A checkpoint that is not complete in RAM is never chosen for disk.
            Level::Ram => &[Level::Ram, Level::Disk],
            Level::Disk => &[Level::Disk],
        };
        for level in from {
            for own in [false, true] {
                let stage = stages.stage(*level, own);
                if matches!(stage, Stage::Pending) {
                    *stage = Stage::Failed(error.shared());
                }
            }
        }
        self.shared.changed.notify_all();
    }

    /// True while it may still reach RAM, or disk where it is to go there.
    pub(crate) fn is_open(&self) -> bool {
        self.is_pending(Level::Ram) || (self.is_due_for_disk() && self.is_pending(Level::Disk))
    }

    pub(crate) fn is_pending(&self, level: Level) -> bool {
        matches!(locked(&self.shared.stages).stage(level, false), Stage::Pending)
    }

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

    pub(crate) fn set_waiting_for(&self, who: String) {
        locked(&self.shared.stages).waiting_for = who;
    }

    /// True where a level failed or a copy did not happen: a second save of the step may try again.
    pub(crate) fn is_void(&self) -> bool {
        matches!(locked(&self.shared.stages).ram_own, Stage::Failed(_))
    }
}
