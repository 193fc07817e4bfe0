//! `Save`: one checkpoint on its way out, as Python sees it.

use pyo3::prelude::*;
use tierkeep::{
    Error, Result,
    save::{self, Level},
};

use crate::{
    errors::{Raise, exception, invalid},
    wait,
};

/// A wait without a timeout ends here all the same: an hour is longer than any tier takes before
/// it reports a failure of its own.
const TIMEOUT_SECONDS: f64 = 3600.0;

/// Numbers of one save, as they were when they were asked for.
#[pyclass(module = "tierkeep", frozen, get_all)]
pub(crate) struct Progress {
    /// Completed training steps.
    step: u64,
    /// This process.
    rank: u32,
    /// Bytes of this rank's shard.
    bytes: u64,
    /// Sent to other nodes so far, all copies together.
    peer_bytes: u64,
    /// Of them, written to disk so far.
    disk_bytes: u64,
    /// Of them, sent to the bucket so far.
    object_bytes: u64,
    /// The state may be changed again.
    staged: bool,
    /// The whole checkpoint survives the process.
    ram: bool,
    /// The whole checkpoint survives the loss of nodes: other nodes hold copies of every rank's shard.
    peer: bool,
    /// The whole checkpoint survives a reboot.
    disk: bool,
    /// The whole checkpoint survives the cluster: it is sealed in the bucket.
    object: bool,
    /// Why nothing was saved, where the step was passed over.
    skipped: Option<String>,
    /// The first failure, with its causes.
    error: Option<String>,
    /// Nothing more will change.
    done: bool,
}

#[pymethods]
impl Progress {
    fn __repr__(&self) -> String {
        format!(
            "Progress(step={}, bytes={}, peer_bytes={}, disk_bytes={}, object_bytes={}, staged={}, ram={}, \
             peer={}, disk={}, object={})",
            self.step,
            self.bytes,
            self.peer_bytes,
            self.disk_bytes,
            self.object_bytes,
            python_bool(self.staged),
            python_bool(self.ram),
            python_bool(self.peer),
            python_bool(self.disk),
            python_bool(self.object)
        )
    }
}

fn python_bool(x: bool) -> &'static str {
    if x { "True" } else { "False" }
}

/// One checkpoint on its way out. Returned by `Checkpointer.save`.
#[pyclass(module = "tierkeep", frozen)]
pub(crate) struct Save {
    core: save::Save,
    rank: u32,
    disk_every: u64,
    pid: u32,
}

impl Save {
    pub(crate) fn new(core: save::Save, rank: u32, disk_every: u64) -> Self {
        Self { core, rank, disk_every, pid: std::process::id() }
    }

    fn check_pid(&self, py: Python<'_>) -> PyResult<()> {
        check_pid(py, self.pid, "Save")
    }

    fn until(
        &self,
        py: Python<'_>,
        level: Level,
        own: bool,
        timeout_s: Option<f64>,
    ) -> PyResult<()> {
        self.check_pid(py)?;
        let timeout = wait::seconds(py, "timeout_s", timeout_s.unwrap_or(TIMEOUT_SECONDS))?;
        let core = self.core.clone();
        if wait::poll(py, timeout, |slice| core.poll(level, own, slice))? {
            return Ok(());
        }
        let missing = Some(self.core.waiting_for()).filter(|who| !who.is_empty());
        let error = Error::Deadline {
            what: match level {
                Level::Staged => format!("the copy of step {}", self.core.step()),
                Level::Peer => format!("copies of step {} on other nodes", self.core.step()),
                _ => format!("step {} in the {} tier", self.core.step(), level.name()),
            },
            seconds: timeout.as_secs_f64(),
            missing: missing.map_or_else(String::new, |who| format!(": missing {who}")),
        };
        Err(exception(py, &error))
    }

    /// `self.core.poll` of a level that is there or not: never waits.
    pub(crate) fn now(&self, level: Level) -> Result<bool> {
        self.core.poll(level, false, std::time::Duration::ZERO)
    }
}

/// A fork's child has neither the threads that would answer nor the locks in a known state.
pub(crate) fn check_pid(py: Python<'_>, pid: u32, what: &str) -> PyResult<()> {
    if pid == std::process::id() {
        return Ok(());
    }
    let why = format!("this {what} belongs to process {pid}: it does nothing in a forked child");
    Err(exception(py, &Error::Fenced { why }))
}

#[pymethods]
impl Save {
    /// Completed training steps.
    #[getter]
    fn step(&self) -> u64 {
        self.core.step()
    }

    /// Its step is one of those that go to disk.
    #[getter]
    fn is_due_for_disk(&self) -> bool {
        self.core.is_due_for_disk()
    }

    /// Its step is one of those that go to the bucket.
    #[getter]
    fn is_due_for_object(&self) -> bool {
        self.core.is_due_for_object()
    }

    /// Waits until the copy is taken: from then on the state may be changed in place.
    #[pyo3(signature = (timeout_s = None))]
    fn staged(slf: Py<Self>, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<Py<Self>> {
        slf.get().until(py, Level::Staged, false, timeout_s)?;
        Ok(slf)
    }

    /// Waits until the checkpoint (every rank's shard) is as durable as `level` says; with
    /// `scope="shard"`, this rank's shard alone.
    #[pyo3(signature = (level, timeout_s = None, scope = "checkpoint"))]
    fn wait(
        slf: Py<Self>,
        py: Python<'_>,
        level: &str,
        timeout_s: Option<f64>,
        scope: &str,
    ) -> PyResult<Py<Self>> {
        let this = slf.get();
        let level = parse_level(py, level)?;
        let own = match scope {
            "checkpoint" => false,
            "shard" => true,
            other => {
                let why = format!("scope = {other:?}: it is \"checkpoint\" or \"shard\"");
                return Err(invalid(py, why));
            }
        };
        if level == Level::Disk && !this.is_due_for_disk() && !this.now(Level::Disk).raise(py)? {
            return Err(invalid(
                py,
                format!(
                    "step {} does not go to disk: disk_every = {}",
                    this.core.step(),
                    this.disk_every
                ),
            ));
        }
        this.until(py, level, own, timeout_s)?;
        Ok(slf)
    }

    /// The numbers now.
    fn progress(&self, py: Python<'_>) -> PyResult<Progress> {
        self.check_pid(py)?;
        let now = self.core.progress();
        let disk_is_open = self.is_due_for_disk() && matches!(self.now(Level::Disk), Ok(false));
        let peer_is_open =
            self.core.is_due_for_peers() && matches!(self.now(Level::Peer), Ok(false));
        let object_is_open =
            self.is_due_for_object() && matches!(self.now(Level::Object), Ok(false));
        let ram_is_open = matches!(self.now(Level::Ram), Ok(false));
        Ok(Progress {
            step: self.core.step(),
            rank: self.rank,
            bytes: now.bytes,
            peer_bytes: now.peer_bytes,
            // The last block is padded.
            disk_bytes: now.disk_bytes.min(now.bytes),
            // What had to be sent again counts once.
            object_bytes: now.object_bytes.min(now.bytes),
            staged: now.staged,
            ram: now.ram,
            peer: now.peer,
            disk: now.disk,
            object: now.object,
            skipped: now.skipped,
            error: now.error,
            done: !disk_is_open && !peer_is_open && !object_is_open && !ram_is_open,
        })
    }

    fn __repr__(&self) -> String {
        let step = self.core.step();
        if self.pid != std::process::id() {
            return format!("Save(step={step}, of process {})", self.pid);
        }
        let now = self.core.progress();
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        if let Some(why) = now.skipped {
            return format!("Save(step={step}, skipped: {why})");
        }
        let size = mib(now.bytes);
        let reached = [("disk", now.disk), ("peer", now.peer), ("object", now.object)];
        let reached = reached.iter().filter(|(_, there)| *there);
        let reached: Vec<String> = reached.map(|(level, _)| format!("\"{level}\"")).collect();
        let durable = match reached.split_last() {
            None if now.ram => "\"ram\"".into(),
            None => "None".into(),
            Some((last, [])) => last.clone(),
            Some((last, first)) => format!("{} and {last}", first.join(", ")),
        };
        if now.disk || now.object {
            return format!("Save(step={step}, durable={durable}, {size:.1} MiB)");
        }
        let on_its_way = |tier: &str, bytes: u64| {
            let done = mib(bytes.min(now.bytes));
            format!("Save(step={step}, durable={durable}, {tier} {done:.1}/{size:.1} MiB)")
        };
        match now.error {
            Some(error) => format!("Save(step={step}, durable={durable}, failed: {error})"),
            None if !now.staged => format!("Save(step={step}, durable=None, copying)"),
            None if self.is_due_for_disk() => on_its_way("disk", now.disk_bytes),
            None if self.is_due_for_object() => on_its_way("bucket", now.object_bytes),
            None => format!("Save(step={step}, durable={durable}, {size:.1} MiB)"),
        }
    }
}

fn parse_level(py: Python<'_>, level: &str) -> PyResult<Level> {
    match level {
        "staged" => Ok(Level::Staged),
        "ram" => Ok(Level::Ram),
        "disk" => Ok(Level::Disk),
        "peer" => Ok(Level::Peer),
        "object" => Ok(Level::Object),
        other => {
            let why = format!("level = {other:?}: it is \"ram\", \"peer\", \"disk\" or \"object\"");
            Err(invalid(py, why))
        }
    }
}
