//! A payload made smaller, into a file of this node that nobody else sees.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Condvar, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::{CODEC, Stored, wrap};
use crate::{
    chunk::CHUNK_BYTES,
    codec::{Scratch, compress, decompress, parts_of},
    error::{Doing, Error, Result},
    manifest::{ShardManifest, combine},
    observe::locked,
    tier::{
        Payload,
        buffer::{AlignedBuf, padded},
    },
};

/// Threads that compress one shard: what they take, the training has not.
const WORKERS_MAX: usize = 4;

/// A compressed payload on its way, and the manifest that goes with it.
pub(crate) struct Packed {
    file: File,
    len: u64,
    /// CRC-32 of each `CHUNK_BYTES` of the file.
    crcs: Vec<u32>,
    /// The file's name where it goes to.
    pub(crate) name: String,
    pub(crate) manifest: Vec<u8>,
}

/// What was written so far.
struct Spool {
    file: File,
    len: u64,
    lengths: Vec<u64>,
    crcs: Vec<u32>,
    begun: crc32fast::Hasher,
    trouble: Option<Error>,
}

impl Spool {
    fn append(&mut self, mut bytes: &[u8]) -> Result<()> {
        let write = self.file.write_all_at(bytes, self.len);
        write.doing(|| "keep a compressed chunk".into())?;
        self.lengths.push(bytes.len() as u64);
        while !bytes.is_empty() {
            let room = usize::try_from(CHUNK_BYTES - self.len % CHUNK_BYTES).unwrap_or(0);
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.begun.update(now);
            self.len += now.len() as u64;
            if self.len.is_multiple_of(CHUNK_BYTES) {
                self.crcs.push(std::mem::take(&mut self.begun).finalize());
            }
            bytes = later;
        }
        Ok(())
    }
}

/// Compresses `payload`, which is `manifest`'s (in `plain` as it lies), below `dir`; `None` where that
/// gains nothing.
///
/// # Errors
/// The payload could not be read, or `dir` not written to.
pub(crate) fn pack(
    payload: &dyn Payload,
    manifest: &ShardManifest,
    plain: &[u8],
    dir: &Path,
) -> Result<Option<Packed>> {
    let info = &manifest.payload;
    let file = tempfile::tempfile_in(dir).doing(|| format!("make a file in {}", dir.display()))?;
    let spool = Spool {
        file,
        len: 0,
        lengths: Vec::with_capacity(info.chunks.len()),
        crcs: Vec::new(),
        begun: crc32fast::Hasher::new(),
        trouble: None,
    };
    let (spool, turn, next) = (Mutex::new(spool), Condvar::new(), AtomicUsize::new(0));
    let failed = |e: Error| {
        locked(&spool).trouble.get_or_insert(e);
        turn.notify_all();
    };
    let work = || {
        let mut one = match Worker::new() {
            Ok(one) => one,
            Err(e) => return failed(e),
        };
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= info.chunks.len() {
                return;
            }
            let stored = match one.chunk(payload, manifest, index) {
                Ok(stored) => stored,
                Err(e) => return failed(e),
            };
            // In their order.
            let mut spool = locked(&spool);
            while spool.lengths.len() < index && spool.trouble.is_none() {
                spool = turn.wait(spool).unwrap_or_else(PoisonError::into_inner);
            }
            if spool.trouble.is_some() {
                return;
            }
            if let Err(e) = spool.append(stored) {
                spool.trouble = Some(e);
            }
            drop(spool);
            turn.notify_all();
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 1..(cores / 2).clamp(1, WORKERS_MAX) {
            scope.spawn(work);
        }
        work();
    });
    let spool = spool.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(e) = spool.trouble {
        return Err(e);
    }
    let Spool { file, len, lengths, mut crcs, begun, .. } = spool;
    if len >= info.length {
        return Ok(None);
    }
    if !len.is_multiple_of(CHUNK_BYTES) {
        crcs.push(begun.finalize());
    }
    let name = manifest.identity.packed_name();
    let crc = combine(&crcs, len, CHUNK_BYTES);
    let stored = Stored { file: name.clone(), codec: CODEC.into(), crc, lengths };
    Ok(Some(Packed { file, len, crcs, name, manifest: wrap(plain, &stored)? }))
}

struct Worker {
    buffer: AlignedBuf,
    scratch: Scratch,
    check: Scratch,
    back: Vec<u8>,
}

impl Worker {
    fn new() -> Result<Self> {
        let (scratch, check) = (Scratch::new()?, Scratch::new()?);
        Ok(Self { buffer: AlignedBuf::new(1), scratch, check, back: Vec::new() })
    }

    /// A chunk as it is to be stored.
    fn chunk<'a>(
        &'a mut self,
        payload: &'a dyn Payload,
        manifest: &ShardManifest,
        index: usize,
    ) -> Result<&'a [u8]> {
        let info = &manifest.payload;
        let offset = index as u64 * info.chunk_bytes;
        let len = usize::try_from(info.chunk_len(index)).unwrap_or(0);
        let block = payload.block(offset, padded(len), &mut self.buffer)?;
        let chunk = &block[..len];
        let parts = parts_of(&manifest.tensors, offset..offset + len as u64);
        let Some(stored) = compress(chunk, &parts, &mut self.scratch) else { return Ok(chunk) };
        self.back.resize(len, 0);
        decompress(stored, &mut self.back, &mut self.check)?;
        if crc32fast::hash(&self.back) != info.chunks[index] {
            return Err(Error::Bug(format!("chunk {index} does not come back as it was")));
        }
        Ok(stored)
    }
}

impl Payload for Packed {
    fn len(&self) -> u64 {
        self.len
    }

    fn block<'a>(
        &'a self,
        offset: u64,
        len: usize,
        scratch: &'a mut AlignedBuf,
    ) -> Result<&'a [u8]> {
        let len = padded(len);
        scratch.ensure(len);
        let left = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let there = len.min(left);
        let read = self.file.read_exact_at(&mut scratch[..there], offset);
        read.doing(|| "read a compressed chunk".into())?;
        scratch[there..len].fill(0);
        Ok(&scratch[..len])
    }

    fn crc32(&self, offset: u64, len: u64) -> Option<u32> {
        let end = offset.checked_add(len).filter(|end| *end <= self.len)?;
        let whole = |at: u64| at.is_multiple_of(CHUNK_BYTES) || at == self.len;
        if !whole(offset) || !whole(end) {
            return None;
        }
        let index = |at: u64| usize::try_from(at.div_ceil(CHUNK_BYTES)).ok();
        Some(combine(self.crcs.get(index(offset)?..index(end)?)?, len, CHUNK_BYTES))
    }
}
