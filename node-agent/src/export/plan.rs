//! Which bytes of which rank make which tensor.

use std::collections::{BTreeMap, btree_map::Entry};

use tierkeep::{
    glob,
    manifest::TensorEntry,
    restore::read::Restorable,
    state::{
        boxes::{Region, Runs, path_of},
        dtype::Dtype,
        path::join,
        value::Value,
    },
};

use super::{conflict, names::name_in_file};
use crate::fail::{FAILED, Failure};

/// Which tensors.
pub(super) struct Wanted<'a> {
    pub(super) include: &'a [String],
    pub(super) prefix: Option<&'a str>,
    /// This rank's alone, whose shard is the first source; the others store tensors of it.
    pub(super) rank: Option<u32>,
}

/// One tensor of the file.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<u64>,
    pub(super) bytes: u64,
    pub(super) pieces: Vec<Piece>,
    /// The path of the tensor whose bytes they are: the same for tied ones.
    pub(super) path: String,
}

/// Bytes of one rank's payload that belong to it.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    /// Index of the source.
    pub(super) source: usize,
    /// First byte in the payload and the one after the last.
    pub(super) at: [u64; 2],
    /// Their place in the tensor.
    pub(super) runs: Runs,
    /// The source that these bytes were taken from already: they are compared.
    pub(super) same_as: Option<usize>,
}

/// Plans all tensors, in the order of their names.
pub(super) fn plan(sources: &[Restorable], wanted: &Wanted<'_>) -> Result<Vec<Output>, Failure> {
    let mut boxes: BTreeMap<&str, Vec<(usize, &TensorEntry)>> = BTreeMap::new();
    for (index, source) in sources.iter().enumerate() {
        let own = wanted.rank.filter(|rank| *rank != source.rank.0).map(|_| &sources[0]);
        let left = own.map(|own| own.left_to(source.rank));
        let ours = |e: &&TensorEntry| left.as_ref().is_none_or(|l| l.contains(e.name.as_str()));
        for entry in source.manifest().tensors.iter().filter(ours) {
            boxes.entry(path_of(&entry.name).0).or_default().push((index, entry));
        }
    }
    let mut outputs: BTreeMap<String, Output> = BTreeMap::new();
    let trees = if wanted.rank.is_some() { &sources[..1] } else { sources };
    for (name, path) in names(trees, boxes.keys())? {
        let included = wanted.include.is_empty()
            || wanted.include.iter().any(|pattern| glob::matches(pattern, &name));
        let Some(in_file) = name_in_file(&name, wanted.prefix).filter(|_| included) else {
            continue;
        };
        let Some(parts) = boxes.get(path.as_str()) else {
            return Err(damaged(format!("{name} names a tensor that is not there, {path}")));
        };
        let output = output(sources, in_file.clone(), &path, parts)?;
        if let Some(other) = outputs.insert(in_file.clone(), output) {
            let paths = format!("{} and {path}", other.path);
            return Err(conflict(format!("{paths} would both be named {in_file:?}")));
        }
    }
    Ok(outputs.into_values().collect())
}

/// Every name of a tensor, and the path that it is stored under: the same, but for tied tensors,
/// which are stored once.
fn names<'a>(
    sources: &[Restorable],
    stored: impl Iterator<Item = &'a &'a str>,
) -> Result<BTreeMap<String, String>, Failure> {
    let mut names: BTreeMap<String, String> =
        stored.map(|path| ((*path).to_owned(), (*path).to_owned())).collect();
    for source in sources {
        let tree = Value::decode(&source.manifest().tree)
            .map_err(|e| damaged(format!("the tree of {} cannot be read: {e}", source.rank)))?;
        let tensors =
            tree.tensors().map_err(|e| damaged(format!("the tree of {}: {e}", source.rank)))?;
        for (keys, tensor) in tensors {
            let (name, path) = (join(&keys), path_of(&tensor.name).0);
            match names.entry(name) {
                Entry::Vacant(free) => drop(free.insert(path.to_owned())),
                Entry::Occupied(taken) if taken.get() == path => {}
                Entry::Occupied(taken) => {
                    let why = format!(
                        "{} is tied to {path} on {}, and is {} on another",
                        taken.key(),
                        source.rank,
                        taken.get()
                    );
                    return Err(conflict(why));
                }
            }
        }
    }
    Ok(names)
}

fn damaged(why: String) -> Failure {
    Failure::own(crate::fail::DAMAGE, why, "`tierkeep verify` reads every copy")
}

/// One tensor from its parts, which must cover it.
fn output(
    sources: &[Restorable],
    name: String,
    path: &str,
    parts: &[(usize, &TensorEntry)],
) -> Result<Output, Failure> {
    let (first_source, first) = parts[0];
    let shape = first.global().to_vec();
    if let Some((source, other)) =
        parts.iter().find(|(_, e)| e.dtype != first.dtype || e.global() != shape)
    {
        return Err(conflict(format!(
            "{path} is {} {shape:?} on {} and {} {:?} on {}",
            first.dtype,
            sources[first_source].rank,
            other.dtype,
            other.global(),
            sources[*source].rank
        )));
    }
    let dtype = Dtype::parse(&first.dtype);
    let sized = dtype.and_then(|dtype| Some((dtype, dtype.bytes_of(&shape)?)));
    let Some((dtype, bytes)) = sized else {
        return Err(damaged(format!("{path} is {} {shape:?}", first.dtype)));
    };
    let mut output = Output { name, dtype, shape, bytes, pieces: vec![], path: path.into() };
    let mut seen: BTreeMap<Region, usize> = BTreeMap::new();
    for (source, entry) in parts.iter().filter(|(_, e)| e.at[0] < e.at[1]) {
        let region = entry.region();
        let runs = Runs::new(dtype.bits(), &output.shape, &region).ok_or_else(|| {
            let why = format!("{path}: the box {region} does not begin and end with a byte");
            Failure::own(FAILED, why, "leave it out with --include")
        })?;
        let same_as = seen.get(&region).copied();
        seen.entry(region).or_insert(*source);
        output.pieces.push(Piece { source: *source, at: entry.at, runs, same_as });
    }
    let covered = output.pieces.iter().filter(|p| p.same_as.is_none());
    let covered = covered.fold(0_u64, |sum, p| sum.saturating_add(p.at[1] - p.at[0]));
    let boxes: Vec<&Region> = seen.keys().collect();
    if any_overlap(&boxes) {
        return Err(conflict(format!("{path} has boxes that overlap without being the same")));
    }
    if covered != bytes {
        let ranks =
            if sources.len() == 1 { format!("{}", sources[0].rank) } else { "all ranks".into() };
        return Err(Failure::own(
            FAILED,
            format!("{path} is not whole: {ranks} together hold {covered} of its {bytes} bytes"),
            "export without --rank, or leave it out with --include",
        ));
    }
    Ok(output)
}

/// Boxes rise by their first offset: only those that reach the next one's are compared.
fn any_overlap(boxes: &[&Region]) -> bool {
    (0..boxes.len()).any(|i| {
        let Region { offset, shape } = boxes[i];
        let end = offset.first().map_or(u64::MAX, |o| o.saturating_add(shape[0]));
        let near = boxes[i + 1..].iter().take_while(|b| b.offset.first().is_none_or(|o| *o < end));
        near.into_iter().any(|near| boxes[i].common(near).is_some())
    })
}
