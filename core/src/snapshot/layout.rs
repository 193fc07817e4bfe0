//! Where each tensor lies in the payload, and the safetensors header that says so to everybody
//! else.
//!
//! Tensors lie by falling alignment, then by name, without holes: the order that the safetensors
//! format wants, and one in which every tensor is aligned to its element. A layout depends on
//! names, types and shapes alone, so it is made once and kept while the state keeps its form.
//!
//! # Invariants
//!
//! - The payload is a valid safetensors file.
//! - The same specs give the same bytes of header, in any order of the specs.
//! - Of a tensor that several ranks hold alike, one rank's payload has the bytes.

use std::{collections::HashMap, sync::Arc};

use crate::{
    error::{Error, Result},
    manifest::{
        TensorEntry,
        replicated::{Replica, Replicated},
    },
    state::{
        Memory, Tensor, TensorSpec,
        replicas::{Rule, Share, share, unused},
    },
};

/// Bytes of a header that the safetensors library reads (its MAX_HEADER_SIZE).
const HEADER_BYTES_MAX: usize = 100_000_000;
/// Data begins at a multiple of this, so that the first (and widest) tensors are aligned for SIMD.
const DATA_ALIGN: usize = 64;

/// The form of a payload.
#[derive(Debug)]
pub struct Layout {
    /// Length field, JSON and padding: everything before the first tensor.
    pub header: Vec<u8>,
    /// Exact length of the payload in bytes.
    pub len: u64,
    /// (index into the specs it was made from, first byte in the payload, bytes), in order.
    pub order: Vec<(usize, u64, u64)>,
    /// The JSON array for the manifest.
    pub tensors_json: Vec<u8>,
    /// What other ranks hold alike, without the checksums.
    pub replicated: Option<Replicated>,
    /// Of each spec its place in `replicated`.
    pub tags: Vec<Option<usize>>,
    /// (index into the specs, bytes) of the tensors that other ranks store.
    pub elsewhere: Vec<(usize, u64)>,
    /// Patterns of tensors that ranks hold alike, and that no tensor matches.
    pub unused: Vec<String>,
    /// Some are boxes of larger ones.
    pub has_boxes: bool,
    specs: Vec<Arc<TensorSpec>>,
}

impl Layout {
    /// Lays all the tensors out.
    ///
    /// # Errors
    /// Two tensors have one name, or sizes overflow.
    pub fn new(specs: Vec<Arc<TensorSpec>>) -> Result<Self> {
        Self::of_rank(specs, &[], 0)
    }

    /// Lays out the tensors that `rank` stores: its own, and its share of those that `rules` say other
    /// ranks hold alike.
    ///
    /// # Errors
    /// Two tensors have one name, or sizes overflow.
    pub fn of_rank(specs: Vec<Arc<TensorSpec>>, rules: &[Rule], rank: u32) -> Result<Self> {
        let mut seen = HashMap::with_capacity(specs.len());
        let mut sizes = Vec::with_capacity(specs.len());
        for (index, spec) in specs.iter().enumerate() {
            if let Some(first) = seen.insert(&*spec.name, index) {
                return Err(Error::invalid(format!(
                    "two tensors have the path {} (places {first} and {index} of the state)",
                    spec.name
                )));
            }
            sizes.push(spec.bytes()?);
        }
        let shares = share(rules, &specs, rank)?;
        let is_elsewhere = |i: &usize| shares[*i].is_some_and(|share| share.saver != rank);
        let (elsewhere, mut order): (Vec<usize>, Vec<usize>) =
            (0..specs.len()).partition(is_elsewhere);
        let (replicated, tags) = replicated(&specs, &shares);
        // A complex number is aligned as its parts: sorting by the stored type keeps F64 and C128
        // together.
        order.sort_by(|a, b| {
            let wide = |i: &usize| std::cmp::Reverse(specs[*i].dtype.stored().0.bits());
            wide(a).cmp(&wide(b)).then_with(|| specs[*a].name.cmp(&specs[*b].name))
        });
        let header = header(&specs, &order, &sizes)?;
        let mut at = header.len() as u64;
        let mut entries = Vec::with_capacity(specs.len());
        let mut placed = Vec::with_capacity(specs.len());
        for index in order {
            let end = at.checked_add(sizes[index]).filter(|end| *end < i64::MAX as u64);
            let end = end.ok_or_else(|| Error::invalid("the state has more than 2^63 bytes"))?;
            entries.push(entry(&specs[index], at, end));
            placed.push((index, at, sizes[index]));
            at = end;
        }
        let tensors_json =
            serde_json::to_vec(&entries).map_err(|e| Error::Bug(format!("tensor table: {e}")))?;
        let elsewhere = elsewhere.into_iter().map(|index| (index, sizes[index])).collect();
        let len = at;
        let unused = unused(rules, &specs, rank);
        let has_boxes = specs.iter().any(|spec| spec.part_of.is_some());
        Ok(Self {
            header,
            len,
            order: placed,
            tensors_json,
            replicated,
            tags,
            elsewhere,
            unused,
            has_boxes,
            specs,
        })
    }

    /// # Errors
    /// A tensor that the user says other ranks hold alike lies on a device, where it is not compared.
    pub(crate) fn check_memory(&self, tensors: &[Tensor]) -> Result<()> {
        let shared = tensors.iter().zip(&self.tags).filter(|(_, tag)| tag.is_some());
        let shared = shared.filter(|(tensor, _)| tensor.spec.held_by.is_empty());
        let mut on_device = shared.filter(|(t, _)| matches!(t.memory, Memory::InSlot));
        match on_device.next() {
            None => Ok(()),
            Some((tensor, _)) => Err(Error::invalid(format!(
                "{} lies on a device: only tensors in memory of the host can be declared replicated",
                tensor.spec.name
            ))),
        }
    }

    /// True where a state with these specs, in this order, has this layout.
    pub fn fits<'a>(&self, specs: impl ExactSizeIterator<Item = &'a Arc<TensorSpec>>) -> bool {
        let same = |(a, b): (&Arc<TensorSpec>, &Arc<TensorSpec>)| Arc::ptr_eq(a, b) || a == b;
        specs.len() == self.specs.len() && specs.zip(&self.specs).all(same)
    }
}

/// The table of shared tensors, if there are any, and each spec's place in it.
fn replicated(
    specs: &[Arc<TensorSpec>],
    shares: &[Option<Share<'_>>],
) -> (Option<Replicated>, Vec<Option<usize>>) {
    let mut shared: Vec<(usize, Share<'_>)> =
        shares.iter().enumerate().filter_map(|(i, share)| Some((i, (*share)?))).collect();
    shared.sort_by(|(a, _), (b, _)| specs[*a].name.cmp(&specs[*b].name));
    let mut tags = vec![None; specs.len()];
    let mut groups: Vec<Vec<u32>> = shared.iter().map(|(_, share)| share.ranks.into()).collect();
    groups.sort_unstable();
    groups.dedup();
    let mut tensors = Vec::with_capacity(shared.len());
    for (tag, (index, share)) in shared.into_iter().enumerate() {
        tags[index] = Some(tag);
        let spec = &specs[index];
        let (global_shape, offset) = spec.part_of.clone().unzip();
        tensors.push(Replica {
            name: spec.name.to_string(),
            dtype: spec.dtype.name().into(),
            shape: spec.shape.clone(),
            global_shape,
            offset,
            group: groups.partition_point(|ranks| ranks.as_slice() < share.ranks),
            saver: share.saver,
        });
    }
    let table = Replicated { groups, tensors, crcs: Vec::new() };
    ((!table.tensors.is_empty()).then_some(table), tags)
}

fn entry(spec: &TensorSpec, begin: u64, end: u64) -> TensorEntry {
    let (global_shape, offset) = spec.part_of.clone().unzip();
    TensorEntry {
        name: spec.name.to_string(),
        dtype: spec.dtype.name().into(),
        shape: spec.shape.clone(),
        global_shape,
        offset,
        at: [begin, end],
    }
}

#[derive(serde::Serialize)]
struct HeaderEntry<'a> {
    dtype: &'static str,
    shape: &'a [u64],
    data_offsets: [u64; 2],
}

fn header(specs: &[Arc<TensorSpec>], order: &[usize], sizes: &[u64]) -> Result<Vec<u8>> {
    let bug = |e: serde_json::Error| Error::Bug(format!("safetensors header: {e}"));
    // Readers of the Hugging Face libraries ask for "format".
    let mut json = br#"{"__metadata__":{"format":"pt","tierkeep":"1"}"#.to_vec();
    let mut at = 0_u64;
    for &index in order {
        let spec = &specs[index];
        let (dtype, extra) = spec.dtype.stored();
        let shape: Vec<u64> = spec.shape.iter().copied().chain(extra).collect();
        let end = at.checked_add(sizes[index]);
        let end = end.ok_or_else(|| Error::invalid("the state has more than 2^64 bytes"))?;
        json.push(b',');
        serde_json::to_writer(&mut json, &*spec.name).map_err(bug)?;
        json.push(b':');
        let line = HeaderEntry { dtype: dtype.name(), shape: &shape, data_offsets: [at, end] };
        serde_json::to_writer(&mut json, &line).map_err(bug)?;
        at = end;
    }
    json.push(b'}');
    // Spaces after the JSON are part of the format.
    json.resize((json.len() + 8).next_multiple_of(DATA_ALIGN) - 8, b' ');
    if json.len() > HEADER_BYTES_MAX {
        return Err(Error::invalid(format!(
            "{} tensors make a safetensors header of {} bytes, readers accept {HEADER_BYTES_MAX}: \
             put small values together",
            specs.len(),
            json.len()
        )));
    }
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::dtype::Dtype;

    fn spec(name: &str, dtype: Dtype, shape: &[u64]) -> Arc<TensorSpec> {
        Arc::new(TensorSpec {
            name: name.into(),
            dtype,
            shape: shape.into(),
            part_of: None,
            held_by: Vec::new(),
        })
    }

    #[test]
    fn the_payload_is_a_valid_safetensors_file() {
        let mut specs: Vec<_> = Dtype::all()
            .map(|d| spec(&format!("a/{d}"), d, &[3, 8]))
            .chain([spec("0-d", Dtype::F32, &[]), spec("none", Dtype::I64, &[0, 4])])
            .collect();
        let layout = Layout::new(specs.clone()).unwrap();
        let mut file = layout.header.clone();
        file.resize(usize::try_from(layout.len).unwrap(), 7);
        let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
        assert_eq!(tensors.len(), specs.len());
        assert_eq!(tensors.tensor("a/C128").unwrap().shape(), [3, 8, 2]);
        assert_eq!(tensors.tensor("none").unwrap().data().len(), 0);
        for (index, at, _) in &layout.order {
            let align = u64::from(specs[*index].dtype.stored().0.bits() / 8).max(1);
            assert!(at.is_multiple_of(align), "{} at {at}", specs[*index].name);
        }
        specs.reverse();
        assert_eq!(Layout::new(specs).unwrap().header, layout.header);
    }

    #[test]
    fn two_tensors_with_one_path_are_refused() {
        let twice = vec![spec("x", Dtype::F32, &[1]), spec("x", Dtype::F32, &[1])];
        assert!(Layout::new(twice).is_err());
    }
}
