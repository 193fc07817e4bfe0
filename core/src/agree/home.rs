//! Decisions that lie with another node's agent, the leader's.
//!
//! What is recorded goes there at once; what others have recorded is heard, some moments later, and read
//! from what was heard.
//!
//! # Invariants
//!
//! - What was recorded through here is known here when the call returns.
//! - A home that does not answer is asked again for a while: an agent that is upgraded is back in seconds,
//!   and nothing may be given up for that.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tierkeep_proto::peer::{self as wire, reply::Answer, request::Ask};

use crate::{
    clock::{Deadline, SharedClock},
    error::{Error, Result},
    names::Id,
    observe::locked,
    peers::{Peers, odd},
    signal::Signal,
};

/// How long a home that does not answer is asked.
const AWAY: Duration = Duration::from_secs(30);
/// Between two tries.
const AGAIN: Duration = Duration::from_millis(200);
/// How long the home waits for news before it answers that there are none.
const NEWS_WAIT: Duration = Duration::from_secs(5);

/// The way to the decisions of one attempt.
#[derive(Debug)]
pub(crate) struct Home {
    line: Arc<Line>,
}

#[derive(Debug)]
struct Line {
    peers: Peers,
    node: String,
    /// The name of the attempt's directory.
    attempt: String,
    heard: Mutex<BTreeMap<String, String>>,
    clock: SharedClock,
    /// Told of all that is heard.
    signal: Arc<Signal>,
    over: AtomicBool,
}

impl Drop for Home {
    fn drop(&mut self) {
        self.line.over.store(true, Ordering::Release);
    }
}

impl Home {
    /// Begins to listen.
    pub(crate) fn new(
        peers: Peers,
        node: String,
        attempt: String,
        clock: SharedClock,
        signal: Arc<Signal>,
    ) -> Result<Self> {
        let (heard, over) = (Mutex::default(), AtomicBool::new(false));
        let line = Arc::new(Line { peers, node, attempt, heard, clock, signal, over });
        let (listening, mut known) = (line.clone(), Known::default());
        // What was decided before is known from the start.
        line.retried(|| listening.listen(&mut known, Duration::ZERO))?;
        std::thread::Builder::new()
            .name("tierkeep-news".into())
            .spawn(move || {
                while !listening.over.load(Ordering::Acquire) {
                    if let Err(e) = listening.listen(&mut known, NEWS_WAIT) {
                        tracing::debug!("no news from {}: {}", listening.node, e.chain());
                        listening.clock.pause(AGAIN);
                    }
                }
            })
            .map_err(|source| Error::Io { what: "start a thread".into(), source })?;
        Ok(Self { line })
    }

    pub(crate) fn names(&self) -> Vec<String> {
        locked(&self.line.heard).keys().cloned().collect()
    }

    pub(crate) fn said(&self, name: &str) -> Option<String> {
        locked(&self.line.heard).get(name).cloned()
    }

    /// As it is at home now.
    pub(crate) fn ask_for(&self, name: &str) -> Result<Option<String>> {
        self.line.decide(name, None, false)
    }

    pub(crate) fn record(&self, name: &str, text: &str) -> Result<String> {
        let said = self.line.decide(name, Some(text), false)?;
        said.ok_or_else(|| odd(&self.line.node))
    }

    /// Records it, if its home answers now.
    pub(crate) fn tell(&self, name: &str, text: &str) -> Result<()> {
        self.line.try_decide(name, Some(text), false).map(drop)
    }

    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        self.line.decide(name, None, true).map(drop)
    }
}

/// How far it was heard.
#[derive(Default)]
struct Known {
    life: Option<Id>,
    upto: u64,
}

impl Line {
    fn retried<T>(&self, mut deed: impl FnMut() -> Result<T>) -> Result<T> {
        let deadline = Deadline::after(&*self.clock, AWAY);
        loop {
            match deed() {
                Err(e) if may_pass(&e) && deadline.left(&*self.clock).is_some() => {
                    if self.over.load(Ordering::Acquire) {
                        return Err(e);
                    }
                    self.clock.pause(AGAIN);
                }
                other => return other,
            }
        }
    }

    fn decide(&self, name: &str, text: Option<&str>, remove: bool) -> Result<Option<String>> {
        self.retried(|| self.try_decide(name, text, remove))
    }

    fn try_decide(&self, name: &str, text: Option<&str>, remove: bool) -> Result<Option<String>> {
        let decide = wire::Decide {
            attempt: self.attempt.clone(),
            name: name.into(),
            text: text.map(Into::into),
            remove,
        };
        let Answer::Decided(decided) = self.peers.ask(&self.node, Ask::Decide(decide))? else {
            return Err(odd(&self.node));
        };
        let said = decided.text;
        let mut heard = locked(&self.heard);
        match &said {
            Some(said) => heard.insert(name.into(), said.clone()),
            None => heard.remove(name),
        };
        Ok(said)
    }

    fn listen(&self, known: &mut Known, wait: Duration) -> Result<()> {
        let news = wire::News {
            attempt: self.attempt.clone(),
            life: known.life.map_or_else(Vec::new, |life| life.0.to_vec()),
            since: known.upto,
            wait_ms: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
        };
        let Answer::Heard(said) = self.peers.ask(&self.node, Ask::News(news))? else {
            return Err(odd(&self.node));
        };
        let mut heard = locked(&self.heard);
        if said.whole {
            heard.clear();
        }
        let any = !said.words.is_empty();
        for word in said.words {
            match word.text {
                Some(text) => heard.insert(word.name, text),
                None => heard.remove(&word.name),
            };
        }
        drop(heard);
        known.life = said.life.try_into().ok().map(Id);
        known.upto = said.upto;
        if any {
            self.signal.notify();
        }
        Ok(())
    }
}

/// Whether its home may answer later.
fn may_pass(error: &Error) -> bool {
    use crate::error::ErrorKind as Kind;
    matches!(error.kind(), Kind::Unavailable | Kind::NotFound)
}
