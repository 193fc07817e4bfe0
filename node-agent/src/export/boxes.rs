//! Where the bytes of a box lie in the global tensor.

/// A box of a row-major tensor, as runs that are contiguous in both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Runs {
    /// Bytes of a run.
    run: u64,
    /// Dimensions over the runs, outermost first: (steps, bytes in the global tensor).
    dims: Vec<(u64, u64)>,
    /// First byte in the global tensor.
    start: u64,
}

impl Runs {
    /// The box at `offset` of `shape` in a tensor of shape `global` with `bits` bits an element.
    /// `None` where it is not inside, where a size overflows, or where a run does not begin and end
    /// with a byte.
    pub(super) fn new(bits: u32, global: &[u64], offset: &[u64], shape: &[u64]) -> Option<Self> {
        let inside =
            |((o, s), g): ((&u64, &u64), &u64)| o.checked_add(*s).is_some_and(|end| end <= *g);
        if global.len() != shape.len()
            || offset.len() != shape.len()
            || !offset.iter().zip(shape).zip(global).all(inside)
        {
            return None;
        }
        let mut strides = vec![u64::from(bits); global.len()];
        for dim in (1..global.len()).rev() {
            strides[dim - 1] = strides[dim].checked_mul(global[dim])?;
        }
        // Below the innermost dimension that is cut, all is contiguous.
        let cut = (0..global.len()).rev().find(|d| shape[*d] != global[*d]);
        let cut = cut.unwrap_or(0);
        let run_of = |dims: &[u64]| dims.iter().try_fold(u64::from(bits), |n, d| n.checked_mul(*d));
        let run = run_of(shape.get(cut..).unwrap_or_default())?;
        let mut start = 0_u64;
        for (o, stride) in offset.iter().zip(&strides) {
            start = start.checked_add(o.checked_mul(*stride)?)?;
        }
        let dims: Vec<(u64, u64)> =
            shape.iter().copied().zip(strides.iter().map(|s| s / 8)).take(cut).collect();
        let whole_bytes = run.is_multiple_of(8)
            && start.is_multiple_of(8)
            && strides[..cut].iter().all(|s| s.is_multiple_of(8));
        whole_bytes.then_some(Self { run: run / 8, dims, start: start / 8 })
    }

    /// Where byte `at` of the box lies in the global tensor, and how many bytes lie together there.
    pub(super) fn place(&self, at: u64) -> (u64, u64) {
        let (mut index, within) = (at / self.run, at % self.run);
        let mut place = self.start + within;
        for (steps, stride) in self.dims.iter().rev() {
            place += index % steps * stride;
            index /= steps;
        }
        (place, self.run - within)
    }
}

/// Whether two boxes share an element.
pub(super) fn overlap(a: (&[u64], &[u64]), b: (&[u64], &[u64])) -> bool {
    let ends = |(o, s): (&u64, &u64)| o.saturating_add(*s);
    let apart = (0..a.0.len())
        .any(|d| ends((&a.0[d], &a.1[d])) <= b.0[d] || ends((&b.0[d], &b.1[d])) <= a.0[d]);
    !apart
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every box of every tensor up to 3 dimensions of up to 3: each byte is where counting says.
    #[test]
    fn every_byte_of_every_small_box_is_in_its_place() {
        let mut boxes = 0;
        for bytes in [1_u64, 4] {
            for code in 0..64_u64 {
                let global = [code % 4, code / 4 % 4, code / 16];
                for dims in 0..=3 {
                    boxes += every_box(bytes, &global[..dims]);
                }
            }
        }
        assert!(boxes > 3000, "{boxes}");
    }

    fn every_box(bytes: u64, global: &[u64]) -> usize {
        let mut cuts: Vec<(Vec<u64>, Vec<u64>)> = vec![(vec![], vec![])];
        for size in global {
            cuts = cuts
                .into_iter()
                .flat_map(|(o, s)| {
                    (0..*size).flat_map(move |at| (1..=size - at).map(move |n| (at, n))).map(
                        move |(at, n)| {
                            ([o.clone(), vec![at]].concat(), [s.clone(), vec![n]].concat())
                        },
                    )
                })
                .collect();
        }
        for (offset, shape) in &cuts {
            let runs = Runs::new(u32::try_from(bytes).unwrap() * 8, global, offset, shape).unwrap();
            let len = shape.iter().product::<u64>() * bytes;
            for at in 0..len {
                let (place, together) = runs.place(at);
                assert_eq!(place, by_counting(bytes, global, offset, shape, at));
                let last = by_counting(bytes, global, offset, shape, at + together - 1);
                assert_eq!(last, place + together - 1);
            }
        }
        cuts.len()
    }

    fn by_counting(bytes: u64, global: &[u64], offset: &[u64], shape: &[u64], at: u64) -> u64 {
        let mut element = at / bytes;
        let (mut place, mut stride) = (0, 1);
        for d in (0..global.len()).rev() {
            place += (offset[d] + element % shape[d]) * stride;
            element /= shape[d];
            stride *= global[d];
        }
        place * bytes + at % bytes
    }

    #[test]
    fn what_is_not_a_box_is_refused() {
        assert_eq!(Runs::new(8, &[4], &[3], &[2]), None);
        assert_eq!(Runs::new(8, &[4], &[u64::MAX], &[2]), None);
        assert_eq!(Runs::new(8, &[u64::MAX, u64::MAX, 2], &[0; 3], &[1; 3]), None);
        assert_eq!(Runs::new(8, &[4, 4], &[0], &[4]), None);
        // Half a byte.
        assert_eq!(Runs::new(4, &[4, 3], &[1, 0], &[1, 3]), None);
        assert!(Runs::new(4, &[4, 2], &[1, 0], &[1, 2]).is_some());
    }
}
