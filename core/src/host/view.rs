//! A rank as people see it.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use super::seat::Seat;
use crate::clock::Clock;

/// A rank as people see it.
#[derive(Clone, Debug)]
pub struct RankView {
    /// The run's directory.
    pub destination: PathBuf,
    /// Which rank of it.
    pub rank: u32,
    /// How many the job has.
    pub world: u32,
    /// Whose it is.
    pub uid: u32,
    /// The process that trains; `None`: it is gone.
    pub pid: Option<u32>,
    /// For how long it has been gone.
    pub gone: Option<Duration>,
    /// The attempt, once begun.
    pub attempt: Option<u32>,
    /// The newest step that is complete in RAM.
    pub in_ram: Option<u64>,
    /// The newest step that this owner saw sealed on disk.
    pub on_disk: Option<u64>,
    /// The step that is on its way to disk.
    pub carrying: Option<u64>,
    /// Something is on its way to disk, or about to be.
    pub busy: bool,
    /// Bytes of its slots.
    pub slot_bytes: u64,
    /// Why nothing goes to disk, where that is so.
    pub trouble: Option<String>,
    /// Saves that were published here, since the rank was taken; so are all sums below.
    pub saves: u64,
    /// Saves that failed here.
    pub saves_failed: u64,
    /// Saves that were passed over because every slot was in use.
    pub saves_skipped: u64,
    /// Bytes that came into slots.
    pub captured_bytes: u64,
    /// Bytes carried to disk.
    pub disk_bytes: u64,
    /// Nanoseconds of carrying to disk.
    pub disk_ns: u64,
    /// Checkpoints seen sealed on disk.
    pub disk_sealed: u64,
    /// Steps that were complete in RAM and passed over for disk.
    pub disk_passed_over: u64,
    /// Chunks that did not match their checksum.
    pub checksum_failures: u64,
    /// Copies that were written anew from a good one.
    pub repairs: u64,
}

impl Seat {
    /// For people.
    pub(super) fn view(&self, clock: &dyn Clock) -> RankView {
        let (pid, gone) = (self.trainer(), self.gone_for(clock));
        let config = &self.keeper.place.config;
        let running = self.keeper.running();
        let cascade = running.as_ref().map(|(_, cascade)| cascade);
        let counters = &self.keeper.place.observer.counters;
        let sum = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        RankView {
            destination: config.destination.clone(),
            rank: config.rank,
            world: config.world,
            uid: self.who.uid,
            pid,
            gone,
            attempt: running.as_ref().map(|(record, _)| record.attempt.number),
            in_ram: cascade.and_then(|c| c.newest()).map(|key| key.step.0),
            on_disk: cascade.and_then(|c| c.sealed()),
            carrying: cascade.and_then(|c| c.carrying()),
            busy: cascade.is_some_and(|c| c.is_carrying()),
            slot_bytes: self.keeper.place.arena.bytes(),
            trouble: cascade.and_then(|c| c.trouble()),
            saves: sum(&counters.saves),
            saves_failed: sum(&counters.saves_failed),
            saves_skipped: sum(&counters.saves_skipped),
            captured_bytes: sum(&counters.captured_bytes),
            disk_bytes: sum(&counters.disk_bytes),
            disk_ns: sum(&counters.disk_ns),
            disk_sealed: sum(&counters.disk_sealed),
            disk_passed_over: sum(&counters.disk_passed_over),
            checksum_failures: sum(&counters.checksum_failures),
            repairs: sum(&counters.repairs),
        }
    }
}
