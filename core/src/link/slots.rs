//! Slots that an agent passes: mapped, every page in place, made known to the device.

use std::{
    fs::File,
    os::fd::OwnedFd,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tierkeep_proto::trainer::{self as wire, reply::Answer, request::Call};

use super::{SHORT, Shared, dial, dial::Dial};
use crate::{
    clock::Deadline,
    error::{Doing, Error, Result},
    observe::locked,
    snapshot::map::SlotMap,
};

/// How long a save waits for a slot that another thread is mapping: hundreds of gigabytes take
/// minutes the first time.
const MAPPING: Duration = Duration::from_secs(600);

/// Maps what the agent makes ready, behind, so that not even the first save waits for page tables.
///
/// # Errors
/// There is no thread for it.
pub(super) fn fetch(shared: &Arc<Shared>, dial: &Arc<Dial>) -> Result<()> {
    if shared.mapping.swap(true, Ordering::AcqRel) {
        return Ok(());
    }
    let (theirs, dial) = (shared.clone(), dial.clone());
    let work = move || {
        if let Err(e) = fetch_all(&theirs, &dial)
            && !theirs.desk.closed.load(Ordering::Acquire)
        {
            let text = format!("slots were not prepared: {}", e.chain());
            theirs.desk.observer.warn("prepare_failed", None, text);
        }
        theirs.mapping.store(false, Ordering::Release);
        theirs.slots_changed.notify_all();
    };
    let spawned = std::thread::Builder::new().name("tierkeep-map".into()).spawn(work);
    spawned.map(drop).doing(|| "start a thread".into())
}

fn fetch_all(shared: &Shared, dial: &Dial) -> Result<()> {
    loop {
        let (answer, fds) = dial.ask(Call::Slots(wire::Slots {}), 2 * SHORT)?;
        let Answer::Mapped(mapped) = answer else { return Err(dial::odd("Slots")) };
        if mapped.slots.len() != fds.len() {
            return Err(dial::odd("Slots"));
        }
        for (slot, fd) in mapped.slots.into_iter().zip(fds) {
            shared.map_slot(slot, fd)?;
        }
        if !mapped.more || shared.desk.closed.load(Ordering::Acquire) {
            return Ok(());
        }
    }
}

impl Shared {
    /// Maps a slot that was passed, and keeps it.
    pub(super) fn map_slot(&self, slot: u64, fd: OwnedFd) -> Result<Arc<SlotMap>> {
        let file = Arc::new(File::from(fd));
        let len = file.metadata().doing(|| "stat a slot".into())?.len();
        let map = Arc::new(SlotMap::new(file, len)?);
        map.populate(&|| !self.desk.closed.load(Ordering::Acquire))?;
        if let Some(pin) = self.pin.get() {
            map.pin(pin)?;
        }
        locked(&self.state).slots.insert(slot, map.clone());
        self.slots_changed.notify_all();
        Ok(map)
    }

    /// A slot that was passed before; another thread may be mapping it at this moment.
    pub(super) fn mapped_slot(&self, slot: u64, dial: &Dial) -> Result<Arc<SlotMap>> {
        let deadline = Deadline::after(&**dial.clock(), MAPPING);
        let mut state = locked(&self.state);
        loop {
            if let Some(map) = state.slots.get(&slot) {
                let map = map.clone();
                drop(state);
                if let Some(pin) = self.pin.get() {
                    map.pin(pin)?;
                }
                return Ok(map);
            }
            let left = deadline.left(&**dial.clock());
            let (true, Some(left)) = (self.mapping.load(Ordering::Acquire), left) else {
                drop(state);
                // The two sides do not know the same: it will be told anew what is mapped here.
                dial.reset();
                return Err(Error::Io {
                    what: "find the slot that the agent named".into(),
                    source: std::io::ErrorKind::NotFound.into(),
                });
            };
            let pause = left.min(Duration::from_millis(50));
            state = match self.slots_changed.wait_timeout(state, pause) {
                Ok((state, _)) => state,
                Err(e) => e.into_inner().0,
            };
        }
    }
}
