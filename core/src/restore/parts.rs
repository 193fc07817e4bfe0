//! Reading parts of tensors: where they lie is looked up, in this rank's shard or in all ranks'.

use std::collections::{BTreeMap, HashMap};

use super::{reading::Reading, reshard::Catalog};
use crate::{
    error::{Error, Result},
    manifest::TensorEntry,
    names::Rank,
    snapshot::{
        copy::{Excerpt, Memory},
        strided::{Address, Strided},
    },
    state::{
        boxes::{Region, path_of},
        dtype::Dtype,
    },
};

/// A part of a tensor that is to be filled.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// A tensor of the shard, or of `rank`'s, that was saved whole; or with a `#` behind its path, one of
    /// which the ranks have boxes.
    pub name: String,
    /// The rank that has it, where it is not this one.
    pub rank: Option<Rank>,
    /// Its type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<u64>,
    /// The part of it.
    pub region: Region,
    /// Where the part's first element goes.
    pub start: Address,
    /// From there to the next one in each dimension, in bytes.
    pub strides: Vec<isize>,
}

impl Wanted {
    /// The memory of `part`, which lies in the region.
    fn memory_of(&self, part: &Region) -> Result<Strided> {
        let within = part.from(&self.region);
        let size = |n: &u64| usize::try_from(*n).map_err(|_| Error::Bug("a 32-bit machine".into()));
        let mut start = self.start;
        for (steps, stride) in within.offset.iter().zip(&self.strides) {
            let distance = isize::try_from(*steps).ok().and_then(|n| n.checked_mul(*stride));
            let distance = distance.ok_or_else(|| Error::invalid("strides that overflow"))?;
            start = Address::new(start.get().wrapping_offset(distance));
        }
        let shape: Vec<usize> = within.shape.iter().map(size).collect::<Result<_>>()?;
        let item = self.dtype.bits() as usize / 8;
        Strided::new(start, item, &shape, &self.strides)
    }
}

impl Reading {
    /// Copies parts of tensors into the caller's memory, from whichever ranks' shards have them. Where this
    /// rank's own, and those that it leaves tensors to, do not have all of it, the manifests of all are
    /// read.
    ///
    /// # Errors
    /// [`Error::Mismatch`], and nothing was touched, where a tensor has another type or shape, or a part
    /// of it was saved by nobody. [`Error::Lost`] as for [`fill`](Self::fill).
    ///
    /// # Safety
    /// As [`fill`](Self::fill): all elements of the parts are writable memory, apart from all others.
    pub unsafe fn fill_parts(&mut self, parts: &[Wanted], threads: Option<usize>) -> Result<()> {
        let mut by_rank: BTreeMap<Rank, HashMap<String, Memory>> = BTreeMap::new();
        for part in parts {
            for (rank, entry, region) in self.find(part)? {
                let to = part.memory_of(&region)?;
                let within = region.from(&entry.region());
                let excerpt = Excerpt::new(part.dtype, &entry.shape, &within, to)?;
                let memory = by_rank.entry(rank).or_default();
                let place = memory.entry(entry.name).or_insert(Memory::Excerpts(Vec::new()));
                let Memory::Excerpts(excerpts) = place else { continue };
                excerpts.push(excerpt);
            }
        }
        // SAFETY: the caller's promise: parts are apart, and each element of one comes from one shard.
        unsafe { self.fill_by_rank(by_rank, threads) }
    }

    /// Where a part lies.
    fn find(&mut self, part: &Wanted) -> Result<Vec<(Rank, TensorEntry, Region)>> {
        let refuse = |dtype: &str, shape: &[u64]| {
            let (name, wish) = (&part.name, (part.dtype, &part.shape));
            let line =
                format!("{name}: saved as {dtype} {shape:?}, wanted as {} {:?}", wish.0, wish.1);
            Err(Error::Mismatch(vec![line]))
        };
        let (path, is_cut) = path_of(&part.name);
        if !is_cut {
            let home = self.left.get(path).copied().unwrap_or(self.from.rank);
            let rank = part.rank.unwrap_or(home);
            if rank != self.from.rank && self.shard(rank).is_err() {
                self.learn_all()?;
            }
            let manifest = self.shard(rank)?.from.manifest();
            let entry = manifest.tensors.iter().find(|entry| entry.name == path);
            let entry = entry.ok_or_else(|| {
                Error::Mismatch(vec![format!("{path}: {rank} has no such tensor")])
            })?;
            if entry.dtype != part.dtype.name() || entry.shape != part.shape {
                return refuse(&entry.dtype, &entry.shape);
            }
            return Ok(vec![(rank, entry.clone(), part.region.clone())]);
        }
        let known = self.catalog().find(path, &part.region)?;
        let found = match known {
            Some(found) => found,
            None => {
                self.learn_all()?;
                let all = self.catalog().find(path, &part.region)?;
                all.ok_or_else(|| Error::Bug(format!("{path}: ranks that stay unknown")))?
            }
        };
        if let Some((_, entry, _)) = found.first()
            && (entry.dtype != part.dtype.name() || entry.global() != part.shape)
        {
            return refuse(&entry.dtype, entry.global());
        }
        Ok(found)
    }

    fn catalog(&mut self) -> &mut Catalog {
        let (own, others) = (&self.from.copies[0].manifest, &self.others);
        self.catalog.get_or_insert_with(|| {
            let mut catalog = Catalog::new(own);
            others.iter().for_each(|other| catalog.add(&other.from.copies[0].manifest));
            catalog
        })
    }

    /// Reads the manifests of all ranks.
    fn learn_all(&mut self) -> Result<()> {
        let unknown = self.catalog().unknown();
        for found in self.from.find_rest(&unknown)? {
            self.catalog().add(&found.copies[0].manifest);
            self.others.push(Self::of(found));
        }
        Ok(())
    }
}
