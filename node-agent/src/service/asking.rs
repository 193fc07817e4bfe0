//! Questions to the host, which blocks, off the threads that serve.
//!
//! # Invariants
//!
//! - So many questions at a time: one that hangs keeps its place, and never takes a second thread.
//! - Whoever asks has an answer, or an error, in time.

use std::{sync::Arc, time::Duration};

use tierkeep::{Error, Result, host::Host};
use tokio::{sync::Semaphore, task::spawn_blocking, time::timeout};

/// A host, to be asked.
#[derive(Clone, Debug)]
pub(super) struct Asking {
    host: Arc<Host>,
    room: Arc<Semaphore>,
}

impl Asking {
    /// Asks `at_once` questions at a time.
    pub(super) fn new(host: Arc<Host>, at_once: usize) -> Self {
        Self { host, room: Arc::new(Semaphore::new(at_once)) }
    }

    /// Asks, and gives up after `within`.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        within: Duration,
        question: impl FnOnce(&Host) -> T + Send + 'static,
    ) -> Result<T> {
        let (host, room) = (self.host.clone(), self.room.clone());
        let answered = async move {
            let place = room.acquire_owned().await;
            let asked = spawn_blocking(move || {
                let answer = question(&host);
                drop(place); // Not before: whoever asked may have given up long ago.
                answer
            });
            asked.await.map_err(|e| Error::Bug(format!("a question to the host: {e}")))
        };
        timeout(within, answered).await.unwrap_or_else(|_| {
            Err(Error::Deadline {
                what: "an answer of the host".into(),
                seconds: within.as_secs_f64(),
                missing: String::new(),
            })
        })
    }
}
