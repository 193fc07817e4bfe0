//! A Python state tree as the core's `State`: what is a tensor becomes a view into its memory, all
//! else becomes a `Value`.
//!
//! It owns walking and refusing. It does not own copying, nor putting a state back (`tierkeep/
//! _restore.py`).
//!
//! # Invariants
//!
//! - What cannot come back as it was is an error that names its path: a subclass of a plain type,
//!   an object without `state_dict`, a cycle.
//! - Two places with one tensor (same memory, type, shape, strides) are stored once.
//! - A state that did not change since the last walk costs a few calls a tensor: what is known of a
//!   tensor is kept by its identity, and everything that can change under it is looked at again.
//! - torch and numpy are not imported here.

mod form;
mod instance;
mod jax;
mod leaf;
mod sharded;
mod walk;

use std::collections::{HashMap, HashSet};

use pyo3::{
    prelude::*,
    types::{PyDict, PyList, PyTuple},
};
use tierkeep::state::{
    Memory, Tensor,
    path::{self, Key},
    value::Value,
};

use self::{form::Known, sharded::KnownSharded, walk::Walk};
pub(crate) use self::{
    form::{Form, look},
    sharded::is_sharded,
};
use crate::{
    address::ByAddress,
    device::OnDevice,
    errors::{invalid, unstorable},
    guard::Owned,
};

/// What a walk may do, and what is asked of it.
#[derive(Default)]
pub(crate) struct Wishes<'a> {
    /// `module:QualName` of the types that may be pickled.
    pub(crate) allow_pickle: Option<&'a HashSet<String>>,
    /// The tensors that may be copied late.
    pub(crate) owned: Option<&'a Owned>,
    /// Who saves, where tensors say which ranks hold them.
    pub(crate) job: Option<Job<'a>>,
}

/// The ranks of a job.
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    /// This one.
    pub(crate) rank: u32,
    /// Those that save, rising.
    pub(crate) savers: &'a [u32],
}

/// What earlier walks learnt of tensors, by the identity of the Python object.
#[derive(Default)]
pub(crate) struct Cache {
    known: HashMap<usize, Known, ByAddress>,
    /// The same of tensors that are cut.
    sharded: HashMap<usize, KnownSharded, ByAddress>,
    /// How many the last walk found.
    tensors: usize,
}

impl Cache {
    /// Objects that died leave their entries: when most are dead, all go.
    fn tidy(&mut self, seen: usize) {
        self.tensors = seen;
        if self.known.len() > 2 * seen + 1024 {
            self.known.clear();
        }
        if self.sharded.len() > 2 * seen + 1024 {
            self.sharded.clear();
        }
    }
}

/// A state as it was found.
pub(crate) struct Walked {
    pub(crate) tree: Value,
    pub(crate) tensors: Vec<Tensor>,
    /// What must live until `save` returns: every tensor, whatever the script's other threads do to
    /// the state, and what was made for this walk alone.
    pub(crate) hold: Vec<Py<PyAny>>,
    /// What must live until the copy behind is done: the memory of late tensors.
    pub(crate) keep: Vec<Py<PyAny>>,
    /// Tensors that lie on a device, in the order of `tensors`.
    pub(crate) on_device: Vec<OnDevice>,
}

/// Walks `state`.
pub(crate) fn walk(
    state: &Bound<'_, PyAny>,
    cache: &mut Cache,
    wishes: &Wishes<'_>,
) -> PyResult<Walked> {
    let mut walk = Walk::new(state.py(), cache, wishes)?;
    let tree = walk.value(state)?;
    let walked = walk.done(tree);
    cache.tidy(walked.tensors.len());
    Ok(walked)
}

/// The typed JSON that a state's tree is stored as. For tests and the curious.
#[pyfunction]
#[pyo3(signature = (state, allow_pickle = HashSet::new()))]
pub(crate) fn encode_tree(
    state: &Bound<'_, PyAny>,
    allow_pickle: HashSet<String>,
) -> PyResult<String> {
    let wishes = Wishes { allow_pickle: Some(&allow_pickle), ..Wishes::default() };
    let walked = walk(state, &mut Cache::default(), &wishes)?;
    let mut json = Vec::new();
    let py = state.py();
    walked
        .tree
        .write_json(&mut json)
        .map_err(|e| unstorable(py, &e.path, e.problem.to_string()))?;
    String::from_utf8(json).map_err(|e| invalid(py, e.to_string()))
}

/// What a torch tensor or numpy array is: a dict of `dtype` (its name in manifests), `shape`,
/// `device`, `span` (the addresses of its first byte and the one after its last), `contiguous`, and
/// `writable` (it can be restored into).
#[pyfunction]
pub(crate) fn describe<'py>(tensor: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyDict>> {
    let py = tensor.py();
    let form = look(tensor)?.map_err(|why| invalid(py, why))?;
    let facts = PyDict::new(py);
    facts.set_item("dtype", form.dtype.name())?;
    facts.set_item("shape", PyTuple::new(py, &form.shape)?)?;
    facts.set_item("device", form.device.as_deref().unwrap_or("cpu"))?;
    facts.set_item("span", form.span)?;
    facts.set_item("contiguous", matches!(form.memory, Memory::Contiguous(_)))?;
    facts.set_item("writable", form.writable())?;
    Ok(facts)
}

/// A step of a path as Python sees it: a str, an int, or a tuple of one str, its typed JSON.
fn key_to_python<'py>(py: Python<'py>, key: &Key) -> PyResult<Bound<'py, PyAny>> {
    Ok(match key {
        Key::Str(text) => text.into_pyobject(py)?.into_any(),
        Key::Index(index) => index.into_pyobject(py)?.into_any(),
        Key::Other(json) => PyTuple::new(py, [json])?.into_any(),
    })
}

/// The keys that lead to the place with this escaped path.
#[pyfunction]
pub(crate) fn split_path<'py>(py: Python<'py>, path: &str) -> PyResult<Bound<'py, PyList>> {
    let keys = path::split(path)
        .ok_or_else(|| invalid(py, format!("{path:?} is not a path of a state tree")))?;
    let keys: PyResult<Vec<_>> = keys.iter().map(|key| key_to_python(py, key)).collect();
    PyList::new(py, keys?)
}

/// The escaped path of the place that these keys lead to; a key is anything that a dict may have.
#[pyfunction]
pub(crate) fn join_path(keys: &Bound<'_, PyAny>) -> PyResult<String> {
    let mut joined = Vec::new();
    for key in keys.try_iter()? {
        let key = key?;
        let mut cache = Cache::default();
        let value = walk(&key, &mut cache, &Wishes::default())?.tree;
        let key = value.as_key();
        joined.push(key.map_err(|e| unstorable(keys.py(), "a key", e.problem.to_string()))?);
    }
    Ok(path::join(&joined))
}
