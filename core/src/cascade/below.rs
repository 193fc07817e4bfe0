//! Copies of the newest step that is held elsewhere, while the training runs: where a holder is lost or is to
//! go away, another node gets one, and nobody waits for the next step to do it.
//!
//! # Invariants
//!
//! - A step that is on its way to other nodes is what mends it; nothing is mended beside it.

use std::{collections::BTreeSet, time::Duration};

use super::Cascade;
use crate::{
    clock::Deadline,
    error::Result,
    observe::locked,
    peers::{Peers, leaving},
};

/// A node that is away for no longer is being restarted.
const MEND_AFTER: Duration = Duration::from_secs(10);

/// Nodes that stay and had no room for what another one is to take with it are asked again after that.
const FULL_PAUSE: Duration = Duration::from_secs(60);

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
        let alive = peers.network.nodes();
        let leaving = leaving(&*peers.network, &alive);
        let alive: BTreeSet<String> = alive.into_iter().map(|node| node.name).collect();
        let holders: BTreeSet<&String> = receipts.iter().map(|receipt| &receipt.node).collect();
        let me = peers.network.me();
        let stays = |node: &&String| !leaving.contains(*node) && **node != me;
        let others = alive.iter().filter(stays).any(|node| !holders.contains(node));
        // One that is to go away counts as lost where somebody could take its place.
        let is_safe = |node: &String| alive.contains(node) && !(leaving.contains(node) && others);
        let now = self.parts.clock.monotonic();
        {
            let mut work = locked(&self.work);
            if holders.into_iter().all(is_safe) {
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
            // Those that stay may be full: then it is tried again.
            let stay = receipts.iter().all(|receipt| !leaving.contains(&receipt.node));
            work.copies.receipts = receipts;
            work.copies.below = (!stay).then_some(now + FULL_PAUSE);
            if stay {
                tracing::info!("{} has all its copies again", shard.key);
            }
        }
        Ok(true)
    }
}
