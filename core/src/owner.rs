//! What the one who copies the state asks of the rank's owner, be that in this process (`keeper`) or
//! in an agent (`link`).
//!
//! ```text
//! Owner -begin-> Going (one attempt) -lease-> Lease (a slot to fill) -publish->
//! ```
//!
//! # Invariants
//!
//! - A lease belongs to the attempt that it was asked of: what is published goes nowhere else.
//! - A lease that is dropped gives its slot back; the copy into it has ended by then.

use std::sync::Arc;

use crate::{
    attempt::AttemptRecord,
    begin::Begin,
    error::Result,
    manifest::Identity,
    names::Step,
    place::Desk,
    reader::Reader,
    restore::read::Restorable,
    save::Save,
    snapshot::{Described, device::Pin, map::SlotMap},
    tier::Tier,
};

/// What is asked now and then while a save waits: true ends the wait.
pub(crate) type Asked<'a> = Option<&'a (dyn Fn() -> bool + Send + Sync)>;

/// The owner of one rank of a run.
pub(crate) trait Owner: Send + Sync {
    /// The settings and what the parts share.
    fn desk(&self) -> &Desk;
    /// Fails where this handle is closed, was taken over, or is another process's. `begins`: for a
    /// new attempt, which may have been recorded by a rank that was quicker.
    fn check_open(&self, begins: bool) -> Result<()>;
    /// Decides, or learns, where this attempt begins, and records and claims it. `None`: at step 0.
    /// Called again in a running process (a rollback), it begins a new attempt: between the two,
    /// `quiet` waits for what the old one has in hand, and `forget` forgets it.
    fn begin(
        &self,
        how: &Begin,
        quiet: &dyn Fn() -> Result<()>,
        forget: &dyn Fn(),
    ) -> Result<Option<Restorable>>;
    /// The attempt that goes on.
    fn going(&self) -> Option<Arc<dyn Going>>;
    /// Makes every slot ready for `len` bytes, behind.
    fn prepare(&self, len: u64) -> Result<()>;
    /// Slots are made known to a device from here on.
    fn pin_with(&self, pin: Arc<dyn Pin>);
    /// The tiers, nearest first, for reading.
    fn tiers(&self) -> Vec<Arc<dyn Tier>>;
    /// Pins a step, or takes the pin away.
    fn pin(&self, step: u64, pinned: bool) -> Result<()> {
        Reader::of(self.tiers()).pin(Step(step), None, pinned)
    }
    /// Another handle of this process has the rank: this one is about to end.
    fn taken_over(&self);
    /// Ends it. Memory goes back only where the newest checkpoint is durable elsewhere.
    fn shut(&self, how: Closing);
}

/// How a handle ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Closing {
    /// Nobody is to come back at once: memory goes back.
    Done,
    /// Its process failed, and whoever is started in its place is to find its state in memory; that goes back
    /// where nobody else would see to it.
    Failed,
    /// Memory stays, and what is on its way is left to whoever comes next.
    Now,
}

/// An attempt that goes on.
pub(crate) trait Going: Send + Sync {
    /// Its record.
    fn record(&self) -> &AttemptRecord;
    /// Says in `save` that it goes to disk, where it does.
    fn mark_due(&self, save: &Save);
    /// A rank that does not save: `save` follows the others' checkpoint.
    fn follow(&self, save: &Save);
    /// A slot for the snapshot; `None`: the step is skipped, by this rank's wish or another's.
    fn lease(
        &self,
        save: &Save,
        len: u64,
        skip_if_busy: bool,
        interrupted: Asked<'_>,
    ) -> Result<Option<Box<dyn Lease>>>;
    /// The step after which all ranks stop: as recorded, else `wish`.
    fn stop(&self, wish: Option<u64>) -> Result<Option<u64>>;
    /// The job stops after `step`: it goes to disk.
    fn stop_after(&self, step: u64);
    /// What a run without checkpoints begins with: `wish`, unless another rank was first.
    fn init(&self, wish: &str) -> Result<String>;
    /// Saves of these steps failed here and are not tried again: the other ranks need not wait.
    fn give_up(&self, failed: &[u64]);
    /// True until the newest step that can still reach disk has reached it or failed.
    fn is_busy(&self) -> bool;
}

/// A slot that is being filled.
pub(crate) trait Lease: Send {
    /// Where the bytes go.
    fn map(&self) -> &Arc<SlotMap>;
    /// Gives the filled slot its name in the ram tier, manifest last.
    fn publish(self: Box<Self>, filled: Filled) -> Result<()>;
}

/// What is published with a slot.
pub(crate) struct Filled {
    pub(crate) identity: Identity,
    /// Exact bytes of the payload.
    pub(crate) len: u64,
    pub(crate) described: Described,
    pub(crate) save: Save,
}
