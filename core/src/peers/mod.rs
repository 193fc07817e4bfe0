//! Shards in the RAM of other nodes: how one is sent there, held there, and fetched from there.
//!
//! ```text
//! send: offer the manifest -> ticket -> chunks, each checked on arrival -> finish -> receipt
//! fetch: open -> ticket -> chunks from several holders at once, each checked -> a slot of this node
//! ```
//!
//! What another agent holds has the layout of any tier: its manifest lies beside it, and what arrives is
//! checked against that, not against the word of whoever sends.
//!
//! It owns what is said between agents and what a copy is. It owns no socket: bytes are carried by a
//! [`Network`]. Which node holds what is `placement`'s, when a shard goes there is `cascade`'s.
//!
//! # Invariants
//!
//! - A copy is acknowledged only when every chunk of it was checked where it lies, and its manifest is
//!   beside it.
//! - Nothing that a peer says becomes a path, an allocation or a checkpoint unchecked.
//! - A holder gives up what it acknowledged only where its owner's word lets it go.

pub(crate) mod commons;
pub(crate) mod fetch;
pub(crate) mod hold;
mod landing;
pub(crate) mod note;
pub(crate) mod remote;
pub(crate) mod send;

use std::{
    collections::BTreeSet,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tierkeep_proto::peer::{self as wire, reply::Answer, request::Ask};

use self::commons::Commons;
pub use self::landing::{Arriving, Broken, Chunks, Flow, Incoming, Landing};
use crate::{
    error::{Error, Result},
    names::{AttemptDir, CheckpointKey, Step},
    placement::Node,
    tier::{Source, object::address::is_url},
    wire::convert,
};

/// What stands for a transfer between its question and its end. Whoever has it may send, or read.
pub type Ticket = [u8; 16];

/// How long another agent may take to answer a question. One about a disk that hangs takes longer, and
/// is a failure.
pub(crate) const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A larger file is read by chunks.
pub(crate) const SMALL_BYTES: u64 = 4 << 20;

/// Agents that are asked at once: their answers wait for a network, not for a core.
pub(crate) const ASKED_AT_ONCE: usize = 32;

/// The other agents of the cluster, and a way to them.
///
/// Calls block, and end in time whatever the other side does.
pub trait Network: Send + Sync + std::fmt::Debug {
    /// This node's name.
    fn me(&self) -> String;
    /// The nodes whose agents are alive, this one among them, by name.
    fn nodes(&self) -> Vec<Node>;
    /// Whether that can be relied upon: an agent that has just begun does not know the others yet.
    fn is_settled(&self) -> bool;
    /// Nodes whose agents were alive and are not any more, by name.
    fn lost(&self) -> Vec<String>;
    /// Live nodes that are to go away, by name: what is there is not there for long.
    fn leaving(&self) -> BTreeSet<String>;
    /// Asks another agent.
    ///
    /// # Errors
    /// It could not be reached, or did not answer in time. What it answers may be a failure too.
    fn ask(&self, node: &str, request: wire::Request, within: Duration) -> Result<wire::Reply>;
    /// Sends chunks of `from`, as `chunks` hands them out, to a shard that was offered.
    ///
    /// # Errors
    /// The other side is out of reach, or too slow; or `from` cannot be read.
    fn push(
        &self,
        node: &str,
        ticket: &Ticket,
        from: &dyn Source,
        chunks: &Chunks<'_>,
    ) -> Result<()>;
    /// Reads chunks, as `chunks` hands them out, of a file that was opened.
    ///
    /// # Errors
    /// The other side is out of reach, or too slow; or `into` cannot take them.
    fn pull(
        &self,
        node: &str,
        ticket: &Ticket,
        into: &dyn Landing,
        chunks: &Chunks<'_>,
    ) -> Result<()>;
}

/// A run as all nodes know it: whose, and where it lies on each of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Site {
    pub(crate) destination: PathBuf,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

/// Groups that one user has at most; the kernel's own limit is larger, and nobody has so many.
const GROUPS_MAX: usize = 1024;

impl Site {
    pub(crate) fn of(said: wire::Site) -> Result<Self> {
        let destination = PathBuf::from(std::ffi::OsString::from_vec(said.destination));
        Self::new(destination, said.uid, said.gid, said.groups)
    }

    pub(crate) fn new(destination: PathBuf, uid: u32, gid: u32, groups: Vec<u32>) -> Result<Self> {
        let climbs = |part| matches!(part, std::path::Component::ParentDir);
        if !(destination.is_absolute() || destination.to_str().is_some_and(is_url))
            || destination.components().any(climbs)
        {
            return Err(Error::invalid(format!("{} is no destination", destination.display())));
        }
        let run = destination.file_name().and_then(|name| name.to_str()).unwrap_or("");
        crate::names::check_run_name(run)?;
        if groups.len() > GROUPS_MAX {
            return Err(Error::invalid(format!("a user of {} groups", groups.len())));
        }
        let destination = crate::config::absolute(&destination)?;
        Ok(Self { destination, uid, gid, groups })
    }

    fn wire(&self) -> wire::Site {
        wire::Site {
            destination: self.destination.as_os_str().as_bytes().to_vec(),
            uid: self.uid,
            gid: self.gid,
            groups: self.groups.clone(),
        }
    }
}

/// The other agents, asked about one run.
#[derive(Clone, Debug)]
pub(crate) struct Peers {
    pub(crate) network: Arc<dyn Network>,
    pub(crate) site: Site,
    pub(crate) commons: Arc<Commons>,
}

impl Peers {
    /// Asks `node`; its failure is an error.
    pub(crate) fn ask(&self, node: &str, ask: Ask) -> Result<Answer> {
        let (from, site) = (self.network.me(), Some(self.site.wire()));
        let request = wire::Request { from, site, ask: Some(ask) };
        match self.network.ask(node, request, ANSWER_WITHIN)?.answer {
            Some(Answer::Failure(failure)) => Err(convert::error(failure)),
            Some(answer) => Ok(answer),
            None => Err(odd(node)),
        }
    }

    /// The live nodes but this one.
    pub(crate) fn others(&self) -> Vec<Node> {
        let me = self.network.me();
        let mut nodes = self.network.nodes();
        nodes.retain(|node| node.name != me);
        nodes
    }

    /// Where copies of this node's shards may go: live nodes, this one among them, in the order in which they
    /// are to be asked. Those that are to go away come last, with the others.
    pub(crate) fn grounds(&self, refused: &BTreeSet<String>) -> Vec<Vec<Node>> {
        let (me, mut nodes) = (self.network.me(), self.network.nodes());
        let leaving = leaving(&*self.network, &nodes);
        nodes.retain(|node| !refused.contains(&node.name));
        let stays = |node: &&Node| node.name == me || !leaving.contains(&node.name);
        let staying: Vec<Node> = nodes.iter().filter(stays).cloned().collect();
        match staying.len() < nodes.len() {
            true => vec![staying, nodes],
            false => vec![nodes],
        }
    }
}

/// Those of the live nodes that are to go away, as far as the others can take what they hold: where most of
/// them are to go, the few that stay would be filled with what they have no room for.
pub(crate) fn leaving(network: &dyn Network, alive: &[Node]) -> BTreeSet<String> {
    let mut leaving = network.leaving();
    leaving.retain(|name| alive.iter().any(|node| node.name == *name));
    match 2 * leaving.len() > alive.len() {
        true => BTreeSet::new(),
        false => leaving,
    }
}

/// An answer that is none to the question.
pub(crate) fn odd(node: &str) -> Error {
    Error::invalid(format!("{node} answers what was not asked: it is of another version"))
}

pub(crate) fn ticket(node: &str, bytes: &[u8]) -> Result<Ticket> {
    bytes.try_into().map_err(|_| odd(node))
}

pub(crate) fn key_of(said: Option<&wire::Key>) -> Result<CheckpointKey> {
    let key = said.and_then(|said| {
        let attempt = AttemptDir::parse(&said.attempt)?;
        Some(CheckpointKey { step: Step(said.step), attempt })
    });
    key.ok_or_else(|| Error::invalid("a step without the name of an attempt"))
}

pub(crate) fn wire_key(key: &CheckpointKey) -> wire::Key {
    wire::Key { step: key.step.0, attempt: key.attempt.to_string() }
}
