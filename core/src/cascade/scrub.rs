//! Reading again what lies in the bucket, slowly, to hear of damage while there is time: a store's checksums
//! were compared when it took the bytes, and nobody looks at them again until a restore does.
//!
//! Only the leader does it, where it is asked for. What is found is told; it is mended by who reads it
//! beside a good copy, or by the next checkpoint.
//!
//! # Invariants
//!
//! - It takes no more than [`BYTES_PER_SECOND`] of the store, and ends at its next chunk when it is to.
//! - What retention deletes meanwhile is not damage.

use std::time::Duration;

use super::{Cascade, IDLE, to_object::Far};
use crate::{
    chunk::CHUNK_BYTES,
    commit::Listing,
    error::{Error, ErrorKind, Result},
    names::{CheckpointKey, Rank},
    observe::{add, locked},
    reader::Reader,
    restore::survey::survey,
    tier::{Payload, buffer::AlignedBuf},
};

/// A terabyte a day, and the tenth part of what one connection gets from the large stores.
const BYTES_PER_SECOND: u64 = 12 << 20;

impl Cascade {
    /// The thread's whole life.
    pub(crate) fn run_scrub(&self) {
        let Some(far) = &self.parts.far else { return };
        let Some(period) = far.settings.scrub.filter(|_| self.parts.config.leads()) else { return };
        let mut next = self.parts.clock.monotonic() + period;
        while !self.is_over() {
            let now = self.parts.clock.monotonic();
            if now < next {
                self.rest((next - now).min(IDLE));
                continue;
            }
            if let Err(e) = self.scrub(far) {
                tracing::warn!("the bucket was not read again: {}", e.chain());
            }
            next = now + period;
        }
    }

    fn is_over(&self) -> bool {
        locked(&self.work).stop || self.is_fenced()
    }

    fn rest(&self, time: Duration) {
        let seen = self.parts.signal.seen();
        self.parts.signal.wait(seen, time);
    }

    /// Reads every sealed checkpoint of the bucket, once.
    pub(crate) fn scrub(&self, far: &Far) -> Result<()> {
        let reader = Reader::of(vec![far.tier.clone()]);
        for found in survey(&[&*far.tier])?.into_iter().filter(|f| f.sealed() && !f.deleted()) {
            let ranks = found.listings.iter().flat_map(|listing| listing.manifests.clone());
            for rank in ranks.collect::<Vec<_>>() {
                match self.scrub_shard(&reader, &found.key, rank) {
                    Ok(()) if self.is_over() => return Ok(()),
                    Ok(()) => {}
                    Err(e) if e.kind() == ErrorKind::Unavailable => return Err(e),
                    Err(e) => self.tell_rotten(far, &found.key, rank, &e)?,
                }
            }
        }
        Ok(())
    }

    fn scrub_shard(&self, reader: &Reader, key: &CheckpointKey, rank: Rank) -> Result<()> {
        let shard = reader.shard(key, rank)?;
        let (payload, mut buffer) = (shard.payload(), AlignedBuf::new(1));
        let (begun, mut offset) = (self.parts.clock.monotonic(), 0);
        while offset < payload.len() && !self.is_over() {
            let len = usize::try_from((payload.len() - offset).min(CHUNK_BYTES)).unwrap_or(0);
            payload.block(offset, len, &mut buffer)?;
            offset += len as u64;
            let due = Duration::from_millis(1000 * offset / BYTES_PER_SECOND);
            while !self.is_over()
                && let Some(early) = (begun + due).checked_sub(self.parts.clock.monotonic())
            {
                self.rest(early.min(IDLE));
            }
        }
        Ok(())
    }

    fn tell_rotten(&self, far: &Far, key: &CheckpointKey, rank: Rank, e: &Error) -> Result<()> {
        let now = Listing::of(&*far.tier, key)?;
        if !now.sealed || now.deleted {
            return Ok(()); // It was retired while it was read.
        }
        add(&self.parts.observer.counters.checksum_failures, 1);
        let text = format!("{key}, {rank}, is damaged in the bucket: {}", e.chain());
        self.parts.observer.error("object_damaged", Some(key.step.0), text);
        Ok(())
    }
}
