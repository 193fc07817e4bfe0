//! The command `tierkeep`, as `pip install` gives it: the one of `node-agent/`.

use std::ffi::OsString;

use pyo3::prelude::*;

/// Runs the command with these arguments, the program's name first; returns its exit code.
#[pyfunction]
pub(crate) fn command(py: Python<'_>, arguments: Vec<OsString>) -> i32 {
    py.detach(move || tierkeep_agent::run(arguments))
}
