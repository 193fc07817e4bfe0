//! Time enters by this door. Deadlines are monotonic; wall time is for display and for
//! keep-every-hours only.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// A source of time.
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// Time since some fixed moment; never goes back.
    fn monotonic(&self) -> Duration;
    /// Milliseconds since 1970, by the wall.
    fn unix_ms(&self) -> u64;
    /// Waits. A test's clock returns at once and moves its time.
    fn pause(&self, time: Duration);
}

/// A clock shared by all parts of one handle.
pub type SharedClock = Arc<dyn Clock>;

/// The clock of the machine.
#[derive(Debug, Default)]
pub struct SystemClock;

#[allow(clippy::disallowed_methods)] // This is the door.
impl Clock for SystemClock {
    fn monotonic(&self) -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
    }

    fn unix_ms(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    fn pause(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// A moment after which a wait gives up.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    at: Duration,
    length: Duration,
}

impl Deadline {
    /// `length` from now.
    #[must_use]
    pub fn after(clock: &dyn Clock, length: Duration) -> Self {
        Self { at: clock.monotonic().saturating_add(length), length }
    }

    /// What is left; `None` once it has passed.
    #[must_use]
    pub fn left(&self, clock: &dyn Clock) -> Option<Duration> {
        self.at.checked_sub(clock.monotonic()).filter(|d| !d.is_zero())
    }

    /// The error to return once it has passed.
    #[must_use]
    pub fn passed(&self, what: impl Into<String>, missing: impl Into<String>) -> crate::Error {
        let missing = missing.into();
        let missing = if missing.is_empty() { missing } else { format!(": {missing}") };
        crate::Error::Deadline { what: what.into(), seconds: self.length.as_secs_f64(), missing }
    }
}
