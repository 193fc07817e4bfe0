//! Arrays of JAX, and nodes of its trees (`tierkeep/_jax.py`).

use pyo3::{
    intern,
    prelude::*,
    sync::PyOnceLock,
    types::{PyModule, PyString},
};
use tierkeep::state::value::{Lib, TensorRef, Value};

use super::walk::Walk;
use crate::types::{ml_dtype, numpy_dtype};

/// A function of `tierkeep._jax`.
fn helper<'py>(
    py: Python<'py>,
    cell: &'static PyOnceLock<Py<PyAny>>,
    name: &str,
) -> PyResult<Bound<'py, PyAny>> {
    let found = cell.get_or_try_init(py, || {
        PyModule::import(py, "tierkeep._jax")?.getattr(name).map(Bound::unbind)
    })?;
    Ok(found.bind(py).clone())
}

impl<'py> Walk<'_, 'py> {
    pub(super) fn is_jax(&self, object: &Bound<'py, PyAny>) -> PyResult<bool> {
        let Some(jax) = self.types.jax(self.py)? else { return Ok(false) };
        object.is_instance(jax.array.bind(self.py))
    }

    pub(super) fn jax_array(&mut self, array: &Bound<'py, PyAny>) -> PyResult<Value> {
        static LOOK: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        if self.hashed {
            return Err(self.refuse("a tensor cannot be stored in a key of a dict or in a set"));
        }
        let found = helper(self.py, &LOOK, "look")?.call1((array,)).map_err(|cause| {
            let error = self.refuse(cause.value(self.py).to_string());
            error.set_cause(self.py, Some(cause));
            error
        })?;
        self.lends = true;
        let value = self.lent(array, &found);
        self.lends = false;
        value
    }

    fn lent(&mut self, array: &Bound<'py, PyAny>, found: &Bound<'py, PyAny>) -> PyResult<Value> {
        let is_whole =
            self.numpy.is_some_and(|numpy| found.get_type().is(numpy.ndarray.bind(self.py)));
        if is_whole {
            let form = self.form(found, false)?;
            let name = self.plain(array, found, form);
            let tensor = TensorRef { name, lib: Lib::Jax, param: false, whole: None };
            return Ok(Value::Tensor(tensor));
        }
        let name = array.getattr(intern!(self.py, "dtype"))?.getattr(intern!(self.py, "name"))?;
        let name = name.cast_into::<PyString>()?.to_string();
        let dtype = numpy_dtype(&name).or_else(|| ml_dtype(&name));
        let dtype = dtype.ok_or_else(|| {
            self.refuse(format!("an array of {name}, which safetensors does not know"))
        })?;
        self.boxes_of(array, found, dtype, (Lib::Jax, false))
    }

    /// A node of a tree whose class is registered with JAX, as its children: it takes them back.
    pub(super) fn jax_node(&mut self, object: &Bound<'py, PyAny>) -> PyResult<Option<Value>> {
        static CHILDREN: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        if self.types.jax(self.py)?.is_none() {
            return Ok(None);
        }
        let rows = helper(self.py, &CHILDREN, "children")?.call1((object,))?;
        if rows.is_none() {
            return Ok(None);
        }
        let rows: Vec<(Bound<'py, PyAny>, Bound<'py, PyAny>)> = rows.extract()?;
        let value = self.inside(object, |walk| {
            let entries = walk.entries(rows.into_iter().map(Ok))?;
            Ok(Value::Object(Box::new(Value::Dict(entries))))
        });
        value.map(Some)
    }
}
