//! The owner in this process: what is asked of it is a call.

use std::sync::Arc;

use super::{Ending, Keeper};
use crate::{
    attempt::AttemptRecord,
    begin::Begin,
    cascade::Cascade,
    error::{Error, Result},
    owner::{Asked, Closing, Filled, Going, Lease, Owner},
    place::Desk,
    restore::read::Restorable,
    save::Save,
    snapshot::{arena::Filling, device::Pin, map::SlotMap},
    tier::Tier,
};

/// A keeper of this process.
pub(crate) struct Local(pub(crate) Arc<Keeper>);

impl Owner for Local {
    fn desk(&self) -> &Desk {
        &self.0.place.desk
    }

    fn check_open(&self, begins: bool) -> Result<()> {
        self.0.check_open(begins)
    }

    fn begin(
        &self,
        how: &Begin,
        quiet: &dyn Fn() -> Result<()>,
        forget: &dyn Fn(),
    ) -> Result<Option<Restorable>> {
        self.0.begin(how, quiet, forget)
    }

    fn going(&self) -> Option<Arc<dyn Going>> {
        let (record, cascade) = self.0.running()?;
        Some(Arc::new(LocalGoing { keeper: self.0.clone(), record, cascade }))
    }

    fn prepare(&self, len: u64) -> Result<()> {
        self.0.prepare(len)
    }

    fn pin_with(&self, pin: Arc<dyn Pin>) {
        self.0.place.arena.pin_with(pin);
    }

    fn tiers(&self) -> Vec<Arc<dyn Tier>> {
        self.0.tiers()
    }

    fn taken_over(&self) {} // It is seen from the lock.

    fn shut(&self, how: Closing) {
        self.0.shut(match how {
            // There is no agent that would give it back in time.
            Closing::Done | Closing::Failed => Ending::Clean,
            Closing::Now => Ending::Now,
        });
    }
}

struct LocalGoing {
    keeper: Arc<Keeper>,
    record: AttemptRecord,
    cascade: Arc<Cascade>,
}

impl Going for LocalGoing {
    fn record(&self) -> &AttemptRecord {
        &self.record
    }

    fn mark_due(&self, save: &Save) {
        self.cascade.mark_due(save);
    }

    fn follow(&self, save: &Save) {
        self.cascade.follow(save);
    }

    fn lease(
        &self,
        save: &Save,
        len: u64,
        skip_if_busy: bool,
        interrupted: Asked<'_>,
    ) -> Result<Option<Box<dyn Lease>>> {
        let filling = self.keeper.lease(save, len, skip_if_busy, interrupted, &self.cascade)?;
        let Some(filling) = filling else { return Ok(None) };
        let map = filling.slot().map().cloned();
        let map = map.ok_or_else(|| Error::Bug("a slot of this process is not mapped".into()))?;
        let (keeper, cascade) = (self.keeper.clone(), self.cascade.clone());
        Ok(Some(Box::new(LocalLease { keeper, cascade, filling, map })))
    }

    fn stop(&self, wish: Option<u64>) -> Result<Option<u64>> {
        self.cascade.agreements().stop(wish)
    }

    fn stop_after(&self, step: u64) {
        self.cascade.stop_after(step);
    }

    fn init(&self, wish: &str) -> Result<String> {
        self.cascade.agreements().init(wish)
    }

    fn give_up(&self, failed: &[u64]) {
        self.cascade.give_up_steps(failed);
    }

    fn is_busy(&self) -> bool {
        self.cascade.is_busy()
    }
}

struct LocalLease {
    keeper: Arc<Keeper>,
    cascade: Arc<Cascade>,
    filling: Filling,
    map: Arc<SlotMap>,
}

impl Lease for LocalLease {
    fn map(&self) -> &Arc<SlotMap> {
        &self.map
    }

    fn publish(self: Box<Self>, filled: Filled) -> Result<()> {
        self.keeper.publish(self.filling, filled, &self.cascade)
    }
}
