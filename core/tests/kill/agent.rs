//! Agents that are killed while trainers go on: each is this binary run again.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tierkeep::host::Host;

use crate::common::{lives::Random, settings};

/// An agent's whole life, until it is killed or told to end.
pub fn serve(ram: &Path) -> ! {
    let (host, listener) = Host::open(settings(ram)).expect("an agent");
    let ended = host.clone();
    std::thread::spawn(move || {
        // Until it is closed: an upgrade.
        let _ = std::io::stdin().read_line(&mut String::new());
        ended.end();
    });
    host.serve(&listener).expect("serve");
    std::process::exit(0)
}

/// The agents of one run.
pub struct Agents {
    random: Random,
    killed: Arc<AtomicU64>,
}

impl Agents {
    pub fn new(seed: u64) -> Self {
        Self { random: Random(seed ^ 0x5EED), killed: Arc::default() }
    }

    /// One that serves, until this is dropped or it is killed in between.
    pub fn at(&mut self, ram: &Path) -> Agent {
        let random = Random(self.random.below(u64::MAX));
        let mut agent = Agent {
            ram: ram.into(),
            random,
            killed: self.killed.clone(),
            child: None,
            dies: Instant::now(),
        };
        agent.start();
        // A trainer that starts waits for its agent.
        agent
    }

    /// How many were killed since the last time.
    pub fn killed(&mut self) -> u64 {
        self.killed.swap(0, Ordering::Relaxed)
    }
}

/// One at a time.
pub struct Agent {
    ram: PathBuf,
    random: Random,
    killed: Arc<AtomicU64>,
    child: Option<Child>,
    dies: Instant,
}

impl Agent {
    fn start(&mut self) {
        let child = Command::new(std::env::current_exe().expect("self"))
            .args(["a_rank_of_the_job", "--exact", "--nocapture"])
            .env("TIERKEEP_TEST_AGENT", &self.ram)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        self.child = Some(child.expect("spawn"));
        self.dies = Instant::now() + Duration::from_millis(5 + self.random.below(300));
    }

    /// Its hour may have come: then another takes its place, at once or a little later.
    pub fn live_or_die(&mut self) {
        if Instant::now() < self.dies {
            return;
        }
        self.end();
        self.killed.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(self.random.below(40)));
        self.start();
    }

    fn end(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let there = child.try_wait().expect("wait");
        assert!(there.is_none(), "an agent ended by itself: {there:?}");
        if self.random.below(2) == 0 {
            child.kill().expect("kill");
        } else {
            drop(child.stdin.take()); // An upgrade: it is told to end.
        }
        child.wait().expect("wait");
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
