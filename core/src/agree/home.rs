//! Decisions that lie with another node's agent, the leader's.
//!
//! What is recorded goes there at once; what others have recorded is heard, some moments later, and read
//! from what was heard.
//!
//! # Invariants
//!
//! - What was recorded through here is known here when the call returns.
//! - The ranks of a node share one line: the home is listened to by nodes, not by ranks.
//! - A home that does not answer is asked again for a while: an agent that is upgraded is back in seconds,
//!   and nothing may be given up for that.

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::{Arc, Mutex, Weak},
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
/// Between two tries; where nobody waits for it, longer each time.
const AGAIN: Duration = Duration::from_millis(200);
const AGAIN_MAX: Duration = Duration::from_secs(2);
/// How long the home waits for news before it answers that there are none.
const NEWS_WAIT: Duration = Duration::from_secs(5);

/// The way to the decisions of one attempt.
#[derive(Debug)]
pub(crate) struct Home {
    line: Arc<Line>,
}

/// What the ranks of this node share of it: one of them listens for all.
#[derive(Debug)]
pub(crate) struct Line {
    peers: Peers,
    node: String,
    /// The name of the attempt's directory.
    attempt: String,
    heard: Mutex<BTreeMap<String, String>>,
    clock: SharedClock,
    /// Told of all that is heard.
    ranks: Mutex<Vec<Weak<Signal>>>,
    /// Held while it is begun. True: what was decided before is known.
    begun: Mutex<bool>,
}

impl Home {
    /// Begins to listen, where no other rank of this node does.
    pub(crate) fn new(
        peers: &Peers,
        node: String,
        attempt: String,
        clock: &SharedClock,
        signal: &Arc<Signal>,
    ) -> Result<Self> {
        let begin = |node, attempt| {
            let (heard, ranks, begun) = (Mutex::default(), Mutex::default(), Mutex::default());
            Line { peers: peers.clone(), node, attempt, heard, clock: clock.clone(), ranks, begun }
        };
        let line = peers.commons.line(&peers.site, node, attempt, begin);
        {
            let mut ranks = locked(&line.ranks);
            ranks.retain(|rank| rank.strong_count() > 0);
            ranks.push(Arc::downgrade(signal));
        }
        Line::begin(&line)?;
        Ok(Self { line })
    }

    /// Names that begin so, in order.
    pub(crate) fn names(&self, prefix: &str) -> Vec<String> {
        let heard = locked(&self.line.heard);
        let from = heard.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        from.map(|(name, _)| name).take_while(|name| name.starts_with(prefix)).cloned().collect()
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
    /// What was decided before is known when this returns.
    fn begin(line: &Arc<Self>) -> Result<()> {
        let mut begun = locked(&line.begun);
        if *begun {
            return Ok(());
        }
        let mut known = Known::default();
        line.retried(|| line.listen(&mut known, Duration::ZERO))?;
        let (listening, clock) = (Arc::downgrade(line), line.clock.clone());
        let listen = move || {
            let mut pause = AGAIN;
            // It ends with the last rank that has it.
            while let Some(line) = listening.upgrade() {
                let heard = line.listen(&mut known, NEWS_WAIT);
                if let Err(e) = &heard {
                    tracing::debug!("no news from {}: {}", line.node, e.chain());
                }
                drop(line);
                match heard {
                    Ok(()) => pause = AGAIN,
                    Err(_) => {
                        clock.pause(pause);
                        pause = (2 * pause).min(AGAIN_MAX);
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("tierkeep-news".into()).spawn(listen);
        thread.map_err(|source| Error::Io { what: "start a thread".into(), source })?;
        *begun = true;
        Ok(())
    }

    fn retried<T>(&self, mut deed: impl FnMut() -> Result<T>) -> Result<T> {
        let deadline = Deadline::after(&*self.clock, AWAY);
        loop {
            match deed() {
                Err(e) if may_pass(&e) && deadline.left(&*self.clock).is_some() => {
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
            let ranks = locked(&self.ranks).clone();
            ranks.iter().filter_map(Weak::upgrade).for_each(|rank| rank.notify());
        }
        Ok(())
    }
}

/// Whether its home may answer later.
fn may_pass(error: &Error) -> bool {
    use crate::error::ErrorKind as Kind;
    matches!(error.kind(), Kind::Unavailable | Kind::NotFound)
}
