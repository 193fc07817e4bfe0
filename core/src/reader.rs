//! Looking at a run with the job down (or up): what the command and `tierkeep.load` stand on.
//!
//! It creates no attempt, takes no lock and mends nothing.

use std::{io::ErrorKind, path::Path, sync::Arc};

use crate::{
    attempt::{Attempts, Lineage},
    config,
    error::{Doing, Error, Result},
    names::{CheckpointKey, Rank, Step},
    observe::Observer,
    restore::{
        asks::Rest,
        decide::{Wish, decide, lineage_of},
        read::Restorable,
        survey::{
            BadCopy, Found, Look, Reach, ShardCopy, ShardLook, bad_mark_name, bad_marks, copies_of,
            look, survey,
        },
    },
    retain,
    snapshot::arena::SLOTS,
    tier::{
        Tier, TierKind,
        disk::DiskTier,
        memory::MemoryTier,
        object::{
            self,
            address::{Options, is_url},
        },
    },
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
    /// Every rank's shard that some tier has a part of.
    pub shards: Vec<ShardLook>,
    /// When the last rank saved, in ms since 1970 by its wall clock; 0 where nothing says so.
    pub saved_unix_ms: u64,
    /// Ranks that once found no good copy of their shard; a resume passes the step over.
    pub marked_bad: Vec<Rank>,
}

impl StepInfo {
    /// Bytes of all shards, each counted once.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.shards.iter().fold(0, |sum, s| sum.saturating_add(s.bytes))
    }
}

/// A run as far as it can be told: damage to one part of it does not hide the others.
#[derive(Debug)]
pub struct Overview {
    /// Every checkpoint, oldest first.
    pub steps: Vec<StepInfo>,
    /// What a resume would take.
    pub resume: Option<CheckpointKey>,
    /// Newer ones that it would pass over, one sentence each.
    pub passed_over: Vec<String>,
    /// Why the lineage, or what a resume would take, cannot be told.
    pub trouble: Vec<Error>,
}

impl Reader {
    /// The run at `destination`: its disk directory, and the ram tier below `ram_root` (default:
    /// this user's) that belongs to it. A directory of the ram tier itself can be given too.
    ///
    /// # Errors
    /// There is no such directory in either tier.
    pub fn open(destination: &Path, ram_root: Option<&Path>) -> Result<Self> {
        Self::open_with(destination, ram_root, &Options::new())
    }

    /// The same, where the destination may be in a bucket (`s3://bucket/root/run`) that is reached with
    /// `options`, beside what the environment says.
    ///
    /// # Errors
    /// As [`Reader::open`]; or the bucket does not answer, or not to these credentials.
    pub fn open_with(
        destination: &Path,
        ram_root: Option<&Path>,
        options: &Options,
    ) -> Result<Self> {
        let destination = &*config::absolute(destination)?;
        let root = ram_root.map_or_else(config::default_ram_root, Into::into);
        let ram = config::ram_dir(&root, destination);
        let mut tiers: Vec<Arc<dyn Tier>> = Vec::new();
        if is_dir(&ram)? {
            tiers.push(Arc::new(MemoryTier::reader(&ram)));
        }
        if let Some(url) = destination.to_str().filter(|text| is_url(text)) {
            let bucket = object::open(url, options)?;
            if bucket.list("")?.is_empty() && tiers.is_empty() {
                let what =
                    format!("run {url} (no object lies there, nor a run in {})", root.display());
                return Err(Error::NotFound { what });
            }
            tiers.push(bucket);
            return Ok(Self { tiers });
        }
        if destination.is_file() {
            return Err(Error::invalid(format!(
                "{} is a file: a run is a directory, <root>/<run>",
                destination.display()
            )));
        }
        if is_ram_dir(destination, &root) {
            tiers = vec![Arc::new(MemoryTier::reader(destination))];
        } else if is_dir(destination)? {
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

    /// The tier that a run's records, pins and marks lie in: a disk or a bucket where there is one.
    #[must_use]
    pub fn home(&self) -> &dyn Tier {
        let keeps = |kind| matches!(kind, TierKind::Disk | TierKind::Object);
        let home = self.tiers.iter().find(|t| keeps(t.kind()));
        &**home.unwrap_or(&self.tiers[0])
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
        self.infos(&found, attempts.newest().map(|r| &r.run_id), &lineage)
    }

    /// Every checkpoint and what a resume would take, as far as it can be told.
    ///
    /// # Errors
    /// A tier did not answer.
    pub fn overview(&self) -> Result<Overview> {
        let found = survey(&self.tiers())?;
        let mut view =
            Overview { steps: vec![], resume: None, passed_over: vec![], trouble: vec![] };
        let (mut run_id, mut lineage) = (None, Lineage::default());
        match self.attempts() {
            Ok(attempts) => {
                run_id = attempts.newest().map(|r| r.run_id);
                match lineage_of(&self.tiers(), &found, &attempts) {
                    Ok(known) => lineage = known,
                    Err(e) => view.trouble.push(e),
                }
                match decide(&self.tiers(), self.home(), &attempts, &Wish::default()) {
                    Ok(decision) => {
                        view.resume = decision.parent.map(|p| p.key());
                        view.passed_over = decision.passed_over;
                    }
                    // The same sentence as from the lineage.
                    Err(_) if !view.trouble.is_empty() => {}
                    Err(e) => view.trouble.push(e),
                }
            }
            Err(e) => view.trouble.push(e),
        }
        view.steps = self.infos(&found, run_id.as_ref(), &lineage)?;
        Ok(view)
    }

    fn infos(
        &self,
        found: &[Found],
        run_id: Option<&crate::names::Id>,
        lineage: &Lineage,
    ) -> Result<Vec<StepInfo>> {
        let pins = retain::pins(self.home())?;
        let marks = bad_marks(self.home())?;
        let info = |f: &Found| {
            let looked = match look(&self.tiers(), f, run_id) {
                // One step of a newer tierkeep does not hide the others.
                Err(e @ Error::NewerFormat { .. }) => {
                    Look { reach: Reach::Broken(vec![e.chain()]), shards: vec![], saved_unix_ms: 0 }
                }
                other => other?,
            };
            let ranks = self.tiers.iter().zip(&f.listings);
            let of_it = |(step, number, _): &&(Step, u32, Rank)| {
                *step == f.key.step && *number == f.key.attempt.number
            };
            Ok(StepInfo {
                key: f.key.clone(),
                reach: looked.reach,
                sealed: f.sealed(),
                in_lineage: lineage.contains(&f.key),
                pinned: pins.contains(&f.key),
                ranks: ranks.map(|(t, l)| (t.kind(), l.manifests.clone())).collect(),
                shards: looked.shards,
                saved_unix_ms: looked.saved_unix_ms,
                marked_bad: marks.iter().filter(of_it).map(|(.., rank)| *rank).collect(),
            })
        };
        found.iter().map(info).collect()
    }

    /// Takes away the marks of ranks that once found no good copy of this checkpoint: for one that
    /// was verified since. The ranks whose mark went.
    ///
    /// # Errors
    /// The tier did not answer, or may not be written.
    pub fn clear_marks(&self, key: &CheckpointKey) -> Result<Vec<Rank>> {
        let home = self.home();
        let marks = bad_marks(home)?.into_iter();
        let of_it = marks.filter(|(s, n, _)| *s == key.step && *n == key.attempt.number);
        of_it.map(|(.., rank)| home.delete(&bad_mark_name(key, rank)).map(|()| rank)).collect()
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

    /// What one rank gets back of a checkpoint: its shard, with those of other ranks that store
    /// tensors of it.
    ///
    /// # Errors
    /// No tier has a good copy of a manifest.
    pub fn state(&self, key: &CheckpointKey, rank: Rank) -> Result<Restorable> {
        let mut own = self.shard(key, rank)?;
        let others: Vec<Rank> = own.leaves_to().into_iter().collect();
        own.others = self.shards(key, &others)?;
        Ok(own)
    }

    /// Finds the shards of other ranks of it.
    pub(crate) fn rest(&self, key: &CheckpointKey) -> Rest {
        let (reader, key) = (self.clone(), key.clone());
        Rest::new(move |ranks| reader.shards(&key, ranks))
    }

    /// One rank's shard of a checkpoint alone, with all its copies.
    ///
    /// # Errors
    /// No tier has a good copy of its manifest.
    pub fn shard(&self, key: &CheckpointKey, rank: Rank) -> Result<Restorable> {
        let found = self.shards(key, &[rank])?.pop();
        found.ok_or_else(|| Error::Bug("no shard of one rank".into()))
    }

    /// The same of several ranks, in their order.
    ///
    /// # Errors
    /// No tier has a good copy of a manifest.
    pub fn shards(&self, key: &CheckpointKey, ranks: &[Rank]) -> Result<Vec<Restorable>> {
        if ranks.is_empty() {
            return Ok(Vec::new());
        }
        let tiers = self.tiers();
        let listings: Result<Vec<_>> =
            tiers.iter().map(|t| crate::commit::Listing::of(*t, key)).collect();
        let found = Found { key: key.clone(), listings: listings? };
        let run_id = self.attempts()?.newest().map(|r| r.run_id);
        let looked = copies_of(&tiers, &found, ranks, run_id.as_ref())?;
        let shard = |(rank, (good, bad)): (&Rank, (Vec<ShardCopy>, Vec<BadCopy>))| {
            if good.is_empty() {
                let why: Vec<String> = bad.into_iter().map(|b| b.why).collect();
                let why = if why.is_empty() { "no tier has it".into() } else { why.join("; ") };
                return Err(Error::Lost { step: key.step, rank: *rank, why });
            }
            let (tiers, copies) = (self.tiers.clone(), (good, bad));
            let found = Restorable::of(key.clone(), *rank, tiers, copies, Observer::default());
            Ok(Restorable { rest: Some(self.rest(key)), ..found })
        };
        ranks.iter().zip(looked).map(shard).collect()
    }

    /// Pins the newest complete checkpoint of `step`, or takes its pin away.
    ///
    /// # Errors
    /// There is none.
    pub fn pin(&self, step: Step, attempt: Option<u32>, pinned: bool) -> Result<()> {
        // Each tier that collects looks for its own.
        let collects = |tier: &&dyn Tier| matches!(tier.kind(), TierKind::Disk | TierKind::Object);
        let mut homes: Vec<&dyn Tier> = self.tiers().into_iter().filter(collects).collect();
        if homes.is_empty() {
            homes.push(self.home());
        }
        if !pinned {
            for home in homes {
                for key in retain::pins(home)?.into_iter().filter(|k| k.step == step) {
                    retain::unpin(home, &key)?;
                }
            }
            return Ok(());
        }
        let wish = Wish { step: Some(step), attempt, accept_older: false };
        let (key, ..) = self.choose(&wish)?;
        homes.into_iter().try_for_each(|home| retain::pin(home, &key))
    }
}

/// Whether there is such a directory. A place that does not answer is not "no".
fn is_dir(path: &Path) -> Result<bool> {
    match std::fs::metadata(path) {
        Ok(meta) => Ok(meta.is_dir()),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(false),
        Err(e) => Err(e).at("look for", path),
    }
}

/// True for a run's directory in the ram tier: it lies in the ram root, or has slots.
fn is_ram_dir(path: &Path, root: &Path) -> bool {
    let parent = path.canonicalize().ok().and_then(|p| p.parent().map(Path::to_path_buf));
    let in_root = parent.is_some() && parent == root.canonicalize().ok();
    path.is_dir() && (in_root || path.join(SLOTS).is_dir())
}
