//! Which bytes of which rank's shard make a part of a tensor that this rank wants: pure.
//!
//! A tensor that was cut lies in boxes, in the shards of several ranks; a rank wants some box of it, which
//! need be none of these: another mesh, another number of ranks, or the whole.
//!
//! # Invariants
//!
//! - Every element that is wanted is read once, or the plan is an error that names what nobody saved.
//! - Nothing else is read, but what shares a chunk with it.
//! - A rank takes all of it from its own shard, and from those that it leaves tensors to, or as all others do
//!   from the lowest ranks that have it: of what several have and none says so, all take the same one's.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, OnceLock},
};

use crate::{
    error::{Error, Result},
    manifest::{ShardManifest, TensorEntry},
    names::Rank,
    state::{
        boxes::{Region, path_of},
        path::join,
        value::Value,
    },
};

/// What makes up `wanted`: for each part the index of the box that has it, in the order of preference of
/// `saved`. The error is what none of them has.
pub fn cover(wanted: &Region, saved: &[Region]) -> Result<Vec<(usize, Region)>, Vec<Region>> {
    let mut parts = Vec::new();
    let mut left = if wanted.is_empty() { Vec::new() } else { vec![wanted.clone()] };
    for (index, saved) in saved.iter().enumerate() {
        if left.is_empty() {
            break;
        }
        let mut next = Vec::new();
        for region in left {
            match region.common(saved) {
                None => next.push(region),
                Some(common) => {
                    next.extend(region.without(&common));
                    parts.push((index, common));
                }
            }
        }
        left = next;
    }
    if left.is_empty() { Ok(parts) } else { Err(left) }
}

/// The boxes that manifests speak of.
#[derive(Default)]
pub struct Catalog {
    /// Whose part is wanted: its own shard comes first.
    own: Rank,
    shards: BTreeMap<Rank, Shard>,
}

struct Shard {
    manifest: Arc<ShardManifest>,
    /// By the path of the tensor that they are cut from.
    boxes: HashMap<String, Vec<usize>>,
    /// Places of the tree, and the path of the tensor there, where that is another one's (tied weights).
    ties: OnceLock<HashMap<String, String>>,
}

impl Shard {
    fn new(manifest: Arc<ShardManifest>) -> Self {
        let mut boxes: HashMap<String, Vec<usize>> = HashMap::new();
        for (index, entry) in manifest.tensors.iter().enumerate() {
            if let (path, true) = path_of(&entry.name) {
                boxes.entry(path.into()).or_default().push(index);
            }
        }
        Self { manifest, boxes, ties: OnceLock::new() }
    }

    fn boxes(&self, path: &str) -> impl Iterator<Item = &TensorEntry> {
        let found = self.boxes.get(path).or_else(|| self.boxes.get(self.ties().get(path)?));
        found.into_iter().flatten().map(|index| &self.manifest.tensors[*index])
    }

    /// A rank with no element of a tensor does not see that it is tied to another; the others do.
    fn ties(&self) -> &HashMap<String, String> {
        self.ties.get_or_init(|| {
            // A tree that cannot be read is told by whoever restores it.
            let Ok(tree) = Value::decode(&self.manifest.tree) else { return HashMap::new() };
            let places = tree.tensors().unwrap_or_default().into_iter();
            let cut = places.filter(|(_, tensor)| tensor.whole.is_some());
            let named = cut.map(|(keys, tensor)| (join(&keys), path_of(&tensor.name).0.to_owned()));
            named.filter(|(place, path)| place != path).collect()
        })
    }
}

impl Catalog {
    /// For the rank with this shard.
    #[must_use]
    pub fn new(own: &Arc<ShardManifest>) -> Self {
        let rank = Rank(own.identity.rank);
        let mut catalog = Self { own: rank, shards: BTreeMap::new() };
        catalog.add(own);
        catalog
    }

    /// Takes another rank's shard in.
    pub fn add(&mut self, manifest: &Arc<ShardManifest>) {
        let rank = Rank(manifest.identity.rank);
        self.shards.entry(rank).or_insert_with(|| Shard::new(manifest.clone()));
    }

    /// The ranks that it does not know yet.
    #[must_use]
    pub fn unknown(&self) -> Vec<Rank> {
        let savers = self.shards.get(&self.own).map(|own| &own.manifest.identity.savers);
        let all = savers.into_iter().flatten().map(|rank| Rank(*rank));
        all.filter(|rank| !self.shards.contains_key(rank)).collect()
    }

    /// The boxes of the tensor at `path`: once all shards are known in the order of their ranks; before
    /// that, this rank's own first.
    #[must_use]
    pub fn boxes(&self, path: &str) -> Vec<(Rank, &TensorEntry)> {
        let of = |rank: &Rank| (*rank != self.own && !self.is_whole(), *rank);
        let mut ranks: Vec<&Rank> = self.shards.keys().collect();
        ranks.sort_by_key(|rank| of(rank));
        let boxes = |rank: &&Rank| {
            let rank = **rank;
            self.shards[&rank].boxes(path).map(move |entry| (rank, entry)).collect::<Vec<_>>()
        };
        ranks.iter().flat_map(boxes).collect()
    }

    fn is_whole(&self) -> bool {
        self.unknown().is_empty()
    }

    /// This rank's own boxes, where they are all of `wanted`.
    fn own(&self, path: &str, wanted: &Region) -> Option<Vec<(Rank, TensorEntry, Region)>> {
        let boxes: Vec<&TensorEntry> = self.shards.get(&self.own)?.boxes(path).collect();
        let regions: Vec<Region> = boxes.iter().map(|entry| entry.region()).collect();
        let parts = cover(wanted, &regions).ok()?.into_iter();
        Some(parts.map(|(i, region)| (self.own, boxes[i].clone(), region)).collect())
    }

    /// Of `wanted`, a part of the tensor at `path`, what lies in which entry of which rank; `None`: not all
    /// of it does in the shards that are known.
    ///
    /// # Errors
    /// Ranks saved it with different types or shapes; or all are known, and nobody saved all of it.
    pub fn find(
        &self,
        path: &str,
        wanted: &Region,
    ) -> Result<Option<Vec<(Rank, TensorEntry, Region)>>> {
        if let Some(own) = self.own(path, wanted).filter(|_| !wanted.is_empty()) {
            return Ok(Some(own));
        }
        let boxes = self.boxes(path);
        if let Some((first, rest)) = boxes.split_first() {
            let form = |entry: &TensorEntry| (entry.dtype.clone(), entry.global().to_vec());
            let (ours, shape) = form(first.1);
            if let Some((rank, other)) = rest.iter().find(|(_, e)| form(e) != form(first.1)) {
                return Err(Error::Mismatch(vec![format!(
                    "{path} is {ours} {shape:?} on {} and {} {:?} on {rank}",
                    first.0,
                    other.dtype,
                    other.global()
                )]));
            }
        }
        let regions: Vec<Region> = boxes.iter().map(|(_, entry)| entry.region()).collect();
        match cover(wanted, &regions) {
            Ok(parts) => {
                let part = |(index, region): (usize, Region)| {
                    let (rank, entry) = boxes[index];
                    (rank, entry.clone(), region)
                };
                Ok(Some(parts.into_iter().map(part).collect()))
            }
            Err(_) if !self.unknown().is_empty() => Ok(None),
            Err(left) => {
                let shown: Vec<String> = left.iter().take(4).map(ToString::to_string).collect();
                let more = if left.len() > 4 { ", ..." } else { "" };
                Err(Error::Mismatch(vec![format!(
                    "{path}: no rank saved {}{more} of it",
                    shown.join(", ")
                )]))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn region(rows: &[(u64, u64)]) -> Region {
        let (offset, shape) = rows.iter().copied().unzip();
        Region { offset, shape }
    }

    /// A tensor of this shape, cut in every dimension at these places.
    fn mesh(shape: &[u64], cuts: &[Vec<u64>]) -> Vec<Region> {
        let mut all = vec![region(&[])];
        for (size, cuts) in shape.iter().zip(cuts) {
            let mut ends: Vec<u64> = cuts.iter().map(|cut| cut % (size + 1)).collect();
            ends.extend([0, *size]);
            ends.sort_unstable();
            let cut = |outer: &Region| {
                let outer = outer.clone();
                let slabs = ends.windows(2).map(|w| (w[0], w[1] - w[0])).collect::<Vec<_>>();
                slabs.into_iter().map(move |(offset, size)| {
                    let mut inner = outer.clone();
                    inner.offset.push(offset);
                    inner.shape.push(size);
                    inner
                })
            };
            all = all.iter().flat_map(cut).collect();
        }
        all
    }

    fn count(region: &Region) -> u64 {
        region.shape.iter().product()
    }

    fn tensors() -> impl Strategy<Value = (Vec<u64>, Vec<Vec<u64>>, Vec<Vec<u64>>)> {
        let cuts = || prop::collection::vec(prop::collection::vec(0_u64..8, 0..4), 3);
        (prop::collection::vec(1_u64..7, 0..4), cuts(), cuts())
    }

    proptest! {
        /// Any mesh onto any other, with empty boxes, and with boxes that several ranks have.
        #[test]
        fn every_element_that_is_wanted_comes_once(
            (shape, from, to) in tensors(), twice in any::<bool>(), turn in 0_usize..9,
        ) {
            let mut saved = mesh(&shape, &from);
            if twice {
                saved.extend(saved.clone());
            }
            let turn = turn % saved.len();
            saved.rotate_left(turn);
            for wanted in mesh(&shape, &to) {
                let parts = cover(&wanted, &saved).unwrap();
                prop_assert_eq!(parts.iter().map(|(_, r)| count(r)).sum::<u64>(), count(&wanted));
                for (i, (index, part)) in parts.iter().enumerate() {
                    prop_assert_eq!(&wanted.common(part).unwrap(), part);
                    prop_assert_eq!(&saved[*index].common(part).unwrap(), part);
                    prop_assert!(parts[i + 1..].iter().all(|(_, p)| p.common(part).is_none()));
                }
            }
        }

        #[test]
        fn what_nobody_saved_is_named((shape, from, _) in tensors(), gone in 0_usize..64) {
            let mut saved = mesh(&shape, &from);
            let gone = saved.remove(gone % saved.len());
            let whole = Region::whole(&shape);
            match cover(&whole, &saved) {
                Ok(_) => prop_assert!(gone.is_empty()),
                Err(left) => prop_assert_eq!(left, vec![gone]),
            }
        }
    }

    #[test]
    fn the_first_that_has_it_is_taken() {
        let whole = region(&[(0, 8)]);
        let saved = [region(&[(4, 4)]), region(&[(0, 8)]), region(&[(0, 4)])];
        let parts = cover(&whole, &saved).unwrap();
        assert_eq!(parts, [(0, region(&[(4, 4)])), (1, region(&[(0, 4)]))]);
        // No dimensions: one element, which all have.
        assert_eq!(cover(&region(&[]), &[region(&[])]), Ok(vec![(0, region(&[]))]));
        assert_eq!(cover(&region(&[(0, 0)]), &[]), Ok(vec![]));
    }
}
