//! `Found`: one rank's shard of a checkpoint that can be read, and its way into live memory.

use std::collections::{BTreeMap, HashMap};

use pyo3::{
    prelude::*,
    types::{PyDict, PyTuple},
};
use tierkeep::{
    Error,
    manifest::TensorEntry,
    restore::{read::Restorable, reading::Reading},
    snapshot::copy::Memory as CopyMemory,
    state::{Memory, value::Value},
};

use crate::{
    errors::{exception, invalid},
    tree::look,
    untree::marked,
    wait,
};

/// What one rank gets back of one checkpoint.
#[pyclass(module = "tierkeep._tierkeep", frozen)]
pub(crate) struct Found {
    core: Restorable,
}

impl Found {
    pub(crate) fn new(core: Restorable) -> Self {
        Self { core }
    }
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
        let value = Value::decode(&self.core.manifest().tree).map_err(|e| {
            let file = format!("the tree of {}", self.core.key);
            exception(py, &Error::Damaged { file, why: e.to_string() })
        })?;
        marked(py, &value)
    }

    /// Its tensors: a dict from name to (dtype as in safetensors, shape).
    #[getter]
    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let table = PyDict::new(py);
        for tensor in self.core.tensors() {
            let shape = PyTuple::new(py, &tensor.shape)?;
            table.set_item(&tensor.name, (&tensor.dtype, shape))?;
        }
        Ok(table)
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

    /// Copies each named tensor into the torch tensor or numpy array beside it, which has its type
    /// and shape, lies on the CPU and shares no memory with another of its part. A part is filled
    /// before the next one is asked for. Returns the tier that most bytes came from, and a sentence
    /// for each damaged copy.
    #[pyo3(signature = (parts, threads = None))]
    fn read(
        &self,
        py: Python<'_>,
        parts: &Bound<'_, PyAny>,
        threads: Option<usize>,
    ) -> PyResult<(String, Vec<String>)> {
        let table: HashMap<_, _> = self.core.tensors().map(|t| (t.name.as_str(), t)).collect();
        let mut reading = Reading::of(self.core.clone());
        for part in parts.try_iter()? {
            let targets: Vec<(String, Bound<'_, PyAny>)> = part?.extract()?;
            let mut memory = HashMap::with_capacity(targets.len());
            let mut owners = Vec::with_capacity(targets.len());
            for (name, target) in targets {
                let place = self.place(py, &name, &target, table.get(name.as_str()).copied())?;
                memory.insert(name, place);
                owners.push(target.unbind());
            }
            reading = wait::apart(py, move || {
                // SAFETY: each target was looked at by `place`: its memory has the tensor's bytes
                // and is writable. `owners` keeps it alive; `_restore.py` gives each memory once,
                // and the caller of `restore` does not touch the state until it returns.
                let filled = unsafe { reading.fill(&memory, threads) };
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
        let form = look(target)?.map_err(refuse)?;
        if form.dtype.name() != entry.dtype || form.shape != entry.shape {
            return Err(refuse(format!(
                "saved as {} {:?}, to be read into {} {:?}",
                entry.dtype, entry.shape, form.dtype, form.shape
            )));
        }
        if form.device.is_some() || !form.writable() {
            return Err(refuse("it cannot be written to".into()));
        }
        match form.memory {
            Memory::Contiguous(address) => Ok(CopyMemory::Bytes(address)),
            Memory::Strided(strided) => Ok(CopyMemory::Strided(strided)),
            Memory::InSlot => Err(refuse("a tensor without memory".into())),
        }
    }
}
