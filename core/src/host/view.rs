//! A rank, and what this agent is to others, as people see it.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use super::{Host, seat::Seat};
use crate::{cascade::asked::ToBucket, clock::Clock, observe::locked};

/// A rank as people see it.
#[derive(Clone, Debug, Default)]
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
    /// The newest step that this owner saw held on other nodes, all ranks' shards.
    pub on_peers: Option<u64>,
    /// How many copies of its shard there are to be on other nodes.
    pub copies_wanted: u64,
    /// Live nodes that hold the shard that was sent last.
    pub copies_there: u64,
    /// The step that is on its way to disk.
    pub carrying: Option<u64>,
    /// Something is on its way to disk, or about to be.
    pub busy: bool,
    /// Bytes of its slots.
    pub slot_bytes: u64,
    /// Why nothing goes to disk, where that is so.
    pub trouble: Option<String>,
    /// The URL of the bucket that it goes to, if it goes to one.
    pub bucket: Option<String>,
    /// How far it is on the way there.
    pub to_bucket: ToBucket,
    /// Saves that were published here, since the rank was taken; so are all sums below.
    pub saves: u64,
    /// Saves that failed here.
    pub saves_failed: u64,
    /// Saves that were passed over because every slot was in use.
    pub saves_skipped: u64,
    /// Bytes that came into slots.
    pub captured_bytes: u64,
    /// Nanoseconds from a save's wish for a slot until its copy was complete there.
    pub captured_ns: u64,
    /// Bytes carried to disk.
    pub disk_bytes: u64,
    /// Nanoseconds of carrying to disk.
    pub disk_ns: u64,
    /// Checkpoints seen sealed on disk.
    pub disk_sealed: u64,
    /// Steps that were complete in RAM and passed over for disk.
    pub disk_passed_over: u64,
    /// Bytes sent to other nodes, all copies together.
    pub peer_bytes: u64,
    /// Nanoseconds of sending to other nodes.
    pub peer_ns: u64,
    /// Checkpoints seen held on other nodes.
    pub peer_whole: u64,
    /// Steps that did not get all their copies on other nodes.
    pub peer_failed: u64,
    /// Copies that another node refused, or did not take.
    pub peer_refused: u64,
    /// Bytes that came back from other nodes.
    pub peer_fetched_bytes: u64,
    /// Bytes sent to the bucket.
    pub object_bytes: u64,
    /// Nanoseconds of sending to the bucket.
    pub object_ns: u64,
    /// Checkpoints seen sealed in the bucket.
    pub object_sealed: u64,
    /// Steps that were due for the bucket and passed over for a newer one.
    pub object_passed_over: u64,
    /// Steps that were given up for the bucket.
    pub object_failed: u64,
    /// Bytes that came back from the bucket.
    pub object_fetched_bytes: u64,
    /// Chunks that did not match their checksum.
    pub checksum_failures: u64,
    /// Copies that were written anew from a good one.
    pub repairs: u64,
}

/// What an agent is to the others of its cluster. Sums are since it began.
#[derive(Clone, Debug)]
pub struct PeersView {
    /// Agents that are seen alive, this one among them.
    pub nodes_alive: u64,
    /// Agents that were alive and are not any more.
    pub nodes_lost: u64,
    /// Shards that are held for ranks of other nodes.
    pub held_shards: u64,
    /// Bytes of the slots for them.
    pub held_bytes: u64,
    /// Bytes of shards that came to be held.
    pub received_bytes: u64,
    /// Bytes that others read here.
    pub given_bytes: u64,
    /// Bytes sent for ranks whose node is lost.
    pub healed_bytes: u64,
    /// Shards that were not taken when they were offered.
    pub offers_refused: u64,
}

/// What was counted of it.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) received_bytes: AtomicU64,
    pub(super) given_bytes: AtomicU64,
    pub(super) healed_bytes: AtomicU64,
    pub(super) offers_refused: AtomicU64,
}

impl Host {
    /// What it is to others; `None`: it has none.
    #[must_use]
    pub fn peers(&self) -> Option<PeersView> {
        let network = self.network.get()?;
        let number = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        let shelves: Vec<_> =
            locked(&self.shelves).values().map(|(_, shelf)| shelf.clone()).collect();
        let sum = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Some(PeersView {
            nodes_alive: number(network.nodes().len()),
            nodes_lost: number(network.lost().len()),
            held_shards: number(shelves.iter().map(|shelf| shelf.held().len()).sum()),
            held_bytes: shelves.iter().map(|shelf| shelf.bytes()).sum(),
            received_bytes: sum(&self.tally.received_bytes),
            given_bytes: sum(&self.tally.given_bytes),
            healed_bytes: sum(&self.tally.healed_bytes),
            offers_refused: sum(&self.tally.offers_refused),
        })
    }
}

impl Seat {
    /// For people; `alive`: all nodes that are.
    pub(super) fn view(&self, clock: &dyn Clock, alive: &BTreeSet<String>) -> RankView {
        let (pid, gone) = (self.trainer(), self.gone_for(clock));
        let config = &self.keeper.place.config;
        let running = self.keeper.running();
        let cascade = running.as_ref().map(|(_, cascade)| cascade);
        let (wanted, there) = cascade.map_or((0, 0), |c| c.copies(alive));
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
            on_peers: cascade.and_then(|c| c.on_peers()),
            copies_wanted: wanted as u64,
            copies_there: there as u64,
            carrying: cascade.and_then(|c| c.carrying()),
            busy: cascade.is_some_and(|c| c.is_carrying()),
            slot_bytes: self.keeper.place.arena.bytes(),
            trouble: cascade.and_then(|c| c.trouble()),
            bucket: config.bucket.as_ref().map(|bucket| bucket.url.clone()),
            to_bucket: cascade.map(|c| c.to_bucket()).unwrap_or_default(),
            saves: sum(&counters.saves),
            saves_failed: sum(&counters.saves_failed),
            saves_skipped: sum(&counters.saves_skipped),
            captured_bytes: sum(&counters.captured_bytes),
            captured_ns: sum(&counters.stall_ns),
            disk_bytes: sum(&counters.disk_bytes),
            disk_ns: sum(&counters.disk_ns),
            disk_sealed: sum(&counters.disk_sealed),
            disk_passed_over: sum(&counters.disk_passed_over),
            peer_bytes: sum(&counters.peer_bytes),
            peer_ns: sum(&counters.peer_ns),
            peer_whole: sum(&counters.peer_whole),
            peer_failed: sum(&counters.peer_failed),
            peer_refused: sum(&counters.peer_refused),
            peer_fetched_bytes: sum(&counters.peer_fetched_bytes),
            object_bytes: sum(&counters.object_bytes),
            object_ns: sum(&counters.object_ns),
            object_sealed: sum(&counters.object_sealed),
            object_passed_over: sum(&counters.object_passed_over),
            object_failed: sum(&counters.object_failed),
            object_fetched_bytes: sum(&counters.object_fetched_bytes),
            checksum_failures: sum(&counters.checksum_failures),
            repairs: sum(&counters.repairs),
        }
    }
}
