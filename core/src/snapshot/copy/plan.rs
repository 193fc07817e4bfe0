//! Where every byte of a payload lies in memory.

use std::ops::Range;

use super::excerpt::Excerpt;
use crate::{
    error::{Error, Result},
    snapshot::strided::{Address, Strided},
};

/// Where the bytes of a piece are in memory.
#[derive(Clone, Debug)]
pub enum Memory {
    /// One run of memory.
    Bytes(Address),
    /// A tensor with gaps, or in another order than the payload.
    Strided(Strided),
    /// Already in the slot, brought by a device's DMA or an earlier phase: checksummed only.
    InPlace,
    /// Boxes of a tensor, none of which shares an element with another. Only to restore.
    Excerpts(Vec<Excerpt>),
    /// Nobody wants these bytes back. Only to restore; checksummed where their chunk is read at
    /// all.
    Skip,
}

/// A range of the payload and its memory.
#[derive(Clone, Debug)]
pub struct Piece {
    /// First byte in the payload.
    pub offset: usize,
    /// Length in bytes; may be 0.
    pub len: usize,
    /// The other side.
    pub memory: Memory,
    /// Copied by [`capture_now`](super::capture_now), while the trainer waits; the others by
    /// [`capture_rest`](super::capture_rest).
    pub now: bool,
    /// Its checksum is wanted apart from its chunks', under this number.
    pub tag: Option<usize>,
}

impl Piece {
    pub(super) fn end(&self) -> usize {
        self.offset + self.len
    }

    /// Bytes of it that lie in `range` of the payload are wanted.
    fn wants(&self, range: &Range<usize>) -> bool {
        match &self.memory {
            Memory::Skip => false,
            Memory::Excerpts(excerpts) => {
                let at = range.start.max(self.offset) - self.offset;
                let end = range.end.min(self.end()).saturating_sub(self.offset);
                excerpts.iter().any(|excerpt| excerpt.wants(at, end))
            }
            Memory::Bytes(_) | Memory::Strided(_) | Memory::InPlace => true,
        }
    }
}

/// The payload of one shard as pieces of memory, without a hole.
#[derive(Clone, Debug)]
pub struct Plan {
    pieces: Vec<Piece>,
    len: usize,
    chunk_bytes: usize,
    now_bytes: usize,
    pub(super) skips: bool,
    pub(super) overlaps: bool,
}

impl Plan {
    /// Pieces in payload order, each starting where the last one ended, the first at 0, the last
    /// ending at `len`. Empty pieces are dropped, and tensors that turn out contiguous become
    /// bytes.
    ///
    /// # Errors
    ///
    /// Where that is not so, or a tensor is not as long as its piece.
    pub fn new(pieces: Vec<Piece>, len: usize, chunk_bytes: usize) -> Result<Self> {
        let bug = |why: String| Err(Error::Bug(format!("copy plan: {why}")));
        if chunk_bytes == 0 || isize::try_from(len).is_err() {
            return bug(format!("{len} bytes in chunks of {chunk_bytes}"));
        }
        if u32::try_from(len.div_ceil(chunk_bytes)).is_err() {
            return bug(format!("{len} bytes are too many chunks of {chunk_bytes}"));
        }
        let mut plan = Self {
            pieces: Vec::new(),
            len,
            chunk_bytes,
            now_bytes: 0,
            skips: false,
            overlaps: false,
        };
        let mut at = 0_usize;
        for mut piece in pieces {
            if piece.offset != at {
                return bug(format!("a piece starts at byte {}, not {at}", piece.offset));
            }
            match at.checked_add(piece.len) {
                Some(end) if end <= len => at = end,
                _ => return bug(format!("{} bytes at {at} end behind byte {len}", piece.len)),
            }
            if let Memory::Strided(tensor) = &piece.memory {
                if tensor.len() != piece.len {
                    let (is, has) = (piece.len, tensor.len());
                    return bug(format!("{has} bytes of tensor at {} for {is}", piece.offset));
                }
                plan.overlaps |= tensor.overlaps();
                if let Some(start) = tensor.contiguous() {
                    piece.memory = Memory::Bytes(start);
                }
            }
            if let Memory::Excerpts(excerpts) = &piece.memory {
                plan.overlaps |= excerpts.iter().any(Excerpt::overlaps);
            }
            let skips = matches!(piece.memory, Memory::Skip | Memory::Excerpts(_));
            plan.skips |= piece.len > 0 && skips;
            if piece.len > 0 {
                plan.now_bytes += if piece.now { piece.len } else { 0 };
                plan.pieces.push(piece);
            }
        }
        if at != len {
            return bug(format!("the pieces end at byte {at} of {len}"));
        }
        Ok(plan)
    }

    /// Bytes of payload.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a payload of no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that [`capture_now`](super::capture_now) copies.
    #[must_use]
    pub fn now_bytes(&self) -> usize {
        self.now_bytes
    }

    /// How many chunks the payload has.
    #[must_use]
    pub fn chunks(&self) -> usize {
        self.len.div_ceil(self.chunk_bytes)
    }

    /// The payload bytes of a chunk.
    ///
    /// # Panics
    ///
    /// If there is no such chunk.
    #[must_use]
    pub fn chunk(&self, chunk: usize) -> Range<usize> {
        assert!(chunk < self.chunks(), "chunk {chunk} of {}", self.chunks());
        let start = chunk * self.chunk_bytes;
        start..self.len.min(start.saturating_add(self.chunk_bytes))
    }

    /// Whether somebody wants a byte of this chunk: if not, it need not be read to restore.
    ///
    /// # Panics
    ///
    /// If there is no such chunk.
    #[must_use]
    pub fn wants(&self, chunk: usize) -> bool {
        let range = self.chunk(chunk);
        self.pieces_in(&range).any(|piece| piece.wants(&range))
    }

    pub(super) fn pieces_in(&self, range: &Range<usize>) -> impl Iterator<Item = &Piece> {
        let first = self.pieces.partition_point(|piece| piece.end() <= range.start);
        let end = range.end;
        self.pieces[first..].iter().take_while(move |piece| piece.offset < end)
    }
}
