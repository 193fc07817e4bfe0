//! Agents talk to each other: one TCP port, beside the gossip's UDP port of the same number. Control is
//! gRPC, the bytes of shards are HTTP/1.1, both under mTLS unless plain text was asked for by name.
//!
//! ```text
//! core: Network -> Mesh -ask-> control (gRPC)      -> serve -> core: Host::answer
//!                       -push, pull-> bytes (HTTP) -> serve -> core: Host::incoming, outgoing
//! ```
//!
//! It carries and decides nothing: what is asked and what an answer means is the core's.
//!
//! # Invariants
//!
//! - Every call ends: connecting, answering and each chunk have their time.
//! - Nobody without a certificate of the cluster's authority is answered.

mod bytes;
mod chunks;
mod control;
mod head;
mod line;
mod pace;
mod serve;
mod tls;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tierkeep::{
    Error, Result,
    clock::{Deadline, SystemClock},
    peers::{Chunks, Landing, Network, Ticket},
    placement::Node,
    tier::Source,
};
use tierkeep_proto::peer as wire;

use self::{bytes::Carrier, control::Control};
pub use self::{
    serve::serve,
    tls::{Files as TlsFiles, Tls},
};
use crate::cluster::{Cluster, Member};

/// Failure domains, the widest first; below them the node itself.
const LEVELS: [&str; 3] = ["zone", "rack", "host"];

/// How an agent talks to others.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `None`: in plain text.
    pub tls: Option<Arc<Tls>>,
    /// Connections of one transfer.
    pub connections: usize,
    /// What goes out to other nodes at most, in bytes a second; `None`: as much as the network takes.
    pub rate: Option<u64>,
}

/// The way to the other agents.
pub struct Mesh {
    cluster: Arc<Cluster>,
    control: Control,
    carrier: Carrier,
    /// Names that were seen alive.
    seen: Mutex<BTreeSet<String>>,
}

impl std::fmt::Debug for Mesh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the agents of {} as {} sees them", self.cluster.name(), self.cluster.own())
    }
}

impl Mesh {
    /// Over the agents that gossip finds. Questions run on `runtime`.
    #[must_use]
    pub fn new(
        cluster: Arc<Cluster>,
        settings: &Settings,
        runtime: tokio::runtime::Handle,
    ) -> Self {
        Self {
            control: Control::new(settings.tls.clone(), runtime),
            carrier: Carrier::new(settings),
            cluster,
            seen: Mutex::default(),
        }
    }

    fn member(&self, node: &str) -> Result<Member> {
        let members = self.cluster.members();
        let member = members.into_iter().find(|member| member.name == node);
        member.ok_or_else(|| Error::Io {
            what: format!("reach {node}"),
            source: std::io::Error::new(
                std::io::ErrorKind::HostUnreachable,
                "its agent is not alive, as far as gossip tells",
            ),
        })
    }

    fn address(&self, node: &str) -> Result<SocketAddr> {
        self.member(node).map(|member| member.address)
    }

    fn see(&self, members: &[Member]) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.extend(members.iter().map(|member| member.name.clone()));
        seen
    }
}

impl Network for Mesh {
    fn me(&self) -> String {
        self.cluster.own().into()
    }

    fn nodes(&self) -> Vec<Node> {
        let members = self.cluster.members();
        drop(self.see(&members));
        nodes(&members)
    }

    fn is_settled(&self) -> bool {
        self.cluster.is_settled()
    }

    fn lost(&self) -> Vec<String> {
        let members = self.cluster.members();
        let alive: BTreeSet<&str> = members.iter().map(|member| member.name.as_str()).collect();
        let seen = self.see(&members);
        seen.iter().filter(|name| !alive.contains(name.as_str())).cloned().collect()
    }

    fn leaving(&self) -> BTreeSet<String> {
        let members = self.cluster.members().into_iter();
        members.filter(|member| member.leaving.is_some()).map(|member| member.name).collect()
    }

    fn ask(&self, node: &str, request: wire::Request, within: Duration) -> Result<wire::Reply> {
        let clock = SystemClock;
        let deadline = Deadline::after(&clock, within);
        // One that has begun anew elsewhere is asked there: the old address may swallow what is sent to it.
        loop {
            let member = self.member(node)?;
            let left = deadline.left(&clock).unwrap_or_default();
            let moved = self.cluster.moved(&member);
            if let Some(answer) = self.control.ask(&member, request.clone(), left, moved) {
                return answer;
            }
        }
    }

    fn push(
        &self,
        node: &str,
        ticket: &Ticket,
        from: &dyn Source,
        chunks: &Chunks<'_>,
    ) -> Result<()> {
        self.carrier.push(node, self.address(node)?, ticket, from, chunks)
    }

    fn pull(
        &self,
        node: &str,
        ticket: &Ticket,
        into: &dyn Landing,
        chunks: &Chunks<'_>,
    ) -> Result<()> {
        self.carrier.pull(node, self.address(node)?, ticket, into, chunks)
    }
}

/// Members as placement sees them. Levels that nobody names tell nodes apart no better.
fn nodes(members: &[Member]) -> Vec<Node> {
    let named = |level: &&str| members.iter().any(|member| member.labels.contains_key(*level));
    let levels: Vec<&str> = LEVELS.into_iter().filter(|level| named(level)).collect();
    let label = |labels: &BTreeMap<String, String>, level: &str| {
        labels.get(level).cloned().unwrap_or_default()
    };
    let node = |member: &Member| {
        let domains = levels.iter().map(|level| label(&member.labels, level));
        let domains = domains.chain([member.name.clone()]).collect();
        Node { name: member.name.clone(), domains }
    };
    members.iter().map(node).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_that_nobody_names_are_left_out() {
        let member = |name: &str, labels: &[(&str, &str)]| Member {
            name: name.into(),
            life: 1,
            address: "10.0.0.1:1".parse().unwrap(),
            labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            leaving: None,
        };
        let all = [member("a", &[("rack", "r1"), ("gpu", "h100")]), member("b", &[])];
        let nodes = nodes(&all);
        assert_eq!(nodes[0].domains, ["r1", "a"]);
        assert_eq!(nodes[1].domains, ["", "b"]);
    }
}
