//! What RAM (tmpfs) and disk have in common: a tier as a directory.
//!
//! It owns names to paths, small files, listings and reads. It does not own how payloads are
//! written: that is where the two differ.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use rustix::io::Errno;

use super::{
    Created, Entry, Payload, Source,
    buffer::{ALIGN, AlignedBuf, padded},
    publish::{create_staged, publish, remove, staging_path},
};
use crate::{
    chunk::CHUNK_BYTES,
    error::{Doing, Error, Result},
};

/// A directory that files appear in.
#[derive(Debug)]
pub(crate) struct PosixDir {
    pub(crate) root: PathBuf,
    pub(crate) durable: bool,
}

impl PosixDir {
    /// The path of a name, which may come from a file or a person: no part of it may leave the
    /// root.
    pub(crate) fn path(&self, name: &str) -> Result<PathBuf> {
        let good =
            |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
        if name.split('/').all(good) {
            Ok(self.root.join(name))
        } else {
            Err(Error::invalid(format!("{name:?} is not a name in a tier")))
        }
    }

    pub(crate) fn create(&self, name: &str, bytes: &[u8]) -> Result<Created> {
        let dest = self.path(name)?;
        // Cheap first look: most calls that lose, lose long after the winner.
        if fs::symlink_metadata(&dest).is_ok() {
            self.confirm_parent(&dest)?;
            return Ok(Created::Exists);
        }
        let staged = staging_path(&self.root, "record");
        let file = create_staged(&staged)?;
        let written = file.write_all_at(bytes, 0).at("write", &staged);
        let published = written.and_then(|()| publish(Some(file), &staged, &dest, self.durable));
        if published.is_err() {
            // The error that matters is on its way up; a staged file that stays is swept at open.
            let _ = remove(&staged);
        }
        published
    }

    pub(crate) fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        let path = self.path(name)?;
        let file = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
                return Err(Error::NotFound { what: path.display().to_string() });
            }
            other => other.at("open", &path)?,
        };
        source(file, path, self.durable)
    }

    pub(crate) fn list(&self, dir: &str) -> Result<Vec<Entry>> {
        let path = if dir.is_empty() { self.root.clone() } else { self.path(dir)? };
        let read = match fs::read_dir(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.at("list", &path)?,
        };
        let mut entries = Vec::new();
        for entry in read {
            let entry = entry.at("list", &path)?;
            // Names that are not UTF-8 are nobody's of ours.
            let Ok(name) = entry.file_name().into_string() else { continue };
            match entry.file_type() {
                Ok(kind) => entries.push(Entry { name, is_dir: kind.is_dir() }),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e).at("list", &path),
            }
        }
        entries.sort();
        Ok(entries)
    }

    /// See [`Tier::confirm`](super::Tier::confirm).
    pub(crate) fn confirm(&self, dir: &str) -> Result<()> {
        let path = self.path(dir)?;
        if self.durable { super::publish::sync_dir(&path) } else { Ok(()) }
    }

    fn confirm_parent(&self, path: &Path) -> Result<()> {
        let parent = path.parent().unwrap_or(&self.root);
        if self.durable { super::publish::sync_dir(parent) } else { Ok(()) }
    }

    /// What to answer to a `put` of `payload` whose name is taken: a `put` whose answer was lost,
    /// or whose last sync failed, meets its own bytes.
    ///
    /// # Errors
    /// Other bytes lie there.
    pub(crate) fn put_before(&self, name: &str, payload: &dyn Payload) -> Result<()> {
        let source = self.open(name)?;
        if source.len() != payload.len() || !same_bytes(&*source, payload)? {
            return Err(Error::invalid(format!(
                "{} is there already",
                self.root.join(name).display()
            )));
        }
        self.confirm_parent(&self.path(name)?)
    }

    pub(crate) fn delete(&self, name: &str) -> Result<()> {
        let path = self.path(name)?;
        remove(&path)?;
        if self.durable {
            super::publish::sync_dir(path.parent().unwrap_or(&self.root))?;
        }
        Ok(())
    }

    pub(crate) fn mend(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let path = self.path(name)?;
        let file = fs::OpenOptions::new().write(true).open(&path).at("open", &path)?;
        file.write_all_at(bytes, offset).at("mend", &path)?;
        if self.durable {
            file.sync_data().at("sync", &path)?;
        }
        Ok(())
    }
}

/// An open file for reading, whoever opened it. `path` is for messages.
pub(crate) fn source(file: File, path: PathBuf, may_direct: bool) -> Result<Box<dyn Source>> {
    let meta = file.metadata().at("stat", &path)?;
    if !meta.is_file() {
        return Err(Error::damaged(path.display().to_string(), "it is not a file"));
    }
    let direct = OnceLock::new();
    Ok(Box::new(PosixSource { file, len: meta.len(), path, direct, may_direct }))
}

pub(super) fn same_bytes(there: &dyn Source, payload: &dyn Payload) -> Result<bool> {
    let (mut ours, mut theirs) = (AlignedBuf::new(1), AlignedBuf::new(1));
    let mut offset = 0;
    while offset < payload.len() {
        let len = usize::try_from((payload.len() - offset).min(CHUNK_BYTES)).unwrap_or(0);
        theirs.ensure(padded(len));
        there.read_at(offset, &mut theirs[..padded(len)])?;
        if payload.block(offset, padded(len), &mut ours)?[..len] != theirs[..len] {
            return Ok(false);
        }
        offset += len as u64;
    }
    Ok(true)
}

struct PosixSource {
    file: File,
    len: u64,
    path: PathBuf,
    /// A second descriptor with `O_DIRECT`, opened at the first read that misses the page cache.
    direct: OnceLock<Option<File>>,
    may_direct: bool,
}

impl PosixSource {
    fn direct(&self) -> Option<&File> {
        let open = || {
            let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
            fs::OpenOptions::new().read(true).custom_flags(flags).open(self.opened()).ok()
        };
        self.direct.get_or_init(open).as_ref()
    }

    /// The open file's own path: it stays right when the name has been moved away meanwhile.
    fn opened(&self) -> PathBuf {
        use std::os::fd::AsRawFd;
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }
}

impl Source for PosixSource {
    fn len(&self) -> u64 {
        self.len
    }

    /// Reads whose pages are all in memory copy from there; the rest goes around the cache, which
    /// is faster from NVMe and leaves the cache to the data loader.
    fn is_cached(&self, offset: u64, len: usize) -> bool {
        let pages = || crate::sys::cached_pages(&self.file, offset, len as u64);
        offset.checked_add(len as u64).is_some_and(|end| end <= self.len)
            && (!self.may_direct || pages().is_some_and(|n| n >= (len as u64).div_ceil(4096)))
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let there = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let want = into.len().min(there);
        let aligned = offset.is_multiple_of(ALIGN as u64)
            && into.len().is_multiple_of(ALIGN)
            && into.as_ptr().addr().is_multiple_of(ALIGN);
        if self.may_direct
            && aligned
            && !self.is_cached(offset, want)
            && let Some(direct) = self.direct()
        {
            match read_direct(direct, offset, into, want) {
                Ok(()) => return Ok(()),
                Err(Errno::INVAL) => {} // It wants more than 4096, or it shrank: the plain way says.
                Err(e) => return Err(io::Error::from(e)).at("read", &self.path),
            }
        }
        match self.file.read_exact_at(&mut into[..want], offset) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                Err(Error::damaged(self.path.display().to_string(), "it is shorter than it was"))
            }
            other => other.at("read", &self.path),
        }
    }
}

/// Reads aligned blocks until `want` bytes are there. The last read may return fewer, at the end.
fn read_direct(file: &File, offset: u64, into: &mut [u8], want: usize) -> Result<(), Errno> {
    let mut done = 0;
    while done < want {
        let n = rustix::io::pread(file, &mut into[done..], offset + done as u64)?;
        if n == 0 || (done + n < want && n % ALIGN != 0) {
            return Err(Errno::INVAL); // Truncated meanwhile; the plain read says so in words.
        }
        done += n;
    }
    Ok(())
}

/// The root of a tier: made where it is missing; a file in its place, or one without rights, is
/// said in one sentence at once and not at the first save.
pub(crate) fn usable_root(root: &Path, durable: bool) -> Result<()> {
    if let Ok(meta) = fs::metadata(root)
        && !meta.is_dir()
    {
        return Err(Error::invalid(format!(
            "{} is a file: a destination is a directory (it is made where it is missing)",
            root.display()
        )));
    }
    super::publish::make_dirs(root, durable)?;
    let probe = staging_path(root, "probe");
    let file = create_staged(&probe)?;
    drop(file);
    remove(&probe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_cut_short_while_it_is_read_is_damaged() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory on tmpfs");
        let path = dir.path().join("slot");
        let file = create_staged(&path).expect("create");
        file.set_len(8 << 12).expect("set the length");
        for may_direct in [false, true] {
            let read = source(File::open(&path).expect("open"), path.clone(), may_direct);
            let read = read.expect("a source");
            assert!(may_direct || read.is_cached(0, 8 << 12));
            let mut into = AlignedBuf::new(4 << 12);
            read.read_at(4 << 12, &mut into).expect("it is whole");
            file.set_len(5 << 12).expect("set the length");
            let cut = read.read_at(4 << 12, &mut into);
            assert!(matches!(cut, Err(Error::Damaged { .. })), "{cut:?}");
            file.set_len(8 << 12).expect("set the length");
        }
    }
}
