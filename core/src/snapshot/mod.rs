//! One copy of the training state, in RAM, checksummed on the way.
//!
//! It owns turning a [`State`] into a filled slot and a manifest. It does not own which slot
//! (`arena`), nor what happens to it afterwards (`cascade`).

pub mod arena;
pub mod budget;
pub mod copy;
pub mod device;
pub mod layout;
pub mod map;
pub mod slot;
pub mod strided;
mod witness;

use std::sync::Arc;

use self::{
    copy::{
        Part, Piece, Plan, Sums, capture_chunks, capture_now, capture_rest, threads_for, whole,
    },
    device::{Flight, Placement},
    layout::Layout,
    map::SlotMap,
    strided::Address,
    witness::{Seen, Witness},
};
use crate::{
    chunk::CHUNK_BYTES,
    error::{Error, Result},
    manifest::{
        Identity, Meta, Parts, PayloadInfo, combine, encode,
        replicated::{NOTHING, Replicated, words},
    },
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
    /// The tensors that other ranks store.
    witness: Witness,
    /// What was seen of them so far.
    seen: Vec<Part>,
    /// Those of the layout's table that lie on a device: nobody compares them.
    unseen: Vec<usize>,
}

/// The checksums that were taken on the way.
#[derive(Debug)]
pub(crate) struct Taken {
    chunks: Vec<u32>,
    /// Of the tensors that several ranks hold alike, in the order of the layout's table.
    replicas: Vec<Option<u32>>,
}

/// What is said of a filled slot.
pub(crate) struct Described {
    pub(crate) manifest: Vec<u8>,
    /// The checksum of each chunk.
    pub(crate) chunks: Vec<u32>,
    /// This rank's words about what it holds as others do.
    pub(crate) words: String,
}

impl Snapshot {
    /// Plans the copy of `state`, whose form is `layout`'s.
    ///
    /// # Errors
    /// The tree cannot be stored, or the state's memory does not fit its shapes.
    pub fn new(state: State, layout: Arc<Layout>, threads: Option<usize>) -> Result<Self> {
        layout.check_memory(&state.tensors)?;
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
            tag: None,
        });
        for (index, at, bytes) in &layout.order {
            let tensor = &state.tensors[*index];
            let (offset, len) = (size(*at)?, size(*bytes)?);
            let memory = match &tensor.memory {
                Memory::Contiguous(address) => copy::Memory::Bytes(*address),
                Memory::Strided(strided) => copy::Memory::Strided(strided.clone()),
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
            let tag = match memory {
                copy::Memory::InPlace => None,
                _ => layout.tags[*index],
            };
            pieces.push(Piece { offset, len, memory, now: !tensor.late, tag });
        }
        let mut seen = Vec::with_capacity(layout.elsewhere.len());
        for (index, bytes) in &layout.elsewhere {
            let tensor = &state.tensors[*index];
            let memory = match &tensor.memory {
                Memory::Contiguous(address) => copy::Memory::Bytes(*address),
                Memory::Strided(strided) => copy::Memory::Strided(strided.clone()),
                Memory::InSlot => continue, // Another rank brings it.
            };
            let Some(tag) = layout.tags[*index] else { continue };
            let len = size(*bytes)?;
            late_bytes += if tensor.late { len } else { 0 };
            seen.push(Seen { tag, len, memory, now: !tensor.late });
        }
        let plan = Plan::new(pieces, size(layout.len)?, size(CHUNK_BYTES)?)?;
        // The JSON is written later, behind the training where the copy is; what it could fail for is
        // said now.
        state.tree.check().map_err(unstorable)?;
        let witness = Witness::new(seen)?;
        let tags = state.tensors.iter().zip(&layout.tags);
        let unseen = tags.filter(|(tensor, _)| matches!(tensor.memory, Memory::InSlot));
        let unseen = unseen.filter_map(|(_, tag)| *tag).collect();
        let (tree, seen) = (state.tree, Vec::new());
        Ok(Self { layout, plan, tree, threads, on_device, late_bytes, witness, seen, unseen })
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
        self.plan.now_bytes() == self.plan.len() && self.witness.bytes(false) == 0
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
        self.threads.unwrap_or_else(|| threads_for(self.plan.len() + self.witness.bytes(true)))
    }

    fn check(&self, slot: &SlotMap) {
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
    pub(crate) unsafe fn take(&mut self, slot: &SlotMap, flight: &mut Flight) -> Result<Taken> {
        self.check(slot);
        let threads = self.threads();
        for now in [true, false] {
            // SAFETY: the caller's promise.
            self.seen.extend(unsafe { self.witness.look(now, threads) });
        }
        let chunks = self.plan.chunks();
        let stage = if self.on_device.is_empty() { chunks } else { CHUNKS_A_STAGE };
        let mut sums = Sums::default();
        for first in (0..chunks).step_by(stage.max(1)) {
            let stage = first..chunks.min(first + stage);
            flight.land(self.plan.chunk(stage.end - 1).end)?;
            // SAFETY: the caller's promise; the slot has room for the plan, and what a device brings
            // of these chunks is there.
            let found = unsafe { capture_chunks(&self.plan, slot.as_mut_ptr(), stage, threads) };
            sums.chunks.extend(found.chunks);
            sums.parts.extend(found.parts);
        }
        Ok(self.taken(sums))
    }

    /// Copies what may change as soon as the caller goes on.
    ///
    /// # Safety
    /// As [`take`](Self::take), for the tensors that are not `late`.
    pub(crate) unsafe fn begin(&mut self, slot: &SlotMap) {
        self.check(slot);
        let bytes = self.plan.now_bytes() + self.witness.bytes(true);
        let threads = self.threads.unwrap_or(usize::MAX).min(threads_for(bytes));
        // SAFETY: the caller's promise.
        self.seen.extend(unsafe { self.witness.look(true, threads) });
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
    pub(crate) unsafe fn finish(&mut self, slot: &SlotMap, flight: &mut Flight) -> Result<Taken> {
        self.check(slot);
        // One thread: this runs beside the training, which wants the other cores.
        let threads = self.threads.unwrap_or(1);
        // SAFETY: the caller's promise.
        self.seen.extend(unsafe { self.witness.look(false, threads) });
        flight.land(self.plan.len())?;
        // SAFETY: the caller's promise; the slot has room for the plan.
        let sums = unsafe { capture_rest(&self.plan, slot.as_mut_ptr(), threads) };
        Ok(self.taken(sums))
    }

    fn taken(&mut self, mut sums: Sums) -> Taken {
        sums.parts.append(&mut self.seen);
        let tags = self.layout.replicated.as_ref().map_or(0, |table| table.tensors.len());
        let mut replicas: Vec<_> = whole(sums.parts, tags).into_iter().map(Some).collect();
        self.unseen.iter().for_each(|tag| replicas[*tag] = None);
        Taken { chunks: sums.chunks, replicas }
    }

    /// The shard manifest over the filled slot, and what goes with it.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub(crate) fn manifest(
        &self,
        identity: &Identity,
        meta: &Meta,
        taken: Taken,
    ) -> Result<Described> {
        let crcs = taken.chunks;
        let payload = PayloadInfo {
            file: identity.payload_name(),
            length: self.len(),
            chunk_bytes: CHUNK_BYTES,
            algorithm: "crc32".into(),
            codec: "none".into(),
            crc: combine(&crcs, self.len(), CHUNK_BYTES),
            chunks: crcs,
            stored: None,
        };
        let mut tree_json = Vec::new();
        self.tree.write_json(&mut tree_json).map_err(unstorable)?;
        let replicated = self.layout.replicated.clone();
        let replicated = replicated.map(|table| Replicated { crcs: taken.replicas, ..table });
        let manifest = encode(&Parts {
            identity,
            payload: &payload,
            tensors_json: &self.layout.tensors_json,
            tree_json: &tree_json,
            replicated: replicated.as_ref(),
            has_boxes: self.layout.has_boxes,
            meta,
        })?;
        let words = replicated.as_ref().map_or_else(|| NOTHING.into(), words);
        Ok(Described { manifest, chunks: payload.chunks, words })
    }
}

fn unstorable(e: EncodeError) -> Error {
    Error::Unstorable { why: e.problem.to_string(), path: e.path }
}
