//! Shards of ranks that are to come to this node, fetched before their trainers ask: whoever replaces a
//! node (an operator, a scheduler's prolog) knows which ranks the new one will have.
//!
//! # Invariants
//!
//! - A hint decides nothing: what comes is one more copy of a shard, and the decision where an attempt
//!   resumes is made and recorded as ever.
//! - Nothing that is held here gives way for it.
//! - A rank that comes in the middle waits for the rest, and no longer than for a lock; then nothing lands
//!   in its slots any more.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::Host;
use crate::{
    attempt::{self, Attempts},
    clock::{Clock, Deadline},
    commit::Listing,
    error::{Error, Result},
    names::{CheckpointKey, Id, Rank},
    observe::locked,
    peers::{
        Peers, Site,
        fetch::fetch,
        hold::Offered,
        remote::{Remote, look_at_all},
    },
    restore::{
        decide::{Wish, decide},
        survey::{Found, copies},
    },
    tier::{Tier, disk::DiskTier, memory::MemoryTier},
};

/// What became of a hint.
#[derive(Clone, Debug)]
pub struct Prefetched {
    /// The step that the run would resume from; `None`: there is no checkpoint.
    pub step: Option<u64>,
    /// By rank, as they were named.
    pub ranks: Vec<RankPrefetched>,
    /// Nodes that did not answer: they may have something newer.
    pub silent: Vec<String>,
}

/// One rank of it.
#[derive(Clone, Debug)]
pub struct RankPrefetched {
    /// The rank.
    pub rank: u32,
    /// Bytes that came; none where its shard was here.
    pub bytes: u64,
    /// Why its shard is not here, where that is so.
    pub trouble: Option<String>,
}

/// How often it is looked for agents that gossip has not found yet.
const LOOK: Duration = Duration::from_millis(250);

/// The checkpoint that a run would resume from, and where it lies.
struct Chosen {
    key: CheckpointKey,
    run_id: Id,
    remotes: Vec<Arc<Remote>>,
    ram: MemoryTier,
}

impl Host {
    /// Fetches what `ranks` of the run at `destination`, which is `user`'s (user and group; without: whose
    /// agent this is), would resume from.
    ///
    /// # Errors
    /// This agent has no others, does not serve the user, or does not know the others in time.
    pub fn prefetch(
        &self,
        destination: &Path,
        user: Option<(u32, u32)>,
        ranks: &[u32],
        within: Duration,
    ) -> Result<Prefetched> {
        let network = self.network.get().cloned();
        let network = network.ok_or_else(|| Error::invalid("this agent has no others"))?;
        let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let (uid, gid) = user.unwrap_or(own);
        let site = Site::new(destination.to_path_buf(), uid, gid, Vec::new())?;
        let peers = Peers { network, site, commons: self.commons.clone() };
        // It acts as the run's user: not on a thread that serves others after.
        let deadline = Deadline::after(&self.clock, within);
        std::thread::scope(|scope| {
            let work = scope.spawn(|| self.prefetch_as(&peers, ranks, &deadline));
            work.join().unwrap_or_else(|_| Err(Error::Bug("a prefetch panicked".into())))
        })
    }

    fn prefetch_as(&self, peers: &Peers, ranks: &[u32], deadline: &Deadline) -> Result<Prefetched> {
        self.act_as(&peers.site)?;
        while !peers.network.is_settled() {
            if deadline.left(&self.clock).is_none() {
                let who = "gossip has not found the others yet";
                return Err(deadline.passed("all agents of the cluster", who));
            }
            self.clock.pause(LOOK);
        }
        let (chosen, silent) = self.choose(peers)?;
        let Some(chosen) = chosen else {
            return Ok(Prefetched { step: None, ranks: Vec::new(), silent });
        };
        let one = |rank: &u32| {
            let place = (crate::config::real(&peers.site.destination), *rank);
            locked(&self.prefetching).insert(place.clone());
            let came = self.prefetch_one(peers, &chosen, Rank(*rank));
            locked(&self.prefetching).remove(&place);
            self.changed.notify();
            match came {
                Ok(bytes) => RankPrefetched { rank: *rank, bytes, trouble: None },
                Err(e) => RankPrefetched { rank: *rank, bytes: 0, trouble: Some(e.chain()) },
            }
        };
        let ranks = ranks.iter().map(one).collect();
        Ok(Prefetched { step: Some(chosen.key.step.0), ranks, silent })
    }

    /// What would be resumed from, as far as nodes answer, whose records are known here from now on.
    fn choose(&self, peers: &Peers) -> Result<(Option<Chosen>, Vec<String>)> {
        let (remotes, silent) = look_at_all(peers);
        let silent = silent.into_iter().map(|(node, e)| format!("{node}: {}", e.chain())).collect();
        let dir = self.ram_dir(&peers.site);
        let budget = self.users.budget(peers.site.uid, &self.settings, &dir)?;
        let ram = MemoryTier::open(&dir, budget)?;
        let disk = DiskTier::reader(&self.home(&peers.site));
        let own: [&dyn Tier; 2] = [&ram, &disk];
        let far = remotes.iter().map(|remote| &**remote as &dyn Tier);
        let tiers: Vec<&dyn Tier> = own.into_iter().chain(far).collect();
        let attempts = Attempts::load(&tiers)?;
        let parent = decide(&tiers, &disk, &attempts, &Wish::default())?.parent;
        let (Some(parent), Some(newest)) = (parent, attempts.newest()) else {
            return Ok((None, silent));
        };
        let run_id = newest.run_id;
        for record in attempts.records() {
            let (_, bytes) = attempt::read(&tiers, record.attempt.number)?;
            attempt::keep(&ram, record, &bytes)?;
        }
        let joined = attempts.joined().iter();
        joined.copied().try_for_each(|number| attempt::join_number(&ram, number))?;
        Ok((Some(Chosen { key: parent.key(), run_id, remotes, ram }), silent))
    }

    /// Bytes that came.
    fn prefetch_one(&self, peers: &Peers, chosen: &Chosen, rank: Rank) -> Result<u64> {
        let Chosen { key, run_id, remotes, ram } = chosen;
        let disk = DiskTier::reader(&self.home(&peers.site));
        for tier in [ram as &dyn Tier, &disk] {
            if Listing::of(tier, key)?.manifests.contains(&rank) {
                return Ok(0);
            }
        }
        let far: Vec<&dyn Tier> = remotes.iter().map(|remote| &**remote as &dyn Tier).collect();
        let listings = far.iter().map(|tier| Listing::of(*tier, key)).collect::<Result<_>>()?;
        let found = Found { key: key.clone(), listings };
        let (good, _) = copies(&far, &found, rank, Some(run_id))?;
        let Some(first) = good.first() else {
            return Err(Error::NotFound { what: format!("{rank}'s shard of {key}") });
        };
        let holders: Vec<_> = good.iter().map(|copy| remotes[copy.tier].clone()).collect();
        let (_, shelf) = self.shelf(&peers.site, rank)?;
        // For whom: nobody yet. Should the rank not come, it is one more copy that its owner lets go.
        let offered = shelf.offer(key, first.bytes.to_vec(), None, None)?;
        let Offered::Wanted(incoming) = offered else { return Ok(0) };
        let told = fetch(peers, key, &holders, &incoming)?;
        for why in &told.trouble {
            tracing::warn!("{key}, {rank}: {why}; another copy was used");
        }
        shelf.publish(&incoming)?;
        Ok(first.manifest.payload.length)
    }

    /// A rank comes to this node: what is being fetched for it may end first.
    pub(super) fn wait_for_prefetch(&self, place: &(PathBuf, u32), within: Duration) {
        let deadline = Deadline::after(&self.clock, within);
        loop {
            let seen = self.changed.seen();
            if !locked(&self.prefetching).contains(place) {
                return;
            }
            let Some(left) = deadline.left(&self.clock) else { return };
            self.changed.wait(seen, left);
        }
    }
}
