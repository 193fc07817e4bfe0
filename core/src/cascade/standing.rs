//! How a step stands in RAM: what every rank can see of it, and what is recorded.
//!
//! # Invariants
//!
//! - A step that was complete in RAM is told as such on every rank, also on one that looks late.

use super::Cascade;
use crate::{
    agree::{InRam, Own},
    commit::{Gathered, Listing, gather},
    error::{Error, Result},
    manifest::replicated::{differences_in_words, say_the_same},
    names::CheckpointKey,
};

/// How a step stands in RAM.
#[derive(Debug)]
pub(super) enum Standing {
    /// Every rank has its shard, or had it at one time, and they agree.
    Whole,
    /// These ranks have none yet.
    Missing(Vec<u32>),
    /// It will not be complete; why.
    GivenUp(String),
}

impl Cascade {
    pub(super) fn missing_in_ram(&self, key: &CheckpointKey) -> Result<Vec<u32>> {
        let (agreements, savers) = (&self.parts.agreements, &self.parts.config.savers);
        if !agreements.is_spread() {
            return Ok(Listing::of(&*self.parts.ram, key)?.missing(savers));
        }
        // The leader's word is what counts; until it is there, any of the others may be missing.
        match self.parts.config.leads() {
            true => agreements.without_own(key.step.0, Own::InRam, savers),
            false => Ok(self.others()),
        }
    }

    /// How it stands in RAM. Ranks that are ahead use their slots again, but only after they asked
    /// this, and a "whole" is recorded.
    pub(super) fn in_ram(&self, key: &CheckpointKey) -> Result<Standing> {
        if self.is_parent(key.step.0) {
            return Ok(Standing::Whole);
        }
        let missing = self.missing_in_ram(key)?;
        Ok(match self.said_in_ram(key, &missing)? {
            Some(InRam::Whole) => Standing::Whole,
            Some(InRam::GivenUp(why)) => Standing::GivenUp(why),
            None => Standing::Missing(missing),
        })
    }

    /// What is recorded of it, or can be now that nobody is `missing`.
    pub(super) fn said_in_ram(
        &self,
        key: &CheckpointKey,
        missing: &[u32],
    ) -> Result<Option<InRam>> {
        let agreements = &self.parts.agreements;
        if let Some(said) = agreements.was_in_ram(key.step.0)? {
            return Ok(Some(said));
        }
        if !missing.is_empty() {
            return Ok(None);
        }
        let mut seen = InRam::Whole;
        if !self.say_the_same(key.step.0)? {
            if agreements.is_spread() {
                seen = InRam::GivenUp("the ranks differ in tensors that they hold alike".into());
                return agreements.in_ram(key.step.0, seen).map(Some);
            }
            seen = match gather(&*self.parts.ram, key, &self.parts.config.savers) {
                Ok(Gathered::Complete(_)) => seen,
                Ok(Gathered::Differ(list)) => InRam::GivenUp(differences_in_words(&list)),
                Err(e @ Error::Damaged { .. }) => InRam::GivenUp(e.chain()),
                // A slot was used again: whoever did it has recorded why it could.
                Ok(Gathered::Missing(_) | Gathered::Deleted) => {
                    return agreements.was_in_ram(key.step.0);
                }
                // RAM has trouble, not the disk: what is on its way there goes on.
                Err(e) => {
                    tracing::warn!("{key} could not be compared: {}", e.chain());
                    return agreements.was_in_ram(key.step.0);
                }
            };
        }
        agreements.in_ram(key.step.0, seen).map(Some)
    }

    /// What the ranks hold alike is the same, by their own words: no manifest need be read. A rank says
    /// nothing where it holds nothing so; where the user declared what is held, all do.
    fn say_the_same(&self, step: u64) -> Result<bool> {
        let (agreements, savers) = (&self.parts.agreements, &self.parts.config.savers);
        let said = agreements.all_said_alike(step, savers)?;
        let all = said.len() == savers.len() || self.parts.config.replicated.is_empty();
        Ok(all && say_the_same(said.iter().map(String::as_str)))
    }
}
