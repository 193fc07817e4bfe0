//! An agent that knows trainers by a token, as on Kubernetes: by namespace and service account.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // Tests: real time.

mod common;

use std::{path::Path, sync::Arc, time::Duration};

use common::{Model, SMALL, close, ram, settings, wait};
use tierkeep::{
    Error, ErrorKind,
    checkpointer::Checkpointer,
    config::Config,
    host::{Host, Identify, Settings, Tenancy, Tenant},
    save::Level,
    tier::TierKind,
};

/// Takes a token by its word: what a signature proves is tried where signatures are.
#[derive(Debug)]
struct Credulous;

impl Identify for Credulous {
    fn identify(&self, token: &str) -> tierkeep::Result<Tenant> {
        let parts = token.split_once('/');
        let (namespace, account) =
            parts.ok_or_else(|| Error::Fenced { why: "nobody's token".into() })?;
        Tenant::new(namespace, account)
    }
}

struct Agent {
    host: Option<Arc<Host>>,
    ram: tempfile::TempDir,
    disk: tempfile::TempDir,
}

impl Agent {
    fn new() -> Self {
        // By a name that a tenant could give.
        let disk = tempfile::Builder::new().prefix("disk-").tempdir().unwrap();
        let ram = ram();
        let host = Some(Self::start(&ram, &disk));
        Self { host, ram, disk }
    }

    fn start(ram: &tempfile::TempDir, disk: &tempfile::TempDir) -> Arc<Host> {
        let tenancy = Tenancy { disk_dir: disk.path().into(), identify: Arc::new(Credulous) };
        let buckets = vec![format!("file://{}/bucket/{{namespace}}", disk.path().display())];
        let settings = Settings { tenancy: Some(tenancy), buckets, ..settings(ram.path()) };
        let (host, listener) = Host::open(settings).unwrap();
        let serving = host.clone();
        std::thread::spawn(move || serving.serve(&listener).unwrap());
        host
    }

    /// Another process would take its place: its locks go with the last who holds it.
    fn upgrade(&mut self) {
        self.end();
        self.host = Some(Self::start(&self.ram, &self.disk));
    }

    fn end(&mut self) {
        if let Some(host) = self.host.take() {
            host.end();
        }
    }

    /// A trainer with this token.
    fn open(&self, token: &str, destination: &str) -> tierkeep::Result<Checkpointer> {
        let file = self.ram.path().join(token.replace('/', "-"));
        std::fs::write(&file, format!("{token}\n")).unwrap();
        Checkpointer::open(Config { token_file: Some(file), ..self.config(destination) })
    }

    fn config(&self, destination: &str) -> Config {
        let agent = Some(self.ram.path().join("agent.sock"));
        let mut config = Config::new(Path::new(destination)).unwrap();
        config.lock_wait = Duration::from_secs(2);
        Config { agent, token_file: None, disk_every: 1 << 20, ..config }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.end();
    }
}

/// The step that it goes on from.
fn resume(ckpt: &Checkpointer) -> u64 {
    common::resume(ckpt, &SMALL).unwrap()
}

fn save(ckpt: &Checkpointer, step: u64) {
    wait(&Model::at(0, &SMALL, step).save(ckpt, step).unwrap(), Level::Ram);
}

#[test]
fn one_name_in_two_namespaces_is_two_runs() {
    let agent = Agent::new();
    // The same user, the same name.
    for (token, step) in [("team-a/trainer", 7), ("team-b/trainer", 3), ("team-a/eval", 5)] {
        let ckpt = agent.open(token, "/runs/gpt").unwrap();
        assert_eq!(resume(&ckpt), 0, "{token} sees what is another's");
        save(&ckpt, step);
        close(&ckpt);
    }
    for (token, step) in [("team-a/trainer", 7), ("team-b/trainer", 3), ("team-a/eval", 5)] {
        let ckpt = agent.open(token, "/runs/gpt").unwrap();
        assert_eq!(resume(&ckpt), step, "{token}");
        close(&ckpt);
        assert!(agent.disk.path().join(token).join("runs/gpt").is_dir(), "{token}");
    }
    // By the path where it really is, it is not to be had either.
    let real = agent.disk.path().join("team-a/trainer/runs/gpt");
    let ckpt = agent.open("team-b/trainer", real.to_str().unwrap()).unwrap();
    assert_eq!(resume(&ckpt), 0);
    close(&ckpt);
}

#[test]
fn whoever_shows_no_good_token_is_not_served() {
    let agent = Agent::new();
    let refused = |opened: tierkeep::Result<Checkpointer>| opened.map(drop).unwrap_err();
    let e = refused(Checkpointer::open(agent.config("/runs/gpt")));
    assert_eq!(e.kind(), ErrorKind::Invalid);
    assert!(e.chain().contains("TIERKEEP_TOKEN_FILE"), "{}", e.chain());
    let e = refused(agent.open("nobody", "/runs/gpt"));
    assert!(e.chain().contains("nobody's token"), "{}", e.chain());
    let e = refused(agent.open("../team-a", "/runs/gpt"));
    assert!(e.chain().contains("no name of a namespace"), "{}", e.chain());
    let e = refused(agent.open("team-b/trainer", "/runs/../../../team-a/trainer/gpt"));
    assert!(e.chain().contains("no place of team-b/trainer's own"), "{}", e.chain());
    let nowhere = Some("/nowhere/token".into());
    let e = refused(Checkpointer::open(Config { token_file: nowhere, ..agent.config("/gpt") }));
    assert!(e.chain().contains("/nowhere/token"), "{}", e.chain());
    assert!(!agent.disk.path().join("team-a").exists());
}

#[test]
fn a_namespaces_bucket_is_out_of_reach_of_the_others() {
    let agent = Agent::new();
    let url =
        |namespace: &str| format!("file://{}/bucket/{namespace}/gpt", agent.disk.path().display());
    let ckpt = agent.open("team-a/trainer", &url("team-a")).unwrap();
    assert_eq!(resume(&ckpt), 0);
    wait(&Model::at(0, &SMALL, 4).save(&ckpt, 4).unwrap(), Level::Object);
    close(&ckpt);
    let e = agent.open("team-b/trainer", &url("team-a")).map(drop).unwrap_err();
    assert!(e.chain().contains("bucket/team-b"), "{}", e.chain());
    // The namespace is whose it is, not the account.
    let ckpt = agent.open("team-a/eval", &url("team-a")).unwrap();
    assert_eq!(resume(&ckpt), 4);
    close(&ckpt);
}

#[test]
fn what_a_tenant_left_in_ram_is_there_after_an_upgrade_for_that_tenant_alone() {
    let mut agent = Agent::new();
    let ckpt = agent.open("team-a/trainer", "/runs/gpt").unwrap();
    assert_eq!(resume(&ckpt), 0);
    // No number that this disk is for.
    let step = ckpt.config().disk_every + 1;
    wait(&Model::at(0, &SMALL, step).save(&ckpt, step).unwrap(), Level::Ram);
    close(&ckpt);
    agent.upgrade();
    let ckpt = agent.open("team-b/trainer", "/runs/gpt").unwrap();
    assert_eq!(resume(&ckpt), 0);
    close(&ckpt);
    let ckpt = agent.open("team-a/trainer", "/runs/gpt").unwrap();
    assert_eq!(resume(&ckpt), step);
    close(&ckpt);
}

/// What a rank records is a link whose text is its own: nobody is led by it to what is another's.
#[test]
fn what_a_tenant_has_recorded_leads_nowhere() {
    let agent = Agent::new();
    let secret = agent.disk.path().join("secret");
    std::fs::write(&secret, "another's").unwrap();
    let mut config = agent.config("/runs/gpt");
    let token = agent.ram.path().join("token");
    std::fs::write(&token, "team-b/trainer").unwrap();
    (config.token_file, config.world, config.savers) = (Some(token), 2, vec![0, 1]);
    let ckpt = Checkpointer::open(config).unwrap();
    assert_eq!(resume(&ckpt), 0);
    let said = ckpt.agree_on_init(secret.to_str().unwrap()).unwrap();
    assert_eq!(said, secret.to_str().unwrap(), "the decision itself is as it was said");
    let run = agent.disk.path().join("team-b/trainer/runs/gpt");
    let links: Vec<_> = common::files(&run.join("_decisions"));
    let link = links.iter().find(|path| path.ends_with("init")).expect("it was recorded");
    let name = format!("_decisions/{}", link.display());
    assert!(std::fs::metadata(run.join(&name)).is_err(), "{name} leads somewhere");
    let tiers = ckpt.tiers();
    let disk = tiers.iter().find(|tier| tier.kind() == TierKind::Disk).unwrap();
    let e = disk.open(&name).map(drop).unwrap_err();
    assert!(e.is_not_found(), "{}", e.chain());
    close(&ckpt);
}
