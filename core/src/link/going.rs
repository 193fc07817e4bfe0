//! An attempt whose owner is an agent.

use std::{sync::Arc, time::Duration};

use tierkeep_proto::trainer::{self as wire, reply::Answer, request::Call};

use super::{AWAY_MAX, SHORT, Shared, Unpublished, dial, dial::Dial};
use crate::{
    attempt::AttemptRecord,
    error::{Error, Result},
    observe::{add, locked},
    owner::{Asked, Filled, Going, Lease},
    save::{Level, Save},
    snapshot::{Described, map::SlotMap},
};

/// How long publishing may take: names on tmpfs, and a word on a directory that ranks share.
pub(super) const PUBLISH: Duration = Duration::from_secs(60);

/// How often a save that waits for its agent looks for it.
const LOOK: Duration = Duration::from_millis(20);

pub(super) struct FarGoing {
    shared: Arc<Shared>,
    dial: Arc<Dial>,
    record: AttemptRecord,
}

impl FarGoing {
    pub(super) fn new(shared: Arc<Shared>, dial: Arc<Dial>, record: AttemptRecord) -> Self {
        Self { shared, dial, record }
    }

    /// Waits for an agent that is away, as long as that outage may keep a save waiting. False: the
    /// step is passed over.
    fn wait_for_agent(&self, may_skip: bool, interrupted: Asked<'_>) -> Result<bool> {
        while let Some(away) = self.dial.away() {
            if may_skip {
                return Ok(false);
            }
            if away >= AWAY_MAX || interrupted.is_some_and(|interrupted| interrupted()) {
                return Err(self.dial.is_away());
            }
            self.shared.check_fenced()?;
            self.shared.desk.check_closed()?;
            self.dial.rest(LOOK);
        }
        Ok(true)
    }

    /// The other ranks wait for what failed here, and are told when the agent is back. It may keep this
    /// rank as long as a save.
    fn has_untold(&self) -> bool {
        let away = self.dial.away();
        away.is_none_or(|away| away < AWAY_MAX) && self.shared.has_untold()
    }

    /// The agent is away, and the caller does not want to wait.
    fn skip(&self, save: &Save) {
        let why = "the agent is away";
        let observer = &self.shared.desk.observer;
        add(&observer.counters.saves_skipped, 1);
        observer.warn("skipped", Some(save.step()), format!("step {}: {why}", save.step()));
        save.skip_alone(why);
    }
}

impl Going for FarGoing {
    fn record(&self) -> &AttemptRecord {
        &self.record
    }

    fn mark_due(&self, save: &Save) {
        let step = save.step();
        let last = locked(&self.shared.state).stop_after;
        if step.is_multiple_of(self.shared.desk.config.disk_every)
            || self.record.parent.is_some_and(|parent| parent.step == step)
            || last.is_some_and(|last| step >= last)
        {
            save.set_due_for_disk();
        }
    }

    fn follow(&self, save: &Save) {
        self.mark_due(save);
        save.reach(Level::Staged, false);
        self.shared.follow(save);
        locked(&self.shared.state).published.insert(save.step());
        let follow = Call::Follow(wire::Follow { step: save.step() });
        // An agent that is away is told when it is back.
        if let Err(e) = self.dial.ask_until(&follow, SHORT, None) {
            save.fail(Level::Ram, &e);
        }
    }

    fn lease(
        &self,
        save: &Save,
        len: u64,
        skip_if_busy: bool,
        interrupted: Asked<'_>,
    ) -> Result<Option<Box<dyn Lease>>> {
        let step = save.step();
        self.shared.follow(save);
        // Of a try before this one.
        locked(&self.shared.state).published.remove(&step);
        let may_skip =
            skip_if_busy && locked(&self.shared.state).stop_after.is_none_or(|last| step < last);
        let call = Call::Lease(wire::Lease { step, bytes: len, skip_if_busy });
        let within = self.shared.desk.config.slot_wait + SHORT;
        let (leased, fds) = loop {
            if !self.wait_for_agent(may_skip, interrupted)? {
                self.skip(save);
                return Ok(None);
            }
            match self.dial.ask_until(&call, within, interrupted) {
                Ok(Some((Answer::Leased(leased), fds))) => break (leased, fds),
                Ok(Some(_)) => return Err(dial::odd("Lease")),
                Ok(None) => {}
                Err(e) => {
                    if matches!(e, Error::Deadline { .. }) {
                        // A slot that comes yet would be nobody's: the two sides tell each other anew.
                        self.dial.reset();
                    }
                    return Err(e);
                }
            }
        };
        if leased.slot == 0 {
            save.skip(&leased.skipped);
            return Ok(None);
        }
        let slot = leased.slot;
        locked(&self.shared.state).filling.insert(slot, step);
        let (shared, dial) = (self.shared.clone(), self.dial.clone());
        // From here on the slot goes back by itself.
        let lease = InHand { shared, dial, slot };
        let map = match fds.into_iter().next() {
            Some(fd) => self.shared.map_slot(slot, fd)?,
            None => self.shared.mapped_slot(slot, &self.dial)?,
        };
        if (map.capacity() as u64) < len {
            return Err(Error::Bug(format!("a slot of {} bytes for {len}", map.capacity())));
        }
        Ok(Some(Box::new(FarLease { lease, map })))
    }

    fn stop(&self, wish: Option<u64>) -> Result<Option<u64>> {
        match self.dial.ask_now(Call::Stop(wire::Stop { wish }), SHORT)? {
            (Answer::Stopping(stopping), _) => Ok(stopping.step),
            _ => Err(dial::odd("Stop")),
        }
    }

    fn stop_after(&self, step: u64) {
        let mut state = locked(&self.shared.state);
        if state.stop_after.is_some_and(|known| known <= step) {
            return;
        }
        state.stop_after = Some(step);
        let saves: Vec<Save> = state.saves.values().cloned().collect();
        drop(state);
        saves.iter().for_each(|save| self.mark_due(save));
        // An agent that is away is told when it is back.
        let stop = Call::StopAfter(wire::StopAfter { step });
        if let Err(e) = self.dial.ask_until(&stop, SHORT, None) {
            tracing::warn!("the agent was not told of the last step: {}", e.chain());
        }
    }

    fn init(&self, wish: &str) -> Result<String> {
        match self.dial.ask(Call::Init(wire::Init { wish: wish.into() }), SHORT)? {
            (Answer::Text(text), _) => Ok(text.text),
            _ => Err(dial::odd("Init")),
        }
    }

    fn give_up(&self, failed: &[u64]) {
        self.shared.add_failed(failed);
        let give_up = Call::GiveUp(wire::GiveUp { steps: failed.to_vec() });
        match self.dial.ask_until(&give_up, SHORT, None) {
            Ok(Some(_)) => self.shared.told_failed(failed),
            Ok(None) => {} // An agent that is away is told when it is back.
            Err(e) => {
                tracing::warn!("the agent was not told what failed: {}", e.chain());
                self.shared.told_failed(failed); // It heard, and could not.
            }
        }
    }

    fn is_busy(&self) -> bool {
        self.shared.is_busy() || self.has_untold()
    }
}

/// A slot in hand. Dropped, it is the agent's again.
struct InHand {
    shared: Arc<Shared>,
    dial: Arc<Dial>,
    slot: u64,
}

impl Drop for InHand {
    fn drop(&mut self) {
        let mut state = locked(&self.shared.state);
        if state.filling.remove(&self.slot).is_none() {
            return; // Published.
        }
        drop(state);
        // An agent that is away is told when it is back.
        let _ = self.dial.ask_until(&Call::Abandon(wire::Abandon { slot: self.slot }), SHORT, None);
    }
}

struct FarLease {
    lease: InHand,
    map: Arc<SlotMap>,
}

impl Lease for FarLease {
    fn map(&self) -> &Arc<SlotMap> {
        &self.map
    }

    fn publish(self: Box<Self>, filled: Filled) -> Result<()> {
        let InHand { shared, dial, slot } = &self.lease;
        let Filled { identity, len, described, save } = filled;
        let Described { manifest, chunks, words } = described;
        let step = identity.step;
        let publish =
            wire::Publish { slot: *slot, step, bytes: len, chunks, manifest, words: Some(words) };
        // Before it is asked: whenever the agent goes away, the slot is known to be filled.
        let mut state = locked(&shared.state);
        state.filling.remove(slot);
        let unpublished = Unpublished { publish: publish.clone(), save: save.clone() };
        state.unpublished.insert(*slot, unpublished);
        drop(state);
        let asked = dial.ask_until(&Call::Publish(publish), PUBLISH, None);
        if let Ok(None) = asked {
            // The next agent will be asked: the save is open until then.
            let text = format!("step {step} is copied; it is published when the agent is back");
            shared.desk.observer.warn("agent_away", Some(step), text);
            return Ok(());
        }
        // The thread that hears may have published it meanwhile, to the next agent.
        let mut state = locked(&shared.state);
        let ours = state.unpublished.remove(slot).is_some();
        if asked.is_ok() {
            state.published.insert(step);
        }
        drop(state);
        match asked {
            Err(e) if ours => {
                // Where no answer came, the agent may hold the slot still: it is given back.
                locked(&shared.state).filling.insert(*slot, step);
                Err(e)
            }
            Ok(Some((Answer::Published(wire::Published { save: Some(said) }), _))) => {
                save.learn(said);
                Ok(())
            }
            _ => {
                save.reach(Level::Ram, true);
                Ok(())
            }
        }
    }
}
