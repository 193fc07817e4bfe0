//! What one rank has in its hands before and after it has an attempt: tiers, slots, clock, ids.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    clock::SharedClock,
    config::Config,
    error::{Error, Result},
    names::Id,
    observe::Observer,
    ownership::Ownership,
    signal::Signal,
    snapshot::arena::Arena,
    tier::Tier,
};

/// The tiers and locks of one rank, before and after it has an attempt.
pub(crate) struct Place {
    pub(crate) config: Config,
    pub(crate) ram: Arc<dyn Tier>,
    pub(crate) disk: Arc<dyn Tier>,
    pub(crate) arena: Arc<Arena>,
    pub(crate) observer: Observer,
    pub(crate) clock: SharedClock,
    pub(crate) signal: Arc<Signal>,
    pub(crate) closed: AtomicBool,
    /// Of this process start; rank 0's names the attempt.
    pub(crate) start: Id,
    /// Of this writer; in its payloads' names.
    pub(crate) nonce: Id,
}

impl Place {
    /// Others find this process's attempt record by this lock, whose name nobody else has.
    pub(crate) fn start_lock(&self) -> Result<Ownership> {
        let path = start_lock_path(&self.config.destination, &self.start);
        Ownership::take_over(&path, "this start of the job", self.config.lock_wait, &*self.clock)
    }

    pub(crate) fn check_closed(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::invalid("this Checkpointer is closed"));
        }
        Ok(())
    }
}

pub(crate) fn start_lock_path(destination: &Path, start: &Id) -> PathBuf {
    destination.join(format!("_locks/start-{start}"))
}
