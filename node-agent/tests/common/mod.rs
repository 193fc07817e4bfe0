//! Small runs, made by the core itself, and the binary run on them.
#![allow(clippy::unwrap_used)] // In helpers of tests, as in tests.
#![allow(dead_code, unreachable_pub)] // Each test file uses its part.

use std::{
    ffi::OsStr,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
    time::Duration,
};

use tierkeep::{
    begin::Begin,
    checkpointer::{Checkpointer, SaveRequest},
    config::Config,
    manifest::Meta,
    save::Level,
    snapshot::strided::Address,
    state::{
        Memory, State, Tensor, TensorSpec,
        boxes::{box_name, name_of_all, path_of},
        dtype::Dtype,
        path::{Key, split},
        replicas::Rule,
        value::{Lib, TensorRef, Value, Whole},
    },
};

/// One tensor of a rank: its name, what it is, its bytes.
pub struct Stored {
    pub spec: TensorSpec,
    pub bytes: Vec<u8>,
}

pub fn whole(name: &str, dtype: Dtype, shape: &[u64], fill: impl Fn(usize) -> u8) -> Stored {
    let spec = TensorSpec {
        name: name.into(),
        dtype,
        shape: shape.into(),
        part_of: None,
        held_by: Vec::new(),
    };
    let len = usize::try_from(spec.bytes().unwrap()).unwrap();
    Stored { spec, bytes: (0..len).map(fill).collect() }
}

pub fn part(path: &str, global: &[u64], offset: &[u64], shape: &[u64]) -> Stored {
    let mut stored = whole(&box_name(path, offset), Dtype::U8, shape, |_| 0);
    stored.spec.part_of = Some((global.into(), offset.into()));
    // Each byte says where in the global tensor it is (two dimensions).
    for (i, byte) in stored.bytes.iter_mut().enumerate() {
        let i = i as u64;
        let (row, column) = (offset[0] + i / shape[1], offset[1] + i % shape[1]);
        *byte = ((row * global[1] + column) % 251) as u8;
    }
    stored
}

/// The usual state of a rank: one tensor of more than a chunk, a small one, values.
pub fn model(rank: u32, step: u64) -> Vec<Stored> {
    let seed = step as usize * 7 + rank as usize * 3;
    vec![
        whole("model/w", Dtype::U8, &[(4 << 20) + 5], move |i| ((i * 31 + seed) % 253) as u8),
        whole("model/~s1", Dtype::F32, &[3, 4], move |i| ((i + seed) % 256) as u8),
    ]
}

/// Directories of one test.
pub struct Place {
    disk: tempfile::TempDir,
    ram: tempfile::TempDir,
    /// What its ranks hold alike.
    pub replicated: Vec<Rule>,
}

impl Place {
    pub fn new() -> Self {
        let ram = tempfile::Builder::new().prefix("tierkeep-test-").tempdir_in("/dev/shm");
        let replicated = Vec::new();
        Self { disk: tempfile::tempdir().unwrap(), ram: ram.unwrap(), replicated }
    }

    pub fn root(&self) -> &Path {
        self.disk.path()
    }

    pub fn run(&self) -> PathBuf {
        self.disk.path().join("run")
    }

    pub fn ram(&self) -> &Path {
        self.ram.path()
    }

    pub fn wipe_ram(&self) {
        for entry in std::fs::read_dir(self.ram.path()).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                std::fs::remove_dir_all(path).unwrap();
            }
        }
    }

    pub fn open(&self, rank: u32, world: u32) -> Checkpointer {
        let mut config = Config::new(&self.run()).unwrap();
        config.ram_root = self.ram().into();
        config.rank = rank;
        config.world = world;
        config.savers = (0..world).collect();
        config.keep_last = 100;
        config.replicated = self.replicated.clone();
        config.attempt_wait = Duration::from_secs(20);
        Checkpointer::open(config).unwrap()
    }

    /// One start of the job: saves these steps with `make(rank, step)`, and dies with its RAM in
    /// place.
    pub fn train(
        &self,
        world: u32,
        steps: &[u64],
        begin: &Begin,
        make: fn(u32, u64) -> Vec<Stored>,
    ) {
        let ranks: Vec<_> = (0..world).map(|rank| self.open(rank, world)).collect();
        for ckpt in &ranks {
            ckpt.begin(begin).unwrap();
        }
        for step in steps {
            let states: Vec<_> = (0..world).map(|rank| make(rank, *step)).collect();
            let saves: Vec<_> = ranks.iter().zip(&states).map(|(c, s)| save(c, *step, s)).collect();
            for save in saves {
                assert!(save.poll(Level::Disk, false, Duration::from_secs(30)).unwrap());
            }
        }
        for ckpt in &ranks {
            assert!(ckpt.close(Duration::from_secs(30), true).unwrap());
        }
    }

    /// `tierkeep ARGS` with this test's ram root.
    pub fn tierkeep<A: AsRef<OsStr>>(&self, args: &[A]) -> Ran {
        let output = Command::new(env!("CARGO_BIN_EXE_tierkeep"))
            .args(args)
            .env("TIERKEEP_RAM_DIR", self.ram())
            .output()
            .unwrap();
        Ran::of(output)
    }

    /// `tierkeep COMMAND RUN ARGS`
    pub fn on(&self, command: &str, args: &[&str]) -> Ran {
        let run = self.run();
        let mut all = vec![command, run.to_str().unwrap()];
        all.extend(args);
        self.tierkeep(&all)
    }

    /// The only file below the run's disk directory whose path contains all of `parts`.
    pub fn file(&self, parts: &[&str]) -> PathBuf {
        find(&self.run(), parts)
    }
}

/// The only file below `root` whose path contains all of `parts`.
pub fn find(root: &Path, parts: &[&str]) -> PathBuf {
    let mut todo = vec![root.to_path_buf()];
    let mut found = Vec::new();
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                todo.push(path);
            } else if parts.iter().all(|p| path.to_str().unwrap().contains(p)) {
                found.push(path);
            }
        }
    }
    assert_eq!(found.len(), 1, "{parts:?}: {found:?}");
    found.remove(0)
}

pub fn save(ckpt: &Checkpointer, step: u64, stored: &[Stored]) -> tierkeep::save::Save {
    let leaf =
        |s: &Stored| {
            Value::Tensor(TensorRef {
                name: match &s.spec.part_of {
                    None => s.spec.name.clone(),
                    Some(_) => name_of_all(path_of(&s.spec.name).0).into(),
                },
                lib: Lib::Torch,
                param: false,
                whole: s.spec.part_of.as_ref().map(|(global, _)| {
                    Arc::new(Whole { dtype: s.spec.dtype, shape: global.clone() })
                }),
            })
        };
    // A tree whose paths are the tensors' names.
    let mut model = Vec::new();
    let mut top = Vec::new();
    let mut met = std::collections::HashSet::new();
    for s in stored {
        let (path, _) = path_of(&s.spec.name);
        if !met.insert(path) {
            continue; // Another box of it.
        }
        match split(path).unwrap().as_slice() {
            [Key::Str(a), Key::Str(b)] if a == "model" => {
                model.push((Value::Str(b.clone()), leaf(s)));
            }
            [Key::Str(a)] => top.push((Value::Str(a.clone()), leaf(s))),
            other => panic!("{other:?}"),
        }
    }
    // A second name of the first tensor of the model.
    if let Some((_, first)) = model.first().cloned() {
        model.push((Value::Str("tied".into()), first));
    }
    top.push((Value::Str("model".into()), Value::Object(Box::new(Value::Dict(model)))));
    top.push((Value::Str("step".into()), Value::Int(step.cast_signed())));
    top.push((Value::Str("lr".into()), Value::float(0.001)));
    let tensors = stored.iter().map(|s| Tensor {
        spec: s.spec.clone().into(),
        memory: Memory::Contiguous(Address::read_only(s.bytes.as_ptr())),
        late: false,
    });
    let request = SaveRequest {
        step,
        state: State { tree: Value::Dict(top), tensors: tensors.collect() },
        meta: Meta {
            metrics: [("loss".to_owned(), 0.25)].into(),
            tags: vec!["small".into()],
            saved_unix_ms: 0,
        },
        overlap: false,
        bring: None,
        skip_if_busy: false,
        keep_alive: Box::new(()),
        interrupted: None,
    };
    // SAFETY: without overlap the memory is read only during the call.
    unsafe { ckpt.save(request) }.unwrap()
}

/// What the binary said.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    pub fn of(output: Output) -> Self {
        Self {
            code: output.status.code().expect("no signal"),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{self:#?}");
        self
    }

    /// Its code, an error line with these words, and a hint.
    #[track_caller]
    pub fn fails(self, code: i32, words: &str) -> Self {
        assert_eq!(self.code, code, "{self:#?}");
        let said = self.err.lines().any(|l| l.starts_with("error: ") && l.contains(words));
        assert!(said, "no error with {words:?} in {self:#?}");
        self
    }

    #[track_caller]
    pub fn hints(self, words: &str) -> Self {
        let said = self.err.lines().any(|l| l.starts_with("hint: ") && l.contains(words));
        assert!(said, "no hint with {words:?} in {self:#?}");
        self
    }

    #[track_caller]
    pub fn says(&self, words: &str) -> &Self {
        assert!(self.out.contains(words), "no {words:?} in {self:#?}");
        self
    }

    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:#?}"))
    }
}

/// Flips one bit.
pub fn flip(path: &Path, byte: u64) {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut there = [0];
    file.read_exact_at(&mut there, byte).unwrap();
    file.write_all_at(&[there[0] ^ 4], byte).unwrap();
}

/// Puts other bytes in a file's place.
pub fn replace(path: &Path, bytes: &[u8]) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(0).unwrap();
    file.write_all_at(bytes, 0).unwrap();
}

/// A record's bytes with another text in place of one, and the right checksum.
pub fn forge(path: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{text}");
    let mut text = text.replacen(from, to, 1).into_bytes();
    text[13..21].copy_from_slice(b"00000000");
    let crc = format!("{:08x}", crc32fast::hash(&text));
    text[13..21].copy_from_slice(crc.as_bytes());
    replace(path, &text);
}
