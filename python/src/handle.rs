//! `Handle`: the core's `Checkpointer` for Python. What people see is `tierkeep.Checkpointer`,
//! around it.
//!
//! # Invariants
//!
//! - In a forked child nothing of the core is called, not even its end: another thread may have held
//!   any lock at the moment of the fork.
//! - The state's memory is held by references until the copy is done.

use std::{
    collections::{BTreeMap, HashSet},
    ffi::OsString,
    mem::ManuallyDrop,
    path::PathBuf,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use pyo3::{
    intern,
    prelude::*,
    types::{PyDict, PyList},
};
use tierkeep::{
    begin::Begin,
    bucket::Bucket,
    checkpointer::{Checkpointer, SaveRequest},
    config::{Config, nearest_saver},
    manifest::Meta,
    names::{Id, Step},
    observe::{Event, Severity},
    reader::Reader as CoreReader,
    restore::decide::Wish,
    snapshot::device::Bring,
    state::{State, replicas::Rule},
    tier::object::address::Options,
};

use crate::{
    device::{Bringing, Heard, Pins},
    errors::{Raise, invalid},
    events::Events,
    found::Found,
    guard::Owned,
    reader::Reader,
    save::{Save, check_pid},
    tree::{Cache, Job, Walked, Wishes, walk},
    wait,
};

/// A copy that takes longer has met something that will not end.
const FENCE: Duration = Duration::from_secs(600);

/// One rank's handle on a run.
#[pyclass(module = "tierkeep._tierkeep", frozen)]
pub(crate) struct Handle {
    core: ManuallyDrop<Checkpointer>,
    cache: Mutex<Cache>,
    allow_pickle: HashSet<String>,
    /// `tierkeep._cuda.Stager`.
    stager: Py<PyAny>,
    /// A tensor on a device was met, and slots are pinned.
    pins: OnceLock<()>,
    /// Whoever closed it has said how long to wait.
    closing: AtomicBool,
    pid: u32,
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.pid != std::process::id() {
            return;
        }
        let closing = self.closing.load(Ordering::Relaxed);
        // SAFETY: nobody uses it after this.
        let core = unsafe { ManuallyDrop::take(&mut self.core) };
        // Its end waits for its threads: not with the GIL.
        let mut core = Some(core);
        let _ = Python::try_attach(|py| {
            let core = core.take();
            // Nor before the copy that is being taken behind: its guard goes with us.
            py.detach(|| {
                if !closing {
                    let _ = core.as_ref().map(|core| core.fence(FENCE));
                }
                drop(core);
            });
        });
        drop(core);
    }
}

impl Handle {
    fn check_pid(&self, py: Python<'_>) -> PyResult<()> {
        check_pid(py, self.pid, "Checkpointer")
    }

    fn walk(&self, state: &Bound<'_, PyAny>, owned: Option<&Owned>) -> PyResult<Walked> {
        let py = state.py();
        // A lock that is waited for with the GIL held would wait for ever.
        let Ok(mut cache) = self.cache.try_lock() else {
            return Err(invalid(py, "another call is walking the state at this moment"));
        };
        let config = self.core.config();
        let job = Some(Job { rank: config.rank, savers: &config.savers });
        let wishes = Wishes { allow_pickle: Some(&self.allow_pickle), owned, job };
        let walked = walk(state, &mut cache, &wishes)?;
        drop(cache);
        if let Some(first) = walked.on_device.first()
            && self.pins.get().is_none()
        {
            let device = first.tensor.bind(py).getattr(intern!(py, "device"))?.str()?.to_string();
            let stager = self.stager.clone_ref(py);
            self.core.pin_with(Arc::new(Pins { stager, device }));
            let _ = self.pins.set(());
        }
        Ok(walked)
    }
}

/// The settings that Python gives, over the environment's and the defaults.
/// What it says of the agent is returned.
fn configure(config: &mut Config, settings: &Bound<'_, PyDict>) -> PyResult<Option<OsString>> {
    let py = settings.py();
    let (mut agent, mut bucket) = (None, ForBucket::default());
    for (name, value) in settings {
        if value.is_none() {
            continue;
        }
        let name: String = name.extract()?;
        let seconds = || wait::seconds(py, &name, value.extract()?);
        match name.as_str() {
            "rank" => config.rank = value.extract()?,
            "world_size" => config.world = value.extract()?,
            "savers" => config.savers = value.extract()?,
            "replicated" => {
                let rules: Vec<(String, Vec<u32>)> = value.extract()?;
                let rule = |(pattern, ranks)| Rule { pattern, ranks };
                config.replicated = rules.into_iter().map(rule).collect();
            }
            "attempt_id" => {
                let text: String = value.extract()?;
                config.attempt_id = Some(Id::parse(&text).ok_or_else(|| {
                    invalid(py, "attempt_id: 32 hex digits, as uuid.uuid4().hex gives them")
                })?);
            }
            "agent" => agent = Some(value.extract::<PathBuf>()?.into_os_string()),
            "ram_dir" => config.ram_root = std::path::absolute(value.extract::<PathBuf>()?)?,
            "ram_bytes_max" => config.ram_bytes_max = Some(value.extract()?),
            "slots" => config.slots = value.extract()?,
            "disk_every" => config.disk_every = value.extract()?,
            "keep_last" => config.keep_last = value.extract()?,
            "keep_every" => config.keep_every = Some(value.extract()?),
            "threads" => config.threads = Some(value.extract()?),
            "lock_wait_s" => config.lock_wait = seconds()?,
            "attempt_wait_s" => config.attempt_wait = seconds()?,
            "slot_wait_s" => config.slot_wait = seconds()?,
            "disk_wait_s" => config.disk_wait = seconds()?,
            "replicas" => config.replicas = Some(value.extract()?),
            "peer_wait_s" => config.peer_wait = seconds()?,
            "object" => bucket.url = Some(value.extract()?),
            "storage_options" => bucket.options = value.extract()?,
            "object_every" => bucket.every = Some(value.extract()?),
            "object_keep_last" => bucket.keep_last = Some(value.extract()?),
            "object_keep_every" => bucket.keep_every = Some(value.extract()?),
            "object_bytes_per_second_max" => bucket.bytes_per_second_max = Some(value.extract()?),
            "object_compress" => bucket.compress = Some(value.extract()?),
            "object_every_minutes" => bucket.every_minutes = Some(value.extract()?),
            "object_keep_hours" => bucket.keep_hours = Some(value.extract()?),
            "object_grace_s" => bucket.grace = Some(seconds()?),
            "object_wait_s" => bucket.wait = Some(seconds()?),
            _ => return Err(invalid(py, format!("unknown setting {name}"))),
        }
    }
    let through = if config.is_bucket_only() { 1 } else { config.disk_every };
    config.bucket = bucket.over(through).raise(py)?;
    Ok(agent)
}

/// What Python says of the bucket; the rest is the environment's.
#[derive(Default)]
struct ForBucket {
    url: Option<String>,
    options: Options,
    every: Option<u64>,
    keep_last: Option<usize>,
    keep_every: Option<u64>,
    bytes_per_second_max: Option<u64>,
    compress: Option<bool>,
    every_minutes: Option<u64>,
    keep_hours: Option<u64>,
    grace: Option<Duration>,
    wait: Option<Duration>,
}

impl ForBucket {
    fn over(self, disk_every: u64) -> tierkeep::Result<Option<Bucket>> {
        let Some(url) = self.url else { return Ok(None) };
        let given = Bucket::new(&url, disk_every)?;
        Ok(Some(Bucket {
            options: self.options,
            every: self.every.unwrap_or(given.every),
            keep_last: self.keep_last.unwrap_or(given.keep_last),
            keep_every: self.keep_every.or(given.keep_every),
            bytes_per_second_max: self.bytes_per_second_max.or(given.bytes_per_second_max),
            compress: self.compress.unwrap_or(given.compress),
            every_minutes: self.every_minutes.or(given.every_minutes),
            keep_hours: self.keep_hours.or(given.keep_hours),
            grace: self.grace.unwrap_or(given.grace),
            wait: self.wait.unwrap_or(given.wait),
            ..given
        }))
    }
}

#[pymethods]
impl Handle {
    /// Takes a rank of the run at `destination`. `stager` brings tensors of devices to the host.
    #[new]
    fn open(
        py: Python<'_>,
        destination: PathBuf,
        settings: &Bound<'_, PyDict>,
        allow_pickle: HashSet<String>,
        stager: Py<PyAny>,
    ) -> PyResult<Self> {
        let mut config = Config::new(&destination).raise(py)?;
        let agent = configure(&mut config, settings)?;
        config.check().raise(py)?;
        let core = wait::apart(py, move || Checkpointer::find(config, agent.as_deref()))?;
        Ok(Self {
            core: ManuallyDrop::new(core),
            cache: Mutex::default(),
            allow_pickle,
            stager,
            pins: OnceLock::new(),
            closing: AtomicBool::new(false),
            pid: std::process::id(),
        })
    }

    /// The settings in force: a dict.
    #[getter]
    fn settings<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let config = self.core.config();
        let settings = PyDict::new(py);
        settings.set_item("destination", config.destination.as_os_str())?;
        settings.set_item("rank", config.rank)?;
        settings.set_item("world_size", config.world)?;
        settings.set_item("savers", &config.savers)?;
        let rules = config.replicated.iter().map(|rule| (&rule.pattern, &rule.ranks));
        settings.set_item("replicated", rules.collect::<Vec<_>>())?;
        settings.set_item("ram_dir", config.ram_dir().as_os_str())?;
        settings.set_item("ram_bytes_max", config.ram_bytes_max)?;
        settings.set_item("slots", config.slots)?;
        settings.set_item("disk_every", config.disk_every)?;
        settings.set_item("keep_last", config.keep_last)?;
        settings.set_item("keep_every", config.keep_every)?;
        settings.set_item("replicas", config.replicas)?;
        if let Some(bucket) = &config.bucket {
            settings.set_item("object", &bucket.url)?;
            settings.set_item("object_every", bucket.every)?;
            settings.set_item("object_keep_last", bucket.keep_last)?;
            settings.set_item("object_keep_every", bucket.keep_every)?;
            settings.set_item("object_bytes_per_second_max", bucket.bytes_per_second_max)?;
        }
        settings.set_item("threads", config.threads)?;
        settings.set_item("agent", config.agent.as_ref().map(|socket| socket.as_os_str()))?;
        settings.set_item("attempt_id", self.core.start_id().to_string())?;
        Ok(settings)
    }

    /// Whose shard this rank restores: its own where it saves.
    #[getter]
    fn shard_rank(&self) -> u32 {
        let config = self.core.config();
        nearest_saver(&config.savers, config.rank)
    }

    /// The number of the attempt, once it has begun.
    #[getter]
    fn attempt(&self, py: Python<'_>) -> PyResult<Option<u32>> {
        self.check_pid(py)?;
        let core = self.core();
        Ok(py.detach(move || core.attempt()).map(|record| record.attempt.number))
    }

    /// Decides where this attempt begins and records it; the shard to restore, or `None`. `how` is
    /// `"newest"`, `"older"` (take an older checkpoint where a tier does not answer), `"rollback"`,
    /// `"fresh"` (at step 0), or `"new"` (at step 0, and only where nothing is there).
    #[pyo3(signature = (how, step = None, attempt = None))]
    fn begin(
        &self,
        py: Python<'_>,
        how: &str,
        step: Option<u64>,
        attempt: Option<u32>,
    ) -> PyResult<Option<Found>> {
        self.check_pid(py)?;
        let mut begin = Begin {
            wish: Wish { step: step.map(Step), attempt, accept_older: false },
            ..Begin::default()
        };
        match how {
            "newest" => {}
            "older" => begin.wish.accept_older = true,
            "rollback" => begin.rollback = true,
            "fresh" => begin.fresh = true,
            "new" => begin.only_new = true,
            other => return Err(invalid(py, format!("how = {other:?}"))),
        }
        let core = self.core();
        let found = wait::apart(py, move || core.begin(&begin))?;
        Ok(found.map(Found::new))
    }

    /// Sizes the slots for a state of this form, and puts their pages in place behind.
    fn prepare(&self, state: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = state.py();
        self.check_pid(py)?;
        if !self.core.config().saves() {
            return Ok(());
        }
        // Only looked at: no byte of them is read.
        let tensors = self.walk(state, None)?.tensors;
        let core = self.core();
        py.detach(move || core.prepare(&tensors)).raise(py)
    }

    /// Which checkpoint of another run all ranks begin with: `wish`, unless another was first.
    fn agree_on_init(&self, py: Python<'_>, wish: String) -> PyResult<String> {
        self.check_pid(py)?;
        let core = self.core();
        wait::apart(py, move || core.agree_on_init(&wish))
    }

    /// Tells what the state was initialised with, among the events.
    fn tell_init(&self, py: Python<'_>, text: String) -> PyResult<()> {
        self.check_pid(py)?;
        let kind = "initialised".into();
        self.core.observer().tell(Event { severity: Severity::Info, kind, text, step: Some(0) });
        Ok(())
    }

    /// Saves; a rank that does not save does not look at the state. `meta` is (metrics, tags);
    /// `guarded`, the optimizers that wait for the copy, or `None` to copy everything before
    /// returning.
    fn save(
        &self,
        step: u64,
        state: &Bound<'_, PyAny>,
        meta: (BTreeMap<String, f64>, Vec<String>),
        skip_if_busy: bool,
        guarded: Option<&Bound<'_, PyList>>,
    ) -> PyResult<Save> {
        let py = state.py();
        self.check_pid(py)?;
        let owned = guarded.map(Owned::of).transpose()?;
        let walked = if self.core.config().saves() {
            self.walk(state, owned.as_ref())?
        } else {
            self.walk(py.None().bind(py), None)?
        };
        let Walked { tree, tensors, hold, keep, on_device } = walked;
        let (metrics, tags) = meta;
        let raised: Arc<Mutex<Option<PyErr>>> = Arc::default();
        let heard = Heard { step, raised: raised.clone() };
        let stager = self.stager.clone_ref(py);
        let bring = (!on_device.is_empty())
            .then(|| Box::new(Bringing { stager, tensors: on_device, heard }) as Box<dyn Bring>);
        let request = SaveRequest {
            step,
            state: State { tree, tensors },
            meta: Meta { metrics, tags, saved_unix_ms: 0 },
            overlap: owned.is_some(),
            bring,
            skip_if_busy,
            keep_alive: Box::new(keep),
            interrupted: Some(Box::new({
                let raised = raised.clone();
                move || {
                    Python::attach(|py| match py.check_signals() {
                        Ok(()) => false,
                        Err(e) => {
                            *raised.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
                            true
                        }
                    })
                }
            })),
        };
        let core = self.core();
        // SAFETY: `hold` keeps every tensor until this returns, and `keep` the memory of those that
        // are copied later. Nobody writes to the state meanwhile but the owners of late tensors, who
        // wait (`guard`); threads of the script's own are told not to by `Save`'s documentation.
        let saved = py.detach(move || unsafe { core.save(request) }).raise(py);
        drop(hold);
        if let Some(e) = raised.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(e);
        }
        let saved = saved?;
        let config = self.core.config();
        Ok(Save::new(saved, config.rank, config.disk_every))
    }

    /// Waits until no copy is being taken behind; false: not within `timeout_s` seconds.
    fn fence(&self, py: Python<'_>, timeout_s: f64) -> PyResult<bool> {
        self.check_pid(py)?;
        let timeout = wait::seconds(py, "timeout_s", timeout_s)?;
        let core = self.core();
        wait::poll(py, timeout, |slice| core.fence(slice))
    }

    /// [`fence`](Self::fence) for tensors in memory of the host: those on a device may still be read.
    fn fence_host(&self, py: Python<'_>, timeout_s: f64) -> PyResult<bool> {
        self.check_pid(py)?;
        let timeout = wait::seconds(py, "timeout_s", timeout_s)?;
        let core = self.core();
        wait::poll(py, timeout, |slice| core.fence_host(slice))
    }

    /// Whether the job stops after `step`, the newest completed one; `asked`: this process is to.
    fn stop_requested(&self, py: Python<'_>, step: u64, every: u64, asked: bool) -> bool {
        let core = self.core();
        py.detach(move || core.stop_requested(step, every, asked))
    }

    /// Closes, once what is on its way has arrived (`now`: without waiting for disk); false: not
    /// within `timeout_s` seconds, and it is still open. `failed`: an agent keeps what is in RAM.
    #[pyo3(signature = (timeout_s, now, failed=false))]
    fn close(&self, py: Python<'_>, timeout_s: f64, now: bool, failed: bool) -> PyResult<bool> {
        self.check_pid(py)?;
        let timeout = wait::seconds(py, "timeout_s", timeout_s)?;
        self.closing.store(true, Ordering::Relaxed);
        let core = self.core();
        wait::poll(py, timeout, |slice| match failed {
            true => core.close_failed(slice),
            false => core.close(slice, now),
        })
    }

    /// Pins a step, or takes its pin away.
    fn pin(&self, py: Python<'_>, step: u64, pinned: bool) -> PyResult<()> {
        self.check_pid(py)?;
        let core = self.core();
        wait::apart(py, move || core.pin(step, pinned))
    }

    /// The tiers of the run, for reading.
    fn reader(&self, py: Python<'_>) -> PyResult<Reader> {
        self.check_pid(py)?;
        Ok(Reader::new(CoreReader::of(self.core.tiers())))
    }

    /// What happens to this handle, one event after the other.
    fn events(&self, py: Python<'_>) -> PyResult<Events> {
        self.check_pid(py)?;
        Ok(Events::new(self.core.observer().clone()))
    }

    /// Sums since the handle was opened: a dict.
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.check_pid(py)?;
        let now = &self.core.observer().counters;
        let sums = PyDict::new(py);
        for (name, counter) in [
            ("saves", &now.saves),
            ("saves_failed", &now.saves_failed),
            ("saves_skipped", &now.saves_skipped),
            ("captured_bytes", &now.captured_bytes),
            ("peer_bytes", &now.peer_bytes),
            ("peer_whole", &now.peer_whole),
            ("peer_failed", &now.peer_failed),
            ("peer_refused", &now.peer_refused),
            ("peer_fetched_bytes", &now.peer_fetched_bytes),
            ("disk_bytes", &now.disk_bytes),
            ("disk_sealed", &now.disk_sealed),
            ("disk_passed_over", &now.disk_passed_over),
            ("object_bytes", &now.object_bytes),
            ("object_sealed", &now.object_sealed),
            ("object_passed_over", &now.object_passed_over),
            ("object_failed", &now.object_failed),
            ("object_fetched_bytes", &now.object_fetched_bytes),
            ("checksum_failures", &now.checksum_failures),
            ("repairs", &now.repairs),
        ] {
            sums.set_item(name, counter.load(Ordering::Relaxed))?;
        }
        for (name, counter) in [
            ("stall_seconds", &now.stall_ns),
            ("peer_seconds", &now.peer_ns),
            ("disk_seconds", &now.disk_ns),
            ("object_seconds", &now.object_ns),
        ] {
            let time = Duration::from_nanos(counter.load(Ordering::Relaxed));
            sums.set_item(name, time.as_secs_f64())?;
        }
        Ok(sums)
    }
}

impl Handle {
    fn core(&self) -> Checkpointer {
        Checkpointer::clone(&self.core)
    }
}
