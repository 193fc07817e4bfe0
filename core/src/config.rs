//! The settings of one rank's handle, with their defaults, units and environment variables.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    bucket::Bucket,
    error::{Doing, Error, Result},
    names::{Id, check_run_name},
    state::replicas::Rule,
    tier::object::address::is_url,
};

/// Beside the ram tier of a run that has no disk.
const HOME: &str = "_home";

/// Slots of a rank that has no disk, at least.
const SLOTS_TO_BUCKET: usize = 3;

/// The settings of one rank's handle on a run.
#[derive(Clone, Debug)]
pub struct Config {
    /// `<root>/<run>`: the disk tier's directory of this run; or its place in a bucket, where nothing goes to
    /// disk (`s3://bucket/root/run`: see [`home`](Self::home)).
    pub destination: PathBuf,
    /// The socket of the agent that owns the ram tier and this rank; `None`: this process does.
    pub agent: Option<PathBuf>,
    /// The file with the token by which an agent of tenants knows this process. `TIERKEEP_TOKEN_FILE`; else
    /// `/var/run/secrets/tierkeep/token`, where there is one.
    pub token_file: Option<PathBuf>,
    /// The directory that all runs of this user share for the ram tier. `TIERKEEP_RAM_DIR`; else
    /// `/dev/shm/tierkeep-<uid>`.
    pub ram_root: PathBuf,
    /// Limit of all files below `ram_root` together. `TIERKEEP_RAM_BYTES_MAX`; else a share of what
    /// tmpfs and the control group leave.
    pub ram_bytes_max: Option<u64>,
    /// This process.
    pub rank: u32,
    /// How many processes the job has, those included that do not save.
    pub world: u32,
    /// Every rank that saves, rising. The others restore what these saved.
    pub savers: Vec<u32>,
    /// Tensors that several of `savers` hold alike: stored once, the work spread. The first rule that
    /// matches counts; what other ranks share is this one's own. The same on all ranks.
    pub replicated: Vec<Rule>,
    /// The id of this start of the job, the same for all ranks, where something can tell them.
    /// `None`: rank 0 draws it, the others find it in the record whose lock rank 0 holds.
    pub attempt_id: Option<Id>,
    /// Slots a rank: one more than snapshots that are carried at once. `TIERKEEP_SLOTS`.
    pub slots: usize,
    /// Steps that are divisible by it go to disk. `TIERKEEP_DISK_EVERY`.
    pub disk_every: u64,
    /// Newest checkpoints that stay on disk. `TIERKEEP_KEEP_LAST`.
    pub keep_last: usize,
    /// Steps divisible by it stay on disk for ever. `TIERKEEP_KEEP_EVERY`.
    pub keep_every: Option<u64>,
    /// Threads of one copy; `None`: as many as help and are there. `TIERKEEP_THREADS`.
    pub threads: Option<usize>,
    /// How long a rank's lock is waited for.
    pub lock_wait: Duration,
    /// How long ranks wait for rank 0's record.
    pub attempt_wait: Duration,
    /// How long a save waits for a slot.
    pub slot_wait: Duration,
    /// How long a step may take to be sealed on disk before it is given up.
    pub disk_wait: Duration,
    /// Copies of each shard on other nodes, where the agent has others; `None`: 1. `TIERKEEP_REPLICAS`.
    pub replicas: Option<u32>,
    /// The bucket behind the disk, where there is one.
    pub bucket: Option<Bucket>,
    /// How long the copies of a step may take before it is given up.
    pub peer_wait: Duration,
    /// How long a rank waits for the others' shards of an older step before it takes that step's
    /// slot.
    pub stragglers_wait: Duration,
}

/// Whose shard `rank` restores of what these ranks saved, rising: its own, or that of the nearest below;
/// below the first, the first's. What is cut comes from whoever has it; this is for what a rank has alone.
#[must_use]
pub fn nearest_saver(savers: &[u32], rank: u32) -> u32 {
    let below = savers.iter().rev().find(|saver| **saver <= rank);
    below.or(savers.first()).copied().unwrap_or(rank)
}

impl Config {
    /// The defaults, then `TIERKEEP_*`.
    ///
    /// # Errors
    /// The run's name or a variable is not what it must be.
    pub fn new(destination: &Path) -> Result<Self> {
        let destination = absolute(destination)?;
        let run = destination.file_name().and_then(|n| n.to_str()).unwrap_or("");
        check_run_name(run)?;
        let seconds = Duration::from_secs;
        let url = destination.to_str().filter(|text| is_url(text));
        let bucket = url.map(|url| Bucket::new(url, 1)).transpose()?;
        // Without a disk, one that is on its way to the bucket keeps its slot meanwhile.
        let slots = if bucket.is_some() { SLOTS_TO_BUCKET } else { 2 };
        Ok(Self {
            destination,
            agent: None,
            token_file: crate::link::token_file(),
            ram_root: default_ram_root(),
            ram_bytes_max: ram_bytes_max()?,
            rank: 0,
            world: 1,
            savers: vec![0],
            replicated: Vec::new(),
            attempt_id: None,
            slots: number("TIERKEEP_SLOTS")?.unwrap_or(slots),
            disk_every: number("TIERKEEP_DISK_EVERY")?.unwrap_or(1),
            keep_last: number("TIERKEEP_KEEP_LAST")?.unwrap_or(2),
            keep_every: number("TIERKEEP_KEEP_EVERY")?,
            threads: number("TIERKEEP_THREADS")?,
            lock_wait: seconds(10),
            attempt_wait: seconds(120),
            slot_wait: seconds(600),
            disk_wait: seconds(1800),
            replicas: number("TIERKEEP_REPLICAS")?,
            bucket,
            peer_wait: seconds(120),
            stragglers_wait: seconds(10),
        })
    }

    /// Checks what the fields say together.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the field.
    pub fn check(&self) -> Result<()> {
        let savers = &self.savers;
        let wrong = if !savers.is_sorted_by(|a, b| a < b) || savers.is_empty() {
            format!("savers = {savers:?}: ranks must be rising, and at least one")
        } else if let Some(far) = savers.iter().rev().find(|r| **r >= self.world) {
            format!("savers = {savers:?}: there is no rank {far}, the job has {} ranks", self.world)
        } else if self.rank >= self.world {
            format!("rank = {}: the job has {} ranks, counted from 0", self.rank, self.world)
        } else if self.slots < 2 {
            format!(
                "slots = {}: at least 2, or a save would overwrite the newest checkpoint",
                self.slots
            )
        } else if self.is_bucket_only() && self.slots < SLOTS_TO_BUCKET {
            format!(
                "slots = {}: at least {SLOTS_TO_BUCKET} without a disk: the newest checkpoint, the one on \
                 its way to the bucket, and the next",
                self.slots
            )
        } else if self.is_bucket_only() && !self.is_in_its_bucket() {
            format!(
                "{}: without a disk the destination is the bucket's",
                self.destination.display()
            )
        } else if self.disk_every == 0 || self.keep_every == Some(0) {
            "disk_every and keep_every count steps from 1".into()
        } else if self.keep_last == 0 {
            "keep_last = 0: the last good checkpoint is never deleted, say 1 or more".into()
        } else if self.threads == Some(0) {
            "threads = 0: at least 1".into()
        } else if let Some(rule) = self.replicated.iter().find(|rule| !self.is_known(rule)) {
            format!(
                "replicated: {:?} over ranks {:?}: they must be rising, and among those that save \
                 ({savers:?})",
                rule.pattern, rule.ranks
            )
        } else {
            let through = if self.is_bucket_only() { 1 } else { self.disk_every };
            return self.bucket.as_ref().map_or(Ok(()), |bucket| bucket.check(through));
        };
        Err(Error::invalid(wrong))
    }

    fn is_in_its_bucket(&self) -> bool {
        let url = self.bucket.as_ref().map(|bucket| bucket.url.as_str());
        url.is_some() && self.destination.to_str() == url
    }

    fn is_known(&self, rule: &Rule) -> bool {
        let known = rule.ranks.iter().all(|rank| self.savers.contains(rank));
        known && rule.ranks.is_sorted_by(|a, b| a < b)
    }

    /// The rank that creates attempt records and leads the disk tier.
    #[must_use]
    pub fn leader(&self) -> u32 {
        self.savers.first().copied().unwrap_or(self.rank)
    }

    /// True for the leader.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.rank == self.leader()
    }

    /// True where this rank is one of those that save.
    #[must_use]
    pub fn saves(&self) -> bool {
        self.savers.contains(&self.rank)
    }

    /// True where there is nobody to agree with.
    #[must_use]
    pub fn is_lone(&self) -> bool {
        self.world == 1
    }

    /// Nothing goes to disk: checkpoints go from RAM to the bucket.
    #[must_use]
    pub fn is_bucket_only(&self) -> bool {
        self.destination.to_str().is_some_and(is_url)
    }

    /// The directory of this node where records, claims, decisions and locks of the run lie: the disk tier's,
    /// or, without a disk, one beside the ram tier. Then they are gone with a reboot, as all that they speak
    /// of is; the bucket has the records of the attempts.
    #[must_use]
    pub fn home(&self) -> PathBuf {
        home(&self.ram_root, &self.destination)
    }

    /// Where the ram tier of this run lies: apart for each destination, so that two runs of one
    /// name in two places do not meet.
    #[must_use]
    pub fn ram_dir(&self) -> PathBuf {
        ram_dir(&self.ram_root, &self.destination)
    }
}

/// A link to the destination is the same destination.
pub(crate) fn real(destination: &Path) -> PathBuf {
    destination.canonicalize().unwrap_or_else(|_| {
        let parent = destination.parent().and_then(|p| p.canonicalize().ok());
        match (parent, destination.file_name()) {
            (Some(parent), Some(name)) => parent.join(name),
            _ => destination.into(),
        }
    })
}

/// Where a run's records lie on this node ([`Config::home`]).
pub(crate) fn home(ram_root: &Path, destination: &Path) -> PathBuf {
    match destination.to_str().is_some_and(is_url) {
        true => {
            let run = destination.file_name().unwrap_or_default();
            ram_dir(ram_root, destination).join(HOME).join(run)
        }
        false => destination.into(),
    }
}

/// `<ram_root>/<run>-<8 hex of the destination's hash>`
#[must_use]
pub fn ram_dir(ram_root: &Path, destination: &Path) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    let real = real(destination);
    let hash = crate::manifest::sha256(real.as_os_str().as_bytes());
    let run = real.file_name().unwrap_or_default().to_string_lossy();
    ram_root.join(format!("{run}-{}", &hash[..8]))
}

/// `TIERKEEP_RAM_DIR`, else `/dev/shm/tierkeep-<uid>`.
#[must_use]
pub fn default_ram_root() -> PathBuf {
    std::env::var_os("TIERKEEP_RAM_DIR").filter(|v| !v.is_empty()).map_or_else(
        || format!("/dev/shm/tierkeep-{}", rustix::process::getuid().as_raw()).into(),
        PathBuf::from,
    )
}

/// `TIERKEEP_RAM_BYTES_MAX`, where it is set.
///
/// # Errors
/// It is not a whole number.
pub fn ram_bytes_max() -> Result<Option<u64>> {
    number("TIERKEEP_RAM_BYTES_MAX")
}

pub(crate) fn absolute(path: &Path) -> Result<PathBuf> {
    if path.as_os_str().is_empty() {
        return Err(Error::invalid("the destination is empty: it is <root>/<run>"));
    }
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(Error::invalid(format!("the destination {path:?} has a NUL in it")));
    }
    if let Some(url) = path.to_str().filter(|text| is_url(text)) {
        return Ok(url.trim_end_matches('/').into());
    }
    std::path::absolute(path).at("find", path)
}

pub(crate) fn number<T: std::str::FromStr>(name: &str) -> Result<Option<T>> {
    match std::env::var(name) {
        Ok(text) if text.is_empty() => Ok(None),
        Ok(text) => text
            .parse()
            .map(Some)
            .map_err(|_| Error::invalid(format!("{name} is {text:?}: it must be a whole number"))),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(e) => Err(Error::invalid(format!("{name}: {e}"))),
    }
}
