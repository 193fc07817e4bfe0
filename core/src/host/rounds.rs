//! Ranks that have nobody: their trainer died unseen, or is gone for so long that its memory goes back.
//!
//! # Invariants
//!
//! - What is done to a user's files is done as that user, on a thread of its own: a disk that hangs
//!   keeps no other rank waiting.
//! - A rank that nobody began to train is its trainer's before it, whose attempt goes on.

use std::{path::PathBuf, sync::Arc};

use super::{Host, LEFT_AFTER, ROUND, chair::Chair, seat::Seat};
use crate::{
    clock::{Clock, Deadline},
    keeper::Ending,
    observe::locked,
};

impl Host {
    /// Looks after ranks that have nobody.
    pub(super) fn go_round(self: &Arc<Self>) {
        self.know_shelves_again();
        let mut worked = true;
        let mut grace = Some(Deadline::after(&self.clock, LEFT_AFTER));
        while !self.is_ending() {
            let seen = self.changed.seen();
            if grace.take_if(|grace| grace.left(&self.clock).is_none()).is_some() {
                self.own_what_is_left();
            }
            // Sealing reads the manifests of all ranks: what that took is given back.
            self.end_transfers();
            self.heal();
            self.take_leave();
            let works = self.seats().iter().any(|seat| seat.is_busy());
            let due = works || worked;
            let done = due && crate::sys::give_free_memory_back(self.clock.monotonic());
            worked = works || (due && !done);
            for (place, chair) in self.chairs() {
                // Somebody is opening it: then it has somebody.
                let Some(taken) = chair.try_lock() else { continue };
                let Some(seat) = taken.clone() else { continue };
                drop(taken);
                let idle = self.settings.idle;
                let cares = seat.is_done(&self.clock, idle) || seat.may_rest(&self.clock, idle);
                if seat.has_lost_trainer(&self.clock) || cares {
                    let host = self.clone();
                    let care = move || host.care_for(&place, &chair, &seat);
                    let thread = std::thread::Builder::new().name("tierkeep-care".into());
                    if let Err(e) = thread.spawn(care) {
                        tracing::error!("no thread to look after a rank: {e}");
                    }
                }
            }
            self.changed.wait(seen, ROUND);
        }
    }

    /// Looks after a rank whose trainer is gone: on a thread of its own, which acts as its user and may
    /// meet a disk that hangs.
    fn care_for(self: &Arc<Self>, place: &(PathBuf, u32), chair: &Arc<Chair>, seat: &Arc<Seat>) {
        if let Err(e) = self.users.act_as(&seat.who) {
            tracing::error!("{}: {}", seat.name(), e.chain());
            return;
        }
        // Somebody else is at it: then it has somebody.
        let Some(mut taken) = chair.try_lock() else { return };
        if !taken.as_ref().is_some_and(|there| Arc::ptr_eq(there, seat)) {
            return;
        }
        seat.look_for_death(&self.clock);
        if seat.may_rest(&self.clock, self.settings.idle) {
            seat.rest();
        }
        if !seat.is_done(&self.clock, self.settings.idle) {
            return;
        }
        let begun = seat.has_begun();
        if begun {
            tracing::info!("{} gives its memory back", seat.name());
            seat.end(Ending::Clean);
        } else {
            seat.end(Ending::Now);
        }
        *taken = None;
        drop(taken);
        self.forget(place, chair);
        let words = seat.words();
        if !begun && words.exists() {
            // Nobody came after the trainer before: its attempt goes on to disk.
            if let Err(e) = self.own_again(&words) {
                tracing::warn!("{} stays as it lies: {}", seat.name(), e.chain());
            }
        }
    }

    /// Removes an empty chair, unless somebody is at it.
    pub(super) fn forget(&self, place: &(PathBuf, u32), chair: &Arc<Chair>) {
        let mut chairs = locked(&self.chairs);
        // One in the table, one in the caller's hands.
        if Arc::strong_count(chair) <= 2 && chair.try_lock().is_some_and(|taken| taken.is_none()) {
            chairs.remove(place);
        }
    }
}
