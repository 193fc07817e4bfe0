use super::*;
use crate::snapshot::strided::Strided;

/// Small, seeded, good enough to choose shapes.
struct Chance(u64);

impl Chance {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.below(256) as u8).collect()
    }
}

/// One tensor: its memory, and where in it each payload byte lies.
struct Tensor {
    memory: Vec<u8>,
    places: Vec<usize>,
    shape: Option<(usize, [usize; 3], [isize; 3])>,
    in_place: bool,
    now: bool,
}

impl Tensor {
    fn random(chance: &mut Chance, expand: bool) -> Self {
        let now = chance.below(2) == 0;
        let kind = chance.below(8);
        if kind < 4 {
            let len =
                [0, chance.below(70), chance.below(3_000), 60_000 + chance.below(90_000)][kind];
            let in_place = chance.below(6) == 0;
            return Self {
                memory: chance.bytes(len),
                places: (0..len).collect(),
                shape: None,
                in_place,
                now,
            };
        }
        let itemsize = [1, 2, 4, 6, 8][chance.below(5)];
        let n = if chance.below(10) == 0 { 70 } else { 9 };
        let base = [chance.below(n), 1 + chance.below(n), 1 + chance.below(n)];
        let mut dims = [
            (base[0], base[1] * base[2] * itemsize),
            (base[1], base[2] * itemsize),
            (base[2].div_ceil(2), 2 * itemsize),
        ];
        if expand && chance.below(2) == 0 {
            dims[chance.below(3)].1 = 0;
        }
        let turn = chance.below(3);
        dims.rotate_left(turn);
        let mut places = vec![0];
        for (count, stride) in dims {
            places =
                places.iter().flat_map(|at| (0..count).map(move |i| at + i * stride)).collect();
        }
        let places = places.into_iter().flat_map(|at| at..at + itemsize).collect();
        let memory = chance.bytes(base.iter().product::<usize>() * itemsize);
        let shape = Some((itemsize, dims.map(|d| d.0), dims.map(|d| d.1 as isize)));
        Self { memory, places, shape, in_place: false, now }
    }

    fn payload(&self) -> Vec<u8> {
        self.places.iter().map(|at| self.memory[*at]).collect()
    }

    fn memory(&mut self) -> Memory {
        let start = Address::new(self.memory.as_mut_ptr());
        match self.shape {
            Some((itemsize, shape, strides)) => {
                Memory::Strided(Strided::new(start, itemsize, &shape, &strides).unwrap())
            }
            None => Memory::Bytes(start),
        }
    }
}

/// A state and what a naive copy of it gives.
struct State {
    tensors: Vec<Tensor>,
    payload: Vec<u8>,
    chunk_bytes: usize,
}

impl State {
    fn random(seed: usize, expand: bool) -> Self {
        let chance = &mut Chance(0x9E37_79B9_7F4A_7C15 ^ (seed as u64 + 1));
        let count = chance.below(14);
        let tensors: Vec<_> = (0..count).map(|_| Tensor::random(chance, expand)).collect();
        let payload = tensors.iter().flat_map(Tensor::payload).collect();
        let chunk_bytes = [1 + chance.below(64), 4_096, 100_000, 1 << 20][chance.below(4)];
        // A chunk for each byte of a long payload tests nothing but patience.
        let payload: Vec<u8> = payload;
        let chunk_bytes = chunk_bytes.max(payload.len() / 500);
        Self { tensors, payload, chunk_bytes: chunk_bytes.max(1) }
    }

    /// The plan; a piece is skipped where `skip` says so.
    fn plan(&mut self, in_place: bool, skip: impl Fn(usize) -> bool) -> Plan {
        let mut offset = 0;
        let pieces = self.tensors.iter_mut().enumerate().map(|(i, tensor)| {
            let len = tensor.places.len();
            let memory = match () {
                () if skip(i) => Memory::Skip,
                () if in_place && tensor.in_place => Memory::InPlace,
                () => tensor.memory(),
            };
            offset += len;
            let tag = i.is_multiple_of(2).then_some(i / 2);
            Piece { offset: offset - len, len, memory, now: tensor.now, tag }
        });
        let pieces = pieces.collect();
        Plan::new(pieces, self.payload.len(), self.chunk_bytes).unwrap()
    }

    /// A slot with rubbish in it, but for what is in place; one byte behind it is a canary.
    fn slot(&self) -> Vec<u8> {
        let mut slot = Vec::new();
        for tensor in &self.tensors {
            let payload = tensor.payload();
            slot.extend(payload.iter().map(|b| if tensor.in_place { *b } else { !*b }));
        }
        slot.push(0xA5);
        slot
    }

    fn crcs(&self) -> Vec<u32> {
        self.payload.chunks(self.chunk_bytes).map(crc32fast::hash).collect()
    }

    /// Every second tensor is tagged.
    fn check(&self, slot: &[u8], sums: &Sums, what: &str) {
        assert!(slot[..self.payload.len()] == self.payload[..], "{what}: payload");
        assert_eq!(slot[self.payload.len()], 0xA5, "{what}: wrote past the slot");
        assert_eq!(sums.chunks, self.crcs(), "{what}: checksums");
        let mut at = 0;
        let each = self.tensors.iter().map(|tensor| {
            at += tensor.places.len();
            crc32fast::hash(&self.payload[at - tensor.places.len()..at])
        });
        let alone: Vec<u32> = each.step_by(2).collect();
        assert_eq!(whole(sums.parts.clone(), alone.len()), alone, "{what}: tagged pieces");
    }

    /// Overwrites all tensors, so that only a restore can bring them back; returns their memory.
    fn forget(&mut self) -> Vec<Vec<u8>> {
        let forget = |tensor: &mut Tensor| {
            let before = tensor.memory.clone();
            tensor.memory.iter_mut().for_each(|b| *b = !*b);
            before
        };
        self.tensors.iter_mut().map(forget).collect()
    }
}

#[test]
fn chunk_checksums_are_those_of_the_payload_bytes_and_combine_to_the_checksum_of_the_whole() {
    for seed in 0..300 {
        let mut state = State::random(seed, true);
        let plan = state.plan(true, |_| false);
        let mut slot = state.slot();
        // SAFETY: the plan's memory and the slot live in `state` and `slot`, and no thread has
        // them.
        let crcs = unsafe { capture(&plan, slot.as_mut_ptr(), 1) };
        state.check(&slot, &crcs, &format!("seed {seed}"));
        let mut all = Hasher::new();
        for (chunk, crc) in crcs.chunks.iter().enumerate() {
            let len = plan.chunk(chunk).len() as u64;
            all.combine(&Hasher::new_with_initial_len(*crc, len));
        }
        assert_eq!(all.finalize(), crc32fast::hash(&state.payload), "seed {seed}");
    }
}

#[test]
fn two_phases_give_the_same_slot_and_checksums_as_one() {
    for seed in 0..200 {
        let mut state = State::random(seed, true);
        let plan = state.plan(true, |_| false);
        let mut slot = state.slot();
        let threads = 1 + seed % 3;
        // SAFETY: as above.
        unsafe { capture_now(&plan, slot.as_mut_ptr(), threads) };
        let mut expected = state.slot();
        let mut at = 0;
        for tensor in &state.tensors {
            let range = at..at + tensor.places.len();
            at = range.end;
            if tensor.now {
                expected[range.clone()].copy_from_slice(&state.payload[range]);
            }
        }
        assert!(
            slot == expected,
            "seed {seed}: the first phase copies its own pieces, and no other"
        );
        // Once the first phase is over, the trainer may change these.
        for tensor in state.tensors.iter_mut().filter(|tensor| tensor.now) {
            tensor.memory.fill(0);
        }
        // SAFETY: as above; the first phase has returned.
        let crcs = unsafe { capture_rest(&plan, slot.as_mut_ptr(), threads) };
        state.check(&slot, &crcs, &format!("seed {seed}"));
        let now = state.tensors.iter().filter(|t| t.now).map(|t| t.places.len()).sum::<usize>();
        assert_eq!(plan.now_bytes(), now, "seed {seed}");
    }
}

#[test]
fn any_number_of_threads_gives_the_same_slot_and_checksums() {
    for seed in 0..60 {
        let mut state = State::random(seed, true);
        let plan = state.plan(true, |_| false);
        for threads in 0..=4 {
            let mut slot = state.slot();
            // SAFETY: as above.
            let crcs = unsafe { capture(&plan, slot.as_mut_ptr(), threads) };
            state.check(&slot, &crcs, &format!("seed {seed}, {threads} threads"));
        }
    }
}

#[test]
fn restoring_gives_back_what_was_captured_and_touches_no_other_byte() {
    for seed in 0..300 {
        let mut state = State::random(seed, false);
        let (slot, crcs) = (state.payload.clone(), state.crcs());
        let before = state.forget();
        let chance = &mut Chance(seed as u64 + 1);
        let skipped: Vec<bool> = before.iter().map(|_| chance.below(3) == 0).collect();
        let plan = state.plan(false, |i| skipped[i]);
        // SAFETY: the plan's memory lives in `state`, and no thread has it.
        let bad = unsafe { restore(&plan, slot.as_ptr(), &crcs, 1 + seed % 4) };
        assert!(bad.is_empty(), "seed {seed}");
        for (i, (tensor, before)) in state.tensors.iter().zip(&before).enumerate() {
            let mut expected: Vec<u8> = before.iter().map(|b| !*b).collect();
            if !skipped[i] {
                tensor.places.iter().for_each(|at| expected[*at] = before[*at]);
            }
            assert!(tensor.memory == expected, "seed {seed}, tensor {i}");
        }
    }
}

#[test]
fn a_damaged_chunk_is_reported_exactly_it() {
    for seed in 0..200 {
        let mut state = State::random(seed, false);
        let (mut slot, crcs) = (state.payload.clone(), state.crcs());
        let plan = state.plan(true, |_| false);
        let chance = &mut Chance(seed as u64 + 1);
        let mut damaged: Vec<u32> = (0..chance.below(4).min(slot.len()))
            .map(|_| {
                let at = chance.below(slot.len());
                slot[at] = state.payload[at] ^ (1 << chance.below(8));
                (at / state.chunk_bytes) as u32
            })
            .collect();
        damaged.sort_unstable();
        damaged.dedup();
        // SAFETY: as above.
        let bad = unsafe { restore(&plan, slot.as_ptr(), &crcs, 1 + seed % 4) };
        assert_eq!(bad, damaged, "seed {seed}");
    }
}

#[test]
fn a_chunk_without_a_wanted_byte_is_not_read() {
    let mut wanted = [0_u8; 10];
    let skip = |offset, len| Piece { offset, len, memory: Memory::Skip, now: false, tag: None };
    let memory = Memory::Bytes(Address::new(wanted.as_mut_ptr()));
    let tensor = Piece { offset: 95, len: 10, memory, now: false, tag: None };
    let plan = Plan::new(vec![skip(0, 95), tensor, skip(105, 295)], 400, 50).unwrap();
    let payload: Vec<u8> = (0..400).map(|i| i as u8).collect();
    // Wrong checksums everywhere but in the two chunks that matter: they are not looked at.
    let crcs: Vec<u32> = (0..8)
        .map(|i| if plan.wants(i) { crc32fast::hash(&payload[i * 50..][..50]) } else { 1 })
        .collect();
    assert_eq!((0..8).filter(|i| plan.wants(*i)).collect::<Vec<_>>(), [1, 2]);
    // SAFETY: the plan's memory is `wanted`, and no thread has it.
    assert_eq!(unsafe { restore(&plan, payload.as_ptr(), &crcs, 2) }, Vec::<u32>::new());
    assert_eq!(wanted[..], payload[95..105]);
    // Unwanted bytes of a wanted chunk do count: without them the others cannot be trusted.
    let mut damaged = payload.clone();
    damaged[149] ^= 1;
    // SAFETY: as above.
    assert_eq!(unsafe { restore(&plan, damaged.as_ptr(), &crcs, 1) }, [2]);
}

#[test]
fn a_damaged_chunk_in_a_buffer_never_reaches_a_tensor() {
    for seed in 0..200 {
        let mut state = State::random(seed, false);
        let (payload, crcs) = (state.payload.clone(), state.crcs());
        let before = state.forget();
        let after: Vec<_> = state.tensors.iter().map(|t| t.memory.clone()).collect();
        let plan = state.plan(false, |_| false);
        let chance = &mut Chance(seed as u64 + 1);
        for (chunk, crc) in crcs.iter().enumerate() {
            let mut bytes = payload[plan.chunk(chunk)].to_vec();
            let at = chance.below(bytes.len());
            bytes[at] ^= 0x10;
            // SAFETY: as above.
            unsafe {
                assert!(!restore_chunk(&plan, chunk, &bytes, *crc), "seed {seed}");
                assert!(!restore_chunk(&plan, chunk, &bytes[1..], *crc), "seed {seed}");
            }
        }
        assert!(
            state.tensors.iter().zip(&after).all(|(t, after)| t.memory == *after),
            "seed {seed}"
        );
        for (chunk, crc) in crcs.iter().enumerate() {
            // SAFETY: as above.
            let good = unsafe { restore_chunk(&plan, chunk, &payload[plan.chunk(chunk)], *crc) };
            assert!(good, "seed {seed}");
        }
        for (tensor, before) in state.tensors.iter().zip(&before) {
            assert!(
                tensor.places.iter().all(|at| tensor.memory[*at] == before[*at]),
                "seed {seed}"
            );
        }
    }
}

#[test]
fn a_chunk_that_is_read_piece_by_piece_is_checked_whole() {
    for seed in 0..200 {
        let mut state = State::random(seed, false);
        let (payload, crcs) = (state.payload.clone(), state.crcs());
        let before = state.forget();
        let plan = state.plan(false, |_| false);
        let chance = &mut Chance(seed as u64 + 1);
        for (chunk, crc) in crcs.iter().enumerate() {
            let range = plan.chunk(chunk);
            let mut buffer = vec![0; 1 + chance.below(2 * range.len())];
            let damaged = range.start + chance.below(range.len());
            for damage in [true, false] {
                let read = |at: usize, into: &mut [u8]| {
                    into.copy_from_slice(&payload[at..at + into.len()]);
                    if damage && (at..at + into.len()).contains(&damaged) {
                        into[damaged - at] ^= 0x10;
                    }
                    Ok::<_, ()>(())
                };
                // SAFETY: as above.
                let good = unsafe { restore_passing(&plan, chunk, *crc, &mut buffer, read) };
                assert_eq!(good, Ok(!damage), "seed {seed}");
            }
            // SAFETY: as above.
            let failed =
                unsafe { restore_passing(&plan, chunk, *crc, &mut buffer, |_, _| Err(())) };
            assert_eq!(failed, Err(()), "seed {seed}");
        }
        for (tensor, before) in state.tensors.iter().zip(&before) {
            assert!(
                tensor.places.iter().all(|at| tensor.memory[*at] == before[*at]),
                "seed {seed}"
            );
        }
    }
}

#[test]
fn a_panic_on_a_copying_thread_reaches_the_caller() {
    for threads in 1..4 {
        let work = |n: usize| (n != 40).then_some(n).or_else(|| panic!("chunk 40"));
        let payload = panic::catch_unwind(|| on_threads(100, threads, work)).unwrap_err();
        assert_eq!(payload.downcast_ref::<&str>(), Some(&"chunk 40"));
    }
}

#[test]
fn long_pieces_go_past_the_cache_and_are_the_same() {
    // Odd starts, odd lengths, chunk edges inside pieces: the streaming loop's heads and tails.
    let lens = [STREAM_BYTES_MIN * 3 + 13, 777, STREAM_BYTES_MIN * 50 + 4_099];
    let mut chance = Chance(5);
    let pattern = chance.bytes(1 << 20);
    let fresh = |len| pattern.iter().copied().cycle().take(len).collect::<Vec<u8>>();
    let mut tensors: Vec<_> = lens
        .iter()
        .map(|len| Tensor {
            memory: fresh(len + 3),
            places: Vec::new(),
            shape: None,
            in_place: false,
            now: false,
        })
        .collect();
    let mut offset = 0;
    let pieces = tensors.iter_mut().zip(lens).map(|(tensor, len)| {
        offset += len;
        let memory = Memory::Bytes(Address::new(tensor.memory.as_mut_ptr().wrapping_add(3)));
        Piece { offset: offset - len, len, memory, now: false, tag: None }
    });
    let pieces: Vec<_> = pieces.collect();
    let plan = Plan::new(pieces, offset, STREAM_BYTES_MIN * 2 + 5).unwrap();
    let mut slot = vec![0; offset + 1];
    // SAFETY: the plan's memory is that of `tensors`, and no thread has it.
    let crcs = unsafe { capture(&plan, slot.as_mut_ptr(), 2) };
    let payload: Vec<u8> = tensors.iter().flat_map(|t| t.memory[3..].to_vec()).collect();
    assert!(slot[..offset] == payload[..] && slot[offset] == 0);
    let expected: Vec<u32> =
        payload.chunks(STREAM_BYTES_MIN * 2 + 5).map(crc32fast::hash).collect();
    assert_eq!(crcs.chunks, expected);
    tensors.iter_mut().for_each(|tensor| tensor.memory.fill(0));
    // SAFETY: as above.
    assert_eq!(unsafe { restore(&plan, slot.as_ptr(), &crcs.chunks, 2) }, Vec::<u32>::new());
    let back: Vec<u8> = tensors.iter().flat_map(|t| t.memory[3..].to_vec()).collect();
    assert!(back == payload);
    assert!(tensors.iter().all(|tensor| tensor.memory[..3] == [0; 3]));
}

#[test]
fn a_plan_with_a_hole_is_refused() {
    let piece = |offset, len| Piece { offset, len, memory: Memory::InPlace, now: false, tag: None };
    assert!(Plan::new(vec![], 0, 1).unwrap().is_empty());
    assert!(Plan::new(vec![piece(0, 0), piece(0, 3), piece(3, 0)], 3, 2).is_ok());
    assert!(Plan::new(vec![], 1, 1).is_err());
    assert!(Plan::new(vec![piece(0, 3)], 3, 0).is_err());
    assert!(Plan::new(vec![piece(0, 3)], 4, 2).is_err());
    assert!(Plan::new(vec![piece(0, 3)], 2, 2).is_err());
    assert!(Plan::new(vec![piece(1, 3)], 4, 2).is_err());
    assert!(Plan::new(vec![piece(0, 3), piece(2, 2)], 4, 2).is_err());
    assert!(Plan::new(vec![piece(0, 3), piece(3, usize::MAX)], 4, 2).is_err());
    assert!(Plan::new(vec![piece(0, 1 << 40)], 1 << 40, 2).is_err());
    let tensor = Strided::new(Address::new(std::ptr::null_mut()), 4, &[3], &[8]).unwrap();
    let short =
        Piece { offset: 0, len: 11, memory: Memory::Strided(tensor), now: false, tag: None };
    let error = Plan::new(vec![short], 11, 4).unwrap_err().to_string();
    assert_eq!(error, "this is a bug in tierkeep: copy plan: 12 bytes of tensor at 0 for 11");
}

#[test]
#[should_panic(expected = "a tensor whose elements share memory cannot be restored into")]
fn an_expanded_tensor_is_not_restored_into() {
    let mut memory = [0_u8; 4];
    let start = Address::new(memory.as_mut_ptr());
    let tensor = Strided::new(start, 4, &[3], &[0]).unwrap();
    let piece =
        Piece { offset: 0, len: 12, memory: Memory::Strided(tensor), now: false, tag: None };
    let plan = Plan::new(vec![piece], 12, 12).unwrap();
    // SAFETY: it panics before it touches anything.
    let _ = unsafe { restore(&plan, memory.as_ptr(), &[0], 1) };
}

#[test]
fn few_bytes_take_one_thread_and_many_take_half_of_the_cores() {
    assert_eq!(threads_among(0, 64), 1);
    assert_eq!(threads_among(7 << 20, 64), 1);
    assert_eq!(threads_among(8 << 20, 64), 2);
    assert_eq!(threads_among(1 << 40, 64), THREADS_MAX);
    assert_eq!(threads_among(1 << 40, 4), 2);
    assert_eq!(threads_among(1 << 40, 2), 2);
    assert_eq!(threads_among(1 << 40, 1), 1);
    assert!(threads_for(1 << 40) >= 1);
}
