//! One rank in an agent: its keeper, and what its trainer has in its hands.
//!
//! # Invariants
//!
//! - A slot that is being filled is busy until it is published, given back, or its trainer is dead.
//! - What a trainer says is answered by the connection that speaks for it: an older one that hangs on
//!   changes nothing any more.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use tierkeep_proto::trainer as wire;

use super::peer::{Peer, Who};
use crate::{
    cascade::Cascade,
    clock::Clock,
    error::{Error, Result},
    keeper::{Ending, Keeper},
    names::Step,
    observe::locked,
    restore::read::Restorable,
    save::{Save, forget_decided},
    snapshot::arena::Filling,
};

/// A slot in a trainer's hands.
pub(super) struct InHand {
    pub(super) filling: Filling,
    pub(super) cascade: Arc<Cascade>,
    pub(super) save: Save,
    /// When it was asked for.
    pub(super) since: Duration,
}

impl Default for Trainer {
    fn default() -> Self {
        Self::Gone { since: Duration::ZERO }
    }
}

/// Whether there is somebody who trains.
enum Trainer {
    /// It spoke through this connection last.
    Alive { connection: u64, peer: Arc<Peer>, hung_up: Option<Duration> },
    /// Since then.
    Gone { since: Duration },
}

#[derive(Default)]
struct State {
    trainer: Trainer,
    in_hand: HashMap<u64, InHand>,
    /// Slots that came back filled and are being published at this moment.
    publishing: HashSet<u64>,
    /// Slots that the trainer has mapped.
    mapped: HashSet<u64>,
    saves: BTreeMap<u64, Save>,
    shard: Option<Restorable>,
}

/// One rank.
pub(super) struct Seat {
    pub(super) keeper: Arc<Keeper>,
    pub(super) who: Who,
    /// How its trainer took the rank.
    pub(super) open: wire::Open,
    state: Mutex<State>,
    /// Counts that were told.
    pub(super) told: Mutex<wire::Counts>,
}

impl std::fmt::Debug for Seat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seat").field("name", &self.name()).finish_non_exhaustive()
    }
}

/// A trainer whose death nothing can tell (it is in another pid namespace) counts as dead when it has
/// hung up for this long: its agent's end of the socket is closed by the kernel, so it would be back.
const UNSEEN: Duration = Duration::from_secs(60);

/// The newest saves that are passed on to a trainer.
const SAVES_KEPT: usize = 64;

impl Seat {
    pub(super) fn new(keeper: Keeper, open: &wire::Open, connection: u64, peer: Arc<Peer>) -> Self {
        let who = peer.who.clone();
        let open = wire::Open { back: None, ..open.clone() };
        let trainer = Trainer::Alive { connection, peer, hung_up: None };
        let state = State { trainer, ..State::default() };
        let (state, told) = (Mutex::new(state), Mutex::default());
        Self { keeper: Arc::new(keeper), who, open, state, told }
    }

    /// One that an agent before this one had; `peer` trains it, if anybody does.
    pub(super) fn left(
        keeper: Keeper,
        who: Who,
        open: wire::Open,
        peer: Option<Peer>,
        clock: &dyn Clock,
    ) -> Self {
        let now = clock.monotonic();
        let trainer = match peer {
            Some(peer) => {
                Trainer::Alive { connection: 0, peer: Arc::new(peer), hung_up: Some(now) }
            }
            None => Trainer::Gone { since: now },
        };
        let state = State { trainer, ..State::default() };
        let (state, told) = (Mutex::new(state), Mutex::default());
        Self { keeper: Arc::new(keeper), who, open, state, told }
    }

    /// `rank 3 of /ckpt/run`, for people.
    pub(super) fn name(&self) -> String {
        let config = &self.keeper.place.config;
        format!("rank {} of {}", config.rank, config.destination.display())
    }

    /// The process that trains, as far as anybody knows.
    pub(super) fn trainer(&self) -> Option<u32> {
        match &locked(&self.state).trainer {
            Trainer::Alive { peer, .. } => Some(peer.pid),
            Trainer::Gone { .. } => None,
        }
    }

    /// For how long nobody has trained.
    pub(super) fn gone_for(&self, clock: &dyn Clock) -> Option<Duration> {
        match &locked(&self.state).trainer {
            Trainer::Alive { .. } => None,
            Trainer::Gone { since } => Some(clock.monotonic().saturating_sub(*since)),
        }
    }

    /// The process that trains, where it is another one than `newcomer`.
    pub(super) fn other_trainer(&self, newcomer: &Peer) -> Option<u32> {
        match &locked(&self.state).trainer {
            Trainer::Alive { peer, .. } if !peer.is(newcomer) => Some(peer.pid),
            _ => None,
        }
    }

    /// The same trainer is back, through another connection.
    ///
    /// # Errors
    /// It is back through a newer one already.
    pub(super) fn come_back(
        &self,
        connection: u64,
        peer: Arc<Peer>,
        back: &wire::Back,
    ) -> Result<()> {
        let mut state = locked(&self.state);
        if matches!(&state.trainer, Trainer::Alive { connection: newer, .. } if *newer > connection)
        {
            return Err(Error::Fenced { why: "its trainer is back already".into() });
        }
        state.trainer = Trainer::Alive { connection, peer, hung_up: None };
        state.mapped = back.mapped.iter().copied().collect();
        // A slot whose answer was lost: the trainer does not know that it has it.
        let known: HashSet<u64> = back.filling.iter().map(|f| f.slot).collect();
        let unknown: Vec<u64> =
            state.in_hand.keys().filter(|slot| !known.contains(slot)).copied().collect();
        let dropped: Vec<_> = unknown.iter().filter_map(|s| state.in_hand.remove(s)).collect();
        drop(state);
        drop(dropped); // Each tells the arena.
        Ok(())
    }

    /// The slots that a trainer of an agent that is gone is filling; those that are no more.
    pub(super) fn take_in_hand(&self, filling: &[wire::Filling]) -> Vec<u64> {
        let mut lost = Vec::new();
        for wire::Filling { slot, step } in filling {
            let state = locked(&self.state);
            if state.in_hand.contains_key(slot) || state.publishing.contains(slot) {
                continue;
            }
            drop(state);
            let Some((record, cascade)) = self.keeper.running() else {
                lost.push(*slot);
                continue;
            };
            let key = crate::names::CheckpointKey::new(Step(*step), &record.attempt);
            if self.keeper.place.arena.has(*slot, &key) {
                continue; // Published: only the answer was lost.
            }
            match self.keeper.place.arena.refill(*slot) {
                Some(filling) => {
                    let save = self.follow_save(*step);
                    let since = self.keeper.place.clock.monotonic();
                    let in_hand = InHand { filling, cascade, save, since };
                    locked(&self.state).in_hand.insert(*slot, in_hand);
                }
                None => lost.push(*slot),
            }
        }
        lost
    }

    /// The connection has ended. `dead`: so has the process.
    pub(super) fn hung_up(&self, id: u64, dead: bool, clock: &dyn Clock) {
        let mut state = locked(&self.state);
        match &mut state.trainer {
            Trainer::Alive { connection, hung_up, .. } if *connection == id => {
                hung_up.get_or_insert(clock.monotonic());
            }
            _ => return,
        }
        drop(state);
        if dead {
            self.died(clock);
        }
    }

    /// Whether the trainer has died unseen.
    pub(super) fn has_lost_trainer(&self, clock: &dyn Clock) -> bool {
        match &locked(&self.state).trainer {
            Trainer::Gone { .. } => false,
            Trainer::Alive { peer, hung_up, .. } => peer.is_dead().unwrap_or_else(|| {
                hung_up.is_some_and(|since| clock.monotonic().saturating_sub(since) > UNSEEN)
            }),
        }
    }

    /// Tells the seat, where its trainer has died unseen.
    pub(super) fn look_for_death(&self, clock: &dyn Clock) {
        if self.has_lost_trainer(clock) {
            self.died(clock);
        }
    }

    /// Nobody trains any more: what was being filled is of no use, what was published goes on.
    pub(super) fn died(&self, clock: &dyn Clock) {
        let mut state = locked(&self.state);
        state.trainer = Trainer::Gone { since: clock.monotonic() };
        let in_hand = std::mem::take(&mut state.in_hand);
        state.mapped.clear();
        state.shard = None;
        drop(state);
        let count = in_hand.len();
        drop(in_hand);
        self.keeper.end_start();
        self.keeper.place.signal.notify();
        tracing::info!(
            "the trainer of {} is gone{}",
            self.name(),
            if count > 0 { ", in the middle of a copy" } else { "" }
        );
    }

    /// It asks the leader nothing any more.
    pub(super) fn say_bye(&self) {
        let Some((_, cascade)) = self.keeper.running() else { return };
        if cascade.agreements().is_spread()
            && let Err(e) = cascade.agreements().say_bye(self.keeper.place.config.rank)
        {
            tracing::debug!("{}: {}", self.name(), e.chain());
        }
    }

    /// It leads ranks on other nodes that have not closed.
    pub(super) fn is_asked(&self) -> bool {
        let Some((_, cascade)) = self.keeper.running() else { return false };
        let leads = self.keeper.place.config.leads() && cascade.agreements().is_spread();
        let ranks = self.keeper.roster().into_iter().map(|(rank, _)| rank);
        leads && !cascade.agreements().all_said_bye(ranks).unwrap_or(false)
    }

    /// It led ranks on other nodes, and all of them have closed.
    fn is_left(&self) -> bool {
        let Some((_, cascade)) = self.keeper.running() else { return false };
        let leads = self.keeper.place.config.leads() && cascade.agreements().is_spread();
        leads && !self.is_asked()
    }

    /// An attempt has begun.
    pub(super) fn has_begun(&self) -> bool {
        self.keeper.running().is_some()
    }

    /// Nothing would be lost with its memory.
    pub(super) fn is_durable(&self) -> bool {
        match self.keeper.running() {
            Some((_, cascade)) => cascade.is_durable(),
            // What an attempt before it has left: nobody carries it until one begins.
            None => self.keeper.place.arena.holds().is_empty(),
        }
    }

    /// True where nobody has trained for `idle` and nothing would be lost with its memory, or where
    /// nobody has begun to: whoever had the rank before is to have it again.
    pub(super) fn is_done(&self, clock: &dyn Clock, idle: Duration) -> bool {
        let Some(gone) = self.gone_for(clock) else { return false };
        let Some((_, cascade)) = self.keeper.running() else { return true };
        if gone < idle && !self.is_left() {
            return false;
        }
        // What never became due for disk goes there now: nobody will save anything newer.
        cascade.hurry();
        let carried = !cascade.is_carrying() && (cascade.is_durable() || cascade.is_fenced());
        carried && (cascade.is_fenced() || !cascade.is_sending())
    }

    /// True where it would be done, but that something is on its way to the bucket: that is read from disk,
    /// so its memory can go back meanwhile.
    pub(super) fn may_rest(&self, clock: &dyn Clock, idle: Duration) -> bool {
        let Some(gone) = self.gone_for(clock) else { return false };
        let Some((_, cascade)) = self.keeper.running() else { return false };
        let has_memory = self.keeper.place.arena.bytes() > 0;
        let carried = !cascade.is_carrying() && cascade.is_durable();
        gone >= idle && has_memory && carried && cascade.is_sending()
    }

    /// Its memory goes back. In the hands of whoever holds its chair: nobody takes the rank meanwhile.
    pub(super) fn rest(&self) {
        if let Err(e) = self.keeper.place.arena.give_back() {
            tracing::warn!("{}: memory was not given back: {}", self.name(), e.chain());
        }
    }

    /// Something is on its way to disk.
    pub(super) fn is_busy(&self) -> bool {
        self.keeper.running().is_some_and(|(_, cascade)| cascade.is_carrying())
    }

    /// Something is on its way to the bucket.
    pub(super) fn is_sending(&self) -> bool {
        self.keeper.running().is_some_and(|(_, cascade)| cascade.is_sending())
    }

    /// Ends the keeper.
    pub(super) fn end(&self, ending: Ending) {
        // What goes back is not for the next agent to find.
        if ending == Ending::Clean
            && let Err(e) = self.forget()
        {
            tracing::warn!("{}: {}", self.name(), e.chain());
        }
        let in_hand = std::mem::take(&mut locked(&self.state).in_hand);
        self.keeper.shut(ending);
        drop(in_hand);
    }

    /// The save of a step, passed on to the trainer from here on.
    pub(super) fn follow_save(&self, step: u64) -> Save {
        let save = Save::told_by(step, self.keeper.place.signal.clone());
        let mut state = locked(&self.state);
        state.saves.insert(step, save.clone());
        forget_decided(&mut state.saves, SAVES_KEPT);
        save
    }

    pub(super) fn save(&self, step: u64) -> Option<Save> {
        locked(&self.state).saves.get(&step).cloned()
    }

    pub(super) fn saves(&self) -> Vec<Save> {
        locked(&self.state).saves.values().cloned().collect()
    }

    pub(super) fn forget_saves(&self) {
        locked(&self.state).saves.clear();
    }

    /// The trainer has the slot; true where it had it mapped already. An error: that connection
    /// speaks for nobody any more.
    pub(super) fn hand_out(&self, connection: u64, in_hand: InHand) -> Result<bool> {
        let inode = in_hand.filling.slot().inode();
        let mut state = locked(&self.state);
        if !state.speaks(connection) {
            drop(state);
            drop(in_hand);
            return Err(Error::Fenced { why: "the trainer has gone".into() });
        }
        let mapped = !state.mapped.insert(inode);
        state.in_hand.insert(inode, in_hand);
        Ok(mapped)
    }

    /// The slot comes back, filled or not.
    pub(super) fn take_back(&self, connection: u64, slot: u64) -> Option<InHand> {
        let mut state = locked(&self.state);
        if !state.speaks(connection) {
            return None; // The same trainer has it, through a newer connection.
        }
        state.in_hand.remove(&slot)
    }

    /// The slot comes back, filled with `step`: it is on its way into the ram tier until
    /// [`is_published`](Self::is_published).
    pub(super) fn take_filled(&self, slot: u64, step: u64) -> Option<InHand> {
        let mut state = locked(&self.state);
        state.in_hand.get(&slot).filter(|h| h.save.step() == step)?;
        state.publishing.insert(slot);
        state.in_hand.remove(&slot)
    }

    /// The slot is published, or was not.
    pub(super) fn is_published(&self, slot: u64) {
        locked(&self.state).publishing.remove(&slot);
        self.keeper.place.signal.notify();
    }

    /// Another connection's question is publishing it.
    pub(super) fn is_publishing(&self, slot: u64) -> bool {
        locked(&self.state).publishing.contains(&slot)
    }

    /// Slots that the trainer has not mapped; it does from here on.
    pub(super) fn unmapped(&self, most: usize) -> Vec<Arc<crate::snapshot::slot::Slot>> {
        let ready = self.keeper.place.arena.ready_slots();
        let mut state = locked(&self.state);
        let new = ready.into_iter().filter(|slot| !state.mapped.contains(&slot.inode()));
        let new: Vec<_> = new.take(most).collect();
        state.mapped.extend(new.iter().map(|slot| slot.inode()));
        new
    }

    /// Slots that the trainer has mapped and that are no more.
    pub(super) fn gone(&self) -> Vec<u64> {
        let mut state = locked(&self.state);
        if state.mapped.is_empty() {
            return Vec::new();
        }
        let here = self.keeper.place.arena.inodes();
        let gone: Vec<u64> = state.mapped.iter().filter(|s| !here.contains(s)).copied().collect();
        for slot in &gone {
            state.mapped.remove(slot);
        }
        gone
    }

    pub(super) fn set_shard(&self, shard: Option<Restorable>) {
        locked(&self.state).shard = shard;
    }

    pub(super) fn shard(&self) -> Option<Restorable> {
        locked(&self.state).shard.clone()
    }
}

impl State {
    fn speaks(&self, id: u64) -> bool {
        matches!(self.trainer, Trainer::Alive { connection, .. } if connection == id)
    }
}
