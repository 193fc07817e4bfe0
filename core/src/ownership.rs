//! One live process owns a rank of a run.
//!
//! The lock is a POSIX lock (`F_SETLK`) on a file that this process opens once: a fork's child does
//! not have it, a dead process loses it. The text in the file (pid, host) is for people only.
//!
//! # Invariants
//!
//! - Two processes never own one rank of one run on one host.
//! - A second owner in the same process takes over: the first finds out at its next call.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{LazyLock, Mutex},
    time::Duration,
};

use crate::{
    clock::{Clock, Deadline},
    error::{Doing, Error, Result},
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
    generation: u64,
}

#[derive(Debug, Default)]
struct Table {
    owned: HashMap<PathBuf, Owned>,
    generations: u64,
}

static TABLE: LazyLock<Mutex<Table>> = LazyLock::new(Mutex::default);

/// The right to write as one rank of a run. Dropped: given up, unless somebody took over.
#[derive(Debug)]
pub struct Ownership {
    path: PathBuf,
    generation: u64,
    pid: u32,
}

impl Ownership {
    /// Takes the lock at `path`, waiting up to `wait` for another process to let go: a job that was
    /// killed a moment ago may still be dying. `what` names what is owned.
    ///
    /// # Errors
    /// [`Error::Fenced`] with the holder's pid.
    pub fn take(path: &Path, what: &str, wait: Duration, clock: &dyn Clock) -> Result<Self> {
        make_dirs(path.parent().unwrap_or(path), false)?;
        let deadline = Deadline::after(clock, wait);
        loop {
            match Self::try_take(path)? {
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

    fn try_take(path: &Path) -> Result<Result<Self, i32>> {
        let me = std::process::id();
        let mut table = locked(&TABLE);
        table.generations += 1;
        let generation = table.generations;
        if let Some(owned) = table.owned.get_mut(path)
            && owned.pid == me
        {
            owned.generation = generation;
            return Ok(Ok(Self { path: path.into(), generation, pid: me }));
        }
        let mut open = OpenOptions::new();
        let file = open.read(true).write(true).create(true).truncate(false).open(path);
        let file = file.at("open", path)?;
        match sys::lock(&file).at("lock", path)? {
            sys::Lock::HeldBy(pid) => Ok(Err(pid)),
            sys::Lock::Taken => {
                let text = format!("{me}\n");
                file.set_len(0)
                    .and_then(|()| file.write_all_at(text.as_bytes(), 0))
                    .at("write", path)?;
                table.owned.insert(path.into(), Owned { _file: file, pid: me, generation });
                Ok(Ok(Self { path: path.into(), generation, pid: me }))
            }
        }
    }

    /// True until another handle in this process takes over. In a fork's child: false.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.pid == std::process::id()
            && locked(&TABLE).owned.get(&self.path).is_some_and(|o| o.generation == self.generation)
    }
}

impl Drop for Ownership {
    fn drop(&mut self) {
        if self.pid != std::process::id() {
            return;
        }
        let mut table = locked(&TABLE);
        if table.owned.get(&self.path).is_some_and(|o| o.generation == self.generation) {
            table.owned.remove(&self.path);
        }
    }
}

/// True where a live process (this one included) holds the lock at `path`.
///
/// # Errors
/// The file system did not answer.
pub fn is_held(path: &Path) -> Result<bool> {
    let table = locked(&TABLE);
    if table.owned.get(path).is_some_and(|o| o.pid == std::process::id()) {
        return Ok(true);
    }
    match File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e).at("open", path),
        Ok(file) => Ok(sys::holder(&file).at("ask for the lock of", path)?.is_some()),
    }
}
