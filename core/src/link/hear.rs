//! The thread that hears an agent: answers, news, and its silence. It finds the next agent when one
//! goes away.
//!
//! # Invariants
//!
//! - What the trainer holds is told to the next agent before anything is asked of it.
//! - It tries for ever, until the handle is closed or the rank is another's.

use std::{io, os::unix::net::UnixStream, sync::Arc, time::Duration};

use tierkeep_proto::trainer::{self as wire, Opened, Reply, reply::Answer, request::Call};

use super::{
    SHORT, Shared,
    dial::{Dial, is_away, odd},
};
use crate::{
    error::{Doing, Error, ErrorKind, Result},
    observe::{Counters, add, locked},
    save::Level,
    wire::{FRAME_BYTES_MAX, convert, receive},
};

/// Between two tries to find an agent: quickly at first, an upgrade takes a moment.
const PAUSES: [Duration; 3] =
    [Duration::from_millis(20), Duration::from_millis(100), Duration::from_millis(500)];

/// Starts the thread.
pub(super) fn begin(shared: &Arc<Shared>, dial: &Arc<Dial>, stream: UnixStream) -> Result<()> {
    let (shared, dial) = (shared.clone(), dial.clone());
    let stream = Arc::new(stream);
    dial.install(stream.clone());
    let thread = std::thread::Builder::new().name("tierkeep-hear".into());
    thread.spawn(move || run(&shared, &dial, stream)).map(drop).doing(|| "start a thread".into())
}

fn run(shared: &Arc<Shared>, dial: &Arc<Dial>, mut stream: Arc<UnixStream>) {
    loop {
        let ended = listen(shared, dial, &stream);
        if dial.lose() {
            return;
        }
        let why = ended.err().map_or_else(String::new, |e| format!(": {e}"));
        let text = format!("the agent went away{why}; training goes on, it is looked for");
        shared.desk.observer.warn("agent_away", None, text);
        match find_next(shared, dial) {
            Some(next) => stream = next,
            None => return,
        }
        shared.desk.observer.info("agent_back", None, "the agent is back");
    }
}

/// Until the other side hangs up.
fn listen(shared: &Shared, dial: &Dial, stream: &UnixStream) -> io::Result<()> {
    while let Some((reply, fds)) = receive::<Reply>(stream, FRAME_BYTES_MAX)? {
        match reply {
            Reply { id: 0, answer: Some(Answer::Told(told)) } => learn(shared, told),
            other => dial.hear(other, fds),
        }
    }
    Ok(())
}

/// `None`: the handle is closed, or the rank is another's.
fn find_next(shared: &Arc<Shared>, dial: &Arc<Dial>) -> Option<Arc<UnixStream>> {
    let mut told = String::new();
    for tries in 0.. {
        if dial.is_closed() {
            return None;
        }
        let back = shared.back();
        match dial.again(back.clone()) {
            Ok((stream, opened)) => {
                let stream = Arc::new(stream);
                dial.install(stream.clone());
                shared.told_failed(&back.failed);
                come_back(shared, dial, &opened, &back);
                return Some(stream);
            }
            Err(e) if e.kind() == ErrorKind::Fenced => {
                shared.fence(&e.chain(), true);
                dial.give_up(&e.chain());
                return None;
            }
            Err(e) => {
                let why = e.chain();
                let away = matches!(&e, Error::Io { source, .. } if is_away(source));
                if !away && why != told {
                    let text = format!("the agent does not take this rank back yet: {why}");
                    shared.desk.observer.warn("agent_away", None, text);
                    told = why;
                }
            }
        }
        dial.rest(PAUSES[(tries / 10).min(PAUSES.len() - 1)]);
    }
    None
}

/// The next agent knows what was `said`. What was filled is published, what was given back meanwhile
/// is given back, what else was to be told meanwhile is told.
fn come_back(shared: &Arc<Shared>, dial: &Arc<Dial>, opened: &Opened, said: &wire::Back) {
    // Of now: from here on whoever has something to tell reaches the agent by himself.
    let late = late(shared, said);
    let mut state = locked(&shared.state);
    state.busy = opened.busy;
    for slot in &opened.lost {
        if let Some(lost) = state.unpublished.remove(slot) {
            let why = "its slot is gone: the agent came back without it".into();
            let step = crate::names::Step(lost.save.step());
            lost.save.fail(Level::Ram, &Error::Skipped { step, why });
        }
        state.slots.remove(slot);
    }
    let publish: Vec<wire::Publish> =
        state.unpublished.values().map(|unpublished| unpublished.publish.clone()).collect();
    let abandoned: Vec<u64> = said
        .filling
        .iter()
        .map(|filling| filling.slot)
        .filter(|slot| !state.filling.contains_key(slot) && !state.unpublished.contains_key(slot))
        .collect();
    drop(state);
    if publish.is_empty() && abandoned.is_empty() && late.is_empty() {
        return;
    }
    // On a thread of its own: this one hears the answers.
    let (shared, dial) = (shared.clone(), dial.clone());
    let work = move || {
        for call in late {
            // Lost once more, it will be told to the next one.
            if let Ok(Some(_)) = dial.ask_until(&call, SHORT, None)
                && let Call::GiveUp(told) = call
            {
                shared.told_failed(&told.steps);
            }
        }
        for slot in abandoned {
            // Lost once more, it will be told to the next one.
            let _ = dial.ask_now(Call::Abandon(wire::Abandon { slot }), SHORT);
        }
        for publish in publish {
            shared.publish_again(&dial, publish);
        }
    };
    if let Err(e) = std::thread::Builder::new().name("tierkeep-publish".into()).spawn(work) {
        tracing::error!("no thread to publish what was filled: {e}");
    }
}

/// What happened while the agent was being told what was `said`.
fn late(shared: &Shared, said: &wire::Back) -> Vec<Call> {
    let now = shared.back();
    let mut late = Vec::new();
    if let Some(step) = now.stop_after.filter(|_| now.stop_after != said.stop_after) {
        late.push(Call::StopAfter(wire::StopAfter { step }));
    }
    let steps: Vec<u64> = now.failed.into_iter().filter(|s| !said.failed.contains(s)).collect();
    if !steps.is_empty() {
        late.push(Call::GiveUp(wire::GiveUp { steps }));
    }
    if !shared.desk.config.saves() {
        let follow = now.saves.into_iter().filter(|step| !said.saves.contains(step));
        late.extend(follow.map(|step| Call::Follow(wire::Follow { step })));
    }
    late
}

impl Shared {
    /// Publishes a slot whose agent went away before it answered.
    fn publish_again(&self, dial: &Dial, publish: wire::Publish) {
        let slot = publish.slot;
        let asked = dial.ask_until(&Call::Publish(publish), super::going::PUBLISH, None);
        let (said, failed) = match asked {
            Ok(None) => return, // Away again: the next one is asked.
            Ok(Some((Answer::Published(published), _))) => (published.save, None),
            Ok(Some(_)) => (None, Some(odd("Publish"))),
            Err(e) => (None, Some(e)),
        };
        let mut state = locked(&self.state);
        let Some(unpublished) = state.unpublished.remove(&slot) else { return };
        if failed.is_none() {
            state.published.insert(unpublished.publish.step);
        }
        drop(state);
        if let Some(said) = said {
            unpublished.save.learn(said);
        }
        if let Some(e) = failed {
            let step = unpublished.save.step();
            add(&self.desk.observer.counters.saves_failed, 1);
            let text = format!("step {step} was not saved: {}", e.chain());
            self.desk.observer.error("save_failed", Some(step), text);
            unpublished.save.fail(Level::Ram, &e);
        }
        self.desk.signal.notify();
    }
}

fn learn(shared: &Shared, told: wire::Told) {
    let observer = &shared.desk.observer;
    if let Some(counts) = told.counts {
        count(&observer.counters, &counts);
    }
    // Before those who wait are woken: they may look at once.
    told.events.into_iter().for_each(|event| observer.tell(convert::event_of(event)));
    let mut state = locked(&shared.state);
    state.busy = told.busy;
    let mut gone = Vec::new();
    for slot in &told.gone {
        if !state.filling.contains_key(slot) {
            gone.extend(state.slots.remove(slot));
        }
    }
    let known: Vec<_> = told
        .saves
        .into_iter()
        .filter_map(|said| state.saves.get(&said.step).map(|save| (save.clone(), said)))
        .collect();
    drop(state);
    drop(gone); // Unmapped, which takes its time.
    for (save, said) in known {
        save.learn(said);
    }
    if !told.fenced.is_empty() {
        shared.fence(&told.fenced, true);
    }
    shared.desk.signal.notify();
}

fn count(counters: &Counters, new: &wire::Counts) {
    for (counter, n) in [
        (&counters.saves, new.saves),
        (&counters.saves_failed, new.saves_failed),
        (&counters.saves_skipped, new.saves_skipped),
        (&counters.captured_bytes, new.captured_bytes),
        (&counters.disk_bytes, new.disk_bytes),
        (&counters.disk_ns, new.disk_ns),
        (&counters.disk_sealed, new.disk_sealed),
        (&counters.disk_passed_over, new.disk_passed_over),
        (&counters.checksum_failures, new.checksum_failures),
        (&counters.repairs, new.repairs),
        (&counters.peer_bytes, new.peer_bytes),
        (&counters.peer_ns, new.peer_ns),
        (&counters.peer_whole, new.peer_whole),
        (&counters.peer_failed, new.peer_failed),
        (&counters.peer_refused, new.peer_refused),
        (&counters.peer_fetched_bytes, new.peer_fetched_bytes),
        (&counters.object_bytes, new.object_bytes),
        (&counters.object_ns, new.object_ns),
        (&counters.object_sealed, new.object_sealed),
        (&counters.object_passed_over, new.object_passed_over),
        (&counters.object_failed, new.object_failed),
        (&counters.object_fetched_bytes, new.object_fetched_bytes),
    ] {
        add(counter, n);
    }
}
