//! A payload that lies compressed in a tier: chunk by chunk, each alone or as it is, so that any of them can
//! be read without the others.
//!
//! ```text
//! rank-000003-1a2b3c4d.packed   the stored chunks, one after the other
//! rank-000003.json              {"checksum":"...","format":1,"required_features":["packed"],
//!                                "stored":{"file":...,"codec":...,"crc":...,"lengths":[...]},"shard":{...}}
//! ```
//!
//! `shard` is the manifest as it lies elsewhere, to the byte: copies of one shard in several tiers are the
//! same manifest, whether they are compressed or not, and one that is brought back from a bucket is what was
//! saved. Its checksums are of the bytes that come out.
//!
//! It owns how such a payload is read and made, and what says so. It does not own how a chunk is compressed
//! (`codec`), nor when (`cascade`).
//!
//! # Invariants
//!
//! - A chunk whose stored length is its own is as it is; one that is shorter is compressed; none is longer.
//! - What is packed was unpacked again and compared with its checksum before it goes anywhere.
//! - The same shard is packed to the same bytes, by one build.

mod pack;
mod unpack;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

pub(crate) use self::{pack::pack, unpack::open};
use crate::{
    chunk::chunk_len,
    error::{Error, Result},
    manifest::{PayloadInfo, ShardManifest, decode, hex},
    names::{CheckpointKey, Rank},
    record,
};

/// The feature that a reader must know.
pub(crate) const FEATURE: &str = "packed";

/// The only codec of format 1: `codec`, its version 1.
const CODEC: &str = "planes-zstd";

/// How a payload lies where it is compressed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// File name, beside the manifest.
    pub file: String,
    /// How each chunk is compressed that is.
    pub codec: String,
    /// CRC-32 of the file, eight hex digits.
    #[serde(with = "hex::one")]
    pub crc: u32,
    /// Bytes of each chunk as it lies.
    pub lengths: Vec<u64>,
}

impl Stored {
    /// Bytes of the file.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.lengths.iter().fold(0, |sum, length| sum.saturating_add(*length))
    }

    fn check(&self, manifest: &ShardManifest) -> Result<(), String> {
        let payload = &manifest.payload;
        if self.codec != CODEC || self.file != manifest.identity.packed_name() {
            return Err(format!("it is stored as {:?}, codec {:?}", self.file, self.codec));
        }
        if self.lengths.len() != payload.chunks.len() {
            return Err(format!("{} stored chunks", self.lengths.len()));
        }
        let whole = |index| chunk_len(payload.length, payload.chunk_bytes, index);
        match self.lengths.iter().enumerate().find(|(i, len)| **len == 0 || **len > whole(*i)) {
            Some((index, length)) => Err(format!("chunk {index} is stored in {length} bytes")),
            None => Ok(()),
        }
    }
}

/// A manifest's file where its payload is compressed.
#[derive(Deserialize)]
struct Wrapped {
    stored: Stored,
    shard: Box<RawValue>,
}

/// The file of a manifest whose payload lies as `stored`. `plain`: as it lies where nothing is compressed.
fn wrap(plain: &[u8], stored: &Stored) -> Result<Vec<u8>> {
    let json = |e: serde_json::Error| Error::Bug(format!("manifest: {e}"));
    let mut body = format!("{{\"format\":{},\"required_features\":", record::FORMAT).into_bytes();
    serde_json::to_writer(&mut body, &[FEATURE]).map_err(json)?;
    body.extend_from_slice(b",\"stored\":");
    serde_json::to_writer(&mut body, stored).map_err(json)?;
    body.extend_from_slice(b",\"shard\":");
    body.extend_from_slice(&record::body(plain));
    body.push(b'}');
    Ok(record::seal(&body))
}

/// Reads a manifest's file, compressed or not: what it says, and its bytes where nothing is compressed.
///
/// # Errors
/// [`Error::Damaged`], [`Error::NewerFormat`].
pub(crate) fn decode_any(
    bytes: Vec<u8>,
    file: &str,
    key: &CheckpointKey,
    rank: Rank,
) -> Result<(ShardManifest, Vec<u8>)> {
    if !record::requires(&bytes, FEATURE) {
        return Ok((decode(&bytes, file, key, rank)?, bytes));
    }
    let wrapped: Wrapped = record::open(&bytes, file)?;
    let plain = record::seal(wrapped.shard.get().as_bytes());
    let mut manifest = decode(&plain, file, key, rank)?;
    wrapped.stored.check(&manifest).map_err(|why| Error::damaged(file, why))?;
    manifest.payload.stored = Some(wrapped.stored);
    Ok((manifest, plain))
}

impl PayloadInfo {
    /// CRC-32 of the file that holds it.
    #[must_use]
    pub fn stored_crc(&self) -> u32 {
        self.stored.as_ref().map_or(self.crc, |stored| stored.crc)
    }

    /// The name of the file that holds it, beside the manifest.
    #[must_use]
    pub fn stored_file(&self) -> &str {
        self.stored.as_ref().map_or(&self.file, |stored| &stored.file)
    }
}
