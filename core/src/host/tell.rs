//! What a trainer is told without asking: how its saves are, what happened, which slots are gone.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tierkeep_proto::trainer::{self as wire, reply::Answer};

use super::{calls::is_busy, connection::Connection, seat::Seat};
use crate::{
    error::{Doing, Error, Result},
    observe::{Counters, locked},
    wire::convert,
};

/// How often it is looked with a save on its way (bytes grow without a signal), and without.
const BUSY: Duration = Duration::from_millis(100);
const IDLE: Duration = Duration::from_secs(1);

/// Events in one message at most.
const EVENTS_MAX: usize = 64;

/// Starts the thread that tells this connection.
pub(super) fn begin(connection: &Arc<Connection>, seat: &Arc<Seat>) -> Result<()> {
    let (connection, seat) = (connection.clone(), seat.clone());
    let thread = std::thread::Builder::new().name("tierkeep-tell".into());
    let told = thread.spawn(move || tell(&connection, &seat));
    told.map(drop).doing(|| "start a thread".into())
}

fn tell(connection: &Connection, seat: &Seat) {
    let signal = &seat.keeper.place.signal;
    let mut told = Known::default();
    while !connection.is_over() {
        let seen = signal.seen();
        if let Some(news) = told.news(seat)
            && !connection.answer(0, Answer::Told(news), &[])
        {
            return;
        }
        signal.wait(seen, if told.busy { BUSY } else { IDLE });
    }
}

/// What this connection was told last.
#[derive(Default)]
struct Known {
    saves: BTreeMap<u64, wire::SaveState>,
    busy: bool,
    fenced: bool,
    /// Nothing was told yet.
    begun: bool,
}

impl Known {
    fn news(&mut self, seat: &Seat) -> Option<wire::Told> {
        let mut news = wire::Told { busy: is_busy(seat), gone: seat.gone(), ..Default::default() };
        let saves: BTreeMap<u64, _> =
            seat.saves().iter().map(|save| (save.step(), save.state())).collect();
        let changed = saves.iter().filter(|(step, state)| self.saves.get(step) != Some(state));
        news.saves = changed.map(|(_, state)| state.clone()).collect();
        let observer = &seat.keeper.place.observer;
        while news.events.len() < EVENTS_MAX
            && let Ok(Some(event)) = observer.next(Duration::ZERO)
        {
            news.events.push(convert::event(&event));
        }
        if !self.fenced
            && let Err(e @ Error::Fenced { .. }) = seat.keeper.check_open(true)
        {
            news.fenced = e.chain();
            self.fenced = true;
        }
        news.counts = new_counts(&observer.counters, &mut locked(&seat.told));
        let any = !self.begun
            || news.busy != self.busy
            || !news.saves.is_empty()
            || !news.events.is_empty()
            || !news.gone.is_empty()
            || !news.fenced.is_empty()
            || news.counts.is_some();
        (self.saves, self.busy, self.begun) = (saves, news.busy, true);
        any.then_some(news)
    }
}

/// What was counted since the last time.
fn new_counts(counters: &Counters, told: &mut wire::Counts) -> Option<wire::Counts> {
    let now = wire::Counts {
        saves: counters.saves.load(Ordering::Relaxed),
        saves_failed: counters.saves_failed.load(Ordering::Relaxed),
        saves_skipped: counters.saves_skipped.load(Ordering::Relaxed),
        captured_bytes: counters.captured_bytes.load(Ordering::Relaxed),
        disk_bytes: counters.disk_bytes.load(Ordering::Relaxed),
        disk_ns: counters.disk_ns.load(Ordering::Relaxed),
        disk_sealed: counters.disk_sealed.load(Ordering::Relaxed),
        disk_passed_over: counters.disk_passed_over.load(Ordering::Relaxed),
        checksum_failures: counters.checksum_failures.load(Ordering::Relaxed),
        repairs: counters.repairs.load(Ordering::Relaxed),
        peer_bytes: counters.peer_bytes.load(Ordering::Relaxed),
        peer_ns: counters.peer_ns.load(Ordering::Relaxed),
        peer_whole: counters.peer_whole.load(Ordering::Relaxed),
        peer_failed: counters.peer_failed.load(Ordering::Relaxed),
        peer_refused: counters.peer_refused.load(Ordering::Relaxed),
        peer_fetched_bytes: counters.peer_fetched_bytes.load(Ordering::Relaxed),
        object_bytes: counters.object_bytes.load(Ordering::Relaxed),
        object_ns: counters.object_ns.load(Ordering::Relaxed),
        object_sealed: counters.object_sealed.load(Ordering::Relaxed),
        object_passed_over: counters.object_passed_over.load(Ordering::Relaxed),
        object_failed: counters.object_failed.load(Ordering::Relaxed),
        object_fetched_bytes: counters.object_fetched_bytes.load(Ordering::Relaxed),
    };
    let before = std::mem::replace(told, now);
    let new = wire::Counts {
        saves: now.saves - before.saves,
        saves_failed: now.saves_failed - before.saves_failed,
        saves_skipped: now.saves_skipped - before.saves_skipped,
        captured_bytes: now.captured_bytes - before.captured_bytes,
        disk_bytes: now.disk_bytes - before.disk_bytes,
        disk_ns: now.disk_ns - before.disk_ns,
        disk_sealed: now.disk_sealed - before.disk_sealed,
        disk_passed_over: now.disk_passed_over - before.disk_passed_over,
        checksum_failures: now.checksum_failures - before.checksum_failures,
        repairs: now.repairs - before.repairs,
        peer_bytes: now.peer_bytes - before.peer_bytes,
        peer_ns: now.peer_ns - before.peer_ns,
        peer_whole: now.peer_whole - before.peer_whole,
        peer_failed: now.peer_failed - before.peer_failed,
        peer_refused: now.peer_refused - before.peer_refused,
        peer_fetched_bytes: now.peer_fetched_bytes - before.peer_fetched_bytes,
        object_bytes: now.object_bytes - before.object_bytes,
        object_ns: now.object_ns - before.object_ns,
        object_sealed: now.object_sealed - before.object_sealed,
        object_passed_over: now.object_passed_over - before.object_passed_over,
        object_failed: now.object_failed - before.object_failed,
        object_fetched_bytes: now.object_fetched_bytes - before.object_fetched_bytes,
    };
    (new != wire::Counts::default()).then_some(new)
}
