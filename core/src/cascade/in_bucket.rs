//! What a cascade does in the bucket beside sending shards: the records of the attempts, the seal, and what
//! retention lets go.
//!
//! # Invariants
//!
//! - The seal is written by a leader that found no newer attempt in the bucket right before.
//! - What is on its way is not collected, nor what a superseded leader would collect.

use std::collections::BTreeSet;

use super::{Cascade, to_object::Far};
use crate::{
    attempt::{self, Attempts},
    commit::{Gathered, Listing, gather},
    error::{Error, Result},
    manifest::replicated::differences_in_words,
    names::{ATTEMPTS, CheckpointKey, attempt_file, parse_attempt_file, ranks},
    observe::locked,
    restore::{
        decide::lineage_of,
        survey::{look_for_seals, survey},
    },
    retain,
    tier::Tier,
};

impl Cascade {
    /// The bucket tells the lineage without this cluster: it has the record of every attempt.
    pub(super) fn keep_records_in_bucket(&self, far: &Far) -> Result<()> {
        if !self.parts.config.leads() || locked(&self.sending).has_records {
            return Ok(());
        }
        let here: [&dyn Tier; 2] = [&*self.parts.disk, &*self.parts.ram];
        attempt::keep_missing(&Attempts::load(&here)?, &here, &*far.tier)?;
        locked(&self.sending).has_records = true;
        Ok(())
    }

    pub(super) fn seal_in_bucket(&self, far: &Far, key: &CheckpointKey) -> Result<()> {
        let tier = &*far.tier;
        if Listing::of(tier, key)?.sealed {
            return Ok(());
        }
        match gather(tier, key, &self.parts.config.savers)? {
            Gathered::Complete(complete) => {
                self.check_bucket_fence(tier)?;
                complete.seal(tier).map(drop)
            }
            Gathered::Differ(list) => {
                Err(Error::Broken { what: key.to_string(), why: differences_in_words(&list) })
            }
            Gathered::Deleted => Err(Error::Fenced { why: format!("{key} is being deleted") }),
            // They were acknowledged: a listing that lags.
            Gathered::Missing(missing) => Err(Error::Io {
                what: format!("see the shards of {}", ranks(&missing)),
                source: std::io::Error::other("the bucket does not list them yet"),
            }),
        }
    }

    /// A newer attempt of this run has begun, perhaps in another cluster: nothing of this one is sealed.
    fn check_bucket_fence(&self, tier: &dyn Tier) -> Result<()> {
        let own = self.parts.record.attempt;
        let names = tier.list(ATTEMPTS)?;
        let newest = names.iter().filter_map(|entry| parse_attempt_file(&entry.name)).max();
        // A listing may lag, and a store that does not decide may have let another start take the number:
        // these two are read by name.
        match attempt::read_file(tier, &attempt_file(own.number), own.number) {
            Ok((record, _)) if record.attempt.id != own.id => {
                let why = format!("another start of this run has taken attempt {}", own.number);
                return Err(Error::Fenced { why: format!("{why}: {own} writes no more") });
            }
            Ok(_) | Err(Error::Damaged { .. }) => {}
            Err(e) if e.is_not_found() => {}
            Err(e) => return Err(e),
        }
        let next = match tier.open(&attempt_file(own.number + 1)) {
            Ok(_) => Some(own.number + 1),
            Err(e) if e.is_not_found() => None,
            Err(e) => return Err(e),
        };
        match newest.max(next) {
            Some(number) if number > own.number => Err(Error::Fenced {
                why: format!("attempt {number} of this run has begun: {own} writes no more"),
            }),
            _ => Ok(()),
        }
    }

    /// Deletes what the policy lets go there.
    pub(super) fn retain_in_bucket(&self, far: &Far) -> Result<()> {
        let tier = &*far.tier;
        let mut found = survey(&[tier])?;
        look_for_seals(tier, &mut found)?;
        let attempts = Attempts::load(&[tier])?;
        let newest = attempts.newest().map_or(0, |r| r.attempt.number);
        if newest != self.parts.record.attempt.number {
            return Ok(()); // Superseded: its leader collects.
        }
        let lineage = lineage_of(&[tier], &found, &attempts)?;
        let policy = retain::Policy {
            keep_last: far.settings.keep_last,
            every: far.settings.every,
            keep_every: far.settings.keep_every,
            keep_hours: far.settings.keep_hours,
            abandoned: false,
        };
        let in_flight: BTreeSet<CheckpointKey> = self.kept_for_bucket().into_iter().collect();
        let mut saved = std::mem::take(&mut locked(&self.sending).saved);
        let learned = match policy.keep_hours {
            Some(_) => retain::learn_times(tier, &found, &mut saved),
            None => Ok(()),
        };
        locked(&self.sending).saved.clone_from(&saved);
        learned?;
        let known = retain::Known {
            saved: &saved,
            found: &found,
            lineage: &lineage,
            attempts: &attempts,
            pins: &retain::pins(tier)?,
            in_flight: &in_flight,
            given_up: &Default::default(),
        };
        let grace =
            retain::Grace { bytes: far.settings.grace, unix_ms: self.parts.clock.unix_ms() };
        retain::collect(tier, &retain::plan(&policy, &known), newest, grace)?;
        // What dead processes began, and no rank is at: this is the newest attempt, and between two steps.
        let kept: Vec<String> = in_flight.iter().map(CheckpointKey::dir).collect();
        let stays = |name: &str| kept.iter().any(|dir| name.starts_with(dir.as_str()));
        let ended = tier.sweep(&stays)?;
        if ended > 0 {
            tracing::info!("ended {ended} uploads in the bucket that dead processes had left");
        }
        Ok(())
    }
}
