//! A place that keeps files: RAM, a disk, another node, later a bucket. The layout in it is the same
//! everywhere (see `names`), so everything above this line is written once.
//!
//! A tier is narrow on purpose. It owns:
//! - keeping the bytes of a file until told otherwise
//! - making a file appear whole, once, or not at all
//! - saying, truthfully, that a payload would survive what the tier is named for ([`Receipt`])
//!
//! It does not own:
//! - which shards go where and when (`cascade`)
//! - when a checkpoint exists (`commit`)
//! - what may be deleted (`retain`)
//! - retrying, pacing or counting (`wrap`)
//!
//! # Invariants (the contract; `testing::contract` holds every tier and wrapper to it)
//!
//! - A file that can be seen is whole.
//! - A name is given once: `create` and `put` never change what is there.
//! - What `put` returned a receipt for, `open` reads, also after the tier is opened anew.
//! - A `put` whose answer was lost, done again, meets its own bytes and succeeds.
//! - What is there when `create` or `confirm` returns is as safe as the tier is named, whoever
//!   wrote it.
//! - Deleting what is not there is success.

pub mod buffer;
pub mod disk;
pub mod memory;
pub mod object;
pub(crate) mod posix;
pub mod publish;
pub mod wrap;

use std::fmt;

use crate::{
    chunk::CHUNK_BYTES,
    error::{Error, Result},
    record,
};
use buffer::AlignedBuf;

/// Which kind of place a tier is, named by what it survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TierKind {
    /// Survives the process.
    Ram,
    /// Survives the reboot.
    Disk,
    /// Survives the node: another node's RAM or disk.
    Peer,
    /// Survives the cluster: a bucket.
    Object,
}

impl fmt::Display for TierKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ram => "ram",
            Self::Disk => "disk",
            Self::Peer => "peer",
            Self::Object => "object",
        })
    }
}

/// A tier's word that a payload is safe there. Only a tier can make one.
#[must_use = "a receipt that is not recorded is a shard that cannot be committed"]
#[derive(Clone, Debug)]
pub struct Receipt {
    pub(crate) tier: TierKind,
    pub(crate) name: String,
    pub(crate) length: u64,
}

/// Bytes that `put` can read block by block without a copy where they lie in a slot.
pub trait Payload: Sync {
    /// Exact length in bytes.
    fn len(&self) -> u64;
    /// True where there is nothing.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The bytes at `offset` (a multiple of 4096), `len` of them rounded up to a multiple of 4096,
    /// at an address that is a multiple of 4096. What lies past the payload's end is zeros.
    ///
    /// # Errors
    /// The bytes could not be had, or do not match their checksum.
    fn block<'a>(
        &'a self,
        offset: u64,
        len: usize,
        scratch: &'a mut AlignedBuf,
    ) -> Result<&'a [u8]>;
    /// The longest block that is asked for at a time. Blocks of one chunk are asked for in order, by one
    /// thread.
    fn block_bytes(&self) -> u64 {
        CHUNK_BYTES
    }
    /// CRC-32 of `len` bytes from `offset`, whole chunks, as it was taken when they were copied out of the
    /// training state; `None` where that is not known.
    fn crc32(&self, _offset: u64, _len: u64) -> Option<u32> {
        None
    }
    /// The slot that holds them, if one does: the memory tier then moves it instead of copying.
    fn slot(&self) -> Option<&crate::snapshot::slot::Slot> {
        None
    }
}

/// An open file of a tier. While it is open, the bytes stay what they are, whatever is deleted.
pub trait Source: Send + Sync {
    /// Length in bytes.
    fn len(&self) -> u64;
    /// True where there is nothing.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Fills `into` from `offset`, or as much of it as the file has from there: a caller may offer
    /// an aligned buffer that reaches past the end.
    ///
    /// # Errors
    /// The operating system's, and [`Error::Damaged`] for a file shorter than it said.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<()>;
    /// Whether these bytes lie in memory (tmpfs, the page cache), so that reading them waits for
    /// nothing. Never where the file has fewer.
    fn is_cached(&self, _offset: u64, _len: usize) -> bool {
        false
    }
    /// CRC-32 of the whole, where the place keeps one and tells it without reading.
    fn crc32(&self) -> Option<u32> {
        None
    }
    /// The open file, where it is one: to be handed to another process.
    fn file(&self) -> Option<&std::fs::File> {
        None
    }
}

/// One line of a listing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// The last part of the name.
    pub name: String,
    /// True for a directory.
    pub is_dir: bool,
}

/// Whether a record was new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// It is there now and was not before.
    New,
    /// The name was taken; nothing was changed. What has it is as safe as the tier is named.
    Exists,
}

/// A place that keeps files. Names are relative, parts joined by `/`.
///
/// Calls block: a tier works on background threads, where a call that cannot be cut short in the
/// middle is a call that cannot leave half a deed.
pub trait Tier: Send + Sync + fmt::Debug {
    /// What it survives.
    fn kind(&self) -> TierKind;
    /// Its address for messages.
    fn address(&self) -> String;
    /// Makes `payload` appear under `name`, safe as the tier is named. The same bytes that are there
    /// already are success.
    ///
    /// # Errors
    /// Other bytes have the name; or the tier did not answer: then the payload may be there, whole,
    /// and the caller asks again.
    fn put(&self, name: &str, payload: &dyn Payload) -> Result<Receipt>;
    /// Makes a small file appear if the name is free, safe as the tier is named.
    ///
    /// # Errors
    /// The file may or may not be there; the caller asks again and compares.
    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created>;
    /// Opens a file for reading.
    ///
    /// # Errors
    /// [`Error::is_not_found`] where there is none.
    fn open(&self, name: &str) -> Result<Box<dyn Source>>;
    /// What a directory holds, in rising order; nothing where there is none.
    ///
    /// # Errors
    /// The place did not answer: never to be taken for "empty".
    fn list(&self, dir: &str) -> Result<Vec<Entry>>;
    /// Returns when everything that a listing of `dir` shows is as safe as the tier is named: another
    /// process may have made a name appear a moment ago and not have synced it.
    ///
    /// # Errors
    /// What is there may not be safe.
    fn confirm(&self, dir: &str) -> Result<()>;
    /// Removes a file, or an empty directory (one that is not empty stays, without error).
    ///
    /// # Errors
    /// The file may or may not be there.
    fn delete(&self, name: &str) -> Result<()>;
    /// Overwrites bytes of a payload that were found damaged with those that were meant. Dying in
    /// the middle leaves damaged what was damaged.
    ///
    /// # Errors
    /// The bytes are still damaged.
    fn mend(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()>;
    /// Takes a payload out of sight and keeps its blocks for the next `put`, or deletes it.
    ///
    /// # Errors
    /// The file may or may not be there.
    fn retire(&self, name: &str) -> Result<()>;
    /// Ends what was begun here and neither finished nor given up, but for names that `stays` says so of:
    /// uploads of dead processes. How many; a place that has no such thing has none.
    ///
    /// # Errors
    /// The place did not answer.
    fn sweep(&self, _stays: &dyn Fn(&str) -> bool) -> Result<usize> {
        Ok(0)
    }
}

/// A tier that is shared is a tier.
#[deny(clippy::missing_trait_methods)]
impl Tier for std::sync::Arc<dyn Tier> {
    fn kind(&self) -> TierKind {
        (**self).kind()
    }
    fn address(&self) -> String {
        (**self).address()
    }
    fn put(&self, name: &str, payload: &dyn Payload) -> Result<Receipt> {
        (**self).put(name, payload)
    }
    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created> {
        (**self).create(name, bytes)
    }
    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        (**self).open(name)
    }
    fn list(&self, dir: &str) -> Result<Vec<Entry>> {
        (**self).list(dir)
    }
    fn confirm(&self, dir: &str) -> Result<()> {
        (**self).confirm(dir)
    }
    fn delete(&self, name: &str) -> Result<()> {
        (**self).delete(name)
    }
    fn mend(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        (**self).mend(name, offset, bytes)
    }
    fn retire(&self, name: &str) -> Result<()> {
        (**self).retire(name)
    }
    fn sweep(&self, stays: &dyn Fn(&str) -> bool) -> Result<usize> {
        (**self).sweep(stays)
    }
}

/// Reads a whole small file.
///
/// # Errors
/// As [`Tier::open`]; damage where it is longer than a record may be.
pub fn read_record(tier: &dyn Tier, name: &str) -> Result<Vec<u8>> {
    let source = tier.open(name)?;
    let len = source.len();
    if len > record::RECORD_BYTES_MAX {
        return Err(Error::damaged(label(tier, name), format!("{len} bytes are too many")));
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
    source.read_at(0, &mut bytes)?;
    Ok(bytes)
}

/// [`read_record`] where a missing file is an answer.
///
/// # Errors
/// As [`read_record`], but for not found.
pub fn find_record(tier: &dyn Tier, name: &str) -> Result<Option<Vec<u8>>> {
    match read_record(tier, name) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.is_not_found() => Ok(None),
        Err(e) => Err(e),
    }
}

/// Creates a record, and takes an own one that is there already for success: a retry whose first
/// answer was lost meets itself.
///
/// # Errors
/// As [`Tier::create`]; `Ok(false)` where other bytes have the name.
pub fn create_same(tier: &dyn Tier, name: &str, bytes: &[u8]) -> Result<bool> {
    match tier.create(name, bytes)? {
        Created::New => Ok(true),
        Created::Exists => Ok(find_record(tier, name)?.is_some_and(|there| there == bytes)),
    }
}

/// A file's name for messages: `ram:00…01/00000001-…/rank-000000.json`.
#[must_use]
pub fn label(tier: &dyn Tier, name: &str) -> String {
    format!("{}/{name}", tier.address())
}
