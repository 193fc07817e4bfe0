//! The shelves of this node: what it holds for ranks of other nodes, one for each rank.
//!
//! # Invariants
//!
//! - A rank that this node owns, or that a live process here owns without it, has no shelf.
//! - What a dead trainer has left here is a shelf's as soon as a newer attempt leads: the rank is elsewhere
//!   now, and says itself what is still needed of it. Nothing goes with the change.
//! - What an agent before this one noted is known again before anybody is healed by it, or not at all: a note
//!   that is damaged, or lies where it does not belong, is told once and heals nobody.
//! - Whose a note is says the file's user, never what is in it; it is read as that user.

use std::{
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use tierkeep_proto::peer as wire;

use super::{Host, left, peers::Transfer};
use crate::{
    error::{Error, Result},
    keeper::Ending,
    names::Rank,
    observe::locked,
    ownership,
    peers::{
        Site,
        hold::Shelf,
        note::{self, NOTES, Note},
    },
    tier::memory::MemoryTier,
};

impl Host {
    /// Whether this node owns the rank.
    fn owns(&self, place: &(PathBuf, u32)) -> bool {
        let chair = locked(&self.chairs).get(place).cloned();
        // One that somebody opens or closes at this moment counts.
        chair.is_some_and(|chair| chair.try_lock().is_none_or(|taken| taken.is_some()))
    }

    /// The slots for a rank of another node.
    pub(super) fn shelf(&self, site: &Site, rank: Rank) -> Result<((PathBuf, u32), Arc<Shelf>)> {
        let place = (crate::config::real(&site.destination), rank.0);
        let ram_dir = self.ram_dir(site);
        self.leave_to_shelf(site, &place);
        let mut shelves = locked(&self.shelves);
        if self.owns(&place) {
            return Err(Error::Fenced { why: format!("{rank} is here itself") });
        }
        if let Some((_, shelf)) = shelves.get(&place) {
            return Ok((place, shelf.clone()));
        }
        let budget = self.users.budget(site.uid, &self.settings, &ram_dir)?;
        let shelf = Arc::new(Shelf::open(site.destination.clone(), ram_dir, rank, budget)?);
        shelves.insert(place.clone(), (site.clone(), shelf.clone()));
        Ok((place, shelf))
    }

    /// Gives up a rank whose trainer was here and is dead, where a newer attempt has it elsewhere.
    fn leave_to_shelf(&self, site: &Site, place: &(PathBuf, u32)) {
        let Some(chair) = locked(&self.chairs).get(place).cloned() else { return };
        // Somebody opens or closes it at this moment: then it has somebody.
        let Some(mut taken) = chair.try_lock() else { return };
        let Some(seat) = taken.clone().filter(|seat| seat.who.uid == site.uid) else { return };
        let newest = self.commons.led(site).map(|led| led.record.attempt.number);
        let own = seat.keeper.running().map(|(record, _)| record.attempt.number);
        if own.is_none() || newest <= own {
            return;
        }
        seat.look_for_death(&self.clock);
        if seat.trainer().is_some() {
            return; // It hears of the newer attempt by itself.
        }
        seat.end(Ending::HandOver);
        if let Err(e) = seat.forget() {
            tracing::warn!("{}: {}", seat.name(), e.chain());
        }
        tracing::info!("{} has gone to another node: what is here is held for it", seat.name());
        *taken = None;
        drop(taken);
        self.forget(place, &chair);
    }

    /// The rank itself comes to this node: what was held for it is its own now.
    pub(super) fn give_up_shelf(&self, place: &(PathBuf, u32), ram_dir: &Path) {
        let shelf = locked(&self.shelves).remove(place);
        shelf.iter().for_each(|(_, shelf)| shelf.end());
        // Also one that was never read again.
        if let Err(e) = note::forget(&MemoryTier::reader(ram_dir), Rank(place.1)) {
            tracing::warn!("{}: {}", Rank(place.1), e.chain());
        }
        let theirs = |t: &Transfer| matches!(t, Transfer::In { place: p, .. } if p == place);
        locked(&self.transfers).open.retain(|_, (transfer, _)| !theirs(transfer));
    }

    /// Knows again for whom an agent before this one held something, each on a thread of its own.
    pub(super) fn know_shelves_again(self: &Arc<Self>) {
        for file in self.users.roots().iter().flat_map(|root| left::kept_below(root, NOTES)) {
            let host = self.clone();
            let know = move || {
                if let Err(e) = host.know_again(&file) {
                    let file = file.display();
                    tracing::warn!("{file}: what it is about is not healed: {}", e.chain());
                }
            };
            if let Err(e) = std::thread::Builder::new().name("tierkeep-held".into()).spawn(know) {
                tracing::error!("no thread for what an agent has held: {e}");
            }
        }
    }

    fn know_again(&self, file: &Path) -> Result<()> {
        let (who, bytes) = self.read_as_its_user(file)?;
        let name = file.display().to_string();
        let note = Note::open(&bytes, &name)?;
        let rank = Rank(note.rank);
        let site = Site::of(wire::Site {
            destination: note.destination.as_os_str().as_bytes().to_vec(),
            uid: who.uid,
            gid: who.gid,
            groups: who.groups,
        })?;
        let ram_dir = self.ram_dir(&site);
        if file != ram_dir.join(note::name(rank)) {
            return Err(Error::damaged(name, "it lies in another place than its own"));
        }
        let lock = ownership::rank_lock(&self.home(&site), rank);
        if ram_dir.join(left::name(rank.0)).exists() || ownership::is_held(&lock)? {
            return Ok(()); // It has come here meanwhile: these slots are its own.
        }
        let (_, shelf) = self.shelf(&site, rank)?;
        if !shelf.held().is_empty() {
            shelf.recall(note.owner);
        }
        Ok(())
    }
}
