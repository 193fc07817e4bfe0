//! A compressed payload read as if it were none.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, OnceLock},
};

use super::Stored;
use crate::{
    chunk::CHUNK_BYTES,
    codec::{Scratch, decompress},
    error::{Error, Result},
    manifest::PayloadInfo,
    names::CheckpointKey,
    observe::locked,
    tier::{Source, Tier, buffer::AlignedBuf, label},
};

/// Opens the payload of a shard at `key`: its bytes, however they lie.
///
/// # Errors
/// As [`Tier::open`]; damage where it has not the length that its manifest says.
pub(crate) fn open(
    tier: &dyn Tier,
    key: &CheckpointKey,
    payload: &PayloadInfo,
) -> Result<Box<dyn Source>> {
    let name = key.file(payload.stored_file());
    let source = tier.open(&name)?;
    let Some(stored) = &payload.stored else { return Ok(source) };
    let (there, said) = (source.len(), stored.length());
    if there != said {
        let why = format!("it has {there} bytes, its manifest says {said}");
        return Err(Error::damaged(label(tier, &name), why));
    }
    Ok(Box::new(Unpacked::new(source, payload, stored)))
}

/// The file is read in blocks of this length, whatever a chunk's place in it: who reads on is read ahead for
/// by the tier, which knows ranges of one length.
const BLOCK: u64 = CHUNK_BYTES;

/// Blocks that are kept: a chunk has a part of two, and some threads read side by side.
const BLOCKS_MAX: usize = 12;

type Block = Arc<OnceLock<Result<AlignedBuf>>>;

struct Unpacked {
    source: Box<dyn Source>,
    length: u64,
    chunk_bytes: u64,
    /// Where each stored chunk begins, and the last one ends.
    starts: Vec<u64>,
    blocks: Mutex<BTreeMap<u64, Block>>,
    /// What was used before, for the next.
    spare: Mutex<Vec<Work>>,
}

/// What it takes to unpack a chunk.
struct Work {
    scratch: Scratch,
    stored: Vec<u8>,
    chunk: Vec<u8>,
}

impl Unpacked {
    fn new(source: Box<dyn Source>, payload: &PayloadInfo, stored: &Stored) -> Self {
        let mut starts = vec![0];
        starts.extend(stored.lengths.iter().scan(0_u64, |at, length| {
            *at += length;
            Some(*at)
        }));
        let (length, chunk_bytes) = (payload.length, payload.chunk_bytes);
        let (blocks, spare) = (Mutex::default(), Mutex::default());
        Self { source, length, chunk_bytes, starts, blocks, spare }
    }

    /// Hands a chunk to `take`.
    fn chunk<T>(&self, index: usize, take: impl FnOnce(&[u8]) -> T) -> Result<T> {
        let spare = locked(&self.spare).pop();
        let mut work = match spare {
            Some(work) => work,
            None => Work { scratch: Scratch::new()?, stored: Vec::new(), chunk: Vec::new() },
        };
        let begin = index as u64 * self.chunk_bytes;
        let len = usize::try_from((self.length - begin).min(self.chunk_bytes)).unwrap_or(0);
        self.stored(index, &mut work.stored)?;
        let taken = if work.stored.len() == len {
            take(&work.stored)
        } else {
            work.chunk.resize(len, 0);
            decompress(&work.stored, &mut work.chunk, &mut work.scratch)?;
            take(&work.chunk)
        };
        locked(&self.spare).push(work);
        Ok(taken)
    }

    /// The bytes of a chunk as it is stored.
    fn stored(&self, index: usize, into: &mut Vec<u8>) -> Result<()> {
        let (begin, end) = (self.starts[index], self.starts[index + 1]);
        into.clear();
        let mut at = begin;
        while at < end {
            let block = self.block(at / BLOCK)?;
            let Some(Ok(bytes)) = block.get() else {
                return Err(Error::Bug("a block that was read is not there".into()));
            };
            let from = usize::try_from(at % BLOCK).unwrap_or(0);
            let count = usize::try_from((end - at).min(BLOCK - at % BLOCK)).unwrap_or(0);
            into.extend_from_slice(&bytes[from..from + count]);
            at += count as u64;
        }
        Ok(())
    }

    /// A block of the file, read once for all who ask for it at a time.
    fn block(&self, index: u64) -> Result<Block> {
        let block = {
            let mut blocks = locked(&self.blocks);
            let block = blocks.entry(index).or_default().clone();
            // Those far away are wanted no more.
            if blocks.len() > BLOCKS_MAX
                && let Some(far) = blocks.keys().copied().max_by_key(|at| at.abs_diff(index))
            {
                blocks.remove(&far);
            }
            block
        };
        let read = block.get_or_init(|| {
            let offset = index * BLOCK;
            let len = usize::try_from((self.source.len() - offset).min(BLOCK)).unwrap_or(0);
            let mut bytes = AlignedBuf::new(len);
            self.source.read_at(offset, &mut bytes).map(|()| bytes)
        });
        match read {
            Ok(_) => Ok(block),
            Err(e) => {
                // Whoever asks next asks the tier again.
                locked(&self.blocks).remove(&index);
                Err(e.shared())
            }
        }
    }
}

impl Source for Unpacked {
    fn len(&self) -> u64 {
        self.length
    }

    fn crc32(&self) -> Option<u32> {
        self.source.crc32() // Of the file, as `PayloadInfo::stored_crc` is.
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let there = usize::try_from(self.length.saturating_sub(offset)).unwrap_or(usize::MAX);
        let want = into.len().min(there);
        let mut done = 0;
        while done < want {
            let at = offset + done as u64;
            let index = usize::try_from(at / self.chunk_bytes).unwrap_or(usize::MAX);
            let from = usize::try_from(at % self.chunk_bytes).unwrap_or(0);
            done += self.chunk(index, |chunk| {
                let count = (chunk.len() - from).min(want - done);
                into[done..done + count].copy_from_slice(&chunk[from..from + count]);
                count
            })?;
        }
        Ok(())
    }
}
