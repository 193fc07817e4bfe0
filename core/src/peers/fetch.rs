//! A shard on its way back to the node that needs it: from all that hold it at once, each chunk from one.
//!
//! # Invariants
//!
//! - What arrives is checked against the manifest; a chunk that is bad at one holder comes from another.
//! - Each byte comes once, unless it was bad.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use super::{Chunks, Incoming, Peers, remote::Remote};
use crate::{
    error::{Error, Result},
    names::CheckpointKey,
    observe::locked,
};

/// One holder, while it is of use.
struct Holder<'a> {
    remote: &'a Remote,
    trouble: Mutex<Option<Error>>,
    refused: AtomicBool,
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
    let payload = &into.manifest.payload;
    let name = key.file(&payload.file);
    let mut told = Fetched::default();
    let mut left = all(holders);
    // Bytes that were bad once may have been so on their way: a last round asks everybody again.
    let mut again = true;
    loop {
        let missing = into.missing();
        if missing.is_empty() {
            return Ok(told);
        }
        if left.is_empty() {
            let why =
                format!("{} chunks could not be had: {}", missing.len(), told.trouble.join("; "));
            return Err(Error::damaged(format!("{key} on other nodes"), why));
        }
        let chunks = Chunks::new(missing.iter().copied(), payload.chunk_bytes);
        std::thread::scope(|scope| {
            for holder in &left {
                let (chunks, name) = (&chunks, &name);
                scope.spawn(move || {
                    let ticket = holder.remote.ticket(name, payload.chunk_bytes);
                    let pulled = ticket.and_then(|(ticket, length)| {
                        if length != payload.length {
                            return Err(Error::damaged(name, format!("it has {length} bytes")));
                        }
                        let own = Counting { inner: into, holder };
                        peers.network.pull(&holder.remote.node, &ticket, &own, chunks)
                    });
                    if let Err(e) = pulled {
                        *locked(&holder.trouble) = Some(e);
                    }
                });
            }
        });
        let progress = into.missing().len() < missing.len();
        let mut good = Vec::new();
        for holder in left {
            let node = &holder.remote.node;
            let trouble = locked(&holder.trouble).take();
            let refused = holder.refused.load(Ordering::Acquire);
            match trouble {
                Some(e) => told.trouble.push(format!("{node}: {}", e.chain())),
                None if refused => told.trouble.push(format!("{node}: a chunk was damaged")),
                None => good.push(holder),
            }
        }
        left = good;
        if left.is_empty() && (progress || again) {
            again = progress;
            left = all(holders);
        }
    }
}

fn all(holders: &[Arc<Remote>]) -> Vec<Holder<'_>> {
    let refused = || AtomicBool::new(false);
    let holder = |remote| Holder { remote, trouble: Mutex::default(), refused: refused() };
    holders.iter().map(|remote| holder(&**remote)).collect()
}

/// Remembers that a holder's bytes were bad.
struct Counting<'a> {
    inner: &'a Incoming,
    holder: &'a Holder<'a>,
}

impl super::Landing for Counting<'_> {
    fn chunk(&self, index: usize) -> Result<Box<dyn super::Arriving + '_>> {
        let chunk = self.inner.chunk(index)?;
        Ok(Box::new(Counted { inner: Some(chunk), holder: self.holder }))
    }
}

struct Counted<'a> {
    inner: Option<Box<dyn super::Arriving + 'a>>,
    holder: &'a Holder<'a>,
}

impl super::Arriving for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.inner {
            Some(inner) => inner.write(bytes),
            None => Err(Error::Bug("a chunk that has ended".into())),
        }
    }

    fn finish(mut self: Box<Self>) -> bool {
        let good = self.inner.take().is_some_and(super::Arriving::finish);
        if !good {
            self.holder.refused.store(true, Ordering::Release);
        }
        good
    }
}
