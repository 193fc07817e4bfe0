//! What this node holds for ranks of other nodes: for each of them two slots, one with what was
//! acknowledged last, one for what comes next.
//!
//! They lie in the run's ram tier like the slots of any rank: should the rank itself come to this node,
//! its shard is there. Beside them lies a `note` of whose they are.
//!
//! # Invariants
//!
//! - What was acknowledged goes only where its owner's word says that it is of no more use.
//! - A rank that this node owns is not held for anybody: one of the two has its slots, never both.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, Weak},
};

use serde::{Deserialize, Serialize};

use super::{
    Incoming,
    note::{self, Note},
};
use crate::{
    commit::{publish_shard, read_manifest},
    error::{Error, Result},
    manifest::decode,
    names::{CheckpointKey, Id, Rank},
    observe::locked,
    signal::Signal,
    snapshot::{
        arena::{Arena, Memory},
        budget::Budget,
        slot::SlotPayload,
    },
    tier::{Created, Tier, find_record, memory::MemoryTier},
};

/// One holds what is acknowledged, the other takes the next.
const SLOTS: usize = 2;

/// Names the memory: it goes with it.
const STORE: &str = "_store";

/// The slots for one rank of another node.
#[derive(Debug)]
pub(crate) struct Shelf {
    arena: Arc<Arena>,
    ram: Arc<dyn Tier>,
    destination: PathBuf,
    rank: Rank,
    store: Id,
    /// Held while the slots are changed. True: they are their own rank's.
    over: Mutex<bool>,
    /// As of the last offer, or as an agent before this one noted it.
    owner: Mutex<Option<Owner>>,
    /// What arrives in one of the slots.
    arriving: Mutex<Vec<Weak<Incoming>>>,
    /// What the note beside the slots says.
    noted: Mutex<Option<Owner>>,
}

/// For whom something is held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Owner {
    /// The rank's own node.
    pub(crate) node: String,
    /// The attempt's number.
    pub(crate) attempt: u32,
    /// Copies that are to be on other nodes.
    pub(crate) replicas: usize,
}

/// What became of an offer.
pub(crate) enum Offered {
    /// Its bytes may come.
    Wanted(Arc<Incoming>),
    /// It is here.
    Held,
}

impl Shelf {
    /// Finds what an agent before this one held. `destination`: the run's directory.
    pub(crate) fn open(
        destination: PathBuf,
        ram_dir: PathBuf,
        rank: Rank,
        budget: Budget,
    ) -> Result<Self> {
        let ram: Arc<dyn Tier> = Arc::new(MemoryTier::open(&ram_dir, budget.clone())?);
        let store = store(&*ram)?;
        let signal = Arc::new(Signal::default());
        let arena = Arena::new(ram.clone(), ram_dir, rank, SLOTS, budget, signal, false);
        arena.adopt()?;
        let (over, owner, noted) = (Mutex::default(), Mutex::default(), Mutex::default());
        let arriving = Mutex::default();
        Ok(Self { arena, ram, destination, rank, store, over, owner, noted, arriving })
    }

    /// The rank itself has come to this node: nothing here touches its slots any more.
    pub(crate) fn end(&self) {
        let mut over = locked(&self.over);
        *over = true;
        let arriving = std::mem::take(&mut *locked(&self.arriving));
        arriving.iter().filter_map(Weak::upgrade).for_each(|incoming| drop(incoming.take()));
    }

    fn changing(&self) -> Result<MutexGuard<'_, bool>> {
        let over = locked(&self.over);
        if *over {
            return Err(Error::Fenced { why: format!("{} is here itself", self.rank) });
        }
        Ok(over)
    }

    /// The random id of the memory.
    pub(crate) fn store(&self) -> Id {
        self.store
    }

    /// For whom it is, as far as that is known.
    pub(crate) fn owner(&self) -> Option<Owner> {
        locked(&self.owner).clone()
    }

    /// Knows again what an agent before this one noted. An offer that was quicker knows better.
    pub(crate) fn recall(&self, owner: Owner) {
        let mut known = locked(&self.owner);
        if known.is_none() {
            *locked(&self.noted) = Some(owner.clone());
            *known = Some(owner);
        }
    }

    /// Notes beside the slots whose they are, where that has changed. What is held is held without it.
    fn remember(&self) {
        let Some(owner) = self.owner() else { return };
        // Where it fails, that is told once: not at each step.
        if locked(&self.noted).replace(owner.clone()).as_ref() == Some(&owner) {
            return;
        }
        if let Err(e) = Note::new(&self.destination, self.rank, owner).keep(&*self.ram) {
            let run = self.destination.display();
            tracing::warn!("{run}, {}: no note of whose copy it is: {}", self.rank, e.chain());
        }
    }

    /// What is held, the newest first.
    pub(crate) fn held(&self) -> Vec<CheckpointKey> {
        let mut held = self.arena.holds();
        held.sort_by(|a, b| b.cmp(a));
        held
    }

    /// Bytes that its slots have room for.
    pub(crate) fn bytes(&self) -> u64 {
        self.arena.bytes()
    }

    /// Where it lies, for reading.
    pub(crate) fn ram(&self) -> &Arc<dyn Tier> {
        &self.ram
    }

    /// Makes room for a shard; `owner`: for whom, where that is known. Of this rank's other shards those
    /// in `keep` stay, and those of the same attempt that are newer; all of them where there is no `keep`.
    pub(crate) fn offer(
        &self,
        key: &CheckpointKey,
        manifest: Vec<u8>,
        owner: Option<Owner>,
        keep: Option<&[CheckpointKey]>,
    ) -> Result<Offered> {
        let _changing = self.changing()?;
        let attempt = owner.as_ref().map_or(0, |owner| owner.attempt);
        if owner.is_some() {
            let mut known = locked(&self.owner);
            if known.as_ref().is_none_or(|known| known.attempt <= attempt) {
                *known = owner;
            }
        }
        let described = decode(&manifest, "a manifest that was offered", key, self.rank)?;
        if self.holds(key) {
            let (_, there) = read_manifest(&*self.ram, key, self.rank, None)?;
            if there == manifest {
                self.remember();
                return Ok(Offered::Held);
            }
            return Err(Error::Fenced { why: format!("another {key} of {} is held", self.rank) });
        }
        let may_go = |old: &CheckpointKey| {
            let over = old.attempt.number < attempt || old.step < key.step;
            over && keep.is_some_and(|keep| !keep.contains(old))
        };
        let filling = self.arena.acquire(described.payload.length, Memory::AsWritten, &may_go)?;
        let Some(filling) = filling else {
            let why = format!("both slots for {} are in use", self.rank);
            return Err(Error::Skipped { step: key.step, why });
        };
        let incoming = Arc::new(Incoming::new(filling, described, manifest, true));
        let mut arriving = locked(&self.arriving);
        arriving.retain(|incoming| incoming.strong_count() > 0);
        arriving.push(Arc::downgrade(&incoming));
        drop(arriving);
        Ok(Offered::Wanted(incoming))
    }

    /// Every chunk of it is there: it is held from here on. Bytes that were not held before.
    pub(crate) fn publish(&self, incoming: &Incoming) -> Result<u64> {
        let _changing = self.changing()?;
        let key = incoming.manifest.identity.key();
        let Some(filling) = incoming.take() else {
            // An answer that was lost, asked for again.
            return if self.holds(&key) { Ok(0) } else { Err(super::send::late(&key)) };
        };
        self.remember();
        let len = incoming.manifest.payload.length;
        let payload = SlotPayload { slot: filling.slot().clone(), len };
        let name = key.file(&incoming.manifest.payload.file);
        let receipt = self.ram.put(&name, &payload)?;
        publish_shard(&*self.ram, &incoming.manifest.identity, &incoming.bytes, receipt)?;
        self.arena.hold(filling, key);
        self.arena.tidy();
        Ok(len)
    }

    pub(crate) fn holds(&self, key: &CheckpointKey) -> bool {
        self.arena.find(key).is_some()
    }

    /// Gives all memory back, unless something in `keep` is among it; true where nothing is left.
    pub(crate) fn release(&self, keep: &[CheckpointKey]) -> Result<bool> {
        let _changing = self.changing()?;
        if self.arena.holds().iter().all(|key| !keep.contains(key)) {
            self.arena.give_back()?;
            note::forget(&*self.ram, self.rank)?;
            *locked(&self.noted) = None;
        }
        Ok(self.arena.holds().is_empty())
    }
}

/// The id of the memory that this ram tier lies in.
pub(crate) fn store(ram: &dyn Tier) -> Result<Id> {
    let read = |bytes: Vec<u8>| {
        let text = String::from_utf8(bytes).ok();
        let id = text.and_then(|text| Id::parse(text.trim()));
        id.ok_or_else(|| Error::damaged(format!("{}/{STORE}", ram.address()), "it is no id"))
    };
    if let Some(bytes) = find_record(ram, STORE)? {
        return read(bytes);
    }
    let id = Id::random()?;
    match ram.create(STORE, format!("{id}\n").as_bytes())? {
        Created::New => Ok(id),
        Created::Exists => find_record(ram, STORE)?.map_or(Ok(id), read),
    }
}
