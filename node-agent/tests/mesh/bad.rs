//! Peers that are there and are of no use: a copy goes to another node instead.

use std::{
    net::TcpStream,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    time::Duration,
};

use tierkeep::{
    begin::Begin,
    placement::{Node, Shard, place},
    save::Level,
};

use crate::{
    offering::{Offering, put},
    wire::{Manner, Wire},
    world::{Agent, bytes, comes_back, save},
};

/// A chunk is given 30 seconds.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(100);

/// A run in `dir` whose one rank, on node `a`, has its copy on `b` of three.
pub(crate) fn run_whose_copy_is_on_b(dir: &Path) -> PathBuf {
    let node = |name: &str| Node { name: name.into(), domains: vec![name.into()] };
    let nodes = ["a", "b", "c"].map(node);
    let on_b = |run: &PathBuf| {
        let shard = Shard { name: format!("{}#0", run.display()), node: 0 };
        place(&nodes, &[shard], 1).holders[0] == [1]
    };
    (0..).map(|n| dir.join(format!("run-{n}"))).find(on_b).unwrap()
}

fn goes_elsewhere(manner: Manner) {
    let disk = tempfile::tempdir().unwrap();
    let run = run_whose_copy_is_on_b(disk.path());
    let (wire, came) = Wire::new(manner);
    let a = Agent::start("a", &[], None);
    let b = Agent::start_behind(Some(wire), "b", &[a.at], None);
    let c = Agent::start("c", &[a.at], None);
    a.sees(&["a", "b", "c"]);
    let ckpt = a.open_with(&run, |config| config.peer_wait = GIVEN_UP_WITHIN);
    ckpt.begin(&Begin::default()).unwrap();
    let data = bytes(3);
    let saved = save(&ckpt, 1, &data);
    assert!(saved.poll(Level::Peer, false, GIVEN_UP_WITHIN).unwrap(), "{:?}", saved.progress());
    assert!(came.load(Ordering::Relaxed) > 0, "nothing went to b");
    // It is on `c`: that is enough.
    drop((ckpt, a, b));
    std::fs::remove_dir_all(&run).unwrap();
    let d = Agent::start("d", &[c.at], None);
    d.sees(&["c", "d"]);
    comes_back(&d, &run, 1, &data);
}

#[test]
fn a_peer_that_takes_chunks_and_never_answers_is_given_up() {
    goes_elsewhere(Manner::Silent);
}

#[test]
fn a_peer_that_takes_one_byte_a_second_is_given_up() {
    goes_elsewhere(Manner::Trickling);
}

#[test]
fn a_peer_that_closes_in_the_middle_is_given_up() {
    goes_elsewhere(Manner::Closing);
}

#[test]
fn chunks_in_any_order_and_twice_are_one_shard() {
    let offering = Offering::new(5);
    let ticket = offering.offer();
    let chunks = offering.chunks();
    let mut line = TcpStream::connect(offering.b.at).unwrap();
    let finish = || offering.finish(&ticket).unwrap();
    let wrong: Vec<u8> = chunks[1].iter().map(|byte| !byte).collect();
    assert_eq!(put(&mut line, &ticket, 2, chunks[2]), 204);
    assert_eq!(put(&mut line, &ticket, 1, &wrong), 422);
    assert_eq!(put(&mut line, &ticket, 1, &chunks[1][1..]), 422, "too short");
    assert_eq!(put(&mut line, &ticket, 2, chunks[1]), 422, "too long, and another one's");
    assert_eq!(finish(), [0, 1]);
    assert_eq!(put(&mut line, &ticket, 1, chunks[1]), 204);
    // What is there stays, whatever comes under its number.
    assert_eq!(put(&mut line, &ticket, 1, &wrong), 422);
    assert_eq!(put(&mut line, &ticket, 1, chunks[1]), 204);
    assert_eq!(put(&mut line, &ticket, 3, b"no such chunk"), 409);
    assert_eq!(put(&mut line, &"0".repeat(32), 0, chunks[0]), 404);
    assert_eq!(finish(), [0]);
    assert_eq!(put(&mut line, &ticket, 0, chunks[0]), 204);
    assert_eq!(finish(), [0_u64; 0]);
    assert_eq!(finish(), [0_u64; 0], "asked twice");
    // Late ones change nothing: the slot is no transfer's any more.
    assert_eq!(put(&mut line, &ticket, 1, &wrong), 422);
    assert!(offering.held().unwrap() == offering.payload);
}
