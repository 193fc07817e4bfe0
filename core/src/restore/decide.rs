//! Which checkpoint a run resumes from. One process decides, once an attempt, and records it; all
//! ranks obey the record.
//!
//! # Invariants
//!
//! - The answer is the newest checkpoint of the lineage whose every shard can be reached, and that
//!   no rank has marked as bad.
//! - "Nothing" needs every tier to have answered.
//! - A newer checkpoint that was passed over is named, with the reason.

use std::collections::BTreeMap;

use crate::{
    attempt::{Attempts, Lineage, Parent},
    error::{Error, ErrorKind, Hint, Result},
    names::{CheckpointKey, Id, Step},
    tier::{Tier, TierKind},
};

use super::survey::{Found, Reach, bad_marks, reached, survey};

/// What the caller wishes.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// This step and no other.
    pub step: Option<Step>,
    /// Of this attempt (needed where two attempts saved the step).
    pub attempt: Option<u32>,
    /// Take an older checkpoint where a tier that may have a newer one does not answer.
    pub accept_older: bool,
}

/// The answer.
#[derive(Clone, Debug)]
pub struct Decision {
    /// The checkpoint, or nothing.
    pub parent: Option<Parent>,
    /// Its saver set.
    pub savers: Vec<u32>,
    /// Newer ones that were passed over, one sentence each.
    pub passed_over: Vec<String>,
    /// The run has some checkpoint or attempt.
    pub has_history: bool,
}

/// Decides over `tiers`, nearest first. `marks` is the tier that holds `bad/`.
///
/// # Errors
/// A tier did not answer; the wished step is not there or not whole.
pub fn decide(
    tiers: &[&dyn Tier],
    marks: &dyn Tier,
    attempts: &Attempts,
    wish: &Wish,
) -> Result<Decision> {
    decide_once(tiers, marks, attempts, wish, &mut Wholes::default())
}

/// Checkpoints that were found to be whole in the course of one decision, which asks about each several
/// times: its run, and its saver set.
#[derive(Debug, Default)]
pub(crate) struct Wholes(BTreeMap<CheckpointKey, (Option<Id>, Vec<u32>)>);

impl Wholes {
    fn reach(&mut self, tiers: &[&dyn Tier], found: &Found, run_id: Option<&Id>) -> Result<Reach> {
        let of_run = |run: &Option<Id>| run_id.is_none_or(|id| run.as_ref() == Some(id));
        if let Some((_, savers)) = self.0.get(&found.key).filter(|(run, _)| of_run(run)) {
            return Ok(Reach::Whole(savers.clone()));
        }
        let (reach, run) = reached(tiers, found, run_id)?;
        if let Reach::Whole(savers) = &reach {
            self.0.insert(found.key.clone(), (run, savers.clone()));
        }
        Ok(reach)
    }
}

/// [`decide`], as a part of a larger decision over the same tiers.
pub(crate) fn decide_once(
    tiers: &[&dyn Tier],
    marks: &dyn Tier,
    attempts: &Attempts,
    wish: &Wish,
    wholes: &mut Wholes,
) -> Result<Decision> {
    let mut decision =
        Decision { parent: None, savers: vec![], passed_over: vec![], has_history: false };
    let answering = answering(tiers, wish, &mut decision.passed_over)?;
    let found = survey(&answering)?;
    let mut bad = bad_marks(marks)?;
    // A rank on another node has left its mark there.
    for tier in answering.iter().filter(|tier| tier.kind() != TierKind::Object) {
        bad.extend(bad_marks(*tier)?);
    }
    decision.has_history = !found.is_empty() || attempts.newest().is_some();
    let run_id = attempts.newest().map(|r| r.run_id);
    let lineage = lineage_once(&answering, &found, attempts, wholes)?;
    let wished = |f: &&Found| match (wish.step, wish.attempt) {
        (None, None) => lineage.contains(&f.key),
        (step, number) => {
            step.is_none_or(|s| s == f.key.step)
                && number.map_or_else(|| lineage.contains(&f.key), |n| f.key.attempt.number == n)
        }
    };
    let mut broken = Vec::new();
    // Newest: the highest step; of one step, the newest attempt's.
    for found in found.iter().rev().filter(wished) {
        let mut pass = |why: String| {
            decision.passed_over.push(format!("{}: {why}", found.key));
            broken.push((found.key.clone(), why));
        };
        if let Some((.., rank)) =
            bad.iter().find(|(s, n, _)| *s == found.key.step && *n == found.key.attempt.number)
        {
            pass(format!(
                "{rank} found no good copy of its shard (`tierkeep verify` clears the mark)"
            ));
            continue;
        }
        match wholes.reach(&answering, found, run_id.as_ref())? {
            Reach::Whole(savers) => {
                decision.parent = Some(parent_of(attempts, &found.key)?);
                decision.savers = savers;
                break;
            }
            Reach::Broken(why) => pass(why.join("; ")),
            Reach::Unfinished(missing) => tracing::debug!("{} lacks ranks {missing:?}", found.key),
            Reach::Deleted => {}
        }
    }
    if decision.parent.is_none() && (wish.step.is_some() || wish.attempt.is_some()) {
        return Err(not_there(wish, &broken, &decision, &found, &lineage));
    }
    Ok(decision)
}

/// The newest whole checkpoint of the lineage before `parent`.
///
/// # Errors
/// A tier did not answer.
pub(crate) fn whole_before(
    tiers: &[&dyn Tier],
    attempts: &Attempts,
    parent: &CheckpointKey,
    wholes: &mut Wholes,
) -> Result<Option<CheckpointKey>> {
    let found = survey(tiers)?;
    let lineage = lineage_once(tiers, &found, attempts, wholes)?;
    let run_id = attempts.newest().map(|r| r.run_id);
    for found in found.iter().rev().filter(|f| f.key < *parent && lineage.contains(&f.key)) {
        if matches!(wholes.reach(tiers, found, run_id.as_ref())?, Reach::Whole(_)) {
            return Ok(Some(found.key.clone()));
        }
    }
    Ok(None)
}

/// Tiers that answer. One that does not may have a newer checkpoint: an error, unless the caller
/// takes an older one.
pub(crate) fn answering<'a>(
    tiers: &[&'a dyn Tier],
    wish: &Wish,
    passed_over: &mut Vec<String>,
) -> Result<Vec<&'a dyn Tier>> {
    let mut good = Vec::new();
    for tier in tiers {
        match tier.list("") {
            Ok(_) => good.push(*tier),
            // A mistake, and the sentence says which: to go on without the tier is not what is wanted.
            Err(e @ Error::Invalid { .. }) => return Err(e),
            Err(e) if tier.kind() == TierKind::Object && e.kind() == ErrorKind::Invalid => {
                return Err(e);
            }
            Err(e) if wish.accept_older => {
                passed_over.push(format!("the {} tier does not answer: {}", tier.kind(), e.chain()))
            }
            Err(e) => {
                let silent = Error::Io {
                    what: format!(
                        "look for checkpoints in the {} tier at {}; it may hold a newer one than the \
                         others",
                        tier.kind(),
                        tier.address()
                    ),
                    source: std::io::Error::other(e.chain()),
                };
                return Err(silent.with_hint(Hint::AcceptOlder));
            }
        }
    }
    Ok(good)
}

/// The lineage as the checkpoints that exist show it.
///
/// # Errors
/// A tier did not answer.
pub fn lineage_of(tiers: &[&dyn Tier], found: &[Found], attempts: &Attempts) -> Result<Lineage> {
    lineage_once(tiers, found, attempts, &mut Wholes::default())
}

fn lineage_once(
    tiers: &[&dyn Tier],
    found: &[Found],
    attempts: &Attempts,
    wholes: &mut Wholes,
) -> Result<Lineage> {
    // Only whether an attempt has *some* complete checkpoint matters: look until one is found,
    // newest attempt first, and stop at the first attempt that leads.
    let mut complete = Vec::new();
    for record in attempts.records().iter().rev() {
        let lineage = attempts.lineage(&complete);
        if lineage.head().is_some_and(|head| head.number >= record.attempt.number) {
            break;
        }
        let of_it = found.iter().rev().filter(|f| f.key.attempt.is(&record.attempt));
        for candidate in of_it {
            if candidate.sealed() && !candidate.deleted()
                || matches!(wholes.reach(tiers, candidate, None)?, Reach::Whole(_))
            {
                complete.push(candidate.key.clone());
                break;
            }
        }
    }
    let lineage = attempts.lineage(&complete);
    attempts.check_lineage(&lineage)?;
    Ok(lineage)
}

fn parent_of(attempts: &Attempts, key: &CheckpointKey) -> Result<Parent> {
    let record = attempts.find(&key.attempt).ok_or_else(|| Error::NotFound {
        what: format!("the record of attempt {}, which saved {},", key.attempt.number, key.step),
    })?;
    Ok(Parent { attempt: record.attempt, step: key.step.0 })
}

/// Why the wish cannot be granted. `broken` is what there is of it.
fn not_there(
    wish: &Wish,
    broken: &[(CheckpointKey, String)],
    decision: &Decision,
    found: &[Found],
    lineage: &Lineage,
) -> Error {
    let wished = match (wish.step, wish.attempt) {
        (Some(step), None) => step.to_string(),
        (Some(step), Some(attempt)) => format!("{step} of attempt {attempt}"),
        (None, Some(attempt)) => format!("a checkpoint of attempt {attempt}"),
        (None, None) => "a checkpoint".into(),
    };
    match broken {
        [] => {}
        [(key, why)] => return Error::Broken { what: key.to_string(), why: why.clone() },
        several => {
            let why: Vec<String> = several.iter().map(|(k, why)| format!("{k}: {why}")).collect();
            let what = wish.attempt.map_or(wished, |n| format!("what attempt {n} saved"));
            return Error::Broken { what, why: why.join("; ") };
        }
    }
    // Tiers that do not answer, where the caller goes on without them.
    let mut notes = decision.passed_over.clone();
    let mut elsewhere = found
        .iter()
        .filter(|f| Some(f.key.step) == wish.step && !lineage.contains(&f.key))
        .map(|f| f.key.attempt.number);
    notes.extend(elsewhere.clone().map(|n| format!("attempt {n} has it, on an abandoned branch")));
    let notes = if notes.is_empty() { String::new() } else { format!(" ({})", notes.join("; ")) };
    let error = Error::NotFound { what: wished + &notes };
    match elsewhere.next_back() {
        Some(newest) => error.with_hint(Hint::NameAttempt(newest)),
        None => error,
    }
}
