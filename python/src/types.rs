//! Python's types that the walk knows, looked up once.
//!
//! torch and numpy are never imported from here: a script that uses them has done so, and
//! for one that does not, their import would be most of its start.

use pyo3::{
    prelude::*,
    sync::PyOnceLock,
    types::{PyDict, PyModule, PyType},
};
use tierkeep::state::dtype::Dtype;

use crate::glance::Glancer;

/// safetensors' name, torch's name, numpy's name ("" where there is none).
///
/// The commonest first: they are searched in this order.
const DTYPES: [(Dtype, &str, &str); 21] = [
    (Dtype::F32, "float32", "float32"),
    (Dtype::BF16, "bfloat16", ""),
    (Dtype::F16, "float16", "float16"),
    (Dtype::I64, "int64", "int64"),
    (Dtype::U8, "uint8", "uint8"),
    (Dtype::BOOL, "bool", "bool"),
    (Dtype::I32, "int32", "int32"),
    (Dtype::F64, "float64", "float64"),
    (Dtype::F8_E4M3, "float8_e4m3fn", ""),
    (Dtype::F8_E5M2, "float8_e5m2", ""),
    (Dtype::F8_E8M0, "float8_e8m0fnu", ""),
    (Dtype::F8_E4M3FNUZ, "float8_e4m3fnuz", ""),
    (Dtype::F8_E5M2FNUZ, "float8_e5m2fnuz", ""),
    (Dtype::I8, "int8", "int8"),
    (Dtype::I16, "int16", "int16"),
    (Dtype::U16, "uint16", "uint16"),
    (Dtype::U32, "uint32", "uint32"),
    (Dtype::U64, "uint64", "uint64"),
    (Dtype::C64, "complex64", "complex64"),
    (Dtype::C128, "complex128", "complex128"),
    (Dtype::C32, "complex32", ""),
];

/// torch packs two of these into one element; safetensors counts each.
pub(crate) const TORCH_F4: &str = "float4_e2m1fn_x2";

/// Types of Python's library.
pub(crate) struct Types {
    pub(crate) ordered_dict: Py<PyType>,
    pub(crate) default_dict: Py<PyType>,
    pub(crate) counter: Py<PyType>,
    pub(crate) deque: Py<PyType>,
    pub(crate) enumeration: Py<PyType>,
    pub(crate) posix_path: Py<PyType>,
    pub(crate) pure_path: Py<PyType>,
    torch: PyOnceLock<Torch>,
    numpy: PyOnceLock<Numpy>,
    jax: PyOnceLock<Jax>,
}

/// What the walk needs of JAX.
pub(crate) struct Jax {
    pub(crate) array: Py<PyAny>,
}

/// What the walk needs of torch.
pub(crate) struct Torch {
    pub(crate) tensor: Py<PyType>,
    pub(crate) parameter: Py<PyType>,
    pub(crate) size: Py<PyType>,
    pub(crate) dtype: Py<PyType>,
    pub(crate) device: Py<PyType>,
    pub(crate) module: Py<PyType>,
    /// `torch.nn.Module.state_dict`, to see whether a class has its own.
    pub(crate) module_state_dict: Py<PyAny>,
    pub(crate) strided: Py<PyAny>,
    /// What `__torch_dispatch__` is where a subclass does not define it.
    pub(crate) no_dispatch: Py<PyAny>,
    /// A quick look at a tensor, in a torch that offers it.
    pub(crate) glancer: Option<Glancer>,
    dtypes: Vec<(Py<PyAny>, Dtype)>,
}

/// What the walk needs of numpy.
pub(crate) struct Numpy {
    pub(crate) ndarray: Py<PyType>,
    pub(crate) generic: Py<PyType>,
}

static TYPES: PyOnceLock<Types> = PyOnceLock::new();

/// The types, looked up at the first call.
pub(crate) fn types(py: Python<'_>) -> PyResult<&Types> {
    TYPES.get_or_try_init(py, || {
        let class = |module: &str, name: &str| -> PyResult<Py<PyType>> {
            Ok(PyModule::import(py, module)?.getattr(name)?.cast_into::<PyType>()?.unbind())
        };
        Ok(Types {
            ordered_dict: class("collections", "OrderedDict")?,
            default_dict: class("collections", "defaultdict")?,
            counter: class("collections", "Counter")?,
            deque: class("collections", "deque")?,
            enumeration: class("enum", "Enum")?,
            posix_path: class("pathlib", "PosixPath")?,
            pure_path: class("pathlib", "PurePath")?,
            torch: PyOnceLock::new(),
            numpy: PyOnceLock::new(),
            jax: PyOnceLock::new(),
        })
    })
}

/// A module that somebody has imported.
pub(crate) fn imported<'py>(py: Python<'py>, name: &str) -> PyResult<Option<Bound<'py, PyAny>>> {
    let modules = PyModule::import(py, "sys")?.getattr("modules")?.cast_into::<PyDict>()?;
    Ok(modules.get_item(name)?.filter(|module| !module.is_none()))
}

impl Types {
    /// torch, if the script has imported it (and the import has come to its end).
    pub(crate) fn torch(&self, py: Python<'_>) -> PyResult<Option<&Torch>> {
        if let Some(torch) = self.torch.get(py) {
            return Ok(Some(torch));
        }
        let Some(module) = imported(py, "torch")? else { return Ok(None) };
        match Torch::of(&module) {
            Ok(torch) => Ok(Some(self.torch.get_or_init(py, || torch))),
            // It is being imported at this moment, by another thread.
            Err(_) => Ok(None),
        }
    }

    /// numpy, if the script has imported it.
    pub(crate) fn numpy(&self, py: Python<'_>) -> PyResult<Option<&Numpy>> {
        if let Some(numpy) = self.numpy.get(py) {
            return Ok(Some(numpy));
        }
        let Some(module) = imported(py, "numpy")? else { return Ok(None) };
        let class = |name: &str| -> PyResult<Py<PyType>> {
            Ok(module.getattr(name)?.cast_into::<PyType>()?.unbind())
        };
        match (class("ndarray"), class("generic")) {
            (Ok(ndarray), Ok(generic)) => {
                Ok(Some(self.numpy.get_or_init(py, || Numpy { ndarray, generic })))
            }
            _ => Ok(None),
        }
    }
}

impl Types {
    /// JAX, if the script has imported it.
    pub(crate) fn jax(&self, py: Python<'_>) -> PyResult<Option<&Jax>> {
        if let Some(jax) = self.jax.get(py) {
            return Ok(Some(jax));
        }
        let Some(module) = imported(py, "jax")? else { return Ok(None) };
        // It may be being imported at this moment, by another thread.
        let Ok(array) = module.getattr("Array") else { return Ok(None) };
        Ok(Some(self.jax.get_or_init(py, || Jax { array: array.unbind() })))
    }
}

impl Torch {
    fn of(module: &Bound<'_, PyAny>) -> PyResult<Self> {
        let nn = module.getattr("nn")?;
        let class = |name: &str| -> PyResult<Py<PyType>> {
            Ok(module.getattr(name)?.cast_into::<PyType>()?.unbind())
        };
        let mut dtypes = Vec::with_capacity(DTYPES.len() + 1);
        let f4 = (Dtype::F4, TORCH_F4, "");
        for (dtype, name, _) in DTYPES.iter().chain([&f4]) {
            // An older torch has not all of them.
            if let Ok(found) = module.getattr(*name) {
                dtypes.push((found.unbind(), *dtype));
            }
        }
        let tensor = class("Tensor")?;
        let no_dispatch = tensor.bind(module.py()).getattr("__torch_dispatch__")?.unbind();
        let module_type = nn.getattr("Module")?.cast_into::<PyType>()?;
        // The last thing that `import torch` defines that we need.
        module.getattr("optim")?.getattr("Optimizer")?;
        Ok(Self {
            glancer: Glancer::of(tensor.bind(module.py())),
            tensor,
            parameter: nn.getattr("Parameter")?.cast_into::<PyType>()?.unbind(),
            size: class("Size")?,
            dtype: class("dtype")?,
            device: class("device")?,
            module_state_dict: module_type.getattr("state_dict")?.unbind(),
            module: module_type.unbind(),
            strided: module.getattr("strided")?.unbind(),
            no_dispatch,
            dtypes,
        })
    }

    /// The element type of a `torch.dtype`, where both know it.
    pub(crate) fn dtype_of(&self, dtype: &Bound<'_, PyAny>) -> Option<Dtype> {
        self.dtypes.iter().find(|(known, _)| known.is(dtype)).map(|(_, dtype)| *dtype)
    }
}

/// Element types that the package `ml_dtypes` adds to numpy (JAX has them), by its names.
const ML_DTYPES: [(Dtype, &str); 6] = [
    (Dtype::BF16, "bfloat16"),
    (Dtype::F8_E4M3, "float8_e4m3fn"),
    (Dtype::F8_E5M2, "float8_e5m2"),
    (Dtype::F8_E8M0, "float8_e8m0fnu"),
    (Dtype::F8_E4M3FNUZ, "float8_e4m3fnuz"),
    (Dtype::F8_E5M2FNUZ, "float8_e5m2fnuz"),
];

/// The element type of one of these.
pub(crate) fn ml_dtype(name: &str) -> Option<Dtype> {
    ML_DTYPES.iter().find(|(_, known)| *known == name).map(|(dtype, _)| *dtype)
}

/// Element types by their names in manifests, as attributes of `ml_dtypes`.
#[pyfunction]
pub(crate) fn ml_dtypes(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let names = PyDict::new(py);
    for (dtype, name) in &ML_DTYPES {
        names.set_item(dtype.name(), name)?;
    }
    Ok(names)
}

/// The element type of a numpy dtype in the machine's byte order.
pub(crate) fn numpy_dtype(name: &str) -> Option<Dtype> {
    let named = |(.., numpy): &&(Dtype, &str, &str)| !numpy.is_empty() && *numpy == name;
    DTYPES.iter().find(named).map(|(dtype, ..)| *dtype)
}

/// Element types by their names in manifests, as attributes of `torch`.
#[pyfunction]
pub(crate) fn torch_dtypes(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let names = PyDict::new(py);
    for (dtype, torch, _) in &DTYPES {
        names.set_item(dtype.name(), torch)?;
    }
    names.set_item(Dtype::F4.name(), TORCH_F4)?;
    Ok(names)
}

/// Element types by their names in manifests, as attributes of `numpy`; those that numpy has.
#[pyfunction]
pub(crate) fn numpy_dtypes(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let names = PyDict::new(py);
    for (dtype, _, numpy) in DTYPES.iter().filter(|(.., numpy)| !numpy.is_empty()) {
        names.set_item(dtype.name(), numpy)?;
    }
    Ok(names)
}
