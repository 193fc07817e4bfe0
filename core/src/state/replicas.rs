//! Tensors that several ranks hold alike: which ones the user says they are, or they themselves, and which
//! rank stores each.
//!
//! It owns the choice, which is pure. It does not own finding out whether what the user said is true
//! (`manifest::replicated`).
//!
//! # Invariants
//!
//! - Ranks of a group that hold the same tensors choose the same, without a word between them.
//! - The bytes of a group are spread over its ranks to within one tensor.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    sync::Arc,
};

use super::TensorSpec;
use crate::{error::Result, glob::covers};

/// What the user says of the tensors whose path matches, the same on all ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// A pattern over escaped paths, which takes in all below what it matches (`glob::covers`).
    pub pattern: String,
    /// The ranks that hold the same bytes, rising; fewer than two: each rank's tensor is its own.
    pub ranks: Vec<u32>,
}

/// Which ranks hold a tensor alike, and which of them stores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share<'a> {
    /// The group, rising.
    pub ranks: &'a [u32],
    /// The rank that stores it.
    pub saver: u32,
}

/// Largest first: bytes, name, index.
type Tensors<'a> = Vec<(Reverse<u64>, &'a str, usize)>;

impl Rule {
    /// `rank` holds what matches as others do.
    fn shares(&self, rank: u32) -> bool {
        self.ranks.len() > 1 && self.ranks.contains(&rank)
    }
}

/// For each tensor its share; `None`: `rank`'s own. What the tensor says of itself counts, then the first
/// rule that matches; a part of a tensor is nobody else's unless it says so.
///
/// Largest first, each to the rank that has the fewest bytes so far ("longest processing time
/// first": R. L. Graham, Bounds on multiprocessing timing anomalies, 1969).
///
/// # Errors
/// A tensor's size overflows.
pub fn share<'a>(
    rules: &'a [Rule],
    specs: &'a [Arc<TensorSpec>],
    rank: u32,
) -> Result<Vec<Option<Share<'a>>>> {
    let mut shares = vec![None; specs.len()];
    let mut groups: BTreeMap<&[u32], Tensors<'_>> = BTreeMap::new();
    for (index, spec) in specs.iter().enumerate() {
        let ranks = match (&*spec.held_by, &spec.part_of) {
            ([], None) => {
                let rule = rules.iter().find(|rule| covers(&rule.pattern, &spec.name));
                rule.filter(|rule| rule.shares(rank)).map(|rule| &*rule.ranks)
            }
            (ranks, _) => Some(ranks).filter(|ranks| ranks.len() > 1 && ranks.contains(&rank)),
        };
        if let Some(ranks) = ranks {
            let row = (Reverse(spec.bytes()?), &*spec.name, index);
            groups.entry(ranks).or_default().push(row);
        }
    }
    for (ranks, mut tensors) in groups {
        tensors.sort_unstable();
        let mut loads: BinaryHeap<_> = ranks.iter().map(|rank| Reverse((0_u64, *rank))).collect();
        for (Reverse(bytes), _, index) in tensors {
            let Some(Reverse((load, saver))) = loads.pop() else { break };
            shares[index] = Some(Share { ranks, saver });
            loads.push(Reverse((load.saturating_add(bytes), saver)));
        }
    }
    Ok(shares)
}

/// The patterns of `rules` that `rank` shares, and that no tensor matches.
pub fn unused(rules: &[Rule], specs: &[Arc<TensorSpec>], rank: u32) -> Vec<String> {
    let matches = |rule: &Rule| specs.iter().any(|spec| covers(&rule.pattern, &spec.name));
    let idle = rules.iter().filter(|rule| rule.shares(rank) && !matches(rule));
    idle.map(|rule| rule.pattern.clone()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::state::dtype::Dtype;

    fn spec(name: &str, bytes: u64) -> Arc<TensorSpec> {
        let (name, shape) = (name.into(), vec![bytes]);
        Arc::new(TensorSpec { name, dtype: Dtype::U8, shape, part_of: None, held_by: Vec::new() })
    }

    fn rule(pattern: &str, ranks: &[u32]) -> Rule {
        Rule { pattern: pattern.into(), ranks: ranks.into() }
    }

    #[test]
    fn the_first_rule_that_matches_counts_and_a_group_of_one_is_nobodys() {
        let rules = [rule("rng", &[]), rule("model/*", &[0, 2]), rule("*", &[0, 1, 2])];
        let names = ["rng/torch", "model/a", "optim/b", "rngs"];
        let specs: Vec<_> = names.iter().map(|name| spec(name, 4)).collect();
        let shares = share(&rules, &specs, 2).unwrap();
        let ranks: Vec<_> = shares.iter().map(|s| s.map(|s| s.ranks)).collect();
        let expected: [Option<&[u32]>; 4] =
            [None, Some(&[0, 2]), Some(&[0, 1, 2]), Some(&[0, 1, 2])];
        assert_eq!(ranks, expected);
        assert!(share(&[], &specs, 0).unwrap().iter().all(Option::is_none));
        // Of another group: this rank's own.
        let theirs = share(&rules, &specs, 1).unwrap();
        assert_eq!(
            theirs.iter().map(Option::is_some).collect::<Vec<_>>(),
            [false, false, true, true]
        );
        let rules =
            [rule("rng", &[]), rule("modle/*", &[0, 1]), rule("x", &[1, 2]), rule("*", &[0, 1])];
        assert_eq!(unused(&rules, &specs, 0), ["modle/*"]);
    }

    proptest! {
        #[test]
        fn ranks_choose_the_same_and_carry_the_same_to_within_one_tensor(
            sizes in prop::collection::vec(0_u64..1000, 0..60), world in 2_u32..17, turn in 0_usize..60,
        ) {
            let rules = [rule("*", &(0..world).collect::<Vec<_>>())];
            let mut specs: Vec<_> =
                sizes.iter().enumerate().map(|(i, n)| spec(&format!("t{i}"), *n)).collect();
            let by_name = |specs: &[Arc<TensorSpec>]| -> BTreeMap<Arc<str>, u32> {
                let shares = share(&rules, specs, 0).unwrap();
                specs.iter().zip(shares).map(|(s, x)| (s.name.clone(), x.unwrap().saver)).collect()
            };
            let savers = by_name(&specs);
            let mut loads = vec![0; world as usize];
            for (size, spec) in sizes.iter().zip(&specs) {
                loads[savers[&spec.name] as usize] += size;
            }
            let (least, most) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
            prop_assert!(most - least <= sizes.iter().copied().max().unwrap_or(0), "{loads:?}");
            let turn = turn % specs.len().max(1);
            specs.rotate_left(turn);
            prop_assert_eq!(by_name(&specs), savers);
        }
    }
}
