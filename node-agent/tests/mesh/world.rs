//! Agents in this process, and what a state is.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tierkeep::{
    begin::Begin,
    checkpointer::{Checkpointer, SaveRequest},
    config::Config,
    host::{Host, Settings},
    manifest::Meta,
    peers::Network,
    save::Save,
    snapshot::strided::Address,
    state::{
        Memory, State, Tensor, TensorSpec,
        dtype::Dtype,
        value::{Lib, TensorRef, Value},
    },
};
use tierkeep_agent::{
    cluster::{self, Cluster, Key},
    mesh::{self, Mesh, Tls},
};
use tierkeep_proto::peer as wire;

use crate::wire::Wire;

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// One agent, in this process.
pub(crate) struct Agent {
    pub(crate) ram: TempDir,
    pub(crate) host: Arc<Host>,
    pub(crate) mesh: Arc<Mesh>,
    pub(crate) at: SocketAddr,
    pub(crate) cluster: Arc<Cluster>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Agent {
    pub(crate) fn start(name: &str, seeds: &[SocketAddr], tls: Option<Arc<Tls>>) -> Self {
        Self::start_behind(None, name, seeds, tls)
    }

    /// Others reach it through `wire`, where there is one.
    pub(crate) fn start_behind(
        wire: Option<Wire>,
        name: &str,
        seeds: &[SocketAddr],
        tls: Option<Arc<Tls>>,
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let ram = tempfile::Builder::new().prefix("tierkeep-test-").tempdir_in("/dev/shm").unwrap();
        let (host, trainers) = Host::open(Settings {
            socket: ram.path().join("agent.sock"),
            ram_root: ram.path().into(),
            ram_bytes_max: None,
            run_bytes_max: None,
            buckets: Vec::new(),
            tenancy: None,
            trainers_max: 64,
            idle: Duration::from_secs(3600),
        })
        .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let own = listener.local_addr().unwrap();
        // Gossip goes to the same number, and is not in the wire's way.
        let at = wire.map_or(own, |wire| wire.lead_to(own));
        let settings = cluster::Settings {
            name: name.into(),
            cluster: "test".into(),
            key: Key::new(b"key"),
            listen: at,
            advertise: at,
            seeds: seeds.iter().map(ToString::to_string).collect(),
            labels: BTreeMap::new(),
        };
        let cluster = Arc::new(
            runtime.block_on(Cluster::join(settings, std::collections::BTreeMap::new())).unwrap(),
        );
        let how = mesh::Settings { tls: tls.clone(), connections: 2, rate: None };
        let mesh = Arc::new(Mesh::new(cluster.clone(), &how, runtime.handle().clone()));
        host.meet(mesh.clone());
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener).unwrap()
        };
        runtime.spawn(mesh::serve(host.clone(), listener, tls, std::future::pending()));
        let serving = host.clone();
        std::thread::spawn(move || serving.serve(&trainers).unwrap());
        Self { ram, host, mesh, at, cluster, runtime: Some(runtime) }
    }

    pub(crate) fn sees(&self, names: &[&str]) {
        let begun = Instant::now();
        loop {
            let seen: Vec<_> = self.cluster.members().into_iter().map(|m| m.name).collect();
            if seen == names {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{seen:?}, not {names:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn open(&self, destination: &Path) -> Checkpointer {
        self.open_with(destination, |_| {})
    }

    pub(crate) fn open_with(
        &self,
        destination: &Path,
        wish: impl FnOnce(&mut Config),
    ) -> Checkpointer {
        let mut config = Config::new(destination).unwrap();
        config.ram_root = self.ram.path().into();
        config.agent = Some(self.ram.path().join("agent.sock"));
        config.attempt_wait = Duration::from_secs(8);
        // What comes back comes from other nodes.
        config.disk_every = 1 << 40;
        wish(&mut config);
        Checkpointer::open(config).unwrap()
    }

    /// A question about a run of this user.
    pub(crate) fn request(&self, destination: &Path, ask: wire::request::Ask) -> wire::Request {
        let site = wire::Site {
            destination: destination.to_str().unwrap().into(),
            uid: rustix::process::geteuid().as_raw(),
            gid: 0,
            groups: vec![],
        };
        wire::Request { from: "a test".into(), site: Some(site), ask: Some(ask) }
    }

    /// A question that this agent asks another.
    pub(crate) fn ask(&self, node: &str, destination: &Path) -> tierkeep::Result<wire::Reply> {
        let ask = wire::request::Ask::Look(wire::Look { tier: 1, ..wire::Look::default() });
        self.mesh.ask(node, self.request(destination, ask), Duration::from_secs(5))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.host.end();
        self.cluster.leave();
        self.runtime.take().into_iter().for_each(tokio::runtime::Runtime::shutdown_background);
    }
}

/// A state of 10 MB that `seed` determines.
pub(crate) fn bytes(seed: u8) -> Vec<u8> {
    (0..10_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 ^ seed).collect()
}

pub(crate) fn save(ckpt: &Checkpointer, step: u64, data: &[u8]) -> Save {
    let name: Arc<str> = "w".into();
    let leaf = TensorRef { name: name.clone(), lib: Lib::Numpy, param: false, whole: None };
    let spec = Arc::new(TensorSpec {
        name,
        dtype: Dtype::U8,
        shape: vec![data.len() as u64],
        part_of: None,
        held_by: Vec::new(),
    });
    let memory = Memory::Contiguous(Address::read_only(data.as_ptr()));
    let state = State {
        tree: Value::Dict(vec![(Value::Str("w".into()), Value::Tensor(leaf))]),
        tensors: vec![Tensor { spec, memory, late: false }],
    };
    let request = SaveRequest {
        step,
        state,
        meta: Meta::default(),
        bring: None,
        overlap: false,
        skip_if_busy: false,
        keep_alive: Box::new(()),
        interrupted: None,
    };
    // SAFETY: "now": the memory is read only during the call.
    unsafe { ckpt.save(request) }.unwrap()
}

/// The state comes back on `agent`, which had nothing of it.
pub(crate) fn comes_back(agent: &Agent, destination: &Path, step: u64, data: &[u8]) {
    resumes(&agent.open(destination), step, data);
}

/// It begins at `step`, bit for bit.
pub(crate) fn resumes(ckpt: &Checkpointer, step: u64, data: &[u8]) {
    let found = ckpt.begin(&Begin::default()).unwrap().expect("a checkpoint");
    assert_eq!(found.step().0, step);
    let mut into = vec![0; data.len()];
    let address = tierkeep::snapshot::copy::Memory::Bytes(Address::new(into.as_mut_ptr()));
    // SAFETY: the target is this vector, which has the tensor's bytes.
    unsafe { found.read(&[("w".to_owned(), address)].into(), None) }.unwrap();
    assert!(into == data, "restored bits differ");
}

pub(crate) fn run_in(dir: &TempDir) -> PathBuf {
    dir.path().join("run")
}
