//! Many whole agents in this process, each with a disk and a memory of its own, and a network between them
//! that counts what is asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, RwLock},
    time::{Duration, Instant},
};

use prost::Message as _;
use tierkeep::{
    Error, Result,
    checkpointer::Checkpointer,
    host::{Host, Settings},
    names::Id,
    peers::{Chunks, Landing, Network, Ticket},
    placement::Node,
    save::Level,
    tier::Source,
};
use tierkeep_proto::peer::{self as wire, reply::Answer, request::Ask};

use crate::common::{self, Model};

/// What the shards are made of: small, there may be thousands of them.
pub const SIZES: [usize; 2] = [3000, 13];

/// No message for so long: all that was to be said has been said.
const QUIET: Duration = Duration::from_millis(400);

/// Waits are long: a thousand agents share one machine.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// One agent, its disk and its memory.
struct Machine {
    dir: PathBuf,
    ram: PathBuf,
    host: Arc<Host>,
}

/// What was asked: how often, and how many bytes that and the answers had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub asked: u64,
    pub bytes: u64,
}

pub type Counts = BTreeMap<&'static str, Count>;

/// A question for news that brought none: they come for as long as there are agents, whatever happens.
const IDLE: &str = "News, none";

/// All of them.
pub struct World {
    machines: RwLock<BTreeMap<String, Arc<Machine>>>,
    nodes: RwLock<Arc<Vec<Node>>>,
    lost: Mutex<BTreeSet<String>>,
    counts: Mutex<(Counts, Instant)>,
    disk: tempfile::TempDir,
    ram: tempfile::TempDir,
}

impl World {
    pub fn new(names: &[String]) -> Arc<Self> {
        let world = Arc::new(Self {
            machines: RwLock::default(),
            nodes: RwLock::default(),
            lost: Mutex::default(),
            counts: Mutex::new((Counts::new(), Instant::now())),
            disk: tempfile::tempdir().unwrap(),
            ram: common::ram(),
        });
        names.iter().for_each(|name| world.begin(name));
        world
    }

    pub fn begin(self: &Arc<Self>, name: &str) {
        let (ram, dir) = (self.ram.path().join(name), self.disk.path().join(name));
        std::fs::create_dir(&ram).unwrap();
        std::fs::create_dir(&dir).unwrap();
        let settings = Settings { ram_bytes_max: Some(1 << 34), ..common::settings(&ram) };
        let (host, listener) = Host::open(settings).unwrap();
        host.meet(Arc::new(Sim { me: name.into(), world: self.clone() }));
        let serving = host.clone();
        std::thread::spawn(move || serving.serve(&listener).unwrap());
        let machine = Arc::new(Machine { dir, ram, host });
        self.machines.write().unwrap().insert(name.into(), machine);
        self.note_nodes();
    }

    /// The node is gone, with all that it had.
    pub fn lose(&self, name: &str) {
        let machine = self.machines.write().unwrap().remove(name).unwrap();
        self.lost.lock().unwrap().insert(name.into());
        self.note_nodes();
        machine.host.end();
    }

    /// All of them end, and let go of each other.
    pub fn end(&self) {
        let machines = std::mem::take(&mut *self.machines.write().unwrap());
        std::thread::scope(|scope| {
            for machine in machines.into_values() {
                scope.spawn(move || machine.host.end());
            }
        });
    }

    fn note_nodes(&self) {
        let names = self.machines.read().unwrap().keys().cloned().collect::<Vec<_>>();
        let node = |name: String| Node { domains: vec![name.clone()], name };
        *self.nodes.write().unwrap() = Arc::new(names.into_iter().map(node).collect());
    }

    fn machine(&self, name: &str) -> Result<Arc<Machine>> {
        self.machines.read().unwrap().get(name).cloned().ok_or_else(|| Error::Io {
            what: format!("reach {name}"),
            source: std::io::ErrorKind::HostUnreachable.into(),
        })
    }

    fn count(&self, kind: &'static str, bytes: usize) {
        let mut counts = self.counts.lock().unwrap();
        let count = counts.0.entry(kind).or_default();
        count.asked += 1;
        count.bytes += bytes as u64;
        if kind != IDLE {
            counts.1 = Instant::now();
        }
    }

    /// What is asked from `deed`'s beginning until nothing more is, and how long the deed took.
    pub fn counted(&self, deed: impl FnOnce()) -> (Counts, Duration) {
        self.settle();
        self.counts.lock().unwrap().0.clear();
        let begun = Instant::now();
        deed();
        let took = begun.elapsed();
        self.settle();
        let mut counts = std::mem::take(&mut self.counts.lock().unwrap().0);
        counts.remove(IDLE);
        (counts, took)
    }

    fn settle(&self) {
        let begun = Instant::now();
        while self.counts.lock().unwrap().1.elapsed() < QUIET {
            let counts = || self.counts.lock().unwrap().0.clone();
            assert!(begun.elapsed() < PATIENCE, "it is never quiet: {:?}", counts());
            std::thread::sleep(QUIET / 8);
        }
    }
}

/// What one node sees of the others.
struct Sim {
    me: String,
    world: Arc<World>,
}

impl std::fmt::Debug for Sim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the network as {} sees it", self.me)
    }
}

/// All nodes are on one machine: what is one path for all of them is one for each here.
fn elsewhere(from: &Machine, to: &Machine, site: &mut wire::Site) {
    let path = String::from_utf8(site.destination.clone()).unwrap();
    let (from, to) = (from.dir.to_str().unwrap(), to.dir.to_str().unwrap());
    site.destination = path.replace(from, to).into_bytes();
}

impl Network for Sim {
    fn me(&self) -> String {
        self.me.clone()
    }

    fn nodes(&self) -> Vec<Node> {
        let nodes = self.world.nodes.read().unwrap().clone();
        nodes.to_vec()
    }

    fn is_settled(&self) -> bool {
        true
    }

    fn lost(&self) -> Vec<String> {
        self.world.lost.lock().unwrap().iter().cloned().collect()
    }

    fn leaving(&self) -> BTreeSet<String> {
        BTreeSet::new()
    }

    fn ask(&self, node: &str, mut request: wire::Request, _: Duration) -> Result<wire::Reply> {
        let (own, machine) = (self.world.machine(&self.me)?, self.world.machine(node)?);
        let (kind, bytes) = (kind(&request), request.encoded_len());
        elsewhere(&own, &machine, request.site.as_mut().unwrap());
        let reply = machine.host.answer(request);
        let heard = match &reply.answer {
            Some(Answer::Heard(heard)) => heard.whole || !heard.words.is_empty(),
            _ => kind != "News",
        };
        self.world.count(if heard { kind } else { IDLE }, bytes + reply.encoded_len());
        Ok(reply)
    }

    fn push(
        &self,
        node: &str,
        ticket: &Ticket,
        from: &dyn Source,
        chunks: &Chunks<'_>,
    ) -> Result<()> {
        let incoming = self.world.machine(node)?.host.incoming(ticket)?;
        let len = |chunk: usize| from.len() - chunk as u64 * chunks.chunk_bytes();
        let read = |chunk: usize| {
            let mut bytes = vec![0; usize::try_from(len(chunk).min(chunks.chunk_bytes())).unwrap()];
            from.read_at(chunk as u64 * chunks.chunk_bytes(), &mut bytes).map(|()| bytes)
        };
        carry(chunks, &*incoming, read)
    }

    fn pull(
        &self,
        node: &str,
        ticket: &Ticket,
        into: &dyn Landing,
        chunks: &Chunks<'_>,
    ) -> Result<()> {
        let outgoing = self.world.machine(node)?.host.outgoing(ticket)?;
        let read = |chunk: usize| {
            let (at, len) = outgoing.chunk(chunk as u64)?;
            let mut bytes = vec![0; usize::try_from(len).unwrap()];
            outgoing.read_at(at, &mut bytes).map(|()| bytes)
        };
        carry(chunks, into, read)
    }
}

/// One chunk after the other.
pub fn carry(
    chunks: &Chunks<'_>,
    into: &dyn Landing,
    read: impl Fn(usize) -> Result<Vec<u8>>,
) -> Result<()> {
    while let Some(chunk) = chunks.next() {
        common::arrive(into.chunk(chunk)?, &read(chunk)?, chunk, chunks)?;
    }
    Ok(())
}

fn kind(request: &wire::Request) -> &'static str {
    match request.ask.as_ref().unwrap() {
        Ask::Look(_) => "Look",
        Ask::Offer(_) => "Offer",
        Ask::Finish(_) => "Finish",
        Ask::Open(_) => "Open",
        Ask::Records(_) => "Records",
        Ask::Confirm(_) => "Confirm",
        Ask::Release(_) => "Release",
        Ask::Lead(_) => "Lead",
        Ask::WhoLeads(_) => "WhoLeads",
        Ask::Join(_) => "Join",
        Ask::Roster(_) => "Roster",
        Ask::Decide(decide) => decided(decide),
        Ask::News(_) => "News",
        Ask::Holders(_) => "Holders",
    }
}

/// What is decided, by the first part of its name.
fn decided(decide: &wire::Decide) -> &'static str {
    match decide.name.split('-').next().unwrap() {
        "save" => "Decide save",
        "inram" => "Decide inram",
        "held" => "Decide held",
        "ondisk" => "Decide ondisk",
        "bye" => "Decide bye",
        _ => "Decide, other",
    }
}

/// A job: rank by rank, on `nodes` in turn.
pub struct Job {
    ckpts: Vec<Checkpointer>,
}

impl Job {
    /// Starts all ranks, as a launcher does.
    pub fn start(world: &World, nodes: &[String], ranks: u32) -> Self {
        let start = Id::random().unwrap();
        let open = |rank: u32| {
            let machine = world.machine(&nodes[rank as usize % nodes.len()]).unwrap();
            let mut config = common::config(&machine.dir.join("run"), &machine.ram, rank, ranks);
            config.agent = Some(machine.ram.join("agent.sock"));
            config.replicas = Some(1);
            config.attempt_id = Some(start);
            (config.attempt_wait, config.peer_wait) = (PATIENCE, PATIENCE);
            (config.disk_wait, config.slot_wait) = (PATIENCE, PATIENCE);
            Checkpointer::open(config).unwrap()
        };
        Self { ckpts: (0..ranks).map(open).collect() }
    }

    /// Every rank at once, as they are: each on a thread.
    fn each<T: Send>(&self, deed: impl Fn(&Checkpointer) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let deed = &deed;
            let all: Vec<_> =
                self.ckpts.iter().map(|ckpt| scope.spawn(move || deed(ckpt))).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        })
    }

    /// Where all ranks resume, every bit checked.
    pub fn resume(&self) -> u64 {
        let steps = self.each(|ckpt| common::resume(ckpt, &SIZES).unwrap());
        assert!(steps.iter().all(|step| *step == steps[0]), "{steps:?}");
        steps[0]
    }

    /// One checkpoint of all ranks, waited for.
    pub fn save(&self, step: u64, levels: &[Level]) {
        self.each(|ckpt| {
            let model = Model::at(ckpt.config().rank, &SIZES, step);
            let save = model.save(ckpt, step).unwrap();
            for level in levels {
                let reached = save.poll(*level, false, PATIENCE).unwrap();
                assert!(reached, "{level:?} of step {step}");
            }
        });
    }
}
