//! Peers that are there and are of no use: a copy goes to another node instead.

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    time::Duration,
};

use tierkeep::{
    begin::Begin,
    peers::Network,
    placement::{Node, Shard, place},
    save::Level,
};
use tierkeep_proto::peer::{self as wire, reply::Answer, request::Ask};

use crate::{
    wire::{Manner, Wire},
    world::{Agent, bytes, comes_back, save},
};

/// A chunk is given 30 seconds.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(100);

/// A run in `dir` whose one rank, on node `a`, has its copy on `b` of three.
fn run_whose_copy_is_on_b(dir: &Path) -> PathBuf {
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

/// What lies under a directory, by its end.
fn file_in(dir: &Path, end: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths.into_iter().find_map(|path| match path.is_dir() {
        true => file_in(&path, end),
        false => path.to_str().is_some_and(|path| path.ends_with(end)).then_some(path),
    })
}

/// What an agent answers to a chunk.
fn put(line: &mut TcpStream, ticket: &str, chunk: usize, bytes: &[u8]) -> u16 {
    let head = format!(
        "PUT /chunks/{ticket}/{chunk} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
        bytes.len()
    );
    line.write_all(head.as_bytes()).unwrap();
    line.write_all(bytes).unwrap();
    let mut said = Vec::new();
    while !said.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        line.read_exact(&mut byte).unwrap();
        said.push(byte[0]);
    }
    let said = String::from_utf8(said).unwrap();
    let length = said.split("content-length: ").nth(1).and_then(|l| l.split('\r').next());
    let length = length.map_or(0, |length| length.parse().unwrap());
    line.read_exact(&mut vec![0; length]).unwrap();
    said[9..12].parse().unwrap()
}

#[test]
fn chunks_in_any_order_and_twice_are_one_shard() {
    let disk = tempfile::tempdir().unwrap();
    let run = disk.path().join("run");
    let a = Agent::start("a", &[], None);
    let b = Agent::start("b", &[a.at], None);
    a.sees(&["a", "b"]);
    let ckpt = a.open_with(&run, |config| config.replicas = Some(0));
    ckpt.begin(&Begin::default()).unwrap();
    let data = bytes(5);
    let saved = save(&ckpt, 1, &data);
    assert!(saved.poll(Level::Ram, false, Duration::from_secs(20)).unwrap());
    let manifest = file_in(a.ram.path(), "rank-000000.json").unwrap();
    let payload = std::fs::read(file_in(a.ram.path(), ".safetensors").unwrap()).unwrap();
    let attempt = manifest.parent().unwrap().file_name().unwrap().to_str().unwrap();
    let key = Some(wire::Key { step: 1, attempt: attempt.into() });
    let manifest = std::fs::read(&manifest).unwrap();
    let ask = |ask: Ask| {
        let request = b.request(&run, ask);
        a.mesh.ask("b", request, Duration::from_secs(5)).unwrap().answer.unwrap()
    };
    let offer = wire::Offer { key, manifest, attempt: 1, ..Default::default() };
    let Answer::Taken(taken) = ask(Ask::Offer(offer)) else { panic!() };
    let ticket: String = taken.ticket.iter().map(|byte| format!("{byte:02x}")).collect();
    let chunks: Vec<&[u8]> = payload.chunks(4 << 20).collect();
    assert_eq!(chunks.len(), 3);
    let mut line = TcpStream::connect(b.at).unwrap();
    let finish = || match ask(Ask::Finish(wire::Finish { ticket: taken.ticket.clone() })) {
        Answer::Finished(finished) => finished.missing,
        other => panic!("{other:?}"),
    };
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
    let held = file_in(b.ram.path(), ".safetensors").unwrap();
    assert!(std::fs::read(held).unwrap() == payload);
}
