//! The owner of one rank of a run: its lock, its tiers and slots, its attempt, and what carries its
//! shards on.
//!
//! open -> begin (the restore decision, recorded) -> lease a slot, publish it -> shut
//!
//! It sees slots and manifests, never a tensor: all of this can live in another process than the
//! training. It does not own the state, the copy of it, nor its checksums (`checkpointer`).
//!
//! # Invariants
//!
//! - Nothing is published before the attempt is recorded and the rank claimed.
//! - A slot that was leased is busy until it is published or given back.
//! - In a fork's child every call is refused and nothing is touched.

mod again;
mod ending;
mod local;
mod slots;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use tierkeep_proto::peer::{self as wire, request::Ask};

pub(crate) use self::{ending::Ending, local::Local};
use crate::{
    agree::{Agreements, home::Home},
    at_once::at_once,
    attempt::AttemptRecord,
    begin::{Begin, Elsewhere, Stands, begin},
    bucket::Bucket,
    cascade::{Cascade, Parts, Shard, strangers::clear_strangers},
    chunk::CHUNK_BYTES,
    clock::{SharedClock, SystemClock},
    config::Config,
    error::{Doing, Error, Result},
    names::{CheckpointKey, Id, Rank},
    observe::{Observer, locked},
    ownership::{FileId, Ownership, rank_lock},
    peers::{ASKED_AT_ONCE, Peers, commons::Led},
    place::{Desk, Place},
    restore::{asks::Over, read::Restorable, survey::ShardCopy},
    save::Save,
    signal::Signal,
    snapshot::{arena::Arena, budget::Budget, slot::SlotPayload},
    tier::{Tier, TierKind, disk::DiskTier, memory::MemoryTier, wrap::Retried},
};

/// Why an older owner in this process does nothing more.
pub(crate) const TAKEN_OVER: &str = "a newer Checkpointer of this process has taken over this run";

/// Wishes for ready slots that may wait at once.
const PREPARES_MAX: usize = 8;

/// An attempt that goes on.
struct Running {
    record: AttemptRecord,
    cascade: Arc<Cascade>,
    threads: Vec<Behind>,
}

/// A thread that carries shards.
struct Behind {
    thread: JoinHandle<()>,
    /// It has nothing more to do.
    over: Arc<AtomicBool>,
}

impl Behind {
    fn start(
        name: &str,
        cascade: &Arc<Cascade>,
        place: &Place,
        work: fn(&Cascade),
    ) -> Result<Self> {
        let (runner, signal) = (cascade.clone(), place.signal.clone());
        let over = Arc::new(AtomicBool::new(false));
        let told = over.clone();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            work(&runner);
            told.store(true, Ordering::Release);
            signal.notify();
        });
        let thread = thread
            .map_err(|source| Error::Io { what: format!("start the thread {name}"), source })?;
        Ok(Self { thread, over })
    }
}

/// What an attempt begins with on this node.
struct FoundHere {
    /// What it resumed from is not sealed on disk, nor in the bucket.
    parent_waits: bool,
    /// The step that it resumed from, where the bucket lacks it, and where it does not.
    first_for_bucket: Option<u64>,
    in_bucket: Option<u64>,
    shards: Vec<Shard>,
    /// A trainer is about to read it.
    is_read: bool,
}

/// Where an owner lives.
pub(crate) enum Ground {
    /// In the process that trains.
    Trainer,
    /// In an agent, whose budget this is, and which may have others; the trainer drew the ids.
    Agent { budget: Budget, start: Id, nonce: Id, peers: Option<Peers> },
}

/// The owner of one rank of a run.
pub(crate) struct Keeper {
    pub(crate) place: Place,
    ownership: Ownership,
    /// Held by the leader: others find its record by it.
    start_lock: Mutex<Option<Ownership>>,
    running: Mutex<Option<Running>>,
    /// Decisions begun so far; held while one is made.
    decisions: Mutex<u32>,
    /// The thread that makes the slots ready, if there was one.
    preparing: Mutex<Option<JoinHandle<()>>>,
    /// Such threads, each of which waits for the one before.
    prepares: Arc<AtomicUsize>,
    /// What the leader knows of the others.
    leading: Mutex<Leading>,
}

/// What the leader knows of the ranks of its attempt, where they are spread.
#[derive(Debug, Default)]
pub(crate) struct Leading {
    /// Where each rank is that has joined.
    roster: BTreeMap<u32, String>,
    /// Nodes that listen to its decisions: after another agent has taken it over nobody joins anew.
    listening: BTreeSet<String>,
    elsewhere: Elsewhere,
}

fn peers_name(place: &Place) -> Option<String> {
    place.peers.as_ref().map(|peers| peers.network.me())
}

impl Keeper {
    /// Takes the rank: opens the tiers and the locks. Nothing is recorded yet. `wrap` puts something
    /// around each tier; `takes_over` ends an earlier owner in this process, known by its lock, before
    /// its slots are touched.
    ///
    /// # Errors
    /// A place cannot be used, or another live process has the rank.
    pub(crate) fn open(
        config: Config,
        ground: Ground,
        wrap: &dyn Fn(Arc<dyn Tier>) -> Arc<dyn Tier>,
        takes_over: &dyn Fn(FileId) -> Result<()>,
    ) -> Result<Self> {
        config.check()?;
        let clock: SharedClock = Arc::new(SystemClock);
        let disk = DiskTier::open(&config.home())?;
        let (budget, start, nonce, mapped, peers) = match ground {
            Ground::Trainer => {
                let budget = Budget::open(&config.ram_root, config.ram_bytes_max)?;
                let start = config.attempt_id.map_or_else(Id::random, Ok)?;
                (budget, start, Id::random()?, true, None)
            }
            Ground::Agent { budget, start, nonce, peers } => (budget, start, nonce, false, peers),
        };
        let ram = wrap(Arc::new(MemoryTier::open(&config.ram_dir(), budget.clone())?));
        let lock = rank_lock(&config.home(), Rank(config.rank));
        let ownership = Ownership::take_over(
            &lock,
            &format!("rank {} of {}", config.rank, config.destination.display()),
            config.lock_wait,
            &*clock,
        )?;
        takes_over(ownership.id())?;
        disk.sweep(Rank(config.rank), true)?;
        let disk = wrap(Arc::new(Retried::new(disk, clock.clone())));
        let bucket = config.bucket.as_ref().map(|bucket| bucket.open(&clock)).transpose()?;
        let bucket = bucket.map(wrap);
        let signal = Arc::new(Signal::default());
        let arena = Arena::new(
            ram.clone(),
            config.ram_dir(),
            Rank(config.rank),
            config.slots,
            budget,
            signal.clone(),
            mapped,
        );
        arena.adopt()?;
        let observer = Observer::told_by(signal.clone());
        let closed = AtomicBool::new(false);
        let pid = std::process::id();
        let desk = Arc::new(Desk { config, observer, clock, signal, closed, start, nonce, pid });
        let is_hosted = !mapped;
        let place = Place { desk, ram, disk, bucket, is_hosted, arena, peers };
        let start_lock = if place.config.leads() { Some(place.start_lock()?) } else { None };
        Ok(Self {
            place,
            ownership,
            start_lock: Mutex::new(start_lock),
            running: Mutex::new(None),
            decisions: Mutex::new(0),
            preparing: Mutex::new(None),
            prepares: Arc::default(),
            leading: Mutex::default(),
        })
    }

    /// Its lock, by which an earlier owner is known.
    pub(crate) fn id(&self) -> FileId {
        self.ownership.id()
    }

    /// Decides, or learns, where this attempt begins, and records and claims it. `None`: at step 0.
    /// Called again in a running process (a rollback), it begins a new attempt: between the two,
    /// `quiet` waits for what the old one has in hand, and `forget` forgets it.
    ///
    /// # Errors
    /// A tier did not answer, rank 0's record did not come, the rank is claimed, or the shard of
    /// the decided step has no good copy here.
    pub(crate) fn begin(
        &self,
        how: &Begin,
        quiet: &dyn Fn() -> Result<()>,
        forget: &dyn Fn(),
    ) -> Result<Option<Restorable>> {
        self.check_open(true)?;
        let mut decisions = locked(&self.decisions);
        let place = &self.place;
        // Until the new decision is recorded the old attempt goes on.
        let started = begin(place, how, *decisions)?;
        *decisions += 1;
        quiet()?;
        let old = locked(&self.running).take();
        if let Some(old) = old {
            // What the new attempt goes on from it carries on; of the rest its event has told.
            let newer = Error::Fenced { why: "a newer attempt has begun".into() };
            old.stop(place, Some(&newer), place.config.slot_wait)?;
        }
        let keep = started.record.parent.map(|p| p.key());
        if !place.is_hosted && place.config.leads() {
            clear_strangers(&*place.ram, &place.config, &*place.clock, keep.as_ref());
        }
        let is_durable = started.stands.on_disk || started.stands.whole_in_bucket;
        if place.config.saves() {
            place.arena.trim(keep.as_ref())?;
        } else {
            // Of an attempt in which this rank did save: what is resumed from may be nowhere else.
            place.arena.give_back_but(keep.as_ref().filter(|_| !is_durable))?;
        }
        forget();
        let restorable = started.restorable.map(|mut found| {
            found.slot = place.arena.find(&found.key).and_then(|slot| slot.map().cloned());
            found
        });
        let Stands { on_disk, in_bucket, whole_in_bucket, is_others } = started.stands;
        // What the bucket has is durable: no slot waits to bring it to disk.
        let in_ram = keep.is_some() && !on_disk && !whole_in_bucket && !is_others;
        let waits = in_ram && !place.config.is_bucket_only();
        let step = keep.as_ref().map(|key| key.step.0);
        // What is not sealed goes to disk from its slot, and to other nodes whatever is.
        let resumed =
            restorable.as_ref().filter(|_| in_ram || (place.replicas() > 0 && !is_others));
        let resumed = resumed.and_then(|found| resumed_shard(&place.arena, found));
        let resumed = resumed.into_iter().collect();
        let record = started.record.clone();
        let found = FoundHere {
            parent_waits: waits,
            first_for_bucket: step.filter(|_| place.lacks_in_bucket(started.stands)),
            in_bucket: step.filter(|_| in_bucket),
            shards: resumed,
            is_read: true,
        };
        let mut elsewhere = started.elsewhere;
        if is_others {
            // It would be kept until what is resumed from is on other nodes again, where nobody sends it.
            elsewhere.fallback = None;
        }
        let cascade = self.run(started.record, elsewhere, found)?;
        let cascade = Arc::downgrade(&cascade);
        if place.is_spread() && place.config.leads() {
            self.announce(&record)?;
        }
        Ok(restorable.map(|found| {
            let over = Over::new(move || {
                let Some(cascade) = cascade.upgrade() else { return };
                cascade.was_read();
                if is_durable {
                    cascade.clear_strangers(); // The first save may need the room.
                }
            });
            Restorable { over: Some(over), ..found }
        }))
    }

    /// Starts what carries an attempt's shards.
    fn run(
        &self,
        record: AttemptRecord,
        elsewhere: Elsewhere,
        found: FoundHere,
    ) -> Result<Arc<Cascade>> {
        let place = &self.place;
        let agreements = self.agreements(&record)?;
        let parts = Parts {
            config: place.config.clone(),
            record: record.clone(),
            ram: place.ram.clone(),
            disk: place.disk.clone(),
            agreements,
            observer: place.observer.clone(),
            clock: place.clock.clone(),
            signal: place.signal.clone(),
            far: place.far(),
            first_for_bucket: found.first_for_bucket,
            in_bucket: found.in_bucket,
            peers: place.peers.clone(),
            replicas: place.replicas(),
            fallback: elsewhere.fallback.clone(),
            holders: elsewhere.holders.get(&place.config.rank).cloned().unwrap_or_default(),
            is_embedded: !place.is_hosted,
        };
        // Directories are asked here, before anybody is kept waiting.
        let cascade = Cascade::new(parts, found.parent_waits, found.shards, found.is_read)?;
        let mut running = locked(&self.running);
        if place.config.leads() {
            let roster = peers_name(place).map(|me| (place.config.rank, me));
            let roster = roster.into_iter().collect();
            *locked(&self.leading) = Leading { roster, elsewhere, ..Leading::default() };
        }
        // Closing says so first and takes what runs after: nothing starts behind its back.
        place.check_closed()?;
        let mut threads = vec![Behind::start("tierkeep-disk", &cascade, place, Cascade::run)?];
        if place.replicas() > 0 {
            let begun = Behind::start("tierkeep-peers", &cascade, place, Cascade::run_to_peers);
            threads.push(begun.inspect_err(|_| cascade.stop(None))?);
        }
        if place.bucket.is_some() {
            let begun = Behind::start("tierkeep-object", &cascade, place, Cascade::run_to_bucket);
            threads.push(begun.inspect_err(|_| cascade.stop(None))?);
        }
        let scrubs = |bucket: &Bucket| place.config.leads() && bucket.scrub.is_some();
        if place.config.bucket.as_ref().is_some_and(scrubs) {
            let begun = Behind::start("tierkeep-scrub", &cascade, place, Cascade::run_scrub);
            threads.push(begun.inspect_err(|_| cascade.stop(None))?);
        }
        *running = Some(Running { record, cascade: cascade.clone(), threads });
        Ok(cascade)
    }

    /// Tells every agent that this one has the leader. Who is not told asks.
    fn announce(&self, record: &AttemptRecord) -> Result<()> {
        let Some(peers) = self.place.peers.clone() else { return Ok(()) };
        let bytes = crate::wire::convert::record_bytes(record)?;
        let led = Led { node: peers.network.me(), record: record.clone(), bytes: bytes.clone() };
        peers.commons.lead(&peers.site, led);
        let tell = move || {
            at_once(ASKED_AT_ONCE, &peers.others(), |node| {
                let lead = wire::Lead { record: bytes.clone() };
                if let Err(e) = peers.ask(&node.name, Ask::Lead(lead)) {
                    tracing::debug!("{} was not told of the attempt: {}", node.name, e.chain());
                }
            });
        };
        let thread = std::thread::Builder::new().name("tierkeep-announce".into());
        thread.spawn(tell).map(drop).doing(|| "start a thread".into())
    }

    fn agreements(&self, record: &AttemptRecord) -> Result<Agreements> {
        let place = &self.place;
        let (shared, lone) = (&place.config.home(), place.config.is_lone());
        let Some(peers) = place.peers.as_ref().filter(|_| !lone) else {
            return Ok(Agreements::new(shared, &record.attempt, lone));
        };
        let led = peers.commons.led(&peers.site).filter(|led| led.record.attempt == record.attempt);
        let node = match led {
            Some(led) => led.node,
            None if place.config.leads() => peers.network.me(),
            None => {
                return Err(Error::NotFound { what: format!("the leader of {}", record.attempt) });
            }
        };
        if node == peers.network.me() {
            let board = peers.commons.board(shared, &record.attempt);
            board.tells(&place.signal);
            return Ok(Agreements::spread_from(board));
        }
        let home = Home::new(peers, node, record.attempt.dir(), &place.clock, &place.signal)?;
        Ok(Agreements::at_home(home))
    }

    /// A rank that is at `node` has joined; the nodes that hold something of it, and the newest whole
    /// checkpoint before the one that is resumed from.
    pub(crate) fn joined(&self, rank: u32, node: &str) -> (Vec<String>, Option<CheckpointKey>) {
        let mut leading = locked(&self.leading);
        leading.roster.insert(rank, node.into());
        let holders = leading.elsewhere.holders.get(&rank).cloned().unwrap_or_default();
        (holders, leading.elsewhere.fallback.clone())
    }

    /// Where a rank's shard of what this attempt resumes from lay when that was decided, as far as it is
    /// known.
    pub(crate) fn places_of(&self, rank: u32) -> Vec<(String, TierKind)> {
        locked(&self.leading).elsewhere.places.get(&rank).cloned().unwrap_or_default()
    }

    /// Ranks that are at `node` listen to the leader.
    pub(crate) fn is_heard_at(&self, node: &str) {
        let mut leading = locked(&self.leading);
        if !leading.listening.contains(node) {
            leading.listening.insert(node.into());
        }
    }

    /// The nodes that have ranks of the attempt, as far as the leader knows.
    pub(crate) fn nodes(&self) -> BTreeSet<String> {
        let leading = locked(&self.leading);
        leading.roster.values().chain(&leading.listening).cloned().collect()
    }

    /// The ranks that have joined, and where they are.
    pub(crate) fn roster(&self) -> Vec<(u32, String)> {
        locked(&self.leading).roster.iter().map(|(rank, node)| (*rank, node.clone())).collect()
    }

    /// Makes every slot ready for `len` bytes, behind.
    ///
    /// # Errors
    /// [`Error::Budget`] with the sum, at once.
    pub(crate) fn prepare(&self, len: u64) -> Result<()> {
        let (arena, observer) = (self.place.arena.clone(), self.place.observer.clone());
        arena.check_budget(len)?;
        let mut preparing = locked(&self.preparing);
        self.place.check_closed()?;
        let waiting = self.prepares.clone();
        if waiting.fetch_add(1, Ordering::AcqRel) >= PREPARES_MAX {
            waiting.fetch_sub(1, Ordering::AcqRel);
            return Err(Error::invalid("slots are being made ready: too many wishes at once"));
        }
        let before = preparing.take();
        let work = move || {
            // One after the other: two at once would take each other's slots for busy.
            if let Some(before) = before
                && before.join().is_err()
            {
                observer.error("prepare_failed", None, "the thread that prepares slots panicked");
            }
            if let Err(e) = arena.prepare(len)
                && !matches!(e, Error::Fenced { .. })
            {
                observer.warn(
                    "prepare_failed",
                    None,
                    format!("slots were not prepared: {}", e.chain()),
                );
            }
            waiting.fetch_sub(1, Ordering::AcqRel);
        };
        let spawned = std::thread::Builder::new().name("tierkeep-prepare".into()).spawn(work);
        *preparing =
            Some(spawned.map_err(|source| Error::Io { what: "start a thread".into(), source })?);
        Ok(())
    }

    /// Slots are being made ready.
    pub(crate) fn is_preparing(&self) -> bool {
        locked(&self.preparing).as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// A trainer that comes back has seen so many decisions recorded: one whose answer it never had is
    /// asked for once more, and found.
    pub(crate) fn set_decisions(&self, seen: u32) {
        *locked(&self.decisions) = seen;
    }

    /// Decisions recorded so far.
    pub(crate) fn decisions(&self) -> u32 {
        *locked(&self.decisions)
    }

    /// The attempt that goes on, and what carries its shards.
    pub(crate) fn running(&self) -> Option<(AttemptRecord, Arc<Cascade>)> {
        let running = locked(&self.running);
        running.as_ref().map(|r| (r.record.clone(), r.cascade.clone()))
    }

    /// `begins`: a new attempt, which may have been recorded by a rank that was quicker.
    pub(crate) fn check_open(&self, begins: bool) -> Result<()> {
        self.place.check_pid()?;
        let superseded = !self.ownership.is_current();
        let fenced = locked(&self.running)
            .as_ref()
            .is_some_and(|r| r.cascade.is_fenced() && !(begins && r.cascade.is_fenced_by_us()));
        if superseded || fenced {
            let why =
                if superseded { TAKEN_OVER } else { "a newer attempt has taken over this run" };
            return Err(Error::Fenced { why: why.into() });
        }
        self.place.check_closed()
    }

    /// The tiers, nearest first.
    pub(crate) fn tiers(&self) -> Vec<Arc<dyn Tier>> {
        let place = &self.place;
        [&place.ram, &place.disk].into_iter().chain(&place.bucket).cloned().collect()
    }
}

/// The shard that an attempt resumes from, if it lies in a slot of this process.
fn resumed_shard(arena: &Arena, found: &Restorable) -> Option<Shard> {
    let in_ram = |c: &&ShardCopy| found.tiers[c.tier].kind() == TierKind::Ram;
    let copy = found.copies.iter().find(in_ram)?;
    let payload = &copy.manifest.payload;
    if payload.chunk_bytes != CHUNK_BYTES {
        return None; // Of another build: it is checked in its chunks, and goes with the next save.
    }
    Some(Shard {
        key: found.key.clone(),
        identity: copy.manifest.identity.clone(),
        payload: SlotPayload { slot: arena.find(&found.key)?, len: payload.length },
        manifest: copy.bytes.clone(),
        save: Save::new(found.key.step.0),
        published: true,
        complete: false,
        told: false,
        chunks: Some(payload.chunks.clone()),
    })
}
