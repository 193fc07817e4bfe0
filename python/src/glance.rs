//! What a torch tensor is at this moment, in one call of torch's C interface for DLPack, where this
//! torch has it. Five calls of methods say the same and take five times as long, which for two
//! thousand tensors is a millisecond.
//!
//! The struct and its versions are those of `dlpack.h` 1.3, "DLPackExchangeAPI"; a new major version
//! may change them and is not used.

use std::{ffi::c_void, ptr, slice};

use pyo3::{
    ffi,
    prelude::*,
    types::{PyCapsule, PyCapsuleMethods},
};

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

type TensorOf = unsafe extern "C" fn(*mut ffi::PyObject, *mut DlTensor) -> i32;

#[repr(C)]
struct ExchangeApi {
    major: u32,
    minor: u32,
    prev_api: *const c_void,
    managed_tensor_allocator: *const c_void,
    managed_tensor_from_py_object: *const c_void,
    managed_tensor_to_py_object: *const c_void,
    dltensor_from_py_object: Option<TensorOf>,
}

/// torch's function that looks at a tensor.
pub(crate) struct Glancer {
    tensor_of: TensorOf,
}

impl Glancer {
    /// That of `tensor_type`, which is `torch.Tensor`; `None` for a torch without it.
    pub(crate) fn of(tensor_type: &Bound<'_, PyAny>) -> Option<Self> {
        let capsule = tensor_type.getattr("__dlpack_c_exchange_api__").ok()?;
        let capsule = capsule.cast_into::<PyCapsule>().ok()?;
        let api = capsule.pointer_checked(Some(c"dlpack_exchange_api")).ok()?;
        // SAFETY: a capsule of this name holds such a struct, which is static; its first two fields
        // say its version, and are there in every version.
        let api = unsafe { api.cast::<ExchangeApi>().as_ref() };
        if api.major != 1 || api.minor < 3 {
            return None;
        }
        Some(Self { tensor_of: api.dltensor_from_py_object? })
    }

    /// Whether `tensor`, an exact `Tensor` or `Parameter`, is what `seen` says; an error of torch's
    /// says no.
    pub(crate) fn is_still(&self, tensor: &Bound<'_, PyAny>, seen: &Seen) -> bool {
        self.look(tensor, |now| seen.is(now)).unwrap_or(false)
    }

    /// What `tensor` is now.
    pub(crate) fn see(&self, tensor: &Bound<'_, PyAny>) -> Option<Seen> {
        self.look(tensor, |now| {
            let (shape, strides) = now.dims();
            Seen {
                start: now.data as usize,
                device: (now.device_type, now.device_id),
                dtype: (now.code, now.bits, now.lanes),
                shape: shape.into(),
                strides: strides.into(),
            }
        })
    }

    fn look<T>(&self, tensor: &Bound<'_, PyAny>, say: impl FnOnce(&DlTensor) -> T) -> Option<T> {
        let mut now = DlTensor {
            data: ptr::null_mut(),
            device_type: 0,
            device_id: 0,
            ndim: 0,
            code: 0,
            bits: 0,
            lanes: 0,
            shape: ptr::null(),
            strides: ptr::null(),
            byte_offset: 0,
        };
        // SAFETY: a tensor of torch, with the GIL held, and a struct to be filled.
        let failed = unsafe { (self.tensor_of)(tensor.as_ptr(), &raw mut now) } != 0;
        if failed {
            // It cannot be told this way: the slow look says why, where anything is wrong.
            drop(PyErr::take(tensor.py()));
            return None;
        }
        (now.byte_offset == 0).then(|| say(&now))
    }
}

impl DlTensor {
    /// Shape and strides, in elements; they lie in the tensor, which is alive.
    fn dims(&self) -> (&[i64], &[i64]) {
        let count = usize::try_from(self.ndim).unwrap_or(0);
        if count == 0 || self.shape.is_null() || self.strides.is_null() {
            return (&[], &[]);
        }
        // SAFETY: both have `ndim` numbers for as long as the tensor is not changed, and the GIL is
        // held while they are looked at.
        unsafe {
            (slice::from_raw_parts(self.shape, count), slice::from_raw_parts(self.strides, count))
        }
    }
}

/// What a tensor was when it was seen.
pub(crate) struct Seen {
    start: usize,
    device: (i32, i32),
    dtype: (u8, u8, u16),
    shape: Box<[i64]>,
    strides: Box<[i64]>,
}

impl Seen {
    fn is(&self, now: &DlTensor) -> bool {
        let (shape, strides) = now.dims();
        self.start == now.data as usize
            && self.device == (now.device_type, now.device_id)
            && self.dtype == (now.code, now.bits, now.lanes)
            && same(&self.shape, shape)
            && same(&self.strides, strides)
    }
}

/// Number by number: `==` is a memcmp, whose masked load of nothing from the address of an empty slice,
/// where no page is, takes a tenth of a microsecond.
fn same(a: &[i64], b: &[i64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b)
}
