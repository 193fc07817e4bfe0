//! Reading a large object: ranges that are asked for before they are wanted.
//!
//! A reader takes chunks one after the other, on a few threads, and waits for each. One request is given
//! 50 to 90 MB/s by the large stores and answered after a while, so many have to be on their way at once:
//! who reads on is read ahead for, twice as far each time, as file systems do. Who jumps about is not.
//!
//! # Invariants
//!
//! - Not more than `requests` ranges of an object are on their way or kept, each as long as the reader's own,
//!   and those of all objects of this process are not more than 256 MiB.
//! - A range that was read ahead and failed is asked for again by who wants it.
//! - Nothing is on its way once the object is closed.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use tokio::task::JoinHandle;

use crate::observe::locked;

/// Threads that take chunks in turn ask for them a little out of order: so many further on is no jump.
const NEAR: u64 = 8;

/// Shorter reads are of headers: nothing is read ahead for them.
const LEN_MIN: u64 = 1 << 20;

/// What is read ahead in this process: who reads 64 shards side by side has as much as who reads one.
const BYTES_MAX: u64 = 256 << 20;
static BYTES: AtomicU64 = AtomicU64::new(0);

type Fetched = Result<Bytes, object_store::Error>;

/// A range on its way, which ends with whoever waits for it.
pub(super) struct OnItsWay {
    task: JoinHandle<Fetched>,
    len: u64,
}

impl OnItsWay {
    pub(super) fn new(task: JoinHandle<Fetched>, len: u64) -> Self {
        BYTES.fetch_add(len, Ordering::Relaxed);
        Self { task, len }
    }

    /// Its bytes, if it came well.
    pub(super) async fn bytes(mut self) -> Option<Bytes> {
        (&mut self.task).await.ok()?.ok()
    }
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        self.task.abort();
        BYTES.fetch_sub(self.len, Ordering::Relaxed);
    }
}

/// What is known of how an object is read.
struct Reading<T> {
    /// Everything before was asked for, more or less.
    frontier: u64,
    /// How many ranges are wanted ahead of it.
    window: usize,
    /// To here they are on their way.
    upto: u64,
    kept: BTreeMap<u64, (u64, T)>,
}

impl<T> Reading<T> {
    fn from(frontier: u64) -> Self {
        Self { frontier, window: 0, upto: frontier, kept: BTreeMap::new() }
    }
}

/// Ranges of one object that were asked for ahead.
pub(super) struct Ahead<T = OnItsWay> {
    len: u64,
    requests: usize,
    reading: Mutex<Reading<T>>,
}

impl<T> Ahead<T> {
    pub(super) fn new(len: u64, requests: usize) -> Self {
        Self { len, requests, reading: Mutex::new(Reading::from(0)) }
    }

    /// Somebody reads `len` bytes at `offset`: they are on their way, perhaps, and what follows is asked for
    /// by `ask`.
    pub(super) fn reads(&self, offset: u64, len: u64, ask: impl Fn(Range<u64>) -> T) -> Option<T> {
        if len < LEN_MIN.min(self.len) || self.requests < 2 {
            return None;
        }
        let mut reading = locked(&self.reading);
        let kept = reading.kept.remove(&offset).filter(|(kept, _)| *kept == len);
        if kept.is_none() && offset > reading.frontier + NEAR * len {
            // A jump: perhaps the only one.
            *reading = Reading::from(offset + len);
            return None;
        }
        reading.frontier = reading.frontier.max(offset + len);
        reading.upto = reading.upto.max(reading.frontier);
        reading.window = (2 * reading.window).clamp(1, self.requests - 1);
        let until = reading.frontier.saturating_add(reading.window as u64 * len).min(self.len);
        let has_room = || BYTES.load(Ordering::Relaxed) + len <= BYTES_MAX;
        while reading.upto < until && reading.kept.len() < reading.window && has_room() {
            let begin = reading.upto;
            let end = (begin + len).min(self.len);
            reading.kept.insert(begin, (end - begin, ask(begin..end)));
            reading.upto = end;
        }
        kept.map(|(_, on_its_way)| on_its_way)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 4 << 20;

    fn asked(ahead: &Ahead<()>, offset: u64, asked: &Mutex<Vec<u64>>) -> bool {
        let ask = |range: Range<u64>| locked(asked).push(range.start / CHUNK);
        ahead.reads(offset, CHUNK.min(ahead.len - offset), ask).is_some()
    }

    #[test]
    fn who_reads_on_is_read_ahead_for_and_each_range_is_asked_for_once() {
        let (ahead, list) = (Ahead::new(100 * CHUNK - 5, 16), Mutex::default());
        let was_ahead: Vec<bool> = (0..100).map(|i| asked(&ahead, i * CHUNK, &list)).collect();
        assert!(!was_ahead[0] && was_ahead[1..].iter().all(|ahead| *ahead), "{was_ahead:?}");
        assert_eq!(*locked(&list), (1..100).collect::<Vec<u64>>());
    }

    #[test]
    fn threads_that_take_chunks_a_little_out_of_order_read_on() {
        let (ahead, list) = (Ahead::new(64 * CHUNK, 8), Mutex::default());
        for i in 0..16_u64 {
            for j in [1, 0, 3, 2] {
                asked(&ahead, (4 * i + j) * CHUNK, &list);
            }
        }
        let mut all = locked(&list).clone();
        all.sort_unstable();
        all.dedup();
        assert!(all.len() == locked(&list).len() && all.len() > 56, "{all:?}");
    }

    #[test]
    fn who_jumps_about_asks_for_nothing_else() {
        let (ahead, list) = (Ahead::new(100 * CHUNK, 16), Mutex::default());
        for chunk in [50, 10, 70, 30, 90] {
            assert!(!asked(&ahead, chunk * CHUNK, &list));
        }
        assert!(locked(&list).len() <= 2, "{:?}", locked(&list));
        let small = Ahead::<()>::new(100 * CHUNK, 16);
        assert!(small.reads(0, 100, |_| unreachable!("a header")).is_none());
    }
}
