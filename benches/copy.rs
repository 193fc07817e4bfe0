//! How long capture and restore take, as ratios to memcpy of the same pieces into the same memory.
//!
//! `cargo run --release --bin bench-copy [ROUNDS]`. Each round runs every line once, so that
//! whatever else the machine does falls on all alike; a ratio is the median of the rounds' ratios.
//! Rounds start at another line each time, but each line has the same one before it: what that left
//! in the caches shows in tables smaller than the last-level cache.

#![allow(missing_docs, clippy::disallowed_methods, clippy::print_stdout, clippy::unwrap_used)]

use std::{
    alloc::{Layout, alloc},
    hint::black_box,
    ptr,
    time::Instant,
};

use tierkeep::snapshot::{
    copy::{
        Memory, Piece, Plan, capture, capture_now, capture_rest, restore, restore_chunk,
        threads_for,
    },
    strided::{Address, Strided},
};

const CHUNK_BYTES: usize = 4 << 20;

/// A line of the table: its name, the row it is compared with, and one run.
struct Row<'a> {
    name: &'static str,
    reference: usize,
    run: Box<dyn Fn() + 'a>,
}

/// A piece of memory that lives until the program ends, all of its pages touched.
fn memory(len: usize) -> *mut u8 {
    // SAFETY: the size is not 0.
    let start = unsafe { alloc(Layout::from_size_align(len.max(64), 64).unwrap()) };
    assert!(!start.is_null());
    for at in 0..len {
        let byte = (at as u64 ^ 0x5DEE_CE66).wrapping_mul(0x9E37_79BB) as u8;
        // SAFETY: `at` is below the size.
        unsafe { start.add(at).write(byte) };
    }
    start
}

/// A pre-faulted slot, as the arena has them.
fn slot(len: usize) -> *mut u8 {
    let path = c"/dev/shm/tierkeep-bench-copy";
    // SAFETY: a new file of `len` bytes, mapped and written whole.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CREAT | libc::O_EXCL, 0o600);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        libc::unlink(path.as_ptr());
        assert_eq!(libc::ftruncate(fd, len as i64), 0);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let start = libc::mmap(ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, 0);
        assert_ne!(start, libc::MAP_FAILED);
        libc::memset(start, 1, len);
        start.cast()
    }
}

/// Bytes of a GPT's parameters and both moments, in f32: 444 tensors, 1,051 MiB.
fn gpt() -> Vec<usize> {
    let width = 640;
    let mut elements = vec![50_257 * width, 1_024 * width];
    for _ in 0..12 {
        let attention = [3 * width * width, 3 * width, width * width, width];
        let mlp = [4 * width * width, 4 * width, 4 * width * width, width];
        elements
            .extend([width, width].into_iter().chain(attention).chain([width, width]).chain(mlp));
    }
    elements.extend([width, width]);
    (0..3).flat_map(|_| elements.iter().map(|n| n * 4)).collect()
}

struct State {
    sources: Vec<(*mut u8, usize)>,
    plan: Plan,
    slot: *mut u8,
}

impl State {
    fn of(sizes: &[usize], slot: *mut u8) -> Self {
        let sources: Vec<_> = sizes.iter().map(|n| (memory(*n), *n)).collect();
        let mut offset = 0;
        let pieces = sources.iter().enumerate().map(|(i, &(start, len))| {
            offset += len;
            let memory = Memory::Bytes(Address::new(start));
            Piece { offset: offset - len, len, memory, now: i % 4 < 2, tag: None }
        });
        let pieces: Vec<_> = pieces.collect();
        Self { sources, plan: Plan::new(pieces, offset, CHUNK_BYTES).unwrap(), slot }
    }

    fn memcpy_in(&self) {
        let mut at = self.slot;
        for &(start, len) in &self.sources {
            // SAFETY: the slot is as long as all sources together.
            unsafe {
                libc::memcpy(at.cast(), start.cast(), len);
                at = at.add(len);
            }
        }
        black_box(at);
    }

    /// What the memory gives at most: the same bytes by two threads, without checksums.
    fn memcpy_in_by_two(&self) {
        let half = self.plan.len() / 2;
        std::thread::scope(|scope| {
            for range in [0..half, half..self.plan.len()] {
                let (sources, slot) = (self.addresses(), self.slot as usize);
                scope.spawn(move || {
                    for (start, at, len) in sources {
                        let (from, to) = (range.start.max(at), range.end.min(at + len));
                        if from < to {
                            // SAFETY: inside the source and the slot; each thread has its half.
                            unsafe {
                                let (slot, start) = (slot as *mut u8, start as *const u8);
                                libc::memcpy(
                                    slot.add(from).cast(),
                                    start.add(from - at).cast(),
                                    to - from,
                                );
                            }
                        }
                    }
                });
            }
        });
    }

    /// Start, place in the payload, and length of each source.
    fn addresses(&self) -> Vec<(usize, usize, usize)> {
        let mut at = 0;
        let place = |&(start, len): &(*mut u8, usize)| {
            at += len;
            (start as usize, at - len, len)
        };
        self.sources.iter().map(place).collect()
    }

    fn memcpy_out(&self) {
        let mut at = self.slot;
        for &(start, len) in &self.sources {
            // SAFETY: the slot is as long as all sources together.
            unsafe {
                libc::memcpy(start.cast(), at.cast(), len);
                at = at.add(len);
            }
        }
        black_box(at);
    }

    fn capture(&self, threads: usize) -> Vec<u32> {
        // SAFETY: sources and slot live until the program ends, and nobody else has them.
        unsafe { capture(&self.plan, self.slot, threads) }.chunks
    }

    fn capture_now(&self) {
        // SAFETY: as above.
        unsafe { capture_now(&self.plan, self.slot, 1) }
    }

    fn capture_rest(&self) -> Vec<u32> {
        // SAFETY: as above; the row before it ran `capture_now`, and if not, only checksums differ.
        unsafe { capture_rest(&self.plan, self.slot, 1) }.chunks
    }

    fn restore(&self, crcs: &[u32], threads: usize) {
        // SAFETY: as above.
        let bad = unsafe { restore(&self.plan, self.slot, crcs, threads) };
        assert!(bad.is_empty());
    }

    fn restore_chunks(&self, crcs: &[u32]) {
        for (chunk, crc) in crcs.iter().enumerate() {
            let range = self.plan.chunk(chunk);
            // SAFETY: as above; the range is inside the slot.
            unsafe {
                let bytes = std::slice::from_raw_parts(self.slot.add(range.start), range.len());
                assert!(restore_chunk(&self.plan, chunk, bytes, *crc));
            }
        }
    }
}

fn strided(start: *mut u8, shape: &[usize], strides: &[isize], slot: *mut u8) -> State {
    let tensor = Strided::new(Address::new(start), 4, shape, strides).unwrap();
    let len = tensor.len();
    let piece = Piece { offset: 0, len, memory: Memory::Strided(tensor), now: true, tag: None };
    let plan = Plan::new(vec![piece], len, CHUNK_BYTES).unwrap();
    State { sources: Vec::new(), plan, slot }
}

/// Runs every row in turn, `rounds` times after a warm-up, and prints medians.
fn measure(title: &str, bytes: usize, rounds: usize, rows: &[Row<'_>]) {
    let mut seconds = vec![Vec::new(); rows.len()];
    for round in 0..=rounds {
        for i in 0..rows.len() {
            let i = (i + round) % rows.len();
            let start = Instant::now();
            (rows[i].run)();
            let took = start.elapsed().as_secs_f64();
            if round > 0 {
                seconds[i].push(took);
            }
        }
    }
    println!("\n{title}: {:.1} MiB, {rounds} rounds", bytes as f64 / f64::from(1 << 20));
    println!("{:44} {:>7} {:>10} {:>7}", "", "ratio", "ms", "GB/s");
    // Rounds are rotated, so the n-th time of each row was taken in the same round.
    for (i, row) in rows.iter().enumerate() {
        let ratios = seconds[i].iter().zip(&seconds[row.reference]).map(|(a, b)| a / b).collect();
        let took = median(seconds[i].clone());
        let rate = bytes as f64 / took / 1e9;
        println!("{:44} {:7.3} {:10.3} {rate:7.2}", row.name, median(ratios), took * 1e3);
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn row<'a>(name: &'static str, reference: usize, run: impl Fn() + 'a) -> Row<'a> {
    Row { name, reference, run: Box::new(run) }
}

fn pieces(title: &str, sizes: &[usize], rounds: usize, slot: *mut u8) {
    let state = State::of(sizes, slot);
    let s = &state;
    let crcs = &s.capture(1);
    measure(
        title,
        s.plan.len(),
        rounds,
        &[
            row("memcpy into the slot", 0, || s.memcpy_in()),
            row("memcpy into the slot, 2 threads", 0, || s.memcpy_in_by_two()),
            row("capture, 1 thread", 0, || drop(black_box(s.capture(1)))),
            row("capture, 2 threads", 0, || drop(black_box(s.capture(2)))),
            row("capture_now, half of the tensors", 0, || s.capture_now()),
            row("capture_rest after it", 0, || drop(black_box(s.capture_rest()))),
            row("memcpy out of the slot", 6, || s.memcpy_out()),
            row("restore, 1 thread", 6, || s.restore(crcs, 1)),
            row("restore, 2 threads", 6, || s.restore(crcs, 2)),
            row("restore_chunk of each, check first", 6, || s.restore_chunks(crcs)),
        ],
    );
}

fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = |line: &str| Some(line.strip_prefix("model name")?.split_once(": ")?.1.to_owned());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{}, {cores} cores", info.lines().find_map(name).unwrap_or("unknown".into()))
}

fn main() {
    let rounds = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(11);
    println!("machine: {}; threads_for(1 GiB) = {}", machine(), threads_for(1 << 30));
    let slot = slot(1_200 << 20);
    pieces("GPT, f32 with both moments", &gpt(), rounds, slot);
    pieces("2,000 tensors of 1 KiB", &vec![1 << 10; 2_000], rounds * 20, slot);
    pieces("8 tensors of 1 MiB", &[1 << 20; 8], rounds * 20, slot);
    pieces("64 tensors of 1 MiB", &[1 << 20; 64], rounds * 5, slot);

    let side = 4_096;
    let start = memory(side * side * 4);
    let row_bytes = side as isize * 4;
    for (title, shape, strides) in [
        ("columns 0-768 of 4096 x 4096 f32", [side, 768], [row_bytes, 4]),
        ("transpose of 4096 x 4096 f32", [side, side], [4, row_bytes]),
        ("every second column of 4096 x 4096 f32", [side, side / 2], [row_bytes, 8]),
    ] {
        let state = strided(start, &shape, &strides, slot);
        let s = &state;
        // Its own place, so that what was captured stays there to be restored.
        // SAFETY: the slot has 1,200 MiB.
        let contiguous = State::of(&[s.plan.len()], unsafe { slot.add(512 << 20) });
        let crcs = &s.capture(1);
        measure(
            title,
            s.plan.len(),
            rounds,
            &[
                row("memcpy of as many contiguous bytes", 0, || contiguous.memcpy_in()),
                row("capture, 1 thread", 0, || drop(black_box(s.capture(1)))),
                row("restore, 1 thread", 0, || s.restore(crcs, 1)),
            ],
        );
    }
}
