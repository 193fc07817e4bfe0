//! A stored tree as Python sees it before it becomes a state: plain values as they are, everything
//! whose type must be looked up, or that holds children, as a mark of `tierkeep._saved`.
//!
//! Nothing here imports a module or runs code that the checkpoint names.

use pyo3::{
    prelude::*,
    sync::PyOnceLock,
    types::{PyBytes, PyComplex, PyDict, PyFloat, PyInt, PyList, PyModule, PyTuple},
};
use tierkeep::state::value::Value;

use crate::errors::exception;

static MARKS: PyOnceLock<Py<PyModule>> = PyOnceLock::new();

/// Makes the marks of one tree.
struct Marks<'py> {
    py: Python<'py>,
    module: Bound<'py, PyModule>,
}

/// `value` with its marks.
pub(crate) fn marked<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    let module = MARKS.get_or_try_init(py, || {
        Ok::<_, PyErr>(PyModule::import(py, "tierkeep._saved")?.unbind())
    })?;
    Marks { py, module: module.bind(py).clone() }.value(value)
}

/// The marked tree that this typed JSON encodes.
#[pyfunction]
pub(crate) fn decode_tree<'py>(py: Python<'py>, json: &str) -> PyResult<Bound<'py, PyAny>> {
    let json = pyo3_json(py, json)?;
    let value = Value::decode(&json).map_err(|e| damaged(py, e.to_string()))?;
    marked(py, &value)
}

fn pyo3_json(py: Python<'_>, json: &str) -> PyResult<serde_json::Value> {
    serde_json::from_str(json).map_err(|e| damaged(py, e.to_string()))
}

fn damaged(py: Python<'_>, why: String) -> PyErr {
    exception(py, &tierkeep::Error::Damaged { file: "the tree".into(), why })
}

impl<'py> Marks<'py> {
    fn mark<A>(&self, class: &str, arguments: A) -> PyResult<Bound<'py, PyAny>>
    where
        A: pyo3::call::PyCallArgs<'py>,
    {
        self.module.getattr(class)?.call1(arguments)
    }

    fn value(&self, value: &Value) -> PyResult<Bound<'py, PyAny>> {
        let py = self.py;
        Ok(match value {
            Value::None => py.None().into_bound(py),
            Value::Bool(x) => x.into_pyobject(py)?.to_owned().into_any(),
            Value::Int(x) => x.into_pyobject(py)?.into_any(),
            Value::BigInt(x) => py.get_type::<PyInt>().call1((x.text(), 16))?,
            Value::Float(bits) => PyFloat::new(py, f64::from_bits(*bits)).into_any(),
            Value::Complex(re, im) => {
                PyComplex::from_doubles(py, f64::from_bits(*re), f64::from_bits(*im)).into_any()
            }
            Value::Str(text) => text.into_pyobject(py)?.into_any(),
            Value::SurrogateStr(text) => {
                PyBytes::new(py, text.bytes()).call_method1("decode", ("utf-8", "surrogatepass"))?
            }
            Value::Bytes(bytes) => PyBytes::new(py, bytes).into_any(),
            Value::List(items) => self.list(items)?.into_any(),
            Value::Tuple(items) => self.list(items)?.to_tuple().into_any(),
            Value::Set(items) => self.mark("Set", ("set", self.list(items)?))?,
            Value::FrozenSet(items) => self.mark("Set", ("frozenset", self.list(items)?))?,
            Value::Deque { maxlen, items } => self.mark("Deque", (maxlen, self.list(items)?))?,
            Value::Dict(entries) => self.mapping("dict", entries, None)?,
            Value::OrderedDict(entries) => self.mapping("OrderedDict", entries, None)?,
            Value::Counter(entries) => self.mapping("Counter", entries, None)?,
            Value::DefaultDict { factory, entries } => {
                self.mapping("defaultdict", entries, factory.as_deref())?
            }
            Value::NamedTuple { type_name, fields } => {
                self.mark("NamedTuple", (type_name, self.fields(fields)?))?
            }
            Value::Dataclass { type_name, fields } => {
                self.mark("Dataclass", (type_name, self.fields(fields)?))?
            }
            Value::Enum { type_name, name } => self.mark("Enum", (type_name, name))?,
            Value::NumpyScalar { dtype, bytes } => {
                self.mark("NumpyScalar", (dtype, PyBytes::new(py, bytes)))?
            }
            Value::TorchDtype(name) => self.mark("TorchDtype", (name,))?,
            Value::TorchSize(dims) => self.mark("TorchSize", (PyTuple::new(py, dims)?,))?,
            Value::TorchDevice(name) => self.mark("TorchDevice", (name,))?,
            Value::Path(text) => PyModule::import(py, "pathlib")?.call_method1("Path", (text,))?,
            Value::Object(state) => self.mark("Object", (self.value(state)?,))?,
            Value::Tensor(tensor) => {
                self.mark("Tensor", (&*tensor.name, tensor.lib.name(), tensor.param))?
            }
            Value::Pickle(bytes) => self.mark("Pickle", (PyBytes::new(py, bytes),))?,
        })
    }

    fn list(&self, items: &[Value]) -> PyResult<Bound<'py, PyList>> {
        let items: PyResult<Vec<_>> = items.iter().map(|item| self.value(item)).collect();
        PyList::new(self.py, items?)
    }

    fn mapping(
        &self,
        kind: &str,
        entries: &[(Value, Value)],
        factory: Option<&str>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let rows: PyResult<Vec<_>> =
            entries.iter().map(|(key, value)| Ok((self.value(key)?, self.value(value)?))).collect();
        self.mark("Mapping", (kind, PyList::new(self.py, rows?)?, factory))
    }

    fn fields(&self, fields: &[(String, Value)]) -> PyResult<Bound<'py, PyDict>> {
        let rows = PyDict::new(self.py);
        for (name, value) in fields {
            rows.set_item(name, self.value(value)?)?;
        }
        Ok(rows)
    }
}
