//! An agent as a process of its own, which can be killed.

use std::{
    net::{TcpListener, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tierkeep::{checkpointer::Checkpointer, config::Config};

use crate::world::PATIENCE;

/// One node: its memory stays when its agent is killed.
pub(crate) struct Process {
    pub(crate) ram: TempDir,
    name: String,
    at: String,
    seeds: String,
    key: PathBuf,
    agent: Option<Child>,
}

/// A port that is free for gossip and for chunks.
fn free_port() -> u16 {
    loop {
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = udp.local_addr().unwrap().port();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

impl Process {
    /// Agents of these names, which find each other. `dir` is for what they all have.
    pub(crate) fn start_all<const N: usize>(dir: &Path, names: [&str; N]) -> [Self; N] {
        let key = dir.join("cluster.key");
        std::fs::write(&key, "a key of all these agents").unwrap();
        let at = names.map(|_| format!("127.0.0.1:{}", free_port()));
        let seeds = at.join(",");
        let mut at = at.into_iter();
        let all = names.map(|name| {
            let ram = tempfile::Builder::new().prefix("tierkeep-test-").tempdir_in("/dev/shm");
            let (name, at) = (name.to_owned(), at.next().unwrap());
            let (seeds, key) = (seeds.clone(), key.clone());
            let mut node = Self { ram: ram.unwrap(), name, at, seeds, key, agent: None };
            node.begin();
            node
        });
        all.iter().for_each(|node| node.sees(&names));
        all
    }

    fn socket(&self) -> PathBuf {
        self.ram.path().join("agent.sock")
    }

    /// It is there, or there again with the memory that it had.
    pub(crate) fn begin(&mut self) {
        let _ = std::fs::remove_file(self.socket());
        let mut command = Command::new(env!("CARGO_BIN_EXE_tierkeep"));
        command.args(["agent", "--ram-dir"]).arg(self.ram.path());
        command.arg("--socket").arg(self.socket()).arg("--cluster-key").arg(&self.key);
        command.args(["--node", &self.name, "--gossip", &self.at, "--seeds", &self.seeds]);
        // A chunk in two seconds: whoever looks sees it arrive.
        command.args(["--insecure", "--peer-rate", "2MiB"]);
        command.env("TIERKEEP_AGENT_CONFIG", "/dev/null").stderr(Stdio::null());
        self.agent = Some(command.spawn().unwrap());
        wait_for(&format!("{} serves", self.name), || self.socket().exists());
    }

    pub(crate) fn kill(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    /// Waits until it sees these agents and no others.
    pub(crate) fn sees(&self, names: &[&str]) {
        wait_for(&format!("{} sees {names:?}", self.name), || {
            let mut status = Command::new(env!("CARGO_BIN_EXE_tierkeep"));
            status.args(["status", "--cluster", "--json", "--agent"]).arg(self.socket());
            let said = status.output().unwrap().stdout;
            let said: serde_json::Value = serde_json::from_slice(&said).unwrap_or_default();
            let members = said["members"].as_array().cloned().unwrap_or_default();
            members.iter().map(|member| member["name"].as_str().unwrap()).eq(names.iter().copied())
        });
    }

    pub(crate) fn open(&self, destination: &Path) -> Checkpointer {
        let mut config = Config::new(destination).unwrap();
        config.ram_root = self.ram.path().into();
        config.agent = Some(self.socket());
        config.replicas = Some(1);
        config.disk_every = 1 << 40;
        config.attempt_wait = Duration::from_secs(30);
        Checkpointer::open(config).unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.agent.is_some() {
            self.kill();
        }
    }
}

pub(crate) fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
