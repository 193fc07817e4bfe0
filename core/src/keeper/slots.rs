//! A slot's way from the one who fills it into the ram tier.
//!
//! # Invariants
//!
//! - Whether a due step is saved or passed over is one decision of all ranks.
//! - A slot stays busy until the cascade knows its shard and everybody can see it: nobody can take it
//!   in between.

use std::{sync::Arc, time::Duration};

use super::Keeper;
use crate::{
    agree::Saving,
    cascade::{Cascade, Shard},
    clock::Deadline,
    commit::publish_shard,
    error::{Error, Result},
    manifest::replicated::NOTHING,
    names::{CheckpointKey, Rank, Step},
    observe::add,
    owner::{Asked, Filled},
    save::Save,
    snapshot::{
        Described,
        arena::{Filling, Memory},
        slot::SlotPayload,
    },
};

/// How often a save that waits asks whether it is to go on.
const ASK: Duration = Duration::from_millis(100);

impl Keeper {
    /// A slot for the snapshot; `None`: the step is skipped, by this rank's wish or another's.
    pub(crate) fn lease(
        &self,
        save: &Save,
        len: u64,
        skip_if_busy: bool,
        interrupted: Asked<'_>,
        cascade: &Arc<Cascade>,
    ) -> Result<Option<Filling>> {
        let place = &self.place;
        let may_go = |key: &CheckpointKey| cascade.release(key);
        let mut filling = place.arena.acquire(len, Memory::InPlace, &may_go)?;
        let may_skip = skip_if_busy && !cascade.is_last(save.step());
        let wish = if filling.is_none() && may_skip { Saving::Skip } else { Saving::Save };
        if cascade.agreements().saving(save.step(), wish)? == Saving::Skip {
            let why = "every slot is in use: the disk is slower than the saves";
            add(&place.observer.counters.saves_skipped, 1);
            place.observer.warn(
                "skipped",
                Some(save.step()),
                format!("step {}: {why}", save.step()),
            );
            save.skip(why);
            return Ok(None);
        }
        let deadline = Deadline::after(&*place.clock, place.config.slot_wait);
        let stragglers = Deadline::after(&*place.clock, place.config.stragglers_wait);
        let mut ask = Deadline::after(&*place.clock, ASK);
        while filling.is_none() {
            let seen = place.signal.seen();
            filling = place.arena.acquire(len, Memory::InPlace, &may_go)?;
            if filling.is_some() {
                break;
            }
            if ask.left(&*place.clock).is_none() {
                if interrupted.is_some_and(|interrupted| interrupted()) {
                    let why = "the wait for a free slot was interrupted".into();
                    return Err(Error::Skipped { step: Step(save.step()), why });
                }
                ask = Deadline::after(&*place.clock, ASK);
            }
            if stragglers.left(&*place.clock).is_none() && cascade.give_up_straggler()? {
                continue;
            }
            if deadline.left(&*place.clock).is_none() {
                return Err(deadline.passed(
                    format!("a free slot for step {}", save.step()),
                    "the disk tier has not finished with an older step",
                ));
            }
            place.signal.wait(seen, Duration::from_millis(20));
        }
        Ok(filling)
    }

    /// Gives the filled slot its name in the ram tier, manifest last. The slot stays busy until the
    /// cascade knows the shard and everybody can see it: nobody can take it in between.
    pub(crate) fn publish(
        &self,
        filling: Filling,
        filled: Filled,
        cascade: &Cascade,
    ) -> Result<()> {
        let Filled { identity, len, described, save } = filled;
        let Described { manifest, chunks, words } = described;
        // Another process copied, and may write to the slot still: what goes on is checked.
        let chunks = filling.slot().map().is_none().then_some(chunks);
        let manifest = Arc::new(manifest);
        let payload = SlotPayload { slot: filling.slot().clone(), len };
        let key = identity.key();
        if self.place.arena.find(&key).is_some() {
            // An earlier try is there, whose answer was lost: nothing is put in its place.
            return cascade.take_up(&save);
        }
        let ram = &*self.place.ram;
        // Before the manifest: whoever sees that finds these too. Words of an earlier try that stayed
        // would vouch for bytes that nobody compared, so without an answer nothing is published.
        if words != NOTHING || !self.place.config.replicated.is_empty() {
            cascade.agreements().say_alike(identity.step, identity.rank, &words)?;
        }
        cascade.announce(Shard {
            key: key.clone(),
            identity: identity.clone(),
            payload: payload.clone(),
            manifest: manifest.clone(),
            save,
            published: false,
            complete: false,
            told: false,
            chunks,
        });
        let put = ram.put(&key.file(&identity.payload_name()), &payload);
        let published = put.and_then(|receipt| publish_shard(ram, &identity, &manifest, receipt));
        if let Err(e) = published {
            cascade.withdraw(identity.step);
            // The manifest may be there and only the answer was lost: then the slot is not free.
            if ram.delete(&key.manifest(Rank(identity.rank))).is_err() {
                self.place.arena.hold(filling, key);
            }
            return Err(e);
        }
        add(&self.place.observer.counters.saves, 1);
        add(&self.place.observer.counters.captured_bytes, payload.len);
        cascade.confirm(identity.step);
        self.place.arena.hold(filling, key);
        self.place.arena.tidy();
        Ok(())
    }
}
