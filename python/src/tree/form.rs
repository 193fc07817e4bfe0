//! One tensor: its type, shape and memory, and how to see quickly that they are what they were.

use std::sync::Arc;

use pyo3::{buffer::PyUntypedBuffer, intern, prelude::*};
use tierkeep::{
    snapshot::strided::{Address, Strided},
    state::{Memory, TensorSpec, dtype::Dtype},
};

use crate::{
    glance::Seen,
    types::{Torch, ml_dtype, numpy_dtype, types},
};

/// A tensor as the core needs it.
#[derive(Clone, Debug)]
pub(crate) struct Form {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    /// A stand-in where `device` is one.
    pub(crate) memory: Memory,
    /// First byte of element 0.
    pub(crate) start: usize,
    /// Bytes from one element to the next, in each dimension of `shape`; empty where it has none of its own
    /// (float4).
    pub(crate) strides: Vec<isize>,
    /// The first byte of any element, and the one after the last.
    pub(crate) span: (usize, usize),
    pub(crate) bytes: u64,
    /// `cuda:0`; `None` for the CPU.
    pub(crate) device: Option<String>,
    /// numpy can refuse to be written to.
    pub(crate) read_only: bool,
}

impl Form {
    /// True where a checkpoint can be restored into it.
    pub(crate) fn writable(&self) -> bool {
        let overlaps = match &self.memory {
            Memory::Strided(strided) => strided.overlaps(),
            Memory::Contiguous(_) | Memory::InSlot => false,
        };
        !self.read_only && !overlaps
    }

    /// True where `other` is the same tensor by another name.
    pub(crate) fn is_tied_to(&self, other: &Self) -> bool {
        self.start == other.start
            && self.bytes == other.bytes
            && self.dtype == other.dtype
            && self.shape == other.shape
            && self.device == other.device
            && match (&self.memory, &other.memory) {
                (Memory::Contiguous(_), Memory::Contiguous(_)) => true,
                // Same run and dims: what `Debug` shows is the whole geometry.
                (Memory::Strided(a), Memory::Strided(b)) => format!("{a:?}") == format!("{b:?}"),
                _ => false,
            }
    }
}

/// What it is, or why it cannot be stored.
pub(crate) type Looked = Result<Form, String>;

/// Looks at a torch tensor or a numpy array.
pub(crate) fn look(tensor: &Bound<'_, PyAny>) -> PyResult<Looked> {
    let py = tensor.py();
    let types = types(py)?;
    if let Some(torch) = types.torch(py)?
        && tensor.is_instance(torch.tensor.bind(py))?
    {
        return look_torch(tensor, torch);
    }
    if let Some(numpy) = types.numpy(py)?
        && tensor.get_type().is(numpy.ndarray.bind(py))
    {
        return look_numpy(tensor);
    }
    Ok(Err(format!("{} is neither a torch tensor nor a numpy array", tensor.get_type())))
}

/// Why a torch tensor has no bytes that could be copied.
fn refusal(tensor: &Bound<'_, PyAny>, torch: &Torch) -> PyResult<Option<String>> {
    let py = tensor.py();
    let ty = tensor.get_type();
    if !ty.is(torch.tensor.bind(py)) && !ty.is(torch.parameter.bind(py)) {
        let name = ty.fully_qualified_name()?.to_string();
        if !ty.getattr("__torch_dispatch__")?.is(&torch.no_dispatch) {
            return Ok(Some(format!(
                "{name} keeps its bytes in its own way: store the plain tensors that it is made of"
            )));
        }
    }
    let flag = |name: &str| -> PyResult<bool> { tensor.getattr(name)?.is_truthy() };
    if flag("is_nested")? {
        return Ok(Some("a nested tensor: store its parts, `tensor.unbind()`".into()));
    }
    let layout = tensor.getattr("layout")?;
    if !layout.is(&torch.strided) {
        return Ok(Some(format!("a tensor of layout {layout}: store `tensor.to_dense()`")));
    }
    if flag("is_quantized")? {
        return Ok(Some(
            "a quantized tensor: store `tensor.int_repr()`, its scale and its zero point".into(),
        ));
    }
    if flag("is_meta")? {
        return Ok(Some("a tensor on the meta device has no bytes".into()));
    }
    Ok(None)
}

fn look_torch(tensor: &Bound<'_, PyAny>, torch: &Torch) -> PyResult<Looked> {
    let py = tensor.py();
    if let Some(why) = refusal(tensor, torch)? {
        return Ok(Err(why));
    }
    let dtype_object = tensor.getattr(intern!(py, "dtype"))?;
    let Some(dtype) = torch.dtype_of(&dtype_object) else {
        return Ok(Err(format!("a tensor of {dtype_object}, which safetensors does not know")));
    };
    if is_lazy(tensor, dtype)? {
        return Ok(Err("a lazily conjugated or negated tensor: store `tensor.resolve_conj()\
                       .resolve_neg()`"
            .into()));
    }
    let shape: Vec<usize> = tensor.getattr(intern!(py, "shape"))?.extract()?;
    let strides: Vec<isize> = tensor.call_method0(intern!(py, "stride"))?.extract()?;
    let start: usize = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
    let item: usize = dtype_object.getattr("itemsize")?.extract()?;
    let on_cpu = tensor.getattr("is_cpu")?.is_truthy()?;
    let device = tensor.getattr("device")?.str()?.to_string();
    if !on_cpu && !device.starts_with("cuda") {
        return Ok(Err(format!("a tensor on {device}: store `tensor.cpu()`")));
    }
    let strides: Vec<isize> = strides.iter().map(|s| s.saturating_mul(item as isize)).collect();
    let mut logical: Vec<u64> = shape.iter().map(|d| *d as u64).collect();
    if dtype == Dtype::F4 {
        // Two elements in each of torch's; safetensors counts them one by one.
        match logical.last_mut() {
            Some(last) => *last *= 2,
            None => return Ok(Err("a single packed pair of float4: give it a dimension".into())),
        }
    }
    let contiguous = tensor.call_method0(intern!(py, "is_contiguous"))?.is_truthy()?;
    let form = form_of(dtype, logical, (start, item), (&shape, &strides), contiguous);
    Ok(form.map(|form| Form { device: (!on_cpu).then_some(device), ..form }))
}

/// Whether the bytes in memory are not the tensor's values: a conjugate that was not carried out.
fn is_lazy(tensor: &Bound<'_, PyAny>, dtype: Dtype) -> PyResult<bool> {
    let py = tensor.py();
    Ok(match dtype {
        Dtype::C32 | Dtype::C64 | Dtype::C128 => {
            tensor.call_method0(intern!(py, "is_conj"))?.is_truthy()?
                || tensor.call_method0(intern!(py, "is_neg"))?.is_truthy()?
        }
        // The imaginary part of a lazy conjugate.
        Dtype::F16 | Dtype::F32 | Dtype::F64 => {
            tensor.call_method0(intern!(py, "is_neg"))?.is_truthy()?
        }
        _ => false,
    })
}

fn look_numpy(array: &Bound<'_, PyAny>) -> PyResult<Looked> {
    let dtype_object = array.getattr("dtype")?;
    let name = dtype_object.getattr("name")?.to_string();
    if let Some(dtype) = ml_dtype(&name) {
        // numpy shows no memory of types that it does not know.
        let plain = array.call_method1("view", (format!("u{}", dtype.bits() / 8),))?;
        return Ok(look_numpy(&plain)?.map(|form| Form { dtype, ..form }));
    }
    let Some(dtype) = numpy_dtype(&name) else {
        return Ok(Err(format!(
            "a numpy array of dtype {dtype_object}: only bool, int, float and complex of the usual \
             sizes are stored (a view as one of these may do)"
        )));
    };
    if !dtype_object.getattr("isnative")?.is_truthy()? {
        return Ok(Err(format!(
            "a numpy array of the other byte order ({dtype_object}): store \
             `array.astype(array.dtype.newbyteorder(\"=\"))`"
        )));
    }
    // The array outlives this view of it, and tensors in a state are not resized during a save.
    let scalar = array.getattr("ndim")?.extract::<usize>()? == 0;
    // A view without dimensions has no shape that pyo3 would take; with one of 1, it is as good.
    let view = if scalar { array.call_method1("reshape", (1,))? } else { array.clone() };
    let view = PyUntypedBuffer::get(&view)?;
    let shape = view.shape();
    let logical = shape.iter().filter(|_| !scalar).map(|d| *d as u64).collect();
    let place = (view.buf_ptr() as usize, view.item_size());
    let form = form_of(dtype, logical, place, (shape, view.strides()), view.is_c_contiguous());
    Ok(form.map(|form| Form { read_only: view.readonly(), ..form }))
}

/// `place` is the first byte and the bytes of one element; strides are in bytes.
fn form_of(
    dtype: Dtype,
    shape: Vec<u64>,
    (start, item): (usize, usize),
    (dims, strides): (&[usize], &[isize]),
    contiguous: bool,
) -> Looked {
    let bytes = dtype.bytes_of(&shape).ok_or_else(|| format!("{shape:?} has too many elements"))?;
    let address = Address::new(std::ptr::with_exposed_provenance_mut(start));
    let memory = if contiguous {
        Memory::Contiguous(address)
    } else {
        let strided = Strided::new(address, item, dims, strides).map_err(|e| e.to_string())?;
        match strided.contiguous() {
            Some(address) => Memory::Contiguous(address),
            None => Memory::Strided(strided),
        }
    };
    let span = span(start, item, dims, strides);
    let strides = if dims.len() == shape.len() { strides.to_vec() } else { Vec::new() };
    Ok(Form { dtype, shape, memory, start, strides, span, bytes, device: None, read_only: false })
}

fn span(start: usize, item: usize, dims: &[usize], strides: &[isize]) -> (usize, usize) {
    if dims.contains(&0) {
        return (start, start);
    }
    let (mut low, mut high) = (start, start.saturating_add(item));
    for (dim, stride) in dims.iter().zip(strides) {
        // `Strided::new` has refused what overflows.
        let reach = stride.unsigned_abs().saturating_mul(dim - 1);
        if *stride < 0 {
            low = low.saturating_sub(reach);
        } else {
            high = high.saturating_add(reach);
        }
    }
    (low, high)
}

/// What was learnt of one torch tensor, and what tells that it is still so.
pub(crate) struct Known {
    then: Then,
    /// Its bytes in memory may be other than its values, as those of a conjugate.
    may_be_lazy: bool,
    pub(crate) form: Arc<Form>,
    /// Where it was found last.
    pub(crate) spec: Option<Arc<TensorSpec>>,
}

/// What it was, as torch's C interface says it, or as its methods do.
enum Then {
    Seen(Seen),
    Asked { dtype: Py<PyAny>, shape: Py<PyAny>, stride: Py<PyAny> },
}

impl Known {
    /// Looks at `tensor` for the first time.
    pub(crate) fn of(tensor: &Bound<'_, PyAny>, torch: &Torch, form: Arc<Form>) -> PyResult<Self> {
        let py = tensor.py();
        let seen = torch.glancer.as_ref().and_then(|glancer| glancer.see(tensor));
        let then = match seen {
            Some(seen) => Then::Seen(seen),
            None => Then::Asked {
                dtype: tensor.getattr(intern!(py, "dtype"))?.unbind(),
                shape: tensor.getattr(intern!(py, "shape"))?.unbind(),
                stride: tensor.call_method0(intern!(py, "stride"))?.unbind(),
            },
        };
        // The imaginary part of a conjugate is negated lazily. It lies in the second half of a complex
        // element, and is not contiguous unless it is a single one: most tensors of a state need not
        // be asked.
        let item = form.dtype.bits() as usize / 8;
        let may_be_lazy = match form.dtype {
            Dtype::C32 | Dtype::C64 | Dtype::C128 => true,
            Dtype::F16 | Dtype::F32 | Dtype::F64 => match form.memory {
                Memory::Contiguous(_) => {
                    form.bytes == item as u64 && !form.start.is_multiple_of(2 * item)
                }
                _ => true,
            },
            _ => false,
        };
        Ok(Self { then, may_be_lazy, form, spec: None })
    }

    /// Whether `tensor`, an exact `Tensor` or `Parameter`, is what was learnt. Its identity alone
    /// says nothing: `tensor.data = other` keeps it, and a dead tensor's place is given to another.
    pub(crate) fn still(&self, tensor: &Bound<'_, PyAny>, torch: &Torch) -> PyResult<bool> {
        let same = match (&self.then, &torch.glancer) {
            (Then::Seen(seen), Some(glancer)) => glancer.is_still(tensor, seen),
            (Then::Seen(_), None) => false,
            (Then::Asked { dtype, shape, stride }, _) => {
                self.answers_the_same(tensor, dtype, shape, stride)?
            }
        };
        Ok(same && !(self.may_be_lazy && is_lazy(tensor, self.form.dtype)?))
    }

    /// Memory that is where it was is on the device that it was on.
    fn answers_the_same(
        &self,
        tensor: &Bound<'_, PyAny>,
        dtype: &Py<PyAny>,
        shape: &Py<PyAny>,
        stride: &Py<PyAny>,
    ) -> PyResult<bool> {
        let py = tensor.py();
        let start: usize = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
        Ok(start == self.form.start
            && tensor.getattr(intern!(py, "dtype"))?.is(dtype)
            && tensor.getattr(intern!(py, "shape"))?.eq(shape)?
            && tensor.call_method0(intern!(py, "stride"))?.eq(stride)?)
    }
}
