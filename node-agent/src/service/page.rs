//! The status page: what a person wants to see of a node and its cluster at a glance, and the same as JSON.
//!
//! The page is one file without anything from elsewhere; it reads the JSON beside it every few seconds.
//!
//! # Invariants
//!
//! - However many look, other agents are asked once in a while only, and by one at a time.
//! - What cannot be told is said in its place; the rest is there.

use std::{path::PathBuf, sync::Mutex, time::Duration};

use serde_json::{Value, json};
use tierkeep::{
    Result,
    clock::{Clock, SystemClock},
};
use tierkeep_proto::control::ClusterReply;
use tokio::time::sleep;

use super::{
    history::{EVERY, History},
    looking::Looking,
};
use crate::told;

/// The page itself.
pub(super) const HTML: &str = include_str!("page.html");

/// Nothing is fetched but from the agent, and nothing is run but what is in the page.
pub(super) const POLICY: &str = "default-src 'none'; connect-src 'self'; img-src data:; \
     style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; \
     frame-ancestors 'none'";

/// How long what the others said is taken for what they would say.
const ACROSS_EVERY: Duration = Duration::from_secs(5);

/// What is behind the page.
pub(super) struct Page {
    looking: Looking,
    socket: PathBuf,
    history: Mutex<History>,
    across: tokio::sync::Mutex<Option<Across>>,
}

/// What the others said last, and why not this time.
#[derive(Debug)]
struct Across {
    at: Duration,
    said: ClusterReply,
    trouble: Option<String>,
}

impl Page {
    pub(super) fn new(looking: Looking, socket: PathBuf) -> Self {
        Self { looking, socket, history: Mutex::default(), across: tokio::sync::Mutex::default() }
    }

    /// Looks every few seconds, for what is drawn over time. It does not end.
    pub(super) async fn watch(&self, within: Duration) {
        loop {
            match self.looking.status(within).await {
                Ok(status) => {
                    let mut history = self.history.lock().unwrap_or_else(|e| e.into_inner());
                    history.add(SystemClock.unix_ms(), &status);
                }
                Err(e) => tracing::debug!("a look for the status page: {}", e.chain()),
            }
            sleep(EVERY).await;
        }
    }

    /// All of it.
    ///
    /// # Errors
    /// The host does not answer.
    pub(super) async fn data(&self, within: Duration) -> Result<Value> {
        let status = self.looking.status(within).await?;
        let mut across = self.across.lock().await;
        self.ask_others(&mut across, within).await;
        let (cluster, trouble) = match across.as_ref() {
            Some(across) => (told::cluster(&across.said), across.trouble.as_deref()),
            None => (None, None),
        };
        let history = self.history.lock().unwrap_or_else(|e| e.into_inner()).columns();
        Ok(json!({
            "at_unix_ms": SystemClock.unix_ms(),
            "status": told::status(&self.socket, &status),
            "cluster": cluster,
            "cluster_trouble": trouble,
            "history": history,
        }))
    }

    async fn ask_others(&self, across: &mut Option<Across>, within: Duration) {
        let now = SystemClock.monotonic();
        if across.as_ref().is_some_and(|last| now.saturating_sub(last.at) < ACROSS_EVERY) {
            return;
        }
        let (said, trouble) = match self.looking.cluster(true, within).await {
            Ok(said) => (said, None),
            // Who is there is known without asking them; of the runs it is what they said last.
            Err(e) => {
                let mut said = self.looking.cluster(false, within).await.unwrap_or_default();
                said.runs = across.take().map(|last| last.said.runs).unwrap_or_default();
                (said, Some(e.chain()))
            }
        };
        *across = Some(Across { at: SystemClock.monotonic(), said, trouble });
    }
}
