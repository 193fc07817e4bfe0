//! A shard that is offered to an agent by hand, chunk by chunk.

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    time::Duration,
};

use tempfile::TempDir;
use tierkeep::{begin::Begin, checkpointer::Checkpointer, peers::Network, save::Level};
use tierkeep_proto::peer::{self as wire, reply::Answer, request::Ask};

use crate::world::{Agent, PATIENCE, bytes, run_in, save};

/// Agents `a`, which has a shard of three chunks, and `b`, which is offered it.
pub(crate) struct Offering {
    pub(crate) payload: Vec<u8>,
    pub(crate) b: Agent,
    manifest: Vec<u8>,
    key: wire::Key,
    run: PathBuf,
    _ckpt: Checkpointer,
    a: Agent,
    _disk: TempDir,
}

impl Offering {
    pub(crate) fn new(seed: u8) -> Self {
        let disk = tempfile::tempdir().unwrap();
        let run = run_in(&disk);
        let a = Agent::start("a", &[], None);
        let b = Agent::start("b", &[a.at], None);
        a.sees(&["a", "b"]);
        let ckpt = a.open_with(&run, |config| config.replicas = Some(0));
        ckpt.begin(&Begin::default()).unwrap();
        let data = bytes(seed);
        let saved = save(&ckpt, 1, &data);
        assert!(saved.poll(Level::Ram, false, PATIENCE).unwrap());
        let manifest = file_in(a.ram.path(), "rank-000000.json").unwrap();
        let payload = std::fs::read(file_in(a.ram.path(), ".safetensors").unwrap()).unwrap();
        let attempt = manifest.parent().unwrap().file_name().unwrap().to_str().unwrap();
        let key = wire::Key { step: 1, attempt: attempt.into() };
        let manifest = std::fs::read(&manifest).unwrap();
        let offering = Self { payload, b, manifest, key, run, _ckpt: ckpt, a, _disk: disk };
        assert_eq!(offering.chunks().len(), 3);
        offering
    }

    pub(crate) fn chunks(&self) -> Vec<&[u8]> {
        self.payload.chunks(4 << 20).collect()
    }

    fn ask(&self, ask: Ask) -> Answer {
        let request = self.b.request(&self.run, ask);
        self.a.mesh.ask("b", request, Duration::from_secs(5)).unwrap().answer.unwrap()
    }

    /// The ticket for the shard, as it stands in a path.
    pub(crate) fn offer(&self) -> String {
        let (key, manifest) = (Some(self.key.clone()), self.manifest.clone());
        let offer = wire::Offer { key, manifest, attempt: 1, ..Default::default() };
        match self.ask(Ask::Offer(offer)) {
            Answer::Taken(taken) => taken.ticket.iter().map(|byte| format!("{byte:02x}")).collect(),
            other => panic!("{other:?}"),
        }
    }

    /// What is missing; an error: why it is not held.
    pub(crate) fn finish(&self, ticket: &str) -> Result<Vec<u64>, String> {
        let byte = |at| u8::from_str_radix(&ticket[at..at + 2], 16).unwrap();
        let ticket = (0..ticket.len()).step_by(2).map(byte).collect();
        match self.ask(Ask::Finish(wire::Finish { ticket })) {
            Answer::Finished(finished) => Ok(finished.missing),
            Answer::Failure(failure) => Err(failure.message),
            other => panic!("{other:?}"),
        }
    }

    /// What `b` holds of it.
    pub(crate) fn held(&self) -> Option<Vec<u8>> {
        file_in(self.b.ram.path(), ".safetensors").map(|file| std::fs::read(file).unwrap())
    }
}

/// What lies under a directory, by its end.
pub(crate) fn file_in(dir: &Path, end: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths.into_iter().find_map(|path| match path.is_dir() {
        true => file_in(&path, end),
        false => path.to_str().is_some_and(|path| path.ends_with(end)).then_some(path),
    })
}

/// The head of a chunk.
pub(crate) fn head(ticket: &str, chunk: usize, len: usize) -> String {
    format!("PUT /chunks/{ticket}/{chunk} HTTP/1.1\r\nhost: x\r\ncontent-length: {len}\r\n\r\n")
}

/// What an agent answers to a chunk.
pub(crate) fn put(line: &mut TcpStream, ticket: &str, chunk: usize, bytes: &[u8]) -> u16 {
    line.write_all(head(ticket, chunk, bytes.len()).as_bytes()).unwrap();
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
