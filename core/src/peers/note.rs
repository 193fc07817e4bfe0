//! What lies beside a shelf's slots: for whom they are held, for the agent after this one.
//!
//! # Invariants
//!
//! - It says whose copies are to be made again, and nothing else: what is held the slots say. Without it, or
//!   where it is damaged, all is held as before, and nobody heals it.
//! - It lies there before anything is acknowledged for the owner that it names.
//! - It names no user: its user is the file's.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::hold::Owner;
use crate::{
    error::{Error, Result},
    names::Rank,
    record,
    tier::Tier,
};

/// Of the run's ram tier.
pub(crate) const NOTES: &str = "_held";

/// The record.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Note {
    format: u32,
    /// The run's directory.
    pub(crate) destination: PathBuf,
    pub(crate) rank: u32,
    #[serde(flatten)]
    pub(crate) owner: Owner,
}

pub(crate) fn name(rank: Rank) -> String {
    format!("{NOTES}/{:06}.json", rank.0)
}

impl Note {
    pub(crate) fn new(destination: &Path, rank: Rank, owner: Owner) -> Self {
        Self { format: record::FORMAT, destination: destination.into(), rank: rank.0, owner }
    }

    /// Keeps it, in the place of one before it.
    ///
    /// # Errors
    /// The tier did not answer, or the run's directory is no text.
    pub(crate) fn keep(&self, ram: &dyn Tier) -> Result<()> {
        let body = serde_json::to_vec(self);
        let body = body.map_err(|e| Error::invalid(format!("no note of what is held: {e}")))?;
        let rank = Rank(self.rank);
        forget(ram, rank)?;
        ram.create(&name(rank), &record::seal(&body)).map(drop)
    }

    /// Reads it; `file` is its name in messages.
    ///
    /// # Errors
    /// It is damaged, or of a newer tierkeep.
    pub(crate) fn open(bytes: &[u8], file: &str) -> Result<Self> {
        record::open(bytes, file)
    }
}

/// Nothing is held for the rank any more.
pub(crate) fn forget(ram: &dyn Tier, rank: Rank) -> Result<()> {
    ram.delete(&name(rank))
}
