use super::*;

/// Small, seeded, good enough to choose shapes.
struct Chance(u64);

impl Chance {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

/// A tensor in a buffer of its own, with where each of its elements lies in it.
struct Sample {
    memory: Vec<u8>,
    first: usize,
    itemsize: usize,
    shape: Vec<usize>,
    strides: Vec<isize>,
}

impl Sample {
    /// A random view of a contiguous base: sliced, stepped, permuted, reversed, perhaps expanded.
    fn random(chance: &mut Chance, expand: bool) -> Self {
        let itemsize = [1, 2, 3, 4, 8, 12, 16][chance.below(7)];
        let mut first = 0;
        let mut dims = Vec::new();
        let mut extent = itemsize;
        for _ in 0..chance.below(5) {
            let base = 1 + chance.below(9);
            let by = 1 + chance.below(2);
            let count = [base.div_ceil(by), chance.below(base.div_ceil(by) + 1)][chance.below(2)];
            let stride = (by * extent) as isize;
            if chance.below(4) == 0 && count > 0 {
                first += (count - 1) * by * extent;
                dims.push((count, -stride));
            } else {
                dims.push((count, stride));
            }
            extent *= base;
        }
        if expand {
            dims.push((2 + chance.below(3), 0));
        }
        for i in (1..dims.len()).rev() {
            // Half of the time in order, so that dimensions merge.
            if chance.below(2) == 0 {
                dims.swap(i, chance.below(i + 1));
            }
        }
        let memory = (0..extent).map(|_| chance.below(256) as u8).collect();
        let (shape, strides) = dims.into_iter().rev().unzip();
        Self { memory, first, itemsize, shape, strides }
    }

    fn tensor(&mut self) -> Strided {
        let start = Address::new(self.memory.as_mut_ptr().wrapping_add(self.first));
        Strided::new(start, self.itemsize, &self.shape, &self.strides).unwrap()
    }

    /// The place in `memory` of each payload byte, by the definition.
    fn places(&self) -> Vec<usize> {
        let mut starts = vec![self.first as isize];
        for (&count, &stride) in self.shape.iter().zip(&self.strides) {
            let steps = |at: isize| (0..count).map(move |i| at + i as isize * stride);
            starts = starts.into_iter().flat_map(steps).collect();
        }
        starts.into_iter().flat_map(|at| at as usize..at as usize + self.itemsize).collect()
    }
}

fn gathered(tensor: &Strided, at: usize, n: usize) -> Vec<u8> {
    let mut out = vec![0; n];
    // SAFETY: the samples' views lie in their buffers, and `out` has `n` bytes.
    unsafe { tensor.gather(at, out.as_mut_ptr(), n) };
    out
}

#[test]
fn any_byte_range_of_any_geometry_is_what_the_naive_loop_over_its_elements_gives() {
    let mut chance = Chance(0x7165_726b);
    for case in 0..2_000 {
        let expand = chance.below(4) == 0;
        let mut sample = Sample::random(&mut chance, expand);
        let expected: Vec<u8> = sample.places().iter().map(|at| sample.memory[*at]).collect();
        let tensor = sample.tensor();
        assert_eq!(tensor.len(), expected.len(), "case {case}");
        assert_eq!(gathered(&tensor, 0, expected.len()), expected, "case {case}");
        for _ in 0..8 {
            let at = chance.below(expected.len() + 1);
            let n = chance.below(expected.len() - at + 1);
            assert_eq!(gathered(&tensor, at, n), expected[at..at + n], "case {case}: {at}, {n}");
        }
    }
}

#[test]
fn scattering_is_the_inverse_of_gathering_and_touches_nothing_between_the_elements() {
    let mut chance = Chance(0x5ca7_7e12);
    for case in 0..2_000 {
        let mut sample = Sample::random(&mut chance, false);
        let places = sample.places();
        let tensor = sample.tensor();
        assert!(!tensor.overlaps(), "case {case}: {:?} {:?}", sample.shape, sample.strides);
        let payload: Vec<u8> = places.iter().map(|_| chance.below(256) as u8).collect();
        let mut expected = sample.memory.clone();
        let mut at = 0;
        while at < payload.len() {
            let n = 1 + chance.below(payload.len() - at);
            // SAFETY: the view lies in the sample's buffer, and [at, at + n) in the payload.
            unsafe { tensor.scatter(at, payload[at..].as_ptr(), n) };
            at += n;
        }
        for (place, byte) in places.iter().zip(&payload) {
            expected[*place] = *byte;
        }
        assert_eq!(sample.memory, expected, "case {case}");
        assert_eq!(gathered(&tensor, 0, payload.len()), payload, "case {case}");
    }
}

#[test]
fn a_transpose_larger_than_a_tile_is_right_in_any_range() {
    let (rows, columns) = (150, 210);
    let memory: Vec<u8> = (0..rows * columns * 4).map(|i| (i * 31 + i / 251) as u8).collect();
    let start = Address::read_only(memory.as_ptr());
    let tensor = Strided::new(start, 4, &[columns, rows], &[4, columns as isize * 4]).unwrap();
    let mut expected = Vec::new();
    for column in 0..columns {
        for row in 0..rows {
            expected.extend_from_slice(&memory[(row * columns + column) * 4..][..4]);
        }
    }
    let mut chance = Chance(77);
    for _ in 0..200 {
        let at = chance.below(expected.len());
        let n = chance.below(expected.len() - at + 1);
        assert_eq!(gathered(&tensor, at, n), expected[at..at + n], "{at}, {n}");
    }
}

#[test]
fn a_geometry_that_overflows_or_whose_elements_share_memory_is_found_when_it_is_built() {
    let nowhere = Address::new(ptr::null_mut());
    let new = |itemsize, shape: &[usize], strides: &[isize]| {
        Strided::new(nowhere, itemsize, shape, strides)
    };
    assert!(new(0, &[1], &[1]).is_err());
    assert!(new(4, &[1, 2], &[4]).is_err());
    assert!(new(4, &[usize::MAX, 2], &[4, 4]).is_err());
    assert!(new(4, &[1 << 40, 1 << 40], &[4, 4]).is_err());
    assert!(new(1, &[2, 2], &[isize::MAX, 1]).is_err());
    assert!(new(1, &[2], &[isize::MIN]).is_err());
    let error = new(4, &[usize::MAX, 2], &[8, 4]).unwrap_err().to_string();
    assert_eq!(
        error,
        format!("a tensor of shape [{}, 2] and strides [8, 4] overflows", usize::MAX)
    );

    assert!(new(4, &[3, 5], &[0, 4]).unwrap().overlaps());
    assert!(new(4, &[5], &[2]).unwrap().overlaps());
    assert!(new(4, &[5, 5], &[4, 4]).unwrap().overlaps());
    assert!(!new(4, &[5, 7], &[4, 20]).unwrap().overlaps());
    assert!(!new(4, &[1, 7], &[0, 4]).unwrap().overlaps());
    assert!(!new(4, &[0, 7], &[0, 0]).unwrap().overlaps());
}

#[test]
fn what_is_contiguous_is_one_run() {
    let start = Address::new(ptr::without_provenance_mut(64));
    let new = |shape: &[usize], strides: &[isize]| Strided::new(start, 4, shape, strides).unwrap();
    assert_eq!(new(&[], &[]).contiguous(), Some(start));
    assert_eq!(new(&[], &[]).len(), 4);
    assert_eq!(new(&[2, 1, 3], &[12, 999, 4]).contiguous(), Some(start));
    assert_eq!(new(&[0, 3], &[12, 4]).contiguous(), Some(start));
    assert!(new(&[0, 3], &[12, 4]).is_empty());
    assert_eq!(new(&[3, 2], &[4, 12]).contiguous(), None);
    // Two rows of 3 x 4 elements each: the inner two dimensions are one run.
    assert_eq!(new(&[2, 3, 4], &[100, 16, 4]).dims, [Dim { count: 2, stride: 100 }]);
    // The outer two merge where the inner one is stepped.
    assert_eq!(new(&[2, 3], &[24, 8]).dims, [Dim { count: 6, stride: 8 }]);
}
