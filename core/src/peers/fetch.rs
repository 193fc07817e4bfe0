//! A shard on its way back to the node that needs it: from all that hold it at once, each chunk from one.
//!
//! # Invariants
//!
//! - What arrives is checked against the manifest; a chunk that is bad at one holder comes from another.
//! - Each byte comes once, unless it was bad.
//! - It ends: a holder is asked for a chunk twice at most, and given up after two failures.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

use super::{Arriving, Broken, Chunks, Flow, Incoming, Landing, Peers, remote::Remote};
use crate::{
    error::{Error, Result},
    names::CheckpointKey,
    observe::locked,
};

/// A connection may break, an agent may be restarted: a holder is given up when it fails more often.
const FAILURES_MAX: usize = 2;

/// One holder, while it is of use.
struct Holder<'a> {
    remote: &'a Remote,
    failures: usize,
    /// Chunks that were not what they should be, as they came from it.
    bad: Mutex<BTreeSet<usize>>,
}

/// What a fetch found on its way.
#[derive(Debug, Default)]
pub(crate) struct Fetched {
    /// Holders whose bytes were bad, or that could not be read: one sentence each.
    pub(crate) trouble: Vec<String>,
}

/// Fills `into` from `holders`, all of which hold the same manifest.
///
/// # Errors
/// Some chunk could be had from none of them.
pub(crate) fn fetch(
    peers: &Peers,
    key: &CheckpointKey,
    holders: &[Arc<Remote>],
    into: &Incoming,
) -> Result<Fetched> {
    let name = key.file(&into.manifest.payload.file);
    let chunk_bytes = into.manifest.payload.chunk_bytes;
    let mut holders: Vec<Holder<'_>> = holders.iter().map(|remote| Holder::new(remote)).collect();
    let mut told = Fetched::default();
    // Bad from everybody: it may have been so on its way, and is asked for once more.
    let mut again = BTreeSet::new();
    // Whoever is quick takes more, at first. What was bad somewhere is then given out by name.
    let mut shared = true;
    loop {
        let missing = into.missing();
        if missing.is_empty() {
            return Ok(told);
        }
        let parts: Vec<Arc<Chunks<'_>>> = if shared {
            let all = Arc::new(Chunks::new(missing.iter().copied(), chunk_bytes));
            holders.iter().map(|_| all.clone()).collect()
        } else {
            let parts = give_out(&holders, &missing, &mut again);
            let parts = parts.ok_or_else(|| {
                let why = format!(
                    "{} chunks could not be had: {}",
                    missing.len(),
                    told.trouble.join("; ")
                );
                Error::damaged(format!("{key} on other nodes"), why)
            })?;
            parts.into_iter().map(|part| Arc::new(Chunks::new(part, chunk_bytes))).collect()
        };
        shared = false;
        let pulled = pull(peers, &name, &holders, &parts, into);
        for (holder, pulled) in holders.iter_mut().zip(pulled) {
            let node = &holder.remote.node;
            if let Err(e) = pulled {
                holder.failures += 1;
                told.trouble.push(format!("{node}: {}", e.chain()));
            } else if !locked(&holder.bad).is_empty() {
                told.trouble.push(format!("{node}: a chunk was damaged"));
            }
        }
        told.trouble.dedup();
        holders.retain(|holder| holder.failures < FAILURES_MAX);
    }
}

impl<'a> Holder<'a> {
    fn new(remote: &'a Remote) -> Self {
        Self { remote, failures: 0, bad: Mutex::default() }
    }
}

/// Which holder is asked for which chunk; `None`: one of them can be had from nobody.
fn give_out(
    holders: &[Holder<'_>],
    missing: &[usize],
    again: &mut BTreeSet<usize>,
) -> Option<Vec<Vec<usize>>> {
    let mut parts: Vec<Vec<usize>> = vec![Vec::new(); holders.len()];
    for chunk in missing {
        let good = |index: &usize| !locked(&holders[*index].bad).contains(chunk);
        let least = |parts: &[Vec<usize>], all: &mut dyn Iterator<Item = usize>| {
            all.min_by_key(|index| parts[*index].len())
        };
        let chosen = match least(&parts, &mut (0..holders.len()).filter(good)) {
            None if again.insert(*chunk) => least(&parts, &mut (0..holders.len())),
            other => other,
        };
        parts[chosen?].push(*chunk);
    }
    Some(parts)
}

/// Pulls from all holders at once; how that went with each.
fn pull(
    peers: &Peers,
    name: &str,
    holders: &[Holder<'_>],
    parts: &[Arc<Chunks<'_>>],
    into: &Incoming,
) -> Vec<Result<()>> {
    let payload = &into.manifest.payload;
    let one = |holder: &Holder<'_>, chunks: &Chunks<'_>| {
        let (ticket, length) = holder.remote.ticket(name, payload.chunk_bytes)?;
        if length != payload.length {
            return Err(Error::damaged(name, format!("it has {length} bytes")));
        }
        let landing = Watching { inner: into, bad: &holder.bad };
        peers.network.pull(&holder.remote.node, &ticket, &landing, chunks)
    };
    std::thread::scope(|scope| {
        let one = &one;
        let pulling: Vec<_> = holders
            .iter()
            .zip(parts)
            .map(|(holder, chunks)| scope.spawn(move || one(holder, chunks)))
            .collect();
        let ended = pulling.into_iter().map(|pulling| {
            pulling.join().unwrap_or_else(|_| Err(Error::Bug("a fetch panicked".into())))
        });
        ended.collect()
    })
}

/// Remembers which chunks of a holder were bad.
struct Watching<'a> {
    inner: &'a Incoming,
    bad: &'a Mutex<BTreeSet<usize>>,
}

impl Landing for Watching<'_> {
    fn chunk(&self, index: usize) -> Result<Box<dyn Arriving + '_>> {
        Ok(Box::new(Watched { inner: self.inner.chunk(index)?, index, bad: self.bad }))
    }
}

struct Watched<'a> {
    inner: Box<dyn Arriving + 'a>,
    index: usize,
    bad: &'a Mutex<BTreeSet<usize>>,
}

impl Arriving for Watched<'_> {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn take(self: Box<Self>, from: &mut dyn Flow) -> Result<bool, Broken> {
        let good = self.inner.take(from)?;
        if !good {
            locked(self.bad).insert(self.index);
        }
        Ok(good)
    }
}
