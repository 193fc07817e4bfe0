//! Values without children: Python's own, and those of enum, pathlib, numpy and torch.

use pyo3::{
    PyTypeInfo, intern,
    prelude::*,
    types::{PyBool, PyBytes, PyComplex, PyComplexMethods, PyFloat, PyInt, PyString, PyType},
};
use tierkeep::state::value::Value;

use super::walk::Walk;

/// A leaf of one of Python's own types, exactly; `None` for all else. The error says why it cannot be
/// stored.
pub(super) fn plain(object: &Bound<'_, PyAny>) -> Option<Result<Value, String>> {
    // By the type's address: a failed cast makes an error, and most leaves are none of most types.
    let (py, ty) = (object.py(), object.get_type_ptr());
    if ty == PyString::type_object_raw(py) {
        object.cast::<PyString>().ok().map(str)
    } else if ty == PyInt::type_object_raw(py) {
        object.cast::<PyInt>().ok().map(int)
    } else if ty == PyFloat::type_object_raw(py) {
        object.cast::<PyFloat>().ok().map(|x| Ok(Value::float(x.value())))
    } else if ty == PyBool::type_object_raw(py) {
        object.cast::<PyBool>().ok().map(|x| Ok(Value::Bool(x.is_true())))
    } else if object.is_none() {
        Some(Ok(Value::None))
    } else if ty == PyBytes::type_object_raw(py) {
        object.cast::<PyBytes>().ok().map(|x| Ok(Value::Bytes(x.as_bytes().to_vec())))
    } else if ty == PyComplex::type_object_raw(py) {
        let complex =
            |x: &Bound<'_, PyComplex>| Ok(Value::Complex(x.real().to_bits(), x.imag().to_bits()));
        object.cast::<PyComplex>().ok().map(complex)
    } else {
        None
    }
}

fn str(text: &Bound<'_, PyString>) -> Result<Value, String> {
    if let Ok(text) = text.to_str() {
        return Ok(Value::Str(text.to_owned()));
    }
    let py = text.py();
    let bytes = text
        .call_method1(intern!(py, "encode"), (intern!(py, "utf-8"), intern!(py, "surrogatepass")))
        .and_then(|bytes| bytes.extract::<Vec<u8>>());
    let value = bytes.map_err(|e| e.to_string())?;
    Value::str(value).ok_or_else(|| "a str that cannot be encoded".into())
}

fn int(x: &Bound<'_, PyInt>) -> Result<Value, String> {
    if let Ok(small) = x.extract::<i64>() {
        return Ok(Value::Int(small));
    }
    // Hex: decimal digits cost time that grows with their square, and Python refuses many of them.
    let text = x.call_method1(intern!(x.py(), "__format__"), (intern!(x.py(), "#x"),));
    let text: String = text.and_then(|text| text.extract()).map_err(|e| e.to_string())?;
    Value::int(&text).ok_or_else(|| format!("an int that is written {text}"))
}

/// The name of a type, as the manifest has it: `module:QualName`.
pub(super) fn name_of(ty: &Bound<'_, PyType>) -> PyResult<String> {
    let module = ty.getattr(intern!(ty.py(), "__module__"))?.to_string();
    Ok(format!("{module}:{}", ty.qualname()?))
}

/// A leaf of a type that the manifest names; `None` for all else.
pub(super) fn typed(walk: &Walk<'_, '_>, object: &Bound<'_, PyAny>) -> PyResult<Option<Value>> {
    let (py, ty) = (walk.py, object.get_type());
    if object.is_instance(walk.types.enumeration.bind(py))? {
        return member(walk, object).map(Some);
    }
    if object.is_instance(walk.types.pure_path.bind(py))? {
        if !ty.is(&walk.types.posix_path) {
            return Err(walk.refuse(format!("a {ty}: only pathlib.Path is stored")));
        }
        let text = object.str()?;
        let text = text.to_str().map_err(|_| {
            walk.refuse("a path that is not UTF-8: store os.fsencode(path)".to_owned())
        })?;
        return Ok(Some(Value::Path(text.to_owned())));
    }
    if let Some(numpy) = walk.numpy
        && object.is_instance(numpy.generic.bind(py))?
    {
        return scalar(walk, object).map(Some);
    }
    if let Some(torch) = walk.torch {
        if ty.is(&torch.dtype) {
            let name = object.str()?.to_string();
            return Ok(Some(Value::TorchDtype(name.trim_start_matches("torch.").to_owned())));
        }
        if ty.is(&torch.size) {
            return Ok(Some(Value::TorchSize(object.extract()?)));
        }
        if ty.is(&torch.device) {
            return Ok(Some(Value::TorchDevice(object.str()?.to_string())));
        }
    }
    Ok(None)
}

fn member(walk: &Walk<'_, '_>, object: &Bound<'_, PyAny>) -> PyResult<Value> {
    let ty = object.get_type();
    let named = || -> PyResult<Option<String>> {
        let name = object.getattr("name")?;
        let Ok(name) = name.extract::<String>() else { return Ok(None) };
        let members = ty.getattr("__members__")?;
        let found = members.call_method1("get", (&name,))?;
        Ok(found.is(object).then_some(name))
    };
    match named()? {
        Some(name) => Ok(Value::Enum { type_name: name_of(&ty)?, name }),
        None => Err(walk.refuse(format!(
            "{} is not a member of {ty} by name: store its value",
            object.repr()?
        ))),
    }
}

fn scalar(walk: &Walk<'_, '_>, object: &Bound<'_, PyAny>) -> PyResult<Value> {
    let dtype = object.getattr("dtype")?;
    let kind = dtype.getattr("kind")?.to_string();
    // V: records, and the types of other libraries, whose spelling does not name them.
    if matches!(kind.as_str(), "O" | "V") {
        return Err(walk.refuse(format!("a numpy scalar of dtype {dtype}: store its parts")));
    }
    let spelled = dtype.getattr("str")?.to_string();
    let mut bytes: Vec<u8> = object.call_method0("tobytes")?.extract()?;
    // An empty numpy.bytes_ says that it has one byte.
    bytes.truncate(dtype.getattr("itemsize")?.extract()?);
    Ok(Value::NumpyScalar { dtype: spelled, bytes })
}
