//! Tensors that do not lie in one run of memory: where byte `n` of the payload is, and the loops
//! that bring many of them together.
//!
//! The payload holds a tensor row-major, as if it were contiguous. In memory it may be transposed,
//! a slice of a larger one, in channels-last order, or one row seen many times. Dimensions are
//! merged until what is contiguous is one run, so that a slice of rows costs a memcpy a row.
//!
//! Owns: the geometry, and moving any byte range of it. Does not own: checksums, chunks, threads
//! (`snapshot::copy`), or whose memory it is (the caller, who promises it in each unsafe call).
//!
//! Measured as capture and restore, ratios to memcpy of as many contiguous bytes, one thread, 15
//! rounds of benches/copy.rs on an Intel Xeon (family 6 model 207): 768 of 4,096 f32 columns, rows
//! of 3 KiB, 1.25 and 1.23; every second column 1.73 and 1.81; a 4,096 x 4,096 transpose 3.5 and
//! 3.2 (between 2.5 and 4 in all runs; without tiles 15 and 16).
//!
//! # Invariants
//!
//! - Any byte range of any geometry is what the naive loop over its elements gives.
//! - Scattering is the inverse of gathering, and touches nothing between the elements.
//! - A geometry that overflows or whose elements share memory is found when it is built.

use std::ptr;

use crate::error::{Error, Result};

/// A place in memory, of a tensor or a slot. As safe as a number: only the unsafe functions here
/// and in [`super::copy`] read or write through it, and their callers promise what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(*mut u8);

// SAFETY: an address does nothing by itself; whoever dereferences it promises that no other thread
// is in the way.
unsafe impl Send for Address {}
// SAFETY: as above; shared access gives only copies of the number.
unsafe impl Sync for Address {}

impl Address {
    /// Memory that is read, and also written where a checkpoint is restored into it.
    #[must_use]
    pub fn new(start: *mut u8) -> Self {
        Self(start)
    }

    /// Memory that is only read: for a capture.
    #[must_use]
    pub fn read_only(start: *const u8) -> Self {
        Self(start.cast_mut())
    }

    pub(crate) fn get(self) -> *mut u8 {
        self.0
    }
}

/// One dimension that could not be merged: so many steps, so many bytes apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Dim {
    count: usize,
    stride: isize,
}

/// The memory of one tensor, by its strides.
#[derive(Clone, Debug)]
pub struct Strided {
    start: Address,
    len: usize,
    /// Contiguous bytes at the innermost place; one element, or many where dimensions were merged.
    run: usize,
    /// Outermost first; each with more than one step, no two mergeable. Empty: contiguous.
    dims: Vec<Dim>,
    overlaps: bool,
}

/// One cache line holds this many bytes; a tile of a transpose uses all that a line brought.
const LINE_BYTES: usize = 64;

/// Lines of memory in one tile. Where the stride is a power of two they all fall into one set of
/// the first-level cache, which holds 8 or 12: with 64 a restore took 1.7 times as long.
const TILE_STEPS: usize = 8;

impl Strided {
    /// A tensor whose element `[0, 0, ..]` is at `start`, with `strides` in bytes (negative
    /// allowed).
    ///
    /// # Errors
    ///
    /// Where shape and strides differ in length, `itemsize` is 0, or a size or distance overflows.
    pub fn new(
        start: Address,
        itemsize: usize,
        shape: &[usize],
        strides: &[isize],
    ) -> Result<Self> {
        let overflow = || {
            Error::invalid(format!("a tensor of shape {shape:?} and strides {strides:?} overflows"))
        };
        if shape.len() != strides.len() || itemsize == 0 {
            return Err(Error::invalid(format!(
                "a tensor of {} dimensions has {} strides and {itemsize} bytes an element",
                shape.len(),
                strides.len()
            )));
        }
        if shape.contains(&0) {
            return Ok(Self { start, len: 0, run: itemsize, dims: Vec::new(), overlaps: false });
        }
        let len = shape.iter().try_fold(itemsize, |n, d| n.checked_mul(*d)).ok_or_else(overflow)?;
        isize::try_from(len).map_err(|_| overflow())?;
        let (run, dims) = merge(itemsize, shape, strides).ok_or_else(overflow)?;
        let overlaps = overlaps(run, &dims).ok_or_else(overflow)?;
        Ok(Self { start, len, run, dims, overlaps })
    }

    /// Bytes of payload.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a tensor with a dimension of size 0.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it is, if it is one run of memory after all.
    #[must_use]
    pub fn contiguous(&self) -> Option<Address> {
        self.dims.is_empty().then_some(self.start)
    }

    /// True where elements share memory, as after `expand`: such a tensor can be saved but not
    /// restored into. Also true for a few interleaved geometries that happen not to overlap.
    #[must_use]
    pub fn overlaps(&self) -> bool {
        self.overlaps
    }

    /// Copies payload bytes `[at, at + n)` from the tensor to `out`.
    ///
    /// # Safety
    ///
    /// `at + n <= len()`. Every element of the tensor is readable, `out` is writable for `n` bytes
    /// and not part of the tensor, and no thread writes to either meanwhile.
    pub unsafe fn gather(&self, at: usize, out: *mut u8, n: usize) {
        // SAFETY: `walk` reads from the tensor and writes to `out`, as promised by the caller.
        unsafe { self.walk::<true>(at, out, n) }
    }

    /// Copies `n` bytes at `from` into payload bytes `[at, at + n)` of the tensor.
    ///
    /// # Safety
    ///
    /// `at + n <= len()`, and not [`overlaps`](Self::overlaps). Every element of the tensor is
    /// writable, `from` is readable for `n` bytes and not part of the tensor, and no thread touches
    /// these elements or writes to `from` meanwhile.
    pub unsafe fn scatter(&self, at: usize, from: *const u8, n: usize) {
        // SAFETY: with `GATHER` false, `walk` only reads from the flat side.
        unsafe { self.walk::<false>(at, from.cast_mut(), n) }
    }

    /// # Safety
    ///
    /// As [`gather`](Self::gather) or [`scatter`](Self::scatter).
    unsafe fn walk<const GATHER: bool>(&self, at: usize, mut flat: *mut u8, mut n: usize) {
        debug_assert!(at.checked_add(n).is_some_and(|end| end <= self.len), "outside the tensor");
        if n == 0 {
            return;
        }
        let mut place = Place::locate(self, at / self.run);
        let within = at % self.run;
        // SAFETY: `place` is that of an element, the steps stay inside [at, at + n), and the caller
        // vouches for every element and for `n` bytes at `flat`. Addresses are computed with
        // wrapping arithmetic, so that stepping past the last element is not an access.
        unsafe {
            if within > 0 {
                let m = n.min(self.run - within);
                shift::<GATHER>(flat, place.at.wrapping_add(within), m);
                (flat, n) = (flat.wrapping_add(m), n - m);
                if within + m == self.run {
                    place.step(&self.dims, 1);
                }
            }
            while n >= self.run {
                let done = match self.tile(&place, n) {
                    Some(rows) => self.transpose::<GATHER>(&mut place, flat, rows),
                    None => self.row::<GATHER>(&mut place, flat, n / self.run),
                };
                (flat, n) = (flat.wrapping_add(done), n - done);
            }
            if n > 0 {
                shift::<GATHER>(flat, place.at, n);
            }
        }
    }

    /// How many rows can be taken as one tile: where neighbours in memory are neighbours in the
    /// *second* innermost dimension, going row by row would fetch each cache line once for each of
    /// its elements.
    fn tile(&self, place: &Place, n: usize) -> Option<usize> {
        let [.., outer, inner] = self.dims[..] else { return None };
        let [.., i, j] = place.index[..] else { return None };
        if j != 0 || outer.stride.unsigned_abs() >= LINE_BYTES.min(inner.stride.unsigned_abs()) {
            return None;
        }
        let rows = (outer.count - i).min(n / (inner.count * self.run));
        (rows > 1).then_some(rows)
    }

    /// # Safety
    ///
    /// As [`walk`](Self::walk), for `rows` whole rows from `place`. Returns bytes moved.
    unsafe fn transpose<const GATHER: bool>(
        &self,
        place: &mut Place,
        flat: *mut u8,
        rows: usize,
    ) -> usize {
        let [.., outer, inner] = self.dims[..] else { return 0 };
        let row_bytes = inner.count * self.run;
        for j in (0..inner.count).step_by(TILE_STEPS) {
            let steps = TILE_STEPS.min(inner.count - j);
            let column = place.at.wrapping_offset(j as isize * inner.stride);
            for i in 0..rows {
                let memory = column.wrapping_offset(i as isize * outer.stride);
                let flat = flat.wrapping_add(i * row_bytes + j * self.run);
                // SAFETY: row `i` and steps [j, j + steps) are inside the tensor and the flat
                // range.
                unsafe { runs::<GATHER>(flat, memory, inner.stride, self.run, steps) };
            }
        }
        place.step_outer(&self.dims, rows);
        rows * row_bytes
    }

    /// # Safety
    ///
    /// As [`walk`](Self::walk), for at most `runs_max` runs, to the end of the row. Returns bytes
    /// moved.
    unsafe fn row<const GATHER: bool>(
        &self,
        place: &mut Place,
        flat: *mut u8,
        runs_max: usize,
    ) -> usize {
        let (steps, stride) = match (self.dims.last(), place.index.last()) {
            (Some(dim), Some(index)) => (runs_max.min(dim.count - index), dim.stride),
            _ => (1, 0),
        };
        // SAFETY: the next `steps` runs of this row are inside the tensor and the flat range.
        unsafe { runs::<GATHER>(flat, place.at, stride, self.run, steps) };
        place.step(&self.dims, steps);
        steps * self.run
    }
}

/// The place of one run: its index in each dimension, and its address.
struct Place {
    index: Vec<usize>,
    at: *mut u8,
}

impl Place {
    fn locate(tensor: &Strided, mut run: usize) -> Self {
        let mut index = vec![0; tensor.dims.len()];
        let mut at = tensor.start.get();
        for (slot, dim) in index.iter_mut().zip(&tensor.dims).rev() {
            *slot = run % dim.count;
            run /= dim.count;
            at = at.wrapping_offset(*slot as isize * dim.stride);
        }
        Self { index, at }
    }

    /// Goes on by `n` runs, at most to the end of the row.
    fn step(&mut self, dims: &[Dim], n: usize) {
        self.carry(dims, dims.len(), n);
    }

    /// Goes on by `n` rows, at most to the end of the second innermost dimension.
    fn step_outer(&mut self, dims: &[Dim], n: usize) {
        self.carry(dims, dims.len().saturating_sub(1), n);
    }

    fn carry(&mut self, dims: &[Dim], upto: usize, mut n: usize) {
        for (index, dim) in self.index[..upto].iter_mut().zip(&dims[..upto]).rev() {
            *index += n;
            self.at = self.at.wrapping_offset(n as isize * dim.stride);
            if *index < dim.count {
                return;
            }
            self.at = self.at.wrapping_offset(-(dim.count as isize * dim.stride));
            *index = 0;
            n = 1;
        }
    }
}

/// Contiguous bytes at the innermost place, and the dimensions around them.
fn merge(itemsize: usize, shape: &[usize], strides: &[isize]) -> Option<(usize, Vec<Dim>)> {
    let mut run = itemsize;
    let mut inner_first: Vec<Dim> = Vec::new();
    for (&count, &stride) in shape.iter().zip(strides).rev().filter(|(count, _)| **count > 1) {
        // One step past the end is computed, never accessed.
        stride.checked_mul(isize::try_from(count).ok()?)?;
        match inner_first.last_mut() {
            None if isize::try_from(run).is_ok_and(|run| run == stride) => run *= count,
            Some(inner) if stride == inner.stride * inner.count as isize => inner.count *= count,
            _ => inner_first.push(Dim { count, stride }),
        }
    }
    inner_first.reverse();
    Some((run, inner_first))
}

/// Whether two elements may share a byte: not if each dimension steps over all that the finer ones
/// span. `None` where the span overflows.
fn overlaps(run: usize, dims: &[Dim]) -> Option<bool> {
    let mut finest_first = dims.to_vec();
    finest_first.sort_by_key(|dim| dim.stride.unsigned_abs());
    let mut span = run;
    let mut overlaps = false;
    for dim in finest_first {
        let stride = dim.stride.unsigned_abs();
        overlaps |= stride < span;
        span = span.checked_add(stride.checked_mul(dim.count - 1)?)?;
    }
    isize::try_from(span).ok()?;
    Some(overlaps)
}

/// Moves `n` bytes: to `flat` when gathering, from it when scattering.
///
/// # Safety
///
/// `n` bytes at both, apart; the one read is readable, the other writable.
#[inline(always)]
unsafe fn shift<const GATHER: bool>(flat: *mut u8, memory: *mut u8, n: usize) {
    let (from, to) = if GATHER { (memory, flat) } else { (flat, memory) };
    // SAFETY: promised by the caller.
    unsafe { ptr::copy_nonoverlapping(from, to, n) }
}

/// Moves `steps` runs of `run` bytes each, `stride` apart in memory and adjacent in `flat`.
///
/// # Safety
///
/// As [`shift`], for each of them.
unsafe fn runs<const GATHER: bool>(
    flat: *mut u8,
    memory: *mut u8,
    stride: isize,
    run: usize,
    steps: usize,
) {
    // A length known to the compiler is one load and one store instead of a call: it makes single
    // elements several times faster.
    macro_rules! each {
        ($run:expr) => {
            for step in 0..steps {
                let memory = memory.wrapping_offset(step as isize * stride);
                // SAFETY: promised by the caller for each step.
                unsafe { shift::<GATHER>(flat.wrapping_add(step * $run), memory, $run) };
            }
        };
    }
    match run {
        1 => each!(1),
        2 => each!(2),
        4 => each!(4),
        8 => each!(8),
        16 => each!(16),
        _ => each!(run),
    }
}

#[cfg(test)]
mod tests;
