//! One rank's handle on a run: the face of the core.
//!
//! open -> begin (the restore decision, recorded) -> save, save, save -> close
//!
//! # Invariants
//!
//! - Nothing is saved before the attempt is recorded and the rank claimed.
//! - Steps of one attempt rise; a step is published once.
//! - A save that fails leaves the training, the older checkpoints and the slots as they were, and
//!   is told.
//! - In a fork's child every call is refused and nothing is touched.

mod ending;
mod stopping;
mod taking;

use std::{
    any::Any,
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    path::PathBuf,
    sync::{
        Arc, LazyLock, Mutex, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use crate::{
    attempt::AttemptRecord,
    begin::Begin,
    clock::Deadline,
    config::Config,
    error::{Error, Result},
    keeper::{Ground, Keeper, Local},
    link::{Agent, Far, find_agent},
    manifest::Meta,
    names::Id,
    observe::{Observer, locked},
    owner::{Going, Owner},
    ownership::FileId,
    place::Desk,
    reader::Reader,
    restore::read::Restorable,
    save::Save,
    snapshot::{
        device::{Bring, Pin},
        layout::Layout,
    },
    state::{State, Tensor, TensorSpec},
    tier::Tier,
};

/// One save, as asked for.
pub struct SaveRequest {
    /// Completed training steps.
    pub step: u64,
    /// The state. Its memory must stay readable until the save is staged, and unchanged but for
    /// what `late` tensors' owners wait for. Not looked at on a rank that does not save.
    pub state: State,
    /// What the user says about it.
    pub meta: Meta,
    /// Copy `late` tensors after returning.
    pub overlap: bool,
    /// Brings the tensors that lie in no memory of the host ([`Memory::InSlot`]).
    ///
    /// [`Memory::InSlot`]: crate::state::Memory::InSlot
    pub bring: Option<Box<dyn Bring>>,
    /// Pass the step over where every slot is in use, instead of waiting.
    pub skip_if_busy: bool,
    /// Dropped when the copy is done: what keeps the state's memory alive.
    pub keep_alive: Box<dyn Any + Send + Sync>,
    /// Asked every tenth of a second while the save waits for a slot: true ends the wait, and the
    /// step is not saved.
    pub interrupted: Option<Interrupted>,
}

/// Whether the caller wants to go on with something else (Ctrl-C).
pub type Interrupted = Box<dyn Fn() -> bool + Send + Sync>;

struct Inner {
    owner: Arc<dyn Owner>,
    saves: Mutex<BTreeMap<u64, Save>>,
    layout: Mutex<Option<Arc<Layout>>>,
    /// That a pattern matches no tensor is told once.
    told_unused: AtomicBool,
    stopping: Mutex<stopping::Stopping>,
    /// Copies that are being taken behind: tensors must not change.
    copying: AtomicUsize,
    /// Those of them that read memory of the host.
    copying_host: AtomicUsize,
    /// Saves that are not published yet, copies included.
    publishing: AtomicUsize,
    /// To the thread that copies behind, once there is one.
    copier: Mutex<Option<mpsc::Sender<taking::Work>>>,
}

impl Inner {
    fn desk(&self) -> &Desk {
        self.owner.desk()
    }
}

/// One rank's handle on a run. Clones are the same handle.
#[derive(Clone)]
pub struct Checkpointer {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Checkpointer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let config = self.config();
        f.debug_struct("Checkpointer")
            .field("destination", &config.destination)
            .field("rank", &config.rank)
            .finish_non_exhaustive()
    }
}

/// What two handles of one rank in this process have in common.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Seat {
    /// The rank's lock.
    Lock(FileId),
    /// An agent's socket, the run and the rank.
    Agent(PathBuf, PathBuf, u32),
}

impl Seat {
    /// Ends an earlier handle that has it in this process.
    fn take_over(&self) -> Result<()> {
        let first = locked(&HANDLES).get(self).and_then(Weak::upgrade);
        match first.filter(|first| first.desk().is_ours()) {
            Some(first) => first.taken_over(),
            None => Ok(()),
        }
    }
}

/// The handles of this process: a second one of a rank stops the first before it touches the slots.
static HANDLES: LazyLock<Mutex<HashMap<Seat, Weak<Inner>>>> = LazyLock::new(Mutex::default);

/// How many past saves keep their handle: a second `save` of an older step than that is an error.
const SAVES_KEPT: usize = 64;

impl Checkpointer {
    /// Takes the rank: opens the tiers and the locks. Nothing is recorded yet.
    ///
    /// # Errors
    /// A place cannot be used, or another live process has the rank.
    pub fn open(config: Config) -> Result<Self> {
        let Some(socket) = config.agent.clone() else {
            return Self::open_wrapped(config, &|tier| tier);
        };
        let run = crate::config::real(&config.destination);
        let seat = Seat::Agent(socket.clone(), run, config.rank);
        seat.take_over()?;
        Ok(Self::of(Arc::new(Far::open(config, socket)?), seat))
    }

    /// [`open`](Self::open) with the node's agent, if it has one (`find_agent`); a handle without one
    /// says so once.
    ///
    /// # Errors
    /// As [`open`](Self::open); an agent that was named does not answer.
    pub fn find(mut config: Config, wish: Option<&OsStr>) -> Result<Self> {
        let found = find_agent(wish)?;
        if let Agent::At { socket, .. } = &found {
            config.agent = Some(socket.clone());
        }
        let handle = Self::open(config)?;
        found.tell(handle.observer());
        Ok(handle)
    }

    /// [`open`](Self::open) without an agent, and with something put around each tier: faults in
    /// tests, a limit, a meter.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_wrapped(
        config: Config,
        wrap: &dyn Fn(Arc<dyn Tier>) -> Arc<dyn Tier>,
    ) -> Result<Self> {
        let by_lock = |lock| Seat::Lock(lock).take_over();
        let keeper = Keeper::open(config, Ground::Trainer, wrap, &by_lock)?;
        let seat = Seat::Lock(keeper.id());
        Ok(Self::of(Arc::new(Local(Arc::new(keeper))), seat))
    }

    fn of(owner: Arc<dyn Owner>, seat: Seat) -> Self {
        let inner = Arc::new(Inner {
            owner,
            saves: Mutex::new(BTreeMap::new()),
            layout: Mutex::new(None),
            told_unused: AtomicBool::new(false),
            stopping: Mutex::default(),
            copying: AtomicUsize::new(0),
            copying_host: AtomicUsize::new(0),
            publishing: AtomicUsize::new(0),
            copier: Mutex::new(None),
        });
        locked(&HANDLES).insert(seat, Arc::downgrade(&inner));
        Self { inner }
    }

    /// Decides, or learns, where this attempt begins, and records and claims it. `None`: at step 0.
    /// Called again in a running process (a rollback), it begins a new attempt.
    ///
    /// # Errors
    /// A tier did not answer, rank 0's record did not come, the rank is claimed, or the shard of
    /// the decided step has no good copy here.
    pub fn begin(&self, how: &Begin) -> Result<Option<Restorable>> {
        let inner = &self.inner;
        let quiet = || inner.quiet(self.config().slot_wait);
        let found = inner.owner.begin(how, &quiet, &|| locked(&inner.saves).clear())?;
        Ok(found.map(|found| {
            let near = || Reader::of(self.tiers()).rest(&found.key);
            let rest = found.rest.clone().unwrap_or_else(near);
            Restorable { rest: Some(rest), ..found }
        }))
    }

    /// Makes the slots for a state of this form and puts their pages in place, behind. A rank that
    /// does not save has none.
    ///
    /// # Errors
    /// [`Error::Budget`] with the sum, at once; a replicated tensor lies on a device.
    pub fn prepare(&self, tensors: &[Tensor]) -> Result<()> {
        self.check_open()?;
        if !self.config().saves() {
            return Ok(());
        }
        let layout = self.layout(tensors.iter().map(|t| &t.spec))?;
        layout.check_memory(tensors)?;
        self.inner.owner.prepare(layout.len)
    }

    fn layout<'a>(
        &self,
        specs: impl ExactSizeIterator<Item = &'a Arc<TensorSpec>> + Clone,
    ) -> Result<Arc<Layout>> {
        let mut kept = locked(&self.inner.layout);
        if let Some(layout) = kept.as_ref().filter(|l| l.fits(specs.clone())) {
            return Ok(layout.clone());
        }
        let layout = Arc::new(Layout::of_rank(
            specs.cloned().collect(),
            &self.config().replicated,
            self.config().rank,
        )?);
        *kept = Some(layout.clone());
        Ok(layout)
    }

    /// Which checkpoint of another run all ranks of this attempt begin with: `wish`, unless another
    /// rank was first. That run may go on meanwhile.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn agree_on_init(&self, wish: &str) -> Result<String> {
        self.check_open()?;
        self.going()?.init(wish)
    }

    /// Slots are made known to a device from here on: before they are used, or at the next
    /// [`prepare`](Self::prepare).
    pub fn pin_with(&self, pin: Arc<dyn Pin>) {
        self.inner.owner.pin_with(pin);
    }

    /// Waits up to `timeout` until no copy is being taken behind; then any tensor may be changed.
    ///
    /// # Errors
    /// A fork's child.
    pub fn fence(&self, timeout: Duration) -> Result<bool> {
        self.wait_for_none(&self.inner.copying, timeout)
    }

    /// [`fence`](Self::fence) for tensors in memory of the host: those on a device may still be read
    /// there.
    ///
    /// # Errors
    /// A fork's child.
    pub fn fence_host(&self, timeout: Duration) -> Result<bool> {
        self.wait_for_none(&self.inner.copying_host, timeout)
    }

    fn wait_for_none(&self, copying: &AtomicUsize, timeout: Duration) -> Result<bool> {
        let place = self.inner.desk();
        place.check_pid()?;
        let deadline = Deadline::after(&*place.clock, timeout);
        loop {
            let seen = place.signal.seen();
            if copying.load(Ordering::Acquire) == 0 {
                return Ok(true);
            }
            let Some(left) = deadline.left(&*place.clock) else { return Ok(false) };
            place.signal.wait(seen, left);
        }
    }

    fn going(&self) -> Result<Arc<dyn Going>> {
        if let Some(going) = self.inner.owner.going() {
            return Ok(going);
        }
        // The first save without `restore`: right on a new run, an error on any other.
        self.begin(&Begin { only_new: true, ..Begin::default() })?;
        self.inner.owner.going().ok_or_else(|| Error::Bug("an attempt that did not begin".into()))
    }

    fn check_open(&self) -> Result<()> {
        self.inner.owner.check_open(false)
    }

    /// Events and counters.
    #[must_use]
    pub fn observer(&self) -> &Observer {
        &self.inner.desk().observer
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.inner.desk().config
    }

    /// The id of this process start: rank 0's, given to the others, makes them one attempt.
    #[must_use]
    pub fn start_id(&self) -> Id {
        self.inner.desk().start
    }

    /// The attempt, once begun.
    #[must_use]
    pub fn attempt(&self) -> Option<AttemptRecord> {
        self.inner.owner.going().map(|going| going.record().clone())
    }

    /// The tiers, nearest first.
    #[must_use]
    pub fn tiers(&self) -> Vec<Arc<dyn Tier>> {
        self.inner.owner.tiers()
    }

    /// Pins a step of this run's lineage, or takes the pin away.
    ///
    /// # Errors
    /// No such complete checkpoint, or the tier did not answer.
    pub fn pin(&self, step: u64, pinned: bool) -> Result<()> {
        self.check_open()?;
        self.inner.owner.pin(step, pinned)
    }
}
