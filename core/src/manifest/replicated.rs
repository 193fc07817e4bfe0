//! What a rank's manifest says of the tensors that other ranks hold alike, and whether all of them
//! say the same.
//!
//! # Invariants
//!
//! - A tensor is in the payload of the rank that stores it and in no other of its group.
//! - Every rank of a group has the checksum of every tensor of it in its own manifest, taken from its
//!   own memory: no rank believes another.
//! - No difference: every replicated tensor is stored, once, and all ranks that looked had those bytes.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use super::{Identity, ShardManifest, TensorEntry, hex::some, tensors::check_box};
use crate::{
    names::{hex, ranks as in_words},
    state::dtype::Dtype,
};

/// The feature that a reader must know: tensors of the tree lie in other ranks' payloads.
pub(crate) const FEATURE: &str = "replicated";

/// What a decision's text takes.
const WORDS_MAX: usize = 2000;

/// What a rank says that holds nothing as others do.
pub(crate) const NOTHING: &str = "";

/// What a rank says that has more to say: the manifests are compared.
pub(crate) const TOO_MUCH: &str = "?";

/// The tensors that this rank holds as others do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replicated {
    /// Groups of ranks, each rising.
    pub groups: Vec<Vec<u32>>,
    /// By name.
    pub tensors: Vec<Replica>,
    /// CRC-32 of each tensor's bytes, row-major, in the order of `tensors`: eight hex digits each, in
    /// one string. None: eight dashes, for what lies on a device and says itself that others hold it:
    /// that is stored by one of them, and not compared.
    #[serde(with = "some")]
    pub crcs: Vec<Option<u32>>,
}

/// One tensor that several ranks hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// The escaped path.
    pub name: String,
    /// As in [`TensorEntry`].
    pub dtype: String,
    /// In elements.
    pub shape: Vec<u64>,
    /// As in [`TensorEntry`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub global_shape: Option<Vec<u64>>,
    /// As in [`TensorEntry`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<Vec<u64>>,
    /// Index of its group.
    pub group: usize,
    /// The rank whose payload has it.
    pub saver: u32,
}

impl Replicated {
    pub(super) fn check(&self, identity: &Identity, stored: &[TensorEntry]) -> Result<(), String> {
        for group in &self.groups {
            let rises = group.is_sorted_by(|a, b| a < b) && group.len() > 1;
            let known = group.iter().all(|rank| identity.savers.binary_search(rank).is_ok());
            if !rises || !known || group.binary_search(&identity.rank).is_err() {
                return Err(format!("{group:?} is no group of rank {} that saves", identity.rank));
            }
        }
        if self.crcs.len() != self.tensors.len() {
            let (have, want) = (self.crcs.len(), self.tensors.len());
            return Err(format!("{have} checksums for {want} replicated tensors"));
        }
        if !self.tensors.is_sorted_by(|a, b| a.name < b.name) {
            return Err("replicated tensors are not in the order of their names".into());
        }
        let stored: HashMap<&str, &TensorEntry> =
            stored.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        for tensor in &self.tensors {
            let name = &tensor.name;
            let group = self.groups.get(tensor.group);
            if group.is_none_or(|group| group.binary_search(&tensor.saver).is_err()) {
                return Err(format!("{name} is stored by a rank outside of its group"));
            }
            let dtype = Dtype::parse(&tensor.dtype);
            if dtype.and_then(|dtype| dtype.bytes_of(&tensor.shape)).is_none() {
                return Err(format!("{name} is {} {:?}", tensor.dtype, tensor.shape));
            }
            let of = (tensor.global_shape.as_deref(), tensor.offset.as_deref());
            check_box(name, &tensor.shape, of.0, of.1)?;
            let entry = stored.get(name.as_str());
            let form = (&tensor.dtype, &tensor.shape, &tensor.global_shape, &tensor.offset);
            let fits =
                entry.is_none_or(|e| (&e.dtype, &e.shape, &e.global_shape, &e.offset) == form);
            if entry.is_some() != (tensor.saver == identity.rank) || !fits {
                return Err(format!("{name} is not where the table of replicated tensors says"));
            }
        }
        Ok(())
    }

    /// The tensors that other ranks store.
    pub fn elsewhere(&self, rank: u32) -> impl Iterator<Item = &Replica> {
        self.tensors.iter().filter(move |tensor| tensor.saver != rank)
    }

    fn group(&self, tensor: &Replica) -> &[u32] {
        self.groups.get(tensor.group).map_or(&[], Vec::as_slice)
    }
}

/// What a rank says of its groups in a line of words, for others to compare without reading its
/// manifest: for each group the number of its ranks, a digest of their list, and one of all that the
/// rank holds as they do.
#[must_use]
pub(crate) fn words(replicated: &Replicated) -> String {
    let line = all_words(replicated).unwrap_or_default();
    if (1..WORDS_MAX).contains(&line.len()) { line } else { TOO_MUCH.into() }
}

fn all_words(replicated: &Replicated) -> serde_json::Result<String> {
    let mut words = Vec::new();
    for (index, ranks) in replicated.groups.iter().enumerate() {
        let mut all = sha2::Sha256::new();
        let of_group = replicated.tensors.iter().zip(&replicated.crcs);
        for (tensor, crc) in of_group.filter(|(tensor, _)| tensor.group == index) {
            let form = (&tensor.dtype, &tensor.shape, &tensor.global_shape);
            let line = (&tensor.name, form, tensor.saver, crc);
            all.update(serde_json::to_vec(&line)?);
        }
        let list = sha2::Sha256::digest(serde_json::to_vec(ranks)?);
        let (list, all) = (hex(&list[..8]), hex(&all.finalize()[..16]));
        words.push(format!("{}:{list}:{all}", ranks.len()));
    }
    Ok(words.join(" "))
}

/// True where all ranks of every group say the same. False says nothing: then the manifests tell.
#[must_use]
pub(crate) fn say_the_same<'a>(ranks: impl IntoIterator<Item = &'a str>) -> bool {
    let mut count: BTreeMap<&str, usize> = BTreeMap::new();
    for word in ranks.into_iter().flat_map(str::split_whitespace) {
        *count.entry(word).or_default() += 1;
    }
    count.into_iter().all(|(word, said)| word.split(':').next() == Some(&said.to_string()))
}

/// What one rank says of one tensor.
struct Said<'a> {
    rank: u32,
    tensor: &'a Replica,
    crc: Option<u32>,
}

/// Where the manifests of one checkpoint, all of them, do not agree: a sentence for each tensor, with
/// the ranks.
#[must_use]
pub fn differences<'a>(shards: impl IntoIterator<Item = &'a ShardManifest>) -> Vec<String> {
    let mut all: BTreeMap<(&str, &[u32]), Vec<Said<'_>>> = BTreeMap::new();
    for shard in shards {
        let Some(replicated) = &shard.replicated else { continue };
        for (tensor, crc) in replicated.tensors.iter().zip(&replicated.crcs) {
            let said = Said { rank: shard.identity.rank, tensor, crc: *crc };
            all.entry((&tensor.name, replicated.group(tensor))).or_default().push(said);
        }
    }
    let told = all.into_iter().filter_map(|((name, group), s)| difference(name, group, &s));
    let mut told: Vec<(Kind, String)> = told.collect();
    // One tensor that a rank has not, or in another size, shifts the shares of the others.
    let worst = told.iter().map(|(kind, _)| *kind).min();
    told.retain(|(kind, _)| *kind < Kind::Share || worst == Some(Kind::Share));
    told.sort_by_key(|(kind, _)| *kind);
    told.into_iter().map(|(_, text)| text).collect()
}

/// What differs, the likeliest cause first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Silence,
    Form,
    Bytes,
    Share,
}

fn difference(name: &str, group: &[u32], said: &[Said<'_>]) -> Option<(Kind, String)> {
    let silent: Vec<u32> =
        group.iter().copied().filter(|rank| said.iter().all(|s| s.rank != *rank)).collect();
    if !silent.is_empty() {
        let (all, not) = (in_words(group), in_words(&silent));
        let text = format!("{name} is said to be the same on {all}, but not by {not}");
        return Some((Kind::Silence, text));
    }
    let first = &said[0];
    let form = |s: &Said<'_>| (s.tensor.dtype.clone(), s.tensor.shape.clone());
    if let Some(other) = said.iter().find(|s| form(s) != form(first)) {
        let text = format!(
            "{name} is {} {:?} on rank {} and {} {:?} on rank {}",
            first.tensor.dtype,
            first.tensor.shape,
            first.rank,
            other.tensor.dtype,
            other.tensor.shape,
            other.rank
        );
        return Some((Kind::Form, text));
    }
    // The bytes that most ranks have, of as many the lowest rank's.
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    let known = || said.iter().filter_map(|s| Some((s.rank, s.crc?)));
    known().for_each(|(_, crc)| *counts.entry(crc).or_default() += 1);
    let most = known().rev().max_by_key(|(_, crc)| counts[crc]).map(|(_, crc)| crc);
    let with = |same: bool| -> Vec<u32> {
        known().filter(|(_, crc)| (Some(*crc) == most) == same).map(|(rank, _)| rank).collect()
    };
    let odd = with(false);
    if !odd.is_empty() {
        let (odd, others) = (in_words(&odd), in_words(&with(true)));
        return Some((Kind::Bytes, format!("{name} has other bytes on {odd} than on {others}")));
    }
    // Ranks that share out different lists of tensors; those that differ are told as well.
    let other = said.iter().find(|s| s.tensor.saver != first.tensor.saver)?;
    let text = format!(
        "{name} is left to rank {} by rank {}, and to rank {} by rank {}",
        first.tensor.saver, first.rank, other.tensor.saver, other.rank
    );
    Some((Kind::Share, text))
}

/// Some of them in one line.
#[must_use]
pub(crate) fn differences_in_words(all: &[String]) -> String {
    let shown = all.iter().take(4).cloned().collect::<Vec<_>>().join("; ");
    let more = if all.len() > 4 { format!("; and {} more", all.len() - 4) } else { String::new() };
    format!("replicated tensors differ between the ranks: {shown}{more}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::{AttemptRef, Id};

    fn identity(rank: u32) -> Identity {
        let id = Id([7; 16]);
        let attempt = AttemptRef { number: 1, id };
        Identity { run_id: id, attempt, writer: id, step: 1, rank, savers: vec![0, 1, 2] }
    }

    /// Rank 0 of three: `a` is here, `b` on rank 1.
    fn table() -> Replicated {
        let replica = |name: &str, saver| Replica {
            name: name.into(),
            dtype: "F32".into(),
            shape: vec![2],
            global_shape: None,
            offset: None,
            group: 0,
            saver,
        };
        let tensors = vec![replica("a", 0), replica("b", 1)];
        Replicated { groups: vec![vec![0, 1]], tensors, crcs: vec![Some(1), Some(2)] }
    }

    fn stored(name: &str, shape: u64) -> TensorEntry {
        TensorEntry {
            name: name.into(),
            dtype: "F32".into(),
            shape: vec![shape],
            global_shape: None,
            offset: None,
            at: [0, 8],
        }
    }

    #[test]
    fn a_table_that_contradicts_itself_or_its_payload_is_refused() {
        assert_eq!(table().check(&identity(0), &[stored("a", 2)]), Ok(()));
        let bad = |spoil: &dyn Fn(&mut Replicated)| {
            let mut table = table();
            spoil(&mut table);
            table.check(&identity(0), &[stored("a", 2)]).unwrap_err()
        };
        assert!(bad(&|t| t.groups[0] = vec![1, 0]).contains("no group of rank 0"));
        assert!(bad(&|t| t.groups[0] = vec![0, 9]).contains("no group of rank 0"));
        assert!(bad(&|t| t.groups[0] = vec![1, 2]).contains("no group of rank 0"));
        assert!(bad(&|t| t.groups[0] = vec![0]).contains("no group of rank 0"));
        assert!(bad(&|t| t.crcs.truncate(1)).contains("1 checksums for 2"));
        assert!(bad(&|t| t.tensors.reverse()).contains("order of their names"));
        assert!(bad(&|t| t.tensors[1].name = "a".into()).contains("order of their names"));
        assert!(bad(&|t| t.tensors[1].group = 5).contains("outside of its group"));
        assert!(bad(&|t| t.tensors[1].saver = 2).contains("outside of its group"));
        assert!(bad(&|t| t.tensors[1].dtype = "F99".into()).contains("b is F99"));
        assert!(bad(&|t| t.tensors[1].shape = vec![u64::MAX, 9]).contains("b is F32"));
        // Said to be here and is not, or the other way round, or in another form.
        for (rank, stored) in [(0, vec![]), (1, vec![stored("a", 2)]), (0, vec![stored("a", 4)])] {
            let why = table().check(&identity(rank), &stored).unwrap_err();
            assert!(why.contains("is not where the table"), "{why}");
        }
    }
}
