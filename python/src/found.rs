//! `Found`: what one rank gets back of a checkpoint, and its way into live memory.

use std::{
    collections::{BTreeMap, HashMap},
    sync::OnceLock,
};

use pyo3::{
    prelude::*,
    types::{PyDict, PyTuple},
};
use tierkeep::{
    Error,
    manifest::TensorEntry,
    names::Rank,
    restore::{parts::Wanted, read::Restorable, reading::Reading},
    snapshot::{copy::Memory as CopyMemory, strided::Address},
    state::{
        Memory,
        boxes::{Region, name_of_all, path_of},
        value::Value,
    },
};

use crate::{
    errors::{exception, invalid},
    tree::{Form, look},
    untree::marked,
    wait,
};

/// What one rank gets back of one checkpoint.
#[pyclass(module = "tierkeep._tierkeep", frozen)]
pub(crate) struct Found {
    core: Restorable,
    tree: OnceLock<Value>,
}

impl Found {
    pub(crate) fn new(core: Restorable) -> Self {
        Self { core, tree: OnceLock::new() }
    }

    fn value(&self, py: Python<'_>) -> PyResult<&Value> {
        if let Some(tree) = self.tree.get() {
            return Ok(tree);
        }
        let value = Value::decode(&self.core.manifest().tree).map_err(|e| {
            let file = format!("the tree of {}", self.core.key);
            exception(py, &Error::Damaged { file, why: e.to_string() })
        })?;
        Ok(self.tree.get_or_init(|| value))
    }
}

/// What is to be filled: `str`, a tensor of this rank's by its name; or `tierkeep._build.Part`, a box of a
/// tensor: (its name, its shape, the box's offset and size, the rank that has it or `None`).
#[derive(FromPyObject)]
enum Key {
    Whole(String),
    Part(String, Vec<u64>, Vec<u64>, Vec<u64>, Option<u32>),
}

#[pymethods]
impl Found {
    /// Completed training steps.
    #[getter]
    fn step(&self) -> u64 {
        self.core.step().0
    }

    /// The number of the attempt that saved it.
    #[getter]
    fn attempt(&self) -> u32 {
        self.core.key.attempt.number
    }

    /// The tree, with marks of `tierkeep._saved` where something must still be made.
    #[getter]
    fn tree<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        marked(py, self.value(py)?)
    }

    /// The rank whose shard it is.
    #[getter]
    fn rank(&self) -> u32 {
        self.core.rank.0
    }

    /// The other ranks that saved the checkpoint.
    #[getter]
    fn other_ranks(&self) -> Vec<u32> {
        let savers = &self.core.manifest().identity.savers;
        savers.iter().copied().filter(|rank| *rank != self.core.rank.0).collect()
    }

    /// Their shards.
    fn others(&self, py: Python<'_>) -> PyResult<Vec<Self>> {
        let (core, ranks) = (self.core.clone(), self.other_ranks());
        let ranks: Vec<Rank> = ranks.into_iter().map(Rank).collect();
        let found = wait::apart(py, move || core.find_rest(&ranks))?;
        Ok(found.into_iter().map(Self::new).collect())
    }

    /// Its tensors: a dict from name to (dtype as in safetensors, shape). Of one that is cut, the whole, as
    /// the tree names it (`path#`).
    #[getter]
    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let table = PyDict::new(py);
        for tensor in self.core.tensors().filter(|tensor| !path_of(&tensor.name).1) {
            let shape = PyTuple::new(py, &tensor.shape)?;
            table.set_item(&tensor.name, (&tensor.dtype, shape))?;
        }
        let places = self.value(py)?.tensors();
        let places = places.map_err(|e| {
            let file = format!("the tree of {}", self.core.key);
            exception(py, &Error::Damaged { file, why: e.to_string() })
        })?;
        for (_, tensor) in places {
            if let Some(whole) = &tensor.whole {
                let shape = PyTuple::new(py, &whole.shape)?;
                table.set_item(&*tensor.name, (whole.dtype.name(), shape))?;
            }
        }
        Ok(table)
    }

    /// The boxes in it: (the name of all of the tensor's, `path#`; offset; shape).
    #[getter]
    fn boxes(&self) -> Vec<(String, Vec<u64>, Vec<u64>)> {
        let boxes = self.core.tensors().filter(|tensor| path_of(&tensor.name).1);
        let row = |tensor: &TensorEntry| {
            let Region { offset, shape } = tensor.region();
            (name_of_all(path_of(&tensor.name).0), offset, shape)
        };
        boxes.map(row).collect()
    }

    /// Its tensors that other ranks store: a dict from name to rank.
    #[getter]
    fn elsewhere(&self) -> BTreeMap<&str, u32> {
        let manifest = self.core.manifest();
        let elsewhere = manifest.replicated.iter().flat_map(|r| r.elsewhere(self.core.rank.0));
        elsewhere.map(|tensor| (tensor.name.as_str(), tensor.saver)).collect()
    }

    /// What the user said when saving: a dict of `metrics`, `tags` and `saved_unix_ms`.
    #[getter]
    fn meta<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let said = &self.core.manifest().meta;
        let meta = PyDict::new(py);
        let metrics = PyDict::new(py);
        for (name, value) in &said.metrics {
            metrics.set_item(name, value)?;
        }
        meta.set_item("metrics", metrics)?;
        meta.set_item("tags", PyTuple::new(py, &said.tags)?)?;
        meta.set_item("saved_unix_ms", said.saved_unix_ms)?;
        Ok(meta)
    }

    /// Copies each named tensor, or part of one, into the torch tensor or numpy array beside it, which has
    /// its type and shape, lies on the CPU and shares no memory with another of its turn. A turn is filled
    /// before the next one is asked for. Returns the tier that most bytes came from, and a sentence
    /// for each damaged copy.
    #[pyo3(signature = (turns, threads = None))]
    fn read(
        &self,
        py: Python<'_>,
        turns: &Bound<'_, PyAny>,
        threads: Option<usize>,
    ) -> PyResult<(String, Vec<String>)> {
        let table: HashMap<_, _> = self.core.tensors().map(|t| (t.name.as_str(), t)).collect();
        let mut reading = Reading::of(self.core.clone());
        for turn in turns.try_iter()? {
            let targets: Vec<(Key, Bound<'_, PyAny>)> = turn?.extract()?;
            let (mut wholes, mut parts) = (HashMap::with_capacity(targets.len()), Vec::new());
            let mut owners = Vec::with_capacity(targets.len());
            for (key, target) in targets {
                match key {
                    Key::Whole(name) => {
                        let entry = table.get(name.as_str()).copied();
                        wholes.insert(name.clone(), self.place(py, &name, &target, entry)?);
                    }
                    Key::Part(name, shape, offset, size, rank) => {
                        let form = place_in(py, &name, &target)?;
                        if form.shape != size {
                            let why = format!("{name}: a box of {size:?} into {:?}", form.shape);
                            return Err(invalid(py, why));
                        }
                        parts.push(wanted(form, (name, shape), offset, rank));
                    }
                }
                owners.push(target.unbind());
            }
            reading = wait::apart(py, move || {
                // SAFETY: each target was looked at by `place_in`: its memory has the tensor's bytes
                // and is writable. `owners` keeps it alive; `_restore.py` gives each memory once,
                // and the caller of `restore` does not touch the state until it returns.
                let filled = unsafe {
                    let filled = reading.fill(&wholes, threads);
                    filled.and_then(|()| reading.fill_parts(&parts, threads))
                };
                drop(owners);
                filled.map(|()| reading)
            })?;
        }
        let report = wait::apart(py, move || Ok(reading.finish()))?;
        Ok((report.tier.to_string(), report.damaged))
    }
}

impl Found {
    /// The memory of a target, if the tensor fits there.
    fn place(
        &self,
        py: Python<'_>,
        name: &str,
        target: &Bound<'_, PyAny>,
        entry: Option<&TensorEntry>,
    ) -> PyResult<CopyMemory> {
        let refuse = |why: String| invalid(py, format!("{name}: {why}"));
        let entry = entry.ok_or_else(|| refuse("the checkpoint has no such tensor".into()))?;
        let form = place_in(py, name, target)?;
        if form.dtype.name() != entry.dtype || form.shape != entry.shape {
            return Err(refuse(format!(
                "saved as {} {:?}, to be read into {} {:?}",
                entry.dtype, entry.shape, form.dtype, form.shape
            )));
        }
        match form.memory {
            Memory::Contiguous(address) => Ok(CopyMemory::Bytes(address)),
            Memory::Strided(strided) => Ok(CopyMemory::Strided(strided)),
            Memory::InSlot => Err(refuse("a tensor without memory".into())),
        }
    }
}

/// What a target is, if it can be filled.
fn place_in(py: Python<'_>, name: &str, target: &Bound<'_, PyAny>) -> PyResult<Form> {
    let refuse = |why: String| invalid(py, format!("{name}: {why}"));
    let form = look(target)?.map_err(refuse)?;
    if form.device.is_some() || !form.writable() {
        return Err(refuse("it cannot be written to".into()));
    }
    Ok(form)
}

/// A part of the named tensor of this shape.
fn wanted(
    form: Form,
    (name, shape): (String, Vec<u64>),
    offset: Vec<u64>,
    rank: Option<u32>,
) -> Wanted {
    let start = Address::new(std::ptr::with_exposed_provenance_mut(form.start));
    let region = Region { offset, shape: form.shape };
    let (dtype, strides) = (form.dtype, form.strides);
    Wanted { name, rank: rank.map(Rank), dtype, shape, region, start, strides }
}
