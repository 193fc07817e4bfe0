//! Which nodes an attempt's ranks were on: a decision that misses too many of them is none.
//!
//! Every node of an attempt has a copy, in RAM and on disk.
//!
//! # Invariants
//!
//! - As many nodes may be lost as there are copies of each shard. With more of them out of reach, a step that
//!   was told to be on other nodes may be there and not be seen: that stops a decision.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    record,
    tier::{Tier, label, read_record},
};

pub(crate) const ROSTER: &str = "_roster";

/// The nodes of one attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Roster {
    format: u32,
    /// The attempt's number.
    attempt: u32,
    nodes: BTreeSet<String>,
    /// Copies of each shard on other nodes.
    replicas: usize,
}

impl Roster {
    pub(crate) fn new(attempt: u32, nodes: BTreeSet<String>, replicas: usize) -> Self {
        Self { format: record::FORMAT, attempt, nodes, replicas }
    }

    /// Keeps it.
    ///
    /// # Errors
    /// The tier did not answer.
    pub(crate) fn keep(&self, tier: &dyn Tier) -> Result<()> {
        let body = serde_json::to_vec(self).map_err(|e| Error::Bug(format!("roster: {e}")))?;
        let name = format!("{ROSTER}/{:08}.json", self.attempt);
        tier.create(&name, &record::seal(&body))?;
        // Those of older attempts say nothing more.
        for entry in tier.list(ROSTER)? {
            let older = number_of(&entry.name).is_some_and(|number| number < self.attempt);
            if older {
                tier.delete(&format!("{ROSTER}/{}", entry.name))?;
            }
        }
        Ok(())
    }

    /// The newest that some tier has. One that is damaged says nothing.
    ///
    /// # Errors
    /// A tier did not answer.
    pub(crate) fn newest(tiers: &[&dyn Tier]) -> Result<Option<Self>> {
        let mut found: Option<Self> = None;
        for tier in tiers {
            for entry in tier.list(ROSTER)? {
                let known = found.as_ref().map_or(0, |roster| roster.attempt);
                if number_of(&entry.name).is_none_or(|number| number <= known) {
                    continue;
                }
                let name = format!("{ROSTER}/{}", entry.name);
                match read_record(*tier, &name).and_then(|b| record::open(&b, &label(*tier, &name)))
                {
                    Ok(roster) => found = Some(roster),
                    Err(e) => tracing::warn!("{}", e.chain()),
                }
            }
        }
        Ok(found)
    }

    /// Its nodes that are not among `seen`, where these are more than may be lost.
    pub(crate) fn missing(&self, seen: &BTreeSet<String>) -> Option<Vec<String>> {
        let missing: Vec<String> = self.nodes.difference(seen).cloned().collect();
        (missing.len() > self.replicas).then_some(missing)
    }
}

fn number_of(name: &str) -> Option<u32> {
    name.strip_suffix(".json")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_nodes_may_be_missing_as_there_are_copies() {
        let nodes = |names: &str| names.split(' ').map(String::from).collect::<BTreeSet<_>>();
        let roster = Roster::new(3, nodes("a b c d"), 1);
        assert_eq!(roster.missing(&nodes("a b c d e")), None);
        assert_eq!(roster.missing(&nodes("a b c")), None);
        assert_eq!(roster.missing(&nodes("a b x")), Some(vec!["c".into(), "d".into()]));
    }
}
