//! The disk tier against fio on the same disk, in one run, turn by turn.
//!
//! `bench-disk DIR [BYTES] [ROUNDS]`. fio writes and reads with O_DIRECT, io_uring, 4 MiB blocks,
//! 16 deep, and one fsync at the end; new file against new file, overwrite against overwrite. Ours
//! includes everything that a put does: staging, truncation, fdatasync, rename, directory sync. The
//! read goes through the whole of restore: manifest, plan, checksums, into tensors. Prints one JSON
//! object with a list for each line.

#![allow(missing_docs, clippy::disallowed_methods, clippy::print_stdout, clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use tierkeep::{
    begin::Begin,
    checkpointer::{Checkpointer, SaveRequest},
    config::Config,
    manifest::Meta,
    names::Rank,
    reader::Reader,
    restore::decide::Wish,
    save::Level,
    snapshot::{copy, strided::Address},
    state::{Memory, State, Tensor, TensorSpec, dtype::Dtype, value::Value},
    tier::{Payload, Tier, buffer::AlignedBuf, disk::DiskTier},
};

/// A slot's memory: a mapped tmpfs file.
struct Slot {
    map: memmap2::MmapMut,
}

impl Slot {
    fn new(len: usize) -> Self {
        let path = format!("/dev/shm/tierkeep-bench-disk-{}", std::process::id());
        let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path);
        let file = file.unwrap();
        file.set_len(len as u64).unwrap();
        // SAFETY: nobody else has the file, whose name goes now.
        let mut map = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
        std::fs::remove_file(path).unwrap();
        for (i, word) in map.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&(i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes());
        }
        Self { map }
    }
}

impl Payload for Slot {
    fn len(&self) -> u64 {
        self.map.len() as u64
    }
    fn block<'a>(
        &'a self,
        offset: u64,
        len: usize,
        _: &'a mut AlignedBuf,
    ) -> tierkeep::Result<&'a [u8]> {
        Ok(&self.map[offset as usize..offset as usize + len])
    }
}

fn cpu() -> Duration {
    // SAFETY: `rusage` is plain data and the call writes it whole.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let time = |t: libc::timeval| {
        Duration::new(t.tv_sec.unsigned_abs(), 0) + Duration::from_micros(t.tv_usec.unsigned_abs())
    };
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// (wall seconds, CPU seconds)
fn timed(work: impl FnOnce()) -> (f64, f64) {
    let (wall, before) = (Instant::now(), cpu());
    work();
    (wall.elapsed().as_secs_f64(), (cpu() - before).as_secs_f64())
}

fn fio(file: &Path, direction: &str, bytes: u64) -> (f64, f64) {
    let output = Command::new("fio")
        .args(["--name=bench", "--direct=1", "--ioengine=io_uring", "--iodepth=16", "--bs=4M"])
        .args(["--fallocate=none", "--output-format=json", "--thread"])
        .arg(format!("--rw={direction}"))
        .arg(format!("--size={bytes}"))
        .arg(format!("--filename={}", file.display()))
        .args((direction == "write").then_some("--end_fsync=1"))
        .output()
        .expect("fio is needed: apt-get install fio");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let job = &report["jobs"][0];
    let side = &job[direction];
    assert_eq!(side["io_bytes"].as_u64(), Some(bytes), "fio did not do its work: {job}");
    // `job_runtime` includes the final fsync, `runtime` of the side alone need not.
    let ms = side["runtime"].as_f64().unwrap().max(job["job_runtime"].as_f64().unwrap());
    let percent = job["usr_cpu"].as_f64().unwrap() + job["sys_cpu"].as_f64().unwrap();
    (ms / 1e3, ms / 1e3 * percent / 100.0)
}

fn drop_caches() {
    // Needs root; O_DIRECT passes the cache by all the same.
    let _ = std::fs::write("/proc/sys/vm/drop_caches", "3");
}

fn name(n: usize) -> String {
    format!("{n:020}/00000001-aabbccdd/rank-000000-{n:08x}.safetensors")
}

/// A run with one checkpoint of `bytes` on disk and nothing in RAM.
fn saved_run(dir: &Path, bytes: usize) -> (PathBuf, PathBuf) {
    let (destination, ram) = (dir.join("run"), PathBuf::from("/dev/shm/tierkeep-bench-run"));
    let mut config = Config::new(&destination).unwrap();
    config.ram_root = ram.clone();
    let ckpt = Checkpointer::open(config).unwrap();
    ckpt.begin(&Begin { fresh: true, ..Begin::default() }).unwrap();
    let data = vec![0x5A_u8; bytes];
    let pieces = 256;
    let tensors = (0..pieces).map(|i| {
        let len = bytes / pieces;
        Tensor {
            spec: Arc::new(TensorSpec {
                name: format!("t{i:04}").into(),
                dtype: Dtype::U8,
                shape: vec![len as u64],
                part_of: None,
                held_by: Vec::new(),
            }),
            memory: Memory::Contiguous(Address::read_only(data[i * len..].as_ptr())),
            late: false,
        }
    });
    let state = State { tree: Value::None, tensors: tensors.collect() };
    let request = SaveRequest {
        step: 1,
        state,
        meta: Meta::default(),
        bring: None,
        overlap: false,
        skip_if_busy: false,
        keep_alive: Box::new(()),
        interrupted: None,
    };
    // SAFETY: `data` is read only during the call.
    let save = unsafe { ckpt.save(request) }.unwrap();
    assert!(save.poll(Level::Disk, false, Duration::from_secs(300)).unwrap());
    ckpt.close(Duration::from_secs(60), false).unwrap();
    (destination, ram)
}

fn restore(destination: &Path, ram: &Path, into: &mut [u8]) {
    let reader = Reader::open(destination, Some(ram)).unwrap();
    let (key, ..) = reader.choose(&Wish::default()).unwrap();
    let shard = reader.shard(&key, Rank(0)).unwrap();
    let mut targets = HashMap::new();
    let mut rest = into;
    for tensor in &shard.manifest().tensors {
        let (own, others) = rest.split_at_mut((tensor.at[1] - tensor.at[0]) as usize);
        let address = Address::new(own.as_mut_ptr());
        targets.insert(tensor.name.clone(), copy::Memory::Bytes(address));
        rest = others;
    }
    // SAFETY: each target is its own part of `into`.
    unsafe { shard.read(&targets, None) }.unwrap();
}

fn main() {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().expect("usage: bench-disk DIR [BYTES] [ROUNDS]"));
    let bytes: usize = args.next().map_or(1 << 30, |a| a.parse().unwrap());
    let rounds: usize = args.next().map_or(5, |a| a.parse().unwrap());
    std::fs::create_dir_all(&dir).unwrap();
    let tier = DiskTier::open(&dir.join("tier")).unwrap();
    let slot = Slot::new(bytes);
    let fio_file = dir.join("fio.bin");
    let (destination, ram) = saved_run(&dir, bytes);
    let mut memory = vec![1_u8; bytes];
    let mut lines: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    for round in 0..rounds {
        let mut add = |line, figures| lines.entry(line).or_default().push(figures);
        let _ = std::fs::remove_file(&fio_file);
        add("fio write new", fio(&fio_file, "write", bytes as u64));
        let put = |n| timed(|| tier.put(&name(n), &slot).map(drop).unwrap());
        add("put new", put(2 * round));
        add("fio write overwrite", fio(&fio_file, "write", bytes as u64));
        tier.retire(&name(2 * round)).unwrap();
        add("put overwrite", put(2 * round + 1));
        tier.delete(&name(2 * round + 1)).unwrap();
        drop_caches();
        add("fio read", fio(&fio_file, "read", bytes as u64));
        drop_caches();
        add("restore cold", timed(|| restore(&destination, &ram, &mut memory)));
    }
    std::fs::remove_dir_all(&dir).unwrap();
    let _ = std::fs::remove_dir_all(&ram);
    let rows = lines.iter().map(|(line, figures)| {
        let figures = figures.iter().map(|(wall, cpu)| serde_json::json!([wall, cpu]));
        ((*line).to_owned(), figures.collect::<Vec<_>>())
    });
    let table: BTreeMap<String, Vec<serde_json::Value>> = rows.collect();
    println!("{}", serde_json::json!({ "bytes": bytes, "seconds_and_cpu_seconds": table }));
}
