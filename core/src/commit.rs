//! When a checkpoint exists.
//!
//! ```text
//! put payload -> Receipt -> publish_shard --(every rank)--> gather -> Complete -> seal -> Sealed
//! ```
//!
//! The order is in the types: a manifest is published against the receipt of its payload, and a
//! seal is written by [`Complete`], which only [`gather`] makes, having read every manifest.
//!
//! # Invariants
//!
//! - Every shard named in a seal had its payload safe in this tier before its manifest was written.
//! - Two sealers of one step write the same bytes: one wins, the other has the same success.
//! - A step with a tombstone is not sealed, nor one whose ranks differ in what they hold alike.
//! - Nothing here deletes, but for a seal that met a tombstone.
//!
//! ```compile_fail
//! # use tierkeep::commit::Complete;
//! # fn f(tier: &dyn tierkeep::tier::Tier) {
//! let complete = Complete { lines: vec![] }; // only `gather` can make one
//! complete.seal(tier);
//! # }
//! ```

use std::collections::BTreeMap;

use crate::{
    at_once::{asked_of, try_at_once},
    error::{Error, Result},
    manifest::{Identity, Seal, SealedShard, ShardManifest, replicated::differences},
    names::{CheckpointKey, Rank, SEAL, TOMBSTONE, WHOLE, parse_manifest_name, parse_payload_name},
    packed::decode_any,
    tier::{Receipt, Tier, create_same, find_record, label, read_record},
};

/// What a tier holds of one checkpoint, by its file names alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// Ranks whose manifest is there.
    pub manifests: Vec<Rank>,
    /// Payload files by rank; more than one where a writer died and another came.
    pub payloads: BTreeMap<Rank, Vec<String>>,
    /// The seal is there, or the word that stands for it where each node has its own ranks' shards.
    pub sealed: bool,
    /// The tombstone is there.
    pub deleted: bool,
}

impl Listing {
    /// Looks.
    ///
    /// # Errors
    /// The tier did not answer.
    pub fn of(tier: &dyn Tier, key: &CheckpointKey) -> Result<Self> {
        let mut found = Self::default();
        for entry in tier.list(&key.dir())? {
            match entry.name.as_str() {
                SEAL | WHOLE => found.sealed = true,
                TOMBSTONE => found.deleted = true,
                name => {
                    if let Some(rank) = parse_manifest_name(name) {
                        found.manifests.push(rank);
                    } else if let Some(rank) = parse_payload_name(name) {
                        found.payloads.entry(rank).or_default().push(entry.name);
                    }
                }
            }
        }
        Ok(found)
    }

    /// Ranks of `savers` without a manifest.
    #[must_use]
    pub fn missing(&self, savers: &[u32]) -> Vec<u32> {
        savers.iter().copied().filter(|r| !self.manifests.contains(&Rank(*r))).collect()
    }

    /// True where nothing is there.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Publishes the manifest of a shard whose payload the tier holds.
///
/// # Errors
/// The tier did not answer, or another writer's manifest is there.
pub fn publish_shard(
    tier: &dyn Tier,
    identity: &Identity,
    manifest: &[u8],
    receipt: Receipt,
) -> Result<()> {
    let key = identity.key();
    assert_eq!(receipt.tier, tier.kind(), "a receipt of another tier");
    let names = [identity.payload_name(), identity.packed_name()].map(|name| key.file(&name));
    assert!(names.contains(&receipt.name), "a receipt for another shard");
    let name = key.manifest(Rank(identity.rank));
    if create_same(tier, &name, manifest)? {
        return Ok(());
    }
    Err(Error::Fenced { why: format!("{} was written by another process", label(tier, &name)) })
}

/// Says beside this node's own shards that all ranks had theirs: nobody here could see it otherwise.
///
/// # Errors
/// The tier did not answer.
pub(crate) fn mark_whole(tier: &dyn Tier, key: &CheckpointKey) -> Result<()> {
    let body = format!("{{\"format\":{}}}", crate::record::FORMAT);
    tier.create(&key.file(WHOLE), &crate::record::seal(body.as_bytes())).map(drop)
}

/// Reads the manifest of one shard in one tier and checks it against its place, and against the
/// seal if there is one.
///
/// The bytes are those that it has where nothing is compressed.
///
/// # Errors
/// Not found, damaged, or the tier did not answer.
pub fn read_manifest(
    tier: &dyn Tier,
    key: &CheckpointKey,
    rank: Rank,
    seal: Option<&Seal>,
) -> Result<(ShardManifest, Vec<u8>)> {
    let name = key.manifest(rank);
    let bytes = read_record(tier, &name)?;
    let file = label(tier, &name);
    if let Some(seal) = seal {
        seal.check(rank, &bytes, &file)?;
    }
    decode_any(bytes, &file, key, rank)
}

/// Reads the seal, where there is one.
///
/// # Errors
/// Damaged, or the tier did not answer.
pub fn read_seal(tier: &dyn Tier, key: &CheckpointKey) -> Result<Option<Seal>> {
    let name = key.file(SEAL);
    match find_record(tier, &name)? {
        Some(bytes) => Seal::decode(&bytes, &label(tier, &name), key).map(Some),
        None => Ok(None),
    }
}

/// What [`gather`] found.
#[derive(Debug)]
pub enum Gathered {
    /// Every rank's manifest: it can be sealed.
    Complete(Complete),
    /// These ranks have none yet.
    Missing(Vec<u32>),
    /// They do not agree on tensors that several of them hold: a sentence each.
    Differ(Vec<String>),
    /// It is being deleted.
    Deleted,
}

/// Every manifest of a checkpoint, read and checked.
#[derive(Debug)]
pub struct Complete {
    first: Identity,
    lines: Vec<SealedShard>,
}

/// A checkpoint that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// Where.
    pub key: CheckpointKey,
}

/// Looks whether every rank of the saver set has published its shard.
///
/// # Errors
/// A manifest is damaged, or two of them differ in run or saver set.
pub fn gather(tier: &dyn Tier, key: &CheckpointKey, savers: &[u32]) -> Result<Gathered> {
    let listing = Listing::of(tier, key)?;
    if listing.deleted {
        return Ok(Gathered::Deleted);
    }
    let missing = listing.missing(savers);
    if !missing.is_empty() {
        return Ok(Gathered::Missing(missing));
    }
    let read = |rank: &u32| -> Result<(String, SealedShard, ShardManifest)> {
        let name = key.manifest(Rank(*rank));
        let (bytes, file) = (read_record(tier, &name)?, label(tier, &name));
        // The file as it lies is what is sealed.
        let line = SealedShard::of(*rank, &bytes);
        let (mut manifest, _) = decode_any(bytes, &file, key, Rank(*rank))?;
        // What is compared stays, of all ranks at once; trees and tensors of a thousand would not.
        (manifest.tree, manifest.tensors) = (serde_json::Value::Null, Vec::new());
        Ok((file, line, manifest))
    };
    let mut shards: Vec<ShardManifest> = Vec::with_capacity(savers.len());
    let mut lines = Vec::with_capacity(savers.len());
    for (file, line, manifest) in try_at_once(asked_of(tier), savers, read)? {
        same_checkpoint(&manifest, shards.first(), savers)
            .map_err(|why| Error::damaged(file, why))?;
        lines.push(line);
        shards.push(manifest);
    }
    let differences = differences(&shards);
    if !differences.is_empty() {
        return Ok(Gathered::Differ(differences));
    }
    match shards.into_iter().next() {
        Some(first) => Ok(Gathered::Complete(Complete { first: first.identity, lines })),
        None => Err(Error::Bug("a checkpoint of no ranks".into())),
    }
}

/// Manifests of one checkpoint agree in run, attempt and saver set.
pub(crate) fn same_checkpoint(
    manifest: &ShardManifest,
    first: Option<&ShardManifest>,
    savers: &[u32],
) -> Result<(), String> {
    let identity = &manifest.identity;
    if identity.savers != savers {
        return Err(format!("its saver set is {:?}, others say {savers:?}", identity.savers));
    }
    let first = first.map_or(identity, |m| &m.identity);
    if identity.run_id != first.run_id || identity.attempt != first.attempt {
        return Err("it is of another run or attempt than the shard beside it".into());
    }
    Ok(())
}

impl Complete {
    /// Writes the seal: one small file, create-if-absent, the same bytes whoever writes it.
    ///
    /// # Errors
    /// The tier did not answer (the checkpoint may or may not exist: ask again), a tombstone came
    /// meanwhile, or another seal is there.
    pub fn seal(self, tier: &dyn Tier) -> Result<Sealed> {
        let seal = Seal::over(&self.first, self.lines);
        let key = CheckpointKey::new(crate::names::Step(seal.step), &seal.attempt);
        let name = key.file(SEAL);
        if !create_same(tier, &name, &seal.encode()?)? {
            return Err(Error::damaged(label(tier, &name), "it is not the seal of these shards"));
        }
        // A collector that put its tombstone after our first look found no seal to delete.
        if Listing::of(tier, &key)?.deleted {
            tier.delete(&name)?;
            return Err(Error::Fenced { why: format!("{key} is being deleted") });
        }
        Ok(Sealed { key })
    }
}
