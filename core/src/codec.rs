//! Chunks of a payload made smaller, each alone, knowing which bytes of it are which elements.
//!
//! The bytes of a float tensor look like noise one after the other. Taken apart into planes (`planes`),
//! the exponents lie together and take a third of their place, and the rest is kept as it is, which costs
//! nothing to read back.
//!
//! It owns:
//! - the stored form of a chunk
//! - the decision whether a chunk is worth it: [`compress`] returns `None` where it is not
//!
//! It does not own:
//! - checksums: those of the manifest are of the bytes that come out of [`decompress`]
//! - which codec a chunk has: the manifest says that, and `none` is one
//!
//! # The stored form
//!
//! ```text
//! chunk:   version u8 = 1, runs until the chunk is full
//! run:     kind u8 (bits 0-1: log2 of the element's bytes; bit 2: float; others 0), its bytes u32,
//!          segments of SEGMENT elements (the last may have fewer), the bytes that are no whole element
//! segment: a plane for each byte of an element, the least significant first
//! plane:   its stored length u24, so many bytes: as long as the segment has elements: the plane;
//!          shorter: a zstd frame of it
//! ```
//!
//! Numbers are little-endian. A float's bits are turned left by one before it is taken apart; an element
//! of one byte is its own plane.
//!
//! # Invariants
//!
//! - What was compressed comes back, whatever the parts said that it was.
//! - The same bytes and parts are the same stored form, whatever the scratch was used for before: an
//!   upload that goes on where another ended depends on it. Another version of zstd may store otherwise.
//! - No stored form makes `decompress` panic, reach outside its slices or take memory: the scratch has
//!   what a segment needs.
//! - A stored form is smaller than its chunk by one part in 32 or more.

mod pack;
mod planes;
#[cfg(test)]
mod tests;
mod unpack;

use std::ops::Range;

use zstd::{
    bulk::{Compressor, Decompressor},
    zstd_safe::{self, CParameter, ParamSwitch},
};

pub use self::{pack::compress, unpack::decompress};
use crate::{
    error::{Error, Result},
    manifest::TensorEntry,
    state::dtype::Dtype,
};

const VERSION: u8 = 1;
/// Elements of a segment: a plane of it is one block of zstd, and all planes stay in the second cache
/// between being taken apart and being stored.
const SEGMENT: usize = 128 << 10;
const WIDTH_MAX: usize = 8;
/// A chunk, and a plane, stay as they are where less than one part in so many would be saved.
const SAVED_MIN: usize = 32;
/// Planes with fewer bytes are kept: a frame and its table would take as many.
const PLANE_MIN: usize = 64;
const FLOAT: u8 = 1 << 2;
const RUN_HEAD: usize = 5;
const PLANE_HEAD: usize = 3;

const _: () = assert!(SEGMENT < 1 << 24);

/// Bytes of a chunk that are elements of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// How many bytes. It begins with a whole element; the last may be cut.
    pub bytes: usize,
    /// Bytes of an element: 1, 2, 4 or 8.
    pub width: usize,
    /// Whether the elements are floats: sign, exponent, mantissa from the top.
    pub float: bool,
}

impl Part {
    /// Bytes that are no elements: a header, a gap, the rest of an element that an earlier chunk began.
    #[must_use]
    pub fn plain(bytes: usize) -> Self {
        Self { bytes, width: 1, float: false }
    }

    /// Bytes of a tensor.
    #[must_use]
    pub fn of(dtype: Dtype, bytes: usize) -> Self {
        let (width, float) = match dtype {
            Dtype::BOOL | Dtype::F4 | Dtype::F6_E2M3 | Dtype::F6_E3M2 | Dtype::U8 | Dtype::I8 => {
                (1, false)
            }
            Dtype::F8_E5M2
            | Dtype::F8_E4M3
            | Dtype::F8_E8M0
            | Dtype::F8_E4M3FNUZ
            | Dtype::F8_E5M2FNUZ => (1, true),
            Dtype::I16 | Dtype::U16 => (2, false),
            // Complex numbers are two floats.
            Dtype::F16 | Dtype::BF16 | Dtype::C32 => (2, true),
            Dtype::I32 | Dtype::U32 => (4, false),
            Dtype::F32 | Dtype::C64 => (4, true),
            Dtype::I64 | Dtype::U64 => (8, false),
            Dtype::F64 | Dtype::C128 => (8, true),
        };
        Self { bytes, width, float }
    }

    fn kind(self) -> u8 {
        assert!(matches!(self.width, 1 | 2 | 4 | 8), "elements of {} bytes", self.width);
        self.width.trailing_zeros() as u8 | if self.float { FLOAT } else { 0 }
    }
}

/// What the bytes `chunk` of a payload are, from its tensors in the order in which they lie.
#[must_use]
pub fn parts_of(tensors: &[TensorEntry], chunk: Range<u64>) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut at = chunk.start;
    let first = tensors.partition_point(|tensor| tensor.at[1] <= chunk.start);
    for tensor in &tensors[first..] {
        let [begin, end] = tensor.at.map(|at| at.min(chunk.end));
        if begin == chunk.end {
            break;
        }
        // Overlapping or unknown: bytes all the same, and `compress` must get each of them once.
        let Some(dtype) = Dtype::parse(&tensor.dtype).filter(|_| at < end) else { continue };
        let element = Part::of(dtype, 0).width as u64;
        // An element that the chunk before began ends here.
        let whole = match begin < at {
            true => tensor.at[0] + (at - tensor.at[0]).next_multiple_of(element),
            false => begin,
        };
        let whole = whole.min(end);
        parts.push(Part::plain((whole - at) as usize));
        parts.push(Part::of(dtype, (end - whole) as usize));
        at = end;
    }
    parts.push(Part::plain((chunk.end - at) as usize));
    parts.retain(|part| part.bytes > 0);
    parts
}

/// How planes of floats are compressed: by Huffman's code alone, which is all that exponents give. Only
/// each 512th byte is looked at for a repetition, so that rows of zeros are found and chance is not.
/// Measured on exponents: level 1, which looks for more, takes three to four times as long, and its result
/// is larger for weights and first moments, by a tenth; for second moments it is smaller by 3 %. The
/// negative levels look as rarely, but have no Huffman's code.
const FLOATS: [CParameter; 5] = [
    CParameter::Strategy(zstd_safe::Strategy::ZSTD_fast),
    CParameter::HashLog(6),
    CParameter::MinMatch(7),
    CParameter::TargetLength(512),
    CParameter::LiteralCompressionMode(ParamSwitch::Enable),
];

/// Memory that compressing and decompressing work in: for one thread, used again for each chunk.
pub struct Scratch {
    /// The planes of a segment.
    planes: Vec<u8>,
    /// The stored form.
    stored: Vec<u8>,
    /// For planes of floats, where symbols are few and repetitions mean nothing.
    floats: Compressor<'static>,
    /// For all others.
    others: Compressor<'static>,
    decompressor: Decompressor<'static>,
}

impl Scratch {
    /// Scratch for one thread.
    ///
    /// # Errors
    /// zstd refuses a parameter: a bug.
    pub fn new() -> Result<Self> {
        let made = || -> std::io::Result<Self> {
            let mut floats = Compressor::new(1)?;
            for parameter in FLOATS {
                floats.set_parameter(parameter)?;
            }
            let others = Compressor::new(1)?;
            let planes = vec![0; WIDTH_MAX * SEGMENT];
            let decompressor = Decompressor::new()?;
            Ok(Self { planes, stored: Vec::new(), floats, others, decompressor })
        };
        made().map_err(|error| Error::Bug(format!("zstd: {error}")))
    }
}
