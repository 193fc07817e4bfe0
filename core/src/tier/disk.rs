//! The tier that survives a reboot: a directory on a local disk or a shared file system.
//!
//! Payloads go around the page cache (`O_DIRECT`) in blocks of one chunk, straight from the slot,
//! by a few threads; where the file system refuses, through the cache. Files of retired checkpoints
//! are kept as the next staging files: overwriting blocks that are allocated already is up to twice
//! as fast as growing a file.
//!
//! # Invariants
//!
//! - A file is reused only when its name has been moved out, it has one link, and a write lease on
//!   it was granted: nobody reads or maps it, and no hard-linked backup shares it.
//! - A payload that appears has its exact length; the padding of the last block is cut off first.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::{
    Created, Entry, Payload, Receipt, Source, Tier, TierKind,
    buffer::{AlignedBuf, padded},
    posix::{PosixDir, usable_root},
    publish::{STAGING, create_staged, move_file, publish, remove, staging_path, sweep_dead},
};
use crate::{
    chunk::CHUNK_BYTES,
    error::{Doing, Error, Result},
    names::parse_payload_name,
    observe::locked,
    sys,
};

/// Blocks in flight a payload. One thread keeps one block in the device's queue; two are at the
/// device's speed on the disks measured (benches/RESULTS.md), four leave room for faster ones.
const WRITERS: usize = 4;

/// Buffers of all payloads that are written at a time from memory that is not mapped, if they are not
/// more than 32: an agent's own memory is small, and one payload alone still fills a disk's queue.
const BUFFERS_BYTES: u64 = 8 << 20;

/// Less at a time costs more calls than it saves memory.
const BLOCK_BYTES_MIN: u64 = 64 << 10;

/// Retired files kept a rank: one that is being overwritten next, one that was retired just now.
const FREE_FILES_MAX: usize = 2;

/// A directory that survives a reboot.
#[derive(Debug)]
pub struct DiskTier {
    dir: PosixDir,
    /// What it survives: where all nodes see the directory, the cluster.
    kind: TierKind,
}

impl DiskTier {
    /// Opens `root`, making it where it is missing.
    ///
    /// # Errors
    /// It is a file, or may not be written.
    pub fn open(root: &Path) -> Result<Self> {
        usable_root(root, true)?;
        Ok(Self::reader(root))
    }

    /// Opens `root` for reading only: nothing is made or tried.
    #[must_use]
    pub fn reader(root: &Path) -> Self {
        Self { dir: PosixDir { root: root.into(), durable: true }, kind: TierKind::Disk }
    }

    /// A directory that survives the cluster, on a file system that all nodes share; it is made at the
    /// first write.
    #[must_use]
    pub fn shared(root: &Path) -> Self {
        Self { kind: TierKind::Object, ..Self::reader(root) }
    }

    /// Its directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.dir.root
    }

    /// Removes what earlier processes of this rank left in the staging directory. The caller holds
    /// the rank's lock, so nothing there is in use.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn sweep(&self, rank: crate::names::Rank, keep_free: bool) -> Result<()> {
        let mine = format!("rank-{:06}-", rank.0);
        for entry in self.dir.list(STAGING)? {
            let free = entry.name.strip_prefix("free-");
            let ours = free.unwrap_or(&entry.name).starts_with(&mine);
            if ours && !(keep_free && free.is_some()) {
                self.dir.delete(&format!("{STAGING}/{}", entry.name))?;
            }
        }
        sweep_dead(&self.dir.root, Duration::from_secs(600))
    }

    fn stage(&self, file_name: &str) -> Result<(PathBuf, File, bool)> {
        let staged = staging_path(&self.dir.root, file_name);
        if let Some(file) = self.reuse(file_name, &staged)? {
            return Ok((staged, file, true));
        }
        let file = create_staged(&staged)?;
        Ok((staged, file, false))
    }

    /// Takes a retired file of the same rank, if there is one that nobody else has.
    fn reuse(&self, file_name: &str, staged: &Path) -> Result<Option<File>> {
        let Some(rank) = parse_payload_name(file_name) else { return Ok(None) };
        let prefix = format!("free-rank-{:06}-", rank.0);
        for entry in self.dir.list(STAGING)?.iter().filter(|e| e.name.starts_with(&prefix)) {
            let free = self.dir.path(&format!("{STAGING}/{}", entry.name))?;
            // The move claims it: of two takers one finds nothing there.
            if move_file(&free, staged, false).is_err() {
                continue;
            }
            let file = OpenOptions::new().read(true).write(true).open(staged).at("open", staged)?;
            let alone = file.metadata().at("stat", staged)?.nlink() == 1;
            if alone && sys::nobody_else_has_it_open(&file) {
                return Ok(Some(file));
            }
            remove(staged)?; // Whoever reads it keeps its bytes; we only drop the name.
        }
        Ok(None)
    }
}

impl Tier for DiskTier {
    fn kind(&self) -> TierKind {
        self.kind
    }

    fn address(&self) -> String {
        let root = self.dir.root.display();
        if self.kind == TierKind::Object { format!("file://{root}") } else { root.to_string() }
    }

    fn put(&self, name: &str, payload: &dyn Payload) -> Result<Receipt> {
        let dest = self.dir.path(name)?;
        let receipt = Receipt { tier: self.kind, name: name.into(), length: payload.len() };
        if std::fs::symlink_metadata(&dest).is_ok() {
            return self.dir.put_before(name, payload).map(|()| receipt);
        }
        let file_name = name.rsplit('/').next().unwrap_or(name);
        let (staged, file, _) = self.stage(file_name)?;
        let put = write_payload(&file, &staged, payload)
            .and_then(|()| publish(Some(file), &staged, &dest, true));
        match put {
            Ok(Created::New) => Ok(receipt),
            Ok(Created::Exists) => self.dir.put_before(name, payload).map(|()| receipt),
            Err(e) => {
                // The error that matters is on its way up; a staged file that stays is swept.
                let _ = remove(&staged);
                Err(e)
            }
        }
    }

    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created> {
        self.dir.create(name, bytes)
    }

    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        self.dir.open(name)
    }

    fn list(&self, dir: &str) -> Result<Vec<Entry>> {
        self.dir.list(dir)
    }

    fn confirm(&self, dir: &str) -> Result<()> {
        self.dir.confirm(dir)
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.dir.delete(name)
    }

    fn mend(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        self.dir.mend(name, offset, bytes)
    }

    fn retire(&self, name: &str) -> Result<()> {
        let path = self.dir.path(name)?;
        let file_name = name.rsplit('/').next().unwrap_or(name);
        if let Some(rank) = parse_payload_name(file_name) {
            let prefix = format!("free-rank-{:06}-", rank.0);
            let free = self.dir.list(STAGING)?;
            if free.iter().filter(|e| e.name.starts_with(&prefix)).count() < FREE_FILES_MAX {
                let kept = self.dir.root.join(STAGING).join(format!("free-{file_name}"));
                match move_file(&path, &kept, true) {
                    Err(e) if e.is_not_found() => return Ok(()),
                    Ok(()) => return Ok(()),
                    Err(_) => {} // Its name is taken there: delete like any other.
                }
            }
        }
        self.delete(name)
    }
}

/// Writes the payload into an open file of any length and leaves it with its exact length.
fn write_payload(file: &File, staged: &Path, payload: &dyn Payload) -> Result<()> {
    let direct = open_direct(staged)?;
    match write_blocks(direct.as_ref().unwrap_or(file), staged, payload) {
        // Opened, and refused at the first write: some file systems only say so then.
        Err(Error::Io { source, .. })
            if direct.is_some() && source.raw_os_error() == Some(libc::EINVAL) =>
        {
            write_blocks(file, staged, payload)?;
        }
        other => other?,
    }
    drop(direct);
    file.set_len(payload.len()).at("set the length of", staged)
}

/// A file for writes around the page cache; `None` where the file system has none.
pub(crate) fn open_direct(path: &Path) -> Result<Option<File>> {
    let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    match OpenOptions::new().write(true).custom_flags(flags).open(path) {
        Ok(direct) => Ok(Some(direct)),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(None),
        Err(e) => Err(e).at("open", path),
    }
}

/// One of the payloads that are being written through buffers in this process: an agent has many.
struct Buffered;

static BUFFERED: AtomicUsize = AtomicUsize::new(0);

impl Buffered {
    fn begin() -> Self {
        BUFFERED.fetch_add(1, Ordering::Relaxed);
        Self
    }
}

impl Drop for Buffered {
    fn drop(&mut self) {
        BUFFERED.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What each writer takes at a time. Many payloads keep the disk as busy with small blocks.
fn buffer_bytes(payloads: usize) -> u64 {
    let each = BUFFERS_BYTES / (WRITERS * payloads.max(1)) as u64;
    (each / BLOCK_BYTES_MIN * BLOCK_BYTES_MIN).max(BLOCK_BYTES_MIN)
}

fn write_blocks(file: &File, staged: &Path, payload: &dyn Payload) -> Result<()> {
    let len = payload.len();
    let most = payload.block_bytes().clamp(4096, CHUNK_BYTES);
    let buffered = (most < CHUNK_BYTES).then(Buffered::begin);
    let next = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let error = Mutex::new(None);
    let work = || {
        let mut scratch = AlignedBuf::new(1);
        while !failed.load(Ordering::Relaxed) {
            let offset = next.fetch_add(CHUNK_BYTES, Ordering::Relaxed);
            if offset >= len {
                break;
            }
            let end = (offset + CHUNK_BYTES).min(len);
            let now = || buffer_bytes(BUFFERED.load(Ordering::Relaxed)).min(most);
            let piece = buffered.as_ref().map_or(most, |_| now());
            let piece = usize::try_from(piece).unwrap_or(4096);
            if buffered.is_some() && scratch.len() > piece {
                scratch = AlignedBuf::new(piece); // There are more payloads than there were.
            }
            let mut pieces = (offset..end).step_by(piece);
            let written = pieces.try_for_each(|at| {
                let bytes = usize::try_from((end - at).min(piece as u64)).unwrap_or(0);
                let block = payload.block(at, padded(bytes), &mut scratch)?;
                file.write_all_at(block, at).at("write", staged)
            });
            if let Err(e) = written {
                failed.store(true, Ordering::Relaxed);
                locked(&error).get_or_insert(e);
            }
        }
    };
    let writers = usize::try_from(len.div_ceil(CHUNK_BYTES)).unwrap_or(WRITERS).min(WRITERS);
    if writers <= 1 {
        work();
    } else {
        std::thread::scope(|scope| {
            for _ in 0..writers {
                scope.spawn(work);
            }
        });
    }
    let error = locked(&error).take();
    error.map_or(Ok(()), Err)
}

/// Free bytes for us where `path` lies, for messages about a full disk.
pub(crate) fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_many_payloads_take_no_more_memory_than_those_of_few() {
        for payloads in 1..=32 {
            let each = buffer_bytes(payloads);
            assert!(each.is_multiple_of(4096), "{payloads}: {each}");
            assert!(each * (WRITERS * payloads) as u64 <= BUFFERS_BYTES, "{payloads}: {each}");
        }
        assert_eq!(buffer_bytes(1000), BLOCK_BYTES_MIN);
    }
}
