//! Looking at a run with the job down (or up): what the command and `tierkeep.load` stand on.
//!
//! It creates no attempt, takes no lock and mends nothing.

use std::{path::Path, sync::Arc};

use crate::{
    attempt::{Attempts, Lineage},
    config,
    error::{Error, Result},
    names::{CheckpointKey, Rank, Step},
    observe::Observer,
    restore::{
        decide::{Wish, decide, lineage_of},
        read::Restorable,
        survey::{Found, Reach, copies, reach, survey},
    },
    retain,
    tier::{Tier, TierKind, disk::DiskTier, memory::MemoryTier},
};

/// The tiers of one run, for reading.
#[derive(Clone, Debug)]
pub struct Reader {
    tiers: Vec<Arc<dyn Tier>>,
}

/// One checkpoint as people ask about it.
#[derive(Clone, Debug)]
pub struct StepInfo {
    /// Which.
    pub key: CheckpointKey,
    /// Whether it can be restored.
    pub reach: Reach,
    /// Sealed on disk.
    pub sealed: bool,
    /// A resume may land on it.
    pub in_lineage: bool,
    /// Retention leaves it alone.
    pub pinned: bool,
    /// Ranks with a manifest, for each tier.
    pub ranks: Vec<(TierKind, Vec<Rank>)>,
}

impl Reader {
    /// The run at `destination`: its disk directory, and the ram tier below `ram_root` (default: this
    /// user's) that belongs to it.
    ///
    /// # Errors
    /// There is no such directory in either tier.
    pub fn open(destination: &Path, ram_root: Option<&Path>) -> Result<Self> {
        let root = ram_root.map_or_else(config::default_ram_root, Into::into);
        let ram = config::ram_dir(&root, destination);
        let mut tiers: Vec<Arc<dyn Tier>> = Vec::new();
        if ram.is_dir() {
            tiers.push(Arc::new(MemoryTier::reader(&ram)));
        }
        if destination.is_file() {
            return Err(Error::invalid(format!(
                "{} is a file: a run is a directory, <root>/<run>",
                destination.display()
            )));
        }
        if destination.is_dir() {
            tiers.push(Arc::new(DiskTier::reader(destination)));
        }
        if tiers.is_empty() {
            return Err(Error::NotFound {
                what: format!(
                    "run {} (no such directory on disk, nor in {})",
                    destination.display(),
                    root.display()
                ),
            });
        }
        Ok(Self { tiers })
    }

    /// Over tiers that are open already, nearest first.
    #[must_use]
    pub fn of(tiers: Vec<Arc<dyn Tier>>) -> Self {
        Self { tiers }
    }

    /// The tiers, nearest first.
    #[must_use]
    pub fn tiers(&self) -> Vec<&dyn Tier> {
        self.tiers.iter().map(|t| &**t).collect()
    }

    /// The tier that a run's records lie in: disk where there is one.
    fn home(&self) -> &dyn Tier {
        let disk = self.tiers.iter().find(|t| t.kind() == TierKind::Disk);
        &**disk.unwrap_or(&self.tiers[0])
    }

    fn durable_first(&self) -> Vec<&dyn Tier> {
        self.tiers().into_iter().rev().collect()
    }

    /// Every attempt.
    ///
    /// # Errors
    /// A tier did not answer, or a record is damaged everywhere.
    pub fn attempts(&self) -> Result<Attempts> {
        Attempts::load(&self.durable_first())
    }

    /// The lineage, and everything that the tiers list.
    ///
    /// # Errors
    /// A tier did not answer.
    pub fn survey(&self) -> Result<(Vec<Found>, Attempts, Lineage)> {
        let found = survey(&self.tiers())?;
        let attempts = self.attempts()?;
        let lineage = lineage_of(&self.tiers(), &found, &attempts)?;
        Ok((found, attempts, lineage))
    }

    /// Every checkpoint, oldest first.
    ///
    /// # Errors
    /// A tier did not answer.
    pub fn steps(&self) -> Result<Vec<StepInfo>> {
        let (found, attempts, lineage) = self.survey()?;
        let pins = retain::pins(self.home())?;
        let run_id = attempts.newest().map(|r| r.run_id);
        let info = |f: Found| {
            let ranks = self.tiers.iter().zip(&f.listings);
            Ok(StepInfo {
                reach: reach(&self.tiers(), &f, run_id.as_ref())?,
                sealed: f.sealed(),
                in_lineage: lineage.contains(&f.key),
                pinned: pins.contains(&f.key),
                ranks: ranks.map(|(t, l)| (t.kind(), l.manifests.clone())).collect(),
                key: f.key,
            })
        };
        found.into_iter().map(info).collect()
    }

    /// The checkpoint that a resume would take, or the one that is wished for.
    ///
    /// # Errors
    /// There is none, or a tier did not answer.
    pub fn choose(&self, wish: &Wish) -> Result<(CheckpointKey, Vec<u32>, Vec<String>)> {
        let attempts = self.attempts()?;
        let decision = decide(&self.tiers(), self.home(), &attempts, wish)?;
        let parent = decision.parent.ok_or_else(|| Error::NotFound {
            what: if decision.passed_over.is_empty() {
                format!("a complete checkpoint in {}", self.home().address())
            } else {
                format!(
                    "a good checkpoint in {} ({})",
                    self.home().address(),
                    decision.passed_over.join("; ")
                )
            },
        })?;
        Ok((parent.key(), decision.savers, decision.passed_over))
    }

    /// One rank's shard of a checkpoint, with all its copies.
    ///
    /// # Errors
    /// No tier has a good copy of its manifest.
    pub fn shard(&self, key: &CheckpointKey, rank: Rank) -> Result<Restorable> {
        let tiers = self.tiers();
        let listings: Result<Vec<_>> =
            tiers.iter().map(|t| crate::commit::Listing::of(*t, key)).collect();
        let found = Found { key: key.clone(), listings: listings? };
        let run_id = self.attempts()?.newest().map(|r| r.run_id);
        let (good, bad) = copies(&tiers, &found, rank, run_id.as_ref())?;
        if good.is_empty() {
            let why: Vec<String> = bad.into_iter().map(|b| b.why).collect();
            let why = if why.is_empty() { "no tier has it".into() } else { why.join("; ") };
            return Err(Error::Lost { step: key.step, rank, why });
        }
        Ok(Restorable {
            key: key.clone(),
            rank,
            tiers: self.tiers.clone(),
            copies: good,
            bad,
            slot: None,
            observer: Observer::default(),
            mends: false,
        })
    }

    /// Pins the newest complete checkpoint of `step`, or takes its pin away.
    ///
    /// # Errors
    /// There is none.
    pub fn pin(&self, step: Step, attempt: Option<u32>, pinned: bool) -> Result<()> {
        let home = self.home();
        if !pinned {
            for key in retain::pins(home)?.into_iter().filter(|k| k.step == step) {
                retain::unpin(home, &key)?;
            }
            return Ok(());
        }
        let wish = Wish { step: Some(step), attempt, accept_older: false };
        let (key, ..) = self.choose(&wish)?;
        retain::pin(home, &key)
    }
}
