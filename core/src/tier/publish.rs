//! How a file appears, moves and stays: the only place in the crate that renames.
//!
//! # Invariants
//!
//! - A name that appears has all its bytes, and on a durable tier they are on the medium before the
//!   name is.
//! - A name that is taken is never given again, but that of a process's own note ([`write_note`]).
//! - Two processes never write under one staging name, also where both have the same number.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::fd::IntoRawFd,
    path::{Path, PathBuf},
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::{fs::RenameFlags, io::Errno};

use super::Created;
use crate::error::{Doing, Error, Result};

/// Where files are written before they appear; below a tier's root.
pub(crate) const STAGING: &str = "_staging";

/// A word for a file's name that nobody else uses, now or later: `<pid>-<8 hex>-<count>`.
///
/// The number of a process tells it from no other where containers share a directory: there each
/// may be number 1, and is again after a restart.
pub(crate) fn own_word() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{}-{n}", process_word())
}

fn process_word() -> String {
    static DRAWN: LazyLock<u32> = LazyLock::new(|| {
        let mut bytes = [0; 4];
        // Without randomness no handle opens (`Id::random`), and nobody writes.
        let _ = getrandom::fill(&mut bytes);
        u32::from_ne_bytes(bytes)
    });
    format!("{}-{:08x}", std::process::id(), *DRAWN)
}

/// A name in the staging directory that nobody else uses.
pub(crate) fn staging_path(root: &Path, label: &str) -> PathBuf {
    root.join(STAGING).join(format!("{label}.{}.part", own_word()))
}

/// Opens a new staging file, making the directory where it is missing.
pub(crate) fn create_staged(path: &Path) -> Result<File> {
    let open = || OpenOptions::new().read(true).write(true).create_new(true).open(path);
    match open() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            make_dirs(path.parent().unwrap_or(path), false)?;
            open()
        }
        other => other,
    }
    .at("create", path)
}

/// Makes `staged` appear as `dest`, whole and once.
///
/// In this order, each against one accident: `sync_data` (a power cut after the rename that leaves
/// a name without its bytes), `close` with its answer read (a network file system that reports a
/// failed write only there), a rename that refuses to replace (two writers of one name), sync of
/// the directory (a power cut that forgets the name after we said it is there).
///
/// `file` is `None` for a slot that stays open and mapped. `durable` is false on tmpfs, where
/// syncing means nothing.
pub(crate) fn publish(
    file: Option<File>,
    staged: &Path,
    dest: &Path,
    durable: bool,
) -> Result<Created> {
    if let Some(file) = file {
        if durable {
            file.sync_data().at("sync", staged)?;
        }
        close(file).at("close", staged)?;
    }
    let parent = dest.parent().unwrap_or(dest);
    let mut tries = 0;
    let created = loop {
        match rename_to_free_name(staged, dest) {
            Ok(()) => break Created::New,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => break Created::Exists,
            // The directory is not there yet, or a collector removed it, empty, just now.
            Err(e) if e.kind() == io::ErrorKind::NotFound && tries < 8 && staged.exists() => {
                tries += 1;
                make_dirs(parent, durable)?;
            }
            Err(e) => return Err(e).at("publish", dest),
        }
    };
    if created == Created::Exists {
        remove(staged)?;
    }
    if durable {
        // Also for a name that another process gave a moment ago: the caller counts on it now.
        sync_dir(parent)?;
    }
    Ok(created)
}

/// A file outside any tier that is being written beside the place it will have. It appears whole,
/// by [`appear`](Self::appear), or not at all.
#[derive(Debug)]
pub struct Staged {
    file: Option<File>,
    path: PathBuf,
    dest: PathBuf,
}

impl Staged {
    /// Begins a file that will be `dest`.
    ///
    /// # Errors
    /// The name is taken, or its directory is missing or may not be written.
    pub fn beside(dest: &Path) -> Result<Self> {
        let dest = crate::config::absolute(dest)?;
        if fs::symlink_metadata(&dest).is_ok() {
            return Err(Error::invalid(format!("{} is there already", dest.display())));
        }
        let Some(name) = dest.file_name() else {
            return Err(Error::invalid(format!("{} is not the name of a file", dest.display())));
        };
        let name = format!(".{}.{}.part", name.to_string_lossy(), own_word());
        let path = dest.with_file_name(name);
        let open = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        Ok(Self { file: Some(open.at("create", &path)?), path, dest })
    }

    /// The open file.
    ///
    /// # Errors
    /// None: a staged file is open until it appears.
    pub fn file(&self) -> Result<&File> {
        self.file.as_ref().ok_or_else(|| Error::Bug("a staged file that is closed".into()))
    }

    /// Where it is written, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it its name, synced.
    ///
    /// # Errors
    /// The name was taken meanwhile, or the file system did not answer.
    pub fn appear(mut self) -> Result<()> {
        match publish(self.file.take(), &self.path, &self.dest, true)? {
            Created::New => Ok(()),
            Created::Exists => {
                Err(Error::invalid(format!("{} is there already", self.dest.display())))
            }
        }
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // Nothing is there where it has appeared; what cannot be removed now is only a hidden file.
        let _ = remove(&self.path);
    }
}

/// Writes a file outside any tier anew: until the new one is there, whole, the old one is. It is its
/// writer's own note, which nobody else writes; where it is as it should be already, nothing is written.
///
/// # Errors
/// The file system did not answer, or refuses.
#[allow(clippy::disallowed_methods)] // What is replaced is nobody's checkpoint.
pub fn write_note(dest: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(dest).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    let name = dest.file_name().unwrap_or_default().to_string_lossy();
    let staged = dest.with_file_name(format!(".{name}.{}.part", own_word()));
    let written = || -> Result<()> {
        let mut file = create_staged(&staged)?;
        file.write_all(bytes).at("write", &staged)?;
        file.sync_data().at("sync", &staged)?;
        fs::rename(&staged, dest).at("write", dest)?;
        sync_dir(dest.parent().unwrap_or(dest))
    };
    written().inspect_err(|_| {
        let _ = remove(&staged); // What cannot be removed now is only a hidden file.
    })
}

/// Moves a file out of sight, or a free one to a new owner, and syncs both directories.
pub(crate) fn move_file(from: &Path, to: &Path, durable: bool) -> Result<()> {
    let rename = || rename_to_free_name(from, to);
    let moved = match rename() {
        Err(e) if e.kind() == io::ErrorKind::NotFound && from.exists() => {
            make_dirs(to.parent().unwrap_or(to), durable)?;
            rename()
        }
        other => other,
    };
    moved.doing(|| format!("move {} to {}", from.display(), to.display()))?;
    if durable {
        sync_dir(to.parent().unwrap_or(to))?;
        sync_dir(from.parent().unwrap_or(from))?;
    }
    Ok(())
}

fn rename_to_free_name(from: &Path, to: &Path) -> io::Result<()> {
    let cwd = rustix::fs::CWD;
    match rustix::fs::renameat_with(cwd, from, cwd, to, RenameFlags::NOREPLACE) {
        // NFS and some FUSE file systems have no such flag: a hard link refuses a taken name too.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => link_then_unlink(from, to),
        other => other.map_err(io::Error::from),
    }
}

#[allow(clippy::disallowed_methods)] // This is the one place.
fn link_then_unlink(from: &Path, to: &Path) -> io::Result<()> {
    fs::hard_link(from, to)?;
    fs::remove_file(from)
}

/// `mkdir -p`; on a durable tier each new directory's parent is synced.
///
/// Empty directories of steps are removed by whoever finds them, so one that was seen, or made, a
/// moment ago can be gone: then from the top. Each round is lost to a removal that was done, so a
/// hundred in a row are something else than a race.
pub(crate) fn make_dirs(path: &Path, durable: bool) -> Result<()> {
    let mut tries = 0;
    loop {
        match make_missing_dirs(path, durable) {
            Err(Error::Io { source, .. })
                if source.kind() == io::ErrorKind::NotFound && tries < 100 =>
            {
                tries += 1;
            }
            other => return other,
        }
    }
}

fn make_missing_dirs(path: &Path, durable: bool) -> Result<()> {
    let mut missing = Vec::new();
    let mut at = path;
    while !at.is_dir() {
        missing.push(at);
        match at.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => at = parent,
            _ => break,
        }
    }
    for dir in missing.into_iter().rev() {
        match fs::create_dir(dir) {
            Ok(()) => {}
            // Gone again is as good as there: what comes next does not find it, and begins anew.
            Err(e)
                if e.kind() == io::ErrorKind::AlreadyExists
                    && (dir.is_dir() || fs::symlink_metadata(dir).is_err()) => {}
            Err(e) => return Err(e).at("make directory", dir),
        }
        if let (true, Some(parent)) = (durable, dir.parent()) {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            sync_dir(parent)?;
        }
    }
    Ok(())
}

/// Syncs a directory's entries.
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    match File::open(path).and_then(|dir| dir.sync_all()) {
        // A collector removed the directory, empty, after our file left it: nothing to keep.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.at("sync directory", path),
    }
}

/// Removes a file or an empty directory; what is not there, or not empty, is left in peace.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let answer = match fs::remove_file(path) {
        // Linux says EISDIR, POSIX allows EPERM.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::IsADirectory | io::ErrorKind::PermissionDenied
            ) =>
        {
            match fs::symlink_metadata(path) {
                Ok(meta) if meta.is_dir() => fs::remove_dir(path),
                // Another rank was quicker.
                Err(gone) if gone.kind() == io::ErrorKind::NotFound => Ok(()),
                _ => Err(e),
            }
        }
        other => other,
    };
    match answer {
        Err(e)
            if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) =>
        {
            Ok(())
        }
        // ENOTDIR: a part of the path is a file, so what is asked for is not there either.
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => Ok(()),
        other => other.at("remove", path),
    }
}

fn close(file: File) -> io::Result<()> {
    let fd = file.into_raw_fd();
    // SAFETY: `fd` was owned by `file`, which gave it up, and is not used after this.
    let closed = unsafe { libc::close(fd) };
    if closed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Removes staging files of dead processes that were written to no later than `age` ago: where hosts
/// or containers share the directory, a process that is not seen here may live there.
pub(crate) fn sweep_dead(root: &Path, age: Duration) -> Result<()> {
    let entries = match fs::read_dir(root.join(STAGING)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.at("list", root)?,
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let dead = name.to_str().and_then(writer_of).is_some_and(is_dead);
        let written = entry.metadata().and_then(|meta| meta.modified()).ok();
        let old = written.and_then(|at| at.elapsed().ok()).is_some_and(|passed| passed >= age);
        if dead && old {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// `12-0a1b2c3d` of `record.12-0a1b2c3d-7.part`.
fn writer_of(name: &str) -> Option<&str> {
    let word = name.strip_suffix(".part")?.rsplit('.').next()?;
    word.rsplit_once('-').map(|(writer, _count)| writer)
}

/// No such process is here; or it has our number and is not us.
fn is_dead(writer: &str) -> bool {
    let Some((pid, _drawn)) = writer.split_once('-') else { return false };
    let ours = process_word();
    let same_number = ours.split_once('-').is_some_and(|(own, _)| own == pid);
    if same_number { writer != ours } else { !Path::new("/proc").join(pid).exists() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_tells_this_process_from_a_later_one_of_the_same_number() {
        let words = [own_word(), own_word()];
        assert_ne!(words[0], words[1]);
        let name = |word: &str| format!("rank-000001-01020304.safetensors.{word}.part");
        let writers = words.each_ref().map(|word| writer_of(&name(word)).unwrap().to_owned());
        assert_eq!(writers[0], writers[1]);
        assert!(!is_dead(&writers[0]));
        let pid = std::process::id();
        assert!(is_dead(&format!("{pid}-00000000")), "an earlier process of this number");
        assert!(!is_dead("1-00000000"), "init lives");
        assert!(is_dead("4194305-00000000"), "above the kernel's largest number");
    }

    #[test]
    fn directories_are_made_beside_somebody_who_removes_empty_ones() {
        let dir = tempfile::tempdir().unwrap();
        let (step, attempt) = (dir.path().join("1"), dir.path().join("1/2"));
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    remove(&attempt).unwrap();
                    remove(&step).unwrap();
                }
            });
            let made: Result<()> = (0..3000).try_for_each(|_| make_dirs(&attempt, false));
            done.store(true, Ordering::Relaxed);
            made.unwrap();
        });
    }

    #[test]
    fn what_two_remove_at_once_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let step = dir.path().join("1");
        let done = std::sync::atomic::AtomicBool::new(false);
        let removes = || -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                remove(&step)?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let removed: [_; 2] = std::array::from_fn(|_| scope.spawn(removes));
            for _ in 0..10_000 {
                let _ = fs::create_dir(&step); // It may be there still.
            }
            done.store(true, Ordering::Relaxed);
            removed.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
        });
    }

    #[test]
    fn only_what_dead_processes_left_long_ago_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let staged = |word: &str| {
            let path = dir.path().join(STAGING).join(format!("record.{word}.part"));
            create_staged(&path).unwrap();
            path
        };
        let (dead, ours) = (staged("4194305-00000000-0"), staged(&own_word()));
        sweep_dead(dir.path(), Duration::from_secs(60)).unwrap();
        assert!(dead.exists() && ours.exists());
        sweep_dead(dir.path(), Duration::ZERO).unwrap();
        assert!(!dead.exists() && ours.exists());
    }
}
