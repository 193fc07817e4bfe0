//! Memory is a budget in bytes. It is counted from the files that exist, under a lock that all
//! processes of the root take, so sixteen jobs of one user share it and none can pass it.
//!
//! # Invariants
//!
//! - The files below the root never take more than `bytes_max` together.
//! - Memory that `grow` granted is there: the pages are allocated before it returns, so a later
//!   store cannot find tmpfs full (which the kernel reports as SIGBUS).
//! - The lock is held for the sum, not for the allocation: a file's length reserves what its pages
//!   will take, and a hundred gigabytes of zeroing keep no other rank waiting.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use rustix::fs::FallocateFlags;

use crate::{
    clock::{Clock, Deadline, SystemClock},
    error::{Doing, Error, Result},
    observe::locked,
    sys,
};

/// Of the memory that tmpfs and the control group leave, this share is ours by default: the rest is
/// for NCCL, data loaders and other users of `/dev/shm`.
const SHARE_PERCENT: u64 = 80;

/// The sum of all files below a directory, and its limit.
#[derive(Clone, Debug)]
pub struct Budget {
    root: PathBuf,
    bytes_max: Option<u64>,
    /// Other directories that the limit is for as well.
    among: Option<Counted>,
    /// A limit of one directory below the root.
    quota: Option<(PathBuf, u64)>,
}

/// Directories that one limit is for.
pub(crate) type Counted = Arc<Mutex<BTreeSet<PathBuf>>>;

impl Budget {
    /// A budget over everything below `root` (made where it is missing). Without `bytes_max` it is
    /// a share of what tmpfs and the memory control group leave, taken anew at each request.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn open(root: &Path, bytes_max: Option<u64>) -> Result<Self> {
        make_root(root)?;
        Ok(Self { root: root.into(), bytes_max, among: None, quota: None })
    }

    /// One limit for this root and others, of other users too.
    pub(crate) fn among(self, others: Counted) -> Self {
        Self { among: Some(others), ..self }
    }

    /// A limit for `dir` of its own, beside that of all.
    pub(crate) fn with_quota(self, dir: &Path, bytes_max: Option<u64>) -> Self {
        Self { quota: bytes_max.map(|max| (dir.into(), max)), ..self }
    }

    /// The directory that it counts.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Bytes that all files below the root take now.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn used(&self) -> Result<u64> {
        Ok(self.usage()?.used)
    }

    fn usage(&self) -> Result<Usage> {
        let count = |root: &Path| used_below(root, 0).at("count the files below", root);
        let Some(among) = &self.among else { return count(&self.root) };
        let roots = locked(among).clone();
        // With the process's own rights: those of other users are theirs alone.
        let acting = sys::set_files_uid(rustix::process::geteuid().as_raw());
        let sum = roots.iter().try_fold(Usage::default(), |sum, root| {
            let part = match count(root) {
                Ok(part) => part,
                // Another user's, who may have put anything there: nobody else has to do without.
                Err(e) if *root != self.root => {
                    tracing::warn!("{}", e.chain());
                    return Ok(sum);
                }
                Err(e) => return Err(e),
            };
            let used = sum.used.saturating_add(part.used);
            Ok(Usage { used, reserved: sum.reserved.saturating_add(part.reserved) })
        });
        sys::set_files_uid(acting);
        sum
    }

    /// The limit in force now, in bytes, and where it comes from.
    ///
    /// # Errors
    /// The file system did not answer.
    pub fn limit(&self, used: u64) -> Result<(u64, String)> {
        if let Some(max) = self.bytes_max {
            return Ok((max, "TIERKEEP_RAM_BYTES_MAX (ram_bytes_max)".into()));
        }
        let free = crate::tier::disk::free_bytes(&self.root).at("stat", &self.root)?;
        let mut limit = used.saturating_add(free);
        let mut from = format!("{SHARE_PERCENT} % of the tmpfs at {}", self.root.display());
        if let Some(headroom) = group_headroom()
            && used.saturating_add(headroom) < limit
        {
            limit = used.saturating_add(headroom);
            from = format!("{SHARE_PERCENT} % of what the memory control group leaves");
        }
        Ok((limit / 100 * SHARE_PERCENT, from))
    }

    /// Checks that `more` bytes would fit, without taking them.
    ///
    /// # Errors
    /// [`Error::Budget`] with the sum.
    pub fn check(&self, more: u64, what: &str) -> Result<()> {
        let Usage { used, reserved } = self.usage()?;
        let (limit, from) = self.limit(used)?;
        let free = crate::tier::disk::free_bytes(&self.root).at("stat", &self.root)?;
        let free = free.saturating_sub(reserved);
        self.check_quota(more, what)?;
        if used.saturating_add(more) > limit {
            return Err(Error::Budget {
                sum: format!(
                    "{what} + {} in use under {} = {}, but the limit is {} ({from}); give the ram \
                     tier more (TIERKEEP_RAM_BYTES_MAX, a larger /dev/shm, or TIERKEEP_RAM_DIR on \
                     a larger tmpfs)",
                    human(used),
                    self.root.display(),
                    human(used.saturating_add(more)),
                    human(limit),
                ),
            });
        }
        if more > free {
            return Err(Error::Budget {
                sum: format!(
                    "{what}, but the file system at {} has {} free; mount a larger one (docker: \
                     --shm-size, Kubernetes: an emptyDir with medium Memory) or set TIERKEEP_RAM_DIR",
                    self.root.display(),
                    human(free),
                ),
            });
        }
        Ok(())
    }

    /// The share of a whole file system and control group: a limit that does not grow when the pages
    /// of an agent that is dead are charged to nobody who is left.
    ///
    /// # Errors
    /// The file system did not answer.
    pub(crate) fn whole_share(root: &Path) -> Result<u64> {
        make_root(root)?;
        let stat = rustix::fs::statvfs(root).at("stat", root)?;
        let whole = stat.f_blocks.saturating_mul(stat.f_frsize);
        let allowed = groups().iter().map(|group| group.max.saturating_sub(SPARE_BYTES)).min();
        Ok(allowed.map_or(whole, |allowed| allowed.min(whole)) / 100 * SHARE_PERCENT)
    }

    /// Checks that the ground carries the whole budget: an agent whose slots do not fit says so at its
    /// start, not at a save in the night.
    ///
    /// # Errors
    /// [`Error::Budget`] with the sum.
    pub(crate) fn check_ground(&self) -> Result<()> {
        let Some(max) = self.bytes_max else { return Ok(()) };
        let stat = rustix::fs::statvfs(&self.root).at("stat", &self.root)?;
        let whole = stat.f_blocks.saturating_mul(stat.f_frsize);
        if whole < max {
            return Err(Error::Budget {
                sum: format!(
                    "ram_bytes_max is {}, but the file system at {} has {} in all: make it larger \
                     (mount -o remount,size=...), or ram_bytes_max smaller",
                    human(max),
                    self.root.display(),
                    human(whole)
                ),
            });
        }
        let needs = max.saturating_add(SPARE_BYTES);
        match groups().iter().map(|group| group.max).min() {
            Some(allowed) if allowed < needs => Err(Error::Budget {
                sum: format!(
                    "ram_bytes_max {} + {} for the agent itself = {}, but its memory control group \
                     allows {}: request and budget are one number, raise the one or lower the other",
                    human(max),
                    human(SPARE_BYTES),
                    human(needs),
                    human(allowed)
                ),
            }),
            _ => Ok(()),
        }
    }

    fn check_quota(&self, more: u64, what: &str) -> Result<()> {
        let Some((dir, max)) = &self.quota else { return Ok(()) };
        let used = used_below(dir, 1).at("count the files below", dir)?.used;
        if used.saturating_add(more) <= *max {
            return Ok(());
        }
        Err(Error::Budget {
            sum: format!(
                "{what} + {} of this run = {}, but one run may have {} of this node's memory \
                 (run_bytes_max of its agent)",
                human(used),
                human(used.saturating_add(more)),
                human(*max)
            ),
        })
    }

    /// Gives `file` at least `len` bytes of memory that exists. `go_on` is asked now and then; false
    /// ends it.
    ///
    /// # Errors
    /// [`Error::Budget`] with the sum, or [`Error::Fenced`] where `go_on` said no; the file is as
    /// before.
    pub(crate) fn grow(
        &self,
        file: &File,
        path: &Path,
        len: u64,
        go_on: &dyn Fn() -> bool,
    ) -> Result<()> {
        let before = file.metadata().at("stat", path)?;
        self.reserve(file, path, len)?;
        let allocated = fill(file, path, len, go_on);
        if allocated.is_err() {
            // What was allocated before it failed is given back.
            file.set_len(before.len()).at("set the length of", path)?;
        }
        allocated
    }

    /// The same without the memory: for whom every byte is written by calls, which say where tmpfs is full,
    /// and who would have it filled with zeros first for nothing.
    ///
    /// # Errors
    /// [`Error::Budget`] with the sum.
    pub(crate) fn reserve(&self, file: &File, path: &Path, len: u64) -> Result<()> {
        let before = file.metadata().at("stat", path)?;
        let more = len.saturating_sub(before.len().min(before.blocks() * 512));
        let _guard = self.lock()?;
        self.check(more, &format!("{} for {}", human(more), path.display()))?;
        if before.len() < len {
            file.set_len(len).at("set the length of", path)?;
        }
        Ok(())
    }

    /// A POSIX lock for other processes, a mutex for our own threads. Not `flock`: that one belongs
    /// to the open file, which a fork's child inherits and would hold for ever.
    fn lock(&self) -> Result<Guard> {
        let thread = locked(mutex_of(&self.root));
        let path = self.root.join(".budget.lock");
        let mut open = OpenOptions::new();
        open.create(true).truncate(false).write(true);
        let file = sys::open_regular(&mut open, &path).at("open", &path)?;
        let clock = SystemClock;
        let deadline = Deadline::after(&clock, LOCK_WAIT);
        loop {
            match sys::lock(&file).at("lock", &path)? {
                sys::Lock::Taken => {
                    let all = locked(&IN_PROCESS);
                    return Ok(Guard { _all: all, _file: file, _thread: thread });
                }
                sys::Lock::HeldBy(pid) => match deadline.left(&clock) {
                    Some(_) => clock.pause(Duration::from_millis(1)),
                    None => {
                        return Err(deadline.passed(
                            format!("taking {}", path.display()),
                            format!("process {pid} has it"),
                        ));
                    }
                },
            }
        }
    }
}

/// The root itself only its user can enter: what is below is the state of a training.
/// One that somebody else made beforehand, in a directory that all may write to, is not trusted.
fn make_root(root: &Path) -> Result<()> {
    if let Ok(there) = fs::metadata(root)
        && there.is_dir()
    {
        let (owner, us) = (there.uid(), sys::files_uid());
        if owner == us || owner == 0 {
            return Ok(());
        }
        return Err(Error::invalid(format!(
            "the ram tier's directory {} belongs to user {owner}, who is neither root nor this user \
             ({us}): remove it, or name another one (TIERKEEP_RAM_DIR)",
            root.display()
        )));
    }
    crate::tier::publish::make_dirs(root.parent().unwrap_or(root), false)?;
    match fs::DirBuilder::new().mode(0o700).create(root) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && root.is_dir() => Ok(()),
        other => other.at("make directory", root),
    }
}

/// Gives the first `len` bytes of a file memory. That much is counted by the file's length, which stays.
///
/// # Errors
/// [`Error::Budget`], or [`Error::Fenced`] where `go_on` said no.
pub(crate) fn fill(file: &File, path: &Path, len: u64, go_on: &dyn Fn() -> bool) -> Result<()> {
    allocate(file, len, go_on).map_err(|errno| match errno {
        Some(rustix::io::Errno::NOSPC) => Error::Budget {
            sum: format!("{} for {}, and the file system is full", human(len), path.display()),
        },
        Some(other) => Error::Io {
            what: format!("allocate {}", path.display()),
            source: io::Error::from(other),
        },
        None => Error::Fenced { why: "this Checkpointer was closed".into() },
    })
}

/// Page by page, a piece at a time; `None`: told to stop.
fn allocate(
    file: &File,
    len: u64,
    go_on: &dyn Fn() -> bool,
) -> Result<(), Option<rustix::io::Errno>> {
    let mut offset = 0;
    while offset < len {
        if !go_on() {
            return Err(None);
        }
        let piece = (len - offset).min(PIECE_BYTES);
        rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, offset, piece).map_err(Some)?;
        offset += piece;
    }
    Ok(())
}

/// Allocated or mapped in one system call: some tens of milliseconds.
pub(crate) const PIECE_BYTES: u64 = 256 << 20;

/// Of all roots of this process, which may have one limit: held for the sum alone, never while somebody
/// else's lock is waited for.
static IN_PROCESS: Mutex<()> = Mutex::new(());

/// Of one root.
fn mutex_of(root: &Path) -> &'static Mutex<()> {
    static ROOTS: Mutex<BTreeMap<PathBuf, &'static Mutex<()>>> = Mutex::new(BTreeMap::new());
    // For as long as the process: there are as many as users.
    locked(&ROOTS).entry(root.into()).or_insert_with(|| Box::leak(Box::default()))
}

/// Another process counts and allocates for this long at most, unless it is stopped.
const LOCK_WAIT: Duration = Duration::from_secs(60);

/// The file before the thread: the lock is let go before another thread may open the file.
struct Guard {
    _all: MutexGuard<'static, ()>,
    _file: File,
    _thread: MutexGuard<'static, ()>,
}

/// Bytes of all files below a directory.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    /// The larger of length and blocks, each file.
    used: u64,
    /// Of these, what has no pages yet.
    reserved: u64,
}

/// No file of ours is longer: a hole of an exabyte, which takes no memory, is not counted as memory.
const LEN_MAX: u64 = 1 << 48;

/// What vanishes while we count counts nothing.
fn used_below(dir: &Path, depth: usize) -> io::Result<Usage> {
    let mut sum = Usage::default();
    // root / run / step / attempt / file: more levels than that are not ours.
    if depth > 6 {
        return Ok(sum);
    }
    let gone = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
    let entries = match fs::read_dir(dir) {
        Err(e) if gone(&e) => return Ok(sum),
        other => other?,
    };
    for entry in entries {
        let part = entry.and_then(|entry| {
            let meta = entry.metadata()?;
            if meta.is_dir() {
                return used_below(&entry.path(), depth + 1);
            }
            let blocks = meta.blocks() * 512;
            if meta.len() > LEN_MAX {
                return Ok(Usage { used: blocks, reserved: 0 }); // No slot of ours.
            }
            Ok(Usage { used: meta.len().max(blocks), reserved: meta.len().saturating_sub(blocks) })
        });
        match part {
            Ok(part) => {
                sum.used = sum.used.saturating_add(part.used);
                sum.reserved = sum.reserved.saturating_add(part.reserved);
            }
            Err(e) if gone(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(sum)
}

/// What an agent needs beside its slots.
const SPARE_BYTES: u64 = 64 << 20;

/// A memory control group that bounds this process.
struct Group {
    max: u64,
    used: u64,
}

/// What the memory control groups (v2, then v1) still leave this process; `None` without a limit.
fn group_headroom() -> Option<u64> {
    groups().iter().map(|group| group.max.saturating_sub(group.used)).min()
}

/// Every group that has a limit.
fn groups() -> Vec<Group> {
    let number = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let Ok(own) = fs::read_to_string("/proc/self/cgroup") else { return Vec::new() };
    let v2 = own.lines().find_map(|l| l.strip_prefix("0::/")).map(|p| ("/sys/fs/cgroup", p));
    let v1 = own
        .lines()
        .find(|l| l.split(':').nth(1) == Some("memory"))
        .and_then(|l| l.splitn(3, ':').nth(2))
        .map(|p| ("/sys/fs/cgroup/memory", p.trim_start_matches('/')));
    let mut all = Vec::new();
    for ((mount, path), max, current) in [
        (v2, "memory.max", "memory.current"),
        (v1, "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ]
    .into_iter()
    .filter_map(|(place, max, current)| Some((place?, max, current)))
    {
        // A parent's limit binds too.
        for dir in Path::new(mount).join(path).ancestors() {
            if !dir.starts_with(mount) {
                break;
            }
            if let (Some(max), Some(used)) = (number(&dir.join(max)), number(&dir.join(current)))
                && max < u64::MAX / 4
            {
                all.push(Group { max, used });
            }
        }
    }
    all
}

/// `1.5 GiB`
#[must_use]
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    #[allow(clippy::cast_precision_loss)] // It is for reading.
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}
