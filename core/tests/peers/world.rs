//! Several agents in this process, with a network between them that can be cut, and that can lie.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tierkeep::{
    Error, Result,
    bucket::Bucket,
    checkpointer::Checkpointer,
    host::{Host, Settings},
    peers::{Chunks, Landing, Network, Ticket},
    placement::Node,
    save::Level,
    tier::Source,
};
use tierkeep_proto::peer::{self as wire, request::Ask};

use crate::common::{self, Model, SIZES, settings, wait};

/// One agent, its disk and its memory.
pub(crate) struct Machine {
    pub(crate) disk: Arc<tempfile::TempDir>,
    pub(crate) ram: Arc<tempfile::TempDir>,
    pub(crate) host: Arc<Host>,
}

impl Machine {
    pub(crate) fn destination(&self) -> PathBuf {
        self.disk.path().join("run")
    }
}

/// All of them.
#[derive(Default)]
pub(crate) struct World {
    pub(crate) machines: Mutex<BTreeMap<String, Arc<Machine>>>,
    pub(crate) lost: Mutex<BTreeSet<String>>,
    /// Nodes that are to go away.
    pub(crate) leaving: Mutex<BTreeSet<String>>,
    /// Pairs that do not hear each other.
    pub(crate) cut: Mutex<BTreeSet<(String, String)>>,
    /// So many of the next chunks have one bit flipped on their way.
    pub(crate) flips: AtomicUsize,
    /// Nobody confirms what it gave a receipt of.
    pub(crate) forgetful: AtomicBool,
    /// Chunks that went over the network.
    pub(crate) chunks: AtomicUsize,
    /// Those of them that somebody asked for.
    pub(crate) fetched: AtomicUsize,
    /// Once so many more chunks have got through, this node is lost.
    pub(crate) aim: Mutex<Option<(usize, String)>>,
    /// This node answers so many more questions, and then it is lost.
    pub(crate) answers: Mutex<Option<(String, usize)>>,
    /// These tell what they have and give nothing of it.
    pub(crate) only_names: Mutex<BTreeSet<String>>,
    /// The bucket that all of them reach, and how fast each rank.
    pub(crate) bucket: Mutex<Option<String>>,
    pub(crate) bucket_rate: Mutex<Option<u64>>,
    /// What of nobody trains goes to disk, and its memory back, after so long; an hour where it is not said.
    pub(crate) idle: Mutex<Option<Duration>>,
}

impl World {
    pub(crate) fn new(names: &[&str]) -> Arc<Self> {
        let world = Arc::new(Self::default());
        names.iter().for_each(|name| world.begin(name));
        world
    }

    pub(crate) fn begin(self: &Arc<Self>, name: &str) {
        self.begin_with(name, None);
    }

    /// One with a budget.
    pub(crate) fn begin_with(self: &Arc<Self>, name: &str, ram_bytes_max: Option<u64>) {
        let ram = tempfile::Builder::new().prefix("tierkeep-test-").tempdir_in("/dev/shm").unwrap();
        let disk = Arc::new(tempfile::tempdir().unwrap());
        self.begin_at(name, disk, Arc::new(ram), ram_bytes_max);
    }

    fn begin_at(
        self: &Arc<Self>,
        name: &str,
        disk: Arc<tempfile::TempDir>,
        ram: Arc<tempfile::TempDir>,
        ram_bytes_max: Option<u64>,
    ) {
        let idle = self.idle.lock().unwrap().unwrap_or(Duration::from_secs(3600));
        let settings = Settings { ram_bytes_max, idle, ..settings(ram.path()) };
        let (host, listener) = Host::open(settings).unwrap();
        host.meet(Arc::new(Sim { me: name.into(), world: Arc::downgrade(self) }));
        let serving = host.clone();
        std::thread::spawn(move || serving.serve(&listener).unwrap());
        let machine = Machine { disk, ram, host };
        self.lost.lock().unwrap().remove(name);
        self.machines.lock().unwrap().insert(name.into(), Arc::new(machine));
    }

    /// The node is gone, with all that it had.
    pub(crate) fn lose(&self, name: &str) {
        let machine = self.machines.lock().unwrap().remove(name).unwrap();
        self.lost.lock().unwrap().insert(name.into());
        machine.host.end();
    }

    /// All hear that the node is to go away.
    pub(crate) fn leave(&self, name: &str) {
        self.leaving.lock().unwrap().insert(name.into());
        self.machine(name).host.leave(Some("it is cordoned"));
    }

    /// It stays after all.
    pub(crate) fn stay(&self, name: &str) {
        self.leaving.lock().unwrap().remove(name);
        self.machine(name).host.leave(None);
    }

    /// The same at this moment, by whoever of its own threads it may be.
    fn lose_now(self: &Arc<Self>, name: String) {
        let (world, gone) = (self.clone(), name.clone());
        std::thread::spawn(move || world.lose(&gone));
        while !self.lost.lock().unwrap().contains(&name) {
            std::thread::yield_now();
        }
    }

    /// Loses the node that is aimed at, if so many chunks have got through by now.
    fn fire(self: &Arc<Self>) {
        let mut aim = self.aim.lock().unwrap();
        match aim.take() {
            Some((0, name)) => self.lose_now(name),
            Some((more, name)) => *aim = Some((more - 1, name)),
            None => {}
        }
    }

    /// Loses the node that is asked, if it was to answer no more.
    fn asked(self: &Arc<Self>, node: &str) {
        let mut answers = self.answers.lock().unwrap();
        match answers.take_if(|(name, _)| name == node) {
            Some((name, 0)) => self.lose_now(name),
            Some((name, more)) => *answers = Some((name, more - 1)),
            None => {}
        }
    }

    /// The agent ends, and another one begins where it was; `between` happens in between.
    pub(crate) fn restart(self: &Arc<Self>, name: &str, between: impl FnOnce(&Machine)) {
        let machine = self.machines.lock().unwrap().remove(name).unwrap();
        machine.host.end();
        between(&machine);
        let (disk, ram) = (machine.disk.clone(), machine.ram.clone());
        drop(machine); // The host has its locks until the last thread of it is gone.
        self.begin_at(name, disk, ram, None);
    }

    pub(crate) fn machine(&self, name: &str) -> Arc<Machine> {
        self.machines.lock().unwrap()[name].clone()
    }

    fn reach(&self, from: &str, to: &str) -> Result<Arc<Machine>> {
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        let cut = self.cut.lock().unwrap();
        let machines = self.machines.lock().unwrap();
        let machine = machines.get(to).filter(|_| machines.contains_key(from)).cloned();
        let cut = cut.contains(&pair(from, to)) || cut.contains(&pair(to, from));
        machine.filter(|_| !cut).ok_or_else(|| out_of_reach(to))
    }

    pub(crate) fn open(&self, node: &str, replicas: u32) -> Checkpointer {
        Checkpointer::open(self.config(node, 0, 1, replicas)).unwrap()
    }

    pub(crate) fn config(
        &self,
        node: &str,
        rank: u32,
        world: u32,
        replicas: u32,
    ) -> tierkeep::config::Config {
        let machine = self.machine(node);
        let ram = machine.ram.path();
        let mut config = common::config(&machine.destination(), ram, rank, world);
        config.agent = Some(ram.join("agent.sock"));
        config.replicas = Some(replicas);
        config.peer_wait = Duration::from_secs(5);
        config.bucket = self.bucket.lock().unwrap().as_ref().map(|url| Bucket {
            bytes_per_second_max: *self.bucket_rate.lock().unwrap(),
            grace: Duration::ZERO,
            ..Bucket::new(url, config.disk_every).unwrap()
        });
        config
    }

    /// Nodes that hold a shard of this step in RAM.
    pub(crate) fn holders(&self, step: u64) -> Vec<String> {
        let machines = self.machines.lock().unwrap();
        let holds = |machine: &Machine| {
            let runs = std::fs::read_dir(machine.ram.path()).unwrap().flatten();
            runs.into_iter().any(|run| has_manifest(&run.path().join(format!("{step:020}"))))
        };
        machines.iter().filter(|(_, m)| holds(m)).map(|(name, _)| name.clone()).collect()
    }
}

fn out_of_reach(node: &str) -> Error {
    let source = std::io::ErrorKind::HostUnreachable.into();
    Error::Io { what: format!("reach {node}"), source }
}

pub(crate) fn has_manifest(dir: &Path) -> bool {
    let attempts = std::fs::read_dir(dir).into_iter().flatten().flatten();
    attempts.into_iter().any(|attempt| {
        let mut files = std::fs::read_dir(attempt.path()).into_iter().flatten().flatten();
        files.any(|file| file.path().extension().is_some_and(|e| e == "json"))
    })
}

/// What it has in memory goes with it.
impl Drop for World {
    fn drop(&mut self) {
        let machines = self.machines.get_mut().unwrap_or_else(PoisonError::into_inner);
        machines.values().for_each(|machine| machine.host.end());
    }
}

/// What one node sees of the others.
pub(crate) struct Sim {
    me: String,
    /// It owns the agents that own this.
    world: Weak<World>,
}

impl Sim {
    fn world(&self) -> Result<Arc<World>> {
        self.world.upgrade().ok_or_else(|| out_of_reach("anybody"))
    }
}

impl std::fmt::Debug for Sim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the network as {} sees it", self.me)
    }
}

/// All nodes are on one machine: what is one path for all of them is one for each here.
pub(crate) fn elsewhere(from: &Machine, to: &Machine, site: &mut wire::Site) {
    let path = String::from_utf8(site.destination.clone()).unwrap();
    let (from, to) = (from.disk.path().to_str().unwrap(), to.disk.path().to_str().unwrap());
    site.destination = path.replace(from, to).into_bytes();
}

impl Network for Sim {
    fn me(&self) -> String {
        self.me.clone()
    }

    fn nodes(&self) -> Vec<Node> {
        let Ok(world) = self.world() else { return Vec::new() };
        let names = world.machines.lock().unwrap().keys().cloned().collect::<Vec<_>>();
        let seen = names.into_iter().filter(|n| world.reach(&self.me, n).is_ok());
        seen.map(|name| Node { domains: vec![name.clone()], name }).collect()
    }

    fn is_settled(&self) -> bool {
        true
    }

    fn lost(&self) -> Vec<String> {
        let world = self.world();
        world.map_or_else(|_| Vec::new(), |w| w.lost.lock().unwrap().iter().cloned().collect())
    }

    fn leaving(&self) -> BTreeSet<String> {
        self.world().map(|world| world.leaving.lock().unwrap().clone()).unwrap_or_default()
    }

    fn ask(&self, node: &str, mut request: wire::Request, _: Duration) -> Result<wire::Reply> {
        let world = self.world()?;
        world.asked(node);
        let machine = world.reach(&self.me, node)?;
        if world.forgetful.load(Ordering::Relaxed) && matches!(request.ask, Some(Ask::Confirm(_))) {
            return Err(Error::NotFound { what: "a copy".into() });
        }
        let names = matches!(&request.ask, Some(Ask::Look(look)) if look.names_only);
        if !names && world.only_names.lock().unwrap().contains(node) {
            return Err(out_of_reach(node));
        }
        let own = world.reach(&self.me, &self.me)?;
        elsewhere(&own, &machine, request.site.as_mut().unwrap());
        let host = machine.host.clone();
        // It may answer when the test is over: whoever waits for it keeps no directories until then.
        drop((world, own, machine));
        Ok(std::thread::spawn(move || host.answer(request)).join().unwrap())
    }

    fn push(
        &self,
        node: &str,
        ticket: &Ticket,
        from: &dyn Source,
        chunks: &Chunks<'_>,
    ) -> Result<()> {
        let world = self.world()?;
        loop {
            world.fire();
            let Some(chunk) = chunks.next() else { return Ok(()) };
            let machine = world.reach(&self.me, node).inspect_err(|_| chunks.again(chunk))?;
            let at = chunk as u64 * chunks.chunk_bytes();
            let len = (from.len() - at).min(chunks.chunk_bytes());
            let mut bytes = vec![0; usize::try_from(len).unwrap()];
            from.read_at(at, &mut bytes)?;
            world.on_its_way(&mut bytes);
            let incoming = machine.host.incoming(ticket)?;
            common::arrive(incoming.chunk(chunk)?, &bytes, chunk, chunks)?;
        }
    }

    fn pull(
        &self,
        node: &str,
        ticket: &Ticket,
        into: &dyn Landing,
        chunks: &Chunks<'_>,
    ) -> Result<()> {
        let world = self.world()?;
        loop {
            world.fire();
            let Some(chunk) = chunks.next() else { return Ok(()) };
            let machine = world.reach(&self.me, node).inspect_err(|_| chunks.again(chunk))?;
            let outgoing = machine.host.outgoing(ticket)?;
            let (at, len) = outgoing.chunk(chunk as u64)?;
            let mut bytes = vec![0; usize::try_from(len).unwrap()];
            outgoing.read_at(at, &mut bytes)?;
            world.fetched.fetch_add(1, Ordering::Relaxed);
            world.on_its_way(&mut bytes);
            common::arrive(into.chunk(chunk)?, &bytes, chunk, chunks)?;
        }
    }
}

impl World {
    fn on_its_way(&self, bytes: &mut [u8]) {
        self.chunks.fetch_add(1, Ordering::Relaxed);
        let flips = self.flips.load(Ordering::Relaxed);
        if flips > 0 {
            self.flips.store(flips - 1, Ordering::Relaxed);
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        }
    }
}

/// A job: so many ranks, spread over these nodes in turn.
pub(crate) struct Job {
    pub(crate) ckpts: Vec<(String, Checkpointer)>,
}

impl Job {
    /// Starts all ranks, as a launcher does.
    pub(crate) fn start(world: &World, nodes: &[&str], ranks: u32, replicas: u32) -> Self {
        let start = tierkeep::names::Id::random().unwrap();
        let open = |rank: u32| {
            let node = nodes[rank as usize % nodes.len()];
            let mut config = world.config(node, rank, ranks, replicas);
            config.attempt_id = Some(start);
            (node.to_owned(), Checkpointer::open(config).unwrap())
        };
        Self { ckpts: (0..ranks).map(open).collect() }
    }

    /// Every rank at once, as they are: each on a thread.
    pub(crate) fn each<T: Send>(&self, deed: impl Fn(&Checkpointer) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let deed = &deed;
            let all: Vec<_> =
                self.ckpts.iter().map(|(_, ckpt)| scope.spawn(move || deed(ckpt))).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        })
    }

    /// Where all ranks resume, every bit checked.
    pub(crate) fn resume(&self) -> u64 {
        let steps = self.each(|ckpt| common::resume(ckpt, &SIZES).unwrap());
        assert!(steps.iter().all(|step| *step == steps[0]), "{steps:?}");
        steps[0]
    }

    pub(crate) fn train(&self, steps: impl IntoIterator<Item = u64>, level: Level) {
        for step in steps {
            self.each(|ckpt| {
                let model = Model::at(ckpt.config().rank, &SIZES, step);
                wait(&model.save(ckpt, step).unwrap(), level);
            });
        }
    }
}
