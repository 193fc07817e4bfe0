//! From RAM to the RAM of other nodes, behind the training: a thread of its own beside the disk's, one
//! step at a time, the same step on every rank.
//!
//! The leader records which step goes next (the newest that is complete in RAM). Every rank sends its
//! shard of that step to as many nodes as it is to have copies, and says when they hold it. When all
//! ranks have said so, the step survives the loss of nodes.
//!
//! # Invariants
//!
//! - A step is told as being on other nodes only when every rank has the receipts of all its copies.
//! - A holder that is lost, full or refuses is replaced by the next node of the placement, until the
//!   deadline says who was missing.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Mutex,
    time::Duration,
};

use tierkeep_proto::peer::{self as wire, reply::Answer, request::Ask};

use super::{Cascade, IDLE, Shard};
use crate::{
    agree::{InRam, Own},
    begin::roster::Roster,
    clock::Deadline,
    error::{Error, Result},
    manifest::{ShardManifest, decode},
    names::{CheckpointKey, Rank, Step, ranks},
    observe::{add, locked},
    peers::{
        Peers,
        send::{Outbound, PeerReceipt, inform, send},
    },
    placement::{self, Node, place},
    save::Level,
    snapshot::slot::SlotPayload,
    tier::Source,
};

/// How long it is waited for another node, where there are too few.
const AGAIN: Duration = Duration::from_millis(250);

/// How long saves may wait for a slot that is kept for nodes which are not there.
const PATIENCE: Duration = Duration::from_secs(10);

/// The step that goes to other nodes.
#[derive(Debug)]
pub(super) struct Copying {
    pub(super) step: u64,
    deadline: Deadline,
    own_done: bool,
}

/// How far this rank's copies are.
#[derive(Debug, Default)]
pub(super) struct Copies {
    pub(super) now: Option<Copying>,
    /// The newest step that was ever chosen.
    pub(super) chosen: Option<u64>,
    /// The newest step that is held elsewhere, of all ranks; and who holds this rank's shard of it.
    pub(super) whole: Option<CheckpointKey>,
    pub(super) receipts: Vec<PeerReceipt>,
    /// The one before it, and the nodes that were asked and have the newer one: while some have not, the
    /// others keep this one.
    pub(super) unsure: Option<(CheckpointKey, BTreeSet<String>)>,
    /// There are too few nodes, or they do not answer: nothing is kept for them.
    pub(super) trouble: bool,
    /// Nodes that may hold something of this rank.
    pub(super) holders: BTreeSet<String>,
    /// Where the ranks are, as far as the leader knew when it was asked.
    roster: BTreeMap<u32, String>,
    /// Nodes that have this run's records, of this attempt too.
    informed: BTreeSet<String>,
    /// Since when a holder of it is known to be lost.
    pub(super) below: Option<Duration>,
}

impl Copies {
    pub(super) fn known(holders: &[String]) -> Self {
        Self { holders: holders.iter().cloned().collect(), ..Self::default() }
    }
}

impl Cascade {
    /// The thread's whole life.
    pub(crate) fn run_to_peers(&self) {
        let Some(peers) = self.parts.peers.clone() else { return };
        let mut told: Option<String> = None;
        loop {
            let seen = self.parts.signal.seen();
            if locked(&self.work).stop {
                return;
            }
            let pause = match self.turn_to_peers(&peers) {
                Ok(true) => continue,
                Ok(false) if locked(&self.work).copies.now.is_some() => self.poll(),
                Ok(false) => IDLE,
                Err(e) => {
                    let text = e.chain();
                    if told.as_deref() != Some(&text) {
                        self.parts.observer.warn("peers_failed", None, text.clone());
                        told = Some(text);
                    }
                    IDLE
                }
            };
            self.parts.signal.wait(seen, pause);
        }
    }

    fn turn_to_peers(&self, peers: &Peers) -> Result<bool> {
        if self.is_fenced() || !self.parts.config.saves() {
            return Ok(false);
        }
        let chosen = self.choose_for_peers(peers)?;
        let sent = self.send_own(peers)?;
        let told = self.watch_peers(peers)?;
        Ok(chosen || sent || told || self.mend_copies(peers)?)
    }

    /// The leader chooses; the others read what it chose.
    fn choose_for_peers(&self, peers: &Peers) -> Result<bool> {
        let (idle, before) = {
            let copies = &locked(&self.work).copies;
            (copies.now.is_none(), copies.chosen)
        };
        let newer = |step: &u64| before.is_none_or(|before| *step > before);
        let next = if self.parts.config.leads() {
            if !idle {
                return Ok(false);
            }
            let work = locked(&self.work);
            let complete = work.shards.values().filter(|s| s.complete).map(|s| s.key.step.0);
            complete.filter(newer).max()
        } else {
            // A newer choice means that the leader is done with the old one, one way or the other.
            self.parts.agreements.copied()?.filter(newer)
        };
        let Some(step) = next else { return Ok(false) };
        self.confirm_older(peers);
        if self.parts.config.leads() {
            self.parts.agreements.copy(step)?;
        }
        let mut work = locked(&self.work);
        let deadline = Deadline::after(&*self.parts.clock, self.parts.config.peer_wait);
        let old = work.copies.now.replace(Copying { step, deadline, own_done: false });
        work.copies.chosen = Some(step);
        // Those before it are not chosen any more.
        let passed: Vec<Shard> =
            work.shards.values().filter(|s| s.key.step.0 < step).cloned().collect();
        drop(work);
        if let Some(old) = old {
            self.fail_copies(old.step, "the leader went on to a newer step");
        }
        for shard in passed.iter().filter(|s| s.save.is_pending(Level::Peer)) {
            shard.save.fail(Level::Peer, &passed_over_for_peers(shard.key.step.0, step));
        }
        Ok(true)
    }

    /// Sends this rank's shard of the chosen step.
    fn send_own(&self, peers: &Peers) -> Result<bool> {
        let (step, deadline, shard) = {
            let work = locked(&self.work);
            let Some(now) = work.copies.now.as_ref().filter(|now| !now.own_done) else {
                return Ok(false);
            };
            (now.step, now.deadline, work.shards.get(&now.step).cloned())
        };
        let rank = self.parts.config.rank;
        let done = match &shard {
            Some(shard) => self.send_shard(peers, shard, &deadline),
            None => Err(Error::Skipped { step: Step(step), why: "its slot was used again".into() }),
        };
        match done {
            Ok(receipts) => {
                self.parts.agreements.say_own(step, rank, Own::Held)?;
                let mut work = locked(&self.work);
                if let Some(shard) = work.shards.get(&step) {
                    shard.save.reach(Level::Peer, true);
                }
                work.copies.holders.extend(receipts.iter().map(|r| r.node.clone()));
                work.copies.receipts = receipts;
                if let Some(now) = work.copies.now.as_mut().filter(|now| now.step == step) {
                    now.own_done = true;
                }
            }
            Err(_) if locked(&self.work).stop => {}
            Err(e) => {
                let why = format!("{}: {}", Rank(rank), e.chain());
                let said = self.parts.agreements.on_peers(step, InRam::GivenUp(why.clone()));
                if !matches!(said, Ok(InRam::Whole)) {
                    self.fail_copies(step, &why);
                }
            }
        }
        Ok(true)
    }

    /// As many copies as there are to be, on nodes of the placement's choice.
    pub(super) fn send_shard(
        &self,
        peers: &Peers,
        shard: &Shard,
        deadline: &Deadline,
    ) -> Result<Vec<PeerReceipt>> {
        let (key, rank) = (&shard.key, Rank(self.parts.config.rank));
        let manifest = decode(&shard.manifest, "a manifest in RAM", key, rank)?;
        let begun = self.parts.clock.monotonic();
        let mut receipts: Vec<PeerReceipt> = Vec::new();
        let mut refused: BTreeSet<String> = BTreeSet::new();
        let mut trouble: Vec<String> = Vec::new();
        let patience = Deadline::after(&*self.parts.clock, PATIENCE);
        loop {
            let held: Vec<String> = receipts.iter().map(|r| r.node.clone()).collect();
            let wanted = self.parts.replicas - held.len();
            let next = self.next_holders(peers, &held, &refused, wanted);
            let sent = self.send_to(peers, &next, shard, &manifest);
            for (node, sent) in next.into_iter().zip(sent) {
                match sent {
                    Ok(receipt) => receipts.push(receipt),
                    // Our own bytes: nobody else could have them either.
                    Err(e @ Error::Damaged { .. }) => return Err(e),
                    Err(e) => {
                        tracing::debug!("{node} takes no copy of {key}, {rank}: {}", e.chain());
                        add(&self.parts.observer.counters.peer_refused, 1);
                        trouble.push(format!("{node}: {}", e.chain()));
                        refused.insert(node);
                    }
                }
            }
            if receipts.len() >= self.parts.replicas {
                let took = self.parts.clock.monotonic().saturating_sub(begun);
                let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
                add(&self.parts.observer.counters.peer_ns, took);
                return Ok(receipts);
            }
            if locked(&self.work).stop || self.is_fenced() {
                return Err(Error::Fenced { why: "the attempt ended in this process".into() });
            }
            let newly = self.next_holders(peers, &held, &refused, 1).is_empty();
            if newly {
                if patience.left(&*self.parts.clock).is_none() {
                    self.set_trouble(true);
                }
                // Everybody was asked: those that had trouble may be better by now.
                refused.clear();
                let who = || self.who_is_there(peers, receipts.len(), &trouble);
                if deadline.left(&*self.parts.clock).is_none() {
                    return Err(deadline.passed(format!("a copy of {rank} on other nodes"), who()));
                }
                // The next save wants this step's slot: nothing waits for nodes that are not there.
                if self.is_superseded(key) {
                    let why = format!("a newer step is complete; {}", who());
                    return Err(Error::Skipped { step: key.step, why });
                }
                self.parts.clock.pause(AGAIN);
            }
            trouble.drain(..trouble.len().saturating_sub(4));
        }
    }

    /// Whether a newer step is complete while there are too few nodes.
    fn is_superseded(&self, key: &CheckpointKey) -> bool {
        let work = locked(&self.work);
        work.copies.trouble && work.newest.as_ref().is_some_and(|newest| newest.step > key.step)
    }

    /// How many copies there are, and which nodes there could be.
    fn who_is_there(&self, peers: &Peers, has: usize, trouble: &[String]) -> String {
        let alive: Vec<String> = peers.others().into_iter().map(|node| node.name).collect();
        let lost = peers.network.lost();
        let list = |list: &[String]| {
            if list.is_empty() { "none".into() } else { list.join(", ") }
        };
        let mut who = format!(
            "{has} of {} copies are held, other agents alive: {}, lost: {}",
            self.parts.replicas,
            list(&alive),
            list(&lost)
        );
        if let Some(last) = trouble.last() {
            who = format!("{who}; {last}");
        }
        who
    }

    /// The next nodes to ask, `wanted` at most.
    fn next_holders(
        &self,
        peers: &Peers,
        held: &[String],
        refused: &BTreeSet<String>,
        wanted: usize,
    ) -> Vec<String> {
        let next = |nodes: Vec<Node>| {
            let own = nodes.iter().position(|node| node.name == peers.network.me())?;
            // All ranks are placed, so that no node has more than its share of them.
            let (index, shards) = self.placed(peers, &nodes, own);
            let copies = self.parts.replicas;
            let placed = match refused.is_empty() {
                true => peers.commons.placed(&peers.site, &nodes, shards, copies),
                false => place(&nodes, &shards, copies).into(),
            };
            let chosen = placed.holders[index].iter().map(|index| nodes[*index].name.clone());
            let chosen = chosen.filter(|node| !held.contains(node)).take(wanted);
            Some(chosen.collect::<Vec<_>>()).filter(|chosen| !chosen.is_empty())
        };
        peers.grounds(refused).into_iter().find_map(next).unwrap_or_default()
    }

    /// This rank's shard and those of the other ranks whose nodes are alive, and which one is this rank's.
    fn placed(&self, peers: &Peers, nodes: &[Node], own: usize) -> (usize, Vec<placement::Shard>) {
        let (rank, run) = (self.parts.config.rank, peers.site.destination.display());
        let by_name: HashMap<&str, usize> =
            nodes.iter().enumerate().map(|(index, node)| (node.name.as_str(), index)).collect();
        let roster = self.roster(peers);
        let mut at: BTreeMap<u32, usize> = BTreeMap::new();
        for (rank, node) in &roster {
            at.extend(by_name.get(node.as_str()).map(|index| (*rank, *index)));
        }
        at.insert(rank, own);
        let shard = |(rank, node)| placement::Shard { name: format!("{run}#{rank}"), node };
        (at.range(..rank).count(), at.into_iter().map(shard).collect())
    }

    /// Where the ranks are; asked until all have joined.
    fn roster(&self, peers: &Peers) -> BTreeMap<u32, String> {
        let known = locked(&self.work).copies.roster.clone();
        if !self.parts.agreements.is_spread() || known.len() >= self.parts.config.savers.len() {
            return known;
        }
        let Some(led) = peers.commons.led(&peers.site) else { return known };
        let attempt = self.parts.record.attempt.dir();
        let asked = peers.ask(&led.node, Ask::Roster(wire::Roster { attempt }));
        let Ok(Answer::Ranks(said)) = asked else { return known };
        let savers = &self.parts.config.savers;
        let at = said.ranks.into_iter().filter(|at| savers.binary_search(&at.rank).is_ok());
        let roster: BTreeMap<u32, String> = at.map(|at| (at.rank, at.node)).collect();
        locked(&self.work).copies.roster = roster.clone();
        if roster.len() >= savers.len() {
            let number = self.parts.record.attempt.number;
            let nodes = roster.values().cloned().collect();
            let kept = Roster::new(number, nodes, self.parts.replicas);
            for tier in [&self.parts.ram, &self.parts.disk] {
                if let Err(e) = kept.keep(&**tier) {
                    tracing::warn!("the nodes of this attempt are not written down: {}", e.chain());
                }
            }
        }
        roster
    }

    fn send_to(
        &self,
        peers: &Peers,
        nodes: &[String],
        shard: &Shard,
        manifest: &ShardManifest,
    ) -> Vec<Result<PeerReceipt>> {
        let source = Watched { payload: &shard.payload, cascade: self };
        let arrived = |bytes| {
            shard.save.add_peer_bytes(bytes);
            add(&self.parts.observer.counters.peer_bytes, bytes);
        };
        let one = |node: &str| {
            self.inform(peers, node)?;
            let keep = self.needed_by(&locked(&self.work), node);
            let outbound = Outbound {
                key: &shard.key,
                rank: Rank(self.parts.config.rank),
                manifest: &shard.manifest,
                payload: &manifest.payload,
                source: &source,
                arrived: &arrived,
                attempt: self.parts.record.attempt.number,
                replicas: self.parts.replicas,
                owner: None,
                keep: &keep,
            };
            send(peers, node, &outbound)
        };
        let all = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for (index, node) in nodes.iter().enumerate() {
                let (one, all) = (&one, &all);
                scope.spawn(move || {
                    let sent = one(node);
                    locked(all).push((index, sent));
                });
            }
        });
        let mut all = std::mem::take(&mut *locked(&all));
        all.sort_by_key(|(index, _)| *index);
        all.into_iter().map(|(_, sent)| sent).collect()
    }

    /// Gives a holder the run's records, once an attempt.
    fn inform(&self, peers: &Peers, node: &str) -> Result<()> {
        if locked(&self.work).copies.informed.contains(node) {
            return Ok(());
        }
        inform(peers, node, &[&*self.parts.disk, &*self.parts.ram])?;
        locked(&self.work).copies.informed.insert(node.into());
        Ok(())
    }

    /// Looks whether all ranks have their copies.
    fn watch_peers(&self, peers: &Peers) -> Result<bool> {
        let (step, deadline) = {
            let work = locked(&self.work);
            let Some(now) = work.copies.now.as_ref().filter(|now| now.own_done) else {
                return Ok(false);
            };
            (now.step, now.deadline)
        };
        let agreements = &self.parts.agreements;
        let said = match agreements.was_on_peers(step)? {
            Some(said) => Some(said),
            None => {
                // Where ranks are spread, the leader alone knows how far the others are.
                let judges = self.parts.config.leads() || !agreements.is_spread();
                let savers = &self.parts.config.savers;
                let missing = match judges {
                    true => agreements.without_own(step, Own::Held, savers)?,
                    false => self.others(),
                };
                if missing.is_empty() {
                    Some(agreements.on_peers(step, InRam::Whole)?)
                } else if judges && deadline.left(&*self.parts.clock).is_none() {
                    let why = format!("{} did not send its shard in time", ranks(&missing));
                    Some(agreements.on_peers(step, InRam::GivenUp(why))?)
                } else {
                    if let Some(shard) = locked(&self.work).shards.get(&step) {
                        shard.save.set_waiting_for(ranks(&missing));
                    }
                    None
                }
            }
        };
        match said {
            None => Ok(false),
            Some(InRam::GivenUp(why)) => {
                self.fail_copies(step, &why);
                Ok(true)
            }
            Some(InRam::Whole) => {
                self.held_elsewhere(peers, step);
                Ok(true)
            }
        }
    }

    fn held_elsewhere(&self, peers: &Peers, step: u64) {
        let key = self.key_of(step);
        let older = {
            let mut work = locked(&self.work);
            if let Some(shard) = work.shards.get(&step) {
                shard.save.set_waiting_for(String::new());
                shard.save.reach(Level::Peer, false);
            }
            work.copies.now.take_if(|now| now.step == step);
            work.copies.trouble = false;
            let parent = self.parts.record.parent.map(|parent| parent.key());
            let before = work.copies.whole.replace(key.clone()).or(parent);
            // What was in doubt before is older still: all were told to keep it until now.
            work.copies.unsure.take().map(|(older, _)| older).or(before)
        };
        add(&self.parts.observer.counters.peer_whole, 1);
        tracing::info!("{key} is held on other nodes");
        self.parts.signal.notify();
        // The first ranks had their receipts a while ago.
        let (confirmed, all) = self.confirm_copies(peers, &key);
        if all {
            self.release_older(peers, &key);
        } else if let Some(older) = older {
            locked(&self.work).copies.unsure = Some((older, confirmed));
        }
        if self.parts.config.leads()
            && let Err(e) = self.parts.agreements.forget_copies_before(step)
        {
            tracing::warn!("older decisions stay: {}", e.chain());
        }
    }

    fn set_trouble(&self, trouble: bool) {
        let before = std::mem::replace(&mut locked(&self.work).copies.trouble, trouble);
        if before != trouble {
            self.parts.signal.notify();
        }
    }

    fn fail_copies(&self, step: u64, why: &str) {
        self.set_trouble(true);
        let mut work = locked(&self.work);
        work.copies.now.take_if(|now| now.step == step);
        let shard = work.shards.get(&step).cloned();
        drop(work);
        let error = not_on_peers(step, why);
        add(&self.parts.observer.counters.peer_failed, 1);
        self.parts.observer.error("peers_failed", Some(step), error.to_string());
        if let Some(shard) = shard {
            shard.save.fail(Level::Peer, &error);
        }
        self.parts.signal.notify();
    }
}

pub(super) fn not_on_peers(step: u64, why: &str) -> Error {
    Error::Skipped { step: Step(step), why: format!("it is not on other nodes: {why}") }
}

pub(super) fn passed_over_for_peers(step: u64, newer: u64) -> Error {
    let why = format!("it was passed over for other nodes: step {newer} is newer");
    Error::Skipped { step: Step(step), why }
}

/// A slot's bytes on their way: no more of them once the attempt has ended here.
struct Watched<'a> {
    payload: &'a SlotPayload,
    cascade: &'a Cascade,
}

impl Source for Watched<'_> {
    fn len(&self) -> u64 {
        self.payload.len
    }

    fn file(&self) -> Option<&std::fs::File> {
        Some(self.payload.slot.file()).filter(|_| !locked(&self.cascade.work).stop)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        if locked(&self.cascade.work).stop {
            return Err(Error::Fenced { why: "the attempt ended in this process".into() });
        }
        self.payload.read_into(offset, into)
    }
}
