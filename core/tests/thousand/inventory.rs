//! What the leader of a job over many nodes does alone: it looks at what all of them hold, and decides. Its
//! agent is a whole one; the others are answers in memory, with manifests of the size that real ones have.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use prost::Message as _;
use tierkeep::{
    Error, Result,
    attempt::{AttemptRecord, Attempts},
    begin::Begin,
    checkpointer::Checkpointer,
    host::Host,
    manifest::{Identity, Meta, Parts, PayloadInfo, combine, encode},
    names::{AttemptDir, CheckpointKey, Id, Rank},
    peers::{Chunks, Landing, Network, Ticket},
    placement::{Node, Shard, place},
    tier::{Source, disk::DiskTier},
};
use tierkeep_proto::peer::{self as wire, reply::Answer, request::Ask};

use crate::{common, nodes_max, world::carry};

const CHUNK: u64 = 4 << 20;

/// What each node held when the job stopped: in RAM its own rank's newest two steps and another rank's, on
/// disk two older ones.
const IN_RAM: [u64; 2] = [8, 9];
const ON_DISK: [u64; 2] = [6, 7];

#[derive(Default)]
struct Far {
    count: usize,
    ranks: u32,
    record: Option<(AttemptRecord, Vec<u8>)>,
}

impl std::fmt::Debug for Far {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} agents that are answers in memory", self.count)
    }
}

fn name(index: usize) -> String {
    format!("n{index:04}")
}

/// Rank 0's is fetched; nobody reads the others.
fn payload(identity: &Identity) -> PayloadInfo {
    let chunks: Vec<u32> = match identity.rank {
        0 => vec![crc32fast::hash(&[7; 4096])],
        _ => (0..2000_u32).map(|chunk| chunk.wrapping_mul(2_654_435_761)).collect(),
    };
    let length = if identity.rank == 0 { 4096 } else { 2000 * CHUNK };
    PayloadInfo {
        file: identity.payload_name(),
        length,
        chunk_bytes: CHUNK,
        algorithm: "crc32".into(),
        codec: "none".into(),
        crc: combine(&chunks, length, CHUNK),
        chunks,
        stored: None,
    }
}

impl Far {
    fn manifest(&self, key: &CheckpointKey, rank: u32) -> (String, u64, Vec<u8>) {
        let (record, _) = self.record.as_ref().unwrap();
        let identity = Identity {
            run_id: record.run_id,
            attempt: record.attempt,
            writer: Id([5; 16]),
            step: key.step.0,
            rank,
            savers: (0..self.ranks).collect(),
        };
        let payload = payload(&identity);
        let tensor = |index: u64| {
            let at = [index * 4096, (index + 1) * 4096];
            format!(
                "{{\"name\":\"model.layers.{index}.self_attn.q_proj.weight\",\"dtype\":\"F32\",\
                 \"shape\":[32,32],\"at\":[{},{}]}}",
                at[0], at[1]
            )
        };
        let tensors: Vec<String> = (0..if rank == 0 { 1 } else { 360 }).map(tensor).collect();
        let tensors = format!("[{}]", tensors.join(","));
        let parts = Parts {
            has_boxes: false,
            identity: &identity,
            payload: &payload,
            tensors_json: tensors.as_bytes(),
            tree_json: b"[\"d\",[]]",
            replicated: None,
            meta: &Meta::default(),
        };
        let bytes = encode(&parts).unwrap();
        (key.file(&payload.file), payload.length, bytes)
    }

    /// Everything in one tier of one node, in the order of a listing.
    fn files(&self, index: usize, tier: i32) -> Vec<wire::File> {
        let Some((record, bytes)) = &self.record else { return Vec::new() };
        let whole = |name: String, bytes: &[u8]| {
            let length = bytes.len() as u64;
            wire::File { name, length, bytes: Some(bytes.to_vec()) }
        };
        let mut files = vec![
            whole("attempts/00000001.copy".into(), bytes),
            whole("attempts/00000001.joined".into(), b""),
            whole("attempts/00000001.json".into(), bytes),
        ];
        let own = u32::try_from(index).unwrap();
        let (steps, ranks) = match tier {
            1 => (IN_RAM, vec![own, (own + 1) % self.ranks]),
            _ => (ON_DISK, vec![own]),
        };
        for (step, rank) in steps.into_iter().flat_map(|step| ranks.iter().map(move |r| (step, *r)))
        {
            let dir = AttemptDir::parse(&record.attempt.dir()).unwrap();
            let key = CheckpointKey { step: tierkeep::names::Step(step), attempt: dir };
            let (payload, length, manifest) = self.manifest(&key, rank);
            files.push(wire::File { name: payload, length, bytes: None });
            files.push(whole(key.manifest(Rank(rank)), &manifest));
        }
        files
    }
}

/// The answers are made before anything is measured; here they are read as they come off a wire.
struct Answers {
    far: Far,
    /// By node and tier.
    files: Vec<[Vec<wire::File>; 2]>,
}

impl std::fmt::Debug for Answers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.far.fmt(f)
    }
}

impl Answers {
    fn of(far: Far) -> Self {
        let files = |index| [1, 2].map(|tier| far.files(index, tier));
        Self { files: (0..far.count).map(files).collect(), far }
    }

    fn look(&self, node: &str, look: &wire::Look) -> wire::Seen {
        let index: usize = node[1..].parse().unwrap();
        let all = &self.files[index][usize::try_from(look.tier).unwrap() - 1];
        let asked = all.iter().filter(|f| look.files.is_empty() || look.files.contains(&f.name));
        let told = asked.map(|file| {
            let bytes = file.bytes.clone().filter(|_| !look.names_only);
            wire::File { name: file.name.clone(), length: file.length, bytes }
        });
        wire::Seen { address: "/far".into(), files: told.collect() }
    }
}

impl Network for Answers {
    fn me(&self) -> String {
        "n0000".into()
    }

    fn nodes(&self) -> Vec<Node> {
        let node = |index| Node { domains: vec![name(index)], name: name(index) };
        (0..self.far.count).map(node).collect()
    }

    fn is_settled(&self) -> bool {
        true
    }

    fn lost(&self) -> Vec<String> {
        Vec::new()
    }

    fn leaving(&self) -> BTreeSet<String> {
        BTreeSet::new()
    }

    fn ask(&self, node: &str, request: wire::Request, _: Duration) -> Result<wire::Reply> {
        let answer = match request.ask.unwrap() {
            Ask::Look(look) => Answer::Seen(self.look(node, &look)),
            Ask::Open(_) => Answer::Opened(wire::Opened { ticket: vec![1; 16], length: 4096 }),
            Ask::Lead(_) => Answer::Done(wire::Done {}),
            other => {
                return Err(Error::Io {
                    what: format!("answer {other:?}"),
                    source: std::io::ErrorKind::Unsupported.into(),
                });
            }
        };
        let bytes = wire::Reply { answer: Some(answer) }.encode_to_vec();
        Ok(wire::Reply::decode(&bytes[..]).unwrap())
    }

    fn push(&self, _: &str, _: &Ticket, _: &dyn Source, _: &Chunks) -> Result<()> {
        unreachable!("nothing is saved")
    }

    fn pull(&self, _: &str, _: &Ticket, into: &dyn Landing, chunks: &Chunks) -> Result<()> {
        carry(chunks, into, |_| Ok(vec![7; 4096]))
    }
}

/// Seconds of all cores that this process has used.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after = stat.rsplit(')').next().unwrap().split_whitespace();
    let ticks: u64 = after.skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    ticks as f64 / 100.0 // USER_HZ, the same everywhere.
}

/// An agent of the leader's node, and the leader.
fn lead(disk: &Path, ram: &Path, answers: Answers) -> (Option<u64>, String) {
    let ranks = answers.far.ranks;
    let (host, listener) = Host::open(common::settings(ram)).unwrap();
    host.meet(Arc::new(answers));
    let serving = host.clone();
    let served = std::thread::spawn(move || serving.serve(&listener).unwrap());
    let mut config = common::config(&disk.join("run"), ram, 0, ranks);
    config.agent = Some(ram.join("agent.sock"));
    config.replicas = Some(0);
    config.attempt_id = Some(Id::random().unwrap());
    let ckpt = Checkpointer::open(config).unwrap();
    let (begun, before) = (Instant::now(), cpu());
    let found = ckpt.begin(&Begin::default()).unwrap();
    let (took, used) = (begun.elapsed().as_secs_f64(), cpu() - before);
    let took = format!("{took:.3} s, {used:.2} s of a core");
    drop(ckpt);
    host.end();
    served.join().unwrap();
    (found.map(|found| found.step().0), took)
}

#[test]
fn the_leader_decides_from_what_all_nodes_hold() {
    let (count, ranks) = (nodes_max(), u32::try_from(nodes_max()).unwrap());
    let (disk, ram) = (tempfile::tempdir().unwrap(), common::ram());
    // Nothing is anywhere: the record that this makes is the one of the nodes' shards.
    let nothing = Far { count, ranks, record: None };
    let (found, took) = lead(disk.path(), ram.path(), Answers::of(nothing));
    assert_eq!(found, None);
    println!("a start from nothing, {count} nodes: {took}");
    let tier = DiskTier::reader(disk.path().join("run").as_path());
    let record = Attempts::load(&[&tier]).unwrap().newest().unwrap().clone();
    let bytes = std::fs::read(disk.path().join("run/attempts/00000001.json")).unwrap();
    let answers = Answers::of(Far { count, ranks, record: Some((record, bytes)) });
    let small = |file: &&wire::File| file.bytes.is_some();
    let all: usize = answers.files.iter().flatten().flatten().filter(small).count();
    let one = answers.files[count / 2][0].iter().filter(small).map(|file| file.length).max();
    println!("{all} small files on them, manifests of {} bytes", one.unwrap());
    // Another node in the leader's place: it has nothing.
    let (disk, ram) = (tempfile::tempdir().unwrap(), common::ram());
    let (found, took) = lead(disk.path(), ram.path(), answers);
    assert_eq!(found, Some(*IN_RAM.iter().max().unwrap()));
    println!("the decision of {ranks} ranks, {count} nodes: {took}");
}

#[test]
fn a_placement_of_all_ranks() {
    let count = nodes_max();
    // Eight nodes a rack.
    let domains = |index: usize| vec![format!("r{}", index / 8), name(index)];
    let nodes: Vec<Node> =
        (0..count).map(|index| Node { name: name(index), domains: domains(index) }).collect();
    let shard = |rank: usize| Shard { name: format!("/ckpt/run#{rank}"), node: rank };
    let shards: Vec<Shard> = (0..count).map(shard).collect();
    for copies in [1, 2] {
        let begun = Instant::now();
        let placed = place(&nodes, &shards, copies);
        println!("{copies} copies of {count} shards: {:.3} s", begun.elapsed().as_secs_f64());
        assert_eq!(placed.loads.iter().sum::<usize>(), copies * count);
        assert!(placed.lacks.is_empty(), "{:?}", placed.lacks);
    }
}
