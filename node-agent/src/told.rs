//! What programs are told of an agent and of its cluster: one form for `tierkeep status --json`, `tierkeep
//! top --json` and the status page.

use std::{collections::BTreeMap, path::Path, time::Duration};

use serde::Serialize;
use tierkeep_proto::control::{
    ClusterReply, Counters, Holding, Member, Peers, Rank, RunAcross, StatusReply,
};

use crate::service::control::path;

#[derive(Serialize)]
pub(crate) struct Data {
    agent: AgentData,
    ram_bytes: u64,
    ram_limit_bytes: u64,
    leaving: Option<String>,
    ranks: Vec<RankData>,
    peers: Option<PeersData>,
}

#[derive(Serialize)]
struct PeersData {
    nodes_alive: u64,
    nodes_lost: u64,
    held_shards: u64,
    held_bytes: u64,
    received_bytes: u64,
    given_bytes: u64,
    healed_bytes: u64,
    offers_refused: u64,
}

#[derive(Serialize)]
struct AgentData {
    version: String,
    uptime_s: f64,
    socket: String,
}

#[derive(Serialize)]
struct RankData {
    destination: String,
    rank: u32,
    world: u32,
    uid: u32,
    pid: Option<u32>,
    gone_s: Option<f64>,
    attempt: Option<u32>,
    ram_step: Option<u64>,
    disk_step: Option<u64>,
    peer_step: Option<u64>,
    copies_wanted: u64,
    copies_there: u64,
    carrying: Option<u64>,
    busy: bool,
    slot_bytes: u64,
    trouble: Option<String>,
    bucket: Option<String>,
    object_step: Option<u64>,
    sending: Option<u64>,
    object_next: Option<u64>,
    object_trouble: Option<String>,
    object_trouble_s: Option<f64>,
    counters: CountersData,
}

#[derive(Serialize)]
struct CountersData {
    saves: u64,
    saves_failed: u64,
    saves_skipped: u64,
    captured_bytes: u64,
    captured_s: f64,
    disk_bytes: u64,
    disk_s: f64,
    disk_sealed: u64,
    disk_passed_over: u64,
    checksum_failures: u64,
    repairs: u64,
    peer_bytes: u64,
    peer_s: f64,
    peer_whole: u64,
    peer_failed: u64,
    peer_refused: u64,
    peer_fetched_bytes: u64,
    object_bytes: u64,
    object_s: f64,
    object_sealed: u64,
    object_passed_over: u64,
    object_failed: u64,
    object_fetched_bytes: u64,
}

#[derive(Serialize)]
pub(crate) struct ClusterData<'a> {
    cluster: &'a str,
    node: &'a str,
    replaced: bool,
    refused_packets: u64,
    members: Vec<MemberData<'a>>,
    runs: Vec<RunData<'a>>,
}

#[derive(Serialize)]
struct RunData<'a> {
    run: String,
    newest_step: Option<u64>,
    held: Vec<HeldData<'a>>,
    newest_step_without: BTreeMap<&'a str, Option<u64>>,
    trouble: &'a [String],
}

#[derive(Serialize)]
struct HeldData<'a> {
    rank: u32,
    node: &'a str,
    tier: &'static str,
    step: u64,
}

#[derive(Serialize)]
struct MemberData<'a> {
    name: &'a str,
    address: &'a str,
    began_unix_ms: u64,
    labels: BTreeMap<&'a str, &'a str>,
    leaving: Option<&'a str>,
}

/// One agent; its trainers come to `socket`.
pub(crate) fn status(socket: &Path, status: &StatusReply) -> Data {
    Data {
        agent: AgentData {
            version: status.version.clone(),
            uptime_s: exact(status.uptime_ms),
            socket: socket.display().to_string(),
        },
        ram_bytes: status.ram_bytes,
        ram_limit_bytes: status.ram_limit_bytes,
        leaving: status.leaving.clone(),
        ranks: status.ranks.iter().map(rank_data).collect(),
        peers: status.peers.as_ref().map(peers_data),
    }
}

fn peers_data(peers: &Peers) -> PeersData {
    PeersData {
        nodes_alive: peers.nodes_alive,
        nodes_lost: peers.nodes_lost,
        held_shards: peers.held_shards,
        held_bytes: peers.held_bytes,
        received_bytes: peers.received_bytes,
        given_bytes: peers.given_bytes,
        healed_bytes: peers.healed_bytes,
        offers_refused: peers.offers_refused,
    }
}

fn exact(ms: u64) -> f64 {
    Duration::from_millis(ms).as_secs_f64()
}

fn rank_data(rank: &Rank) -> RankData {
    let counters: Counters = rank.counters.unwrap_or_default();
    RankData {
        destination: path(&rank.destination),
        rank: rank.rank,
        world: rank.world,
        uid: rank.uid,
        pid: rank.pid,
        gone_s: rank.gone_ms.map(exact),
        attempt: rank.attempt,
        ram_step: rank.ram_step,
        disk_step: rank.disk_step,
        peer_step: rank.peer_step,
        copies_wanted: rank.copies_wanted,
        copies_there: rank.copies_there,
        carrying: rank.carrying,
        busy: rank.busy,
        slot_bytes: rank.slot_bytes,
        trouble: rank.trouble.clone(),
        bucket: rank.bucket.clone(),
        object_step: rank.object_step,
        sending: rank.sending,
        object_next: rank.object_next,
        object_trouble: rank.object_trouble.clone(),
        object_trouble_s: rank.object_trouble_ms.map(exact),
        counters: CountersData {
            saves: counters.saves,
            saves_failed: counters.saves_failed,
            saves_skipped: counters.saves_skipped,
            captured_bytes: counters.captured_bytes,
            captured_s: Duration::from_nanos(counters.captured_ns).as_secs_f64(),
            disk_bytes: counters.disk_bytes,
            disk_s: Duration::from_nanos(counters.disk_ns).as_secs_f64(),
            disk_sealed: counters.disk_sealed,
            disk_passed_over: counters.disk_passed_over,
            checksum_failures: counters.checksum_failures,
            repairs: counters.repairs,
            peer_bytes: counters.peer_bytes,
            peer_s: Duration::from_nanos(counters.peer_ns).as_secs_f64(),
            peer_whole: counters.peer_whole,
            peer_failed: counters.peer_failed,
            peer_refused: counters.peer_refused,
            peer_fetched_bytes: counters.peer_fetched_bytes,
            object_bytes: counters.object_bytes,
            object_s: Duration::from_nanos(counters.object_ns).as_secs_f64(),
            object_sealed: counters.object_sealed,
            object_passed_over: counters.object_passed_over,
            object_failed: counters.object_failed,
            object_fetched_bytes: counters.object_fetched_bytes,
        },
    }
}

/// All agents, where this one has others.
pub(crate) fn cluster(reply: &ClusterReply) -> Option<ClusterData<'_>> {
    Some(ClusterData {
        cluster: reply.cluster.as_deref()?,
        node: &reply.node,
        replaced: reply.replaced,
        refused_packets: reply.refused,
        members: reply.members.iter().map(member_data).collect(),
        runs: reply.runs.iter().map(run_data).collect(),
    })
}

fn member_data(member: &Member) -> MemberData<'_> {
    MemberData {
        name: &member.name,
        address: &member.address,
        began_unix_ms: member.began_ms,
        labels: labels(member),
        leaving: member.leaving.as_deref(),
    }
}

fn run_data(run: &RunAcross) -> RunData<'_> {
    let held = run.held.iter().map(|held| HeldData {
        rank: held.rank,
        node: &held.node,
        tier: tier(held),
        step: held.step,
    });
    RunData {
        run: name(run),
        newest_step: run.newest,
        held: held.collect(),
        newest_step_without: run.without.iter().map(|w| (w.node.as_str(), w.step)).collect(),
        trouble: &run.trouble,
    }
}

/// Where a shard is held.
pub(crate) fn tier(held: &Holding) -> &'static str {
    if held.on_disk { "disk" } else { "ram" }
}

/// The run's directory, for people.
pub(crate) fn name(run: &RunAcross) -> String {
    String::from_utf8_lossy(&run.destination).into_owned()
}

/// Where a node is, as it says.
pub(crate) fn labels(member: &Member) -> BTreeMap<&str, &str> {
    member.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
}
