//! One payload on its way to a bucket: in parts, several at a time, taken up again where an earlier process
//! left it.
//!
//! # Invariants
//!
//! - An object that appears has every byte: a part is acknowledged with its checksum, the whole with the
//!   checksum of all parts, and its length is asked for afterwards.
//! - Parts that an earlier process sent are used, and if the whole is then refused, all are sent anew: no
//!   mixture of two payloads is ever acknowledged.
//! - Memory is `in_flight` times a block of the payload and half a MiB, whatever the payload's length.
//! - When it returns well, no unfinished upload of this name is left.
//! - A request that makes no progress is ended and sent again; none waits for ever.
//! - Credentials that end meanwhile cost the requests that were refused, and no part that was acknowledged.

use std::{
    future::Future,
    io,
    ops::ControlFlow,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use backon::{BlockingRetryable, ExponentialBuilder};
use bytes::Bytes;
use crc32fast::Hasher;
use object_store::path::Path;
use tokio::sync::mpsc;

use super::{
    address::Address,
    hands::{hands, wait, wait_within},
    wire::{Body, Failure, Stat, Stored, Tag, Wire},
};
use crate::{
    chunk::CHUNK_BYTES,
    error::{Error, Result},
    observe::locked,
    tier::{
        Payload,
        buffer::{AlignedBuf, padded},
    },
};

/// A part of an upload. Amazon asks for 5 MiB to 5 GiB each and not more than 10,000 of them; Google for the
/// same; Azure for not more than 50,000 of up to 4,000 MiB. 16 MiB fill one connection for a fifth of a
/// second at the 80 MB/s that it is given, and 64 of them in flight are one shard of 1 GiB. 10,000 of them
/// are 156 GiB; the parts of a longer shard are longer: 1 TiB has parts of 108 MiB.
const PART_BYTES: u64 = 16 << 20;
const PARTS_MAX: u64 = 10_000;

/// What is handed to a connection at a time.
const BLOCK_BYTES: usize = 256 << 10;

/// How long a connection may take no bytes, and an answer may take once all are sent: a store that stalls
/// for longer is asked on a new connection.
pub(super) const STALLED: Duration = Duration::from_secs(30);

/// How long one upload's parts are. A multiple of the chunk, so that a part's checksum is known from those
/// of its chunks.
pub(super) fn part_bytes(len: u64) -> u64 {
    len.div_ceil(PARTS_MAX).max(PART_BYTES).next_multiple_of(CHUNK_BYTES)
}

/// Within half a minute: what takes longer is for whoever waits for the checkpoint.
pub(super) fn patience() -> ExponentialBuilder {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(200))
        .with_max_delay(Duration::from_secs(8))
        .with_max_times(7)
        .with_jitter()
}

/// What ended a try.
#[derive(Debug)]
enum Trouble {
    /// The payload could not be read, or is wanted no more.
    Ours(Error),
    Theirs(Failure),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::Theirs(failure)
    }
}

impl Trouble {
    /// What is tried again.
    fn passes() -> impl FnMut(&Self) -> bool {
        let mut passes = Failure::passes();
        move |trouble| matches!(trouble, Self::Theirs(failure) if passes(failure))
    }
}

/// What lies under a name that is to be given.
pub(super) enum Met {
    /// These very bytes, by the store's checksum.
    Same,
    /// As many bytes, of which the store knows no checksum.
    Unknown,
    /// Others.
    Other,
}

/// One payload's upload.
pub(super) struct Upload<'a> {
    pub(super) wire: Arc<dyn Wire>,
    pub(super) address: &'a Address,
    pub(super) to: &'a Path,
    pub(super) payload: &'a dyn Payload,
    /// Requests at a time.
    pub(super) in_flight: usize,
    /// How long one may make no progress.
    pub(super) stalled: Duration,
}

impl Upload<'_> {
    /// What has the name already; `None`: nothing.
    pub(super) fn meets(&self) -> Result<Option<Met>> {
        let stat = self.ask(|| self.wire.stat(self.to));
        let stat = stat.map_err(|e| e.explained(self.address, self.deed("look for")))?;
        let Some(Stat { len, crc32 }) = stat else { return Ok(None) };
        Ok(Some(match crc32 {
            _ if len != self.payload.len() => Met::Other,
            None => Met::Unknown,
            Some(there) if there == self.checksums(part_bytes(len))?.1 => Met::Same,
            Some(_) => Met::Other,
        }))
    }

    /// Of every part, and of the whole.
    fn checksums(&self, part: u64) -> Result<(Vec<u32>, u32)> {
        let len = self.payload.len();
        let (mut parts, mut whole) = (Vec::new(), Hasher::new());
        for offset in (0..len).step_by(usize::try_from(part).unwrap_or(usize::MAX)) {
            let len = (len - offset).min(part);
            let crc = self.crc32(offset, len)?;
            whole.combine(&Hasher::new_with_initial_len(crc, len));
            parts.push(crc);
        }
        Ok((parts, whole.finalize()))
    }

    /// Makes the object, in the place of what has its name.
    pub(super) fn run(&self) -> Result<()> {
        let explained = |trouble| match trouble {
            Trouble::Ours(e) => e,
            Trouble::Theirs(e) => e.explained(self.address, self.deed("write")),
        };
        let part = part_bytes(self.payload.len());
        let (crcs, crc) = self.checksums(part)?;
        if crcs.len() <= 1 {
            self.whole(crc).map_err(explained)?;
        } else {
            self.in_parts(part, &crcs, crc).map_err(explained)?;
        }
        self.verify(crc)
    }

    fn deed(&self, verb: &str) -> String {
        format!("{verb} {}://{}/{}", self.address.scheme(), self.address.bucket(), self.to)
    }

    /// From the chunks' checksums where they are known: those are of what was saved, and not of what
    /// memory or disk make of it today.
    fn crc32(&self, offset: u64, len: u64) -> Result<u32> {
        if let Some(known) = self.payload.crc32(offset, len) {
            return Ok(known);
        }
        let mut hasher = Hasher::new();
        let mut scratch = AlignedBuf::new(1);
        self.blocks(offset, len, &mut scratch, &mut |bytes| {
            hasher.update(bytes);
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(hasher.finalize())
    }

    /// Hands out the payload's bytes from `offset` on, block by block, until no more are wanted.
    fn blocks(
        &self,
        offset: u64,
        len: u64,
        scratch: &mut AlignedBuf,
        each: &mut dyn FnMut(&[u8]) -> Result<ControlFlow<()>>,
    ) -> Result<()> {
        let step = self.payload.block_bytes().clamp(4096, CHUNK_BYTES);
        for at in (offset..offset + len).step_by(usize::try_from(step).unwrap_or(4096)) {
            let bytes = usize::try_from((offset + len - at).min(step)).unwrap_or(0);
            let block = self.payload.block(at, padded(bytes), scratch)?;
            if each(&block[..bytes])?.is_break() {
                break;
            }
        }
        Ok(())
    }

    /// Sends one request with the bytes from `offset` on as its body.
    fn send<T, F>(&self, offset: u64, len: u64, request: impl Fn(Body) -> F) -> Result<T, Trouble>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failure>> + Send + 'static,
    {
        let once = || {
            let (feed, blocks) = mpsc::channel(1);
            let task = hands().spawn(request(Body { len, blocks }));
            // Whatever happens here, it ends with this try.
            let task = Abort(task);
            let mut scratch = AlignedBuf::new(1);
            let mut stalled = false;
            let fed = self.blocks(offset, len, &mut scratch, &mut |block| {
                for bytes in block.chunks(BLOCK_BYTES) {
                    match wait_within(self.stalled, feed.send(Ok(Bytes::copy_from_slice(bytes)))) {
                        Some(Ok(())) => {}
                        // The request has ended before its body did: its answer says why.
                        Some(Err(_)) => return Ok(ControlFlow::Break(())),
                        None => {
                            stalled = true;
                            return Ok(ControlFlow::Break(()));
                        }
                    }
                }
                Ok(ControlFlow::Continue(()))
            });
            match fed {
                Ok(()) if stalled => {
                    let why =
                        format!("a connection took no bytes for {} s", self.stalled.as_secs());
                    Err(Failure::NoAnswer(why).into())
                }
                Ok(()) => {
                    drop(feed);
                    task.answer(self.stalled)
                }
                Err(e) => {
                    // What was begun must not pass for the whole.
                    let _ = wait_within(self.stalled, feed.send(Err(io::Error::other("given up"))));
                    Err(Trouble::Ours(e))
                }
            }
        };
        once.retry(patience())
            .when(Trouble::passes())
            .notify(|trouble, pause| {
                if let Trouble::Theirs(failure) = trouble {
                    tracing::debug!("{}: {failure}: again in {pause:?}", self.deed("write"));
                }
            })
            .call()
    }

    /// Asks something short.
    fn ask<T, F>(&self, request: impl Fn() -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        (|| wait(request())).retry(patience()).when(Failure::passes()).call()
    }

    fn whole(&self, crc: u32) -> Result<(), Trouble> {
        self.send(0, self.payload.len(), |body| {
            let (wire, to) = (self.wire.clone(), self.to.clone());
            async move { wire.put(&to, body, crc).await }
        })
    }

    fn in_parts(&self, part: u64, crcs: &[u32], crc: u32) -> Result<(), Trouble> {
        let (resumed, others) = self.found(part, crcs.len())?;
        let done = match resumed {
            Some((id, have)) => {
                tracing::info!(
                    "{}: goes on, {} of {} parts are there",
                    self.deed("write"),
                    have.len(),
                    crcs.len()
                );
                self.finish(&id, have, part, crcs, crc)
            }
            None => Ok(false),
        };
        // Nobody pays for parts of which nothing will come.
        for id in others {
            self.ask(|| self.wire.abort(self.to, &id))?;
        }
        if done? {
            return Ok(());
        }
        let tries = AtomicUsize::new(0);
        let id = self.ask(|| {
            tries.fetch_add(1, Ordering::Relaxed);
            self.wire.begin(self.to)
        })?;
        match self.finish(&id, Vec::new(), part, crcs, crc) {
            Ok(true) if tries.load(Ordering::Relaxed) == 1 => Ok(()),
            // Of a try whose answer was lost there is one more, with nothing in it.
            Ok(true) => self.end_others(),
            Ok(false) => {
                let why = "the store refuses the whole: its bytes are not those that were saved";
                Err(Trouble::Ours(Error::damaged(self.deed("the upload of"), why)))
            }
            // It stays: who tries again goes on with what is there.
            Err(e) => Err(e),
        }
    }

    /// Ends what was begun under this name.
    fn end_others(&self) -> Result<(), Trouble> {
        let unfinished = self.ask(|| self.wire.unfinished(self.to))?.unwrap_or_default();
        for upload in unfinished.into_iter().filter(|upload| upload.to == *self.to) {
            self.ask(|| self.wire.abort(self.to, &upload.id))?;
        }
        Ok(())
    }

    /// An upload of this name that was begun, with the parts that fit; and all others.
    #[expect(clippy::type_complexity, reason = "taken apart where it is called")]
    fn found(
        &self,
        part: u64,
        count: usize,
    ) -> Result<(Option<(String, Vec<Stored>)>, Vec<String>), Trouble> {
        let Some(unfinished) = self.ask(|| self.wire.unfinished(self.to))? else {
            return Ok((None, Vec::new()));
        };
        let mut best: Option<(String, Vec<Stored>)> = None;
        let mut others = Vec::new();
        for upload in unfinished.into_iter().filter(|upload| upload.to == *self.to) {
            let mut have = match self.ask(|| self.wire.parts(self.to, &upload.id)) {
                Err(e) if e.is_no_such_upload() => continue,
                other => other?,
            };
            let len = |index: u32| (self.payload.len() - u64::from(index) * part).min(part);
            have.retain(|stored| {
                (stored.index as usize) < count && stored.len == len(stored.index)
            });
            match &best {
                Some((_, most)) if most.len() >= have.len() => others.push(upload.id),
                _ => others.extend(best.replace((upload.id, have)).map(|(id, _)| id)),
            }
        }
        Ok((best, others))
    }

    /// Sends the parts that are missing and completes it. `false`: it cannot be completed, and is gone.
    fn finish(
        &self,
        id: &str,
        have: Vec<Stored>,
        part: u64,
        crcs: &[u32],
        crc: u32,
    ) -> Result<bool, Trouble> {
        let mut tags: Vec<Option<Tag>> = vec![None; crcs.len()];
        for stored in have {
            tags[stored.index as usize] = Some(stored.tag);
        }
        match self.send_missing(id, &mut tags, part, crcs) {
            // Completed by a try whose answer was lost, or ended by somebody.
            Err(Trouble::Theirs(e)) if e.is_no_such_upload() => return self.is_there(crc),
            other => other?,
        }
        let parts: Vec<Tag> = tags.into_iter().flatten().collect();
        // The whole is wrong however often it is asked for.
        let mut passes = Failure::passes();
        let passes = |e: &Failure| !e.is_bad_digest() && passes(e);
        let complete = || wait(self.wire.complete(self.to, id, parts.clone(), crc));
        match complete.retry(patience()).when(passes).call() {
            Ok(()) => Ok(true),
            Err(e) if e.is_no_such_upload() => self.is_there(crc),
            Err(e) if e.is_bad_digest() => {
                tracing::warn!("{}: the store refuses the whole: {e}", self.deed("write"));
                self.ask(|| self.wire.abort(self.to, id))?;
                Ok(false)
            }
            Err(e) => Err(e.into()),
        }
    }

    fn send_missing(
        &self,
        id: &str,
        tags: &mut [Option<Tag>],
        part: u64,
        crcs: &[u32],
    ) -> Result<(), Trouble> {
        let missing: Vec<usize> = (0..tags.len()).filter(|index| tags[*index].is_none()).collect();
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let (sent, trouble) = (Mutex::new(Vec::new()), Mutex::new(None));
        let work = || {
            while let Some(index) = missing.get(next.fetch_add(1, Ordering::Relaxed)).copied() {
                if failed.load(Ordering::Relaxed) {
                    return;
                }
                let offset = index as u64 * part;
                let len = (self.payload.len() - offset).min(part);
                let number = u32::try_from(index).unwrap_or(u32::MAX);
                let answer = self.send(offset, len, |body| {
                    let (wire, to, id) = (self.wire.clone(), self.to.clone(), id.to_owned());
                    let crc = crcs[index];
                    async move { wire.part(&to, &id, number, body, crc).await }
                });
                match answer {
                    Ok(tag) => locked(&sent).push((index, tag)),
                    Err(e) => {
                        failed.store(true, Ordering::Relaxed);
                        locked(&trouble).get_or_insert(e);
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.in_flight.min(missing.len()) {
                scope.spawn(work);
            }
            work();
        });
        for (index, tag) in locked(&sent).drain(..) {
            tags[index] = Some(tag);
        }
        let trouble = locked(&trouble).take();
        trouble.map_or(Ok(()), Err)
    }

    /// Whether the object lies there as it is meant to be.
    fn is_there(&self, crc: u32) -> Result<bool, Trouble> {
        let stat = self.ask(|| self.wire.stat(self.to))?;
        Ok(stat.is_some_and(|stat| {
            stat.len == self.payload.len() && stat.crc32.is_none_or(|c| c == crc)
        }))
    }

    /// What the store says of it must be what was sent.
    fn verify(&self, crc: u32) -> Result<()> {
        let deed = || self.deed("verify");
        let stat =
            self.ask(|| self.wire.stat(self.to)).map_err(|e| e.explained(self.address, deed()))?;
        let (len, there) = (self.payload.len(), stat.map_or(0, |stat| stat.len));
        match stat {
            Some(Stat { crc32: Some(other), .. }) if other != crc => Err(Error::damaged(
                self.deed("the upload of"),
                format!("its CRC-32 is {other:08x}, {crc:08x} was sent"),
            )),
            Some(stat) if stat.len == len => Ok(()),
            _ => Err(Error::damaged(
                self.deed("the upload of"),
                format!("the store has {there} bytes of {len}"),
            )),
        }
    }
}

/// A request that ends when nobody waits for it any more.
struct Abort<T>(tokio::task::JoinHandle<T>);

impl<T> Abort<Result<T, Failure>> {
    fn answer(mut self, stalled: Duration) -> Result<T, Trouble> {
        match wait_within(stalled, &mut self.0) {
            Some(Ok(answer)) => answer.map_err(Trouble::Theirs),
            Some(Err(e)) => Err(Trouble::Ours(Error::Bug(format!("a request ended badly: {e}")))),
            None => {
                let why =
                    format!("no answer within {} s after all bytes were sent", stalled.as_secs());
                Err(Failure::NoAnswer(why).into())
            }
        }
    }
}

impl<T> Drop for Abort<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_whole_chunks_and_there_are_never_too_many() {
        for len in [1, PART_BYTES, PART_BYTES + 1, 1 << 30, 156 << 30, 1 << 40, 40 << 40] {
            let part = part_bytes(len);
            assert!(
                part.is_multiple_of(CHUNK_BYTES) && len.div_ceil(part) <= PARTS_MAX,
                "{len}: {part}"
            );
            assert!((5 << 20..5 << 30).contains(&part), "{len}: {part}");
        }
        assert_eq!((part_bytes(1 << 30), part_bytes(1 << 40)), (16 << 20, 108 << 20));
    }
}
