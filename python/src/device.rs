//! Tensors of a CUDA device on their way into a slot: the core's words, said to
//! `tierkeep._cuda.Stager`, which knows torch.
//!
//! # Invariants
//!
//! - The GIL is taken here while the core may hold locks: nothing calls the core with the GIL held
//!   but for what takes no lock of the arena or the cascade.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::{
    exceptions::{PyException, PyKeyboardInterrupt},
    ffi,
    prelude::*,
    types::PyList,
};
use tierkeep::{
    Error, Result,
    names::Step,
    snapshot::device::{Bring, Landing, Pin, Placement},
};

/// Registers slots with CUDA.
#[derive(Debug)]
pub(crate) struct Pins {
    pub(crate) stager: Py<PyAny>,
    /// A device of this process, as torch writes it.
    pub(crate) device: String,
}

impl Pin for Pins {
    fn pin(&self, start: usize, len: usize) -> bool {
        let pinned = Python::try_attach(|py| {
            let stager = self.stager.bind(py);
            let pin = || stager.call_method1("pin", (&self.device, start, len))?.extract();
            pin().unwrap_or_else(|e: PyErr| {
                if e.is_instance_of::<PyKeyboardInterrupt>(py) {
                    // Whoever looks for signals next hears it.
                    // SAFETY: it sets a flag.
                    unsafe { ffi::PyErr_SetInterrupt() };
                } else {
                    e.write_unraisable(py, Some(stager));
                }
                true // It may be: `unpin` takes back what is there.
            })
        });
        pinned.unwrap_or(false)
    }

    fn unpin(&self, start: usize) -> bool {
        // Without an interpreter the process is at its end, and CUDA with it.
        let unpinned = Python::try_attach(|py| {
            let stager = self.stager.bind(py);
            let unpin = || stager.call_method1("unpin", (&self.device, start))?.extract();
            unpin().unwrap_or_else(|e: PyErr| {
                e.write_unraisable(py, Some(stager));
                false
            })
        });
        unpinned.unwrap_or(false)
    }
}

/// The tensors of one save that lie on a device.
pub(crate) struct Bringing {
    pub(crate) stager: Py<PyAny>,
    pub(crate) tensors: Vec<OnDevice>,
    pub(crate) heard: Heard,
}

/// One tensor of a device.
pub(crate) struct OnDevice {
    /// Its index in the state's tensors; they rise.
    pub(crate) index: usize,
    pub(crate) tensor: Py<PyAny>,
    pub(crate) late: bool,
}

impl Bring for Bringing {
    fn begin(
        self: Box<Self>,
        slot: usize,
        len: usize,
        places: &[Placement],
    ) -> Result<Box<dyn Landing>> {
        let Self { stager, tensors, heard } = *self;
        let begin = |py: Python<'_>| {
            let mut rows = Vec::with_capacity(places.len());
            for place in places {
                let found = tensors.binary_search_by_key(&place.tensor, |t| t.index);
                let row = found.map(|at| &tensors[at]).map_err(|_| {
                    crate::errors::invalid(py, "a tensor that changed its device during the save")
                })?;
                rows.push((row.tensor.bind(py), place.offset, place.len, row.late));
            }
            let rows = PyList::new(py, rows)?;
            Ok(stager.bind(py).call_method1("bring", (slot, len, rows))?.unbind())
        };
        let landing = heard.attached(begin)?;
        Ok(Box::new(Landed { landing, heard }))
    }
}

struct Landed {
    landing: Py<PyAny>,
    heard: Heard,
}

impl Landing for Landed {
    fn wait(&mut self, upto: usize) -> Result<()> {
        let wait = |py: Python<'_>| self.landing.bind(py).call_method1("wait", (upto,)).map(drop);
        self.heard.attached(wait)
    }
}

/// What Python raised in one save and is no error of it: Ctrl-C, `sys.exit` in a signal's handler.
/// The save is over then, and who called it is told.
#[derive(Clone)]
pub(crate) struct Heard {
    pub(crate) step: u64,
    pub(crate) raised: Arc<Mutex<Option<PyErr>>>,
}

impl Heard {
    fn attached<T>(&self, work: impl FnOnce(Python<'_>) -> PyResult<T>) -> Result<T> {
        let failed = |why: String| Error::Io {
            what: "copy tensors from their device".into(),
            source: std::io::Error::other(why),
        };
        let done = Python::try_attach(|py| {
            work(py).map_err(|e| {
                if e.is_instance_of::<PyException>(py) {
                    return failed(e.value(py).to_string());
                }
                let mut raised = self.raised.lock().unwrap_or_else(PoisonError::into_inner);
                *raised = Some(e);
                Error::Skipped { step: Step(self.step), why: "the save was interrupted".into() }
            })
        });
        done.unwrap_or_else(|| Err(failed("the interpreter is at its end".into())))
    }
}
