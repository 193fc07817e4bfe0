//! Multi-tier checkpoints: a training state goes in at the top of this page and comes out at the
//! bottom, bit for bit.
//!
//! state -> snapshot -> tiers (memory, disk, object) -> cascade -> commit -> restore
//!
//! The modules below are declared in that order. Reading them top to bottom is following one
//! checkpoint through its life. The page of promises is `core/GUARANTEES.md`, the formats are
//! `core/FORMAT.md`.

pub mod checkpointer;
mod owner;
mod keeper;
pub mod config;
pub mod bucket;
mod place;
pub mod begin;

pub mod state;
pub mod snapshot;
pub mod chunk;
pub mod codec;
pub mod packed;
pub mod save;

pub mod tier;
pub mod cascade;
pub mod agree;
pub mod commit;
pub mod manifest;
mod record;

pub mod attempt;
pub mod ownership;
pub mod restore;
pub mod reader;
pub mod retain;
pub mod verify;
pub mod upkeep;

pub mod passing;
mod wire;
pub mod link;
pub mod host;
pub mod placement;
pub mod peers;
pub mod probe;

pub mod names;
pub mod observe;
pub mod clock;
pub mod signal;
pub mod error;
pub mod glob;
mod at_once;
mod sys;
pub mod testing;

pub use error::{Error, ErrorKind, Hint, Result};
