//! A training state as the core sees it: a tree of plain values whose leaves name tensors, and the
//! tensors as views into the caller's memory.
//!
//! Nothing here knows torch, JAX or Python. Nothing here copies a byte of a tensor.

pub mod boxes;
pub mod dtype;
pub mod path;
pub mod replicas;
pub mod value;

use std::sync::Arc;

use dtype::Dtype;
use value::Value;

use crate::{
    error::{Error, Result},
    snapshot::strided::{Address, Strided},
};

/// What a tensor is: everything that stays the same from save to save.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorSpec {
    /// The escaped path (`state::path`); of a box, `boxes::box_name`.
    pub name: Arc<str>,
    /// Element type.
    pub dtype: Dtype,
    /// Shape of what this rank holds, in elements.
    pub shape: Vec<u64>,
    /// (shape of the global tensor, where this box begins in it), where this is a part of one.
    pub part_of: Option<(Vec<u64>, Vec<u64>)>,
    /// The ranks that hold the same bytes, this one among them, rising: where the tensor itself says so.
    /// Empty: what the user says counts.
    pub held_by: Vec<u32>,
}

impl TensorSpec {
    /// Bytes in the payload.
    ///
    /// # Errors
    /// More bytes than can be, or half a byte.
    pub fn bytes(&self) -> Result<u64> {
        self.dtype.bytes_of(&self.shape).ok_or_else(|| {
            Error::invalid(format!(
                "{}: {} {:?} is not a whole number of bytes below 2^64",
                self.name, self.dtype, self.shape
            ))
        })
    }
}

/// Where a tensor's bytes are.
#[derive(Clone, Debug)]
pub enum Memory {
    /// One run, row-major.
    Contiguous(Address),
    /// With strides.
    Strided(Strided),
    /// In the slot already (brought by a device's DMA); checksummed only.
    InSlot,
}

/// One tensor of a state: a view. The caller keeps the memory alive and unchanged until the save is
/// staged.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// What it is; shared with the layout, so that a form that stayed is seen by its address.
    pub spec: Arc<TensorSpec>,
    /// Where its bytes are.
    pub memory: Memory,
    /// May be copied after `save` returns: it is owned by a guarded optimizer, which waits.
    pub late: bool,
}

/// One rank's training state at one step.
#[derive(Clone, Debug)]
pub struct State {
    /// The tree; its `Value::Tensor` leaves name entries of `tensors`. Tied tensors name one.
    pub tree: Value,
    /// The tensors, in any order, each name once.
    pub tensors: Vec<Tensor>,
}
