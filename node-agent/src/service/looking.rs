//! What an agent and its cluster look like now, in the words of the wire: for the command, which asks over a
//! socket, and for the status page.

use std::{os::unix::ffi::OsStrExt, sync::Arc, time::Duration};

use tierkeep::{
    Result,
    clock::{Clock, SystemClock},
    host::{Held, Host, PeersView, RankView, RunAcross},
    tier::TierKind,
};
use tierkeep_proto::control as wire;

use super::{asking::Asking, control::bytes};
use crate::cluster::{Cluster, Member};

/// Looks at a host, and at the others of its cluster.
pub(super) struct Looking {
    asking: Asking,
    cluster: Option<Arc<Cluster>>,
    begun: Duration,
}

impl Looking {
    pub(super) fn new(asking: Asking, cluster: Option<Arc<Cluster>>) -> Self {
        Self { asking, cluster, begun: SystemClock.monotonic() }
    }

    /// This agent's ranks.
    pub(super) async fn status(&self, within: Duration) -> Result<wire::StatusReply> {
        let look = |host: &Host| (host.memory(), host.ranks(), host.peers(), host.leaving());
        let (memory, ranks, others, leaving) = self.asking.ask(within, look).await?;
        let (ram_bytes, ram_limit_bytes) = memory?;
        Ok(wire::StatusReply {
            version: env!("CARGO_PKG_VERSION").into(),
            uptime_ms: millis(SystemClock.monotonic().saturating_sub(self.begun)),
            ram_bytes,
            ram_limit_bytes,
            ranks: ranks.into_iter().map(rank).collect(),
            peers: others.map(peers),
            leaving,
        })
    }

    /// All agents, and where asked for, all runs: these are asked of all agents. Without others it has no
    /// name in it.
    pub(super) async fn cluster(&self, runs: bool, within: Duration) -> Result<wire::ClusterReply> {
        let Some(cluster) = &self.cluster else { return Ok(wire::ClusterReply::default()) };
        let mut reply = seen(cluster);
        if runs {
            let runs = self.asking.ask(within, Host::across).await?;
            reply.runs = runs.into_iter().map(across).collect();
        }
        Ok(reply)
    }
}

fn across(run: RunAcross) -> wire::RunAcross {
    let held = |held: Held| wire::Holding {
        rank: held.rank,
        node: held.node,
        on_disk: held.tier == TierKind::Disk,
        step: held.step,
    };
    wire::RunAcross {
        destination: run.destination.as_os_str().as_bytes().to_vec(),
        newest: run.newest,
        held: run.held.into_iter().map(held).collect(),
        without: run.without.into_iter().map(|(node, step)| wire::Without { node, step }).collect(),
        trouble: run.trouble,
    }
}

fn seen(cluster: &Cluster) -> wire::ClusterReply {
    let member = |member: Member| wire::Member {
        name: member.name,
        address: member.address.to_string(),
        began_ms: member.life,
        labels: member.labels.into_iter().collect(),
        leaving: member.leaving,
    };
    wire::ClusterReply {
        cluster: Some(cluster.name().into()),
        node: cluster.own().into(),
        members: cluster.members().into_iter().map(member).collect(),
        replaced: cluster.is_replaced(),
        refused: cluster.refused(),
        runs: Vec::new(),
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn rank(view: RankView) -> wire::Rank {
    wire::Rank {
        destination: bytes(&view.destination),
        rank: view.rank,
        world: view.world,
        uid: view.uid,
        pid: view.pid,
        gone_ms: view.gone.map(millis),
        attempt: view.attempt,
        ram_step: view.in_ram,
        disk_step: view.on_disk,
        peer_step: view.on_peers,
        copies_wanted: view.copies_wanted,
        copies_there: view.copies_there,
        carrying: view.carrying,
        busy: view.busy,
        slot_bytes: view.slot_bytes,
        trouble: view.trouble,
        bucket: view.bucket,
        object_step: view.to_bucket.sealed,
        sending: view.to_bucket.sending,
        object_next: view.to_bucket.next,
        object_trouble: view.to_bucket.trouble,
        object_trouble_ms: view.to_bucket.trouble_for.map(millis),
        counters: Some(wire::Counters {
            saves: view.saves,
            saves_failed: view.saves_failed,
            saves_skipped: view.saves_skipped,
            captured_bytes: view.captured_bytes,
            captured_ns: view.captured_ns,
            disk_bytes: view.disk_bytes,
            disk_ns: view.disk_ns,
            disk_sealed: view.disk_sealed,
            disk_passed_over: view.disk_passed_over,
            checksum_failures: view.checksum_failures,
            repairs: view.repairs,
            peer_bytes: view.peer_bytes,
            peer_ns: view.peer_ns,
            peer_whole: view.peer_whole,
            peer_failed: view.peer_failed,
            peer_refused: view.peer_refused,
            peer_fetched_bytes: view.peer_fetched_bytes,
            object_bytes: view.object_bytes,
            object_ns: view.object_ns,
            object_sealed: view.object_sealed,
            object_passed_over: view.object_passed_over,
            object_failed: view.object_failed,
            object_fetched_bytes: view.object_fetched_bytes,
        }),
    }
}

fn peers(view: PeersView) -> wire::Peers {
    wire::Peers {
        nodes_alive: view.nodes_alive,
        nodes_lost: view.nodes_lost,
        held_shards: view.held_shards,
        held_bytes: view.held_bytes,
        received_bytes: view.received_bytes,
        given_bytes: view.given_bytes,
        healed_bytes: view.healed_bytes,
        offers_refused: view.offers_refused,
    }
}
