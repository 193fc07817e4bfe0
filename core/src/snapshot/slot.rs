//! One slot: a tmpfs file, mapped, its pages in place. And a payload that lies in one.
//!
//! # Invariants
//!
//! - Bytes of a slot that may be stored to have pages: no store faults, and none meets a full tmpfs.
//! - A file shrinks only when nobody else has it open or mapped; else the slot is of no use for that
//!   length, and the arena makes another.

use std::{
    fs::{File, OpenOptions},
    mem::ManuallyDrop,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use memmap2::{Advice, MmapOptions, MmapRaw};

use super::{
    budget::{Budget, PIECE_BYTES},
    device::Pin,
};
use crate::{
    error::{Doing, Error, Result},
    observe::locked,
    sys,
    tier::{
        Created, Payload,
        buffer::{AlignedBuf, padded},
        publish::{create_staged, move_file, remove},
    },
};

/// Whether a device knows the slot.
#[derive(Debug, Default)]
enum Known {
    #[default]
    Unasked,
    /// It works without, and is not asked again.
    Refused,
    Pinned(Arc<dyn Pin>),
}

/// One mapped file.
#[derive(Debug)]
pub struct Slot {
    file: File,
    map: ManuallyDrop<MmapRaw>,
    /// Bytes of the map that lie inside the file, rounded up to pages.
    capacity: usize,
    path: Mutex<PathBuf>,
    known: Mutex<Known>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Known::Pinned(pin) = std::mem::take(&mut *locked(&self.known))
            && !pin.unpin(self.map.as_mut_ptr() as usize)
        {
            tracing::warn!("{} stays mapped: a device may know it", self.path().display());
            return;
        }
        // SAFETY: nobody uses it after this.
        unsafe { ManuallyDrop::drop(&mut self.map) };
    }
}

impl Slot {
    pub(super) fn create(
        path: &Path,
        len: u64,
        budget: &Budget,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Self> {
        let file = create_staged(path)?;
        let made = budget.grow(&file, path, len, go_on).and_then(|()| Self::map(file, path, len));
        if made.is_err() {
            // The error that matters is on its way up.
            let _ = remove(path);
        }
        made
    }

    pub(super) fn adopt(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path).at("open", path)?;
        let len = file.metadata().at("stat", path)?.len();
        Self::map(file, path, len)
    }

    fn map(file: File, path: &Path, len: u64) -> Result<Self> {
        let capacity = padded(usize::try_from(len.max(1)).unwrap_or(usize::MAX));
        if file.metadata().at("stat", path)?.len() == 0 {
            file.set_len(1).at("set the length of", path)?; // An empty file cannot be mapped.
        }
        let map = MmapOptions::new().len(capacity).map_raw(&file).at("map", path)?;
        // A fork's child (a data loader) must not get the slots: it would keep their memory.
        map.advise(Advice::DontFork).at("advise", path)?;
        // Where the kernel grants huge pages for tmpfs; most do not, and lose nothing by the
        // asking.
        let _ = map.advise(Advice::HugePage);
        let (map, path) = (ManuallyDrop::new(map), Mutex::new(path.into()));
        Ok(Self { file, map, capacity, path, known: Mutex::default() })
    }

    /// Puts every page in place, so that no store into the slot faults. `go_on` is asked now and
    /// then; false ends it.
    ///
    /// # Errors
    /// tmpfs is full, or [`Error::Fenced`] where `go_on` said no.
    pub(super) fn populate(&self, go_on: &dyn Fn() -> bool) -> Result<()> {
        let piece = usize::try_from(PIECE_BYTES).unwrap_or(usize::MAX);
        for offset in (0..self.capacity).step_by(piece) {
            if !go_on() {
                return Err(Error::Fenced { why: "this Checkpointer was closed".into() });
            }
            loop {
                let here = self.mapped()?;
                if here <= offset {
                    return Ok(());
                }
                let len = (here - offset).min(piece);
                match sys::populate(&self.map, offset, len) {
                    // It was made shorter meanwhile, for the next payload.
                    Err(e) if e.raw_os_error() == Some(libc::EFAULT) && self.mapped()? < here => {}
                    other => break other.at("populate", &self.path())?,
                }
            }
        }
        Ok(())
    }

    /// Bytes of the map that lie inside the file now: behind a file that was made shorter there are
    /// no pages.
    fn mapped(&self) -> Result<usize> {
        let len = usize::try_from(self.file_len()?).unwrap_or(usize::MAX);
        Ok(padded(len.max(1)).min(self.capacity))
    }

    /// Makes it known to a device, once; its pages are in place.
    pub(super) fn pin(&self, pin: &Arc<dyn Pin>) -> Result<()> {
        let mut known = locked(&self.known);
        if matches!(*known, Known::Unasked) {
            let len = self.mapped()?;
            *known = match pin.pin(self.map.as_mut_ptr() as usize, len) {
                true => Known::Pinned(pin.clone()),
                false => Known::Refused,
            };
        }
        Ok(())
    }

    /// First byte of the slot.
    #[must_use]
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// Bytes that may be stored to.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
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

    /// The first `len` bytes, rounded up to pages.
    pub(crate) fn bytes(&self, len: usize) -> &[u8] {
        assert!(padded(len) <= self.capacity, "{len} bytes of {}", self.capacity);
        // SAFETY: the map has `capacity` bytes inside the file. While a slot holds a checkpoint
        // nobody stores to it (but for mending, whose bytes are checked by whoever reads them); a
        // filler reads through its own pointer.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr(), padded(len)) }
    }

    /// The file's length; `None` where its name has gone or leads to another file: somebody cleaned
    /// up around us.
    pub(super) fn len_at_its_path(&self) -> Option<u64> {
        use std::os::unix::fs::MetadataExt;
        let ours = self.file.metadata().ok()?;
        let there = std::fs::symlink_metadata(self.path()).ok()?;
        (ours.dev() == there.dev() && ours.ino() == there.ino()).then_some(ours.len())
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

impl Payload for SlotPayload {
    fn len(&self) -> u64 {
        self.len
    }

    fn block<'a>(&'a self, offset: u64, len: usize, _: &'a mut AlignedBuf) -> Result<&'a [u8]> {
        let begin = usize::try_from(offset).unwrap_or(usize::MAX);
        let all = self.slot.bytes(usize::try_from(self.len).unwrap_or(usize::MAX));
        all.get(begin..begin.saturating_add(len))
            .ok_or_else(|| Error::Bug(format!("block {offset}+{len} of {} bytes", self.len)))
    }

    fn slot(&self) -> Option<&Slot> {
        Some(&self.slot)
    }
}
