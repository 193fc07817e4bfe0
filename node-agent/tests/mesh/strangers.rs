//! Strangers at an agent's port.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    path::Path,
    time::{Duration, Instant},
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{
    process::wait_for,
    world::{Agent, PATIENCE},
};

/// Strangers at once; `TIERKEEP_STRANGERS` of them where that is set.
const STRANGERS: usize = 1_500;

/// Connections that an agent has at once.
const CONNECTIONS_MAX: usize = 512;

/// Descriptors of this process besides: agents, their ram tiers, other tests.
const OTHER_FILES: usize = 300;

/// What an agent's memory may grow by, however many come.
const GROWTH_BYTES_MAX: u64 = 128 << 20;

/// As many as are wished for, or as this process may have open: both ends of a connection are its own.
fn strangers(wanted: usize) -> usize {
    let most = getrlimit(Resource::Nofile).maximum;
    let _ = setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most });
    let most = getrlimit(Resource::Nofile).current.and_then(|most| usize::try_from(most).ok());
    let room = most.unwrap_or(usize::MAX).saturating_sub(CONNECTIONS_MAX + OTHER_FILES);
    assert!(room > CONNECTIONS_MAX, "{room} files are no more than an agent has room for");
    wanted.min(room)
}

/// Connections that this port has and has not closed.
fn connections_at(port: u16) -> usize {
    let (port, established) = (format!(":{port:04X}"), "01");
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let is_one = |line: &&str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words[1].ends_with(&port) && words[3] == established
    };
    table.lines().skip(1).filter(is_one).count()
}

fn memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

/// Somebody whom `agent` has never seen is answered by it.
fn answers_a_new_peer(agent: &Agent, name: &str, run: &Path) {
    let fresh = Agent::start(name, &[agent.at], None);
    let begun = Instant::now();
    while let Err(e) = fresh.ask("a", run) {
        assert!(begun.elapsed() < PATIENCE, "{}", e.chain());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn strangers_at_the_port_keep_nobody_from_it() {
    let a = Agent::start("a", &[], None);
    let b = Agent::start("b", &[a.at], None);
    b.sees(&["a", "b"]);
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    b.ask("a", &run).unwrap();
    let wanted = std::env::var("TIERKEEP_STRANGERS").map_or(STRANGERS, |n| n.parse().unwrap());
    let count = strangers(wanted);
    let memory = memory_bytes();
    let held: Vec<TcpStream> = (0..count).map(|_| TcpStream::connect(a.at).unwrap()).collect();
    let begun = Instant::now();
    b.ask("a", &run).unwrap();
    answers_a_new_peer(&a, "c", &run);
    let more = memory_bytes().saturating_sub(memory);
    // Besides, those that are at the door at this moment; it closes them as fast as it can.
    let most = CONNECTIONS_MAX + 16;
    wait_for("strangers are sent away", || connections_at(a.at.port()) <= most);
    let connections = connections_at(a.at.port());
    println!(
        "{count} silent connections, {connections} of them left: answered after {:?}, memory {} KiB and \
         {} KiB more",
        begun.elapsed(),
        memory >> 10,
        more >> 10
    );
    assert!(more < GROWTH_BYTES_MAX, "{more} bytes for {count}");
    drop(held);
    b.ask("a", &run).unwrap();
    answers_a_new_peer(&a, "d", &run);
}

#[test]
fn strangers_that_say_half_a_greeting_keep_nobody_from_the_port() {
    let a = Agent::start("a", &[], None);
    let dir = tempfile::tempdir().unwrap();
    let count = strangers(CONNECTIONS_MAX + 100);
    for greeting in [&b"P"[..], b"PR", b"PRI * HTTP/2.0\r\n\r\nSM"] {
        let greet = |_| {
            let mut stranger = TcpStream::connect(a.at).unwrap();
            stranger.write_all(greeting).unwrap();
            stranger
        };
        let held: Vec<TcpStream> = (0..count).map(greet).collect();
        answers_a_new_peer(&a, &format!("after-{}", greeting.len()), &dir.path().join("run"));
        drop(held);
    }
}

#[test]
fn words_that_mean_nothing_are_answered_as_such_and_end() {
    let a = Agent::start("a", &[], None);
    let b = Agent::start("b", &[a.at], None);
    b.sees(&["a", "b"]);
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    // Cut anywhere.
    let good = format!(
        "PUT /chunks/{}/0 HTTP/1.1\r\nhost: x\r\ncontent-length: 4096\r\n\r\n",
        "a".repeat(32)
    );
    for cut in (0..good.len()).step_by(7) {
        let mut stranger = TcpStream::connect(a.at).unwrap();
        stranger.write_all(&good.as_bytes()[..cut]).unwrap();
    }
    for noise in
        [&b"\0\0\0\0\0\0\0"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff", b"GET"]
    {
        let mut stranger = TcpStream::connect(a.at).unwrap();
        stranger.write_all(noise).unwrap();
        stranger.shutdown(Shutdown::Write).unwrap();
        let mut said = Vec::new();
        let _ = stranger.read_to_end(&mut said); // Whatever it is, it ends.
    }
    for (path, status) in [
        (format!("/chunks/{}/0", "a".repeat(32)), "404"),
        ("/chunks/../0".into(), "404"),
        ("/chunks/x/0".into(), "404"),
        (format!("/chunks/{}/-1", "a".repeat(32)), "404"),
        ("/".into(), "404"),
    ] {
        let mut stranger = TcpStream::connect(a.at).unwrap();
        let text = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stranger.write_all(text.as_bytes()).unwrap();
        let mut said = String::new();
        stranger.read_to_string(&mut said).unwrap();
        assert!(said.starts_with(&format!("HTTP/1.1 {status}")), "{path}: {said}");
    }
    b.ask("a", &run).unwrap();
}
