//! Retention on demand: what the command's `gc` stands on.
//!
//! It owns seeing that a job is alive, and giving back what only a live job would use again. What
//! goes and how is `retain`'s.

use std::{collections::BTreeSet, path::Path, time::Duration};

use crate::{
    clock::SystemClock,
    error::{Error, Result},
    names::{Rank, Step, parse_step_dir},
    ownership::{Ownership, is_held},
    place::start_lock_path,
    reader::Reader,
    restore::{
        decide::lineage_of,
        survey::{look_for_seals, survey},
    },
    retain::{self, Collected, Known, Policy, Victim},
    tier::{TierKind, disk::DiskTier},
};

/// What a collection would delete.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Oldest first, each with the bytes of its payloads.
    pub victims: Vec<(Victim, u64)>,
    /// A live process leads the newest attempt: what it has not sealed yet is left to it.
    pub live: bool,
    newest: u32,
    /// The newest step that is sealed.
    sealed: Option<Step>,
    ranks: Vec<u32>,
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
        // A bucket has no locks. What is not sealed there, and newer than all that is, is left alone anyway.
        Some(record) if disk.kind() == TierKind::Disk => {
            is_held(&start_lock_path(Path::new(&disk.address()), &record.attempt.id))?
        }
        _ => false,
    };
    let unsealed_of_live = found
        .iter()
        .filter(|f| live && !f.sealed() && newest.is_some_and(|r| f.key.attempt.is(&r.attempt)));
    let in_flight: BTreeSet<_> = unsealed_of_live.map(|f| f.key.clone()).collect();
    let pins = retain::pins(disk)?;
    let known = Known {
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
    let sealed = found.iter().filter(|f| f.sealed()).map(|f| f.key.step).max();
    Ok(Plan { victims, live, newest: newest.map_or(0, |r| r.attempt.number), sealed, ranks })
}

/// Carries a plan out; how it ended, and how many uploads of dead processes were ended in a bucket. Files
/// that retention keeps for the next save are given back too, but for those of live ranks.
///
/// # Errors
/// The tier did not answer; what was begun is finished by the next collection.
pub fn collect(reader: &Reader, plan: &Plan) -> Result<(Collected, usize)> {
    let home = reader.home();
    let victims: Vec<Victim> = plan.victims.iter().map(|(v, _)| v.clone()).collect();
    if home.kind() != TierKind::Disk {
        let collected = retain::collect(home, &victims, plan.newest)?;
        // A live job may be at what is newer than all that is sealed.
        let step_of = |name: &str| parse_step_dir(name.split('/').next().unwrap_or(""));
        let stays = |name: &str| step_of(name).is_some_and(|step| Some(step) > plan.sealed);
        return Ok((collected, home.sweep(&stays)?));
    }
    let root = home.address();
    let disk = DiskTier::open(Path::new(&root))?;
    let collected = retain::collect(&disk, &victims, plan.newest)?;
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
