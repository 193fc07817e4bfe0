//! How far a rank's way to the bucket is, and its shard's payload on that way.
//!
//! # Invariants
//!
//! - One step is on its way at a time.
//! - What was seen sealed stays seen.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{Cascade, asked::ToBucket};
use crate::{
    clock::Deadline,
    error::{Error, Result},
    observe::locked,
    retain::Saved,
    save::Save,
    snapshot::slot::Slot,
    tier::{Payload, buffer::AlignedBuf},
};

/// Between two tries of a bucket that is away, at first; then twice as long each time.
const AGAIN: Duration = Duration::from_secs(1);
pub(super) const AGAIN_MAX: Duration = Duration::from_secs(30);

/// The step that goes to the bucket.
#[derive(Debug)]
pub(super) struct Now {
    pub(super) step: u64,
    pub(super) deadline: Deadline,
    pub(super) own_done: bool,
    /// The leader was told so.
    pub(super) told: bool,
    /// The bucket was away: not before then, and the pause after that.
    pub(super) not_before: Duration,
    pub(super) pause: Duration,
}

impl Now {
    pub(super) fn new(step: u64, deadline: Deadline, saves: bool) -> Self {
        let (own_done, told) = (!saves, !saves);
        Self { step, deadline, own_done, told, not_before: Duration::ZERO, pause: AGAIN }
    }
}

/// How far this rank's way to the bucket is.
#[derive(Debug, Default)]
pub(crate) struct Sending {
    pub(super) now: Option<Now>,
    /// The newest step that is sealed on disk and due here.
    pub(super) next: Option<u64>,
    /// The newest step that was ever chosen.
    pub(super) chosen: Option<u64>,
    /// The newest that was seen to be sealed.
    pub(super) sealed: Option<u64>,
    /// Saves that are due here and not decided yet.
    pub(super) saves: BTreeMap<u64, Save>,
    /// Steps that were chosen, or may have been before this owner: where nobody says what became of one, the
    /// bucket is asked.
    pub(super) doubtful: BTreeSet<u64>,
    /// The records of the attempts are there.
    pub(super) has_records: bool,
    /// When checkpoints that are there were saved, as far as that was asked for.
    pub(super) saved: Saved,
    /// When the leader chose last.
    pub(super) chosen_at: Option<Duration>,
    /// What a newer step lets go is being collected there.
    pub(super) tidies: bool,
    /// Since when it is away and why, where it is.
    pub(super) trouble: Option<(Duration, String)>,
}

impl Sending {
    /// `next`: what the attempt resumed from, where the bucket lacks it; `sealed`: that, where it has it.
    pub(super) fn beginning_with(next: Option<u64>, sealed: Option<u64>) -> Self {
        Self { next, sealed, ..Self::default() }
    }

    /// The step that is to be chosen next.
    pub(super) fn waits(&self) -> Option<u64> {
        self.next.filter(|next| self.chosen.is_none_or(|chosen| *next > chosen))
    }

    /// For people.
    pub(super) fn view(&self, clock: Duration) -> ToBucket {
        let trouble = self.trouble.as_ref();
        ToBucket {
            sealed: self.sealed,
            sending: self.now.as_ref().map(|now| now.step),
            next: self.waits(),
            trouble: trouble.map(|(_, why)| why.clone()),
            trouble_for: trouble.map(|(since, _)| clock.saturating_sub(*since)),
        }
    }

    /// It is away; true: it was not before.
    pub(super) fn is_away(&mut self, clock: Duration, why: String) -> bool {
        let before = self.trouble.take();
        let since = before.as_ref().map_or(clock, |(since, _)| *since);
        self.trouble = Some((since, why));
        before.is_none()
    }

    /// `step` is sealed there.
    pub(super) fn has(&mut self, step: u64) {
        self.sealed = self.sealed.max(Some(step));
    }

    /// It is long enough ago that the leader chose, where there is to be one in so many `minutes`.
    pub(super) fn is_time(&self, minutes: Option<u64>, now: Duration) -> bool {
        let since = self.chosen_at.map(|at| now.saturating_sub(at));
        match minutes {
            Some(minutes) => since.is_none_or(|since| since.as_secs() >= 60 * minutes),
            None => true,
        }
    }
}

/// The shard's payload on its way: its bytes are counted, and a cascade that was stopped hands out no more.
pub(super) struct Sent<'a, P: ?Sized> {
    pub(super) payload: &'a P,
    pub(super) save: Option<Save>,
    pub(super) cascade: &'a Cascade,
}

#[deny(clippy::missing_trait_methods)]
impl<P: Payload + ?Sized> Payload for Sent<'_, P> {
    fn len(&self) -> u64 {
        self.payload.len()
    }

    fn is_empty(&self) -> bool {
        self.payload.is_empty()
    }

    fn block<'a>(
        &'a self,
        offset: u64,
        len: usize,
        scratch: &'a mut AlignedBuf,
    ) -> Result<&'a [u8]> {
        if locked(&self.cascade.work).stop {
            return Err(Error::Fenced { why: "the attempt ended in this process".into() });
        }
        let block = self.payload.block(offset, len, scratch)?;
        if let Some(save) = &self.save {
            save.add_object_bytes((len as u64).min(self.len().saturating_sub(offset)));
        }
        Ok(block)
    }

    fn block_bytes(&self) -> u64 {
        self.payload.block_bytes()
    }

    fn crc32(&self, offset: u64, len: u64) -> Option<u32> {
        self.payload.crc32(offset, len)
    }

    fn slot(&self) -> Option<&Slot> {
        self.payload.slot()
    }
}
