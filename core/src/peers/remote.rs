//! What another agent's tier holds of a run, as a tier for reading: names as it told them all at once, small
//! files when they are wanted, payloads by chunks.
//!
//! # Invariants
//!
//! - What is told of a thousand nodes at once is names. Of a checkpoint that is looked at closely the
//!   manifests come from all nodes together, one of each shard.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::{Arc, Mutex, OnceLock, Weak},
};

use tierkeep_proto::peer::{self as wire, reply::Answer, request::Ask};

use super::{
    ASKED_AT_ONCE, Arriving, Broken, Chunks, Flow, Landing, Peers, SMALL_BYTES, landing::some_of,
    odd, ticket, wire_key,
};
use crate::{
    at_once::at_once,
    chunk::{CHUNK_BYTES, chunk_len},
    error::{Error, Result},
    names::{CheckpointKey, parse_manifest_name, parse_payload_name},
    observe::locked,
    tier::{Created, Entry, Payload, Receipt, Source, Tier, TierKind, buffer::AlignedBuf},
    wire::{FRAME_BYTES_MAX, convert},
};

/// One tier of another agent, as it was when it was asked.
#[derive(Debug)]
pub(crate) struct Remote {
    peers: Peers,
    pub(crate) node: String,
    kind: TierKind,
    address: String,
    files: BTreeMap<String, Told>,
    /// Those that were looked at together.
    crowd: OnceLock<Arc<Crowd>>,
}

/// A file of another agent.
#[derive(Debug)]
struct Told {
    length: u64,
    /// What is in it, once that was told.
    bytes: OnceLock<Arc<Vec<u8>>>,
}

/// Tiers of other agents that were looked at together.
#[derive(Debug)]
struct Crowd {
    members: Vec<Weak<Remote>>,
    /// Checkpoints whose manifests were asked for.
    brought: Mutex<BTreeSet<String>>,
}

impl Crowd {
    /// Brings the manifests of a checkpoint, each from the first that has it. What does not come is asked
    /// for by itself, and its trouble told then.
    fn bring(&self, dir: &str) {
        let mut brought = locked(&self.brought);
        if !brought.insert(dir.into()) {
            return;
        }
        let (mut wanted, mut known) = (Vec::new(), BTreeSet::new());
        let prefix = format!("{dir}/");
        for member in self.members.iter().filter_map(Weak::upgrade) {
            let there = member.below(&prefix).filter(|(_, rest, _)| is_manifest(rest));
            let new = there.filter(|(name, ..)| known.insert((*name).to_owned()));
            let new = new.filter(|(_, _, told)| told.length <= SMALL_BYTES);
            let new: Vec<String> = new.map(|(name, ..)| name.to_owned()).collect();
            if !new.is_empty() {
                wanted.push((member, new));
            }
        }
        at_once(ASKED_AT_ONCE, &wanted, |(member, names)| {
            if let Err(e) = member.bring(names) {
                tracing::debug!("{}: {}", member.address, e.chain());
            }
        });
    }
}

fn is_manifest(name: &str) -> bool {
    parse_manifest_name(name).is_some()
}

impl Remote {
    /// Asks `node` what its `kind` tier holds, of `key` alone if one is named.
    pub(crate) fn look(
        peers: &Peers,
        node: &str,
        kind: TierKind,
        key: Option<&CheckpointKey>,
    ) -> Result<Self> {
        let key = key.map(wire_key);
        let look = wire::Look { names_only: true, key, ..Self::asked(kind) };
        let Answer::Seen(seen) = peers.ask(node, Ask::Look(look))? else { return Err(odd(node)) };
        let told = |file: wire::File| {
            let bytes = file.bytes.map(Arc::new).map_or_else(OnceLock::new, OnceLock::from);
            (file.name, Told { length: file.length, bytes })
        };
        let files = seen.files.into_iter().map(told).collect();
        let address = format!("{node}:{}", seen.address);
        let crowd = OnceLock::new();
        Ok(Self { peers: peers.clone(), node: node.into(), kind, address, files, crowd })
    }

    fn asked(kind: TierKind) -> wire::Look {
        wire::Look { tier: convert::tier(kind).into(), ..wire::Look::default() }
    }

    /// Names that begin with `prefix`, and the rest of each.
    fn below<'a>(
        &'a self,
        prefix: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a str, &'a Told)> + 'a {
        let from = self.files.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        from.map_while(move |(name, told)| Some((name.as_str(), name.strip_prefix(prefix)?, told)))
    }

    /// Asks what is in these files; false: one of them is not there any more.
    fn bring(&self, names: &[String]) -> Result<bool> {
        let look = wire::Look { files: names.to_vec(), ..Self::asked(self.kind) };
        let Answer::Seen(seen) = self.peers.ask(&self.node, Ask::Look(look))? else {
            return Err(odd(&self.node));
        };
        let mut found = 0;
        for file in seen.files.into_iter().filter(|file| names.contains(&file.name)) {
            found += 1;
            if let (Some(told), Some(bytes)) = (self.files.get(&file.name), file.bytes) {
                let _ = told.bytes.set(bytes.into()); // It was told before: a name is given once.
            }
        }
        Ok(found == names.len())
    }

    /// It is the RAM of that node.
    pub(crate) fn is_ram(&self) -> bool {
        self.kind == TierKind::Ram
    }

    /// Opens a file there; its ticket and its length.
    pub(crate) fn ticket(&self, name: &str, chunk_bytes: u64) -> Result<(super::Ticket, u64)> {
        let open =
            wire::Open { tier: convert::tier(self.kind).into(), name: name.into(), chunk_bytes };
        let Answer::Opened(opened) = self.peers.ask(&self.node, Ask::Open(open))? else {
            return Err(odd(&self.node));
        };
        Ok((ticket(&self.node, &opened.ticket)?, opened.length))
    }

    fn refused<T>(&self) -> Result<T> {
        Err(Error::Bug(format!("{} is written to by its agent alone", self.address)))
    }
}

#[deny(clippy::missing_trait_methods)]
impl Tier for Remote {
    fn kind(&self) -> TierKind {
        TierKind::Peer
    }

    fn address(&self) -> String {
        self.address.clone()
    }

    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        let Some(file) = self.files.get(name) else {
            return Err(Error::NotFound { what: format!("{}/{name}", self.address) });
        };
        let (dir, last) = name.rsplit_once('/').unwrap_or(("", name));
        let small = parse_payload_name(last).is_none() && file.length <= SMALL_BYTES;
        if small && file.bytes.get().is_none() {
            if let Some(crowd) = self.crowd.get().filter(|_| is_manifest(last)) {
                crowd.bring(dir);
            }
            if file.bytes.get().is_none() && !self.bring(&[name.to_owned()])? {
                return Err(Error::NotFound { what: format!("{}/{name}", self.address) });
            }
        }
        if let Some(bytes) = file.bytes.get() {
            return Ok(Box::new(Small(bytes.clone())));
        }
        if parse_payload_name(last).is_none() && file.length > FRAME_BYTES_MAX as u64 {
            // Whoever reads a record makes room for all of it.
            let why = format!("{} bytes are too many for a record", file.length);
            return Err(Error::damaged(format!("{}/{name}", self.address), why));
        }
        let (peers, node) = (self.peers.clone(), self.node.clone());
        let (ticket, opened) = (Mutex::new(None), file.length);
        let (kind, name) = (self.kind, name.to_owned());
        Ok(Box::new(Far { peers, node, kind, name, length: opened, ticket }))
    }

    fn list(&self, dir: &str) -> Result<Vec<Entry>> {
        let prefix = if dir.is_empty() { String::new() } else { format!("{dir}/") };
        let mut entries: Vec<Entry> = Vec::new();
        for (_, rest, _) in self.below(&prefix) {
            let (first, is_dir) = match rest.split_once('/') {
                Some((first, _)) => (first, true),
                None => (rest, false),
            };
            if entries.last().is_none_or(|last| last.name != first) {
                entries.push(Entry { name: first.into(), is_dir });
            }
        }
        Ok(entries)
    }

    fn put(&self, _name: &str, _payload: &dyn Payload) -> Result<Receipt> {
        self.refused()
    }

    fn create(&self, _name: &str, _bytes: &[u8]) -> Result<Created> {
        self.refused()
    }

    fn confirm(&self, _dir: &str) -> Result<()> {
        self.refused()
    }

    fn delete(&self, _name: &str) -> Result<()> {
        self.refused()
    }

    fn mend(&self, _name: &str, _offset: u64, _bytes: &[u8]) -> Result<()> {
        self.refused()
    }

    fn retire(&self, _name: &str) -> Result<()> {
        self.refused()
    }

    fn sweep(&self, _stays: &dyn Fn(&str) -> bool) -> Result<usize> {
        self.refused()
    }
}

/// A small file that came with the listing.
struct Small(Arc<Vec<u8>>);

impl Source for Small {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let begin = usize::try_from(offset).unwrap_or(usize::MAX).min(self.0.len());
        let there = &self.0[begin..self.0.len().min(begin.saturating_add(into.len()))];
        into[..there.len()].copy_from_slice(there);
        Ok(())
    }
}

/// A file that is read where it lies.
struct Far {
    peers: Peers,
    node: String,
    kind: TierKind,
    name: String,
    length: u64,
    ticket: Mutex<Option<super::Ticket>>,
}

impl Far {
    fn ticket(&self) -> Result<super::Ticket> {
        let mut known = locked(&self.ticket);
        if let Some(ticket) = *known {
            return Ok(ticket);
        }
        let open = wire::Open {
            tier: convert::tier(self.kind).into(),
            name: self.name.clone(),
            chunk_bytes: CHUNK_BYTES,
        };
        let Answer::Opened(opened) = self.peers.ask(&self.node, Ask::Open(open))? else {
            return Err(odd(&self.node));
        };
        if opened.length != self.length {
            let file = format!("{}:{}", self.node, self.name);
            return Err(Error::damaged(file, "it has another length than a moment ago"));
        }
        let ticket = ticket(&self.node, &opened.ticket)?;
        *known = Some(ticket);
        Ok(ticket)
    }
}

impl Source for Far {
    fn len(&self) -> u64 {
        self.length
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let there = usize::try_from(self.length.saturating_sub(offset)).unwrap_or(usize::MAX);
        let want = there.min(into.len());
        if want == 0 {
            return Ok(());
        }
        let index = |at: u64| usize::try_from(at / CHUNK_BYTES).unwrap_or(usize::MAX);
        let (first, last) = (index(offset), index(offset + want as u64 - 1));
        let landing = Memory {
            length: self.length,
            offset,
            bytes: Mutex::new(vec![0; want]),
            missing: Mutex::new((first..=last).collect()),
        };
        let chunks = Chunks::new(first..=last, CHUNK_BYTES);
        self.peers.network.pull(&self.node, &self.ticket()?, &landing, &chunks)?;
        if !locked(&landing.missing).is_empty() {
            let file = format!("{}:{}", self.node, self.name);
            return Err(Error::damaged(file, "some of it did not come"));
        }
        into[..want].copy_from_slice(&locked(&landing.bytes));
        Ok(())
    }
}

/// Takes the part of some chunks that is wanted.
struct Memory {
    length: u64,
    offset: u64,
    bytes: Mutex<Vec<u8>>,
    missing: Mutex<Vec<usize>>,
}

impl Landing for Memory {
    fn chunk(&self, index: usize) -> Result<Box<dyn Arriving + '_>> {
        let len = chunk_len(self.length, CHUNK_BYTES, index);
        let at = index as u64 * CHUNK_BYTES;
        Ok(Box::new(Part { memory: self, index, at, len }))
    }
}

struct Part<'a> {
    memory: &'a Memory,
    index: usize,
    at: u64,
    len: u64,
}

/// What is taken at a time.
const PIECE_BYTES: usize = 128 << 10;

impl Arriving for Part<'_> {
    fn len(&self) -> u64 {
        self.len
    }

    fn take(self: Box<Self>, from: &mut dyn Flow) -> Result<bool, Broken> {
        let mut piece = AlignedBuf::new(PIECE_BYTES);
        let mut done = 0;
        while done < self.len {
            let left = usize::try_from(self.len - done).unwrap_or(usize::MAX).min(piece.len());
            let n = some_of(from, &mut piece[..left])?;
            self.keep(self.at + done, &piece[..n]);
            done += n as u64;
        }
        locked(&self.memory.missing).retain(|chunk| *chunk != self.index);
        Ok(true)
    }
}

impl Part<'_> {
    /// Of these bytes, those that are wanted.
    fn keep(&self, at: u64, bytes: &[u8]) {
        let mut wanted = locked(&self.memory.bytes);
        let end = self.memory.offset + wanted.len() as u64;
        let (from, to) = (at.max(self.memory.offset), (at + bytes.len() as u64).min(end));
        if from < to {
            let part = |at: u64, zero: u64| usize::try_from(at - zero).unwrap_or(usize::MAX);
            let (begin, len) = (part(from, self.memory.offset), part(to, from));
            let source = part(from, at);
            wanted[begin..begin + len].copy_from_slice(&bytes[source..source + len]);
        }
    }
}

/// Every live agent's tiers: RAM of all, then disks. One that does not answer is named.
pub(crate) fn look_at_all(peers: &Peers) -> (Vec<Arc<Remote>>, Vec<(String, Error)>) {
    let nodes = peers.others().into_iter();
    let tiers = [TierKind::Ram, TierKind::Disk];
    let all: Vec<_> = nodes.flat_map(|node| tiers.map(|kind| (node.name.clone(), kind))).collect();
    let (found, silent) = look_at(peers, &all, None);
    let members = found.iter().map(Arc::downgrade).collect();
    let crowd = Arc::new(Crowd { members, brought: Mutex::default() });
    for remote in &found {
        let _ = remote.crowd.set(crowd.clone()); // It is new: it has none.
    }
    (found, silent)
}

/// These tiers, in the same order; of `key` alone if one is named.
pub(crate) fn look_at(
    peers: &Peers,
    places: &[(String, TierKind)],
    key: Option<&CheckpointKey>,
) -> (Vec<Arc<Remote>>, Vec<(String, Error)>) {
    let (mut found, mut silent) = (Vec::new(), Vec::new());
    let looked =
        at_once(ASKED_AT_ONCE, places, |(node, kind)| Remote::look(peers, node, *kind, key));
    for ((node, kind), looked) in places.iter().zip(looked) {
        match looked {
            Ok(remote) => found.push((*kind, Arc::new(remote))),
            Err(e) => silent.push((node.clone(), e)),
        }
    }
    found.sort_by(|a, b| (a.0, &a.1.node).cmp(&(b.0, &b.1.node)));
    (found.into_iter().map(|(_, remote)| remote).collect(), silent)
}
