//! An attempt that goes on under a new owner: the agent that began it is gone, the trainer is not.
//!
//! # Invariants
//!
//! - Nothing is decided anew: the record stands, the claim is the same writer's.
//! - What lies in RAM of this attempt is carried on, checked on its way.
//! - A save is told a level only where that level is seen or recorded.

use super::{FoundHere, Keeper};
use crate::{
    attempt,
    begin::{Elsewhere, Stands},
    cascade::{Cascade, Shard},
    commit::read_manifest,
    error::{Error, Result},
    names::{CheckpointKey, Rank},
    peers::commons::ask_who_leads,
    save::Save,
    snapshot::slot::SlotPayload,
};

impl Keeper {
    /// Goes on with the attempt of `number`, whose `decisions` the trainer has seen.
    ///
    /// # Errors
    /// There is no such record, or another writer has the claim.
    pub(crate) fn go_on(&self, attempt: &attempt::AttemptRecord, decisions: u32) -> Result<()> {
        let place = &self.place;
        let tiers = [&*place.disk, &*place.ram];
        let (record, _) = attempt::read(&tiers, attempt.attempt.number)?;
        if record.attempt != attempt.attempt {
            return Err(Error::Fenced {
                why: format!("{} was succeeded by {}", attempt.attempt, record.attempt),
            });
        }
        let rank = Rank(place.config.rank);
        attempt::claim(&*place.disk, &record.attempt, rank, &place.nonce)?;
        self.set_decisions(decisions);
        let stands = Stands::of(place, &record)?;
        let durable = stands.on_disk || stands.whole_in_bucket;
        let in_ram = record.parent.is_some() && !durable && !stands.is_others;
        let step = record.parent.map(|parent| parent.step);
        let ours = |key: &CheckpointKey| {
            key.attempt.is(&record.attempt)
                || (in_ram && record.parent.is_some_and(|parent| parent.key() == *key))
        };
        let held = place.arena.holds().into_iter().filter(ours);
        let shards = held.filter_map(|key| self.shard_in_ram(key)).collect();
        let found = FoundHere {
            parent_waits: in_ram && !place.config.is_bucket_only(),
            first_for_bucket: step.filter(|_| place.lacks_in_bucket(stands)),
            in_bucket: step.filter(|_| stands.in_bucket),
            shards,
            is_read: false,
        };
        let leads = place.is_spread() && place.config.leads();
        if !leads {
            self.look_for_leader(&record);
        }
        self.run(record.clone(), Elsewhere::default(), found)?;
        // The agents that knew it may all be gone: they are upgraded one after the other.
        if leads { self.announce(&record) } else { Ok(()) }
    }

    /// Asks the others where the leader of the attempt is, where this agent was not told.
    fn look_for_leader(&self, record: &attempt::AttemptRecord) {
        let Some(peers) = self.place.peers.as_ref().filter(|_| self.place.is_spread()) else {
            return;
        };
        let knows = || {
            let led = peers.commons.led(&peers.site);
            led.is_some_and(|led| led.record.attempt == record.attempt)
        };
        for node in peers.others() {
            if knows() {
                return;
            }
            if let Err(e) = ask_who_leads(peers, &node.name) {
                tracing::debug!("{} does not say who leads: {}", node.name, e.chain());
            }
        }
    }

    /// This rank's shard of `key` as it lies in a slot. One whose manifest is bad is nobody's.
    fn shard_in_ram(&self, key: CheckpointKey) -> Option<Shard> {
        let place = &self.place;
        let slot = place.arena.find(&key)?;
        let read = read_manifest(&*place.ram, &key, Rank(place.config.rank), None);
        let (manifest, bytes) = match read {
            Ok(found) => found,
            Err(e) => {
                place.observer.warn("damaged_copy", Some(key.step.0), e.chain());
                return None;
            }
        };
        Some(Shard {
            identity: manifest.identity.clone(),
            payload: SlotPayload { slot, len: manifest.payload.length },
            manifest: std::sync::Arc::new(bytes),
            save: Save::new(key.step.0),
            published: true,
            complete: false,
            told: false,
            chunks: Some(manifest.payload.chunks),
            key,
        })
    }

    /// Tells `save`, which the trainer still waits for, what has become of it.
    ///
    /// # Errors
    /// A directory did not answer.
    pub(crate) fn take_up(&self, save: &Save, cascade: &Cascade) -> Result<()> {
        if !self.place.config.saves() {
            cascade.follow(save);
            return Ok(());
        }
        cascade.take_up(save)
    }
}
