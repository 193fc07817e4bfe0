//! One live process owns a rank of a run.
//!
//! The lock is a POSIX lock (`F_SETLK`) on a file that this process opens once: a fork's child does
//! not have it, a dead process loses it. The text in the file (pid, host) is for people only.
//!
//! # Invariants
//!
//! - Two processes never own one rank of one run on one host.
//! - In one process a second owner is refused, or takes over by name ([`Ownership::take_over`]): the
//!   first finds out at its next call.
//! - A file is known by device and inode, not by path: two spellings of one path are one lock.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    clock::{Clock, Deadline},
    error::{Doing, Error, Result},
    names::Rank,
    observe::locked,
    sys,
    tier::publish::make_dirs,
};

#[derive(Debug)]
struct Owned {
    /// Kept open, never read: closing any descriptor of the file would drop the lock.
    _file: File,
    /// A fork's child inherits this table but not the locks.
    pid: u32,
    /// Of the owner in force. Shared with every owner, who asks at each save: without the table's lock,
    /// which is held while a directory answers or does not.
    generation: Arc<AtomicU64>,
}

/// Device and inode.
pub(crate) type FileId = (u64, u64);

#[derive(Debug, Default)]
struct Table {
    /// An inode in here is not given to another file: it is open.
    owned: HashMap<FileId, Owned>,
    generations: u64,
}

static TABLE: LazyLock<Mutex<Table>> = LazyLock::new(Mutex::default);

/// The right to write as one rank of a run. Dropped: given up, unless somebody took over.
#[derive(Debug)]
pub struct Ownership {
    id: FileId,
    generation: u64,
    in_force: Arc<AtomicU64>,
    pid: u32,
}

impl Ownership {
    /// Takes the lock at `path`, waiting up to `wait` for another process to let go: a job that was
    /// killed a moment ago may still be dying. `what` names what is owned.
    ///
    /// # Errors
    /// [`Error::Fenced`] with the holder's pid, which may be this process's own.
    pub fn take(path: &Path, what: &str, wait: Duration, clock: &dyn Clock) -> Result<Self> {
        Self::wait_for(path, what, wait, clock, false)
    }

    /// [`take`](Self::take) that gets it from an owner in this process, at once: a notebook's cell
    /// run twice.
    ///
    /// # Errors
    /// [`Error::Fenced`] with the holder's pid.
    pub fn take_over(path: &Path, what: &str, wait: Duration, clock: &dyn Clock) -> Result<Self> {
        Self::wait_for(path, what, wait, clock, true)
    }

    fn wait_for(
        path: &Path,
        what: &str,
        wait: Duration,
        clock: &dyn Clock,
        over: bool,
    ) -> Result<Self> {
        make_dirs(path.parent().unwrap_or(path), false)?;
        let deadline = Deadline::after(clock, wait);
        loop {
            match Self::try_take(path, over)? {
                Ok(owned) => return Ok(owned),
                Err(pid) if deadline.left(clock).is_none() => {
                    return Err(Error::Fenced {
                        why: format!(
                            "{what} is owned by live process {pid} ({}): stop that process, or give \
                             this one another rank or destination",
                            path.display()
                        ),
                    });
                }
                Err(_) => clock.pause(Duration::from_millis(20)),
            }
        }
    }

    /// `Err`: the process that has it.
    fn try_take(path: &Path, over: bool) -> Result<Result<Self, i32>> {
        let me = std::process::id();
        let mut table = locked(&TABLE);
        table.generations += 1;
        let generation = table.generations;
        // Before opening: to close a second descriptor of the file would drop the lock.
        if let Some(id) = file_id(path)?
            && let Some(owned) = table.owned.get_mut(&id).filter(|o| o.pid == me)
        {
            if !over {
                return Ok(Err(me.cast_signed()));
            }
            owned.generation.store(generation, Ordering::Release);
            let in_force = owned.generation.clone();
            return Ok(Ok(Self { id, generation, in_force, pid: me }));
        }
        let mut open = OpenOptions::new();
        open.read(true).write(true).create(true).truncate(false);
        let file = sys::open_regular(&mut open, path).at("open", path)?;
        if let sys::Lock::HeldBy(pid) = sys::lock(&file).at("lock", path)? {
            return Ok(Err(pid));
        }
        let id = id_of(&file.metadata().at("stat", path)?);
        if file_id(path)? != Some(id) {
            return Ok(Err(0)); // Removed between the two calls: we locked what nobody will look at.
        }
        let text = format!("{me}\n");
        file.set_len(0).and_then(|()| file.write_all_at(text.as_bytes(), 0)).at("write", path)?;
        let in_force = Arc::new(AtomicU64::new(generation));
        table.owned.insert(id, Owned { _file: file, pid: me, generation: in_force.clone() });
        Ok(Ok(Self { id, generation, in_force, pid: me }))
    }

    /// The lock file, whatever its path.
    pub(crate) fn id(&self) -> FileId {
        self.id
    }

    /// True until another handle in this process takes over. In a fork's child: false.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.pid == std::process::id() && self.in_force.load(Ordering::Acquire) == self.generation
    }
}

impl Drop for Ownership {
    fn drop(&mut self) {
        if self.pid != std::process::id() {
            return;
        }
        let mut table = locked(&TABLE);
        if self.in_force.load(Ordering::Acquire) == self.generation {
            // Closed with the table locked: who opens the file meanwhile would lose its lock with it.
            table.owned.remove(&self.id);
        }
    }
}

/// True where a live process (this one included) holds the lock at `path`.
///
/// # Errors
/// The file system did not answer.
pub fn is_held(path: &Path) -> Result<bool> {
    let table = locked(&TABLE);
    let Some(id) = file_id(path)? else { return Ok(false) };
    if table.owned.get(&id).is_some_and(|o| o.pid == std::process::id()) {
        return Ok(true);
    }
    match sys::open_regular(OpenOptions::new().read(true), path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e).at("open", path),
        Ok(file) => Ok(sys::holder(&file).at("ask for the lock of", path)?.is_some()),
    }
}

/// The lock of a rank of the run in this directory.
pub(crate) fn rank_lock(destination: &Path, rank: Rank) -> PathBuf {
    destination.join(format!("_locks/rank-{:06}", rank.0))
}

fn id_of(meta: &std::fs::Metadata) -> FileId {
    (meta.dev(), meta.ino())
}

fn file_id(path: &Path) -> Result<Option<FileId>> {
    match std::fs::metadata(path) {
        Ok(meta) => Ok(Some(id_of(&meta))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).at("stat", path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;

    #[test]
    fn two_spellings_of_one_path_are_one_lock() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(dir.path(), dir.path().join("link")).unwrap();
        let (path, again) = (dir.path().join("lock"), dir.path().join("link/lock"));
        let first = Ownership::take(&path, "it", Duration::ZERO, &SystemClock).unwrap();
        let refused = Ownership::take(&again, "it", Duration::ZERO, &SystemClock).unwrap_err();
        assert!(refused.to_string().contains(&std::process::id().to_string()), "{refused}");
        assert!(first.is_current() && is_held(&again).unwrap());
        let second = Ownership::take_over(&again, "it", Duration::ZERO, &SystemClock).unwrap();
        assert!(second.is_current() && !first.is_current());
        drop(first);
        assert!(second.is_current() && is_held(&path).unwrap());
        drop(second);
        assert!(!is_held(&path).unwrap());
    }
}
