//! Where chunks of a shard arrive: in a slot, each checked against the manifest before it counts.
//!
//! # Invariants
//!
//! - A chunk that counts was checked, and is not written to again: a second one of its number, late or
//!   twice sent, changes nothing.
//! - A chunk that was cut off leaves nothing that counts.
//! - Once the transfer has ended, no byte is written any more: the slot is somebody else's.

use std::{
    collections::{BTreeSet, VecDeque},
    os::unix::fs::FileExt,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU8, Ordering},
    },
};

use crate::{
    error::{Doing, Error, Result},
    manifest::ShardManifest,
    observe::locked,
    snapshot::{arena::Filling, slot::Slot},
};

/// Chunks that are still to be carried, handed out one at a time to whoever carries.
#[derive(Debug)]
pub struct Chunks {
    todo: Mutex<VecDeque<usize>>,
    refused: Mutex<BTreeSet<usize>>,
    chunk_bytes: u64,
}

impl Chunks {
    /// These, in this order.
    #[must_use]
    pub fn new(todo: impl IntoIterator<Item = usize>, chunk_bytes: u64) -> Self {
        let todo = Mutex::new(todo.into_iter().collect());
        Self { todo, refused: Mutex::default(), chunk_bytes }
    }

    /// The next one to carry.
    #[must_use]
    pub fn next(&self) -> Option<usize> {
        locked(&self.todo).pop_front()
    }

    /// It did not get through: another try carries it.
    pub fn again(&self, chunk: usize) {
        locked(&self.todo).push_front(chunk);
    }

    /// It got through and was not what the manifest says.
    pub fn refuse(&self, chunk: usize) {
        locked(&self.refused).insert(chunk);
    }

    /// Bytes of each but the last.
    #[must_use]
    pub fn chunk_bytes(&self) -> u64 {
        self.chunk_bytes
    }

    /// Those that were refused, and nothing is left of them here.
    pub(crate) fn take_refused(&self) -> BTreeSet<usize> {
        std::mem::take(&mut *locked(&self.refused))
    }
}

/// Takes the chunks of one file.
pub trait Landing: Send + Sync {
    /// Begins to take a chunk.
    ///
    /// # Errors
    /// There is no such chunk, or it is arriving at this moment from elsewhere.
    fn chunk(&self, index: usize) -> Result<Box<dyn Arriving + '_>>;
}

/// One chunk on its way in. Dropped before its end, it never was.
pub trait Arriving: Send {
    /// Takes its next bytes.
    ///
    /// # Errors
    /// They are more than it has, or have no place.
    fn write(&mut self, bytes: &[u8]) -> Result<()>;
    /// It has ended: true where it is what it should be.
    fn finish(self: Box<Self>) -> bool;
}

const AWAY: u8 = 0;
const ARRIVING: u8 = 1;
const THERE: u8 = 2;

/// A shard that arrives in a slot.
#[derive(Debug)]
pub struct Incoming {
    slot: Arc<Slot>,
    filling: Mutex<Option<Filling>>,
    /// Held while something is written. True: it has ended.
    ended: RwLock<bool>,
    pub(crate) manifest: ShardManifest,
    pub(crate) bytes: Vec<u8>,
    chunks: Vec<AtomicU8>,
}

impl Incoming {
    /// Into `filling`, whose file has the payload's length.
    pub(crate) fn new(filling: Filling, manifest: ShardManifest, bytes: Vec<u8>) -> Self {
        let chunks = manifest.payload.chunks.iter().map(|_| AtomicU8::new(AWAY)).collect();
        let slot = filling.slot().clone();
        let (filling, ended) = (Mutex::new(Some(filling)), RwLock::new(false));
        Self { slot, filling, ended, manifest, bytes, chunks }
    }

    /// Chunks that are not there.
    pub(crate) fn missing(&self) -> Vec<usize> {
        let there = |chunk: &AtomicU8| chunk.load(Ordering::Acquire) == THERE;
        self.chunks.iter().enumerate().filter(|(_, c)| !there(c)).map(|(i, _)| i).collect()
    }

    /// The slot; `None`: another call has taken it. Nothing lands here any more.
    pub(crate) fn take(&self) -> Option<Filling> {
        *self.ended.write().unwrap_or_else(PoisonError::into_inner) = true;
        locked(&self.filling).take()
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> Result<()> {
        let ended = self.ended.read().unwrap_or_else(PoisonError::into_inner);
        if *ended {
            return Err(Error::Fenced { why: "this transfer has ended".into() });
        }
        self.slot.file().write_all_at(bytes, at).at("write", &self.slot.path())
    }
}

impl Landing for Incoming {
    fn chunk(&self, index: usize) -> Result<Box<dyn Arriving + '_>> {
        let count = self.chunks.len();
        let state = self
            .chunks
            .get(index)
            .ok_or_else(|| Error::invalid(format!("chunk {index} of a shard of {count}")))?;
        let crc = self.manifest.payload.chunks[index];
        let left = self.manifest.payload.chunk_len(index);
        let at = index as u64 * self.manifest.payload.chunk_bytes;
        let begun = state.compare_exchange(AWAY, ARRIVING, Ordering::AcqRel, Ordering::Acquire);
        let known = match begun {
            Ok(_) => false,
            Err(THERE) => true, // What arrives now is looked at, and kept nowhere.
            Err(_) => return Err(Error::invalid(format!("chunk {index} is arriving already"))),
        };
        let hasher = crc32fast::Hasher::new();
        Ok(Box::new(Chunk { incoming: self, index, known, at, left, crc, hasher, done: false }))
    }
}

struct Chunk<'a> {
    incoming: &'a Incoming,
    index: usize,
    /// It was there before.
    known: bool,
    at: u64,
    left: u64,
    crc: u32,
    hasher: crc32fast::Hasher,
    done: bool,
}

/// What is checksummed and written at a time: the second of the two finds it in the core's cache.
const PIECE_BYTES: usize = 128 << 10;

impl Arriving for Chunk<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() as u64 > self.left {
            let more = "it has more bytes than its manifest says";
            return Err(Error::damaged(format!("chunk {}", self.index), more));
        }
        for piece in bytes.chunks(PIECE_BYTES) {
            self.hasher.update(piece);
            if !self.known {
                self.incoming.write_at(piece, self.at)?;
            }
            self.at += piece.len() as u64;
            self.left -= piece.len() as u64;
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> bool {
        let good = self.left == 0 && self.hasher.clone().finalize() == self.crc;
        if good && !self.known {
            self.incoming.chunks[self.index].store(THERE, Ordering::Release);
            self.done = true;
        }
        good
    }
}

impl Drop for Chunk<'_> {
    fn drop(&mut self) {
        if !self.done && !self.known {
            self.incoming.chunks[self.index].store(AWAY, Ordering::Release);
        }
    }
}
