//! Down the tree: containers, places and their names.

use std::{collections::HashMap, sync::Arc};

use pyo3::{
    ffi, intern,
    prelude::*,
    types::{PyDict, PyFrozenSet, PyList, PySet, PyString, PyTuple},
};
use tierkeep::state::{
    Memory, Tensor, TensorSpec,
    path::{self, Key},
    value::{Lib, TensorRef, VALUE_DEPTH_MAX, Value},
};

use super::{
    Cache, Walked, Wishes,
    form::{Form, Known, look},
    leaf,
    sharded::{KnownSharded, is_sharded},
};
use crate::{
    address::ByAddress,
    device::OnDevice,
    errors::unstorable,
    types::{Numpy, Torch, Types, types},
};

/// Values in one tree. Containers that hold one another twice each are 2^40 values at 40 levels;
/// this many are already a manifest of a gigabyte.
const VALUES_MAX: usize = 10_000_000;

/// A tensor that is smaller is copied in less time than it takes to keep its memory alive: an
/// optimizer has a step counter for each parameter.
const LATE_BYTES_MIN: u64 = 1024;

/// One walk.
pub(super) struct Walk<'a, 'py> {
    pub(super) py: Python<'py>,
    pub(super) types: &'py Types,
    pub(super) torch: Option<&'py Torch>,
    pub(super) numpy: Option<&'py Numpy>,
    pub(super) wishes: &'a Wishes<'a>,
    cache: &'a mut Cache,
    /// The escaped path of the current place; empty at the root.
    path: String,
    /// Levels from the root to the current value, it included.
    depth: usize,
    /// The containers around the current place, by identity.
    open: Vec<*mut ffi::PyObject>,
    /// In a key of a dict or in a set.
    pub(super) hashed: bool,
    /// At an array of JAX, which lends its memory.
    pub(super) lends: bool,
    /// In the state of a `torch.nn.Module`, where a `Parameter` is stored as a plain tensor, as
    /// torch does it.
    pub(super) in_module: bool,
    values: usize,
    tensors: Vec<Tensor>,
    forms: Vec<Arc<Form>>,
    /// The last tensor that begins at an address, and for each tensor the one before it there.
    by_start: HashMap<usize, usize, ByAddress>,
    before: Vec<Option<usize>>,
    pub(super) hold: Vec<Py<PyAny>>,
    keep: Vec<Py<PyAny>>,
    on_device: Vec<OnDevice>,
}

impl<'a, 'py> Walk<'a, 'py> {
    pub(super) fn new(
        py: Python<'py>,
        cache: &'a mut Cache,
        wishes: &'a Wishes<'a>,
    ) -> PyResult<Self> {
        let types = types(py)?;
        let tensors = cache.tensors;
        Ok(Self {
            py,
            types,
            torch: types.torch(py)?,
            numpy: types.numpy(py)?,
            wishes,
            cache,
            path: String::new(),
            depth: 1,
            open: Vec::new(),
            hashed: false,
            lends: false,
            in_module: false,
            values: 0,
            tensors: Vec::with_capacity(tensors),
            forms: Vec::with_capacity(tensors),
            by_start: HashMap::with_capacity_and_hasher(tensors, ByAddress::default()),
            before: Vec::with_capacity(tensors),
            hold: Vec::with_capacity(tensors),
            keep: Vec::new(),
            on_device: Vec::new(),
        })
    }

    pub(super) fn done(self, tree: Value) -> Walked {
        Walked {
            tree,
            tensors: self.tensors,
            hold: self.hold,
            keep: self.keep,
            on_device: self.on_device,
        }
    }

    /// The error that what lies at the current place cannot be stored.
    pub(super) fn refuse(&self, why: impl Into<String>) -> PyErr {
        unstorable(self.py, self.place(), why)
    }

    /// The current place for people.
    pub(super) fn place(&self) -> &str {
        if self.path.is_empty() { "the state" } else { &self.path }
    }

    /// The value at the current place.
    pub(super) fn value(&mut self, object: &Bound<'py, PyAny>) -> PyResult<Value> {
        self.values += 1;
        if self.values > VALUES_MAX {
            return Err(self.refuse(format!(
                "the state has more than {VALUES_MAX} values: put numbers into an array"
            )));
        }
        if self.is_exact_tensor(object) {
            return self.tensor(object, true);
        }
        if let Some(value) = self.known_sharded(object)? {
            return Ok(value);
        }
        if let Some(leaf) = leaf::plain(object) {
            return leaf.map_err(|why| self.refuse(why));
        }
        if let Ok(dict) = object.cast_exact::<PyDict>() {
            // All at once: what runs below (a `state_dict`) may change the dict.
            let rows: Vec<_> = dict.iter().collect();
            return self
                .inside(object, |walk| walk.entries(rows.into_iter().map(Ok)).map(Value::Dict));
        }
        if let Ok(list) = object.cast_exact::<PyList>() {
            let items = list.to_tuple();
            return self.inside(object, |walk| walk.items(&items).map(Value::List));
        }
        if let Ok(tuple) = object.cast_exact::<PyTuple>() {
            return self.inside(object, |walk| walk.items(tuple).map(Value::Tuple));
        }
        self.rarer(object)
    }

    fn rarer(&mut self, object: &Bound<'py, PyAny>) -> PyResult<Value> {
        let (py, ty) = (self.py, object.get_type());
        if let Some(pickle) = self.pickle(object)? {
            return Ok(pickle);
        }
        if let Some(leaf) = leaf::typed(self, object)? {
            return Ok(leaf);
        }
        if self.is_tensor(object)? {
            return self.tensor(object, false);
        }
        if let Some(torch) = self.torch
            && is_sharded(object)?
        {
            return self.sharded(object, torch);
        }
        if self.is_jax(object)? {
            return self.jax_array(object);
        }
        if object.cast_exact::<PySet>().is_ok() {
            return self.inside(object, |walk| walk.hashed_items(object).map(Value::Set));
        }
        if object.cast_exact::<PyFrozenSet>().is_ok() {
            return self.inside(object, |walk| walk.hashed_items(object).map(Value::FrozenSet));
        }
        // The order of an OrderedDict is its own: the dict below it does not know it.
        let rows = |walk: &mut Self| {
            let rows = object.call_method0(intern!(py, "items"))?.try_iter()?;
            let rows: PyResult<Vec<_>> = rows.collect();
            walk.entries(rows?.into_iter().map(|row| row.extract()))
        };
        if ty.is(&self.types.ordered_dict) {
            return self.inside(object, |walk| rows(walk).map(Value::OrderedDict));
        }
        if ty.is(&self.types.counter) {
            return self.inside(object, |walk| rows(walk).map(Value::Counter));
        }
        if ty.is(&self.types.default_dict) {
            let factory = self.factory(&object.getattr("default_factory")?)?;
            return self
                .inside(object, |walk| Ok(Value::DefaultDict { factory, entries: rows(walk)? }));
        }
        if ty.is(&self.types.deque) {
            let maxlen = object.getattr("maxlen")?.extract()?;
            let items = PyTuple::new(py, object.try_iter()?.collect::<PyResult<Vec<_>>>()?)?;
            return self
                .inside(object, |walk| Ok(Value::Deque { maxlen, items: walk.items(&items)? }));
        }
        self.instance(object)
    }

    pub(super) fn is_exact_tensor(&self, object: &Bound<'py, PyAny>) -> bool {
        let ty = object.get_type_ptr().cast();
        self.torch
            .is_some_and(|torch| ty == torch.tensor.as_ptr() || ty == torch.parameter.as_ptr())
    }

    fn is_tensor(&self, object: &Bound<'py, PyAny>) -> PyResult<bool> {
        if let Some(torch) = self.torch
            && object.is_instance(torch.tensor.bind(self.py))?
        {
            return Ok(true);
        }
        Ok(self.numpy.is_some_and(|numpy| object.get_type().is(&numpy.ndarray)))
    }

    /// Does `walk` for the children of `container`.
    pub(super) fn inside(
        &mut self,
        container: &Bound<'py, PyAny>,
        walk: impl FnOnce(&mut Self) -> PyResult<Value>,
    ) -> PyResult<Value> {
        if self.open.contains(&container.as_ptr()) {
            return Err(self.refuse("it contains itself"));
        }
        self.open.push(container.as_ptr());
        self.depth += 1;
        let value = walk(self);
        self.depth -= 1;
        self.open.pop();
        value
    }

    /// The value of a child that lies in its parent's own place.
    pub(super) fn same_place(&mut self, child: &Bound<'py, PyAny>) -> PyResult<Value> {
        if self.depth > VALUE_DEPTH_MAX {
            return Err(
                self.refuse(format!("the state is nested deeper than {VALUE_DEPTH_MAX} levels"))
            );
        }
        self.value(child)
    }

    /// The value of a child, one step down.
    pub(super) fn child(&mut self, key: &Key, child: &Bound<'py, PyAny>) -> PyResult<Value> {
        self.below(&path::join(std::slice::from_ref(key)), child)
    }

    fn child_at(&mut self, key: &Value, child: &Bound<'py, PyAny>) -> PyResult<Value> {
        match key {
            // Most keys: nothing in them that the core would escape.
            Value::Str(text) if is_plain(text) => self.below(text, child),
            _ => {
                let key = key.as_key().map_err(|e| self.refuse(e.problem.to_string()))?;
                self.child(&key, child)
            }
        }
    }

    fn below(&mut self, component: &str, child: &Bound<'py, PyAny>) -> PyResult<Value> {
        let length = self.path.len();
        if length > 0 {
            self.path.push('/');
        }
        self.path.push_str(component);
        let value = self.same_place(child);
        self.path.truncate(length);
        value
    }

    fn items(&mut self, items: &Bound<'py, PyTuple>) -> PyResult<Vec<Value>> {
        let mut values = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            // A tuple has at most isize::MAX items.
            let key = Key::Index(index as i64);
            values.push(match self.leaf_below(&item) {
                Some(value) => value,
                None => self.child(&key, &item)?,
            });
        }
        Ok(values)
    }

    pub(super) fn entries(
        &mut self,
        rows: impl Iterator<Item = PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)>>,
    ) -> PyResult<Vec<(Value, Value)>> {
        let mut entries = Vec::with_capacity(rows.size_hint().0);
        for row in rows {
            let (key, child) = row?;
            let key = self.key(&key)?;
            let value = match self.leaf_below(&child) {
                Some(value) => value,
                None => self.child_at(&key, &child)?,
            };
            entries.push((key, value));
        }
        Ok(entries)
    }

    /// The plain leaves that most children are: nobody needs their path.
    fn leaf_below(&mut self, child: &Bound<'py, PyAny>) -> Option<Value> {
        if self.depth > VALUE_DEPTH_MAX || self.values >= VALUES_MAX {
            return None;
        }
        if self.is_exact_tensor(child) {
            return None;
        }
        let value = leaf::plain(child)?.ok()?;
        self.values += 1;
        Some(value)
    }

    /// The key of a dict: no place of its own, so that an error in it names the dict.
    fn key(&mut self, key: &Bound<'py, PyAny>) -> PyResult<Value> {
        if let Ok(text) = key.cast_exact::<PyString>()
            && let Ok(text) = text.to_str()
        {
            return Ok(Value::Str(text.to_owned()));
        }
        let before = std::mem::replace(&mut self.hashed, true);
        let value = self.same_place(key);
        self.hashed = before;
        value
    }

    fn hashed_items(&mut self, items: &Bound<'py, PyAny>) -> PyResult<Vec<Value>> {
        items.try_iter()?.map(|item| self.key(&item?)).collect()
    }

    /// `exact`: a `Tensor` or `Parameter` of torch, no subclass.
    fn tensor(&mut self, tensor: &Bound<'py, PyAny>, exact: bool) -> PyResult<Value> {
        if self.hashed {
            return Err(self.refuse("a tensor cannot be stored in a key of a dict or in a set"));
        }
        if let Some(torch) = self.torch.filter(|_| !exact)
            && is_sharded(tensor)?
        {
            return self.sharded(tensor, torch);
        }
        let form = self.form(tensor, exact)?;
        let (lib, param) = match self.torch {
            Some(torch) if exact || tensor.is_instance(torch.tensor.bind(self.py))? => {
                (Lib::Torch, !self.in_module && tensor.get_type().is(&torch.parameter))
            }
            _ => (Lib::Numpy, false),
        };
        let name = self.plain(tensor, tensor, form);
        Ok(Value::Tensor(TensorRef { name, lib, param, whole: None }))
    }

    /// The name of a whole tensor, which is added where it is met for the first time.
    pub(super) fn plain(
        &mut self,
        object: &Bound<'py, PyAny>,
        tensor: &Bound<'py, PyAny>,
        form: Arc<Form>,
    ) -> Arc<str> {
        // A box that has the same bytes goes by a name that is no whole tensor's.
        let tied = self.tied(&form).filter(|index| self.tensors[*index].spec.part_of.is_none());
        if let Some(index) = tied {
            return self.tensors[index].spec.name.clone();
        }
        let spec = self.spec(object, &form);
        self.add(object, tensor, form, spec.clone());
        spec.name.clone()
    }

    pub(super) fn form(&mut self, tensor: &Bound<'py, PyAny>, exact: bool) -> PyResult<Arc<Form>> {
        let identity = tensor.as_ptr() as usize;
        // Only an exact tensor of torch is sure to be no more than what is known of it.
        let torch = self.torch.filter(|_| exact);
        if let Some(torch) = torch
            && let Some(known) = self.cache.known.get(&identity)
            && known.still(tensor, torch).unwrap_or(false)
        {
            return Ok(known.form.clone());
        }
        let looked = look(tensor).map_err(|cause| {
            let error = self.refuse(format!("a {} without bytes", tensor.get_type()));
            error.set_cause(self.py, Some(cause));
            error
        })?;
        let form = Arc::new(looked.map_err(|why| self.refuse(why))?);
        if let Some(torch) = torch {
            self.cache.known.insert(identity, Known::of(tensor, torch, form.clone())?);
        }
        Ok(form)
    }

    /// The tensor with this number has this name.
    pub(super) fn name_of(&self, index: usize) -> &str {
        &self.tensors[index].spec.name
    }

    /// The name of a tensor at the current place.
    pub(super) fn place_name(&self) -> String {
        named(&self.path)
    }

    /// Whether the current place has this path.
    pub(super) fn is_here(&self, path: &str) -> bool {
        if self.path.is_empty() { path == path::join(&[]) } else { path == self.path }
    }

    pub(super) fn sharded_known(&self, tensor: &Bound<'py, PyAny>) -> Option<&KnownSharded> {
        self.cache.sharded.get(&(tensor.as_ptr() as usize))
    }

    pub(super) fn remember_sharded(&mut self, tensor: &Bound<'py, PyAny>, known: KnownSharded) {
        self.cache.sharded.insert(tensor.as_ptr() as usize, known);
    }

    pub(super) fn tied(&self, form: &Form) -> Option<usize> {
        if form.bytes == 0 {
            return None;
        }
        let mut next = self.by_start.get(&form.start).copied();
        while let Some(index) = next {
            if self.forms[index].is_tied_to(form) {
                return Some(index);
            }
            next = self.before[index];
        }
        None
    }

    /// Adds a tensor, of which an optimizer may own `object`: itself, or what it is a part of.
    pub(super) fn add(
        &mut self,
        object: &Bound<'py, PyAny>,
        tensor: &Bound<'py, PyAny>,
        form: Arc<Form>,
        spec: Arc<TensorSpec>,
    ) {
        let index = self.tensors.len();
        // What is immutable may be copied late, too, while its memory is held.
        let owned = self
            .wishes
            .owned
            .is_some_and(|owned| owned.contains(object) || !tensor.is(object) && self.lends);
        let on_device = form.device.is_some();
        let late = owned && form.bytes >= LATE_BYTES_MIN;
        if on_device {
            // Its memory is held by torch until the copy is done (`record_stream`).
            self.on_device.push(OnDevice { index, tensor: tensor.clone().unbind(), late });
        } else if late {
            // The tensor object may be given other memory; this holds the memory that it has now.
            let storage = tensor.call_method0(intern!(self.py, "untyped_storage"));
            self.keep.push(storage.unwrap_or_else(|_| tensor.clone()).unbind());
        } else {
            self.hold.push(tensor.clone().unbind());
        }
        let memory = if on_device { Memory::InSlot } else { form.memory.clone() };
        self.tensors.push(Tensor { spec, memory, late });
        self.before.push(self.by_start.insert(form.start, index));
        self.forms.push(form);
    }

    /// That of the last walk, where it found the tensor in the same place.
    fn spec(&mut self, tensor: &Bound<'py, PyAny>, form: &Arc<Form>) -> Arc<TensorSpec> {
        let known = self.cache.known.get_mut(&(tensor.as_ptr() as usize));
        let mut known = known.filter(|known| Arc::ptr_eq(&known.form, form));
        if let Some(spec) = known.as_ref().and_then(|known| known.spec.as_ref())
            && *spec.name == *self.path
        {
            return spec.clone();
        }
        let spec = Arc::new(TensorSpec {
            name: named(&self.path).into(),
            dtype: form.dtype,
            shape: form.shape.clone(),
            part_of: None,
            held_by: Vec::new(),
        });
        if let Some(known) = &mut known {
            known.spec = Some(spec.clone());
        }
        spec
    }
}

/// The name of the tensor at an escaped path; the root has one too.
fn named(place: &str) -> String {
    if place.is_empty() { path::join(&[]) } else { place.to_owned() }
}

/// Whether a str is its own component of a path. Not all that are: the ones that are quickly told.
fn is_plain(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_');
    text.as_bytes().first().is_some_and(u8::is_ascii_alphabetic) && text.bytes().all(plain)
}
