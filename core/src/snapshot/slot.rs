//! One slot: a tmpfs file, and a payload that lies in one.
//!
//! # Invariants
//!
//! - A file shrinks only when nobody else has it open; else the slot is of no use for that length, and
//!   the arena makes another.
//! - A slot that another process may cut short is never loaded from nor stored to through a map here: its
//!   bytes come and go by calls that fail where the file has ended.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
};

use super::{
    budget::{Budget, fill},
    map::SlotMap,
};
use crate::{
    chunk::CHUNK_BYTES,
    error::{Doing, Error, Result},
    observe::locked,
    sys,
    tier::{
        Created, Payload,
        buffer::{AlignedBuf, padded},
        publish::{create_staged, move_file, remove},
    },
};

/// What is read at a time from a slot that is not mapped here.
const READ_BYTES: u64 = 512 << 10;

/// One file of the arena.
#[derive(Debug)]
pub struct Slot {
    file: Arc<File>,
    /// `None` where another process fills it.
    map: Option<Arc<SlotMap>>,
    /// For the kernel alone: see [`Slot::map_for_arrivals`].
    arrivals: OnceLock<Option<Arc<SlotMap>>>,
    /// Bytes that it has room for, rounded up to pages.
    capacity: usize,
    inode: u64,
    path: Mutex<PathBuf>,
}

impl Slot {
    /// `go_on`: see [`Budget::grow`]; `None`: its memory comes with what is written to it.
    pub(super) fn create(
        path: &Path,
        len: u64,
        mapped: bool,
        budget: &Budget,
        go_on: Option<&dyn Fn() -> bool>,
    ) -> Result<Self> {
        let file = create_staged(path)?;
        let grown = match go_on {
            Some(go_on) => budget.grow(&file, path, len, go_on),
            None => budget.reserve(&file, path, len),
        };
        let made = grown.and_then(|()| Self::new(file, path, len, mapped));
        if made.is_err() {
            // The error that matters is on its way up.
            let _ = remove(path);
        }
        made
    }

    pub(super) fn adopt(path: &Path, mapped: bool) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path).at("open", path)?;
        let len = file.metadata().at("stat", path)?.len();
        Self::new(file, path, len, mapped)
    }

    fn new(file: File, path: &Path, len: u64, mapped: bool) -> Result<Self> {
        if file.metadata().at("stat", path)?.len() == 0 {
            file.set_len(1).at("set the length of", path)?; // An empty file cannot be mapped.
        }
        let inode = file.metadata().at("stat", path)?.ino();
        let file = Arc::new(file);
        let map = mapped.then(|| SlotMap::new(file.clone(), len)).transpose()?.map(Arc::new);
        let capacity = padded(usize::try_from(len.max(1)).unwrap_or(usize::MAX));
        let (arrivals, path) = (OnceLock::new(), Mutex::new(path.into()));
        Ok(Self { file, map, arrivals, capacity, inode, path })
    }

    /// The map to fill it through; `None` where another process does.
    #[must_use]
    pub fn map(&self) -> Option<&Arc<SlotMap>> {
        self.map.as_ref()
    }

    /// A map that system calls put bytes into, never this process itself: they fail where the file was cut
    /// short. `None`: it could not be mapped, and bytes come through a buffer.
    pub(crate) fn map_for_arrivals(&self) -> Option<Arc<SlotMap>> {
        let map = || {
            let mapped = self.file_len().and_then(|len| SlotMap::new(self.file.clone(), len));
            let told = mapped.inspect_err(|e| tracing::debug!("{}", e.chain()));
            told.ok().map(Arc::new)
        };
        self.arrivals.get_or_init(map).clone()
    }

    /// Bytes that it has room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// What it is called between processes: the same for as long as the file is there, whatever its
    /// name.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// The open file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Gives every byte of the file memory: whoever made it may have died in between. It may be used
    /// again meanwhile, for a smaller state: its length stays what it is.
    pub(super) fn allocate(&self, go_on: &dyn Fn() -> bool) -> Result<()> {
        fill(&self.file, &self.path(), self.file_len()?, go_on)
    }

    /// The file's length now.
    ///
    /// # Errors
    /// The file system did not answer.
    pub fn file_len(&self) -> Result<u64> {
        Ok(self.file.metadata().at("stat", &self.path())?.len())
    }

    /// The file's path now.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        locked(&self.path).clone()
    }

    /// The file's length; `None` where its name has gone or leads to another file: somebody cleaned
    /// up around us.
    pub(super) fn len_at_its_path(&self) -> Option<u64> {
        let ours = self.file.metadata().ok()?;
        let there = std::fs::symlink_metadata(self.path()).ok()?;
        (ours.dev() == there.dev() && ours.ino() == there.ino()).then_some(ours.len())
    }

    /// Removes the file, unless its name leads to another one. Its memory goes at once also where
    /// the process that filled it keeps its map.
    pub(super) fn remove(&self) -> Result<()> {
        if self.len_at_its_path().is_none() {
            return Ok(());
        }
        let path = self.path();
        if self.map.is_none() && sys::nobody_else_has_it_open(&self.file) {
            self.file.set_len(0).at("set the length of", &path)?;
        }
        remove(&path)
    }

    /// Sets the file, which has `now` bytes, to exactly `len`, where that takes no pages from
    /// somebody who has it mapped. `false`: it cannot; the slot is of no use for this length.
    pub(super) fn fit(&self, now: u64, len: u64) -> Result<bool> {
        if padded(usize::try_from(len).unwrap_or(usize::MAX)) > self.capacity {
            return Ok(false);
        }
        let pages = |n: u64| n.div_ceil(4096);
        if pages(len) > pages(now) {
            return Ok(false); // Pages that went when it shrank come back through the budget only.
        }
        if now != len {
            if pages(len) < pages(now) && !sys::nobody_else_has_it_open(&self.file) {
                return Ok(false);
            }
            self.file.set_len(len).at("set the length of", &self.path())?;
        }
        Ok(true)
    }

    /// Gives the slot its name as a payload of exactly `len` bytes.
    pub(crate) fn publish(&self, dest: &Path, len: u64) -> Result<Created> {
        if self.file_len()? != len {
            return Err(Error::Bug(format!("{} has not {len} bytes", self.path().display())));
        }
        let mut path = locked(&self.path);
        let created = match crate::tier::publish::move_file(&path, dest, false) {
            Ok(()) => Created::New,
            Err(_) if dest.exists() => Created::Exists,
            Err(e) => return Err(e),
        };
        if created == Created::New {
            *path = dest.into();
        }
        Ok(created)
    }

    /// Moves the file out of its checkpoint, to `free`.
    pub(super) fn take_back(&self, free: &Path) -> Result<()> {
        let mut path = locked(&self.path);
        move_file(&path, free, false)?;
        *path = free.into();
        Ok(())
    }
}

/// A payload that lies in a slot.
#[derive(Clone, Debug)]
pub struct SlotPayload {
    /// Where.
    pub slot: Arc<Slot>,
    /// Its exact length in bytes.
    pub len: u64,
}

impl SlotPayload {
    /// One block, by a call that fails where the file is shorter than it should be.
    fn read<'a>(&self, offset: u64, len: usize, scratch: &'a mut AlignedBuf) -> Result<&'a [u8]> {
        let there = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX).min(len);
        scratch.ensure(len);
        self.read_into(offset, &mut scratch[..there])?;
        scratch[there..len].fill(0);
        Ok(&scratch[..len])
    }
}

impl SlotPayload {
    /// Fills `into` from `offset`, which is within the payload.
    pub(crate) fn read_into(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        match self.slot.file.read_exact_at(into, offset) {
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                let file = self.slot.path().display().to_string();
                Err(Error::damaged(file, "it was cut short by whoever fills it"))
            }
            other => other.at("read", &self.slot.path()),
        }
    }
}

impl Payload for SlotPayload {
    fn len(&self) -> u64 {
        self.len
    }

    fn block<'a>(
        &'a self,
        offset: u64,
        len: usize,
        scratch: &'a mut AlignedBuf,
    ) -> Result<&'a [u8]> {
        let Some(map) = self.slot.map() else { return self.read(offset, len, scratch) };
        let begin = usize::try_from(offset).unwrap_or(usize::MAX);
        let all = map.bytes(usize::try_from(self.len).unwrap_or(usize::MAX));
        all.get(begin..begin.saturating_add(len))
            .ok_or_else(|| Error::Bug(format!("block {offset}+{len} of {} bytes", self.len)))
    }

    /// Bytes that go through a buffer go in small ones: an agent has many ranks, and its memory is for
    /// slots. What fits a core's cache is also checksummed from there.
    fn block_bytes(&self) -> u64 {
        if self.slot.map().is_some() { CHUNK_BYTES } else { READ_BYTES }
    }

    fn slot(&self) -> Option<&Slot> {
        Some(&self.slot)
    }
}
