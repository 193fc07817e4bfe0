//! `Events`: what happened, pulled by a thread of Python's. It outlives its handle and does not hold
//! it.

use pyo3::{exceptions::PyStopIteration, prelude::*};
use tierkeep::observe::{Observer, Severity};

use crate::{save::check_pid, wait};

/// Severity (`info`, `warning`, `error`), a fixed word, one sentence, the step.
type Event = (&'static str, String, String, Option<u64>);

/// The events of one handle.
#[pyclass(module = "tierkeep._tierkeep", frozen)]
pub(crate) struct Events {
    observer: Observer,
    pid: u32,
}

impl Events {
    pub(crate) fn new(observer: Observer) -> Self {
        Self { observer, pid: std::process::id() }
    }
}

#[pymethods]
impl Events {
    /// The next event, waiting up to `timeout_s` seconds: (severity, kind, text, step), or `None`.
    /// Raises `StopIteration` after the last one of a closed handle.
    fn next(&self, py: Python<'_>, timeout_s: f64) -> PyResult<Option<Event>> {
        check_pid(py, self.pid, "Checkpointer")?;
        let timeout = wait::seconds(py, "timeout_s", timeout_s)?;
        let next = py.detach(|| self.observer.next(timeout));
        let event = next.map_err(|()| PyStopIteration::new_err(()))?;
        Ok(event.map(|event| {
            let severity = match event.severity {
                Severity::Info => "info",
                Severity::Warning => "warning",
                Severity::Error => "error",
            };
            (severity, event.kind.into_owned(), event.text, event.step)
        }))
    }
}
