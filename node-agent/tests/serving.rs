//! What people and programs see of a running agent: over its control socket, over HTTP, by command.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // Tests: real processes, real time.

mod common;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use common::{Place, Ran, model, save};
use serde_json::json;
use tierkeep::{
    ErrorKind,
    begin::Begin,
    bucket::Bucket,
    checkpointer::Checkpointer,
    config::Config,
    host::{Host, Settings},
    save::Level,
};
use tierkeep_agent::service::{control, http};
use tierkeep_proto::control::{DrainRequest, StatusRequest};
use tokio::{runtime::Runtime, sync::oneshot};

const PATIENCE: Duration = Duration::from_secs(30);

/// An agent in this process, with all its doors.
struct Serving {
    place: Place,
    host: Arc<Host>,
    socket: PathBuf,
    http: SocketAddr,
    runtime: Runtime,
    ends: Vec<oneshot::Sender<()>>,
}

impl Serving {
    fn new() -> Self {
        let place = Place::new();
        let settings = Settings {
            socket: place.ram().join("agent.sock"),
            ram_root: place.ram().into(),
            ram_bytes_max: None,
            run_bytes_max: None,
            buckets: Vec::new(),
            tenancy: None,
            trainers_max: 8,
            idle: Duration::from_secs(3600),
        };
        let socket = control::socket_beside(&settings.socket);
        // Left by an agent that was killed.
        drop(UnixListener::bind(&socket).unwrap());
        let (host, listener) = Host::open(settings).unwrap();
        let trainers = host.clone();
        std::thread::spawn(move || trainers.serve(&listener).unwrap());
        let runtime = runtime();
        let (end_control, control_end) = oneshot::channel();
        let (end_http, http_end) = oneshot::channel();
        let (asked, at) = (host.clone(), socket.clone());
        runtime.spawn(async move {
            control::serve(asked, None, &at, async { drop(control_end.await) }).await.unwrap();
        });
        let pages = runtime.block_on(http::listen("127.0.0.1:0".parse().unwrap())).unwrap();
        let http = pages.local_addr().unwrap();
        let seen = http::Seen { host: host.clone(), cluster: None, socket: socket.clone() };
        runtime.spawn(http::serve(seen, pages, async { drop(http_end.await) }));
        until("the control socket answers", || runtime.block_on(control::connect(&socket)).is_ok());
        Self { place, host, socket, http, runtime, ends: vec![end_control, end_http] }
    }

    fn trainer(&self, disk_every: u64) -> Checkpointer {
        self.trainer_with(disk_every, None)
    }

    fn trainer_with(&self, disk_every: u64, bucket: Option<Bucket>) -> Checkpointer {
        let mut config = Config::new(&self.place.run()).unwrap();
        config.ram_root = self.place.ram().into();
        config.agent = Some(self.place.ram().join("agent.sock"));
        config.disk_every = disk_every;
        config.bucket = bucket;
        let trainer = Checkpointer::open(config).unwrap();
        trainer.begin(&Begin::default()).unwrap();
        trainer
    }

    fn tierkeep(&self, args: &[&str]) -> Ran {
        let socket = self.place.ram().join("agent.sock");
        let mut all = args.to_vec();
        all.extend(["--agent", socket.to_str().unwrap()]);
        self.place.tierkeep(&all)
    }

    /// A page's code and text.
    fn get(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.http).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: agent\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.into())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.host.end();
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

#[track_caller]
fn until(what: &str, mut so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Saves a step; it is in the level when this returns.
fn saved(trainer: &Checkpointer, step: u64, level: Level) {
    let save = save(trainer, step, &model(0, step));
    assert!(save.poll(level, false, PATIENCE).unwrap());
}

#[test]
fn status_is_told_over_grpc_as_a_table_and_as_json() {
    let serving = Serving::new();
    let ran = serving.tierkeep(&["status"]).ok();
    ran.says(", 0 ranks\n");
    assert_eq!(ran.err, "note: no trainer has come yet\n");

    let trainer = serving.trainer(1);
    (1..=3).for_each(|step| saved(&trainer, step, Level::Disk));
    let mut client = serving.runtime.block_on(control::connect(&serving.socket)).unwrap();
    let status = serving.runtime.block_on(client.status(StatusRequest {})).unwrap().into_inner();
    assert_eq!(status.version, env!("CARGO_PKG_VERSION"));
    assert!(status.ram_bytes > 8 << 20 && status.ram_bytes < status.ram_limit_bytes, "{status:?}");
    let [rank] = &status.ranks[..] else { panic!("{status:?}") };
    assert_eq!(rank.destination, serving.place.run().as_os_str().as_encoded_bytes());
    assert_eq!((rank.rank, rank.world, rank.attempt), (0, 1, Some(1)));
    assert_eq!((rank.pid, rank.gone_ms), (Some(std::process::id()), None));
    assert_eq!((rank.ram_step, rank.disk_step, rank.trouble.as_ref()), (Some(3), Some(3), None));
    let counters = rank.counters.unwrap();
    assert_eq!((counters.saves, counters.saves_failed, counters.disk_sealed), (3, 0, 3));
    assert!(counters.captured_bytes > 12 << 20 && counters.disk_bytes > 12 << 20);
    assert!(counters.disk_ns > 0);

    let shown = serving.tierkeep(&["status"]).ok();
    let lines: Vec<Vec<&str>> = shown.out.lines().map(|l| l.split_whitespace().collect()).collect();
    assert!(shown.out.starts_with("agent ") && shown.out.contains(" of RAM, 1 rank\n"));
    assert_eq!(lines[2][..4], ["RUN", "RANK", "TRAINER", "ATTEMPT"]);
    let run = serving.place.run();
    let pid = std::process::id().to_string();
    assert_eq!(lines[3][..7], [run.to_str().unwrap(), "0/1", "pid", &pid, "1", "3", "3"]);

    let json = serving.tierkeep(&["status", "--json"]).ok().json();
    assert_eq!(json["agent"]["socket"], serving.socket.to_str().unwrap());
    assert!(json["agent"]["uptime_s"].as_f64().unwrap() > 0.0);
    let rank = &json["ranks"][0];
    assert_eq!(rank["destination"], run.to_str().unwrap());
    assert_eq!((&rank["ram_step"], &rank["disk_step"]), (&json!(3), &json!(3)));
    assert_eq!((&rank["trouble"], &rank["gone_s"]), (&json!(null), &json!(null)));
    assert_eq!(rank["counters"]["saves"], 3);
    // It goes to no bucket: nothing is said of one, but to programs.
    assert!(!shown.out.contains("BUCKET") && !shown.out.contains("bucket"), "{shown:?}");
    assert_eq!((&rank["bucket"], &rank["object_step"]), (&json!(null), &json!(null)));

    // Its memory stays where its trainer is gone.
    assert!(trainer.close(PATIENCE, true).unwrap());
}

#[test]
fn only_the_agents_user_may_ask_and_a_live_socket_is_not_taken() {
    let serving = Serving::new();
    let mode = std::fs::metadata(&serving.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let second = control::serve(serving.host.clone(), None, &serving.socket, async {});
    let refused = serving.runtime.block_on(second).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Fenced, "{refused}");
    let file = serving.place.ram().join("a-file");
    std::fs::File::create(&file).unwrap();
    let wrong = control::serve(serving.host.clone(), None, &file, async {});
    let refused = serving.runtime.block_on(wrong).unwrap_err();
    assert!(refused.to_string().ends_with("is no socket: it is left as it is"), "{refused}");
    assert!(file.exists());
    serving.tierkeep(&["status"]).ok();
}

#[test]
fn the_socket_goes_with_the_agent_and_a_hint_says_what_to_do() {
    let mut serving = Serving::new();
    // Somebody who looks on does not keep it.
    let mut client = serving.runtime.block_on(control::connect(&serving.socket)).unwrap();
    serving.runtime.block_on(client.status(StatusRequest {})).unwrap();
    serving.ends.drain(..).for_each(|end| end.send(()).unwrap());
    until("the control socket is gone", || !serving.socket.exists());
    until("the port is closed", || TcpStream::connect(serving.http).is_err());
    for command in [vec!["status"], vec!["top"], vec!["agent", "drain"], vec!["status", "--json"]] {
        serving.tierkeep(&command).fails(1, "no agent answers at").hints("`tierkeep agent`");
    }
    let place = Place::new();
    place.tierkeep(&["status"]).fails(1, "no agent runs on this node").hints("looked for at");
    place.tierkeep(&["status", "--agent", "off"]).fails(1, "there is to be no agent");
    let usage = place.tierkeep(&["top", "--interval", "1ms"]);
    assert!(usage.code == 2 && usage.err.contains("100ms at least"), "{usage:#?}");
}

#[test]
fn the_agent_that_a_job_would_find_is_the_one_that_is_asked() {
    let serving = Serving::new();
    // By the ram tier's directory, by the variable, by a relative path.
    serving.place.tierkeep(&["status"]).ok().says("agent ");
    let elsewhere = Place::new();
    let tierkeep = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tierkeep"));
        command.env("TIERKEEP_RAM_DIR", elsewhere.ram()).current_dir(serving.place.ram());
        command
    };
    let socket = serving.place.ram().join("agent.sock");
    let named = tierkeep().arg("status").env("TIERKEEP_AGENT", socket).output().unwrap();
    Ran::of(named).ok().says("agent ");
    let relative = tierkeep().args(["status", "--agent", "agent.sock"]).output().unwrap();
    Ran::of(relative).ok().says("agent ");
}

#[test]
fn pages_for_probes_and_prometheus() {
    let serving = Serving::new();
    assert_eq!(serving.get("/healthz"), (200, "ok\n".into()));
    assert_eq!(serving.get("/readyz"), (200, "ok\n".into()));
    assert_eq!(serving.get("/else").0, 404);
    let trainer = serving.trainer(2);
    saved(&trainer, 2, Level::Disk);
    saved(&trainer, 3, Level::Ram);
    let (code, page) = serving.get("/metrics");
    assert_eq!(code, 200);
    let run = serving.place.run();
    let of = format!("run=\"{}\",rank=\"0\"", run.display());
    for line in [
        format!("tierkeep_step{{tier=\"ram\",{of}}} 3"),
        format!("tierkeep_step{{tier=\"disk\",{of}}} 2"),
        format!("tierkeep_trainer_up{{{of}}} 1"),
        format!("tierkeep_saves_total{{{of}}} 2"),
        format!("tierkeep_saves_failed_total{{{of}}} 0"),
        format!("tierkeep_saves_skipped_total{{{of}}} 0"),
        format!("tierkeep_checksum_failures_total{{{of}}} 0"),
        format!("tierkeep_repairs_total{{{of}}} 0"),
        format!("tierkeep_copies_wanted{{{of}}} 0"),
        "tierkeep_ranks 1".into(),
        "# EOF".into(),
    ] {
        assert!(page.lines().any(|l| l == line), "no {line} in\n{page}");
    }
    // It has no others, and no bucket: nothing is told of them.
    assert!(!page.contains("tier=\"object\""), "{page}");
    assert!(!page.contains("tierkeep_nodes") && !page.contains("tier=\"peer\""), "{page}");
    let number = |name: &str| -> f64 {
        let line = page.lines().find(|l| l.starts_with(name));
        line.unwrap_or_else(|| panic!("no {name} in\n{page}"))
            .split(' ')
            .next_back()
            .unwrap()
            .parse()
            .unwrap()
    };
    assert!(number("tierkeep_ram_bytes ") < number("tierkeep_ram_limit_bytes "));
    assert!(number("tierkeep_disk_bytes_total{") > 4e6);
    assert!(number("tierkeep_disk_seconds_total{") > 0.0);
    assert!(number("tierkeep_captured_seconds_total{") > 0.0);
    // The ram tier is none any more: it lives, and cannot serve.
    drop(trainer);
    std::fs::remove_dir_all(serving.place.ram()).unwrap();
    std::fs::File::create(serving.place.ram()).unwrap();
    assert_eq!(serving.get("/healthz").0, 200);
    let (code, why) = serving.get("/readyz");
    std::fs::remove_file(serving.place.ram()).unwrap();
    std::fs::create_dir(serving.place.ram()).unwrap();
    assert!(
        code == 503 && why.starts_with("the ram tier does not answer: could not "),
        "{code} {why}"
    );
}

#[test]
fn a_page_for_people_and_the_same_as_json() {
    let serving = Serving::new();
    let (code, page) = serving.get("/");
    assert!(code == 200 && page.starts_with("<!doctype html>"), "{code}");
    // It needs nothing from elsewhere.
    assert!(!page.contains("//cdn") && !page.contains("https://"), "{page}");
    let trainer = serving.trainer(2);
    saved(&trainer, 2, Level::Disk);
    let status = || -> serde_json::Value {
        let (code, text) = serving.get("/status.json");
        assert_eq!(code, 200, "{text}");
        serde_json::from_str(&text).unwrap()
    };
    let run = serving.place.run().display().to_string();
    // What is drawn over time is looked at every few seconds.
    until("a save is in the history", || {
        status()["history"][&run]["ram"].as_array().is_some_and(|ram| ram.contains(&json!(2)))
    });
    saved(&trainer, 3, Level::Ram);
    until("the time of a copy is known", || {
        let times = &status()["history"][&run]["capture_ms"];
        times.as_array().unwrap().iter().any(|ms| ms.as_f64().is_some_and(|ms| ms > 0.0))
    });
    let seen = status();
    assert_eq!((&seen["cluster"], &seen["cluster_trouble"]), (&json!(null), &json!(null)));
    // In the form of the command.
    let mut told = serving.tierkeep(&["status", "--json"]).ok().json();
    for volatile in ["agent", "ram_bytes", "ram_limit_bytes"] {
        told[volatile] = seen["status"][volatile].clone();
    }
    assert_eq!(seen["status"], told);
    assert_eq!(seen["status"]["ranks"][0]["ram_step"], 3);
    assert!(seen["status"]["ranks"][0]["counters"]["captured_s"].as_f64().unwrap() > 0.0);
}

#[test]
fn what_goes_to_a_bucket_is_told_and_what_keeps_it_from_there() {
    let serving = Serving::new();
    let place = serving.place.root().join("bucket");
    let url = format!("file://{}/run", place.display());
    let bucket = Bucket { every: 2, ..Bucket::new(&url, 1).unwrap() };
    let trainer = serving.trainer_with(1, Some(bucket));
    (1..=3).for_each(|step| saved(&trainer, step, Level::Disk));
    saved(&trainer, 4, Level::Object);

    let run = serving.place.run();
    let rank = || serving.tierkeep(&["status", "--json"]).ok().json()["ranks"][0].clone();
    until("the agent has seen it there", || rank()["object_step"] == 4);
    let there = rank();
    assert_eq!(there["bucket"], url.as_str());
    let ways = [&there["sending"], &there["object_next"], &there["object_trouble"]];
    assert!(ways.iter().all(|way| way.is_null()) && there["object_trouble_s"].is_null(), "{there}");
    let sums = &there["counters"];
    assert!(sums["object_bytes"].as_u64() > Some(4 << 20) && sums["object_s"].as_f64() > Some(0.0));
    assert_eq!((&sums["object_failed"], &sums["object_fetched_bytes"]), (&json!(0), &json!(0)));
    // Step 2 went, or gave way to step 4: the trainer has the same sums.
    let of = |name: &str| sums[name].as_u64().unwrap();
    assert_eq!(of("object_sealed") + of("object_passed_over"), 2);
    let own = &trainer.observer().counters;
    until("the trainer knows", || own.object_sealed.load(Relaxed) == of("object_sealed"));
    assert_eq!(own.object_bytes.load(Relaxed), of("object_bytes"));
    assert!(own.object_ns.load(Relaxed) > 0);

    // It loops, so everything that is asked of it fails.
    let away = serving.place.root().join("away");
    std::fs::rename(&place, &away).unwrap();
    std::os::unix::fs::symlink(&place, &place).unwrap();
    (5..=7).for_each(|step| saved(&trainer, step, Level::Disk));
    until("it is told", || !rank()["object_trouble"].is_null());
    saved(&trainer, 8, Level::Disk);
    until("step 8 is next", || rank()["object_next"] == 8);
    let waits = rank();
    assert_eq!((&waits["object_step"], &waits["sending"]), (&json!(4), &json!(6)), "{waits}");
    assert!(waits["object_trouble_s"].as_f64() > Some(0.0), "{waits}");
    let shown = serving.tierkeep(&["status"]).ok();
    shown.says(
        "step 6 is on its way to the bucket, step 8 is next; the bucket has not answered for ",
    );
    shown.says("Too many levels of symbolic links");
    let rows: Vec<&str> = shown.out.lines().skip(2).collect();
    assert!(rows[0].contains("ON PEERS  IN BUCKET  ") && rows[0].ends_with("NOTES"), "{shown:?}");
    let cells: Vec<&str> = rows[1].split_whitespace().collect();
    assert_eq!(cells[..2], [run.to_str().unwrap(), "0/1"]);
    assert_eq!(cells[4..9], ["1", "8", "8", "-", "4"], "{shown:?}");
    let page = serving.get("/metrics").1;
    let of = format!("{{run=\"{}\",rank=\"0\"}}", run.display());
    for line in [
        format!("tierkeep_step{{tier=\"object\",run=\"{}\",rank=\"0\"}} 4", run.display()),
        format!("tierkeep_object_busy{of} 1"),
        format!("tierkeep_object_trouble{of} 1"),
        format!("tierkeep_object_failed_total{of} 0"),
        format!("tierkeep_object_fetched_bytes_total{of} 0"),
    ] {
        assert!(page.lines().any(|l| l == line), "no {line} in\n{page}");
    }
    for name in ["sealed_total", "passed_over_total", "bytes_total", "seconds_total"] {
        assert!(page.contains(&format!("tierkeep_object_{name}{of} ")), "no {name} in\n{page}");
    }
    let (top, mut lines) = Top::new(&serving, &[]);
    let head = lines.find(|line| line.starts_with("agent ")).unwrap();
    assert!(head.ends_with("to RAM -, to disk -, to the bucket -"), "{head}");
    let head = lines.find(|line| line.starts_with("RUN ")).unwrap();
    assert!(head.contains("  IN BUCKET  TO RAM  TO DISK  TO PEERS  TO BUCKET  NOTES"), "{head}");
    assert_eq!(top.interrupt(), (0, String::new()));

    std::fs::remove_file(&place).unwrap();
    std::fs::rename(&away, &place).unwrap();
    until("it has caught up", || rank()["object_step"] == 8);
    let there = rank();
    assert!(there["object_trouble"].is_null() && there["sending"].is_null(), "{there}");
    assert!(!serving.tierkeep(&["status"]).ok().out.contains("the bucket has not answered"));
    drop(trainer);
}

#[test]
fn a_slow_or_silent_client_is_let_go() {
    let serving = Serving::new();
    let mut silent = TcpStream::connect(serving.http).unwrap();
    silent.write_all(b"GET /healthz HTTP/1.1\r\n").unwrap();
    silent.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = Vec::new();
    silent.read_to_end(&mut answer).unwrap();
    assert!(!answer.starts_with(b"HTTP/1.1 200"), "{answer:?}");
    let mut long = TcpStream::connect(serving.http).unwrap();
    // It hangs up on us while we write, or answers.
    let _ =
        long.write_all(format!("GET /healthz HTTP/1.1\r\nX: {}", "x".repeat(1 << 20)).as_bytes());
    let mut answer = Vec::new();
    let _ = long.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP/1.1 200"));
    assert_eq!(serving.get("/healthz").0, 200);
}

#[test]
fn a_drain_says_what_made_it() {
    let serving = Serving::new();
    let ran = serving.tierkeep(&["agent", "drain"]).ok();
    assert_eq!((ran.out.as_str(), ran.err.starts_with("note: ")), ("", true));
    let trainer = serving.trainer(1_000_000);
    saved(&trainer, 7, Level::Ram);
    let run = serving.place.run();
    let ran = serving.tierkeep(&["agent", "drain", "--deadline", "20s"]).ok();
    assert_eq!(ran.out, format!("rank 0 of {}: step 7 is on disk\n", run.display()));
    let json = serving.tierkeep(&["agent", "drain", "--json"]).ok().json();
    let rank = json!({"destination": run, "rank": 0, "ram_step": 7, "disk_step": 7,
                      "durable": true, "trouble": null});
    assert_eq!(json, json!({"durable": true, "ranks": [rank]}));

    // The disk is no disk any more.
    saved(&trainer, 8, Level::Ram);
    std::fs::remove_dir_all(&run).unwrap();
    std::fs::File::create(&run).unwrap();
    let ran = serving.tierkeep(&["agent", "drain", "--deadline", "1s"]);
    let ran = ran.fails(1, "1 rank would lose steps with this host's memory").hints("--deadline");
    let said = format!("rank 0 of {}: step 8 is only in RAM, step 7 is on disk", run.display());
    assert!(ran.out.starts_with(&said), "{ran:#?}");
    serving.tierkeep(&["status"]).ok().says("nothing goes to disk: could not ");

    let mut client = serving.runtime.block_on(control::connect(&serving.socket)).unwrap();
    let long = DrainRequest { deadline_ms: u64::MAX };
    let refused = serving.runtime.block_on(client.drain(long)).unwrap_err();
    assert_eq!(refused.message(), "a drain has 24 hours at most");
    drop(trainer);
}

/// A `top` that runs, and is ended as by Ctrl-C.
struct Top(Child);

impl Top {
    fn new(serving: &Serving, args: &[&str]) -> (Self, impl Iterator<Item = String>) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tierkeep"));
        command.args(["top", "--interval", "100ms", "--agent"]);
        command.arg(serving.place.ram().join("agent.sock")).args(args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        (Self(child), lines)
    }

    fn interrupt(mut self) -> (i32, String) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        let code = self.0.wait().unwrap().code().expect("no signal");
        let mut said = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (code, said)
    }
}

#[test]
fn top_prints_plain_snapshots_with_rates_and_ends_quietly() {
    let serving = Serving::new();
    let trainer = serving.trainer(1);
    saved(&trainer, 1, Level::Disk);
    let (top, mut lines) = Top::new(&serving, &[]);
    let heads: Vec<String> = lines.by_ref().filter(|l| l.starts_with("agent ")).take(2).collect();
    assert!(heads[0].ends_with("to RAM -, to disk -"), "{heads:?}");
    assert!(heads[1].ends_with("to RAM 0 B/s, to disk 0 B/s"), "{heads:?}");
    saved(&trainer, 2, Level::Disk);
    let row = lines.find(|l| l.contains(" MiB/s  ")).unwrap();
    assert!(row.contains(" 2 "), "{row}");
    let plain = |line: &String| !line.contains('\u{1b}');
    assert!(lines.by_ref().take(10).all(|l| plain(&l)));
    assert_eq!(top.interrupt(), (0, String::new()));

    let (top, mut lines) = Top::new(&serving, &["--json"]);
    let look: serde_json::Value = serde_json::from_str(&lines.next().unwrap()).unwrap();
    assert_eq!(look["ranks"][0]["disk_step"], 2);
    assert_eq!(top.interrupt(), (0, String::new()));
    drop(trainer);
}
