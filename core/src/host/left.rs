//! What an agent that is gone has left: its ranks are owned again before anybody asks, so that what is
//! only in RAM goes on to disk though its trainer is dead too.
//!
//! Beside a rank's slots lies what its trainer said when it took the rank.
//!
//! # Invariants
//!
//! - A rank that is owned again has the same writer: its attempt goes on, nothing is decided anew.
//! - Whoever trains it still, and has not found this agent yet, has not lost it: the process is known by
//!   its number and the moment of its start.
//! - Nothing here keeps an agent from serving: what cannot be owned stays as it lies.

use std::{
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use prost::Message;
use rustix::fs::OFlags;
use tierkeep_proto::trainer as wire;

use super::{
    Host,
    peer::{Peer, Who},
    seat::Seat,
};
use crate::{
    attempt::{self, Attempts},
    error::{Doing, Error, Result},
    names::Rank,
    wire::convert,
};

const DIR: &str = "_agent";

/// A trainer's words are some hundred bytes; longer is nobody's of ours.
const BYTES_MAX: u64 = 1 << 20;

pub(super) fn name(rank: u32) -> String {
    format!("{DIR}/{rank:06}")
}

impl Seat {
    /// Says beside the slots whose they are.
    pub(super) fn remember(&self, peer: &Peer) -> Result<()> {
        let place = &self.keeper.place;
        let open = Some(self.open.clone());
        let kept = wire::Kept { open, pid: peer.pid, started: peer.started };
        self.forget()?;
        place.ram.create(&name(place.config.rank), &kept.encode_to_vec()).map(drop)
    }

    /// Where its words lie, or those of who had the rank before.
    pub(super) fn words(&self) -> PathBuf {
        let config = &self.keeper.place.config;
        config.ram_dir().join(name(config.rank))
    }

    /// The slots are nobody's any more.
    pub(super) fn forget(&self) -> Result<()> {
        let place = &self.keeper.place;
        place.ram.delete(&name(place.config.rank))
    }
}

impl Host {
    /// Owns again what an agent before has owned, each rank on a thread of its own.
    pub(super) fn own_what_is_left(self: &Arc<Self>) {
        for file in self.users.roots().iter().flat_map(|root| kept_below(root, DIR)) {
            let host = self.clone();
            let own = move || {
                if let Err(e) = host.own_again(&file) {
                    tracing::warn!("{} stays as it lies: {}", file.display(), e.chain());
                }
            };
            if let Err(e) = std::thread::Builder::new().name("tierkeep-left".into()).spawn(own) {
                tracing::error!("no thread for what an agent has left: {e}");
            }
        }
    }

    /// What an agent before this one has left in a user's ram tier. This thread acts for that user from
    /// here on: what a name leads to may change under our feet.
    pub(super) fn read_as_its_user(&self, file: &Path) -> Result<(Who, Vec<u8>)> {
        let meta = std::fs::symlink_metadata(file).at("stat", file)?;
        if !meta.is_file() || meta.len() > BYTES_MAX {
            return Err(Error::damaged(file.display().to_string(), "no agent has left it so"));
        }
        let who = Who { uid: meta.uid(), gid: meta.gid(), groups: vec![meta.gid()] };
        self.users.act_as(&who)?;
        Ok((who, read_words(file).at("read", file)?))
    }

    pub(super) fn own_again(self: &Arc<Self>, file: &Path) -> Result<()> {
        let (who, bytes) = self.read_as_its_user(file)?;
        let uid = who.uid;
        let kept = wire::Kept::decode(bytes.as_slice()).ok();
        let Some(wire::Kept { open: Some(open), pid, started }) = kept else {
            return Err(Error::damaged(file.display().to_string(), "it is no trainer's words"));
        };
        let mut config = convert::config(&open, self.users.root_of(uid))?;
        config.lock_wait = Duration::ZERO;
        if file.parent().and_then(Path::parent) != Some(config.ram_dir().as_path()) {
            return Err(Error::damaged(file.display().to_string(), "it lies in another run"));
        }
        let (start, nonce) = (convert::id(&open.start)?, convert::id(&open.nonce)?);
        let (rank, leads) = (Rank(config.rank), config.leads());
        let chair = self.chair(&config);
        let mut taken = chair.lock();
        if taken.is_some() {
            return Ok(()); // Its trainer was quicker.
        }
        let keeper = self.keeper(config, &who, start, nonce)?;
        let disk = keeper.place.disk.clone();
        let attempts = Attempts::load(&[&*disk, &*keeper.place.ram])?;
        let newest = attempts.records().iter().rev().find(|record| {
            attempt::is_claimed_by(&*disk, &record.attempt, rank, &nonce).is_ok_and(|ours| ours)
        });
        let Some(record) = newest else { return Ok(()) };
        // A decision for each record of this start.
        keeper.go_on(record, record.decision + 1)?;
        let peer = Peer::still_there(pid, started, who.clone());
        let seat = Seat::left(keeper, who, open, peer, &self.clock);
        if leads && seat.trainer().is_none() {
            seat.keeper.end_start();
        }
        tracing::info!("{} is owned again", seat.name());
        *taken = Some(Arc::new(seat));
        Ok(())
    }
}

/// Of a file that may be another one by now: no link is followed, no pipe waited for.
fn read_words(file: &Path) -> io::Result<Vec<u8>> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = std::fs::File::options().read(true).custom_flags(flags).open(file)?;
    let mut bytes = Vec::new();
    file.take(BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// What was kept below a user's ram tier, in each run's directory of this name.
pub(super) fn kept_below(root: &Path, dir: &str) -> Vec<PathBuf> {
    let list = |at: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(at).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    };
    list(root).iter().flat_map(|run| list(&run.join(dir))).collect()
}
