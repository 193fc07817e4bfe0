//! One thread tells others that something changed; they look again.

use std::{
    sync::{Condvar, Mutex},
    time::Duration,
};

use crate::observe::locked;

/// A counter that waiters watch.
#[derive(Debug, Default)]
pub struct Signal {
    count: Mutex<u64>,
    changed: Condvar,
}

impl Signal {
    /// Something changed.
    pub fn notify(&self) {
        *locked(&self.count) += 1;
        self.changed.notify_all();
    }

    /// The count now: read it before looking, give it to [`wait`](Self::wait) after.
    #[must_use]
    pub fn seen(&self) -> u64 {
        *locked(&self.count)
    }

    /// Waits until something changed since `seen`, or `timeout`.
    pub fn wait(&self, seen: u64, timeout: Duration) {
        let count = locked(&self.count);
        if *count == seen {
            // Whether it was told, timed out or woke for nothing: the caller looks again.
            let _ = self.changed.wait_timeout(count, timeout);
        }
    }
}
