//! `tierkeep._tierkeep`: the list of what Python gets from the core, and nothing else. What people
//! import is the package `tierkeep` around it.

mod errors;
mod wait;
mod address;
mod glance;
mod types;
mod tree;
mod untree;
mod guard;
mod device;
mod save;
mod events;
mod handle;
mod found;
mod reader;
mod command;

use pyo3::prelude::*;

#[pymodule]
mod _tierkeep {
    #[pymodule_export]
    use super::{
        command::command,
        events::Events,
        found::Found,
        handle::Handle,
        reader::Reader,
        save::{Progress, Save},
        tree::{describe, encode_tree, join_path, split_path},
        types::{ml_dtypes, numpy_dtypes, torch_dtypes},
        untree::decode_tree,
    };
}
