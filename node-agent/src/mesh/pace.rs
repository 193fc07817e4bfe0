//! A limit on bytes a second, shared by all that send.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tierkeep::clock::{Clock, SystemClock};

/// Lets bytes through at a rate. Who comes pays for what it sends next, in order.
#[derive(Debug)]
pub(super) struct Pace {
    rate: Option<u64>,
    /// When the next byte may go.
    free: Mutex<Duration>,
}

impl Pace {
    pub(super) fn new(rate: Option<u64>) -> Self {
        Self { rate, free: Mutex::default() }
    }

    /// How long to wait before sending so many bytes.
    fn turn(&self, bytes: u64, now: Duration) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = (*free).max(now);
        *free = begin + Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        begin - now
    }

    /// Waits for its turn.
    pub(super) fn wait(&self, bytes: u64) {
        let turn = self.turn(bytes, SystemClock.monotonic());
        if !turn.is_zero() {
            SystemClock.pause(turn);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_at_the_rate_and_a_pause_saves_nothing_up() {
        let second = Duration::from_secs;
        let pace = Pace::new(Some(1000));
        let turns: Vec<_> = (0..4).map(|_| pace.turn(500, second(1))).collect();
        assert_eq!(turns, [0, 500, 1000, 1500].map(Duration::from_millis));
        assert_eq!(pace.turn(500, second(60)), Duration::ZERO);
        assert_eq!(pace.turn(500, second(60)), Duration::from_millis(500));
        assert_eq!(Pace::new(None).turn(u64::MAX, second(1)), Duration::ZERO);
    }
}
