//! Which checkpoints stay, and how the others go.
//!
//! # Invariants
//!
//! - The newest complete checkpoint of the lineage stays, whatever the policy says.
//! - A checkpoint goes only after a newer one of the lineage is complete at the same durability.
//! - What the newest attempt resumed from stays until that attempt has a complete checkpoint here.
//! - Abandoned branches are touched only when asked for by name.
//! - Going is: tombstone, seal, manifests, payloads, tombstone. Dying anywhere leaves the
//!   checkpoint whole, or invisible and finished by the next collector. Two collectors at once do
//!   no harm.
//! - In a bucket the bytes stay for a while after the checkpoint is gone: whoever began to read it may end.
//! - A collector that finds itself superseded (a newer attempt) stops.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    attempt::{Attempts, Lineage},
    commit::{Listing, read_manifest},
    error::{ErrorKind, Result},
    names::{AttemptDir, CheckpointKey, Rank, SEAL, TOMBSTONE, WHOLE, manifest_name, step_dir},
    record,
    restore::survey::Found,
    tier::{Tier, find_record},
};

const PINS: &str = "_pins";

/// What stays.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The newest so many.
    pub keep_last: usize,
    /// Of these, steps that are not divisible by it are the newest one alone: what goes before its turn, as
    /// from a node that is to go away, takes no place of what was to be kept.
    pub every: u64,
    /// Steps divisible by it.
    pub keep_every: Option<u64>,
    /// The first of each period of so many hours, by the savers' wall clocks.
    pub keep_hours: Option<u64>,
    /// Also clear branches that the run has abandoned.
    pub abandoned: bool,
}

/// One checkpoint that goes, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Victim {
    /// Which.
    pub key: CheckpointKey,
    /// One sentence.
    pub why: String,
}

/// What is known when a plan is made.
#[derive(Debug)]
pub struct Known<'a> {
    /// Everything in this tier.
    pub found: &'a [Found],
    /// The run's lineage.
    pub lineage: &'a Lineage,
    /// All attempts.
    pub attempts: &'a Attempts,
    /// Pinned checkpoints.
    pub pins: &'a BTreeSet<CheckpointKey>,
    /// Checkpoints that are being written.
    pub in_flight: &'a BTreeSet<CheckpointKey>,
    /// Checkpoints whose writing was given up by all ranks.
    pub given_up: &'a BTreeSet<CheckpointKey>,
    /// When checkpoints were saved, in ms since 1970, where `keep_hours` asks for it.
    pub saved: &'a Saved,
}

/// When checkpoints were saved, in ms since 1970.
pub type Saved = BTreeMap<CheckpointKey, u64>;

/// Adds to `saved` what is not known of sealed checkpoints in a tier; forgets those that are gone.
///
/// # Errors
/// The tier did not answer. A manifest that is damaged says nothing: its checkpoint stays.
pub fn learn_times(tier: &dyn Tier, found: &[Found], saved: &mut Saved) -> Result<()> {
    saved.retain(|key, _| found.iter().any(|f| f.key == *key));
    for found in found.iter().filter(|f| f.sealed()) {
        if saved.contains_key(&found.key) {
            continue;
        }
        let Some(rank) = found.listings.iter().flat_map(|l| &l.manifests).min() else { continue };
        match read_manifest(tier, &found.key, *rank, None) {
            Ok((manifest, _)) => drop(saved.insert(found.key.clone(), manifest.meta.saved_unix_ms)),
            Err(e) if e.kind() == ErrorKind::Unavailable => return Err(e),
            Err(e) => {
                tracing::warn!("{}: when it was saved is not known: {}", found.key, e.chain())
            }
        }
    }
    Ok(())
}

/// The first of each period, and those whose time is not known. `sealed`: newest first.
fn of_hours<'a>(
    sealed: &[&'a CheckpointKey],
    hours: u64,
    saved: &Saved,
) -> BTreeSet<&'a CheckpointKey> {
    let mut last = None;
    let first = |key: &&&CheckpointKey| {
        let period = saved.get(**key).map(|ms| ms / hours.saturating_mul(3_600_000).max(1));
        let first = period.is_none() || period != last;
        last = period.or(last);
        first
    };
    sealed.iter().rev().filter(first).copied().collect()
}

/// Chooses what goes. Pure.
#[must_use]
pub fn plan(policy: &Policy, known: &Known<'_>) -> Vec<Victim> {
    let whole = |f: &&Found| f.sealed() && !f.deleted();
    let on_line = |f: &&Found| known.lineage.contains(&f.key);
    let mut kept: BTreeSet<&CheckpointKey> = BTreeSet::new();
    let sealed: Vec<&CheckpointKey> =
        known.found.iter().rev().filter(whole).filter(on_line).map(|f| &f.key).collect();
    let counts = |(index, key): &(usize, &&CheckpointKey)| {
        *index == 0 || key.step.0.is_multiple_of(policy.every.max(1))
    };
    let counted = sealed.iter().enumerate().filter(counts).map(|(_, key)| key);
    kept.extend(counted.take(policy.keep_last.max(1)));
    kept.extend(sealed.iter().filter(|k| {
        policy.keep_every.is_some_and(|every| every > 0 && k.step.0.is_multiple_of(every))
    }));
    if let Some(hours) = policy.keep_hours {
        kept.extend(of_hours(&sealed, hours, known.saved));
    }
    kept.extend(known.pins);
    kept.extend(known.in_flight);
    let parents = parents(known);
    let newest = sealed.first();
    let mut victims = Vec::new();
    for found in known.found {
        let key = &found.key;
        if kept.contains(key) || parents.contains(key) {
            continue;
        }
        let why = if found.deleted() {
            "its deletion was begun and not finished".to_owned()
        } else if known.given_up.contains(key) && !found.sealed() {
            "it was given up for this tier".to_owned()
        } else if !known.lineage.contains(key) {
            if !policy.abandoned || newest.is_none() {
                continue;
            }
            format!("attempt {} was abandoned", key.attempt.number)
        } else if newest.is_none_or(|newest| key.step >= newest.step) {
            continue; // Newer than all that is complete here: it may become so.
        } else if found.sealed() {
            format!("{} newer ones are kept", policy.keep_last)
        } else {
            "it was never completed here".to_owned()
        };
        victims.push(Victim { key: key.clone(), why });
    }
    victims
}

/// What attempts resumed from, as long as they have nothing newer here.
fn parents(known: &Known<'_>) -> BTreeSet<CheckpointKey> {
    let has_own = |number: u32| {
        known.found.iter().any(|f| f.key.attempt.number == number && f.sealed() && !f.deleted())
    };
    let Some(newest) = known.attempts.newest() else { return BTreeSet::new() };
    let mut pinned = BTreeSet::new();
    let mut next = Some(newest);
    while let Some(record) = next {
        if has_own(record.attempt.number) {
            break;
        }
        let Some(parent) = record.parent else { break };
        pinned.insert(parent.key());
        next = known.attempts.records().iter().find(|r| r.attempt == parent.attempt);
    }
    pinned
}

/// The pinned checkpoints of a tier.
///
/// # Errors
/// The tier did not answer.
pub fn pins(tier: &dyn Tier) -> Result<BTreeSet<CheckpointKey>> {
    let parse = |name: &str| {
        let (step, attempt) = name.split_once('.')?;
        let step = crate::names::parse_step_dir(step)?;
        Some(CheckpointKey { step, attempt: AttemptDir::parse(attempt)? })
    };
    Ok(tier.list(PINS)?.iter().filter_map(|e| parse(&e.name)).collect())
}

/// Pins a checkpoint: retention leaves it alone.
///
/// # Errors
/// The tier did not answer.
pub fn pin(tier: &dyn Tier, key: &CheckpointKey) -> Result<()> {
    tier.create(&pin_name(key), b"").map(drop)
}

/// Takes a pin away.
///
/// # Errors
/// The tier did not answer.
pub fn unpin(tier: &dyn Tier, key: &CheckpointKey) -> Result<()> {
    tier.delete(&pin_name(key))
}

fn pin_name(key: &CheckpointKey) -> String {
    format!("{PINS}/{}.{}", step_dir(key.step), key.attempt)
}

/// How a collection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Collected {
    /// All victims are gone.
    All,
    /// A newer attempt began meanwhile; what was begun is finished by its collector.
    Superseded,
}

/// How long bytes stay after their checkpoint is gone, for whoever began to read it before; and the time now,
/// in ms since 1970: collectors of a bucket are on many hosts, and the one that began may be dead.
#[derive(Clone, Copy, Debug, Default)]
pub struct Grace {
    /// None, where an open file keeps its bytes.
    pub bytes: Duration,
    /// Now.
    pub unix_ms: u64,
}

/// Deletes the victims, oldest first. `newest` is the number of the newest attempt that the plan
/// knew.
///
/// # Errors
/// The tier did not answer; what was begun is finished by the next collector.
pub fn collect(
    tier: &dyn Tier,
    victims: &[Victim],
    newest: u32,
    grace: Grace,
) -> Result<Collected> {
    for victim in victims {
        let key = &victim.key;
        tombstone(tier, victim, grace.unix_ms)?;
        // After the tombstone: whoever resumes from here now either sees it, or was recorded before
        // this look.
        let attempts = Attempts::load(&[tier])?;
        if attempts.newest().is_some_and(|r| r.attempt.number > newest) {
            return Ok(Collected::Superseded);
        }
        tracing::info!("deleting {key}: {}", victim.why);
        tier.delete(&key.file(SEAL))?;
        tier.delete(&key.file(WHOLE))?;
        let listing = Listing::of(tier, key)?;
        for rank in &listing.manifests {
            tier.delete(&key.file(&manifest_name(*rank)))?;
        }
        if !listing.payloads.is_empty() && is_young(tier, key, grace)? {
            continue; // The next collector finds the tombstone.
        }
        for file in listing.payloads.values().flatten() {
            tier.retire(&key.file(file))?;
        }
        tier.delete(&key.file(TOMBSTONE))?;
        tier.delete(&key.dir())?;
        tier.delete(&step_dir(key.step))?;
    }
    Ok(Collected::All)
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Tombstone {
    format: u32,
    why: String,
    /// When the deletion was begun, in ms since 1970.
    #[serde(default)]
    unix_ms: u64,
}

/// Its deletion was begun so short a time ago that somebody may still read it.
fn is_young(tier: &dyn Tier, key: &CheckpointKey, grace: Grace) -> Result<bool> {
    if grace.bytes.is_zero() {
        return Ok(false);
    }
    let name = key.file(TOMBSTONE);
    let Some(bytes) = find_record(tier, &name)? else { return Ok(false) };
    // One that says no time is of a disk that was full.
    let begun = record::open::<Tombstone>(&bytes, &name).map_or(0, |tombstone| tombstone.unix_ms);
    Ok(grace.unix_ms.saturating_sub(begun)
        < u64::try_from(grace.bytes.as_millis()).unwrap_or(u64::MAX))
}

fn tombstone(tier: &dyn Tier, victim: &Victim, unix_ms: u64) -> Result<()> {
    let text = Tombstone { format: record::FORMAT, why: victim.why.clone(), unix_ms };
    let body =
        serde_json::to_vec(&text).map_err(|e| crate::Error::Bug(format!("tombstone: {e}")))?;
    let name = victim.key.file(TOMBSTONE);
    // One that is there already is as good. On a full disk an empty one is: its name is what
    // counts.
    match tier.create(&name, &record::seal(&body)) {
        Err(crate::Error::Io { source, .. })
            if source.kind() == std::io::ErrorKind::StorageFull =>
        {
            tier.create(&name, b"").map(drop)
        }
        other => other.map(drop),
    }
}

/// Deletes one rank's unfinished shard of a step that was given up: the others may still finish
/// theirs, so the step itself is left to the next collection.
///
/// # Errors
/// The tier did not answer.
pub fn drop_shard(tier: &dyn Tier, key: &CheckpointKey, rank: Rank) -> Result<()> {
    let listing = Listing::of(tier, key)?;
    if listing.sealed || listing.manifests.contains(&rank) {
        return Ok(());
    }
    for file in listing.payloads.get(&rank).into_iter().flatten() {
        tier.retire(&key.file(file))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        attempt::tests::{attempt, record},
        names::Step,
    };

    fn key(number: u32, step: u64) -> CheckpointKey {
        CheckpointKey::new(Step(step), &attempt(number))
    }

    /// One checkpoint: of attempt 1 up to step 10, of attempt 2, or of attempt 1 beyond (abandoned).
    #[derive(Clone, Copy, Debug)]
    struct One {
        sealed: bool,
        deleted: bool,
        pinned: bool,
        in_flight: bool,
        given_up: bool,
    }

    fn one() -> impl Strategy<Value = One> {
        (any::<bool>(), prop::bool::weighted(0.1), prop::bool::weighted(0.2), any::<(u8, u8)>())
            .prop_map(|(sealed, deleted, pinned, (a, b))| One {
                sealed,
                deleted,
                pinned,
                in_flight: !sealed && a < 64,
                given_up: !sealed && b < 64,
            })
    }

    proptest! {
        #[test]
        fn what_must_stay_stays_and_what_may_go_goes(
            first in prop::collection::vec(one(), 20),
            second in prop::collection::vec(one(), 10),
            keep_last in 1_usize..5,
            due_every in 1_u64..4,
            keep_every in prop::option::of(1_u64..6),
            abandoned in any::<bool>(),
            keep_hours in prop::option::of(1_u64..4),
            lapse in 0_u64..7_200_000,
        ) {
            let all: Vec<(CheckpointKey, One)> = (1..)
                .zip(first)
                .map(|(step, one)| (key(1, step), one))
                .chain((11..).zip(second).map(|(step, one)| (key(2, step), one)))
                .collect();
            let mut found: Vec<Found> = all
                .iter()
                .map(|(key, one)| Found {
                    key: key.clone(),
                    listings: vec![Listing {
                        sealed: one.sealed,
                        deleted: one.deleted,
                        manifests: vec![Rank(0)],
                        ..Listing::default()
                    }],
                })
                .collect();
            found.sort_by(|a, b| a.key.cmp(&b.key));
            let attempts =
                Attempts::of(vec![record(1, None, false), record(2, Some((1, 10)), true)]);
            let lineage = attempts.lineage(&[]);
            let that = |is: fn(&One) -> bool| -> BTreeSet<CheckpointKey> {
                all.iter().filter(|(_, one)| is(one)).map(|(key, _)| key.clone()).collect()
            };
            let (pins, in_flight) = (that(|o| o.pinned), that(|o| o.in_flight));
            let given_up = that(|o| o.given_up);
            let at = |key: &CheckpointKey| key.step.0 * lapse;
            let saved: Saved = all.iter().map(|(key, _)| (key.clone(), at(key))).collect();
            let known = Known {
                saved: &saved,
                found: &found,
                lineage: &lineage,
                attempts: &attempts,
                pins: &pins,
                in_flight: &in_flight,
                given_up: &given_up,
            };
            let policy =
                Policy { keep_last, every: due_every, keep_every, keep_hours, abandoned };
            let gone: BTreeSet<CheckpointKey> =
                plan(&policy, &known).into_iter().map(|v| v.key).collect();

            let whole = that(|o| o.sealed && !o.deleted);
            let mut line: Vec<&CheckpointKey> =
                whole.iter().filter(|k| lineage.contains(k)).collect();
            line.sort_by_key(|k| std::cmp::Reverse(k.step));
            let own_complete = line.iter().any(|k| k.attempt.number == 2);
            // What came before its turn counts where it is the newest of all, and stays for nothing else.
            let counts = |place: usize| place == 0 || line[place].step.0.is_multiple_of(due_every);
            for (place, kept) in line.iter().enumerate() {
                let last = counts(place) && (0..place).filter(|p| counts(*p)).count() < keep_last;
                let every = keep_every.is_some_and(|n| kept.step.0.is_multiple_of(n));
                let parent = **kept == key(1, 10) && !own_complete;
                let hour = |key: &CheckpointKey| keep_hours.map(|n| at(key) / (n * 3_600_000));
                let older = line.get(place + 1);
                let first = keep_hours.is_some() && older.is_none_or(|o| hour(o) != hour(kept));
                let stays =
                    last || every || first || pins.contains(kept) || parent;
                prop_assert_eq!(!gone.contains(kept), stays, "{:?}", kept);
            }
            prop_assert!(gone.is_disjoint(&pins) && gone.is_disjoint(&in_flight));
            prop_assert!(own_complete || !gone.contains(&key(1, 10)), "the parent");
            for key in gone.iter().filter(|k| !lineage.contains(k)) {
                let begun = !abandoned || line.is_empty();
                let rubbish = that(|o| o.deleted || o.given_up);
                prop_assert!(!begun || rubbish.contains(key), "an abandoned branch: {key:?}");
            }
            // A newer one that is not complete yet may become so.
            for key in gone.iter().filter(|k| lineage.contains(k)) {
                let newer = line.first().is_none_or(|newest| key.step >= newest.step);
                let rubbish = that(|o| o.deleted || o.given_up);
                prop_assert!(!newer || rubbish.contains(key), "{key:?}");
            }
        }
    }
}
