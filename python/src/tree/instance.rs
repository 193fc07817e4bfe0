//! Instances of classes: objects with a `state_dict`, NamedTuples, dataclasses, and what the user
//! allowed to be pickled. And the words for those that are none of them.

use pyo3::{
    intern,
    prelude::*,
    types::{PyDict, PyFrozenSet, PyList, PyModule, PyNone, PySet, PyString, PyTuple, PyType},
};
use tierkeep::state::{path::Key, value::Value};

use super::{leaf::name_of, walk::Walk};
use crate::types::imported;

impl<'py> Walk<'_, 'py> {
    pub(super) fn instance(&mut self, object: &Bound<'py, PyAny>) -> PyResult<Value> {
        let py = self.py;
        if object.is_instance_of::<PyType>() {
            return Err(self.refuse(format!("the class {object}: store its name")));
        }
        if object.hasattr(intern!(py, "state_dict"))?
            && object.hasattr(intern!(py, "load_state_dict"))?
        {
            return self.object(object);
        }
        if let Some(value) = self.named_tuple(object)? {
            return Ok(value);
        }
        if let Some(value) = self.jax_node(object)? {
            return Ok(value);
        }
        if object.hasattr(intern!(py, "__dataclass_fields__"))? {
            return self.dataclass(object);
        }
        let why = self.why_not(object)?;
        Err(self.refuse(why))
    }

    fn object(&mut self, object: &Bound<'py, PyAny>) -> PyResult<Value> {
        let (state, of_module) = self.state_dict(object).inspect_err(|error| {
            // The exception is the object's own; it only learns where it was.
            let _ = error.add_note(self.py, format!("(while saving {})", self.place()));
        })?;
        let outer = std::mem::replace(&mut self.in_module, of_module);
        let value =
            self.inside(object, |walk| Ok(Value::Object(Box::new(walk.same_place(&state)?))));
        self.in_module = outer;
        // What it gave may be made for this call only.
        self.hold.push(state.unbind());
        value
    }

    /// The object's state, and whether it is a module of torch.
    fn state_dict(&self, object: &Bound<'py, PyAny>) -> PyResult<(Bound<'py, PyAny>, bool)> {
        let py = self.py;
        let method = object.getattr(intern!(py, "state_dict"))?;
        let Some(torch) = self.torch else { return Ok((method.call0()?, false)) };
        if !object.is_instance(torch.module.bind(py))? {
            return Ok((method.call0()?, false));
        }
        let own = method
            .getattr(intern!(py, "__func__"))
            .is_ok_and(|function| function.is(&torch.module_state_dict));
        if !own {
            return Ok((method.call0()?, true));
        }
        // The tensors themselves: aliases made anew each time would be looked at anew each time.
        let options = PyDict::new(py);
        options.set_item(intern!(py, "keep_vars"), true)?;
        Ok((method.call((), Some(&options))?, true))
    }

    fn named_tuple(&mut self, object: &Bound<'py, PyAny>) -> PyResult<Option<Value>> {
        let Ok(tuple) = object.cast::<PyTuple>() else { return Ok(None) };
        let ty = object.get_type();
        let Ok(names) = ty.getattr(intern!(self.py, "_fields")) else { return Ok(None) };
        let Ok(names) = names.extract::<Vec<String>>() else { return Ok(None) };
        if names.len() != tuple.len() {
            return Ok(None);
        }
        self.refuse_extra(object, &names)?;
        let type_name = name_of(&ty)?;
        let items: Vec<_> = names.into_iter().zip(tuple.iter()).collect();
        self.inside(object, |walk| Ok(Value::NamedTuple { type_name, fields: walk.fields(items)? }))
            .map(Some)
    }

    fn dataclass(&mut self, object: &Bound<'py, PyAny>) -> PyResult<Value> {
        let ty = object.get_type();
        let fields = PyModule::import(self.py, "dataclasses")?.call_method1("fields", (object,))?;
        let mut names = Vec::new();
        for field in fields.try_iter()? {
            names.push(field?.getattr("name")?.extract::<String>()?);
        }
        if is_built_in(object) {
            return Err(self.refuse(format!("a {ty}, a dataclass that is a built-in type as well")));
        }
        self.refuse_extra(object, &names)?;
        let mut items = Vec::with_capacity(names.len());
        for name in names {
            let Ok(value) = object.getattr(name.as_str()) else {
                return Err(self.refuse(format!("a {ty} without its field {name}")));
            };
            items.push((name, value));
        }
        let type_name = name_of(&ty)?;
        self.inside(object, |walk| Ok(Value::Dataclass { type_name, fields: walk.fields(items)? }))
    }

    fn fields(
        &mut self,
        items: Vec<(String, Bound<'py, PyAny>)>,
    ) -> PyResult<Vec<(String, Value)>> {
        let field = |(name, item): (String, Bound<'py, PyAny>)| {
            let value = self.child(&Key::Str(name.clone()), &item)?;
            Ok((name, value))
        };
        items.into_iter().map(field).collect()
    }

    /// An attribute beside the fields would be lost without a word.
    fn refuse_extra(&self, object: &Bound<'py, PyAny>, fields: &[String]) -> PyResult<()> {
        let Ok(attributes) = object.getattr(intern!(self.py, "__dict__")) else { return Ok(()) };
        let Ok(attributes) = attributes.cast_into::<PyDict>() else { return Ok(()) };
        for name in attributes.keys() {
            let name = name.to_string();
            if !fields.contains(&name) {
                return Err(self.refuse(format!(
                    "a {} with the attribute {name}, which is not among its fields",
                    object.get_type()
                )));
            }
        }
        Ok(())
    }

    /// A pickle, where the user allowed the type by name.
    pub(super) fn pickle(&self, object: &Bound<'py, PyAny>) -> PyResult<Option<Value>> {
        let Some(allowed) = self.wishes.allow_pickle.filter(|names| !names.is_empty()) else {
            return Ok(None);
        };
        if !allowed.contains(&name_of(&object.get_type())?) {
            return Ok(None);
        }
        let bytes = PyModule::import(self.py, "pickle")?.call_method1("dumps", (object,))?;
        Ok(Some(Value::Pickle(bytes.extract()?)))
    }

    /// The name of what makes a defaultdict's missing values.
    pub(super) fn factory(&self, factory: &Bound<'py, PyAny>) -> PyResult<Option<String>> {
        if factory.is_none() {
            return Ok(None);
        }
        if let Ok(ty) = factory.cast::<PyType>() {
            return name_of(ty).map(Some);
        }
        Err(self.refuse(format!(
            "a defaultdict whose factory is {}: only a class can be named",
            factory.repr()?
        )))
    }

    fn why_not(&self, object: &Bound<'py, PyAny>) -> PyResult<String> {
        let py = self.py;
        let ty = object.get_type();
        let name = name_of(&ty)?;
        let hint = match name.as_str() {
            "builtins:function"
            | "builtins:builtin_function_or_method"
            | "builtins:method"
            | "functools:partial" => "code is not stored",
            "builtins:bytearray" | "builtins:memoryview" => "store bytes(x)",
            "builtins:range" => "store list(x)",
            "builtins:generator" => "store what it has given",
            "builtins:module" => "store its name",
            "torch._C:Generator" => "store generator.get_state(), or use tierkeep.Rng()",
            "numpy.random._generator:Generator" => "store generator.bit_generator.state",
            "numpy.random.mtrand:RandomState" => "store state.get_state(), or use tierkeep.Rng()",
            "random:Random" => "store random.getstate(), or use tierkeep.Rng()",
            _ if is_built_in(object) => "a subclass of a built-in type: store the built-in one",
            _ if ty.is_subclass(&numpy_array(py)?)? => {
                "a subclass of numpy.ndarray: store an array"
            }
            _ => {
                return Ok(format!(
                    "a {ty}: give it state_dict and load_state_dict, make it a dataclass, or say \
                     allow_pickle=(\"{name}\",)"
                ));
            }
        };
        Ok(format!("a {ty}: {hint}"))
    }
}

/// numpy's array, or a type that nothing is a subclass of.
fn numpy_array(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    match imported(py, "numpy")? {
        Some(numpy) => numpy.getattr("ndarray"),
        None => Ok(py.get_type::<PyNone>().into_any()),
    }
}

fn is_built_in(object: &Bound<'_, PyAny>) -> bool {
    use pyo3::types::{PyBytes, PyComplex, PyFloat, PyInt};
    object.is_instance_of::<PyDict>()
        || object.is_instance_of::<PyList>()
        || object.is_instance_of::<PyTuple>()
        || object.is_instance_of::<PyString>()
        || object.is_instance_of::<PyBytes>()
        || object.is_instance_of::<PyInt>()
        || object.is_instance_of::<PyFloat>()
        || object.is_instance_of::<PyComplex>()
        || object.is_instance_of::<PySet>()
        || object.is_instance_of::<PyFrozenSet>()
}
