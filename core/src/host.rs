//! Ranks owned for trainers in other processes: what an agent is made of.
//!
//! ```text
//! trainer -socket-> connection -> seat (one rank: its keeper, its slots that are being filled)
//! ```
//!
//! It decides nothing about checkpoints: each rank has a `keeper`, as in a trainer of its own. It owns
//! who may have which rank, and for how long.
//!
//! # Invariants
//!
//! - A rank has one keeper. A new trainer of it gets the rank when the one before is known to be dead,
//!   closed it, or was the same process.
//! - A keeper outlives its trainer: what is in RAM goes on to disk.
//! - No memory that a trainer can cut short is ever loaded from.
//! - A slot that a living trainer may be copying into is given to nobody else.

mod across;
mod calls;
mod chair;
mod connection;
mod drain;
mod hands;
mod heal;
mod lead;
mod left;
mod others;
mod peer;
mod peers;
mod prefetch;
mod rounds;
mod seat;
mod shelves;
mod tell;
mod tenants;
mod users;
mod view;

use std::{
    collections::{HashMap, HashSet},
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

pub use self::{
    across::{Held, RunAcross},
    drain::Drained,
    peers::Outgoing,
    prefetch::{Prefetched, RankPrefetched},
    tenants::{Identify, NAMESPACE, Tenancy, Tenant},
    users::UID,
    view::{PeersView, RankView},
};
use self::{
    chair::Chair,
    connection::Connection,
    peer::{Peer, Who},
    peers::Transfers,
    seat::Seat,
    users::Users,
    view::Tally,
};
pub use crate::cascade::asked::ToBucket;
use crate::{
    clock::{Clock, Deadline, SystemClock},
    config::Config,
    error::{Doing, Error, Result},
    keeper::{Ending, Ground, Keeper},
    names::Id,
    observe::locked,
    ownership::Ownership,
    peers::{Network, Peers, Site, commons::Commons, hold::Shelf},
    signal::Signal,
    snapshot::budget::Budget,
};

/// How an agent is set up.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The socket that trainers find.
    pub socket: PathBuf,
    /// The directory of the ram tier, on tmpfs. Where it has [`UID`] in it and root runs the agent,
    /// every user is served, each in a directory of its own.
    pub ram_root: PathBuf,
    /// Limit of all files below it together; `None`: 80 % of the smaller of the tmpfs and what the
    /// memory control group allows.
    pub ram_bytes_max: Option<u64>,
    /// Limit of one run's slots on this node, all ranks together.
    pub run_bytes_max: Option<u64>,
    /// Places in buckets, as in `s3://bucket/team/`, where users other than the agent's own may have their
    /// checkpoints carried with the agent's credentials. For tenants each has [`NAMESPACE`] in it.
    pub buckets: Vec<String>,
    /// How trainers are told apart, where it is not by the kernel's word for their user.
    pub tenancy: Option<Tenancy>,
    /// Trainers that are connected at once.
    pub trainers_max: usize,
    /// A rank whose trainer has been gone for this long goes to disk, whatever the schedule, and then
    /// gives its memory back.
    pub idle: Duration,
}

/// What is held for a rank of another node, and of whose run it is.
type Stand = (Site, Arc<Shelf>);

/// The ranks that an agent owns.
#[derive(Debug)]
pub struct Host {
    settings: Settings,
    users: Users,
    clock: SystemClock,
    chairs: Mutex<HashMap<(PathBuf, u32), Arc<Chair>>>,
    connected: AtomicUsize,
    connections: AtomicU64,
    ending: AtomicBool,
    changed: Signal,
    /// What other agents send here, and read from here.
    transfers: Mutex<Transfers>,
    /// What is held for ranks of other nodes.
    shelves: Mutex<HashMap<(PathBuf, u32), Stand>>,
    /// Ranks of nodes that are gone, of which something is held here.
    healing: Mutex<HashMap<(PathBuf, u32), heal::Healing>>,
    /// Ranks that are not here yet and whose shards are being fetched.
    prefetching: Mutex<HashSet<(PathBuf, u32)>>,
    /// In the hands of whoever heals them.
    healer: Arc<()>,
    /// Why this node is to go away, where it is.
    leaving: Mutex<Option<String>>,
    commons: Arc<Commons>,
    /// What went to and from other agents.
    tally: Arc<Tally>,
    /// The other agents, where there are any.
    network: OnceLock<Arc<dyn Network>>,
    /// One agent a socket, one a ram tier.
    _locks: [Ownership; 2],
}

/// Trainers that live come back within moments. What nobody has come back for by then is owned again.
const LEFT_AFTER: Duration = Duration::from_secs(2);

/// How long an agent that ends waits for its ranks.
const END_WAIT: Duration = Duration::from_secs(3);

/// How often it is looked for trainers that died unseen, and for ranks that are idle.
const ROUND: Duration = Duration::from_millis(500);

impl Host {
    /// Takes the socket's path and the ram tier; nobody is served yet.
    ///
    /// # Errors
    /// Another agent has either, or a directory cannot be used.
    pub fn open(mut settings: Settings) -> Result<(Arc<Self>, UnixListener)> {
        crate::sys::keep_little_memory();
        let clock = SystemClock;
        let users = Users::new(&settings);
        if settings.ram_bytes_max.is_none() {
            settings.ram_bytes_max = Some(Budget::whole_share(&users.own_root())?);
        }
        users.whole_budget(&settings)?.check_ground()?; // Its directory is made, too.
        let lock =
            |path: &Path, what: &str| Ownership::take(path, what, Duration::from_secs(5), &clock);
        let ram_root = users.own_root();
        let ram = format!("the ram tier at {}", ram_root.display());
        let beside = settings.socket.with_extension("lock");
        let locks = [
            lock(&beside, &format!("the socket {}", settings.socket.display()))?,
            lock(&ram_root.join(".agent.lock"), &ram)?,
        ];
        // What is there is of an agent that is dead: we have its lock.
        crate::tier::publish::remove(&settings.socket)?;
        let listener = UnixListener::bind(&settings.socket);
        let listener = listener.at("listen at", &settings.socket)?;
        // Who connects is asked who it is.
        let is_open = users.are_many() || settings.tenancy.is_some();
        let mode = std::fs::Permissions::from_mode(if is_open { 0o666 } else { 0o600 });
        std::fs::set_permissions(&settings.socket, mode).at("set the mode of", &settings.socket)?;
        let host = Self {
            settings,
            users,
            clock,
            chairs: Mutex::default(),
            connected: AtomicUsize::new(0),
            connections: AtomicU64::new(0),
            ending: AtomicBool::new(false),
            changed: Signal::default(),
            transfers: Mutex::default(),
            shelves: Mutex::default(),
            healing: Mutex::default(),
            prefetching: Mutex::default(),
            healer: Arc::default(),
            leaving: Mutex::default(),
            commons: Arc::default(),
            tally: Arc::default(),
            network: OnceLock::new(),
            _locks: locks,
        };
        Ok((Arc::new(host), listener))
    }

    /// From here on there are other agents. The first one told stays.
    pub fn meet(&self, network: Arc<dyn Network>) {
        let _ = self.network.set(network);
    }

    /// Its settings.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Serves trainers until [`end`](Self::end).
    ///
    /// # Errors
    /// The socket failed.
    pub fn serve(self: &Arc<Self>, listener: &UnixListener) -> Result<()> {
        let socket = &self.settings.socket;
        listener.set_nonblocking(true).at("set up", socket)?;
        let host = self.clone();
        let rounds = std::thread::Builder::new().name("tierkeep-rounds".into());
        rounds.spawn(move || host.go_round()).doing(|| "start a thread".into())?;
        while !self.is_ending() {
            if !peer::readable(listener, ROUND).at("wait at", socket)? {
                continue;
            }
            match listener.accept() {
                Ok((stream, _)) => self.welcome(stream),
                // It went away between the two calls.
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => {
                    // Out of descriptors, say: those that are here go on.
                    tracing::error!("a trainer could not be let in: {e}");
                    self.clock.pause(ROUND);
                }
            }
        }
        Ok(())
    }

    fn welcome(self: &Arc<Self>, stream: std::os::unix::net::UnixStream) {
        let before = self.connected.fetch_add(1, Ordering::AcqRel);
        let id = self.connections.fetch_add(1, Ordering::AcqRel) + 1;
        let host = self.clone();
        let full = before >= self.settings.trainers_max;
        let serve = move || {
            match Connection::new(host.clone(), id, stream) {
                Ok(connection) if full => connection.refuse(&Error::Io {
                    what: format!("serve more than {before} trainers (trainers_max)"),
                    source: std::io::ErrorKind::QuotaExceeded.into(),
                }),
                Ok(connection) => connection.run(),
                Err(e) => tracing::warn!("a trainer was not let in: {}", e.chain()),
            }
            host.connected.fetch_sub(1, Ordering::AcqRel);
        };
        let spawned = std::thread::Builder::new().name("tierkeep-trainer".into()).spawn(serve);
        if let Err(e) = spawned {
            self.connected.fetch_sub(1, Ordering::AcqRel);
            tracing::error!("no thread for a trainer: {e}");
        }
    }

    fn chairs(&self) -> Vec<((PathBuf, u32), Arc<Chair>)> {
        locked(&self.chairs).iter().map(|(place, chair)| (place.clone(), chair.clone())).collect()
    }

    /// The chair of a rank.
    fn chair(&self, config: &Config) -> Arc<Chair> {
        let real = crate::config::real(&config.destination);
        locked(&self.chairs).entry((real, config.rank)).or_default().clone()
    }

    /// A keeper for a rank that nobody here owns.
    fn keeper(&self, config: Config, who: &Who, start: Id, nonce: Id) -> Result<Keeper> {
        if let Some(bucket) = &config.bucket {
            self.users.check_bucket(who.uid, bucket, &self.settings.buckets)?;
        }
        let budget = self.users.budget(who.uid, &self.settings, &config.ram_dir())?;
        let peers = self.network.get().map(|network| {
            let Who { uid, gid, groups } = who.clone();
            let site = Site { destination: config.destination.clone(), uid, gid, groups };
            Peers { network: network.clone(), site, commons: self.commons.clone() }
        });
        let ground = Ground::Agent { budget, start, nonce, peers };
        // What was held here for the rank is its own.
        let place = (crate::config::real(&config.destination), config.rank);
        self.wait_for_prefetch(&place, config.lock_wait);
        self.give_up_shelf(&place, &config.ram_dir());
        // Whoever had the rank here has left its chair.
        Keeper::open(config, ground, &|tier| tier, &|_| Ok(()))
    }

    /// Waits until the trainer of `seat` is dead, for as long as the newcomer is ready to wait.
    fn wait_for_death(&self, seat: &Seat, newcomer: &Peer, wait: Duration) -> Result<()> {
        let deadline = Deadline::after(&self.clock, wait);
        loop {
            seat.look_for_death(&self.clock);
            let Some(pid) = seat.other_trainer(newcomer) else { return Ok(()) };
            if self.is_ending() || deadline.left(&self.clock).is_none() {
                let who = match pid {
                    0 => "a live process of another container".to_owned(),
                    pid => format!("live process {pid}"),
                };
                return Err(Error::Fenced {
                    why: format!(
                        "{} is owned by {who}: stop that process, or give this one another rank or \
                         destination",
                        seat.name()
                    ),
                });
            }
            self.clock.pause(Duration::from_millis(20));
        }
    }

    /// Every rank that is not being opened or closed at this moment.
    fn seats(&self) -> Vec<Arc<Seat>> {
        let seats = self.chairs().into_iter().filter_map(|(_, chair)| {
            let taken = chair.try_lock()?;
            taken.clone()
        });
        seats.collect()
    }

    /// What it owns, for people.
    #[must_use]
    pub fn ranks(&self) -> Vec<RankView> {
        let nodes = self.network.get().map(|network| network.nodes()).unwrap_or_default();
        let alive = nodes.into_iter().map(|node| node.name).collect();
        let seats = self.seats().into_iter();
        let mut views: Vec<RankView> = seats.map(|seat| seat.view(&self.clock, &alive)).collect();
        views.sort_by(|a, b| (&a.destination, a.rank).cmp(&(&b.destination, b.rank)));
        views
    }

    /// Bytes of all files of the ram tier, and the limit in force.
    ///
    /// # Errors
    /// The file system did not answer.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let budget = self.users.whole_budget(&self.settings)?;
        let used = budget.used()?;
        Ok((used, budget.limit(used)?.0))
    }

    /// No more trainers are let in, and those that are connected are let go. What is in RAM stays
    /// there for the next agent; a step that is on its way to disk begins anew.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Release);
        self.changed.notify();
        let (done, ended) = std::sync::mpsc::channel();
        for seat in self.seats() {
            let done = done.clone();
            let end = move || {
                seat.end(Ending::HandOver);
                let _ = done.send(()); // Nobody waits that long.
            };
            let thread = std::thread::Builder::new().name("tierkeep-ending".into());
            if let Err(e) = thread.spawn(end) {
                tracing::error!("no thread to end a rank: {e}");
            }
        }
        drop(done);
        // One that hangs keeps no other: what it was doing is done anew.
        let deadline = Deadline::after(&self.clock, END_WAIT);
        while let Some(left) = deadline.left(&self.clock) {
            if ended.recv_timeout(left).is_err() {
                return; // All have, or the time is up.
            }
        }
    }

    fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }
}
