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
    io,
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
    snapshot::{
        arena::Filling,
        map::SlotMap,
        slot::{Slot, SlotPayload},
    },
    tier::buffer::AlignedBuf,
};

/// Chunks that are still to be carried, handed out one at a time to whoever carries.
pub struct Chunks<'a> {
    todo: Mutex<VecDeque<usize>>,
    refused: Mutex<BTreeSet<usize>>,
    chunk_bytes: u64,
    tell: Option<&'a (dyn Fn(usize) + Sync)>,
}

impl std::fmt::Debug for Chunks<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chunks").field("todo", &self.todo).finish_non_exhaustive()
    }
}

impl<'a> Chunks<'a> {
    /// These, in this order.
    #[must_use]
    pub fn new(todo: impl IntoIterator<Item = usize>, chunk_bytes: u64) -> Self {
        let todo = Mutex::new(todo.into_iter().collect());
        Self { todo, refused: Mutex::default(), chunk_bytes, tell: None }
    }

    /// Tells `tell` of each that got through.
    #[must_use]
    pub fn telling(self, tell: &'a (dyn Fn(usize) + Sync)) -> Self {
        Self { tell: Some(tell), ..self }
    }

    /// It got through, and is what it should be.
    pub fn carried(&self, chunk: usize) {
        if let Some(tell) = self.tell {
            tell(chunk);
        }
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
    /// Bytes that it has.
    fn len(&self) -> u64;
    /// True where it has none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Takes all of them; true where they are what they should be.
    ///
    /// # Errors
    /// They did not come, or have no place.
    fn take(self: Box<Self>, from: &mut dyn Flow) -> Result<bool, Broken>;
}

/// Bytes as they come over a network.
pub trait Flow {
    /// Returns when some have come.
    ///
    /// # Errors
    /// The connection broke, or its time is over.
    fn ready(&mut self) -> io::Result<()>;
    /// Takes some; 0: there are no more.
    ///
    /// # Errors
    /// The connection broke. `WouldBlock`: none have come yet.
    fn receive(&mut self, into: &mut [u8]) -> io::Result<usize>;
    /// Whether it is the kernel that writes to what [`Flow::receive`] is given, and it never waits: where
    /// that has no memory behind it, the call fails, and a store would have been this process's end.
    fn is_direct(&self) -> bool;
}

impl Flow for &[u8] {
    fn ready(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self, into: &mut [u8]) -> io::Result<usize> {
        io::Read::read(self, into)
    }

    fn is_direct(&self) -> bool {
        false
    }
}

/// Why a chunk did not arrive.
#[derive(Debug)]
pub enum Broken {
    /// Its bytes did not come.
    Flow(io::Error),
    /// They have no place here.
    Place(Error),
}

impl From<Error> for Broken {
    fn from(e: Error) -> Self {
        Self::Place(e)
    }
}

/// Takes some bytes of `from`, waited for where none have come, into `into`.
pub(super) fn some_of(from: &mut dyn Flow, into: &mut [u8]) -> Result<usize, Broken> {
    loop {
        match taken(from.receive(into))? {
            Some(n) => return Ok(n),
            None => from.ready().map_err(Broken::Flow)?,
        }
    }
}

/// `None`: nothing has come yet.
fn taken(answer: io::Result<usize>) -> Result<Option<usize>, Broken> {
    match answer {
        Ok(0) => Err(Broken::Flow(io::ErrorKind::UnexpectedEof.into())),
        Ok(n) => Ok(Some(n)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(Broken::Flow(e)),
    }
}

const AWAY: u8 = 0;
const ARRIVING: u8 = 1;
const THERE: u8 = 2;

/// A shard that arrives in a slot.
#[derive(Debug)]
pub struct Incoming {
    slot: Arc<Slot>,
    /// Where the kernel puts what it has from a socket, without a copy on the way. Nothing else touches
    /// it: the file is somebody's who may cut it short.
    map: Option<Arc<SlotMap>>,
    filling: Mutex<Option<Filling>>,
    /// Held while something is written. True: it has ended.
    ended: RwLock<bool>,
    /// tmpfs lets in one write to a file at a time, and whoever waits there spins: here it sleeps, and others
    /// have the core to receive on.
    turn: Mutex<()>,
    pub(crate) manifest: ShardManifest,
    pub(crate) bytes: Vec<u8>,
    chunks: Vec<AtomicU8>,
}

impl Incoming {
    /// Into `filling`, whose file has the payload's length; one that is filled `often` is mapped, which
    /// costs as much as it saves the first time.
    pub(crate) fn new(
        filling: Filling,
        manifest: ShardManifest,
        bytes: Vec<u8>,
        often: bool,
    ) -> Self {
        let chunks = manifest.payload.chunks.iter().map(|_| AtomicU8::new(AWAY)).collect();
        let slot = filling.slot().clone();
        let map = if often { slot.map_for_arrivals() } else { None };
        let (filling, ended) = (Mutex::new(Some(filling)), RwLock::new(false));
        Self { slot, map, filling, ended, turn: Mutex::default(), manifest, bytes, chunks }
    }

    /// Chunks that are not there.
    pub(crate) fn missing(&self) -> Vec<usize> {
        let there = |chunk: &AtomicU8| chunk.load(Ordering::Acquire) == THERE;
        self.chunks.iter().enumerate().filter(|(_, c)| !there(c)).map(|(i, _)| i).collect()
    }

    /// Whether the file is as long as it was: nobody has cut it short.
    pub(crate) fn has_its_length(&self) -> bool {
        self.slot.file_len().is_ok_and(|len| len == self.manifest.payload.length)
    }

    /// The slot; `None`: another call has taken it. Nothing lands here any more.
    pub(crate) fn take(&self) -> Option<Filling> {
        *self.ended.write().unwrap_or_else(PoisonError::into_inner) = true;
        locked(&self.filling).take()
    }

    /// Does something to the slot's bytes, unless the transfer has ended.
    fn writing<T>(&self, deed: impl FnOnce() -> Result<T, Broken>) -> Result<T, Broken> {
        let ended = self.ended.read().unwrap_or_else(PoisonError::into_inner);
        if *ended {
            let why = "this transfer has ended".into();
            return Err(Broken::Place(Error::Fenced { why }));
        }
        deed()
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
        let len = self.manifest.payload.chunk_len(index);
        let at = index as u64 * self.manifest.payload.chunk_bytes;
        let begun = state.compare_exchange(AWAY, ARRIVING, Ordering::AcqRel, Ordering::Acquire);
        let known = match begun {
            Ok(_) => false,
            Err(THERE) => true, // What arrives now is looked at, and kept nowhere.
            Err(_) => return Err(Error::invalid(format!("chunk {index} is arriving already"))),
        };
        Ok(Box::new(Chunk { incoming: self, index, known, at, len, crc, done: false }))
    }
}

struct Chunk<'a> {
    incoming: &'a Incoming,
    index: usize,
    /// It was there before.
    known: bool,
    at: u64,
    len: u64,
    crc: u32,
    done: bool,
}

/// What is taken and checksummed at a time: the second of the two finds it in the core's cache. It fits
/// there twice, in the slot and in a buffer.
const PIECE_BYTES: usize = 128 << 10;

impl Chunk<'_> {
    /// The next bytes of it, also in `scratch`.
    fn piece(&self, from: &mut dyn Flow, at: u64, scratch: &mut [u8]) -> Result<(), Broken> {
        let direct = self.incoming.map.as_ref().filter(|_| from.is_direct() && !self.known);
        let mut got = 0;
        while got < scratch.len() {
            let Some(map) = direct else {
                got += some_of(from, &mut scratch[got..])?;
                continue;
            };
            let here = at + got as u64;
            let into = |bytes: &mut [u8]| taken(from.receive(bytes));
            match self.incoming.writing(|| map.fill(here, scratch.len() - got, into))? {
                Some(n) => got += n,
                None => from.ready().map_err(Broken::Flow)?,
            }
        }
        let slot = &self.incoming.slot;
        if direct.is_some() {
            // By a call, not by a load: see `map`.
            let payload = SlotPayload { slot: slot.clone(), len: at + scratch.len() as u64 };
            payload.read_into(at, scratch)?;
        } else if !self.known {
            self.incoming.writing(|| {
                let _turn = locked(&self.incoming.turn);
                let written = slot.file().write_all_at(scratch, at);
                written.at("write", &slot.path()).map_err(Broken::Place)
            })?;
        }
        Ok(())
    }
}

impl Arriving for Chunk<'_> {
    fn len(&self) -> u64 {
        self.len
    }

    fn take(mut self: Box<Self>, from: &mut dyn Flow) -> Result<bool, Broken> {
        let mut scratch = AlignedBuf::new(PIECE_BYTES);
        let mut hasher = crc32fast::Hasher::new();
        let mut done = 0;
        while done < self.len {
            let piece = usize::try_from(self.len - done).unwrap_or(usize::MAX).min(PIECE_BYTES);
            self.piece(from, self.at + done, &mut scratch[..piece])?;
            hasher.update(&scratch[..piece]);
            done += piece as u64;
        }
        let good = hasher.finalize() == self.crc;
        if good && !self.known {
            self.incoming.chunks[self.index].store(THERE, Ordering::Release);
            self.done = true;
        }
        Ok(good)
    }
}

impl Drop for Chunk<'_> {
    fn drop(&mut self) {
        if !self.done && !self.known {
            self.incoming.chunks[self.index].store(AWAY, Ordering::Release);
        }
    }
}
