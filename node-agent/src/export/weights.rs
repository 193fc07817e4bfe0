//! A plain `.safetensors` file.
//!
//! Tied tensors are in it once for each name: the format has no other way, and so
//! `load_state_dict(load_file(path))` finds all it asks for.

use std::sync::Arc;

use tierkeep::{restore::read::Restorable, snapshot::layout::Layout, state::TensorSpec};

use super::{Place, assemble::assemble, plan::Output};
use crate::fail::{Failure, say};

pub(super) fn write(
    sources: &[Restorable],
    outputs: &[Output],
    place: &Place<'_>,
) -> Result<(), Failure> {
    let spec = |o: &Output| {
        let name = o.name.as_str().into();
        Arc::new(TensorSpec {
            name,
            dtype: o.dtype,
            shape: o.shape.clone(),
            part_of: None,
            held_by: Vec::new(),
        })
    };
    for o in outputs.iter().filter(|o| o.dtype.stored().0 != o.dtype) {
        let stored = o.dtype.stored().0;
        say(&format!(
            "note: safetensors has no {}: {} is {stored} there, with a last dimension of 2",
            o.dtype, o.name
        ));
    }
    let layout = Layout::new(outputs.iter().map(spec).collect())?;
    place.write(&layout.header, 0)?;
    place.set_len(layout.len)?;
    let tensors: Vec<(&Output, u64)> =
        layout.order.iter().map(|(index, at, _)| (&outputs[*index], *at)).collect();
    assemble(sources, &tensors, place)
}
