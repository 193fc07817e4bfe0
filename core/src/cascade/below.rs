//! Copies of the newest step that is held elsewhere, while the training runs: where a holder is lost, another
//! node gets one, and nobody waits for the next step to do it.
//!
//! # Invariants
//!
//! - A step that is on its way to other nodes is what mends it; nothing is mended beside it.

use std::{collections::BTreeSet, time::Duration};

use super::Cascade;
use crate::{clock::Deadline, error::Result, observe::locked, peers::Peers};

/// A node that is away for no longer is being restarted.
const MEND_AFTER: Duration = Duration::from_secs(10);

/// How long it may take until a newer step is looked at.
const MEND_WITHIN: Duration = Duration::from_secs(10);

impl Cascade {
    /// Sends the newest step that was held elsewhere once more, where some holder of it is lost.
    pub(super) fn mend_copies(&self, peers: &Peers) -> Result<bool> {
        let (shard, receipts) = {
            let work = locked(&self.work);
            let whole = work.copies.whole.as_ref().filter(|_| work.copies.now.is_none());
            let Some(shard) = whole.and_then(|key| work.shards.get(&key.step.0)) else {
                return Ok(false);
            };
            (shard.clone(), work.copies.receipts.clone())
        };
        let alive: BTreeSet<String> =
            peers.network.nodes().into_iter().map(|node| node.name).collect();
        let now = self.parts.clock.monotonic();
        {
            let mut work = locked(&self.work);
            if receipts.iter().all(|receipt| alive.contains(&receipt.node)) {
                work.copies.below = None;
                return Ok(false);
            }
            let since = *work.copies.below.get_or_insert(now);
            if now.saturating_sub(since) < MEND_AFTER {
                return Ok(false);
            }
            work.copies.below = Some(now);
        }
        let deadline = Deadline::after(&*self.parts.clock, MEND_WITHIN);
        // Those that have it say so at once.
        let receipts = self.send_shard(peers, &shard, &deadline)?;
        let mut work = locked(&self.work);
        if work.copies.whole.as_ref() == Some(&shard.key) {
            work.copies.holders.extend(receipts.iter().map(|receipt| receipt.node.clone()));
            work.copies.receipts = receipts;
            work.copies.below = None;
            tracing::info!("{} has all its copies again", shard.key);
        }
        Ok(true)
    }
}
