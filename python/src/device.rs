//! Tensors of a CUDA device on their way into a slot: the core's words, said to
//! `tierkeep._cuda.Stager`, which knows torch.
//!
//! # Invariants
//!
//! - The GIL is taken here while the core may hold locks: nothing calls the core with the GIL held
//!   but for what takes no lock of the arena or the cascade.

use pyo3::{prelude::*, types::PyList};
use tierkeep::{
    Error, Result,
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
            let pin = || -> PyResult<bool> {
                let stager = self.stager.bind(py);
                stager.call_method1("pin", (&self.device, start, len))?.extract()
            };
            pin().unwrap_or_else(|e| {
                e.write_unraisable(py, Some(self.stager.bind(py)));
                false
            })
        });
        pinned.unwrap_or(false)
    }

    fn unpin(&self, start: usize) {
        // Without an interpreter the process is at its end, and CUDA with it.
        Python::try_attach(|py| {
            if let Err(e) = self.stager.bind(py).call_method1("unpin", (start,)) {
                e.write_unraisable(py, Some(self.stager.bind(py)));
            }
        });
    }
}

/// The tensors of one save that lie on a device: their places in the state's tensors, and whether
/// they may be copied late.
pub(crate) struct Bringing {
    pub(crate) stager: Py<PyAny>,
    pub(crate) tensors: Vec<OnDevice>,
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
        attached("copy tensors from their device", |py| {
            let mut rows = Vec::with_capacity(places.len());
            for place in places {
                let found = self.tensors.binary_search_by_key(&place.tensor, |t| t.index);
                let row = found.map(|at| &self.tensors[at]).map_err(|_| {
                    crate::errors::invalid(py, "a tensor that changed its device during the save")
                })?;
                rows.push((row.tensor.bind(py), place.offset, place.len, row.late));
            }
            let rows = PyList::new(py, rows)?;
            let landing = self.stager.bind(py).call_method1("bring", (slot, len, rows))?;
            Ok(Box::new(Landed(landing.unbind())) as Box<dyn Landing>)
        })
    }
}

struct Landed(Py<PyAny>);

impl Landing for Landed {
    fn wait(&mut self, upto: usize) -> Result<()> {
        attached("wait for the device", |py| {
            self.0.bind(py).call_method1("wait", (upto,)).map(drop)
        })
    }
}

fn attached<T>(what: &str, work: impl FnOnce(Python<'_>) -> PyResult<T>) -> Result<T> {
    let failed = |why: String| Error::Io { what: what.into(), source: std::io::Error::other(why) };
    match Python::try_attach(|py| work(py).map_err(|e| e.value(py).to_string())) {
        Some(done) => done.map_err(failed),
        None => Err(failed("the interpreter is at its end".into())),
    }
}
