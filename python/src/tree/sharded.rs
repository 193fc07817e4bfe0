//! A tensor of which this rank holds boxes (a `DTensor`): each becomes a tensor of its own, and the tree
//! names all that the ranks have (`path#`).
//!
//! # Invariants
//!
//! - Boxes of one place have the same name on every rank, whoever stores them.
//! - A tensor that says which ranks hold it is saved by some of them, or refused.

use std::sync::Arc;

use pyo3::{intern, prelude::*, sync::PyOnceLock, types::PyModule};
use tierkeep::state::{
    TensorSpec,
    boxes::{box_name, name_of_all},
    dtype::Dtype,
    value::{Lib, TensorRef, Value, Whole},
};

use super::{form::Form, walk::Walk};
use crate::types::Torch;

/// One tensor, as it was when it was looked at.
pub(super) struct KnownSharded {
    /// Its class: another object may have its place by now.
    class: usize,
    /// It is a `Parameter`.
    is_param: bool,
    /// What it is cut by; while the tensor has it, all else here stays.
    layout: Py<PyAny>,
    path: String,
    whole: Arc<Whole>,
    spec: Arc<TensorSpec>,
}

/// `tierkeep._sharded.Sharded`.
#[derive(FromPyObject)]
struct Sharded<'py> {
    shape: Vec<u64>,
    boxes: Vec<Box<'py>>,
    ranks: Vec<u32>,
    layout: Bound<'py, PyAny>,
}

/// `tierkeep._sharded.Box`.
#[derive(FromPyObject)]
struct Box<'py> {
    offset: Vec<u64>,
    local: Bound<'py, PyAny>,
    ranks: Vec<u32>,
}

/// Whether it is such a tensor.
pub(crate) fn is_sharded(tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
    tensor.get_type().hasattr(intern!(tensor.py(), "__create_chunk_list__"))
}

impl<'py> Walk<'_, 'py> {
    pub(super) fn sharded(&mut self, tensor: &Bound<'py, PyAny>, torch: &Torch) -> PyResult<Value> {
        let is_param = tensor.is_instance(torch.parameter.bind(self.py))?;
        static LOOK: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let look = LOOK.get_or_try_init(self.py, || {
            PyModule::import(self.py, "tierkeep._sharded")?.getattr("look").map(Bound::unbind)
        })?;
        let found = look.bind(self.py).call1((tensor,)).map_err(|cause| {
            let error = self.refuse(cause.value(self.py).to_string());
            error.set_cause(self.py, Some(cause));
            error
        })?;
        let dtype = self.dtype_of(tensor, torch)?;
        self.boxes_of(tensor, &found, dtype, (Lib::Torch, is_param))
    }

    /// Adds the boxes that were `found` of a tensor.
    pub(super) fn boxes_of(
        &mut self,
        tensor: &Bound<'py, PyAny>,
        found: &Bound<'py, PyAny>,
        dtype: Dtype,
        (lib, is_param): (Lib, bool),
    ) -> PyResult<Value> {
        let param = is_param && !self.in_module;
        let Sharded { shape, boxes, ranks, layout } = found.extract()?;
        let whole = Arc::new(Whole { dtype, shape });
        let mut forms = Vec::with_capacity(boxes.len());
        for found in boxes {
            let exact = self.is_exact_tensor(&found.local);
            let form = self.form(&found.local, exact)?;
            if form.dtype != dtype {
                return Err(self.refuse(format!("{dtype}, and what lies here is {}", form.dtype)));
            }
            forms.push((found, form));
        }
        let (path, tied) = self.path_of_forms(forms.iter().map(|(_, form)| form));
        for (found, form) in forms.into_iter().filter(|_| !tied) {
            let held_by = self.held_by(&found, &whole, &ranks)?;
            let spec = Arc::new(TensorSpec {
                name: box_name(&path, &found.offset).into(),
                dtype,
                shape: form.shape.clone(),
                part_of: Some((whole.shape.clone(), found.offset)),
                held_by,
            });
            if !layout.is_none() {
                let known = KnownSharded {
                    class: tensor.get_type_ptr() as usize,
                    is_param,
                    layout: layout.clone().unbind(),
                    path: path.clone(),
                    whole: whole.clone(),
                    spec: spec.clone(),
                };
                self.remember_sharded(tensor, known);
            }
            self.add(tensor, &found.local, form, spec);
        }
        Ok(leaf(&path, (lib, param), whole))
    }

    /// As it was at the last walk, in the same place. `None` for all that is no such tensor, or was not
    /// there then.
    pub(super) fn known_sharded(&mut self, tensor: &Bound<'py, PyAny>) -> PyResult<Option<Value>> {
        let py = self.py;
        let (Some(torch), Some(known)) = (self.torch, self.sharded_known(tensor)) else {
            return Ok(None);
        };
        if known.class != tensor.get_type_ptr() as usize
            || !self.is_here(&known.path)
            || self.hashed
            || !tensor.getattr(intern!(py, "_spec"))?.is(known.layout.bind(py))
        {
            return Ok(None);
        }
        let param = known.is_param && !self.in_module;
        let (spec, whole, path) = (known.spec.clone(), known.whole.clone(), known.path.clone());
        let local = tensor.getattr(intern!(py, "_local_tensor"))?;
        if !local.get_type().is(torch.tensor.bind(py)) {
            return Ok(None);
        }
        let form = self.form(&local, true)?;
        if (form.dtype, &form.shape) != (spec.dtype, &spec.shape) || self.tied(&form).is_some() {
            return Ok(None);
        }
        self.add(tensor, &local, form, spec);
        Ok(Some(leaf(&path, (Lib::Torch, param), whole)))
    }

    /// The path that boxes with these forms are stored under: where they are met for the first time; true:
    /// they were, by another name.
    fn path_of_forms<'f>(&self, forms: impl Iterator<Item = &'f Arc<Form>>) -> (String, bool) {
        for form in forms {
            if let Some(index) = self.tied(form) {
                let (path, is_box) = tierkeep::state::boxes::path_of(self.name_of(index));
                if is_box {
                    return (path.to_owned(), true);
                }
            }
        }
        (self.place_name(), false)
    }

    /// The ranks that hold a box alike, those of them that save.
    fn held_by(&self, found: &Box<'_>, whole: &Whole, all: &[u32]) -> PyResult<Vec<u32>> {
        let Some(job) = self.wishes.job else { return Ok(found.ranks.clone()) };
        if found.ranks.is_empty() {
            return Ok(Vec::new());
        }
        if !found.ranks.contains(&job.rank) {
            return Err(self.refuse(format!(
                "it lies on ranks {:?} of its job, this handle's rank is {}: leave rank= out",
                found.ranks, job.rank
            )));
        }
        let is_whole = found.offset.iter().all(|o| *o == 0) && found.ranks.len() == all.len();
        let savers = |ranks: &[u32]| -> Vec<u32> {
            ranks.iter().copied().filter(|rank| job.savers.contains(rank)).collect()
        };
        if !is_whole && savers(all).len() < all.len() {
            return Err(self.refuse(format!(
                "its parts ({:?} in all) lie on ranks {all:?}, of which only {:?} save: leave ranks= out",
                whole.shape,
                savers(all)
            )));
        }
        Ok(savers(&found.ranks))
    }

    fn dtype_of(&self, tensor: &Bound<'py, PyAny>, torch: &Torch) -> PyResult<Dtype> {
        let dtype = tensor.getattr(intern!(self.py, "dtype"))?;
        torch.dtype_of(&dtype).ok_or_else(|| {
            self.refuse(format!("a tensor of {dtype}, which safetensors does not know"))
        })
    }
}

fn leaf(path: &str, (lib, param): (Lib, bool), whole: Arc<Whole>) -> Value {
    let name = name_of_all(path).into();
    Value::Tensor(TensorRef { name, lib, param, whole: Some(whole) })
}
