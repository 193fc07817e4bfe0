//! The owner in another process: an agent, asked over its socket.
//!
//! The trainer copies into slots that the agent passed, and asks for everything else. When the agent
//! goes away (it is upgraded, or was killed) the trainer keeps its slots, its memory and its attempt, and
//! goes on where it was with the next agent at the same socket.
//!
//! # Invariants
//!
//! - There is one owner: a trainer that was given an agent never becomes its own.
//! - A slot is written to only while this process has it in hand, by the word of the agent.
//! - A save whose agent goes away is published to the next one, or fails and is told.
//! - Nobody waits for an agent that is away for longer than [`AWAY_MAX`] an outage.

mod dial;
mod find;
mod going;
mod hear;
mod slots;
mod tier;
mod token;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tierkeep_proto::trainer::{self as wire, reply::Answer, request::Call};

pub use self::find::{Agent, default_sockets, find_agent};
pub use self::token::token_file;
use self::{dial::Dial, going::FarGoing, tier::FarTier};
use crate::{
    attempt::AttemptRecord,
    begin::Begin,
    clock::{SharedClock, SystemClock},
    config::Config,
    error::{Error, Result},
    keeper::TAKEN_OVER,
    names::{Id, Rank},
    observe::{Observer, locked},
    owner::{Closing, Going, Owner},
    place::Desk,
    restore::{
        asks::{Care, Over, Rest},
        read::Restorable,
    },
    save::{Save, forget_decided},
    signal::Signal,
    snapshot::{device::Pin, map::SlotMap},
    tier::{Tier, TierKind},
    wire::convert,
};

/// How long one outage of the agent may keep a save waiting. After that saves fail at once until the
/// agent is back: training matters more.
const AWAY_MAX: Duration = Duration::from_secs(30);

/// How long a short question may take.
const SHORT: Duration = Duration::from_secs(30);

/// How long a shard may take to come from other nodes: a hundred gigabytes over a slow network.
const FETCH: Duration = Duration::from_secs(3600);

/// Other ranks' manifests that are asked for at once: some have megabytes, and an answer has an end.
const RANKS_AT_ONCE: usize = 4;

/// What is filled and not known to be published.
struct Unpublished {
    publish: wire::Publish,
    save: Save,
}

#[derive(Default)]
struct State {
    slots: HashMap<u64, Arc<SlotMap>>,
    /// In hand, by the agent's word: slot and step.
    filling: HashMap<u64, u64>,
    unpublished: HashMap<u64, Unpublished>,
    saves: BTreeMap<u64, Save>,
    /// Steps of those that an agent has said to be published, or that it follows: what becomes of
    /// them another one can tell.
    published: BTreeSet<u64>,
    record: Option<AttemptRecord>,
    decisions: u32,
    stop_after: Option<u64>,
    /// Steps that failed here and are not tried again. True: an agent was told.
    failed: BTreeMap<u64, bool>,
    /// The agent carries something of ours.
    busy: bool,
    fenced: Option<String>,
}

/// What the parts share.
struct Shared {
    desk: Desk,
    state: Mutex<State>,
    /// A slot came, or went.
    slots_changed: Condvar,
    pin: OnceLock<Arc<dyn Pin>>,
    mapping: AtomicBool,
}

/// The newest saves whose handles are kept up to date.
const SAVES_KEPT: usize = 64;

impl Shared {
    /// What a next agent has to know.
    fn back(&self) -> wire::Back {
        let state = locked(&self.state);
        let record = state.record.as_ref().map(convert::record_bytes);
        let filling: BTreeSet<(u64, u64)> = state
            .filling
            .iter()
            .map(|(slot, step)| (*slot, *step))
            .chain(state.unpublished.iter().map(|(slot, u)| (*slot, u.publish.step)))
            .collect();
        wire::Back {
            record: record.and_then(Result::ok).unwrap_or_default(),
            decisions: state.decisions,
            mapped: state.slots.keys().copied().collect(),
            filling: filling.into_iter().map(|(slot, step)| wire::Filling { slot, step }).collect(),
            saves: state
                .saves
                .values()
                .filter(|s| s.is_open() && state.published.contains(&s.step()))
                .map(Save::step)
                .collect(),
            stop_after: state.stop_after,
            // Also what was told: the agent may have died before it passed it on.
            failed: state.failed.keys().copied().collect(),
        }
    }

    fn add_failed(&self, steps: &[u64]) {
        let mut state = locked(&self.state);
        steps.iter().for_each(|step| {
            state.failed.entry(*step).or_default();
        });
        while state.failed.len() > SAVES_KEPT {
            state.failed.pop_first();
        }
    }

    fn told_failed(&self, steps: &[u64]) {
        let mut state = locked(&self.state);
        for step in steps {
            state.failed.entry(*step).and_modify(|told| *told = true);
        }
        drop(state);
        self.desk.signal.notify();
    }

    fn has_untold(&self) -> bool {
        let state = locked(&self.state);
        state.fenced.is_none() && state.failed.values().any(|told| !told)
    }

    fn follow(&self, save: &Save) {
        let mut state = locked(&self.state);
        state.saves.insert(save.step(), save.clone());
        for step in forget_decided(&mut state.saves, SAVES_KEPT) {
            state.published.remove(&step);
        }
    }

    fn is_busy(&self) -> bool {
        let state = locked(&self.state);
        state.fenced.is_none() && (state.busy || state.saves.values().any(Save::is_open))
    }

    fn check_fenced(&self) -> Result<()> {
        match &locked(&self.state).fenced {
            Some(why) => Err(Error::Fenced { why: why.clone() }),
            None => Ok(()),
        }
    }

    /// The rank is another's: nothing of this handle will be.
    fn fence(&self, why: &str, tell: bool) {
        let mut state = locked(&self.state);
        if state.fenced.is_some() {
            return;
        }
        state.fenced = Some(why.into());
        let saves: Vec<Save> = state.saves.values().cloned().collect();
        state.unpublished.clear();
        drop(state);
        let error = Error::Fenced { why: why.into() };
        if tell {
            self.desk.observer.error("fenced", None, why);
        }
        saves.iter().for_each(|save| save.fail(crate::save::Level::Ram, &error));
        self.desk.signal.notify();
    }
}

/// An agent that owns this process's rank.
pub(crate) struct Far {
    shared: Arc<Shared>,
    dial: Arc<Dial>,
    tiers: Vec<Arc<dyn Tier>>,
}

impl Far {
    /// Takes the rank, from the agent at `config.agent`.
    ///
    /// # Errors
    /// There is no agent, it speaks another protocol, or another live process has the rank.
    pub(crate) fn open(mut config: Config, socket: PathBuf) -> Result<Self> {
        config.check()?;
        let clock: SharedClock = Arc::new(SystemClock);
        let start = config.attempt_id.map_or_else(Id::random, Ok)?;
        let nonce = Id::random()?;
        let open = convert::open(&config, start, nonce);
        let dial = Dial::new(socket, open, config.token_file.clone(), clock.clone());
        let (stream, opened) = dial.first(config.lock_wait)?;
        config.ram_root = find::ram_root(&opened, config.ram_root);
        let desk = Desk {
            config,
            observer: Observer::default(),
            clock,
            signal: Arc::new(Signal::default()),
            closed: AtomicBool::new(false),
            start,
            nonce,
            pid: std::process::id(),
        };
        let shared = Arc::new(Shared {
            desk,
            state: Mutex::new(State { busy: opened.busy, ..State::default() }),
            slots_changed: Condvar::new(),
            pin: OnceLock::new(),
            mapping: AtomicBool::new(false),
        });
        let tier = |kind, address: &str| -> Arc<dyn Tier> {
            Arc::new(FarTier::new(dial.clone(), kind, address.into()))
        };
        let tiers = vec![
            tier(TierKind::Ram, &opened.ram_address),
            tier(TierKind::Disk, &opened.disk_address),
        ];
        hear::begin(&shared, &dial, stream)?;
        Ok(Self { shared, dial, tiers })
    }

    fn care(&self) -> Arc<dyn Care> {
        Arc::new(FarCare { dial: self.dial.clone() })
    }

    /// Other ranks' shards, which may be on other nodes: the agent brings those that are read.
    fn rest(&self) -> Rest {
        let (dial, care, observer) =
            (self.dial.clone(), self.care(), self.shared.desk.observer.clone());
        let mut tiers = self.tiers.clone();
        tiers.push(Arc::new(FarTier::new(dial.clone(), TierKind::Peer, "other nodes".into())));
        Rest::new(move |ranks| {
            let mut shards = Vec::with_capacity(ranks.len());
            for some in ranks.chunks(RANKS_AT_ONCE) {
                let ranks = some.iter().map(|rank| rank.0).collect();
                let (answer, _) = dial.ask(Call::Shards(wire::Shards { ranks }), FETCH)?;
                let Answer::Shards(found) = answer else { return Err(dial::odd("Shards")) };
                for shard in &found.shards {
                    shards.push(convert::restorable(shard, &tiers, &observer, &care)?);
                }
            }
            Ok(shards)
        })
    }

    /// The agent, for which a restore's shard waits.
    fn over(&self) -> Arc<Over> {
        let dial = self.dial.clone();
        Over::new(move || {
            if let Err(e) = dial.ask_now(Call::Restored(wire::Restored {}), SHORT) {
                tracing::debug!("the agent was not told of the end of a restore: {}", e.chain());
            }
        })
    }
}

impl Owner for Far {
    fn desk(&self) -> &Desk {
        &self.shared.desk
    }

    fn check_open(&self, _begins: bool) -> Result<()> {
        self.shared.desk.check_pid()?;
        self.shared.check_fenced()?;
        self.shared.desk.check_closed()
    }

    fn begin(
        &self,
        how: &Begin,
        quiet: &dyn Fn() -> Result<()>,
        forget: &dyn Fn(),
    ) -> Result<Option<Restorable>> {
        self.check_open(true)?;
        quiet()?;
        // The agent's own deadlines are shorter, but where it fetches the shard from other nodes.
        let within = self.shared.desk.config.attempt_wait + FETCH;
        let answer = self.dial.ask(Call::Begin(convert::begin(how)), within)?;
        let (Answer::Begun(begun), _) = answer else { return Err(dial::odd("Begin")) };
        let record = convert::record_of(&begun.record)?;
        forget();
        let mut state = locked(&self.shared.state);
        state.saves.clear();
        state.published.clear();
        state.failed.clear();
        state.record = Some(record);
        state.decisions = begun.decisions;
        state.stop_after = None;
        state.busy = begun.busy;
        drop(state);
        self.shared.desk.check_closed()?;
        let shard = begun.shard.as_ref();
        let observer = &self.shared.desk.observer;
        let found = shard.map(|s| convert::restorable(s, &self.tiers, observer, &self.care()));
        Ok(found.transpose()?.map(|found| Restorable {
            over: Some(self.over()),
            rest: Some(self.rest()),
            ..found
        }))
    }

    fn going(&self) -> Option<Arc<dyn Going>> {
        let record = locked(&self.shared.state).record.clone()?;
        Some(Arc::new(FarGoing::new(self.shared.clone(), self.dial.clone(), record)))
    }

    fn prepare(&self, len: u64) -> Result<()> {
        self.dial.ask(Call::Prepare(wire::Prepare { bytes: len }), SHORT)?;
        slots::fetch(&self.shared, &self.dial)
    }

    fn pin_with(&self, pin: Arc<dyn Pin>) {
        let _ = self.shared.pin.set(pin);
    }

    fn tiers(&self) -> Vec<Arc<dyn Tier>> {
        self.tiers.clone()
    }

    fn pin(&self, step: u64, pinned: bool) -> Result<()> {
        self.dial.ask(Call::Pin(wire::Pin { step, pinned }), SHORT).map(drop)
    }

    fn taken_over(&self) {
        self.shared.fence(TAKEN_OVER, false);
    }

    fn shut(&self, how: Closing) {
        if self.shared.desk.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let taken_over = self.shared.check_fenced().is_err();
        if !taken_over || self.dial.away().is_none() {
            let close = Call::Close(wire::Close { clean: how == Closing::Done });
            if let Err(e) = self.dial.ask_now(close, SHORT) {
                let text = format!("the agent was not told that this rank is done: {}", e.chain());
                self.shared.desk.observer.warn("stop_failed", None, text);
            }
        }
        self.dial.close();
        let mut state = locked(&self.shared.state);
        let slots = std::mem::take(&mut state.slots);
        for save in state.saves.values() {
            let why = "the Checkpointer was closed before".into();
            let step = crate::names::Step(save.step());
            save.fail(crate::save::Level::Ram, &Error::Skipped { step, why });
        }
        drop(state);
        drop(slots); // Unmapped, and unknown to any device.
        self.shared.desk.observer.close();
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        if self.shared.desk.is_ours() {
            self.shut(Closing::Now);
            return;
        }
        // A fork's child has no slots (MADV_DONTFORK): nothing may be unmapped where others lie by now.
        std::mem::forget(self.shared.clone());
    }
}

fn damage(damaged: &[BTreeSet<usize>]) -> Vec<wire::Damage> {
    let damage = damaged.iter().enumerate().filter(|(_, chunks)| !chunks.is_empty());
    let damage = damage.map(|(copy, chunks)| wire::Damage {
        copy: u32::try_from(copy).unwrap_or(u32::MAX),
        chunks: chunks.iter().map(|chunk| *chunk as u64).collect(),
    });
    damage.collect()
}

/// What is damaged, the agent mends.
#[derive(Debug)]
struct FarCare {
    dial: Arc<Dial>,
}

impl Care for FarCare {
    fn mend(&self, rank: Rank, damaged: &[BTreeSet<usize>]) {
        let mend = wire::Mend { rank: rank.0, damage: damage(damaged), ..Default::default() };
        if let Err(e) = self.dial.ask(Call::Mend(mend), 10 * SHORT) {
            tracing::warn!("the agent was not asked to mend {rank}'s shard: {}", e.chain());
        }
    }

    fn fetch(&self, rank: Rank, damaged: &[BTreeSet<usize>]) -> bool {
        let damage = damage(damaged);
        let mend = wire::Mend { rank: rank.0, damage, from_peers: true, ..Default::default() };
        match self.dial.ask(Call::Mend(mend), FETCH) {
            Ok(_) => true,
            Err(e) => {
                tracing::debug!("{rank}'s shard was not mended from other nodes: {}", e.chain());
                false
            }
        }
    }

    fn lost(&self, rank: Rank) {
        let mend = wire::Mend { rank: rank.0, lost: true, ..Default::default() };
        if let Err(e) = self.dial.ask(Call::Mend(mend), SHORT) {
            tracing::warn!("the agent was not told that {rank} is lost: {}", e.chain());
        }
    }
}
