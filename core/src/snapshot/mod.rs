//! One copy of the training state, in RAM, checksummed on the way.
//!
//! It owns turning a [`State`] into a filled slot and a manifest. It does not own which slot
//! (`arena`), nor what happens to it afterwards (`cascade`).

pub mod arena;
pub mod budget;
pub mod copy;
pub mod layout;
pub mod slot;
pub mod strided;

use std::sync::Arc;

use self::{
    copy::{Piece, Plan, capture, capture_now, capture_rest, threads_for},
    layout::Layout,
    slot::Slot,
    strided::Address,
};
use crate::{
    chunk::CHUNK_BYTES,
    error::{Error, Result},
    manifest::{Identity, Meta, Parts, PayloadInfo, combine, encode},
    state::{
        Memory, State,
        value::{EncodeError, Value},
    },
};

/// A state on its way into a slot: where each byte comes from and goes to.
#[derive(Debug)]
pub struct Snapshot {
    layout: Arc<Layout>,
    plan: Plan,
    tree: Value,
    threads: Option<usize>,
}

impl Snapshot {
    /// Plans the copy of `state`, whose form is `layout`'s.
    ///
    /// # Errors
    /// The tree cannot be stored, or the state's memory does not fit its shapes.
    pub fn new(state: State, layout: Arc<Layout>, threads: Option<usize>) -> Result<Self> {
        let size = |n: u64| usize::try_from(n).map_err(|_| Error::Bug("a 32-bit machine".into()));
        let mut pieces = Vec::with_capacity(layout.order.len() + 1);
        pieces.push(Piece {
            offset: 0,
            len: layout.header.len(),
            // The layout lives as long as this plan.
            memory: copy::Memory::Bytes(Address::read_only(layout.header.as_ptr())),
            now: true,
        });
        for (index, at, bytes) in &layout.order {
            let tensor = &state.tensors[*index];
            let memory = match &tensor.memory {
                Memory::Contiguous(address) => copy::Memory::Bytes(*address),
                Memory::Strided(strided) if strided.len() as u64 == *bytes => {
                    copy::Memory::Strided(strided.clone())
                }
                Memory::Strided(strided) => {
                    return Err(Error::Bug(format!(
                        "{}: {} bytes by strides, {bytes} by shape",
                        tensor.spec.name,
                        strided.len()
                    )));
                }
                Memory::InSlot => copy::Memory::InPlace,
            };
            let (offset, len) = (size(*at)?, size(*bytes)?);
            pieces.push(Piece { offset, len, memory, now: !tensor.late });
        }
        let plan = Plan::new(pieces, size(layout.len)?, size(CHUNK_BYTES)?)?;
        // The JSON is written later, behind the training where the copy is; what it could fail for is
        // said now.
        state.tree.check().map_err(unstorable)?;
        Ok(Self { layout, plan, tree: state.tree, threads })
    }

    /// Exact bytes of the payload.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.layout.len
    }

    /// True for a payload of no bytes; there is none, the header has some.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.layout.len == 0
    }

    /// True where nothing is left for [`finish`](Self::finish) to copy.
    #[must_use]
    pub fn is_all_now(&self) -> bool {
        self.plan.now_bytes() == self.plan.len()
    }

    fn threads(&self) -> usize {
        self.threads.unwrap_or_else(|| threads_for(self.plan.len()))
    }

    fn check(&self, slot: &Slot) {
        assert!(slot.capacity() >= self.plan.len(), "a slot that is too small");
    }

    /// Copies and checksums everything.
    ///
    /// # Safety
    /// The state's memory is readable and nobody writes to it until this returns; the slot is being
    /// filled by this caller alone.
    #[must_use]
    pub unsafe fn take(&self, slot: &Slot) -> Vec<u32> {
        self.check(slot);
        // SAFETY: the caller's promise; the slot has room for the plan.
        unsafe { capture(&self.plan, slot.as_mut_ptr(), self.threads()) }
    }

    /// Copies what may change as soon as the caller goes on.
    ///
    /// # Safety
    /// As [`take`](Self::take), for the tensors that are not `late`.
    pub unsafe fn begin(&self, slot: &Slot) {
        self.check(slot);
        let threads = self.threads.unwrap_or(usize::MAX).min(threads_for(self.plan.now_bytes()));
        // SAFETY: the caller's promise; the slot has room for the plan.
        unsafe { capture_now(&self.plan, slot.as_mut_ptr(), threads) };
    }

    /// Copies the rest, and checksums everything.
    ///
    /// # Safety
    /// As [`take`](Self::take), for the tensors that are `late`; [`begin`](Self::begin) came
    /// before.
    #[must_use]
    pub unsafe fn finish(&self, slot: &Slot) -> Vec<u32> {
        self.check(slot);
        // One thread: this runs beside the training, which wants the other cores.
        // SAFETY: the caller's promise; the slot has room for the plan.
        unsafe { capture_rest(&self.plan, slot.as_mut_ptr(), self.threads.unwrap_or(1)) }
    }

    /// The shard manifest over the filled slot.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub fn manifest(&self, identity: &Identity, meta: &Meta, crcs: Vec<u32>) -> Result<Vec<u8>> {
        let payload = PayloadInfo {
            file: identity.payload_name(),
            length: self.len(),
            chunk_bytes: CHUNK_BYTES,
            algorithm: "crc32".into(),
            codec: "none".into(),
            crc: combine(&crcs, self.len(), CHUNK_BYTES),
            chunks: crcs,
        };
        let mut tree_json = Vec::new();
        self.tree.write_json(&mut tree_json).map_err(unstorable)?;
        encode(&Parts {
            identity,
            payload: &payload,
            tensors_json: &self.layout.tensors_json,
            tree_json: &tree_json,
            meta,
        })
    }
}

fn unstorable(e: EncodeError) -> Error {
    Error::Unstorable { why: e.problem.to_string(), path: e.path }
}
