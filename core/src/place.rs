//! What one rank has in its hands before and after it has an attempt: settings, clock and ids, which
//! the one who copies has too ([`Desk`]), and tiers and slots, which only the owner has ([`Place`]).

use std::{
    ops::Deref,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    begin::Stands,
    cascade::to_object::Far,
    clock::SharedClock,
    config::Config,
    error::{Error, Result},
    names::Id,
    observe::Observer,
    ownership::Ownership,
    peers::Peers,
    signal::Signal,
    snapshot::arena::Arena,
    tier::Tier,
};

/// The settings of one rank's handle, and what its parts share.
#[derive(Debug)]
pub(crate) struct Desk {
    pub(crate) config: Config,
    pub(crate) observer: Observer,
    pub(crate) clock: SharedClock,
    pub(crate) signal: Arc<Signal>,
    pub(crate) closed: AtomicBool,
    /// Of this process start; rank 0's names the attempt.
    pub(crate) start: Id,
    /// Of this writer; in its payloads' names.
    pub(crate) nonce: Id,
    /// Whose it is: a fork's child does nothing with it.
    pub(crate) pid: u32,
}

impl Desk {
    pub(crate) fn check_closed(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::invalid("this Checkpointer is closed"));
        }
        Ok(())
    }

    pub(crate) fn check_pid(&self) -> Result<()> {
        if self.is_ours() {
            return Ok(());
        }
        Err(Error::Fenced {
            why: format!(
                "this Checkpointer belongs to process {}: it does nothing in a forked child",
                self.pid
            ),
        })
    }

    /// False in a fork's child.
    pub(crate) fn is_ours(&self) -> bool {
        self.pid == std::process::id()
    }
}

/// The tiers and slots of one rank.
pub(crate) struct Place {
    pub(crate) desk: Arc<Desk>,
    pub(crate) ram: Arc<dyn Tier>,
    pub(crate) disk: Arc<dyn Tier>,
    /// The bucket behind it.
    pub(crate) bucket: Option<Arc<dyn Tier>>,
    /// This is an agent: who trains reads what lies in files of this node.
    pub(crate) is_hosted: bool,
    pub(crate) arena: Arc<Arena>,
    /// The other agents.
    pub(crate) peers: Option<Peers>,
}

impl Deref for Place {
    type Target = Desk;
    fn deref(&self) -> &Desk {
        &self.desk
    }
}

impl Place {
    /// The ranks are on several nodes, perhaps, and do not see each other's directories.
    pub(crate) fn is_spread(&self) -> bool {
        self.peers.is_some() && !self.config.is_lone()
    }

    /// The bucket, and what is asked of it.
    pub(crate) fn far(&self) -> Option<Far> {
        let (tier, settings) = (self.bucket.clone()?, self.config.bucket.clone()?);
        Some(Far { tier, settings })
    }

    /// What is resumed from is to go to the bucket, as far as that is known.
    pub(crate) fn lacks_in_bucket(&self, stands: Stands) -> bool {
        let is_source = stands.on_disk || stands.whole_in_bucket || self.config.is_bucket_only();
        self.bucket.is_some() && is_source && !stands.in_bucket && !stands.is_others
    }

    /// How many copies of each shard are to be on other nodes.
    pub(crate) fn replicas(&self) -> usize {
        match self.peers {
            Some(_) => self.config.replicas.unwrap_or(1) as usize,
            None => 0,
        }
    }

    /// Others find this process's attempt record by this lock, whose name nobody else has.
    pub(crate) fn start_lock(&self) -> Result<Ownership> {
        let path = start_lock_path(&self.config.home(), &self.start);
        Ownership::take_over(&path, "this start of the job", self.config.lock_wait, &*self.clock)
    }
}

pub(crate) fn start_lock_path(destination: &Path, start: &Id) -> PathBuf {
    destination.join(format!("_locks/start-{start}"))
}
