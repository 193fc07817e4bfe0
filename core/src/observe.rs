//! What happened, for people and for machines: events that are told once, counters that are pulled.
//!
//! Nothing here calls back into the host program. Events are traced and kept in a bounded queue,
//! and the host pulls them when it likes.

use std::{
    borrow::Cow,
    collections::VecDeque,
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::signal::Signal;

/// How much an event matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Something was done.
    Info,
    /// Something went wrong and was mended, or was passed over.
    Warning,
    /// Something failed.
    Error,
}

/// One thing that happened.
#[derive(Clone, Debug)]
pub struct Event {
    /// How much it matters.
    pub severity: Severity,
    /// A fixed word for programs: `restored`, `repaired`, `save_failed`, `skipped`, ...
    pub kind: Cow<'static, str>,
    /// One sentence for people. It does not name the rank that it happened to: that is the rank of
    /// the handle, and whoever pulls from several says it once.
    pub text: String,
    /// The step it is about.
    pub step: Option<u64>,
}

/// Bytes, seconds and failures; each a monotone sum since the handle was opened.
#[derive(Debug, Default)]
pub struct Counters {
    /// Saves whose copy was taken.
    pub saves: AtomicU64,
    /// Saves that failed.
    pub saves_failed: AtomicU64,
    /// Saves that were due and passed over because every slot was in use.
    pub saves_skipped: AtomicU64,
    /// Bytes copied into slots.
    pub captured_bytes: AtomicU64,
    /// Nanoseconds in the copy, on the caller's thread; at an agent from the wish for a slot until it was
    /// published.
    pub stall_ns: AtomicU64,
    /// Bytes carried to disk.
    pub disk_bytes: AtomicU64,
    /// Nanoseconds of carrying to disk.
    pub disk_ns: AtomicU64,
    /// Checkpoints sealed on disk (as seen by this rank).
    pub disk_sealed: AtomicU64,
    /// Steps that were complete in RAM and passed over for disk.
    pub disk_passed_over: AtomicU64,
    /// Bytes sent to other nodes, all copies together.
    pub peer_bytes: AtomicU64,
    /// Nanoseconds of sending to other nodes.
    pub peer_ns: AtomicU64,
    /// Checkpoints that were seen to be held on other nodes.
    pub peer_whole: AtomicU64,
    /// Steps that did not get all their copies on other nodes.
    pub peer_failed: AtomicU64,
    /// Copies that another node refused, or did not take: the next one was asked.
    pub peer_refused: AtomicU64,
    /// Bytes sent to the bucket.
    pub object_bytes: AtomicU64,
    /// Nanoseconds of sending to the bucket.
    pub object_ns: AtomicU64,
    /// Checkpoints sealed in the bucket (as seen by this rank).
    pub object_sealed: AtomicU64,
    /// Steps that were due for the bucket and passed over: a newer one went.
    pub object_passed_over: AtomicU64,
    /// Steps that were given up for the bucket.
    pub object_failed: AtomicU64,
    /// Bytes that came back from other nodes, for a restore.
    pub peer_fetched_bytes: AtomicU64,
    /// Bytes that came back from the bucket, for a restore.
    pub object_fetched_bytes: AtomicU64,
    /// Chunks that did not match their checksum.
    pub checksum_failures: AtomicU64,
    /// Copies that were written anew from a good one.
    pub repairs: AtomicU64,
}

/// The queue holds this many events; older ones give way and are counted.
const EVENTS_MAX: usize = 1024;

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<Event>,
    lost: u64,
    closed: bool,
}

/// Where the parts of one handle tell what they did.
#[derive(Clone, Debug, Default)]
pub struct Observer {
    queue: Arc<(Mutex<Queue>, Condvar)>,
    /// Told of each event too: somebody passes them on.
    signal: Option<Arc<Signal>>,
    /// The counters.
    pub counters: Arc<Counters>,
}

impl Observer {
    /// One whose events `signal` tells.
    pub(crate) fn told_by(signal: Arc<Signal>) -> Self {
        Self { signal: Some(signal), ..Self::default() }
    }

    /// Tells `event`: traced at once, queued for the host.
    pub fn tell(&self, event: Event) {
        match event.severity {
            Severity::Info => {
                tracing::info!(kind = &*event.kind, step = event.step, "{}", event.text)
            }
            Severity::Warning => {
                tracing::warn!(kind = &*event.kind, step = event.step, "{}", event.text);
            }
            Severity::Error => {
                tracing::error!(kind = &*event.kind, step = event.step, "{}", event.text);
            }
        }
        let mut queue = locked(&self.queue.0);
        if queue.events.len() == EVENTS_MAX {
            queue.events.pop_front();
            queue.lost += 1;
        }
        queue.events.push_back(event);
        drop(queue);
        self.queue.1.notify_all();
        if let Some(signal) = &self.signal {
            signal.notify();
        }
    }

    pub(crate) fn info(&self, kind: &'static str, step: Option<u64>, text: impl Into<String>) {
        self.tell(Event { severity: Severity::Info, kind: kind.into(), text: text.into(), step });
    }

    pub(crate) fn warn(&self, kind: &'static str, step: Option<u64>, text: impl Into<String>) {
        self.tell(Event {
            severity: Severity::Warning,
            kind: kind.into(),
            text: text.into(),
            step,
        });
    }

    pub(crate) fn error(&self, kind: &'static str, step: Option<u64>, text: impl Into<String>) {
        self.tell(Event { severity: Severity::Error, kind: kind.into(), text: text.into(), step });
    }

    /// The next event, waiting for one up to `timeout`. `Err(())` after [`close`](Self::close)
    /// once all are told.
    ///
    /// # Errors
    /// The observer is closed and empty.
    #[allow(clippy::result_unit_err)]
    pub fn next(&self, timeout: Duration) -> Result<Option<Event>, ()> {
        let mut queue = locked(&self.queue.0);
        if queue.events.is_empty() && !queue.closed {
            queue = self
                .queue
                .1
                .wait_timeout(queue, timeout)
                .map_or_else(|e| e.into_inner().0, |r| r.0);
        }
        if queue.lost > 0 {
            let text = format!("{} events were dropped: nobody pulled them", queue.lost);
            queue.lost = 0;
            return Ok(Some(Event {
                severity: Severity::Warning,
                kind: "events_lost".into(),
                text,
                step: None,
            }));
        }
        match queue.events.pop_front() {
            Some(event) => Ok(Some(event)),
            None if queue.closed => Err(()),
            None => Ok(None),
        }
    }

    /// No more events will be told.
    pub fn close(&self) {
        locked(&self.queue.0).closed = true;
        self.queue.1.notify_all();
    }
}

pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// A lock that a panicked thread held is still a lock: the data behind it is replaced whole, never
/// left half-changed.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
