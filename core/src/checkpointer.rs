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
    sync::{
        Arc, LazyLock, Mutex, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use crate::{
    agree::Agreements,
    attempt::AttemptRecord,
    begin::{Begin, begin},
    cascade::{Cascade, Parts, Shard},
    chunk::CHUNK_BYTES,
    clock::{Deadline, SharedClock, SystemClock},
    commit::Listing,
    config::Config,
    error::{Error, Result},
    manifest::Meta,
    names::{Id, Rank, Step},
    observe::{Observer, locked},
    ownership::{FileId, Ownership},
    place::Place,
    restore::{read::Restorable, survey::ShardCopy},
    save::Save,
    signal::Signal,
    snapshot::{
        arena::Arena,
        budget::Budget,
        device::{Bring, Pin},
        layout::Layout,
        slot::SlotPayload,
    },
    state::{State, Tensor, TensorSpec},
    tier::{Tier, TierKind, disk::DiskTier, memory::MemoryTier, wrap::Retried},
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

struct Running {
    record: AttemptRecord,
    cascade: Arc<Cascade>,
    thread: JoinHandle<()>,
    /// The thread has nothing more to do.
    over: Arc<AtomicBool>,
}

struct Inner {
    place: Place,
    ownership: Ownership,
    /// Held by the leader: others find its record by it.
    start_lock: Option<Ownership>,
    running: Mutex<Option<Running>>,
    /// Decisions begun so far; held while one is made.
    decisions: Mutex<u32>,
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
    /// The thread that makes the slots ready, if there was one.
    preparing: Mutex<Option<JoinHandle<()>>>,
    /// To the thread that copies behind, once there is one.
    copier: Mutex<Option<mpsc::Sender<taking::Work>>>,
    pid: u32,
}

/// One rank's handle on a run. Clones are the same handle.
#[derive(Clone)]
pub struct Checkpointer {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Checkpointer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let config = &self.inner.place.config;
        f.debug_struct("Checkpointer")
            .field("destination", &config.destination)
            .field("rank", &config.rank)
            .finish_non_exhaustive()
    }
}

/// The handles of this process by their rank's lock: a second one stops the first before it touches
/// the slots.
static HANDLES: LazyLock<Mutex<HashMap<FileId, Weak<Inner>>>> = LazyLock::new(Mutex::default);

/// How many past saves keep their handle: a second `save` of an older step than that is an error.
const SAVES_KEPT: usize = 64;

impl Checkpointer {
    /// Takes the rank: opens the tiers and the locks. Nothing is recorded yet.
    ///
    /// # Errors
    /// A place cannot be used, or another live process has the rank.
    pub fn open(config: Config) -> Result<Self> {
        Self::open_wrapped(config, &|tier| tier)
    }

    /// [`open`](Self::open) with something put around each tier: faults in tests, a limit, a meter.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_wrapped(
        config: Config,
        wrap: &dyn Fn(Arc<dyn Tier>) -> Arc<dyn Tier>,
    ) -> Result<Self> {
        config.check()?;
        let clock: SharedClock = Arc::new(SystemClock);
        let disk = DiskTier::open(&config.destination)?;
        let budget = Budget::open(&config.ram_root, config.ram_bytes_max)?;
        let ram = wrap(Arc::new(MemoryTier::open(&config.ram_dir(), budget.clone())?));
        let lock = config.destination.join(format!("_locks/rank-{:06}", config.rank));
        let ownership = Ownership::take_over(
            &lock,
            &format!("rank {} of {}", config.rank, config.destination.display()),
            config.lock_wait,
            &*clock,
        )?;
        let first = locked(&HANDLES).get(&ownership.id()).and_then(Weak::upgrade);
        if let Some(first) = first.filter(|f| f.pid == std::process::id()) {
            first.taken_over()?;
        }
        disk.sweep(Rank(config.rank), true)?;
        let disk = wrap(Arc::new(Retried::new(disk, clock.clone())));
        let signal = Arc::new(Signal::default());
        let arena = Arena::new(
            ram.clone(),
            config.ram_dir(),
            Rank(config.rank),
            config.slots,
            budget,
            signal.clone(),
        );
        arena.adopt()?;
        let start = config.attempt_id.map_or_else(Id::random, Ok)?;
        let observer = Observer::default();
        let nonce = Id::random()?;
        let closed = AtomicBool::new(false);
        let place =
            Place { ram, disk, arena, observer, clock, signal, closed, start, nonce, config };
        let start_lock = if place.config.leads() { Some(place.start_lock()?) } else { None };
        let id = ownership.id();
        let inner = Arc::new(Inner {
            place,
            ownership,
            start_lock,
            running: Mutex::new(None),
            decisions: Mutex::new(0),
            saves: Mutex::new(BTreeMap::new()),
            layout: Mutex::new(None),
            told_unused: AtomicBool::new(false),
            stopping: Mutex::default(),
            copying: AtomicUsize::new(0),
            copying_host: AtomicUsize::new(0),
            publishing: AtomicUsize::new(0),
            preparing: Mutex::new(None),
            copier: Mutex::new(None),
            pid: std::process::id(),
        });
        locked(&HANDLES).insert(id, Arc::downgrade(&inner));
        Ok(Self { inner })
    }

    /// Decides, or learns, where this attempt begins, and records and claims it. `None`: at step 0.
    /// Called again in a running process (a rollback), it begins a new attempt.
    ///
    /// # Errors
    /// A tier did not answer, rank 0's record did not come, the rank is claimed, or the shard of
    /// the decided step has no good copy here.
    pub fn begin(&self, how: &Begin) -> Result<Option<Restorable>> {
        self.check_open(true)?;
        let mut decisions = locked(&self.inner.decisions);
        let place = &self.inner.place;
        // Until the new decision is recorded the old attempt goes on.
        let started = begin(place, how, *decisions)?;
        *decisions += 1;
        self.inner.quiet(place.config.slot_wait)?;
        let old = locked(&self.inner.running).take();
        if let Some(old) = old {
            old.stop(place, Vec::new(), None, place.config.slot_wait)?;
        }
        let keep = started.record.parent.map(|p| p.key());
        if place.config.saves() {
            place.arena.trim(keep.as_ref())?;
        } else {
            place.arena.give_back()?; // Of an attempt in which this rank did save.
        }
        locked(&self.inner.saves).clear();
        let restorable = started.restorable.map(|mut found| {
            found.slot = place.arena.find(&found.key);
            found
        });
        let waits = match &keep {
            Some(key) => !Listing::of(&*place.disk, key)?.sealed,
            None => false,
        };
        let resumed = restorable.as_ref().filter(|_| waits).and_then(resumed_shard);
        let mut running = locked(&self.inner.running);
        // Closing says so first and takes what runs after: nothing starts behind its back.
        place.check_closed()?;
        *running = Some(self.run(started.record, waits, resumed)?);
        Ok(restorable)
    }

    fn run(
        &self,
        record: AttemptRecord,
        parent_waits: bool,
        resumed: Option<Shard>,
    ) -> Result<Running> {
        let place = &self.inner.place;
        let lone = place.config.is_lone();
        let agreements = Agreements::new(&place.config.destination, &record.attempt, lone);
        let parts = Parts {
            config: place.config.clone(),
            record: record.clone(),
            ram: place.ram.clone(),
            disk: place.disk.clone(),
            agreements,
            observer: place.observer.clone(),
            clock: place.clock.clone(),
            signal: place.signal.clone(),
        };
        let cascade = Cascade::new(parts, parent_waits, resumed);
        let runner = cascade.clone();
        let over = Arc::new(AtomicBool::new(false));
        let told = over.clone();
        let signal = place.signal.clone();
        let thread = std::thread::Builder::new()
            .name("tierkeep-disk".into())
            .spawn(move || {
                runner.run();
                told.store(true, Ordering::Release);
                signal.notify();
            })
            .map_err(|source| Error::Io { what: "start the disk tier's thread".into(), source })?;
        Ok(Running { record, cascade, thread, over })
    }

    /// Makes the slots for a state of this form and puts their pages in place, behind. A rank that
    /// does not save has none.
    ///
    /// # Errors
    /// [`Error::Budget`] with the sum, at once; a replicated tensor lies on a device.
    pub fn prepare(&self, tensors: &[Tensor]) -> Result<()> {
        self.check_open(false)?;
        if !self.config().saves() {
            return Ok(());
        }
        let layout = self.layout(tensors.iter().map(|t| &t.spec))?;
        layout.check_memory(tensors)?;
        let (arena, observer) = (self.inner.place.arena.clone(), self.inner.place.observer.clone());
        arena.check_budget(layout.len)?;
        let mut preparing = locked(&self.inner.preparing);
        self.inner.place.check_closed()?;
        let before = preparing.take();
        let work = move || {
            // One after the other: two at once would take each other's slots for busy.
            if let Some(before) = before
                && before.join().is_err()
            {
                observer.error("prepare_failed", None, "the thread that prepares slots panicked");
            }
            if let Err(e) = arena.prepare(layout.len)
                && !matches!(e, Error::Fenced { .. })
            {
                observer.warn(
                    "prepare_failed",
                    None,
                    format!("slots were not prepared: {}", e.chain()),
                );
            }
        };
        let spawned = std::thread::Builder::new().name("tierkeep-prepare".into()).spawn(work);
        *preparing =
            Some(spawned.map_err(|source| Error::Io { what: "start a thread".into(), source })?);
        Ok(())
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
        self.check_open(false)?;
        let (_, cascade) = self.running()?;
        cascade.agreements().init(wish)
    }

    /// Slots are made known to a device from here on: before they are used, or at the next
    /// [`prepare`](Self::prepare).
    pub fn pin_with(&self, pin: Arc<dyn Pin>) {
        self.inner.place.arena.pin_with(pin);
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
        self.inner.check_pid()?;
        let place = &self.inner.place;
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

    fn running(&self) -> Result<(AttemptRecord, Arc<Cascade>)> {
        if let Some(running) = locked(&self.inner.running).as_ref() {
            return Ok((running.record.clone(), running.cascade.clone()));
        }
        // The first save without `restore`: right on a new run, an error on any other.
        self.begin(&Begin { only_new: true, ..Begin::default() })?;
        self.running()
    }

    /// `begins`: a new attempt, which may have been recorded by a rank that was quicker.
    fn check_open(&self, begins: bool) -> Result<()> {
        self.inner.check_pid()?;
        let superseded = !self.inner.ownership.is_current();
        let fenced = locked(&self.inner.running)
            .as_ref()
            .is_some_and(|r| r.cascade.is_fenced() && !(begins && r.cascade.is_fenced_by_us()));
        if superseded || fenced {
            let why = if superseded {
                ending::TAKEN_OVER
            } else {
                "a newer attempt has taken over this run"
            };
            return Err(Error::Fenced { why: why.into() });
        }
        self.inner.place.check_closed()
    }

    /// Events and counters.
    #[must_use]
    pub fn observer(&self) -> &Observer {
        &self.inner.place.observer
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.inner.place.config
    }

    /// The id of this process start: rank 0's, given to the others, makes them one attempt.
    #[must_use]
    pub fn start_id(&self) -> Id {
        self.inner.place.start
    }

    /// The attempt, once begun.
    #[must_use]
    pub fn attempt(&self) -> Option<AttemptRecord> {
        locked(&self.inner.running).as_ref().map(|r| r.record.clone())
    }

    /// The tiers, nearest first.
    #[must_use]
    pub fn tiers(&self) -> Vec<Arc<dyn Tier>> {
        vec![self.inner.place.ram.clone(), self.inner.place.disk.clone()]
    }

    /// Pins a step of this run's lineage, or takes the pin away.
    ///
    /// # Errors
    /// No such complete checkpoint, or the tier did not answer.
    pub fn pin(&self, step: u64, pinned: bool) -> Result<()> {
        self.check_open(false)?;
        crate::reader::Reader::of(self.tiers()).pin(Step(step), None, pinned)
    }
}

impl Inner {
    fn check_pid(&self) -> Result<()> {
        if self.pid == std::process::id() {
            return Ok(());
        }
        Err(Error::Fenced {
            why: format!(
                "this Checkpointer belongs to process {}: it does nothing in a forked child",
                self.pid
            ),
        })
    }
}

/// The shard that an attempt resumes from, if it lies in a slot of this process.
fn resumed_shard(found: &Restorable) -> Option<Shard> {
    let in_ram = |c: &&ShardCopy| found.tiers[c.tier].kind() == TierKind::Ram;
    let copy = found.copies.iter().find(in_ram)?;
    let payload = &copy.manifest.payload;
    if payload.chunk_bytes != CHUNK_BYTES {
        return None; // Of another build: it is checked in its chunks, and goes with the next save.
    }
    Some(Shard {
        key: found.key.clone(),
        identity: copy.manifest.identity.clone(),
        payload: SlotPayload { slot: found.slot.clone()?, len: payload.length },
        manifest: copy.bytes.clone(),
        save: Save::new(found.key.step.0),
        published: true,
        complete: false,
        resumed: true,
        chunks: payload.chunks.clone(),
    })
}
