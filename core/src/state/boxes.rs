//! Boxes of a tensor: what a rank holds of one that is cut, and where its bytes lie in the whole.
//!
//! # Invariants
//!
//! - A byte of a box is where counting says, for every box of every tensor.
//! - What two boxes have in common, and what is left of one without it, cover it once.

/// A box of a tensor: where it begins and how far it goes in each dimension, in elements.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Region {
    /// First element in each dimension.
    pub offset: Vec<u64>,
    /// Elements in each dimension.
    pub shape: Vec<u64>,
}

impl Region {
    /// The whole of a tensor.
    #[must_use]
    pub fn whole(shape: &[u64]) -> Self {
        Self { offset: vec![0; shape.len()], shape: shape.into() }
    }

    /// True where it has no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// True where it lies in a tensor of this shape.
    #[must_use]
    pub fn is_inside(&self, global: &[u64]) -> bool {
        let inside = |((o, s), g): ((&u64, &u64), &u64)| o.checked_add(*s).is_some_and(|e| e <= *g);
        self.offset.len() == global.len()
            && self.shape.len() == global.len()
            && self.offset.iter().zip(&self.shape).zip(global).all(inside)
    }

    fn end(&self, dim: usize) -> u64 {
        self.offset[dim].saturating_add(self.shape[dim])
    }

    /// The elements that are in both, which have as many dimensions; `None`: there are none.
    #[must_use]
    pub fn common(&self, other: &Self) -> Option<Self> {
        if self.offset.len() != other.offset.len() || self.is_empty() || other.is_empty() {
            return None;
        }
        let mut both = Self { offset: Vec::new(), shape: Vec::new() };
        for dim in 0..self.offset.len() {
            let begin = self.offset[dim].max(other.offset[dim]);
            let end = self.end(dim).min(other.end(dim));
            both.shape.push(end.checked_sub(begin).filter(|n| *n > 0)?);
            both.offset.push(begin);
        }
        Some(both)
    }

    /// What is left without `hole`, a box inside this one: at most two boxes a dimension.
    #[must_use]
    pub fn without(&self, hole: &Self) -> Vec<Self> {
        let (mut left, mut core) = (Vec::new(), self.clone());
        for dim in 0..self.offset.len() {
            let ends = [(core.offset[dim], hole.offset[dim]), (hole.end(dim), core.end(dim))];
            for (begin, end) in ends.into_iter().filter(|(begin, end)| begin < end) {
                let mut slab = core.clone();
                (slab.offset[dim], slab.shape[dim]) = (begin, end - begin);
                left.push(slab);
            }
            (core.offset[dim], core.shape[dim]) = (hole.offset[dim], hole.shape[dim]);
        }
        left
    }

    /// The same box, counted from the beginning of `outer`, in which it lies.
    #[must_use]
    pub fn from(&self, outer: &Self) -> Self {
        let offset = self.offset.iter().zip(&outer.offset).map(|(o, begin)| o - begin).collect();
        Self { offset, shape: self.shape.clone() }
    }
}

impl std::fmt::Display for Region {
    /// `[4:8, 0:16]`, as Python slices it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let slices = (0..self.offset.len()).map(|d| format!("{}:{}", self.offset[d], self.end(d)));
        write!(f, "[{}]", slices.collect::<Vec<_>>().join(", "))
    }
}

/// The name of the box of the tensor at `path` that begins at `offset`: `model/w#0.1024`. The same on every
/// rank that has it.
#[must_use]
pub fn box_name(path: &str, offset: &[u64]) -> String {
    let numbers: Vec<String> = offset.iter().map(u64::to_string).collect();
    // A tensor without dimensions has one box; its name is not that of the whole.
    let numbers = if numbers.is_empty() { "0".into() } else { numbers.join(".") };
    format!("{path}#{numbers}")
}

/// What a tree calls the tensor at `path` that lies in boxes: `model/w#`.
#[must_use]
pub fn name_of_all(path: &str) -> String {
    format!("{path}#")
}

/// The path in the name of a tensor, of a box, or of all boxes; and whether it is of a box or of all.
#[must_use]
pub fn path_of(name: &str) -> (&str, bool) {
    name.split_once('#').map_or((name, false), |(path, _)| (path, true))
}

/// A box of a row-major tensor, as runs that are contiguous in both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runs {
    /// Bytes of a run.
    run: u64,
    /// Dimensions over the runs, outermost first: (steps, bytes in the global tensor).
    dims: Vec<(u64, u64)>,
    /// First byte in the global tensor.
    start: u64,
}

impl Runs {
    /// The box `region` of a tensor of shape `global` with `bits` bits an element. `None` where it is not
    /// inside, where a size overflows, or where a run does not begin and end with a byte.
    #[must_use]
    pub fn new(bits: u32, global: &[u64], region: &Region) -> Option<Self> {
        if !region.is_inside(global) {
            return None;
        }
        let Region { offset, shape } = region;
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

    /// Bytes of the box.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.run * self.count()
    }

    /// True for a box without elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn count(&self) -> u64 {
        self.dims.iter().map(|(steps, _)| steps).product()
    }

    /// Where byte `at` of the box lies in the global tensor, and how many bytes lie together there.
    #[must_use]
    pub fn place(&self, at: u64) -> (u64, u64) {
        let (mut index, within) = (at / self.run, at % self.run);
        let mut place = self.start + within;
        for (steps, stride) in self.dims.iter().rev() {
            place += index % steps * stride;
            index /= steps;
        }
        (place, self.run - within)
    }

    /// The first byte of the box that lies at byte `at` of the global tensor or after it; where there is
    /// none, [`len`](Self::len).
    #[must_use]
    pub fn first_from(&self, at: u64) -> u64 {
        if self.is_empty() {
            return 0;
        }
        // Runs rise with their number.
        let (mut low, mut high) = (0, self.count());
        while low < high {
            let middle = low + (high - low) / 2;
            match self.place(middle * self.run).0 + self.run <= at {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        if low == self.count() {
            return self.len();
        }
        low * self.run + at.saturating_sub(self.place(low * self.run).0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
            let region = Region { offset: offset.clone(), shape: shape.clone() };
            let runs = Runs::new(u32::try_from(bytes).unwrap() * 8, global, &region).unwrap();
            let len = shape.iter().product::<u64>() * bytes;
            assert_eq!(runs.len(), len);
            let places: Vec<u64> = (0..len).map(|at| runs.place(at).0).collect();
            for from in 0..=global.iter().product::<u64>() * bytes {
                let first = places.partition_point(|place| *place < from) as u64;
                assert_eq!(runs.first_from(from), first);
            }
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

    fn region(offset: &[u64], shape: &[u64]) -> Region {
        Region { offset: offset.into(), shape: shape.into() }
    }

    #[test]
    fn what_is_not_a_box_is_refused() {
        let new = |bits, global: &[u64], offset: &[u64], shape: &[u64]| {
            Runs::new(bits, global, &region(offset, shape))
        };
        assert_eq!(new(8, &[4], &[3], &[2]), None);
        assert_eq!(new(8, &[4], &[u64::MAX], &[2]), None);
        assert_eq!(new(8, &[u64::MAX, u64::MAX, 2], &[0; 3], &[1; 3]), None);
        assert_eq!(new(8, &[4, 4], &[0], &[4]), None);
        // Half a byte.
        assert_eq!(new(4, &[4, 3], &[1, 0], &[1, 3]), None);
        assert!(new(4, &[4, 2], &[1, 0], &[1, 2]).is_some());
    }

    #[test]
    fn names_of_boxes_are_one_for_each_place() {
        assert_eq!(box_name("model/w", &[0, 1024]), "model/w#0.1024");
        assert_eq!(box_name("scale", &[]), "scale#0");
        assert_eq!(name_of_all("model/w"), "model/w#");
        assert_eq!(path_of("model/w#0.1024"), ("model/w", true));
        assert_eq!(path_of("model/w#"), ("model/w", true));
        assert_eq!(path_of("model/w"), ("model/w", false));
        assert_eq!(region(&[4, 0], &[4, 16]).to_string(), "[4:8, 0:16]");
    }

    fn elements(region: &Region) -> Vec<Vec<u64>> {
        let mut all = vec![vec![]];
        for dim in 0..region.offset.len() {
            all = all
                .into_iter()
                .flat_map(|at: Vec<u64>| {
                    (region.offset[dim]..region.end(dim))
                        .map(move |i| [at.clone(), vec![i]].concat())
                })
                .collect();
        }
        all
    }

    fn any_region(dims: usize) -> impl Strategy<Value = Region> {
        prop::collection::vec((0_u64..5, 0_u64..5), dims).prop_map(|rows| {
            let (offset, shape) = rows.into_iter().unzip();
            Region { offset, shape }
        })
    }

    proptest! {
        #[test]
        fn what_is_common_and_what_is_left_cover_a_box_once(
            (a, b) in (0_usize..4).prop_flat_map(|dims| (any_region(dims), any_region(dims))),
        ) {
            let inside = |at: &Vec<u64>| elements(&b).contains(at);
            let (mut shared, mut rest): (Vec<_>, Vec<_>) = elements(&a).into_iter().partition(inside);
            let common = a.common(&b);
            prop_assert_eq!(common.as_ref().map_or(vec![], elements), shared.clone());
            if let Some(common) = common {
                let left = a.without(&common);
                prop_assert!(left.len() <= 2 * a.offset.len());
                prop_assert!(left.iter().all(|left| !left.is_empty()));
                let mut found: Vec<_> = left.iter().flat_map(elements).collect();
                found.sort();
                rest.sort();
                prop_assert_eq!(found, rest);
                let inner = common.from(&a);
                prop_assert!(inner.is_inside(&a.shape));
                shared.clear();
            }
        }
    }
}
