//! What a bucket offers, tried with the very means that the tier uses: beside the run's place, under a name
//! of its own.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{Bytes, name_of_a_payload};
use crate::{
    chunk::CHUNK_BYTES,
    clock::{Clock, SystemClock},
    error::{Error, ErrorKind, Result},
    names::Id,
    observe::locked,
    restore::read::{READERS, run_on},
    tier::{
        Payload, Tier,
        buffer::{AlignedBuf, padded},
        object::{
            ObjectTier,
            address::{Address, Options},
        },
    },
};

/// Bytes that go there and back.
pub const BUCKET_BYTES: u64 = 128 << 20;

/// Small questions, of which the median answer is told.
const ASKED: usize = 5;

/// What a bucket offers.
#[derive(Debug)]
pub struct Bucket {
    /// Seconds that a small question takes.
    pub answers_in_s: f64,
    /// The store itself decides which of two writers of one name was first.
    pub decides: bool,
    /// Seconds that [`BUCKET_BYTES`] took on their way there.
    pub write_s: f64,
    /// And back.
    pub read_s: f64,
}

/// Tries the bucket that `url` names a run's place in. `None`: it may be listed, and these credentials may
/// not write beside the run's place, where it is tried.
///
/// # Errors
/// One sentence that names what is wrong with the address, the credentials or the store, and what to do; or
/// other bytes came back.
pub fn bucket(url: &str, options: &Options) -> Result<Option<Bucket>> {
    let own = format!("tierkeep-probe-{}", Id::random()?);
    let address: Address = url.parse()?;
    let beside = match address.to_string().rsplit_once('/') {
        Some((parent, _)) if !parent.ends_with(":/") => format!("{parent}/{own}"),
        _ => format!("{address}/{own}"),
    };
    // What is wrong is told of the run's own place, where nothing is written: a job may be at work there.
    ObjectTier::open(&address, options)?.list("")?;
    let tier = ObjectTier::open(&beside.parse()?, options)?;
    let decides = match tier.decides_who_was_first() {
        Err(e) if e.kind() == ErrorKind::Invalid => {
            tracing::debug!("{}", e.chain());
            return Ok(None);
        }
        other => other?,
    };
    let clock = SystemClock;
    let timed = |deed: &mut dyn FnMut() -> Result<()>| -> Result<Duration> {
        let begun = clock.monotonic();
        deed()?;
        Ok(clock.monotonic().saturating_sub(begun))
    };
    let mut answers = Vec::new();
    for _ in 0..ASKED {
        answers.push(timed(&mut || tier.list("").map(drop))?);
    }
    answers.sort_unstable();
    let name = name_of_a_payload(1)?;
    let payload = Bytes(BUCKET_BYTES);
    let tried = timed(&mut || tier.put(&name, &payload).map(drop)).and_then(|write| {
        let read = timed(&mut || comes_back(&tier, &name, &payload))?;
        Ok((write, read))
    });
    // Where it failed in the middle, parts of it are there.
    let removed = tier.retire(&name).and_then(|()| tier.sweep(&|_| false).map(drop));
    let (write, read) = tried?;
    removed?;
    Ok(Some(Bucket {
        answers_in_s: answers[ASKED / 2].as_secs_f64(),
        decides,
        write_s: write.as_secs_f64(),
        read_s: read.as_secs_f64(),
    }))
}

/// Every byte, on as many threads as a restore has.
fn comes_back(tier: &dyn Tier, name: &str, payload: &Bytes) -> Result<()> {
    let source = tier.open(name)?;
    let (next, failed) = (AtomicU64::new(0), Mutex::new(None));
    let read = |offset: u64| -> Result<()> {
        let len = usize::try_from((payload.len() - offset).min(CHUNK_BYTES)).unwrap_or(usize::MAX);
        let (mut there, mut scratch) = (AlignedBuf::new(0), AlignedBuf::new(0));
        there.ensure(len);
        source.read_at(offset, &mut there[..padded(len)])?;
        match payload.block(offset, len, &mut scratch)? == &there[..len] {
            true => Ok(()),
            false => Err(Error::damaged(name, format!("other bytes came back at {offset}"))),
        }
    };
    run_on(READERS, &|| {
        while locked(&failed).is_none() {
            let offset = next.fetch_add(CHUNK_BYTES, Ordering::Relaxed);
            if offset >= payload.len() {
                return;
            }
            if let Err(e) = read(offset) {
                locked(&failed).get_or_insert(e);
            }
        }
    });
    let failed = locked(&failed).take();
    failed.map_or(Ok(()), Err)
}
