//! The slots of one rank: tmpfs files, mapped, their pages in place, used again for ever.
//!
//! A slot lies in `_slots/` while it is free or being filled, and under its checkpoint's name while
//! it holds one. The file is the same, the map is the same, only the name moves.
//!
//! It owns the slots and who uses them. It does not own one slot's file and map (`slot`), nor which
//! checkpoint may be given up for the next: the caller says so each time (`cascade`).
//!
//! # Invariants
//!
//! - A slot that is being filled has no name that a reader can find.
//! - A slot is taken from a checkpoint only after its manifest is gone.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{
    budget::{Budget, human},
    device::Pin,
    slot::Slot,
};
use crate::{
    error::Result,
    names::{AttemptDir, CheckpointKey, Rank, parse_payload_name, parse_step_dir},
    observe::locked,
    signal::Signal,
    tier::{Source, Tier, buffer::padded, publish::own_word},
};

pub(crate) const SLOTS: &str = "_slots";

#[derive(Clone, Debug, PartialEq)]
enum Use {
    Free,
    /// Being filled, grown or populated by one thread.
    Busy,
    Holds(CheckpointKey),
}

#[derive(Debug)]
struct Held {
    /// `None`: not made yet.
    slot: Option<Arc<Slot>>,
    used: Use,
    populated: bool,
}

/// What a retired checkpoint leaves.
struct Left {
    /// Its directories are empty.
    key: CheckpointKey,
    /// Open, and without a name.
    _manifest: Option<Box<dyn Source>>,
}

impl std::fmt::Debug for Left {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.key.fmt(f)
    }
}

/// Whether a slot's pages are there before it is filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// All of them: it is stored to through a map.
    InPlace,
    /// Those that it had: all of it is written once, by calls.
    AsWritten,
}

/// The slots of one rank.
#[derive(Debug)]
pub struct Arena {
    tier: Arc<dyn Tier>,
    root: PathBuf,
    rank: Rank,
    slots_max: usize,
    budget: Budget,
    held: Mutex<Vec<Held>>,
    /// What is removed behind, not while a save waits.
    left: Mutex<Vec<Left>>,
    /// No slot is made or populated any more.
    closed: AtomicBool,
    signal: Arc<Signal>,
    /// False where another process fills the slots: they are not mapped here.
    mapped: bool,
    /// Of the device whose tensors the state holds, once one was seen.
    pin: OnceLock<Arc<dyn Pin>>,
}

/// A slot that one thread fills. Dropped without [`Arena::hold`], it is free again.
#[derive(Debug)]
pub struct Filling {
    arena: Arc<Arena>,
    index: usize,
    slot: Arc<Slot>,
    done: bool,
}

impl Filling {
    /// The slot.
    #[must_use]
    pub fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        if !self.done {
            self.arena.set(self.index, Use::Free);
        }
    }
}

impl Arena {
    /// An arena without slots yet. `root` is where `tier` keeps its files.
    #[must_use]
    pub fn new(
        tier: Arc<dyn Tier>,
        root: PathBuf,
        rank: Rank,
        slots_max: usize,
        budget: Budget,
        signal: Arc<Signal>,
        mapped: bool,
    ) -> Arc<Self> {
        assert!(slots_max >= 2, "a new snapshot never overwrites the newest complete one");
        let empty = || Held { slot: None, used: Use::Free, populated: false };
        let held = Mutex::new((0..slots_max).map(|_| empty()).collect());
        let closed = AtomicBool::new(false);
        let left = Mutex::default();
        let pin = OnceLock::new();
        Arc::new(Self {
            tier,
            root,
            rank,
            slots_max,
            budget,
            held,
            left,
            closed,
            signal,
            mapped,
            pin,
        })
    }

    /// From here on slots are made known to a device. The first one stays.
    pub fn pin_with(&self, pin: Arc<dyn Pin>) {
        let _ = self.pin.set(pin);
    }

    /// Finds the slots that an earlier process of this rank left, maps them and keeps what they
    /// hold, be they more than `slots_max`. Once, before anything else.
    ///
    /// # Errors
    /// tmpfs did not answer.
    pub fn adopt(&self) -> Result<()> {
        let mut found = self.find_own()?;
        self.tidy();
        found.sort_by_key(|(key, _)| std::cmp::Reverse(key.clone()));
        let mut held = locked(&self.held);
        held.retain(|h| h.slot.is_some());
        for (key, path) in found {
            let slot = Arc::new(Slot::adopt(&path, self.mapped)?);
            let used = match key {
                Some(key) => Use::Holds(key),
                None => {
                    slot.take_back(&slot_path(&self.root, self.rank))?;
                    Use::Free
                }
            };
            held.push(Held { slot: Some(slot), used, populated: false });
        }
        while held.len() < self.slots_max {
            held.push(Held { slot: None, used: Use::Free, populated: false });
        }
        drop(held);
        self.signal.notify();
        Ok(())
    }

    /// Gives back slots beyond `slots_max`: free ones first, then the oldest; never `keep`.
    ///
    /// # Errors
    /// tmpfs did not answer.
    pub fn trim(&self, keep: Option<&CheckpointKey>) -> Result<()> {
        let mut held = locked(&self.held);
        while held.len() > self.slots_max {
            let spare = held.iter().position(|h| h.used == Use::Free).or_else(|| {
                let holders = held.iter().enumerate().filter_map(|(i, h)| match &h.used {
                    Use::Holds(key) if Some(key) != keep => Some((key.clone(), i)),
                    _ => None,
                });
                holders.min().map(|(_, i)| i)
            });
            let Some(spare) = spare else { break };
            let gone = held.swap_remove(spare);
            self.remove(&gone)?;
        }
        Ok(())
    }

    fn remove(&self, held: &Held) -> Result<()> {
        if let Use::Holds(key) = &held.used {
            self.tier.delete(&key.manifest(self.rank))?;
        }
        if let Some(slot) = &held.slot {
            slot.remove()?;
        }
        if let Use::Holds(key) = &held.used {
            self.tier.delete(&key.dir())?;
            self.tier.delete(&crate::names::step_dir(key.step))?;
        }
        Ok(())
    }

    /// Every payload file of this rank, with its checkpoint where a manifest names one.
    fn find_own(&self) -> Result<Vec<(Option<CheckpointKey>, PathBuf)>> {
        let mut found = Vec::new();
        for entry in self.tier.list(SLOTS)? {
            if entry.name.starts_with(&format!("rank-{:06}-", self.rank.0)) {
                found.push((None, self.root.join(SLOTS).join(&entry.name)));
            }
        }
        for step in self.tier.list("")? {
            let Some(number) = parse_step_dir(&step.name) else { continue };
            for attempt in self.tier.list(&step.name)? {
                let Some(dir) = AttemptDir::parse(&attempt.name) else { continue };
                let key = CheckpointKey { step: number, attempt: dir };
                let files = self.tier.list(&key.dir())?;
                if files.is_empty() {
                    locked(&self.left).push(Left { key, _manifest: None });
                    continue; // Its last file was retired by a process that died then.
                }
                // Of several payloads the manifest names one; without a good manifest none is ours.
                let named = crate::commit::read_manifest(&*self.tier, &key, self.rank, None)
                    .map(|(manifest, _)| manifest.payload.file);
                for file in files.iter().filter(|f| parse_payload_name(&f.name) == Some(self.rank))
                {
                    let path = self.root.join(key.file(&file.name));
                    let holds = match &named {
                        Ok(named) => *named == file.name,
                        // Damaged: restore may mend it, so what it is about stays.
                        Err(e) => !e.is_not_found(),
                    };
                    found.push((holds.then(|| key.clone()), path));
                }
            }
        }
        Ok(found)
    }

    /// Makes every slot exist with room for `len` bytes and its pages in place. Called behind, so
    /// that not even the first save waits for page faults; a save meanwhile waits for its slot.
    ///
    /// # Errors
    /// [`Error::Budget`] with the sum for all slots, before any is made.
    pub fn prepare(self: &Arc<Self>, len: u64) -> Result<()> {
        self.check_budget(len)?;
        for index in 0..self.slots_max {
            let mut held = locked(&self.held);
            let place = &mut held[index];
            match (&place.used, &place.slot) {
                (Use::Free, _) => place.used = Use::Busy,
                (Use::Holds(_), Some(slot)) => {
                    // Its pages may be mapped beside any reader.
                    let slot = slot.clone();
                    let populated = std::mem::replace(&mut place.populated, true);
                    drop(held);
                    self.put_in_place(&slot, populated)?;
                    continue;
                }
                _ => continue,
            }
            drop(held);
            let made = self.ready(index, len, Memory::InPlace);
            self.set(index, Use::Free);
            made?;
        }
        Ok(())
    }

    /// Checks that every slot would fit with room for `len` bytes.
    ///
    /// # Errors
    /// [`Error::Budget`] with the sum.
    pub fn check_budget(&self, len: u64) -> Result<()> {
        let held = locked(&self.held);
        let have: u64 =
            held.iter().filter_map(|h| h.slot.as_ref()).map(|s| s.capacity() as u64).sum();
        let room = padded(usize::try_from(len).unwrap_or(usize::MAX)) as u64;
        let want = room.saturating_mul(self.slots_max as u64);
        drop(held);
        let more = want.saturating_sub(have);
        if more == 0 {
            return Ok(());
        }
        let what = format!("{} slots x {} for {}", self.slots_max, human(room), self.rank);
        self.budget.check(more, &what)
    }

    /// Makes, grows or fits the slot at `index`, which the caller has marked busy.
    fn ready(&self, index: usize, len: u64, memory: Memory) -> Result<Arc<Slot>> {
        let (existing, populated) = {
            let held = locked(&self.held);
            (held[index].slot.clone(), held[index].populated)
        };
        if let Some(slot) = existing {
            if let Some(now) = slot.len_at_its_path()
                && slot.fit(now, len)?
            {
                if memory == Memory::InPlace {
                    self.put_in_place(&slot, populated)?;
                    locked(&self.held)[index].populated = true;
                }
                return Ok(slot);
            }
            // Of no use for this length. Its memory is given back before more is asked for.
            slot.remove()?;
            let place = &mut locked(&self.held)[index];
            place.slot = None;
            place.populated = false;
        }
        let path = slot_path(&self.root, self.rank);
        let go_on: &dyn Fn() -> bool = &|| self.is_open();
        let in_place = memory == Memory::InPlace;
        let go_on = in_place.then_some(go_on);
        let slot = Arc::new(Slot::create(&path, len, self.mapped, &self.budget, go_on)?);
        slot.fit(slot.file_len()?, len)?;
        if in_place {
            self.put_in_place(&slot, false)?;
        }
        let place = &mut locked(&self.held)[index];
        place.slot = Some(slot.clone());
        place.populated = in_place;
        Ok(slot)
    }

    fn put_in_place(&self, slot: &Slot, populated: bool) -> Result<()> {
        let Some(map) = slot.map() else {
            return match populated {
                true => Ok(()),
                false => slot.allocate(&|| self.is_open()),
            };
        };
        if !populated {
            map.populate(&|| self.is_open())?;
        }
        self.pin.get().map_or(Ok(()), |pin| map.pin(pin))
    }

    fn is_open(&self) -> bool {
        !self.closed.load(Ordering::Acquire)
    }

    /// No slot is made or populated from here on: whoever is at it ends within a piece's time.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    fn set(&self, index: usize, used: Use) {
        locked(&self.held)[index].used = used;
        self.signal.notify();
    }

    /// A slot for `len` bytes: a free one, else a new one, else the oldest whose checkpoint
    /// `may_go`. `None` where all are in use.
    ///
    /// # Errors
    /// [`Error::Budget`], or tmpfs did not answer.
    pub fn acquire(
        self: &Arc<Self>,
        len: u64,
        memory: Memory,
        may_go: &dyn Fn(&CheckpointKey) -> bool,
    ) -> Result<Option<Filling>> {
        let chosen = match self.take_free() {
            Some(index) => Some((index, None)),
            // Oldest first; `may_go` gives the checkpoint up, so it is asked about one at a time. It may
            // ask a directory that does not answer: nothing is locked meanwhile.
            None => self.holders().into_iter().find_map(|(key, index)| {
                let taken = may_go(&key) && self.take_if(index, &Use::Holds(key.clone()));
                taken.then_some((index, Some(key)))
            }),
        };
        let Some((index, retired)) = chosen else { return Ok(None) };
        if let Some(key) = retired
            && let Err(e) = self.retire(index, &key)
        {
            self.set(index, Use::Holds(key));
            return Err(e);
        }
        match self.ready(index, len, memory) {
            Ok(slot) => Ok(Some(Filling { arena: self.clone(), index, slot, done: false })),
            Err(e) => {
                self.set(index, Use::Free);
                Err(e)
            }
        }
    }

    /// A slot that holds nothing is busy from here on; one that is made rather than one that is not.
    fn take_free(&self) -> Option<usize> {
        let mut held = locked(&self.held);
        let free =
            |made: bool| held.iter().position(|h| h.used == Use::Free && h.slot.is_some() == made);
        let index = free(true).or(free(false))?;
        held[index].used = Use::Busy;
        Some(index)
    }

    fn take_if(&self, index: usize, used: &Use) -> bool {
        let mut held = locked(&self.held);
        let there = held.get_mut(index).filter(|h| h.used == *used);
        there.map(|h| h.used = Use::Busy).is_some()
    }

    /// Checkpoints and their slots, the oldest first.
    fn holders(&self) -> Vec<(CheckpointKey, usize)> {
        let held = locked(&self.held);
        let holders = held.iter().enumerate().filter_map(|(i, h)| match &h.used {
            Use::Holds(key) => Some((key.clone(), i)),
            _ => None,
        });
        let mut holders: Vec<_> = holders.collect();
        holders.sort();
        holders
    }

    fn retire(&self, index: usize, key: &CheckpointKey) -> Result<()> {
        let slot = locked(&self.held)[index].slot.clone();
        // While it is open its pages stay: giving them back takes longer than all else here.
        let manifest = self.tier.open(&key.manifest(self.rank)).ok();
        self.tier.delete(&key.manifest(self.rank))?;
        if let Some(slot) = slot {
            match slot.take_back(&slot_path(&self.root, self.rank)) {
                // Somebody cleaned up around us: `ready` makes another.
                Err(e) if e.is_not_found() => {}
                other => other?,
            }
        }
        locked(&self.left).push(Left { key: key.clone(), _manifest: manifest });
        Ok(())
    }

    /// Removes what retired checkpoints left: empty directories, and pages without a name.
    pub fn tidy(&self) {
        for Left { key, .. } in std::mem::take(&mut *locked(&self.left)) {
            for dir in [key.dir(), crate::names::step_dir(key.step)] {
                if let Err(e) = self.tier.delete(&dir) {
                    tracing::debug!("{dir} stays: {}", e.chain());
                }
            }
        }
    }

    /// The filled slot holds `key` now.
    pub fn hold(&self, mut filling: Filling, key: CheckpointKey) {
        filling.done = true;
        self.set(filling.index, Use::Holds(key));
    }

    /// The slot that holds this rank's shard of `key`.
    #[must_use]
    pub fn find(&self, key: &CheckpointKey) -> Option<Arc<Slot>> {
        let held = locked(&self.held);
        held.iter().find(|h| h.used == Use::Holds(key.clone()))?.slot.clone()
    }

    /// The checkpoints that slots of this rank hold.
    #[must_use]
    pub fn holds(&self) -> Vec<CheckpointKey> {
        let held = locked(&self.held);
        let keys = held.iter().filter_map(|h| match &h.used {
            Use::Holds(key) => Some(key.clone()),
            _ => None,
        });
        keys.collect()
    }

    /// The slots that are ready to be filled or hold something.
    #[must_use]
    pub fn ready_slots(&self) -> Vec<Arc<Slot>> {
        let held = locked(&self.held);
        held.iter().filter(|h| h.populated).filter_map(|h| h.slot.clone()).collect()
    }

    /// Every slot that there is.
    #[must_use]
    pub fn inodes(&self) -> Vec<u64> {
        let held = locked(&self.held);
        held.iter().filter_map(|h| h.slot.as_ref()).map(|slot| slot.inode()).collect()
    }

    /// Bytes that the slots have room for.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let held = locked(&self.held);
        held.iter().filter_map(|h| h.slot.as_ref()).map(|slot| slot.capacity() as u64).sum()
    }

    /// The free slot with this inode, which somebody was filling when its owner went away.
    pub fn refill(self: &Arc<Self>, inode: u64) -> Option<Filling> {
        let mut held = locked(&self.held);
        let of = |h: &Held| h.slot.as_ref().is_some_and(|slot| slot.inode() == inode);
        let index = held.iter().position(|h| h.used == Use::Free && of(h))?;
        let slot = held[index].slot.clone()?;
        held[index].used = Use::Busy;
        Some(Filling { arena: self.clone(), index, slot, done: false })
    }

    /// True where the slot with this inode holds `key`.
    #[must_use]
    pub fn has(&self, inode: u64, key: &CheckpointKey) -> bool {
        self.find(key).is_some_and(|slot| slot.inode() == inode)
    }

    /// Gives all memory back. For a run that ended and is durable elsewhere.
    ///
    /// # Errors
    /// tmpfs did not answer.
    pub fn give_back(&self) -> Result<()> {
        self.give_back_but(None)
    }

    /// The same, but for what holds `keep`.
    ///
    /// # Errors
    /// tmpfs did not answer.
    pub fn give_back_but(&self, keep: Option<&CheckpointKey>) -> Result<()> {
        let kept = |used: &Use| matches!(used, Use::Holds(key) if Some(key) == keep);
        let mut held = locked(&self.held);
        for place in held.iter_mut().filter(|h| h.used != Use::Busy && !kept(&h.used)) {
            let empty = Held { slot: None, used: Use::Free, populated: false };
            self.remove(&std::mem::replace(place, empty))?;
        }
        Ok(())
    }
}

fn slot_path(root: &Path, rank: Rank) -> PathBuf {
    root.join(SLOTS).join(format!("rank-{:06}-{}.slot", rank.0, own_word()))
}
