//! Retention on demand: what the command's `gc` stands on.
//!
//! It owns seeing that a job is alive, and giving back what only a live job would use again. What
//! goes and how is `retain`'s.

use std::{collections::BTreeSet, path::Path, time::Duration};

use crate::{
    clock::{Clock, SystemClock},
    error::{Error, Result},
    names::{AttemptDir, AttemptRef, Rank, Step, parse_step_dir},
    ownership::{Ownership, is_held},
    place::start_lock_path,
    reader::Reader,
    restore::{
        decide::lineage_of,
        survey::{Found, look_for_seals, survey},
    },
    retain::{self, Collected, Grace, Known, Policy, Victim},
    tier::{TierKind, disk::DiskTier},
};

/// What a collection would delete.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Oldest first, each with the bytes of its payloads.
    pub victims: Vec<(Victim, u64)>,
    /// A live process leads the newest attempt: what it has not sealed yet is left to it.
    pub live: bool,
    newest: Option<AttemptRef>,
    /// The newest step of the lineage that is sealed, and the newest of the newest attempt.
    sealed: Option<Step>,
    sealed_own: Option<Step>,
    ranks: Vec<u32>,
}

impl Plan {
    fn number(&self) -> u32 {
        self.newest.map_or(0, |attempt| attempt.number)
    }

    /// A job that lives may be at this file of a bucket.
    fn is_left(&self, name: &str) -> bool {
        let mut parts = name.split('/');
        let step = parts.next().and_then(parse_step_dir);
        let dir = parts.next().and_then(AttemptDir::parse);
        let own = dir.zip(self.newest).is_some_and(|(dir, newest)| dir.is(&newest));
        step.is_some() && (step > self.sealed || (own && step > self.sealed_own))
    }
}

/// Plans a collection of the disk tier, or of a bucket.
///
/// # Errors
/// There is no such tier, or it did not answer.
pub fn plan(reader: &Reader, policy: &Policy) -> Result<Plan> {
    let disk = reader.home();
    if !matches!(disk.kind(), TierKind::Disk | TierKind::Object) {
        return Err(Error::invalid(format!(
            "{} is a ram tier: it is emptied by the job itself, or by deleting the directory when \
             no process uses it; collect in the destination",
            disk.address()
        )));
    }
    let mut found = survey(&[disk])?;
    look_for_seals(disk, &mut found)?;
    let attempts = reader.attempts()?;
    let lineage = lineage_of(&[disk], &found, &attempts)?;
    let newest = attempts.newest();
    let live = match newest {
        Some(record) if disk.kind() == TierKind::Disk => {
            is_held(&start_lock_path(Path::new(&disk.address()), &record.attempt.id))?
        }
        _ => false,
    };
    let own = found.iter().filter(|f| newest.is_some_and(|r| f.key.attempt.is(&r.attempt)));
    let sealed_own = own.clone().filter(|f| f.sealed()).map(|f| f.key.step).max();
    // A bucket has no locks: there a job may live, and be at what is newer than all that it sealed.
    let may_grow =
        |f: &&Found| live || (disk.kind() == TierKind::Object && Some(f.key.step) > sealed_own);
    let unsealed_of_live = own.filter(|f| !f.sealed()).filter(may_grow);
    let in_flight: BTreeSet<_> = unsealed_of_live.map(|f| f.key.clone()).collect();
    let pins = retain::pins(disk)?;
    let mut saved = retain::Saved::new();
    if policy.keep_hours.is_some() {
        retain::learn_times(disk, &found, &mut saved)?;
    }
    let known = Known {
        saved: &saved,
        found: &found,
        lineage: &lineage,
        attempts: &attempts,
        pins: &pins,
        in_flight: &in_flight,
        given_up: &BTreeSet::new(),
    };
    let mut victims = Vec::new();
    for victim in retain::plan(policy, &known) {
        let listing = found.iter().find(|f| f.key == victim.key).map(|f| &f.listings[0]);
        let mut bytes = 0_u64;
        for file in listing.into_iter().flat_map(|l| l.payloads.values().flatten()) {
            match disk.open(&victim.key.file(file)) {
                Ok(source) => bytes = bytes.saturating_add(source.len()),
                Err(e) if e.is_not_found() => {}
                Err(e) => return Err(e),
            }
        }
        victims.push((victim, bytes));
    }
    let mut ranks: Vec<u32> =
        attempts.records().iter().flat_map(|r| r.savers.iter().copied()).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let on_line = found.iter().filter(|f| f.sealed() && lineage.contains(&f.key));
    let sealed = on_line.map(|f| f.key.step).max();
    Ok(Plan { victims, live, newest: newest.map(|r| r.attempt), sealed, sealed_own, ranks })
}

/// Carries a plan out; how it ended, and how many uploads of dead processes were ended in a bucket. Files
/// that retention keeps for the next save are given back too, but for those of live ranks. `grace`: how long
/// bytes stay in a bucket after their checkpoint is gone ([`Bucket::grace`](crate::bucket::Bucket::grace)).
///
/// # Errors
/// The tier did not answer; what was begun is finished by the next collection.
pub fn collect(reader: &Reader, plan: &Plan, grace: Duration) -> Result<(Collected, usize)> {
    let home = reader.home();
    let victims: Vec<Victim> = plan.victims.iter().map(|(v, _)| v.clone()).collect();
    let grace = Grace { bytes: grace, unix_ms: SystemClock.unix_ms() };
    if home.kind() != TierKind::Disk {
        let collected = retain::collect(home, &victims, plan.number(), grace)?;
        return Ok((collected, home.sweep(&|name| plan.is_left(name))?));
    }
    let root = home.address();
    let disk = DiskTier::open(Path::new(&root))?;
    let collected = retain::collect(&disk, &victims, plan.number(), Grace::default())?;
    for rank in &plan.ranks {
        let path = Path::new(&root).join(format!("_locks/rank-{rank:06}"));
        let what = format!("rank {rank} of {root}");
        match Ownership::take(&path, &what, Duration::ZERO, &SystemClock) {
            Ok(_lock) => disk.sweep(Rank(*rank), false)?,
            Err(Error::Fenced { .. }) => {} // A live process will use them.
            Err(e) => return Err(e),
        }
    }
    Ok((collected, 0))
}
