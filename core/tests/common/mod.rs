//! A small model for tests: tensors whose bytes are a function of step and rank, so that any
//! restored bit can be checked without keeping anything.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)] // Each test uses its part.

pub mod gate;
pub mod lives;
pub mod mount;
pub mod whole;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tierkeep::{
    begin::Begin,
    checkpointer::{Checkpointer, SaveRequest},
    config::Config,
    host::{Host, Settings},
    manifest::Meta,
    peers::{Arriving, Broken, Chunks},
    reader::Reader,
    restore::read::{ReadReport, Restorable},
    save::{Level, Save},
    snapshot::{copy, strided::Address},
    state::{
        Memory, State, Tensor, TensorSpec,
        dtype::Dtype,
        value::{Lib, TensorRef, Value},
    },
    testing::contract::pattern,
};

/// Sizes in bytes: one of more than a chunk, odd ones, an empty one.
pub const SIZES: [usize; 5] = [(4 << 20) + 24, 4096, 13, 0, 64 << 10];
/// For trials that run thousands of times.
pub const SMALL: [usize; 3] = [40_000, 13, 0];
/// The tensor that all ranks hold alike.
pub const ALIKE: usize = 1;

/// Directories of one test: disk and ram apart, both removed at the end.
pub struct Places {
    /// First: it ends before its directories go.
    hosted: Option<Hosted>,
    disk: tempfile::TempDir,
    ram: tempfile::TempDir,
}

/// An agent in this process.
struct Hosted(Arc<Host>);

impl Drop for Hosted {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// A directory in memory.
pub fn ram() -> tempfile::TempDir {
    let ram = tempfile::Builder::new().prefix("tierkeep-test-").tempdir_in("/dev/shm");
    ram.expect("tempdir in /dev/shm")
}

/// Of an agent that keeps the ram tier at `ram`.
pub fn settings(ram: &Path) -> Settings {
    Settings {
        socket: ram.join("agent.sock"),
        ram_root: ram.into(),
        ram_bytes_max: None,
        run_bytes_max: None,
        buckets: Vec::new(),
        tenancy: None,
        trainers_max: 64,
        idle: Duration::from_secs(3600),
    }
}

/// With `TIERKEEP_TEST_HOSTED=1` every rank of a test has an agent: what holds without one holds with.
fn hosted(ram: &Path) -> Option<Hosted> {
    std::env::var_os("TIERKEEP_TEST_HOSTED")?;
    let (host, listener) = Host::open(settings(ram)).expect("an agent");
    let serving = host.clone();
    std::thread::spawn(move || serving.serve(&listener).expect("serve"));
    Some(Hosted(host))
}

impl Places {
    pub fn new() -> Self {
        let ram = ram();
        Self { hosted: hosted(ram.path()), disk: tempfile::tempdir().expect("tempdir"), ram }
    }

    pub fn is_hosted(&self) -> bool {
        self.hosted.is_some()
    }

    pub fn destination(&self) -> PathBuf {
        self.disk.path().join("run")
    }

    pub fn ram(&self) -> &Path {
        self.ram.path()
    }

    /// Waits until an agent has carried on what trainers that are gone have left.
    pub fn settle(&self) {
        let Some(Hosted(host)) = &self.hosted else { return };
        let begun = std::time::Instant::now();
        while host.ranks().iter().any(|rank| rank.pid.is_some() || rank.busy) {
            assert!(begun.elapsed() < Duration::from_secs(20), "{:#?}", host.ranks());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Settings of a rank that has no agent whatever: of what is not an agent's.
    pub fn alone(&self) -> Config {
        Config { agent: None, ..self.config() }
    }

    pub fn wipe_ram(&self) {
        for entry in std::fs::read_dir(self.ram.path()).expect("list") {
            let path = entry.expect("entry").path();
            if path.is_dir() {
                std::fs::remove_dir_all(path).expect("wipe");
            }
        }
    }

    pub fn config(&self) -> Config {
        config(&self.destination(), self.ram.path(), 0, 1)
    }

    pub fn config_of(&self, rank: u32, world: u32) -> Config {
        config(&self.destination(), self.ram.path(), rank, world)
    }

    pub fn open(&self) -> Checkpointer {
        Checkpointer::open(self.config()).expect("open")
    }
}

pub fn config(destination: &Path, ram: &Path, rank: u32, world: u32) -> Config {
    let mut config = Config::new(destination).expect("config");
    config.ram_root = ram.into();
    config.rank = rank;
    config.world = world;
    config.savers = (0..world).collect();
    config.lock_wait = Duration::from_secs(5);
    config.attempt_wait = Duration::from_secs(20);
    config.slot_wait = Duration::from_secs(5);
    let socket = ram.join("agent.sock");
    config.agent =
        (std::env::var_os("TIERKEEP_TEST_HOSTED").is_some() && socket.exists()).then_some(socket);
    config
}

pub struct Model {
    pub rank: u32,
    pub tensors: Vec<Vec<u8>>,
}

impl Model {
    pub fn new(rank: u32, sizes: &[usize]) -> Self {
        Self { rank, tensors: sizes.iter().map(|n| vec![0; *n]).collect() }
    }

    /// The state after so many steps.
    pub fn at(rank: u32, sizes: &[usize], step: u64) -> Self {
        let mut model = Self::new(rank, sizes);
        model.train_to(step);
        model
    }

    pub fn train_to(&mut self, step: u64) {
        (0..self.tensors.len()).for_each(|i| self.train_tensor(i, step));
    }

    /// In place, as an optimizer does: who copies it meanwhile has a mix.
    pub fn train_tensor(&mut self, i: usize, step: u64) {
        let rank = if i == ALIKE { 0 } else { self.rank };
        let seed = step * 1_000_003 + u64::from(rank) * 1009 + i as u64;
        let trained = pattern(self.tensors[i].len(), seed);
        self.tensors[i].copy_from_slice(&trained);
    }

    pub fn is_at(&self, step: u64) -> bool {
        let sizes: Vec<usize> = self.tensors.iter().map(Vec::len).collect();
        self.tensors == Self::at(self.rank, &sizes, step).tensors
    }

    pub fn specs(&self) -> Vec<Arc<TensorSpec>> {
        self.state(0).tensors.into_iter().map(|t| t.spec).collect()
    }

    pub fn state(&self, step: u64) -> State {
        let mut entries = Vec::new();
        let mut tensors = Vec::new();
        for (i, tensor) in self.tensors.iter().enumerate() {
            let name: Arc<str> = format!("t{i}").into();
            let leaf = TensorRef { name: name.clone(), lib: Lib::Numpy, param: false, whole: None };
            entries.push((Value::Str(name.to_string()), Value::Tensor(leaf)));
            let shape = vec![tensor.len() as u64];
            tensors.push(Tensor {
                spec: Arc::new(TensorSpec {
                    name,
                    dtype: Dtype::U8,
                    shape,
                    part_of: None,
                    held_by: Vec::new(),
                }),
                memory: Memory::Contiguous(Address::read_only(tensor.as_ptr())),
                late: false,
            });
        }
        entries.push((Value::Str("step".into()), Value::Int(step.cast_signed())));
        State { tree: Value::Dict(entries), tensors }
    }

    /// A save of this state as it is now, copied before the call returns.
    pub fn request(&self, step: u64) -> SaveRequest {
        SaveRequest {
            step,
            state: self.state(step),
            meta: Meta::default(),
            bring: None,
            overlap: false,
            skip_if_busy: false,
            keep_alive: Box::new(()),
            interrupted: None,
        }
    }

    /// Saves this state; the caller keeps the model until it is staged.
    pub fn save(&self, ckpt: &Checkpointer, step: u64) -> tierkeep::Result<Save> {
        // SAFETY: "now": the memory is read only during the call.
        unsafe { ckpt.save(self.request(step)) }
    }

    pub fn read(&mut self, found: &Restorable) -> tierkeep::Result<ReadReport> {
        let targets: HashMap<String, copy::Memory> = self
            .tensors
            .iter_mut()
            .enumerate()
            .map(|(i, t)| (format!("t{i}"), copy::Memory::Bytes(Address::new(t.as_mut_ptr()))))
            .collect();
        // SAFETY: the targets are this model's own vectors, of the sizes that were saved.
        unsafe { found.read(&targets, None) }
    }
}

/// Begins; the step that is resumed from, with its bits checked.
pub fn resume(ckpt: &Checkpointer, sizes: &[usize]) -> tierkeep::Result<u64> {
    let Some(found) = ckpt.begin(&Begin::default())? else { return Ok(0) };
    read_whole(&found, sizes).map(|_| found.step().0)
}

/// Reads one rank's shard and checks every bit of it.
pub fn read_whole(found: &Restorable, sizes: &[usize]) -> tierkeep::Result<ReadReport> {
    let mut model = Model::new(found.rank.0, sizes);
    let report = model.read(found)?;
    let step = found.step().0;
    assert!(model.is_at(step), "step {step}: restored bits differ");
    let tree = Value::decode(&found.manifest().tree).expect("tree");
    let Value::Dict(entries) = tree else { panic!("tree is no dict") };
    assert_eq!(entries.last().expect("step").1, Value::Int(step.cast_signed()), "a mix of steps");
    Ok(report)
}

/// Saves `steps` one after the other, each waited for on disk.
pub fn train(ckpt: &Checkpointer, sizes: &[usize], steps: impl IntoIterator<Item = u64>) {
    for step in steps {
        let model = Model::at(ckpt.config().rank, sizes, step);
        let save = model.save(ckpt, step).expect("save");
        wait(&save, Level::Disk);
    }
}

pub fn wait(save: &Save, level: Level) {
    let reached = save.poll(level, false, Duration::from_secs(30));
    assert!(reached.expect("wait"), "{level:?} of step {} not reached", save.step());
}

pub fn close(ckpt: &Checkpointer) {
    assert!(ckpt.close(Duration::from_secs(30), false).expect("close"), "not closed in time");
}

/// Every file below `dir`, relative, sorted.
pub fn files(dir: &Path) -> Vec<PathBuf> {
    fn walk(dir: &Path, root: &Path, all: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                walk(&path, root, all);
            } else {
                all.push(path.strip_prefix(root).expect("below").into());
            }
        }
    }
    let mut all = Vec::new();
    walk(dir, dir, &mut all);
    all.sort();
    all
}

/// Flips one bit of a file in place.
pub fn flip(path: &Path, bit: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().read(true).write(true).open(path).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, bit / 8).expect("read");
    byte[0] ^= 1 << (bit % 8);
    file.write_all_at(&byte, bit / 8).expect("write");
}

pub fn events(c: &Checkpointer) -> Vec<String> {
    let mut v = vec![];
    while let Ok(Some(e)) = c.observer().next(Duration::ZERO) {
        v.push(format!("{}: {}", e.kind, e.text));
    }
    v
}
pub fn overlap_save(m: &Model, c: &Checkpointer, step: u64) -> Save {
    let mut state = m.state(step);
    for t in &mut state.tensors {
        t.late = true;
    }
    let r = SaveRequest { state, overlap: true, ..m.request(step) };
    // SAFETY: callers keep the model until the save is staged.
    unsafe { c.save(r) }.unwrap()
}
/// every sealed or ram checkpoint: verify bytes
pub fn verify_all(p: &Places) -> Vec<String> {
    let reader = Reader::open(&p.destination(), Some(p.ram())).unwrap();
    let mut out = vec![];
    for s in reader.steps().unwrap() {
        for sh in &s.shards {
            match reader.shard(&s.key, sh.rank) {
                Ok(r) => {
                    let bad = r.verify();
                    for b in bad {
                        out.push(format!("{} sealed={} {:?}: {}", s.key, s.sealed, b.tier, b.why));
                    }
                }
                Err(e) => out.push(format!("{} {e}", s.key)),
            }
        }
    }
    out
}

/// A chunk has come over a network, as `bytes`.
pub fn arrive(
    arriving: Box<dyn Arriving + '_>,
    bytes: &[u8],
    chunk: usize,
    all: &Chunks<'_>,
) -> tierkeep::Result<()> {
    match arriving.take(&mut &*bytes) {
        Ok(true) => {
            all.carried(chunk);
            Ok(())
        }
        Ok(false) => {
            all.refuse(chunk);
            Ok(())
        }
        Err(Broken::Place(e)) => Err(e),
        Err(Broken::Flow(e)) => Err(tierkeep::Error::Bug(e.to_string())),
    }
}
