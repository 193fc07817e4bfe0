//! The table of a shard's tensors: where each lies in the payload, and what of a larger one it is.

use serde::{Deserialize, Serialize};

use super::PayloadInfo;
use crate::state::{
    boxes::{Region, box_name, path_of},
    dtype::Dtype,
};

/// The feature that a reader must know: tensors that lie in boxes, with several ranks.
pub(crate) const BOXES: &str = "boxes";

/// One box of one tensor, and where it lies in the payload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// The escaped path; of a box, `boxes::box_name`.
    pub name: String,
    /// Element type, by its safetensors name (or `C32`, `C128`).
    pub dtype: String,
    /// Shape of the box, in elements.
    pub shape: Vec<u64>,
    /// Shape of the global tensor where the box is a part of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub global_shape: Option<Vec<u64>>,
    /// Where the box begins in the global tensor, in elements.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<Vec<u64>>,
    /// First byte in the payload and the one after the last, counted from byte 0 of the file.
    pub at: [u64; 2],
}

impl TensorEntry {
    pub(super) fn check(&self, payload: &PayloadInfo) -> Result<(), String> {
        let [begin, end] = self.at;
        let dtype = Dtype::parse(&self.dtype)
            .ok_or_else(|| format!("{}: unknown dtype {:?}", self.name, self.dtype))?;
        if begin > end || end > payload.length {
            return Err(format!("{}: bytes {begin}..{end} of {}", self.name, payload.length));
        }
        if dtype.bytes_of(&self.shape) != Some(end - begin) {
            return Err(format!(
                "{}: {dtype} {:?} in {} bytes",
                self.name,
                self.shape,
                end - begin
            ));
        }
        check_box(&self.name, &self.shape, self.global_shape.as_deref(), self.offset.as_deref())
    }

    /// What of the global tensor it is.
    #[must_use]
    pub fn region(&self) -> Region {
        let offset = self.offset.clone().unwrap_or_else(|| vec![0; self.shape.len()]);
        Region { offset, shape: self.shape.clone() }
    }

    /// The shape of the global tensor.
    #[must_use]
    pub fn global(&self) -> &[u64] {
        self.global_shape.as_deref().unwrap_or(&self.shape)
    }
}

/// A box lies in its tensor, and has the name of its place.
pub(super) fn check_box(
    name: &str,
    shape: &[u64],
    global: Option<&[u64]>,
    offset: Option<&[u64]>,
) -> Result<(), String> {
    let (path, is_box) = path_of(name);
    let (global, offset) = match (global, offset) {
        (None, None) if !is_box => return Ok(()),
        (Some(global), Some(offset)) if is_box => (global, offset),
        _ => return Err(format!("{name}: half a box")),
    };
    let region = Region { offset: offset.into(), shape: shape.into() };
    if name != box_name(path, offset) || !region.is_inside(global) {
        return Err(format!("{name}: the box {offset:?}+{shape:?} of {global:?}"));
    }
    Ok(())
}
