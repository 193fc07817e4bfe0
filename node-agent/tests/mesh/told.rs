//! What agents with others tell of them: on the page for Prometheus, and by command.

use std::{
    io::{Read, Write},
    net::TcpStream,
    process::Command,
};

use tierkeep::{begin::Begin, save::Level};
use tierkeep_agent::service::{control, http};

use crate::world::{Agent, PATIENCE, bytes, run_in, save};

/// The numbers of an agent's page.
fn page(agent: &Agent, runtime: &tokio::runtime::Runtime) -> String {
    let pages = runtime.block_on(http::listen("127.0.0.1:0".parse().unwrap())).unwrap();
    let at = pages.local_addr().unwrap();
    let socket = agent.ram.path().join("agent.sock");
    let seen = http::Seen { host: agent.host.clone(), cluster: None, socket };
    let serving = runtime.spawn(http::serve(seen, pages, std::future::pending::<()>()));
    let mut stream = TcpStream::connect(at).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: agent\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    serving.abort();
    answer
}

fn says(page: &str, line: &str) {
    assert!(page.lines().any(|l| l == line), "no {line} in\n{page}");
}

fn number(page: &str, name: &str) -> f64 {
    let line = page.lines().find(|line| line.starts_with(name));
    let line = line.unwrap_or_else(|| panic!("no {name} in\n{page}"));
    line.split(' ').next_back().unwrap().parse().unwrap()
}

#[test]
fn an_agent_tells_of_its_copies_and_of_what_it_holds_for_others() {
    let disk = tempfile::tempdir().unwrap();
    let a = Agent::start("a", &[], None);
    let b = Agent::start("b", &[a.at], None);
    a.sees(&["a", "b"]);
    let ckpt = a.open(&run_in(&disk));
    ckpt.begin(&Begin::default()).unwrap();
    let saved = save(&ckpt, 7, &bytes(1));
    assert!(saved.poll(Level::Peer, false, PATIENCE).unwrap(), "{:?}", saved.progress());

    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let of = format!("run=\"{}\",rank=\"0\"", run_in(&disk).display());
    let at_a = page(&a, &runtime);
    for line in [
        format!("tierkeep_step{{tier=\"peer\",{of}}} 7"),
        format!("tierkeep_copies_wanted{{{of}}} 1"),
        format!("tierkeep_copies_there{{{of}}} 1"),
        format!("tierkeep_peer_whole_total{{{of}}} 1"),
        format!("tierkeep_peer_failed_total{{{of}}} 0"),
        format!("tierkeep_peer_refused_total{{{of}}} 0"),
        format!("tierkeep_peer_fetched_bytes_total{{{of}}} 0"),
        format!("tierkeep_object_trouble{{{of}}} 0"),
        "tierkeep_nodes_alive 2".into(),
        "tierkeep_held_shards 0".into(),
        "tierkeep_held_bytes 0".into(),
    ] {
        says(&at_a, &line);
    }
    assert!(number(&at_a, "tierkeep_peer_bytes_total{") > 1e7);
    assert!(number(&at_a, "tierkeep_peer_seconds_total{") > 0.0);
    let at_b = page(&b, &runtime);
    for line in [
        "tierkeep_ranks 0",
        "tierkeep_nodes_alive 2",
        "tierkeep_nodes_lost 0",
        "tierkeep_held_shards 1",
        "tierkeep_given_bytes_total 0",
        "tierkeep_healed_bytes_total 0",
        "tierkeep_offers_refused_total 0",
    ] {
        says(&at_b, line);
    }
    assert!(number(&at_b, "tierkeep_held_bytes ") > 1e7);
    let sent = number(&at_a, "tierkeep_peer_bytes_total{");
    assert!((number(&at_b, "tierkeep_held_received_bytes_total ") - sent).abs() < 1.0);

    let status = |agent: &Agent, more: &[&str]| {
        let socket = agent.ram.path().join("control.sock");
        let (host, at) = (agent.host.clone(), socket.clone());
        let serving = runtime.spawn(async move {
            control::serve(host, None, &at, std::future::pending::<()>()).await.unwrap();
        });
        while !socket.exists() || runtime.block_on(control::connect(&socket)).is_err() {}
        let mut command = Command::new(env!("CARGO_BIN_EXE_tierkeep"));
        command.args(["status", "--agent"]).arg(agent.ram.path().join("agent.sock")).args(more);
        let ran = command.output().unwrap();
        serving.abort();
        std::fs::remove_file(&socket).unwrap();
        assert!(ran.status.success(), "{ran:?}");
        String::from_utf8(ran.stdout).unwrap()
    };
    let shown = status(&a, &[]);
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines[1], "2 live nodes; 0 shards held for ranks of other nodes, in 0 B");
    assert!(lines[3].contains("ON DISK  ON PEERS"), "{shown}");
    let row: Vec<&str> = lines[4].split_whitespace().collect();
    assert_eq!(row[5..8], ["7", "-", "7"], "{shown}");
    assert!(!shown.contains("copies on other nodes"), "{shown}");
    let shown = status(&b, &[]);
    let held = shown.lines().nth(1).unwrap();
    assert!(held.starts_with("2 live nodes; 1 shard held for ranks of other nodes, in "), "{held}");
    let json: serde_json::Value = serde_json::from_str(&status(&a, &["--json"])).unwrap();
    assert_eq!(json["peers"]["nodes_alive"], 2);
    let rank = &json["ranks"][0];
    assert_eq!((&rank["peer_step"], &rank["copies_there"]), (&7.into(), &1.into()));
    assert_eq!(rank["counters"]["peer_whole"], 1);
}
