//! A slot as whoever fills it sees it: a map of its file, every page in place.
//!
//! Whoever owns the slot may be another process (`keeper`, hosted by an agent): then this is made from
//! a descriptor that came over a socket, and the owner never maps the file.
//!
//! # Invariants
//!
//! - Bytes that may be stored to have pages: no store faults, and none meets a full tmpfs.
//! - It is unpinned before it is unmapped.

use std::{
    fs::File,
    mem::ManuallyDrop,
    sync::{Arc, Mutex},
};

use memmap2::{Advice, MmapOptions, MmapRaw};

use super::{budget::PIECE_BYTES, device::Pin};
use crate::{
    error::{Doing, Error, Result},
    observe::locked,
    sys,
    tier::buffer::padded,
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
pub struct SlotMap {
    file: Arc<File>,
    map: ManuallyDrop<MmapRaw>,
    /// Bytes of the map that lie inside the file, rounded up to pages.
    capacity: usize,
    known: Mutex<Known>,
}

impl Drop for SlotMap {
    fn drop(&mut self) {
        if let Known::Pinned(pin) = std::mem::take(&mut *locked(&self.known))
            && !pin.unpin(self.map.as_mut_ptr() as usize)
        {
            tracing::warn!("a slot stays mapped: a device may know it");
            return;
        }
        // SAFETY: nobody uses it after this.
        unsafe { ManuallyDrop::drop(&mut self.map) };
    }
}

impl SlotMap {
    /// Maps the first `len` bytes of a file that has them.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn new(file: Arc<File>, len: u64) -> Result<Self> {
        let capacity = padded(usize::try_from(len.max(1)).unwrap_or(usize::MAX));
        let map = MmapOptions::new().len(capacity).map_raw(&*file);
        let map = map.doing(|| "map a slot".into())?;
        // A fork's child (a data loader) must not get the slots: it would keep their memory.
        map.advise(Advice::DontFork).doing(|| "advise a slot".into())?;
        // Where the kernel grants huge pages for tmpfs; most do not, and lose nothing by the
        // asking.
        let _ = map.advise(Advice::HugePage);
        Ok(Self { file, map: ManuallyDrop::new(map), capacity, known: Mutex::default() })
    }

    /// Puts every page in place, so that no store into the slot faults. `go_on` is asked now and
    /// then; false ends it.
    ///
    /// # Errors
    /// tmpfs is full, or [`Error::Fenced`] where `go_on` said no.
    pub(crate) fn populate(&self, go_on: &dyn Fn() -> bool) -> Result<()> {
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
                    other => break other.doing(|| "populate a slot".into())?,
                }
            }
        }
        Ok(())
    }

    /// Bytes of the map that lie inside the file now: behind a file that was made shorter there are
    /// no pages.
    fn mapped(&self) -> Result<usize> {
        let len = self.file.metadata().doing(|| "stat a slot".into())?.len();
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        Ok(padded(len.max(1)).min(self.capacity))
    }

    /// Makes it known to a device, once; its pages are in place.
    pub(crate) fn pin(&self, pin: &Arc<dyn Pin>) -> Result<()> {
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

    /// Lets a system call put bytes at `at`, `len` at most; `deed` itself neither loads nor stores them:
    /// the file may have become shorter, and the call says so.
    pub(crate) fn fill<T>(&self, at: u64, len: usize, deed: impl FnOnce(&mut [u8]) -> T) -> T {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        assert!(at.saturating_add(len) <= self.capacity, "{at}+{len} of {}", self.capacity);
        // SAFETY: it lies in the map. Nobody else has it: one chunk of a slot arrives at a time, and what
        // is being filled has no name that a reader knows.
        deed(unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().add(at), len) })
    }

    /// The first `len` bytes, rounded up to pages.
    pub(crate) fn bytes(&self, len: usize) -> &[u8] {
        assert!(padded(len) <= self.capacity, "{len} bytes of {}", self.capacity);
        // SAFETY: the map has `capacity` bytes inside the file. While a slot holds a checkpoint
        // nobody stores to it (but for mending, whose bytes are checked by whoever reads them); a
        // filler reads through its own pointer.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr(), padded(len)) }
    }
}
