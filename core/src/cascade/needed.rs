//! What other nodes are to keep of this rank, and when something older may go.
//!
//! # Invariants
//!
//! - Holders are told to keep the newest step that is held elsewhere, and what this attempt resumed from
//!   until there is one: they let go of nothing else that might be needed.
//! - A step older than that goes only when the holders of the newer one have said, after all ranks had their
//!   receipts, that they still have it. They are asked again before the next step goes out: where one has it
//!   no more, nobody else lets go of what is older, and the next step is what mends it.

use std::collections::BTreeSet;

use tierkeep_proto::peer::{self as wire, request::Ask};

use super::{Cascade, Work};
use crate::{
    names::CheckpointKey,
    observe::locked,
    peers::{Peers, send::PeerReceipt, wire_key},
};

impl Cascade {
    /// The nodes that still have their copies of `key`, of which they gave receipts; and whether all have.
    pub(super) fn confirm_copies(
        &self,
        peers: &Peers,
        key: &CheckpointKey,
    ) -> (BTreeSet<String>, bool) {
        let receipts = locked(&self.work).copies.receipts.clone();
        let rank = self.parts.config.rank;
        let has = |receipt: &&PeerReceipt| {
            let (key, store) = (Some(wire_key(key)), receipt.store.clone());
            let asked = peers.ask(&receipt.node, Ask::Confirm(wire::Confirm { key, rank, store }));
            let told = asked.inspect_err(|e| {
                tracing::warn!("{} does not confirm its copy: {}", receipt.node, e.chain());
            });
            told.is_ok()
        };
        let good: BTreeSet<String> = receipts.iter().filter(has).map(|r| r.node.clone()).collect();
        let all = good.len() == receipts.len();
        (good, all)
    }

    /// Asks once more for what keeps an older step on other nodes.
    pub(super) fn confirm_older(&self, peers: &Peers) {
        let (whole, is_unsure) = {
            let copies = &locked(&self.work).copies;
            (copies.whole.clone(), copies.unsure.is_some())
        };
        let Some(key) = whole else { return };
        let (good, all) = self.confirm_copies(peers, &key);
        let mut work = locked(&self.work);
        match &mut work.copies.unsure {
            unsure @ Some(_) if all => *unsure = None,
            Some((_, confirmed)) => *confirmed = good,
            None => {}
        }
        drop(work);
        if is_unsure && all {
            self.release_older(peers, &key);
        }
    }

    /// Whoever holds something older than `key`, which is on other nodes for sure, need not.
    pub(super) fn release_older(&self, peers: &Peers, key: &CheckpointKey) {
        let before: Vec<String> = {
            let copies = &locked(&self.work).copies;
            // What is here are its own slots.
            let now = copies.receipts.iter().map(|receipt| receipt.node.clone());
            let now: BTreeSet<String> = now.chain([peers.network.me()]).collect();
            copies.holders.difference(&now).cloned().collect()
        };
        for node in before {
            let release = wire::Release { rank: self.parts.config.rank, keep: vec![wire_key(key)] };
            // One that is away holds what it holds until it is asked again.
            if peers.ask(&node, Ask::Release(release)).is_ok() {
                locked(&self.work).copies.holders.remove(&node);
            }
        }
    }

    /// What holders are to keep: the newest step that is held, and what this attempt resumed from until
    /// there is one.
    fn needed(&self, work: &Work) -> Vec<CheckpointKey> {
        match &work.copies.whole {
            Some(key) => vec![key.clone()],
            None => {
                let parent = self.parts.record.parent.map(|parent| parent.key());
                parent.into_iter().chain(self.parts.fallback.clone()).collect()
            }
        }
    }

    /// The same for one node: also the step before, unless it has the newer one or all others have.
    pub(super) fn needed_by(&self, work: &Work, node: &str) -> Vec<CheckpointKey> {
        let mut needed = self.needed(work);
        if let Some((older, confirmed)) = &work.copies.unsure
            && !confirmed.contains(node)
        {
            needed.push(older.clone());
        }
        needed
    }

    /// Whether this rank's slot of a step stays for the sake of its copies.
    pub(super) fn is_kept_for_peers(&self, work: &Work, key: &CheckpointKey) -> bool {
        let on_its_way = work.copies.now.as_ref().is_some_and(|now| self.key_of(now.step) == *key);
        let kept = self.parts.replicas > 0 && !work.copies.trouble;
        on_its_way || (kept && self.needed(work).contains(key))
    }
}
