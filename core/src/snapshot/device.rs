//! Bytes that a device brings into a slot by itself, while the trainer or the training goes on.
//!
//! ```text
//! Pin::pin (once a slot) -> Bring::begin (each save) -> Flight::land -> checksums
//! ```
//!
//! It owns the promise that nobody uses a slot while a device writes to it. It does not own how a
//! device is told to: that is the face's (`python/tierkeep/_cuda.py`), the only one that knows whose
//! tensors they are.
//!
//! # Invariants
//!
//! - Whatever happens after a copy has begun, the slot is neither read nor given away before it has
//!   ended: a [`Flight`] that is dropped waits.
//! - A slot is unpinned before it is unmapped: a device that still knew the old pages would write
//!   there, and the checksum would be that of the new ones.
//! - Bytes of a device are checksummed where they landed, after they landed.

use std::{fmt::Debug, sync::Arc};

use super::map::SlotMap;
use crate::error::Result;

/// Makes memory known to a device's DMA, and unknown again.
///
/// Called on any thread, with locks of the core held: an implementation that needs a lock of its own
/// (Python's) is used by a face that never calls the core under that lock.
pub trait Pin: Send + Sync + Debug {
    /// From here on the device reaches `len` bytes from `start`. True where it does; where it
    /// cannot, copies still work and take longer, and the implementation says so.
    fn pin(&self, start: usize, len: usize) -> bool;
    /// The memory at `start` is about to go. False: the device may still know it, so that it stays,
    /// unused: a later map at its address would not be what the device writes to.
    fn unpin(&self, start: usize) -> bool;
}

/// Where the bytes of one tensor of a device go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Its index in the state's tensors.
    pub tensor: usize,
    /// First byte in the payload.
    pub offset: usize,
    /// Bytes.
    pub len: usize,
}

/// One save's copies from devices.
pub trait Bring: Send {
    /// Begins them, on the thread of the save. The slot is at `slot`; every placement lies in its
    /// first `len` bytes.
    ///
    /// # Errors
    /// They could not be begun; none is under way any more.
    fn begin(
        self: Box<Self>,
        slot: usize,
        len: usize,
        places: &[Placement],
    ) -> Result<Box<dyn Landing>>;
}

/// Copies that are under way.
pub trait Landing: Send {
    /// Returns when the placements that begin before byte `upto` of the slot are there; with the
    /// slot's length, when nothing is under way any more. Called again after an error, as often as
    /// it is dropped, it waits for what is left.
    ///
    /// # Errors
    /// The device failed, or the wait was interrupted.
    fn wait(&mut self, upto: usize) -> Result<()>;
}

/// Copies into a slot that may be under way. It holds the slot.
pub(crate) struct Flight {
    landing: Option<Box<dyn Landing>>,
    len: usize,
    _slot: Arc<SlotMap>,
}

impl Flight {
    /// Begins the copies of `bring` into `slot`.
    ///
    /// # Errors
    /// As [`Bring::begin`].
    pub(crate) fn begin(
        bring: Option<Box<dyn Bring>>,
        slot: &Arc<SlotMap>,
        len: usize,
        places: &[Placement],
    ) -> Result<Self> {
        let landing = match bring {
            Some(bring) => Some(bring.begin(slot.as_mut_ptr() as usize, len, places)?),
            None => None,
        };
        Ok(Self { landing, len, _slot: slot.clone() })
    }

    /// Returns when everything before byte `upto` is in the slot.
    ///
    /// # Errors
    /// As [`Landing::wait`].
    pub(crate) fn land(&mut self, upto: usize) -> Result<()> {
        let Some(landing) = &mut self.landing else { return Ok(()) };
        // An error may be of whoever waits (Ctrl-C): what is under way still is.
        landing.wait(upto)?;
        if upto >= self.len {
            self.landing = None;
        }
        Ok(())
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let Some(mut landing) = self.landing.take() else { return };
        // A wait can be interrupted; a device that failed says so, and then has nothing under way.
        for _ in 0..8 {
            let Err(e) = landing.wait(self.len) else { return };
            tracing::warn!("a copy from a device whose save has ended: {}", e.chain());
        }
    }
}
