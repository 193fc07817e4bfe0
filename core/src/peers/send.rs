//! A shard on its way to another node.
//!
//! # Invariants
//!
//! - A receipt is given out only when the holder has said that every chunk is there and checked, and
//!   names the memory that has it.
//! - What the holder refuses is looked at here: bytes that changed under our own hands are our damage,
//!   not the holder's.

use tierkeep_proto::peer::{self as wire, reply::Answer, request::Ask};

use super::{Chunks, Peers, odd, ticket, wire_key};
use crate::{
    attempt::{self, Attempts},
    error::{Error, Result},
    manifest::PayloadInfo,
    names::{CheckpointKey, Rank},
    tier::{Source, Tier, buffer::AlignedBuf},
};

/// How often chunks that did not arrive are sent again.
const TRIES: usize = 4;

/// A shard that is to be held elsewhere.
pub(crate) struct Outbound<'a> {
    pub(crate) key: &'a CheckpointKey,
    pub(crate) rank: Rank,
    pub(crate) manifest: &'a [u8],
    pub(crate) payload: &'a PayloadInfo,
    pub(crate) source: &'a dyn Source,
    /// The attempt that offers it.
    pub(crate) attempt: u32,
    /// Copies that it is to have on other nodes.
    pub(crate) replicas: usize,
    /// The rank's own node, where that is another one.
    pub(crate) owner: Option<&'a str>,
    /// Told of bytes that have arrived.
    pub(crate) arrived: &'a (dyn Fn(u64) + Sync),
    /// What the holder is to keep meanwhile.
    pub(crate) keep: &'a [CheckpointKey],
}

/// A holder's word that it has a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PeerReceipt {
    pub(crate) node: String,
    /// The memory that has it.
    pub(crate) store: Vec<u8>,
}

/// Sends it to `node`.
///
/// # Errors
/// The holder is out of reach, has no room, or refuses what arrives; or our own bytes are damaged.
pub(crate) fn send(peers: &Peers, node: &str, shard: &Outbound<'_>) -> Result<PeerReceipt> {
    let offer = wire::Offer {
        key: Some(wire_key(shard.key)),
        rank: shard.rank.0,
        manifest: shard.manifest.to_vec(),
        keep: shard.keep.iter().map(wire_key).collect(),
        attempt: shard.attempt,
        replicas: u32::try_from(shard.replicas).unwrap_or(u32::MAX),
        owner: shard.owner.unwrap_or_default().into(),
    };
    let Answer::Taken(taken) = peers.ask(node, Ask::Offer(offer))? else { return Err(odd(node)) };
    let held = |store| PeerReceipt { node: node.into(), store };
    if taken.ticket.is_empty() {
        return Ok(held(taken.store));
    }
    let ticket = ticket(node, &taken.ticket)?;
    let count = shard.payload.chunks.len();
    let mut missing: Vec<usize> = (0..count).collect();
    let tell = |chunk| (shard.arrived)(shard.payload.chunk_len(chunk));
    let mut trouble = None;
    for _ in 0..TRIES {
        let chunks = Chunks::new(missing.iter().copied(), shard.payload.chunk_bytes).telling(&tell);
        let pushed = peers.network.push(node, &ticket, shard.source, &chunks);
        for chunk in chunks.take_refused() {
            check_own(shard, chunk)?;
        }
        let finish = wire::Finish { ticket: taken.ticket.clone() };
        let Answer::Finished(finished) = peers.ask(node, Ask::Finish(finish))? else {
            return Err(odd(node));
        };
        if finished.missing.is_empty() {
            return Ok(held(finished.store));
        }
        let known = |chunk: &u64| usize::try_from(*chunk).ok().filter(|chunk| *chunk < count);
        let before = missing.len();
        missing = finished.missing.iter().filter_map(known).collect();
        let broke = pushed.is_err();
        trouble = pushed.err().or(trouble);
        if broke && missing.len() >= before {
            break; // Nothing gets through: another node is the better place.
        }
    }
    Err(trouble.unwrap_or_else(|| {
        let why = format!("{node} refuses {} of its {count} chunks", missing.len());
        Error::Skipped { step: shard.key.step, why }
    }))
}

/// Gives a holder the run's records, as they lie in `tiers`: without them nobody could tell the lineage of
/// what it holds.
pub(crate) fn inform(peers: &Peers, node: &str, tiers: &[&dyn Tier]) -> Result<()> {
    let attempts = Attempts::load(tiers)?;
    let mut records = Vec::new();
    for record in attempts.records() {
        records.push(attempt::read(tiers, record.attempt.number)?.1);
    }
    let joined = attempts.joined().to_vec();
    peers.ask(node, Ask::Records(wire::Records { records, joined })).map(drop)
}

/// Whether a chunk that was refused is what it should be here.
fn check_own(shard: &Outbound<'_>, chunk: usize) -> Result<()> {
    let (len, at) = (shard.payload.chunk_len(chunk), chunk as u64 * shard.payload.chunk_bytes);
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let mut buffer = AlignedBuf::new(len);
    shard.source.read_at(at, &mut buffer[..len])?;
    if crc32fast::hash(&buffer[..len]) != shard.payload.chunks[chunk] {
        let file = format!("{} of {} in RAM", shard.key, shard.rank);
        return Err(Error::damaged(file, format!("chunk {chunk}")));
    }
    Ok(())
}

/// A transfer whose end is asked for when it is over.
pub(crate) fn late(key: &CheckpointKey) -> Error {
    Error::Fenced { why: format!("the transfer of {key} has ended") }
}
