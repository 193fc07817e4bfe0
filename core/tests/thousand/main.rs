//! What a job over many nodes asks of them: with N agents each checkpoint and each restart has messages in
//! proportion to N, and they are counted.
//!
//! `TIERKEEP_SIM_NODES=1000 cargo test --release --test thousand -- --nocapture` is the large one, by hand.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // Tests.
#![allow(clippy::print_stdout, unreachable_pub)]

#[path = "../common/mod.rs"]
mod common;
mod inventory;
mod world;

use std::{fmt::Write as _, time::Duration};

use tierkeep::save::Level;
use world::{Counts, Job, World};

/// Nodes of the larger one of two jobs.
fn nodes_max() -> usize {
    std::env::var("TIERKEEP_SIM_NODES").map_or(64, |said| said.parse().unwrap())
}

fn names(count: usize) -> Vec<String> {
    (0..count).map(|index| format!("n{index:04}")).collect()
}

fn total(counts: &Counts) -> u64 {
    counts.values().map(|count| count.asked).sum()
}

/// Who waits for the leader asks now and then who leads: that is in proportion to the wait, and each node's.
fn total_but_waits(nodes: usize, (counts, took): &(Counts, Duration)) -> u64 {
    let asked = counts.get("WhoLeads").map_or(0, |count| count.asked);
    let most = nodes as u64 * (4 + took.as_secs());
    assert!(asked <= most, "{asked} questions who leads in {took:?}");
    total(counts) - asked
}

fn tell(what: &str, nodes: usize, (counts, took): &(Counts, Duration)) {
    let mut text = format!("{what}, {nodes} nodes: {} messages", total(counts));
    let bytes: u64 = counts.values().map(|count| count.bytes).sum();
    write!(text, ", {:.1} MB, {:.2} s", bytes as f64 / 1e6, took.as_secs_f64()).unwrap();
    for (kind, count) in counts {
        write!(text, "\n  {kind:14} {:7}  {:9.3} MB", count.asked, count.bytes as f64 / 1e6)
            .unwrap();
    }
    println!("{text}");
}

/// What a job of so many nodes asks in its life.
struct Life {
    nodes: u64,
    to_peers: u64,
    to_disk: u64,
    one_lost: u64,
    all_moved: u64,
}

impl Life {
    fn of(nodes: usize) -> Self {
        let mut at = names(nodes);
        let ranks = u32::try_from(nodes).unwrap();
        let world = World::new(&at);
        let job = Job::start(&world, &at, ranks);
        tell("a first start", nodes, &world.counted(|| assert_eq!(job.resume(), 0)));
        // The first checkpoint of an attempt has more to say.
        job.save(1, &[Level::Peer, Level::Disk]);
        let to_peers = world.counted(|| job.save(2, &[Level::Peer]));
        tell("a checkpoint to other nodes", nodes, &to_peers);
        let to_disk = world.counted(|| job.save(3, &[Level::Peer, Level::Disk]));
        tell("a checkpoint to other nodes and to disk", nodes, &to_disk);
        // One node is lost, and another one comes.
        world.lose(&at[nodes / 2]);
        drop(job);
        at[nodes / 2] = "new".into();
        world.begin("new");
        let job = Job::start(&world, &at, ranks);
        let one_lost = world.counted(|| assert_eq!(job.resume(), 3));
        tell("a restart with one node lost", nodes, &one_lost);
        job.save(4, &[Level::Peer, Level::Disk]);
        // Every rank comes to another node.
        drop(job);
        at.rotate_left(nodes / 3);
        let job = Job::start(&world, &at, ranks);
        let all_moved = world.counted(|| assert_eq!(job.resume(), 4));
        tell("a restart with all ranks moved", nodes, &all_moved);
        job.save(5, &[Level::Peer]);
        drop(job);
        world.end();
        Self {
            nodes: nodes as u64,
            to_peers: total(&to_peers.0),
            to_disk: total(&to_disk.0),
            one_lost: total_but_waits(nodes, &one_lost),
            all_moved: total_but_waits(nodes, &all_moved),
        }
    }
}

/// What all may be: of each kind so many a node, and what they are needed for.
///
/// A checkpoint: a rank says that it saves, that its shard is in RAM, held, and on disk (4);
/// asks the holder of the one before whether it has it, offers, and asks whether all is there (3); and hears,
/// one by one at most, that the step is saved, in RAM, to be copied, to be carried, held, and sealed (6).
/// What was forgotten comes with these; a holder that is none any more is told to let go (1).
const A_CHECKPOINT: u64 = 4 + 3 + 6 + 1;

/// A restart: the leader looks at two tiers of each node, at the manifests of two steps (4), and says that it
/// leads (1); a rank asks for its place (1), and then has as much to say as in a checkpoint, of what is
/// resumed from, for which it asks where its ranks are and brings the records (2).
const A_RESTART: u64 = 4 + 1 + 1 + A_CHECKPOINT + 2;

/// A rank that is somewhere else asks who holds its shard (1), looks twice at each of three places, and opens
/// it there (9), and lets older holders go (2).
const A_MOVE: u64 = 1 + 9 + 2;

/// Whatever the number of nodes: one is lost.
const SLACK: u64 = 60;

#[test]
fn messages_are_in_proportion_to_the_nodes() {
    let (half, whole) = (Life::of(nodes_max() / 2), Life::of(nodes_max()));
    let counts = |life: &Life| {
        let nodes = life.nodes;
        [
            ("a checkpoint to other nodes", life.to_peers, A_CHECKPOINT * nodes),
            ("a checkpoint to disk", life.to_disk, A_CHECKPOINT * nodes),
            ("a restart with one node lost", life.one_lost, A_RESTART * nodes + SLACK),
            (
                "a restart with all ranks moved",
                life.all_moved,
                (A_RESTART + A_MOVE) * nodes + SLACK,
            ),
        ]
    };
    for ((what, few, most_few), (_, many, most)) in counts(&half).into_iter().zip(counts(&whole)) {
        assert!(few <= most_few, "{what}, {} nodes: {few} messages, not {most_few}", half.nodes);
        assert!(many <= most, "{what}, {} nodes: {many} messages, not {most}", whole.nodes);
        // Twice as many nodes, twice as many messages; if each asked each, four times as many.
        assert!(many <= 3 * few, "{what}: {few} messages, with twice as many nodes {many}");
    }
}
