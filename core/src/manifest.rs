//! What a shard is made of ([`ShardManifest`]) and which shards make a checkpoint ([`Seal`]).
//!
//! It owns the two formats and the rules that a well-formed one obeys, and checks them when it
//! writes and when it reads. It does not own where the files lie (`commit`) nor the bytes they
//! describe.
//!
//! # Invariants
//!
//! - A decoded manifest never points outside its payload, and no two of its tensors overlap.
//! - The chunk checksums, combined, are the checksum of the whole payload.
//! - A manifest in the wrong place (run, attempt, step, rank) is damage, whatever its checksum
//!   says.
//! - The seal of a step has the same bytes whoever writes it.

pub(crate) mod hex;
pub mod replicated;
mod tensors;

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use self::replicated::Replicated;
pub(crate) use self::tensors::BOXES;
pub use self::tensors::TensorEntry;
use crate::{
    chunk::{CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, chunk_count, chunk_len},
    error::{Error, Result},
    names::{
        AttemptRef, CheckpointKey, Id, Rank, Step, hex, manifest_name, packed_name, payload_name,
    },
    packed::Stored,
    record,
};

/// The most ranks that one checkpoint may have; bounds what a lying file can make us allocate.
pub const RANKS_MAX: usize = 1 << 20;

/// Which shard this is: the run, the attempt, the writer, the step, the rank, and who else saves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The run's random id, the same for all its attempts.
    pub run_id: Id,
    /// The attempt that saved it.
    pub attempt: AttemptRef,
    /// The writing process's nonce.
    pub writer: Id,
    /// Completed training steps.
    pub step: u64,
    /// The rank that saved it.
    pub rank: u32,
    /// Every rank that this checkpoint expects a shard from, rising.
    pub savers: Vec<u32>,
}

impl Identity {
    /// The checkpoint that it belongs to.
    #[must_use]
    pub fn key(&self) -> CheckpointKey {
        CheckpointKey::new(Step(self.step), &self.attempt)
    }

    /// The payload's file name.
    #[must_use]
    pub fn payload_name(&self) -> String {
        payload_name(Rank(self.rank), &self.writer)
    }

    /// The same where it is compressed.
    #[must_use]
    pub fn packed_name(&self) -> String {
        packed_name(Rank(self.rank), &self.writer)
    }

    fn check(&self) -> Result<(), String> {
        if self.savers.is_empty() || self.savers.len() > RANKS_MAX {
            return Err(format!("{} ranks in the saver set", self.savers.len()));
        }
        if !self.savers.is_sorted_by(|a, b| a < b) {
            return Err("the saver set is not in rising order".into());
        }
        if self.savers.binary_search(&self.rank).is_err() {
            return Err(format!("rank {} is not in its own saver set", self.rank));
        }
        Ok(())
    }
}

/// The payload file and the checksum of each of its chunks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PayloadInfo {
    /// File name, beside the manifest.
    pub file: String,
    /// Exact length in bytes, the safetensors header included.
    pub length: u64,
    /// Bytes of each chunk but the last, counted from byte 0 of the file.
    pub chunk_bytes: u64,
    /// `crc32`, the only algorithm of format 1.
    pub algorithm: String,
    /// `none`: as it lies. Others come with a required feature.
    pub codec: String,
    /// CRC-32 of the whole payload.
    #[serde(with = "hex::one")]
    pub crc: u32,
    /// CRC-32 of each chunk, eight hex digits each, in one string.
    #[serde(with = "hex::many")]
    pub chunks: Vec<u32>,
    /// How it lies where it is compressed; all else here is said of the bytes that come out.
    #[serde(skip)]
    pub stored: Option<Stored>,
}

impl PayloadInfo {
    /// The length in bytes of chunk `index`.
    #[must_use]
    pub fn chunk_len(&self, index: usize) -> u64 {
        chunk_len(self.length, self.chunk_bytes, index)
    }

    /// CRC-32 of `len` bytes from `offset`, from those of the chunks; `None` where it is not whole chunks.
    #[must_use]
    pub fn crc32(&self, offset: u64, len: u64) -> Option<u32> {
        let end = offset.checked_add(len).filter(|end| *end <= self.length)?;
        let whole = |at: u64| at.is_multiple_of(self.chunk_bytes);
        if !whole(offset) || (!whole(end) && end != self.length) {
            return None;
        }
        let index = |at: u64| usize::try_from(at.div_ceil(self.chunk_bytes)).ok();
        let chunks = self.chunks.get(index(offset)?..index(end)?)?;
        Some(combine(chunks, len, self.chunk_bytes))
    }

    fn check(&self) -> Result<(), String> {
        if self.algorithm != "crc32" || self.codec != "none" {
            return Err(format!("checksum {:?}, codec {:?}", self.algorithm, self.codec));
        }
        if !(CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&self.chunk_bytes)
            || !self.chunk_bytes.is_multiple_of(CHUNK_BYTES_MIN)
        {
            return Err(format!("chunks of {} bytes", self.chunk_bytes));
        }
        if self.chunks.len() as u64 != chunk_count(self.length, self.chunk_bytes) {
            return Err(format!("{} checksums for {} bytes", self.chunks.len(), self.length));
        }
        if combine(&self.chunks, self.length, self.chunk_bytes) != self.crc {
            return Err("the chunk checksums do not add up to the payload's".into());
        }
        Ok(())
    }
}

/// The CRC-32 of the whole, from those of its chunks.
#[must_use]
pub fn combine(chunks: &[u32], length: u64, chunk_bytes: u64) -> u32 {
    let whole = |crc, len| crc32fast::Hasher::new_with_initial_len(crc, len);
    let joined = |before: u32, crc: u32, len: u64| {
        let mut both = whole(before, 0);
        both.combine(&whole(crc, len));
        both.finalize()
    };
    let Some((last, full)) = chunks.split_last() else { return crc32fast::hash(&[]) };
    let before = match full.len() {
        0..=SHIFTED_MIN => full.iter().fold(0, |before, crc| joined(before, *crc, chunk_bytes)),
        _ => {
            let shift = Shift::of(|before| joined(before, 0, chunk_bytes));
            full.iter().fold(0, |before, crc| shift.by(before) ^ crc)
        }
    };
    joined(before, *last, chunk_len(length, chunk_bytes, full.len()))
}

/// With more chunks than these a table pays.
const SHIFTED_MIN: usize = 64;

/// What so many bytes after it make of a checksum: linear, so a table for each of its bytes says it. A
/// shard has thousands of chunks, and who looks at a thousand shards would spend most of its time here.
struct Shift([[u32; 256]; 4]);

impl Shift {
    fn of(shifted: impl Fn(u32) -> u32) -> Self {
        let mut tables = [[0; 256]; 4];
        for (byte, table) in tables.iter_mut().enumerate() {
            for bit in 0..8 {
                let alone = shifted(1 << (8 * byte + bit));
                let (known, new) = table.split_at_mut(1 << bit);
                known.iter().zip(new).for_each(|(known, new)| *new = known ^ alone);
            }
        }
        Self(tables)
    }

    fn by(&self, crc: u32) -> u32 {
        let bytes = crc.to_le_bytes().map(usize::from);
        self.0.iter().zip(bytes).fold(0, |all, (table, byte)| all ^ table[byte])
    }
}

/// What the user said about a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// Numbers given to `save(metrics=)`; `"nan"`, `"inf"` and `"-inf"` where JSON has none.
    #[serde(default, with = "metrics_json")]
    pub metrics: BTreeMap<String, f64>,
    /// Words given to `save(tags=)`.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Wall time of the save in ms since 1970, for display and keep-every-hours.
    #[serde(default)]
    pub saved_unix_ms: u64,
}

/// The description of one shard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShardManifest {
    /// Format version.
    pub format: u32,
    /// Features that a reader must know.
    #[serde(default)]
    pub required_features: Vec<String>,
    /// Which shard this is.
    pub identity: Identity,
    /// `shard`, index 0; parity later.
    pub fragment: Fragment,
    /// The payload and its checksums.
    pub payload: PayloadInfo,
    /// The tensors in it, in the order in which they lie.
    pub tensors: Vec<TensorEntry>,
    /// The state's tree in the typed encoding of `state::value`; its tensors are names in
    /// `tensors`, or in other ranks' where `replicated` says so.
    pub tree: serde_json::Value,
    /// The tensors that other ranks hold alike.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicated: Option<Replicated>,
    /// What the user said.
    #[serde(default)]
    pub meta: Meta,
}

/// What part of a shard a payload is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fragment {
    /// `shard`: the whole.
    pub kind: String,
    /// 0 for a whole.
    pub index: u32,
}

/// What [`encode`] writes: the parts that change, and two that arrive as JSON already.
pub struct Parts<'a> {
    /// Which shard this is.
    pub identity: &'a Identity,
    /// The payload and its checksums.
    pub payload: &'a PayloadInfo,
    /// The JSON array of [`TensorEntry`], kept from save to save while the layout is the same.
    pub tensors_json: &'a [u8],
    /// The JSON of the tree.
    pub tree_json: &'a [u8],
    /// The tensors that other ranks hold alike.
    pub replicated: Option<&'a Replicated>,
    /// Some are boxes of larger ones.
    pub has_boxes: bool,
    /// What the user said.
    pub meta: &'a Meta,
}

/// Writes a shard manifest.
///
/// # Errors
/// The identity or the payload breaks a rule: a bug of the caller.
pub fn encode(parts: &Parts<'_>) -> Result<Vec<u8>> {
    parts.identity.check().and_then(|()| parts.payload.check()).map_err(Error::Bug)?;
    assert_eq!(parts.payload.file, parts.identity.payload_name(), "payload of another shard");
    let json = |e: serde_json::Error| Error::Bug(format!("manifest: {e}"));
    let mut body = Vec::with_capacity(parts.tensors_json.len() + parts.tree_json.len() + 4096);
    body.extend_from_slice(b"{\"format\":1,\"required_features\":");
    let features: Vec<&str> = [
        parts.replicated.is_some().then_some(replicated::FEATURE),
        parts.has_boxes.then_some(BOXES),
    ]
    .into_iter()
    .flatten()
    .collect();
    serde_json::to_writer(&mut body, &features).map_err(json)?;
    body.extend_from_slice(b",\"identity\":");
    serde_json::to_writer(&mut body, parts.identity).map_err(json)?;
    body.extend_from_slice(b",\"fragment\":{\"kind\":\"shard\",\"index\":0},\"payload\":");
    serde_json::to_writer(&mut body, parts.payload).map_err(json)?;
    body.extend_from_slice(b",\"meta\":");
    serde_json::to_writer(&mut body, parts.meta).map_err(json)?;
    if let Some(replicated) = parts.replicated {
        body.extend_from_slice(b",\"replicated\":");
        serde_json::to_writer(&mut body, replicated).map_err(json)?;
    }
    body.extend_from_slice(b",\"tree\":");
    body.extend_from_slice(parts.tree_json);
    body.extend_from_slice(b",\"tensors\":");
    body.extend_from_slice(parts.tensors_json);
    body.push(b'}');
    if body.len() as u64 > record::RECORD_BYTES_MAX - 64 {
        return Err(Error::invalid(format!(
            "the manifest would have {} bytes, readers accept {}: put small values together",
            body.len(),
            record::RECORD_BYTES_MAX
        )));
    }
    Ok(record::seal(&body))
}

/// Reads and checks a shard manifest that was found at `key`, `rank`. `file` is its name in
/// messages.
///
/// # Errors
/// [`Error::Damaged`], [`Error::NewerFormat`].
pub fn decode(bytes: &[u8], file: &str, key: &CheckpointKey, rank: Rank) -> Result<ShardManifest> {
    let manifest: ShardManifest = record::open(bytes, file)?;
    manifest.check(key, rank).map_err(|why| Error::damaged(file, why))?;
    Ok(manifest)
}

impl ShardManifest {
    fn check(&self, key: &CheckpointKey, rank: Rank) -> Result<(), String> {
        let identity = &self.identity;
        identity.check()?;
        if identity.step != key.step.0 {
            return Err(format!("it is of step {}, it lies at {}", identity.step, key.step));
        }
        if !key.attempt.is(&identity.attempt) {
            return Err(format!(
                "it is of attempt {:?}, it lies at {}",
                identity.attempt, key.attempt
            ));
        }
        if identity.rank != rank.0 {
            return Err(format!("it is of rank {}, it lies at {rank}", identity.rank));
        }
        if self.fragment.kind != "shard" || self.fragment.index != 0 {
            return Err(format!("it is fragment {:?}", self.fragment));
        }
        if self.payload.file != identity.payload_name() {
            return Err(format!("it names the payload {:?}", self.payload.file));
        }
        self.payload.check()?;
        let mut names = HashSet::with_capacity(self.tensors.len());
        let mut last_end = 0;
        for tensor in &self.tensors {
            tensor.check(&self.payload)?;
            if !names.insert(tensor.name.as_str()) {
                return Err(format!("two tensors are named {}", tensor.name));
            }
            if tensor.at[0] < last_end {
                return Err(format!("{} overlaps the tensor before it", tensor.name));
            }
            last_end = tensor.at[1];
        }
        self.replicated.as_ref().map_or(Ok(()), |r| r.check(identity, &self.tensors))
    }
}

/// The line of one rank in a seal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedShard {
    /// The manifest's length in bytes.
    pub length: u64,
    /// The rank.
    pub rank: u32,
    /// The manifest's SHA-256, 64 hex digits.
    pub sha256: String,
}

impl SealedShard {
    /// The line of the shard whose manifest has these bytes.
    #[must_use]
    pub fn of(rank: u32, manifest: &[u8]) -> Self {
        Self { length: manifest.len() as u64, rank, sha256: sha256(manifest) }
    }
}

/// The file that makes a checkpoint exist. Canonical: members in alphabetical order, no clock, no
/// host, no version of the writer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    /// The attempt that saved it.
    pub attempt: AttemptRef,
    /// Format version.
    pub format: u32,
    /// Features that a reader must know.
    #[serde(default)]
    pub required_features: Vec<String>,
    /// The run's random id.
    pub run_id: Id,
    /// One line a rank, rising.
    pub shards: Vec<SealedShard>,
    /// The step.
    pub step: u64,
}

impl Seal {
    /// The seal over these shards, rising by rank, of which one is `first`.
    #[must_use]
    pub fn over(first: &Identity, shards: Vec<SealedShard>) -> Self {
        Self {
            attempt: first.attempt,
            format: record::FORMAT,
            required_features: Vec::new(),
            run_id: first.run_id,
            shards,
            step: first.step,
        }
    }

    /// Its file.
    ///
    /// # Errors
    /// None that a caller can cause.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let body = serde_json::to_vec(self).map_err(|e| Error::Bug(format!("seal: {e}")))?;
        Ok(record::seal(&body))
    }

    /// Reads and checks a seal that was found at `key`.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::NewerFormat`].
    pub fn decode(bytes: &[u8], file: &str, key: &CheckpointKey) -> Result<Self> {
        let seal: Self = record::open(bytes, file)?;
        if Step(seal.step) != key.step || !key.attempt.is(&seal.attempt) {
            return Err(Error::damaged(file, "it belongs to another step or attempt"));
        }
        if seal.shards.is_empty() || !seal.shards.is_sorted_by(|a, b| a.rank < b.rank) {
            return Err(Error::damaged(file, "its ranks are not in rising order"));
        }
        Ok(seal)
    }

    /// Checks a manifest's bytes against its line.
    ///
    /// # Errors
    /// [`Error::Damaged`]: the manifest is not the one that was sealed.
    pub fn check(&self, rank: Rank, manifest: &[u8], file: &str) -> Result<()> {
        let line = self.shards.iter().find(|s| s.rank == rank.0);
        let line = line.ok_or_else(|| Error::damaged(file, format!("the seal has no {rank}")))?;
        if line.length != manifest.len() as u64 || line.sha256 != sha256(manifest) {
            return Err(Error::damaged(file, "it is not the manifest that was sealed"));
        }
        Ok(())
    }

    /// The ranks in it.
    pub fn ranks(&self) -> impl Iterator<Item = Rank> + '_ {
        self.shards.iter().map(|s| Rank(s.rank))
    }
}

/// 64 hex digits.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// A damaged manifest's place in words: `step 5 of attempt 1: rank-000000.json`.
#[must_use]
pub fn manifest_label(key: &CheckpointKey, rank: Rank) -> String {
    format!("{}/{}", key.dir(), manifest_name(rank))
}

/// NaN is an ordinary loss, and JSON has no word for it.
mod metrics_json {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Number {
        Finite(f64),
        Word(String),
    }

    pub(super) fn serialize<S: Serializer>(
        metrics: &BTreeMap<String, f64>,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        s.collect_map(metrics.iter().map(|(name, x)| {
            let word = if x.is_nan() {
                "nan"
            } else if *x > 0.0 {
                "inf"
            } else {
                "-inf"
            };
            (name, if x.is_finite() { Number::Finite(*x) } else { Number::Word(word.into()) })
        }))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        d: D,
    ) -> Result<BTreeMap<String, f64>, D::Error> {
        let read = |(name, number)| {
            let x = match number {
                Number::Finite(x) => x,
                Number::Word(word) => match word.as_str() {
                    "nan" => f64::NAN,
                    "inf" => f64::INFINITY,
                    "-inf" => f64::NEG_INFINITY,
                    _ => return Err(D::Error::custom(format!("{word:?} is no metric"))),
                },
            };
            Ok((name, x))
        };
        BTreeMap::<String, Number>::deserialize(d)?.into_iter().map(read).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_of_chunks_add_up_to_the_wholes_however_many_there_are() {
        let bytes: Vec<u8> = (0..4096 * 200 + 77_u32).map(|at| (at * 31 / 7) as u8).collect();
        for len in [0, 1, 4096, 4097, 4096 * 3, 4096 * 65, 4096 * 66 + 1, 4096 * 200 + 77] {
            let chunks: Vec<u32> = bytes[..len].chunks(4096).map(crc32fast::hash).collect();
            assert_eq!(combine(&chunks, len as u64, 4096), crc32fast::hash(&bytes[..len]), "{len}");
        }
    }
}
