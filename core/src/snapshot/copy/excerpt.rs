//! A box of a tensor of the payload, which goes to a place of its own in memory.
//!
//! # Invariants
//!
//! - From whatever pieces the payload comes in, a box gets its elements and touches no other byte.

use super::super::strided::Strided;
use crate::{
    error::{Error, Result},
    state::{
        boxes::{Region, Runs},
        dtype::Dtype,
    },
};

/// A box of a tensor that lies in the payload, and where it goes.
#[derive(Clone, Debug)]
pub struct Excerpt {
    runs: Runs,
    to: Strided,
}

impl Excerpt {
    /// `region` of a tensor of this type and shape goes to `to`, which has the region's shape.
    ///
    /// # Errors
    /// The region does not lie in it, begins within a byte, or has other bytes than `to`.
    pub fn new(dtype: Dtype, shape: &[u64], region: &Region, to: Strided) -> Result<Self> {
        let runs = Runs::new(dtype.bits(), shape, region).ok_or_else(|| {
            Error::invalid(format!("a part {region} of {dtype} {shape:?} is no run of bytes"))
        })?;
        if runs.len() != to.len() as u64 {
            return Err(Error::Bug(format!("{} bytes go to {}", runs.len(), to.len())));
        }
        Ok(Self { runs, to })
    }

    /// Where elements share memory, nothing can be restored.
    pub(super) fn overlaps(&self) -> bool {
        self.to.overlaps()
    }

    /// Whether bytes `[at, end)` of the tensor have some of it.
    pub(super) fn wants(&self, at: usize, end: usize) -> bool {
        let first = self.runs.first_from(at as u64);
        first < self.runs.len() && self.runs.place(first).0 < end as u64
    }

    /// Puts what of bytes `[at, at + n)` of the tensor, which lie at `from`, belongs to the box into its
    /// place.
    ///
    /// # Safety
    /// `from` is readable for `n` bytes, and apart from the box's place, which is writable and which no
    /// other thread touches.
    pub(super) unsafe fn scatter(&self, at: usize, from: *const u8, n: usize) {
        let end = (at + n) as u64;
        let mut next = self.runs.first_from(at as u64);
        while next < self.runs.len() {
            let (place, together) = self.runs.place(next);
            if place >= end {
                return;
            }
            let len = together.min(end - place);
            // The box has the bytes of memory: no number of its is beyond an address.
            let (skip, to, len) = (place as usize - at, next as usize, len as usize);
            // SAFETY: [skip, skip + len) is below `n`, and [to, to + len) inside the box; the caller
            // vouches for both.
            unsafe {
                let from = from.add(skip);
                match self.to.contiguous() {
                    Some(start) => std::ptr::copy_nonoverlapping(from, start.get().add(to), len),
                    None => self.to.scatter(to, from, len),
                }
            }
            next += len as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::super::strided::Address, *};

    /// Numbers that are all different, without a byte that is zero.
    fn payload(shape: &[u64]) -> Vec<u16> {
        (0..shape.iter().product::<u64>()).map(|n| 0x0101 * (n as u16 + 1)).collect()
    }

    fn row_major(shape: &[u64]) -> Vec<u64> {
        let mut strides = vec![1; shape.len()];
        for dim in (1..shape.len()).rev() {
            strides[dim - 1] = strides[dim] * shape[dim];
        }
        strides
    }

    fn cuts() -> impl Strategy<Value = (Vec<u64>, Region)> {
        let dim = (1_u64..6).prop_flat_map(|size| {
            (0..size).prop_flat_map(move |at| (Just(size), Just(at), 1..=size - at))
        });
        prop::collection::vec(dim, 0..4).prop_map(|dims| {
            let shape = dims.iter().map(|(size, ..)| *size).collect();
            let offset = dims.iter().map(|(_, at, _)| *at).collect();
            (shape, Region { offset, shape: dims.iter().map(|(.., n)| *n).collect() })
        })
    }

    proptest! {
        /// In pieces of any size, into a place that is contiguous or has its dimensions the other way
        /// round.
        #[test]
        fn a_box_gets_its_elements_and_nothing_else(
            (shape, region) in cuts(), step in 1_usize..40, turned in any::<bool>(),
        ) {
            let source = payload(&shape);
            let bytes: Vec<u8> = source.iter().flat_map(|x| x.to_le_bytes()).collect();
            let count = region.shape.iter().product::<u64>() as usize;
            // One more on each side: nobody may touch them.
            let mut target = vec![0_u16; count + 2];
            let mut strides = row_major(&region.shape);
            if turned {
                let back: Vec<u64> = region.shape.iter().rev().copied().collect();
                strides = row_major(&back).into_iter().rev().collect();
            }
            let dims: Vec<usize> = region.shape.iter().map(|n| *n as usize).collect();
            let apart: Vec<isize> = strides.iter().map(|n| *n as isize * 2).collect();
            let start = Address::new(target[1..].as_mut_ptr().cast());
            let to = Strided::new(start, 2, &dims, &apart).unwrap();
            let excerpt = Excerpt::new(Dtype::U16, &shape, &region, to).unwrap();
            for at in (0..bytes.len()).step_by(step) {
                let n = step.min(bytes.len() - at);
                let before = target.clone();
                // SAFETY: the piece has `n` bytes, the target the box's.
                unsafe { excerpt.scatter(at, bytes[at..].as_ptr(), n) };
                prop_assert_eq!(before != target, excerpt.wants(at, at + n));
            }
            let global = row_major(&shape);
            let mut expected = vec![0; count + 2];
            for k in 0..count as u64 {
                let (mut rest, mut from, mut to) = (k, 0, 0);
                for dim in (0..shape.len()).rev() {
                    let index = rest % region.shape[dim];
                    rest /= region.shape[dim];
                    from += (region.offset[dim] + index) * global[dim];
                    to += index * strides[dim];
                }
                expected[1 + to as usize] = source[from as usize];
            }
            prop_assert_eq!(target, expected);
        }
    }
}
