//! A rank's place in an agent: one at a time opens or closes it, anybody may look who sits there.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, TryLockError},
};

use super::seat::Seat;
use crate::observe::locked;

/// One rank of one run. Whoever opens it holds it meanwhile, which may take as long as a disk does.
#[derive(Debug, Default)]
pub(super) struct Chair {
    taken: Mutex<Option<Arc<Seat>>>,
    /// As it was when nobody held it last.
    seen: Mutex<Option<Arc<Seat>>>,
}

impl Chair {
    pub(super) fn lock(&self) -> Taken<'_> {
        Taken { chair: self, guard: locked(&self.taken) }
    }

    /// `None`: somebody opens or closes it at this moment, or asks as we do.
    pub(super) fn try_lock(&self) -> Option<Taken<'_>> {
        let guard = match self.taken.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(Taken { chair: self, guard })
    }

    /// Who sits there, or did until somebody began to open or close it. Never waits.
    pub(super) fn seen(&self) -> Option<Arc<Seat>> {
        locked(&self.seen).clone()
    }
}

/// A chair in somebody's hands.
pub(super) struct Taken<'a> {
    chair: &'a Chair,
    guard: MutexGuard<'a, Option<Arc<Seat>>>,
}

impl Deref for Taken<'_> {
    type Target = Option<Arc<Seat>>;
    fn deref(&self) -> &Self::Target {
        &self.guard
    }
}

impl DerefMut for Taken<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.guard
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        locked(&self.chair.seen).clone_from(&self.guard);
    }
}
