//! A host that goes away: what is only in RAM goes to disk, before a deadline.
//!
//! # Invariants
//!
//! - What is most exposed goes first: runs without any checkpoint on disk before those that have an
//!   older one.
//! - A run whose disk hangs keeps no other from its turn: each has its share of the time.
//! - What is reported as durable is sealed.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use super::{Host, seat::Seat};
use crate::{
    clock::{Clock, Deadline},
    observe::locked,
};

/// What a drain did for one rank.
#[derive(Clone, Debug)]
pub struct Drained {
    /// The run's directory.
    pub destination: PathBuf,
    /// Which rank of it.
    pub rank: u32,
    /// The newest step that is complete in RAM.
    pub in_ram: Option<u64>,
    /// The newest step that is sealed on disk.
    pub on_disk: Option<u64>,
    /// Nothing would be lost with this host's memory.
    pub durable: bool,
    /// Why it is not, where something is known.
    pub trouble: Option<String>,
}

/// How often it is looked how far it is.
const LOOK: Duration = Duration::from_millis(20);

impl Host {
    /// Carries everything that is only in RAM to disk, whatever the schedules say, and reports what
    /// made it `within` the time. Trainers go on; ranks of other hosts are not waited for.
    #[must_use]
    pub fn drain(&self, within: Duration) -> Vec<Drained> {
        let deadline = Deadline::after(&self.clock, within);
        let mut runs: BTreeMap<PathBuf, Vec<Arc<Seat>>> = BTreeMap::new();
        let (seats, unseen) = self.seats_by(&Deadline::after(&self.clock, within.min(BUSY_WAIT)));
        for seat in seats {
            runs.entry(seat.keeper.place.config.destination.clone()).or_default().push(seat);
        }
        let mut runs: Vec<Vec<Arc<Seat>>> = runs.into_values().collect();
        runs.sort_by_key(|seats| seats.iter().map(|seat| seat.drained().on_disk).min());
        let mut left = runs.len();
        for seats in &runs {
            seats.iter().for_each(|seat| seat.hurry());
            let share =
                deadline.left(&self.clock).unwrap_or_default() / u32::try_from(left).unwrap_or(1);
            let turn = Deadline::after(&self.clock, share);
            left -= 1;
            while !seats.iter().all(|seat| seat.drained().durable)
                && turn.left(&self.clock).is_some()
            {
                self.clock.pause(LOOK);
                seats.iter().for_each(|seat| seat.hurry()); // A disk that refused it may have room now.
            }
        }
        // Whoever was slow in its own turn has the rest.
        while !runs.iter().flatten().all(|seat| seat.drained().durable)
            && deadline.left(&self.clock).is_some()
        {
            self.clock.pause(LOOK);
            runs.iter().flatten().for_each(|seat| seat.hurry());
        }
        runs.iter().flatten().map(|seat| seat.drained()).chain(unseen).collect()
    }

    /// This node is to go away, and why; or it stays after all. While it is to go, the newest step goes to
    /// disk and bucket at once, and the newest again now and then (`cascade/leaving.rs`). Other nodes are
    /// told by whoever told this one ([`Network::leaving`](crate::peers::Network::leaving)): they send
    /// nothing here that can go elsewhere.
    pub fn leave(&self, why: Option<&str>) {
        let mut leaving = locked(&self.leaving);
        if leaving.as_deref() != why {
            *leaving = why.map(String::from);
            self.changed.notify();
        }
    }

    /// Why this node is to go away, where it is.
    #[must_use]
    pub fn leaving(&self) -> Option<String> {
        locked(&self.leaving).clone()
    }

    /// Tells the ranks whose run has a rank on a node that is to go away.
    pub(super) fn take_leave(&self) {
        let away = self.network.get().map(|network| network.leaving()).unwrap_or_default();
        let own = locked(&self.leaving).is_some();
        for seat in self.seats() {
            let Some((_, cascade)) = seat.keeper.running() else { continue };
            // Whoever leads knows where the others are, and chooses for them.
            let others = || !away.is_disjoint(&seat.keeper.nodes());
            cascade.leave(own || (!away.is_empty() && others()));
        }
    }

    /// Every rank, those too that somebody opens or closes at this moment; and what is said of one that
    /// stays so.
    fn seats_by(&self, deadline: &Deadline) -> (Vec<Arc<Seat>>, Vec<Drained>) {
        let (mut seats, mut unseen) = (Vec::new(), Vec::new());
        for ((destination, rank), chair) in self.chairs() {
            loop {
                if let Some(taken) = chair.try_lock() {
                    seats.extend(taken.clone());
                    break;
                }
                if deadline.left(&self.clock).is_none() {
                    let trouble = Some("it is being opened or closed at this moment".into());
                    let (in_ram, on_disk, durable) = (None, None, false);
                    unseen.push(Drained { destination, rank, in_ram, on_disk, durable, trouble });
                    break;
                }
                self.clock.pause(LOOK);
            }
        }
        (seats, unseen)
    }
}

/// How long a rank may be in somebody's hands before a drain goes on without it.
const BUSY_WAIT: Duration = Duration::from_secs(2);

impl Seat {
    /// What is newest goes to disk now.
    fn hurry(&self) {
        if let Some((_, cascade)) = self.keeper.running() {
            cascade.hurry();
        }
    }

    fn drained(&self) -> Drained {
        let config = &self.keeper.place.config;
        let running = self.keeper.running();
        let cascade = running.as_ref().map(|(_, cascade)| cascade);
        Drained {
            destination: config.destination.clone(),
            rank: config.rank,
            in_ram: cascade.and_then(|c| c.newest()).map(|key| key.step.0),
            on_disk: cascade.and_then(|c| c.sealed()),
            durable: self.is_durable(),
            trouble: cascade.and_then(|c| c.trouble()),
        }
    }
}
