//! Agents that carry shards to each other over real sockets of this machine: with certificates and
//! without, and what strangers, bad peers and sudden ends do to them.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // Tests: real sockets, real time.

mod bad;
mod cut;
mod killed;
mod moved;
mod offering;
mod process;
mod strangers;
mod told;
mod wire;
mod world;

use std::{
    io::Write,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tierkeep::{begin::Begin, save::Level};
use tierkeep_agent::mesh::{Tls, TlsFiles};
use world::{Agent, PATIENCE, bytes, comes_back, run_in, save};

/// An authority, and certificates of it.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Writes a certificate for `name`, its key, and the authority's.
    fn sign(&self, dir: &Path, name: &str) -> TlsFiles {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let cert = params.signed_by(&key, &self.0).unwrap();
        let write = |file: &str, text: String| {
            let path = dir.join(file);
            std::fs::File::create(&path).unwrap().write_all(text.as_bytes()).unwrap();
            path
        };
        TlsFiles {
            cert: write("cert.pem", cert.pem()),
            key: write("key.pem", key.serialize_pem()),
            ca: write("ca.pem", self.0.pem()),
            name: "tierkeep".into(),
        }
    }
}

#[test]
fn a_shard_goes_to_another_agent_and_comes_back_under_certificates() {
    let (authority, dir) = (Authority::new(), tempfile::tempdir().unwrap());
    let tls = |name: &str| {
        let place = dir.path().join(name);
        std::fs::create_dir(&place).unwrap();
        Some(Arc::new(Tls::load(authority.sign(&place, "tierkeep")).unwrap()))
    };
    let disk = tempfile::tempdir().unwrap();
    let a = Agent::start("a", &[], tls("a"));
    let b = Agent::start("b", &[a.at], tls("b"));
    a.sees(&["a", "b"]);
    let ckpt = a.open(&run_in(&disk));
    ckpt.begin(&Begin::default()).unwrap();
    let data = bytes(1);
    let saved = save(&ckpt, 7, &data);
    assert!(saved.poll(Level::Peer, false, PATIENCE).unwrap(), "{:?}", saved.progress());
    drop(ckpt);
    drop(a);
    std::fs::remove_dir_all(run_in(&disk)).unwrap();
    // On a third node: it comes from `b`.
    let c = Agent::start("c", &[b.at], tls("c"));
    c.sees(&["b", "c"]);
    comes_back(&c, &run_in(&disk), 7, &data);
}

#[test]
fn a_certificate_of_another_cluster_or_none_opens_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let signed = |authority: &Authority, name: &str, subject: &str| {
        let place = dir.path().join(name);
        std::fs::create_dir(&place).unwrap();
        Some(Arc::new(Tls::load(authority.sign(&place, subject)).unwrap()))
    };
    let (ours, theirs) = (Authority::new(), Authority::new());
    let a = Agent::start("a", &[], signed(&ours, "a", "tierkeep"));
    let other = Agent::start("other", &[a.at], signed(&theirs, "other", "tierkeep"));
    let named = Agent::start("named", &[a.at], signed(&ours, "named", "another-name"));
    let plain = Agent::start("plain", &[a.at], None);
    let all = ["a", "named", "other", "plain"];
    [&a, &other, &named, &plain].iter().for_each(|agent| agent.sees(&all));
    let run = dir.path().join("run");
    for (asks, whom) in [(&other, "a"), (&a, "other"), (&plain, "a"), (&a, "plain"), (&a, "named")]
    {
        let refused = asks.ask(whom, &run).unwrap_err().chain();
        assert!(refused.starts_with(&format!("could not ask {whom} at 127.0.0.1:")), "{refused}");
    }
    // Who sees others and is answered by none decides nothing.
    let disk = tempfile::tempdir().unwrap();
    let ckpt = other.open(&run_in(&disk));
    let error = ckpt.begin(&Begin::default()).unwrap_err().chain();
    assert!(error.contains("of every node") && error.contains(": could not ask "), "{error}");
}

#[test]
fn certificates_are_read_again_when_their_files_change() {
    let (authority, dir) = (Authority::new(), tempfile::tempdir().unwrap());
    let place = |name: &str| {
        let place = dir.path().join(name);
        std::fs::create_dir_all(&place).unwrap();
        place
    };
    let load = |name: &str| Arc::new(Tls::load(authority.sign(&place(name), "tierkeep")).unwrap());
    let (of_a, of_b) = (load("a"), load("b"));
    let a = Agent::start("a", &[], Some(of_a));
    let b = Agent::start("b", &[a.at], Some(of_b));
    a.sees(&["a", "b"]);
    b.sees(&["a", "b"]);
    let run = dir.path().join("run");
    b.ask("a", &run).unwrap();
    // Another authority signs from now on: first half of the cluster has it, then all.
    let next = Authority::new();
    next.sign(&place("a"), "tierkeep");
    std::thread::sleep(Duration::from_millis(1_200));
    let c = Agent::start("c", &[a.at], Some(load("c")));
    c.sees(&["a", "b", "c"]);
    assert!(c.ask("a", &run).is_err(), "the authority before is not trusted any more");
    next.sign(&place("c"), "tierkeep");
    let begun = Instant::now();
    while c.ask("a", &run).is_err() {
        assert!(begun.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(200));
    }
    // Half-written files change nothing that works.
    std::fs::File::create(place("c").join("cert.pem")).unwrap().write_all(b"-----BEGIN").unwrap();
    std::thread::sleep(Duration::from_millis(1_200));
    c.ask("a", &run).unwrap();
}
