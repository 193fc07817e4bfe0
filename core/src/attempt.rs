//! One start of the run, the decision it began with, and the chain of decisions behind it.
//!
//! It owns the attempt record and lineage. It does not own choosing the step (`restore::decide`)
//! nor locks (`ownership`).
//!
//! # Invariants
//!
//! - Only rank 0 creates a record, with the next free number; a record never changes.
//! - Every rank of one attempt holds a claim that no other process holds.
//! - A step that a recorded rollback left behind is never in the lineage again.
//! - An attempt without a complete checkpoint that was not told to roll back leaves the lineage as
//!   it was.
//! - Each tier has a record twice. One that is damaged everywhere stops a resume only where it
//!   could hold a rollback that nobody else knows of.

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    names::{
        ATTEMPTS, AttemptDir, AttemptRef, CheckpointKey, Id, Rank, Step, attempt_file,
        parse_attempt_file,
    },
    record,
    tier::{Created, Tier, create_same, find_record, label, read_record},
};

/// Where an attempt resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// The attempt that saved the checkpoint.
    pub attempt: AttemptRef,
    /// Its step.
    pub step: u64,
}

impl Parent {
    /// The checkpoint's place.
    #[must_use]
    pub fn key(&self) -> CheckpointKey {
        CheckpointKey::new(Step(self.step), &self.attempt)
    }
}

/// The record of one attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttemptRecord {
    /// Format version.
    pub format: u32,
    /// Features that a reader must know.
    #[serde(default)]
    pub required_features: Vec<String>,
    /// The run's random id, drawn by its first attempt.
    pub run_id: Id,
    /// Number, and the random id of rank 0's process start.
    pub attempt: AttemptRef,
    /// How many decisions this process start had recorded before: a restore in a running process is
    /// a new attempt.
    pub decision: u32,
    /// The restore decision: what every rank restores, or nothing.
    pub parent: Option<Parent>,
    /// The parent was chosen on purpose: what lies beyond it is abandoned at once. Also true for a
    /// fresh start on a run that had checkpoints.
    pub rollback: bool,
    /// The attempt whose rollback it withdraws: what that was to go back to was gone before anybody did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub withdraws: Option<u32>,
    /// The ranks that save, rising.
    pub savers: Vec<u32>,
    /// Some tensors are declared as the same on several ranks.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub replicated: bool,
    /// For people: where rank 0 ran.
    pub host: String,
    /// For people.
    pub pid: u32,
    /// For people: wall time in ms since 1970.
    pub created_unix_ms: u64,
    /// For people: newer steps that were passed over, and why.
    #[serde(default)]
    pub passed_over: Vec<String>,
}

impl AttemptRecord {
    /// Whether it can be the record of its own number.
    pub(crate) fn check_itself(&self) -> Result<()> {
        let number = self.attempt.number;
        self.check(number).map_err(|why| Error::damaged(attempt_file(number), why))
    }

    fn check(&self, number: u32) -> Result<(), String> {
        if self.attempt.number != number || number == 0 {
            return Err(format!("it is of attempt {}", self.attempt.number));
        }
        if self.parent.is_some_and(|p| p.attempt.number >= number) {
            return Err("its parent is not older".into());
        }
        if self.savers.is_empty() || !self.savers.is_sorted_by(|a, b| a < b) {
            return Err("its ranks are not in rising order".into());
        }
        Ok(())
    }
}

/// All attempts of a run, oldest first.
#[derive(Clone, Debug, Default)]
pub struct Attempts {
    records: Vec<AttemptRecord>,
    joined: Vec<u32>,
    /// Records without a good copy anywhere, and why.
    damaged: Vec<(u32, String)>,
}

impl Attempts {
    #[cfg(test)]
    pub(crate) fn of(records: Vec<AttemptRecord>) -> Self {
        Self { records, joined: vec![], damaged: vec![] }
    }

    /// Reads them from the first of `tiers` that has a good copy of each: records are small, and a
    /// run without them could not tell its lineage.
    ///
    /// # Errors
    /// A tier did not answer, or no tier has a good copy of a record.
    pub fn load(tiers: &[&dyn Tier]) -> Result<Self> {
        let mut numbers = Vec::new();
        let mut joined = Vec::new();
        for tier in tiers {
            for entry in tier.list(ATTEMPTS)? {
                numbers.extend(number_of(&entry.name));
                joined.extend(entry.name.strip_suffix(".joined").and_then(number_of));
            }
        }
        // Each tier may say the same.
        for numbers in [&mut numbers, &mut joined] {
            numbers.sort_unstable();
            numbers.dedup();
        }
        let mut all = Self { records: Vec::new(), joined, damaged: Vec::new() };
        for number in numbers {
            match read(tiers, number) {
                Ok((record, _)) => all.records.push(record),
                Err(Error::Damaged { file, why }) => {
                    all.damaged.push((number, format!("{file} is damaged: {why}")));
                }
                Err(e) => return Err(e),
            }
        }
        Ok(all)
    }

    /// Whether `lineage` can be trusted though some records cannot be read.
    ///
    /// # Errors
    /// A record newer than the lineage's head is damaged everywhere: it may hold a rollback.
    pub fn check_lineage(&self, lineage: &Lineage) -> Result<()> {
        let head = lineage.head().map_or(0, |h| h.number);
        match self.damaged.iter().find(|(number, _)| *number > head) {
            Some((number, why)) => Err(Error::damaged(
                attempt_file(*number),
                format!("{why}; it may record a rollback (naming a step and attempt goes on)"),
            )),
            None => Ok(()),
        }
    }

    /// Those that have a complete checkpoint, as far as it was recorded.
    pub(crate) fn joined(&self) -> &[u32] {
        &self.joined
    }

    /// Oldest first.
    #[must_use]
    pub fn records(&self) -> &[AttemptRecord] {
        &self.records
    }

    /// The newest.
    #[must_use]
    pub fn newest(&self) -> Option<&AttemptRecord> {
        self.records.last()
    }

    /// The attempt that a directory belongs to.
    #[must_use]
    pub fn find(&self, dir: &AttemptDir) -> Option<&AttemptRecord> {
        self.records.iter().find(|r| dir.is(&r.attempt))
    }

    /// The chain that a resume follows. `complete` are the checkpoints that exist now.
    #[must_use]
    pub fn lineage<'a>(&self, complete: impl IntoIterator<Item = &'a CheckpointKey>) -> Lineage {
        let mut joined = self.joined.clone();
        joined.extend(complete.into_iter().map(|key| key.attempt.number));
        let rolls_back = |r: &AttemptRecord| r.rollback && !self.is_withdrawn(r);
        let leads = |r: &&AttemptRecord| rolls_back(r) || joined.contains(&r.attempt.number);
        Lineage::of(&self.records, self.records.iter().rev().find(leads))
    }

    fn is_withdrawn(&self, record: &AttemptRecord) -> bool {
        self.records.iter().any(|r| r.withdraws == Some(record.attempt.number))
    }

    /// The chain of one attempt, whether it has joined the run's or not.
    #[must_use]
    pub fn lineage_of(&self, attempt: &AttemptRef) -> Lineage {
        Lineage::of(&self.records, self.records.iter().find(|r| r.attempt == *attempt))
    }
}

/// The attempts behind the newest one, each up to the step that its successor resumed from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lineage {
    /// Newest first; `None`: every step of it.
    chain: Vec<(AttemptRef, Option<u64>)>,
}

impl Lineage {
    fn of(records: &[AttemptRecord], head: Option<&AttemptRecord>) -> Self {
        let mut chain = Vec::new();
        let mut next = head.map(|r| (r, None));
        while let Some((record, up_to)) = next {
            chain.push((record.attempt, up_to));
            // Parents have lower numbers (`check`), so this ends.
            next = record.parent.and_then(|parent| {
                let older = records.iter().find(|r| r.attempt == parent.attempt)?;
                Some((older, Some(parent.step)))
            });
        }
        Self { chain }
    }

    /// True where a resume may land on this checkpoint without being told.
    #[must_use]
    pub fn contains(&self, key: &CheckpointKey) -> bool {
        let found = self.chain.iter().find(|(attempt, _)| key.attempt.is(attempt));
        found.is_some_and(|(_, up_to)| up_to.is_none_or(|last| key.step.0 <= last))
    }

    /// Its newest attempt.
    #[must_use]
    pub fn head(&self) -> Option<AttemptRef> {
        self.chain.first().map(|(attempt, _)| *attempt)
    }

    /// How many attempts it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.chain.len()
    }

    /// True for a run without checkpoints.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.chain.is_empty()
    }
}

/// A record and its bytes, from the first of `tiers` that has a good copy.
pub(crate) fn read(tiers: &[&dyn Tier], number: u32) -> Result<(AttemptRecord, Vec<u8>)> {
    let mut last = None;
    for tier in tiers {
        for name in [attempt_file(number), copy_file(number)] {
            match read_file(*tier, &name, number) {
                Ok(found) => return Ok(found),
                Err(e) if e.is_not_found() => {}
                Err(e @ Error::Damaged { .. }) => last = Some(e),
                Err(e) => return Err(e),
            }
        }
    }
    Err(last.unwrap_or(Error::NotFound { what: attempt_file(number) }))
}

/// One file of a record.
pub(crate) fn read_file(
    tier: &dyn Tier,
    name: &str,
    number: u32,
) -> Result<(AttemptRecord, Vec<u8>)> {
    let bytes = read_record(tier, name)?;
    let file = label(tier, name);
    let record: AttemptRecord = record::open(&bytes, &file)?;
    record.check(number).map_err(|why| Error::damaged(&file, why))?;
    Ok((record, bytes))
}

/// `attempts/00000007.copy`, the same bytes again.
fn copy_file(number: u32) -> String {
    format!("{ATTEMPTS}/{number:08}.copy")
}

/// The attempt of `00000007.json` or `00000007.copy`, or of a bare `00000007`.
pub(crate) fn number_of(name: &str) -> Option<u32> {
    let stem = name.strip_suffix(".copy").or(name.strip_suffix(".json")).unwrap_or(name);
    parse_attempt_file(&format!("{stem}.json"))
}

/// Creates the record with the next free number. `draft` gets its number; the first tier decides,
/// the others keep copies.
///
/// # Errors
/// The first tier did not answer.
pub fn create(tiers: &[&dyn Tier], mut draft: AttemptRecord) -> Result<AttemptRecord> {
    while !create_once(tiers, &draft)? {
        draft.attempt.number += 1;
    }
    Ok(draft)
}

/// The same with its number. False: that is taken.
pub(crate) fn create_once(tiers: &[&dyn Tier], draft: &AttemptRecord) -> Result<bool> {
    let Some((first, copies)) = tiers.split_first() else {
        return Err(Error::Bug("no tier for attempt records".into()));
    };
    let body = serde_json::to_vec(draft).map_err(|e| Error::Bug(format!("attempt: {e}")))?;
    let bytes = record::seal(&body);
    let name = attempt_file(draft.attempt.number);
    if !create_same(*first, &name, &bytes)? {
        return Ok(false);
    }
    // Copies are second chances against damage. Without one the run goes on.
    let name_again = copy_file(draft.attempt.number);
    let again = copies.iter().flat_map(|t| [(*t, &name), (*t, &name_again)]);
    for (tier, name) in std::iter::once((*first, &name_again)).chain(again) {
        if let Err(e) = tier.create(name, &bytes) {
            tracing::warn!("{}: no copy of {name}: {}", tier.address(), e.chain());
        }
    }
    Ok(true)
}

/// Keeps in `to` what it lacks of the records that `from` has. One that is there must be the same.
///
/// # Errors
/// A tier did not answer, or another run's record is there.
pub(crate) fn keep_missing(attempts: &Attempts, from: &[&dyn Tier], to: &dyn Tier) -> Result<()> {
    let there: std::collections::BTreeSet<String> =
        to.list(ATTEMPTS)?.into_iter().map(|entry| entry.name).collect();
    for record in attempts.records() {
        let number = record.attempt.number;
        let lacks = |name: &str| name.rsplit('/').next().is_some_and(|file| !there.contains(file));
        if !lacks(&attempt_file(number)) && !lacks(&copy_file(number)) {
            continue;
        }
        let (_, bytes) = read(from, number)?;
        for name in [attempt_file(number), copy_file(number)] {
            if !create_same(to, &name, &bytes)? {
                let why = format!("{} is of another run or attempt", label(to, &name));
                return Err(Error::Fenced { why });
            }
        }
    }
    let untold = |number: &&u32| !there.contains(&format!("{number:08}.joined"));
    attempts.joined().iter().filter(untold).try_for_each(|number| join_number(to, *number))
}

/// Keeps another node's record, twice as every tier does. One that is there stays.
///
/// # Errors
/// The tier did not answer.
pub(crate) fn keep(tier: &dyn Tier, record: &AttemptRecord, bytes: &[u8]) -> Result<()> {
    record.check_itself()?;
    let number = record.attempt.number;
    for name in [attempt_file(number), copy_file(number)] {
        tier.create(&name, bytes)?;
    }
    Ok(())
}

/// Records that `attempt` has a complete checkpoint: from here on it leads the lineage, also when
/// that checkpoint was only in RAM and is lost.
///
/// # Errors
/// The tier did not answer.
pub fn join(tier: &dyn Tier, attempt: &AttemptRef) -> Result<()> {
    join_number(tier, attempt.number)
}

pub(crate) fn join_number(tier: &dyn Tier, number: u32) -> Result<()> {
    let name = format!("{ATTEMPTS}/{number:08}.joined");
    tier.create(&name, b"").map(|_| ())
}

/// Claims a rank of an attempt for one process.
///
/// # Errors
/// [`Error::Fenced`] where another process has it.
pub fn claim(tier: &dyn Tier, attempt: &AttemptRef, rank: Rank, nonce: &Id) -> Result<()> {
    let name = claim_name(attempt, rank);
    let text = format!("{nonce}\n");
    match tier.create(&name, text.as_bytes())? {
        Created::New => Ok(()),
        Created::Exists if find_record(tier, &name)?.as_deref() == Some(text.as_bytes()) => Ok(()),
        Created::Exists => Err(Error::Fenced {
            why: format!("{rank} of {attempt} was claimed by another process ({name})"),
        }),
    }
}

/// Whether the writer with this nonce has claimed a rank of an attempt.
///
/// # Errors
/// The tier did not answer.
pub fn is_claimed_by(
    tier: &dyn Tier,
    attempt: &AttemptRef,
    rank: Rank,
    nonce: &Id,
) -> Result<bool> {
    let said = find_record(tier, &claim_name(attempt, rank))?;
    Ok(said.is_some_and(|text| text == format!("{nonce}\n").as_bytes()))
}

/// Whether a process has claimed a rank of an attempt.
///
/// # Errors
/// The tier did not answer.
pub fn is_claimed(tier: &dyn Tier, attempt: &AttemptRef, rank: Rank) -> Result<bool> {
    Ok(find_record(tier, &claim_name(attempt, rank))?.is_some())
}

fn claim_name(attempt: &AttemptRef, rank: Rank) -> String {
    format!("_claims/{}/rank-{:06}", attempt.dir(), rank.0)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn attempt(number: u32) -> AttemptRef {
        AttemptRef { number, id: Id([u8::try_from(number).unwrap(); 16]) }
    }

    pub(crate) fn record(number: u32, parent: Option<(u32, u64)>, rollback: bool) -> AttemptRecord {
        AttemptRecord {
            format: 1,
            required_features: vec![],
            run_id: Id([9; 16]),
            attempt: attempt(number),
            decision: 0,
            parent: parent.map(|(n, step)| Parent { attempt: attempt(n), step }),
            rollback,
            savers: vec![0],
            replicated: false,
            host: String::new(),
            pid: 1,
            created_unix_ms: 0,
            withdraws: None,
            passed_over: vec![],
        }
    }

    fn key(number: u32, step: u64) -> CheckpointKey {
        CheckpointKey::new(Step(step), &attempt(number))
    }

    fn attempts(records: Vec<AttemptRecord>, joined: Vec<u32>) -> Attempts {
        Attempts { records, joined, damaged: vec![] }
    }

    #[test]
    fn a_step_that_a_recorded_rollback_left_behind_is_never_in_the_lineage_again() {
        let all = attempts(vec![record(1, None, false), record(2, Some((1, 30)), true)], vec![]);
        let lineage = all.lineage(&[key(1, 30), key(1, 60)]);
        assert!(lineage.contains(&key(1, 30)) && lineage.contains(&key(1, 10)));
        assert!(!lineage.contains(&key(1, 60)));
    }

    #[test]
    fn an_attempt_without_a_complete_checkpoint_leaves_the_lineage_as_it_was() {
        let all = attempts(vec![record(1, None, false), record(2, Some((1, 30)), false)], vec![]);
        assert!(all.lineage(&[key(1, 60)]).contains(&key(1, 60)));
        let lineage = all.lineage(&[key(1, 60), key(2, 31)]);
        assert!(!lineage.contains(&key(1, 60)) && lineage.contains(&key(2, 31)));
        let joined = attempts(all.records, vec![2]);
        assert!(!joined.lineage(&[key(1, 60)]).contains(&key(1, 60)), "it had one, in RAM");
    }

    #[test]
    fn a_fresh_start_abandons_everything() {
        let all = attempts(vec![record(1, None, false), record(2, None, true)], vec![]);
        assert!(!all.lineage(&[key(1, 60)]).contains(&key(1, 60)));
    }
}
