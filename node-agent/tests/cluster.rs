//! Agents that find and miss each other, by real UDP on this machine; the last test by the command.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // Tests: real sockets, real time.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, UdpSocket},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tierkeep_agent::cluster::{Cluster, Key, Settings};

const PATIENCE: Duration = Duration::from_secs(20);

/// An address on this machine that nobody uses.
fn free() -> SocketAddr {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn settings(name: &str, key: &[u8], seeds: &[SocketAddr]) -> Settings {
    let at = free();
    Settings {
        name: name.into(),
        cluster: "test".into(),
        key: Key::new(key),
        listen: at,
        advertise: at,
        seeds: seeds.iter().map(ToString::to_string).collect(),
        labels: BTreeMap::from([("rack".into(), format!("rack of {name}"))]),
    }
}

async fn join(name: &str, seeds: &[SocketAddr]) -> (Cluster, SocketAddr) {
    let settings = settings(name, b"key", seeds);
    let at = settings.listen;
    (Cluster::join(settings, BTreeMap::new()).await.unwrap(), at)
}

fn names(cluster: &Cluster) -> Vec<String> {
    cluster.members().into_iter().map(|m| m.name).collect()
}

/// Until all of them see just these; how long that took.
async fn until(clusters: &[&Cluster], wanted: &[&str]) -> Duration {
    let begun = Instant::now();
    while clusters.iter().any(|cluster| names(cluster) != wanted) {
        let seen: Vec<_> = clusters.iter().map(|c| names(c)).collect();
        assert!(begun.elapsed() < PATIENCE, "{seen:?}, not {wanted:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    begun.elapsed()
}

#[tokio::test]
async fn agents_find_each_other_by_one_seed_with_what_they_say_of_themselves() {
    let (a, seed) = join("a", &[]).await;
    let (b, _) = join("b", &[seed]).await;
    let (c, _) = join("c", &[seed]).await;
    until(&[&a, &b, &c], &["a", "b", "c"]).await;
    for member in c.members() {
        assert_eq!(member.labels["rack"], format!("rack of {}", member.name));
        assert!(member.address.ip().is_loopback());
    }
}

#[tokio::test]
async fn one_that_dies_is_missed_and_comes_back_at_another_address() {
    let (a, seed) = join("a", &[]).await;
    let (b, _) = join("b", &[seed]).await;
    let (c, _) = join("c", &[seed]).await;
    until(&[&a, &b, &c], &["a", "b", "c"]).await;
    let before = a.members()[2].life;
    // Usual intervals are known.
    tokio::time::sleep(Duration::from_secs(3)).await;
    c.leave();
    let missed = until(&[&a, &b], &["a", "b"]).await;
    println!("missed after {missed:?}");
    assert_eq!(names(&c), ["c"], "who has left knows of nobody");
    let (c, _) = join("c", &[seed]).await;
    until(&[&a, &b, &c], &["a", "b", "c"]).await;
    assert!(a.members()[2].life > before);
}

#[tokio::test]
async fn of_two_with_one_name_the_later_counts_and_the_other_knows() {
    let (a, seed) = join("a", &[]).await;
    let (older, _) = join("b", &[seed]).await;
    until(&[&a, &older], &["a", "b"]).await;
    let (newer, _) = join("b", &[seed]).await;
    until(&[&a, &newer], &["a", "b"]).await;
    let begun = Instant::now();
    while !older.is_replaced() || a.members()[1].life != newer.members()[1].life {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!newer.is_replaced());
}

#[tokio::test]
async fn where_a_node_is_and_that_it_is_to_go_away_is_heard_by_the_others() {
    let (a, seed) = join("a", &[]).await;
    let (b, _) = join("b", &[seed]).await;
    until(&[&a, &b], &["a", "b"]).await;
    let told = |by: &Cluster| by.members().into_iter().find(|member| member.name == "a").unwrap();
    let found = [("zone", "z1"), ("rack", "found")].map(|(k, v)| (k.to_owned(), v.to_owned()));
    let found = BTreeMap::from(found);
    for (leaving, labels) in [(Some("it is cordoned"), Some(&found)), (None, None)] {
        a.say(leaving, labels).await;
        let end = Instant::now() + Duration::from_secs(20);
        while told(&b).leaving.as_deref() != leaving || told(&a).leaving.as_deref() != leaving {
            assert!(Instant::now() < end, "{:?}", told(&b));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    assert_eq!(told(&b).labels["zone"], "z1");
    assert_eq!(told(&b).labels["rack"], "rack of a", "what it was given counts more");
}

#[tokio::test]
async fn strangers_and_noise_change_nothing() {
    let (a, seed) = join("a", &[]).await;
    let (b, _) = join("b", &[seed]).await;
    let other = settings("stranger", b"another key", &[seed]);
    let stranger = Cluster::join(other, BTreeMap::new()).await.unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for n in 0..2_000_usize {
        let noise: Vec<u8> = (0..n % 1_400).map(|i| (i * n * 31 % 251) as u8).collect();
        socket.send_to(&noise, seed).unwrap();
    }
    until(&[&a, &b], &["a", "b"]).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(names(&a), ["a", "b"]);
    assert_eq!(names(&stranger), ["stranger"]);
    assert!(a.refused() > 100, "{}", a.refused());
}

#[tokio::test]
async fn a_cluster_of_another_name_is_not_listened_to() {
    let (a, seed) = join("a", &[]).await;
    let mut elsewhere = settings("b", b"key", &[seed]);
    elsewhere.cluster = "other".into();
    let b = Cluster::join(elsewhere, BTreeMap::new()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!((names(&a), names(&b)), (vec!["a".into()], vec!["b".into()]));
}

/// `tierkeep agent`, killed at the end.
struct Agent {
    process: Child,
    dir: TempDir,
    at: SocketAddr,
}

impl Agent {
    fn start(name: &str, seed: Option<SocketAddr>) -> Self {
        let dir = tempfile::Builder::new().prefix("tierkeep-test-").tempdir_in("/dev/shm").unwrap();
        let (at, key) = (free(), dir.path().join("key"));
        std::io::Write::write_all(
            &mut std::fs::File::create(&key).unwrap(),
            b"a key for tests, and no secret\n",
        )
        .unwrap();
        let config = dir.path().join("agent.toml");
        let seeds = seed.map_or_else(String::new, |seed| format!("seeds = [\"{seed}\"]\n"));
        let text = format!(
            "gossip = \"{at}\"\ninsecure = true\nnode = \"{name}\"\ncluster_key = {key:?}\n{seeds}\
             [labels]\nzone = \"a\"\nrack = \"r of {name}\"\n"
        );
        std::io::Write::write_all(&mut std::fs::File::create(&config).unwrap(), text.as_bytes())
            .unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_tierkeep"));
        command.args(["agent", "--config"]).arg(&config).arg("--ram-dir").arg(dir.path());
        command.arg("--socket").arg(dir.path().join("agent.sock"));
        let process = command.stderr(Stdio::null()).spawn().unwrap();
        Self { process, dir, at }
    }

    fn ask(&self, more: &[&str]) -> std::process::Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tierkeep"));
        command.args(["status", "--agent"]).arg(self.dir.path().join("agent.sock"));
        command.args(more).output().unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn the_command_names_the_live_agents() {
    let first = Agent::start("first", None);
    let second = Agent::start("second", Some(first.at));
    let begun = Instant::now();
    let text = loop {
        let ran = second.ask(&["--cluster"]);
        let text = String::from_utf8(ran.stdout).unwrap();
        if text.contains("2 live agents") {
            break text;
        }
        assert!(begun.elapsed() < PATIENCE, "{text} {}", String::from_utf8_lossy(&ran.stderr));
        std::thread::sleep(Duration::from_millis(50));
    };
    assert!(text.starts_with("cluster tierkeep, 2 live agents, as second sees it\n"), "{text}");
    assert!(text.contains("rack=r of first,zone=a"), "{text}");
    let ran = first.ask(&["--cluster", "--json"]);
    let data: serde_json::Value = serde_json::from_slice(&ran.stdout).unwrap();
    assert_eq!(data["node"], "first");
    assert_eq!(data["members"][1]["name"], "second");
    assert_eq!(data["members"][1]["address"], second.at.to_string());
}
