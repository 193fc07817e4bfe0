//! Which tensors a guarded optimizer owns: nobody but it writes to them, and it waits for the copy.

use std::collections::HashSet;

use pyo3::{
    intern,
    prelude::*,
    types::{PyDict, PyList},
};

use crate::{
    address::ByAddress,
    tree::is_sharded,
    types::{Torch, types},
};

/// The parameters and the state of guarded optimizers, by the identity of the tensor object. Another
/// object over the same memory is none of them: it is copied before `save` returns, which is never
/// wrong.
#[derive(Default)]
pub(crate) struct Owned {
    tensors: HashSet<usize, ByAddress>,
}

impl Owned {
    /// What these optimizers own now. Their state grows with the first step.
    pub(crate) fn of(optimizers: &Bound<'_, PyList>) -> PyResult<Self> {
        let py = optimizers.py();
        let mut owned = Self::default();
        let Some(torch) = types(py)?.torch(py)? else { return Ok(owned) };
        for optimizer in optimizers {
            for group in optimizer.getattr(intern!(py, "param_groups"))?.try_iter()? {
                for param in group?.get_item(intern!(py, "params"))?.try_iter()? {
                    owned.add(&param?, torch);
                }
            }
            let state = optimizer.getattr(intern!(py, "state"))?;
            for of_param in state.call_method0(intern!(py, "values"))?.try_iter()? {
                // A shallow look: what lies deeper is copied before `save` returns.
                if let Ok(of_param) = of_param?.cast_into::<PyDict>() {
                    // Nothing of Python's runs in between that could change the dict.
                    for (_, value) in of_param {
                        owned.add(&value, torch);
                    }
                }
            }
        }
        Ok(owned)
    }

    fn add(&mut self, object: &Bound<'_, PyAny>, torch: &Torch) {
        let ty = object.get_type_ptr().cast();
        let is_plain = ty == torch.parameter.as_ptr() || ty == torch.tensor.as_ptr();
        if is_plain || is_sharded(object).unwrap_or(false) {
            self.tensors.insert(object.as_ptr() as usize);
        }
    }

    /// True where `tensor` is one of them.
    pub(crate) fn contains(&self, tensor: &Bound<'_, PyAny>) -> bool {
        self.tensors.contains(&(tensor.as_ptr() as usize))
    }
}
