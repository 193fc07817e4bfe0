//! What the reader of a shard asks of those who know more than its own copies: copies further away, other
//! ranks' shards, mending; and whom it tells that it is done.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{read::Restorable, survey::ShardCopy};
use crate::{error::Result, names::Rank, tier::Tier};

/// The shards of other ranks, looked up when they are needed.
#[derive(Clone)]
pub(crate) struct Rest(Arc<FindRest>);

type FindRest = dyn Fn(&[Rank]) -> Result<Vec<Restorable>> + Send + Sync;

impl Rest {
    pub(crate) fn new(
        find: impl Fn(&[Rank]) -> Result<Vec<Restorable>> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(find))
    }

    pub(super) fn find(&self, ranks: &[Rank]) -> Result<Vec<Restorable>> {
        (self.0)(ranks)
    }
}

impl std::fmt::Debug for Rest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Rest")
    }
}

/// Copies of a shard that are asked for only when they are needed.
#[derive(Clone)]
pub(crate) struct Further(Arc<Look>);

/// The copies' tiers count from these.
pub(crate) type Copies = (Vec<Arc<dyn Tier>>, Vec<ShardCopy>);

type Look = dyn Fn() -> Result<Copies> + Send + Sync;

impl Further {
    pub(crate) fn new(look: impl Fn() -> Result<Copies> + Send + Sync + 'static) -> Self {
        Self(Arc::new(look))
    }

    pub(super) fn look(&self) -> Result<Copies> {
        (self.0)()
    }
}

impl std::fmt::Debug for Further {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Further")
    }
}

/// Says once that a restore needs its shard no more: it was read, or nobody is left who would.
pub(crate) struct Over {
    told: AtomicBool,
    tell: Box<dyn Fn() + Send + Sync>,
}

impl Over {
    pub(crate) fn new(tell: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { told: AtomicBool::new(false), tell: Box::new(tell) })
    }

    pub(super) fn say(&self) {
        if !self.told.swap(true, Ordering::AcqRel) {
            (self.tell)();
        }
    }
}

impl Drop for Over {
    fn drop(&mut self) {
        self.say();
    }
}

impl std::fmt::Debug for Over {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Over").field("told", &self.told).finish_non_exhaustive()
    }
}

/// Mends copies and marks steps for a process that owns neither (an agent does).
pub(crate) trait Care: Send + Sync + std::fmt::Debug {
    /// These chunks of each of the shard's copies were found damaged; it may mend them, and those
    /// that were bad from the start.
    fn mend(&self, rank: Rank, damaged: &[BTreeSet<usize>]);
    /// Mends these chunks, which are good in no copy of this node, from other nodes; false: it could not.
    fn fetch(&self, rank: Rank, damaged: &[BTreeSet<usize>]) -> bool;
    /// No copy of the shard is good.
    fn lost(&self, rank: Rank);
}
