//! One copy of the training state, in RAM, checksummed on the way.
//!
//! It owns turning a [`State`] into a filled slot and a manifest. It does not own which slot
//! (`arena`), nor what happens to it afterwards (`cascade`).

pub mod arena;
pub mod budget;
pub mod copy;
pub mod device;
pub mod layout;
pub mod slot;
pub mod strided;

use std::sync::Arc;

use self::{
    copy::{Piece, Plan, capture_chunks, capture_now, capture_rest, threads_for},
    device::{Flight, Placement},
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

/// Chunks that are checksummed while a device brings the next ones: 128 MiB, some 2 ms of either, so
/// that neither the first nor the last stage, which wait for nothing else, counts.
const CHUNKS_A_STAGE: usize = 32;

/// A state on its way into a slot: where each byte comes from and goes to.
#[derive(Debug)]
pub struct Snapshot {
    layout: Arc<Layout>,
    plan: Plan,
    tree: Value,
    threads: Option<usize>,
    on_device: Vec<Placement>,
    /// Bytes of the host that are copied late.
    late_bytes: usize,
}

impl Snapshot {
    /// Plans the copy of `state`, whose form is `layout`'s.
    ///
    /// # Errors
    /// The tree cannot be stored, or the state's memory does not fit its shapes.
    pub fn new(state: State, layout: Arc<Layout>, threads: Option<usize>) -> Result<Self> {
        let size = |n: u64| usize::try_from(n).map_err(|_| Error::Bug("a 32-bit machine".into()));
        let mut pieces = Vec::with_capacity(layout.order.len() + 1);
        let mut on_device = Vec::new();
        let mut late_bytes = 0;
        pieces.push(Piece {
            offset: 0,
            len: layout.header.len(),
            // The layout lives as long as this plan.
            memory: copy::Memory::Bytes(Address::read_only(layout.header.as_ptr())),
            now: true,
        });
        for (index, at, bytes) in &layout.order {
            let tensor = &state.tensors[*index];
            let (offset, len) = (size(*at)?, size(*bytes)?);
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
                Memory::InSlot => {
                    if len > 0 {
                        on_device.push(Placement { tensor: *index, offset, len });
                    }
                    copy::Memory::InPlace
                }
            };
            if tensor.late && !matches!(memory, copy::Memory::InPlace) {
                late_bytes += len;
            }
            pieces.push(Piece { offset, len, memory, now: !tensor.late });
        }
        let plan = Plan::new(pieces, size(layout.len)?, size(CHUNK_BYTES)?)?;
        // The JSON is written later, behind the training where the copy is; what it could fail for is
        // said now.
        state.tree.check().map_err(unstorable)?;
        Ok(Self { layout, plan, tree: state.tree, threads, on_device, late_bytes })
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

    /// What a device brings, before [`take`](Self::take) or [`finish`](Self::finish).
    #[must_use]
    pub fn on_device(&self) -> &[Placement] {
        &self.on_device
    }

    /// True where [`finish`](Self::finish) reads memory of the host that its owner waits for.
    #[must_use]
    pub fn reads_host_late(&self) -> bool {
        self.late_bytes > 0
    }

    fn threads(&self) -> usize {
        self.threads.unwrap_or_else(|| threads_for(self.plan.len()))
    }

    fn check(&self, slot: &Slot) {
        assert!(slot.capacity() >= self.plan.len(), "a slot that is too small");
    }

    /// Copies and checksums everything, what a device brings as soon as it has landed.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Safety
    /// The state's memory is readable and nobody writes to it until this returns; the slot is being
    /// filled by this caller and `flight` alone.
    pub(crate) unsafe fn take(&self, slot: &Slot, flight: &mut Flight) -> Result<Vec<u32>> {
        self.check(slot);
        let chunks = self.plan.chunks();
        let stage = if self.on_device.is_empty() { chunks } else { CHUNKS_A_STAGE };
        let mut crcs = Vec::with_capacity(chunks);
        for first in (0..chunks).step_by(stage.max(1)) {
            let stage = first..chunks.min(first + stage);
            flight.land(self.plan.chunk(stage.end - 1).end)?;
            // SAFETY: the caller's promise; the slot has room for the plan, and what a device brings
            // of these chunks is there.
            let found =
                unsafe { capture_chunks(&self.plan, slot.as_mut_ptr(), stage, self.threads()) };
            crcs.extend(found);
        }
        Ok(crcs)
    }

    /// Copies what may change as soon as the caller goes on.
    ///
    /// # Safety
    /// As [`take`](Self::take), for the tensors that are not `late`.
    pub(crate) unsafe fn begin(&self, slot: &Slot) {
        self.check(slot);
        let threads = self.threads.unwrap_or(usize::MAX).min(threads_for(self.plan.now_bytes()));
        // SAFETY: the caller's promise; the slot has room for the plan.
        unsafe { capture_now(&self.plan, slot.as_mut_ptr(), threads) };
    }

    /// Copies the rest, and checksums everything.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Safety
    /// As [`take`](Self::take), for the tensors that are `late`; [`begin`](Self::begin) came
    /// before.
    pub(crate) unsafe fn finish(&self, slot: &Slot, flight: &mut Flight) -> Result<Vec<u32>> {
        self.check(slot);
        flight.land(self.plan.len())?;
        // One thread: this runs beside the training, which wants the other cores.
        // SAFETY: the caller's promise; the slot has room for the plan.
        Ok(unsafe { capture_rest(&self.plan, slot.as_mut_ptr(), self.threads.unwrap_or(1)) })
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
