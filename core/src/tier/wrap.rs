//! What may be put around a tier: retries, a limit, a meter. Composed at one place, where a
//! checkpointer is opened.
//!
//! # Invariants
//!
//! - A wrapper keeps the contract of the tier in it (`testing::contract` is run against each).
//! - A full disk, a damaged file and a missing right are not retried: time does not mend them.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{Created, Entry, Payload, Receipt, Source, Tier, TierKind, buffer::AlignedBuf};
use crate::{
    clock::SharedClock,
    error::{Error, Result},
    observe::locked,
};

/// Tries again what may work later.
#[derive(Debug)]
pub struct Retried<T> {
    inner: T,
    clock: SharedClock,
}

/// Four tries within 0.35 s: enough for a hiccup of a network file system. A longer one is the
/// cascade's to wait out, which has a deadline in minutes.
const PAUSES_MS: [u64; 3] = [10, 60, 280];

impl<T: Tier> Retried<T> {
    /// Around `inner`.
    pub fn new(inner: T, clock: SharedClock) -> Self {
        Self { inner, clock }
    }

    fn again<R>(&self, deed: impl Fn() -> Result<R>) -> Result<R> {
        for pause in PAUSES_MS {
            match deed() {
                Err(e) if may_pass(&e) => {
                    tracing::debug!("{}: trying again: {}", self.inner.address(), e.chain());
                    self.clock.pause(Duration::from_millis(pause));
                }
                other => return other,
            }
        }
        deed()
    }
}

fn may_pass(error: &Error) -> bool {
    use std::io::ErrorKind as Kind;
    let Error::Io { source, .. } = error else { return false };
    !matches!(
        source.kind(),
        Kind::NotFound
            | Kind::PermissionDenied
            | Kind::AlreadyExists
            | Kind::StorageFull
            | Kind::QuotaExceeded
            | Kind::ReadOnlyFilesystem
            | Kind::FileTooLarge
            | Kind::NotADirectory
            | Kind::IsADirectory
            | Kind::InvalidInput
            | Kind::Unsupported
    )
}

#[deny(clippy::missing_trait_methods)]
impl<T: Tier> Tier for Retried<T> {
    fn kind(&self) -> TierKind {
        self.inner.kind()
    }
    fn address(&self) -> String {
        self.inner.address()
    }
    fn put(&self, name: &str, payload: &dyn Payload) -> Result<Receipt> {
        self.again(|| self.inner.put(name, payload))
    }
    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created> {
        self.again(|| self.inner.create(name, bytes))
    }
    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        self.again(|| self.inner.open(name))
    }
    fn list(&self, dir: &str) -> Result<Vec<Entry>> {
        self.again(|| self.inner.list(dir))
    }
    fn confirm(&self, dir: &str) -> Result<()> {
        self.again(|| self.inner.confirm(dir))
    }
    fn delete(&self, name: &str) -> Result<()> {
        self.again(|| self.inner.delete(name))
    }
    fn mend(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        self.again(|| self.inner.mend(name, offset, bytes))
    }
    fn retire(&self, name: &str) -> Result<()> {
        self.again(|| self.inner.retire(name))
    }
    fn sweep(&self, stays: &dyn Fn(&str) -> bool) -> Result<usize> {
        self.again(|| self.inner.sweep(stays))
    }
}

/// Writes payloads no faster than so many bytes a second, so that a checkpoint leaves the disk to
/// the data loader.
#[derive(Debug)]
pub struct Limited<T> {
    inner: T,
    bytes_per_second_max: u64,
    clock: SharedClock,
    /// When the bytes handed out so far are paid for.
    paid_until: Mutex<Duration>,
}

impl<T: Tier> Limited<T> {
    /// Around `inner`.
    pub fn new(inner: T, bytes_per_second_max: u64, clock: SharedClock) -> Self {
        let bytes_per_second_max = bytes_per_second_max.max(1);
        Self { inner, bytes_per_second_max, clock, paid_until: Mutex::default() }
    }

    fn pay(&self, bytes: u64) {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second_max);
        let price = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let now = self.clock.monotonic();
        let wait = {
            let mut paid = locked(&self.paid_until);
            let start = now.max(*paid);
            *paid = start + price;
            start - now
        };
        if !wait.is_zero() {
            self.clock.pause(wait);
        }
    }
}

struct Paced<'a, T> {
    payload: &'a dyn Payload,
    limited: &'a Limited<T>,
}

#[deny(clippy::missing_trait_methods)]
impl<T: Tier> Payload for Paced<'_, T> {
    fn len(&self) -> u64 {
        self.payload.len()
    }
    fn block<'a>(
        &'a self,
        offset: u64,
        len: usize,
        scratch: &'a mut AlignedBuf,
    ) -> Result<&'a [u8]> {
        self.limited.pay(len as u64);
        self.payload.block(offset, len, scratch)
    }
    fn block_bytes(&self) -> u64 {
        self.payload.block_bytes()
    }
    fn is_empty(&self) -> bool {
        self.payload.is_empty()
    }
    fn crc32(&self, offset: u64, len: u64) -> Option<u32> {
        self.payload.crc32(offset, len)
    }
    fn slot(&self) -> Option<&crate::snapshot::slot::Slot> {
        self.payload.slot()
    }
}

#[deny(clippy::missing_trait_methods)]
impl<T: Tier> Tier for Limited<T> {
    fn kind(&self) -> TierKind {
        self.inner.kind()
    }
    fn address(&self) -> String {
        self.inner.address()
    }
    fn put(&self, name: &str, payload: &dyn Payload) -> Result<Receipt> {
        self.inner.put(name, &Paced { payload, limited: self })
    }
    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created> {
        self.inner.create(name, bytes)
    }
    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        self.inner.open(name)
    }
    fn list(&self, dir: &str) -> Result<Vec<Entry>> {
        self.inner.list(dir)
    }
    fn confirm(&self, dir: &str) -> Result<()> {
        self.inner.confirm(dir)
    }
    fn delete(&self, name: &str) -> Result<()> {
        self.inner.delete(name)
    }
    fn mend(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        self.inner.mend(name, offset, bytes)
    }
    fn retire(&self, name: &str) -> Result<()> {
        self.inner.retire(name)
    }
    fn sweep(&self, stays: &dyn Fn(&str) -> bool) -> Result<usize> {
        self.inner.sweep(stays)
    }
}

/// What went through a tier.
#[derive(Debug, Default)]
pub struct Meter {
    /// Calls.
    pub operations: AtomicU64,
    /// Calls that failed.
    pub failures: AtomicU64,
    /// Bytes of payloads that were put.
    pub bytes_put: AtomicU64,
    /// Nanoseconds in `put`.
    pub put_ns: AtomicU64,
}

/// Counts.
#[derive(Debug)]
pub struct Metered<T> {
    inner: T,
    clock: SharedClock,
    /// The counts so far.
    pub meter: Meter,
}

impl<T: Tier> Metered<T> {
    /// Around `inner`.
    pub fn new(inner: T, clock: SharedClock) -> Self {
        Self { inner, clock, meter: Meter::default() }
    }

    fn count<R>(&self, answer: Result<R>) -> Result<R> {
        self.meter.operations.fetch_add(1, Ordering::Relaxed);
        if answer.is_err() {
            self.meter.failures.fetch_add(1, Ordering::Relaxed);
        }
        answer
    }
}

#[deny(clippy::missing_trait_methods)]
impl<T: Tier> Tier for Metered<T> {
    fn kind(&self) -> TierKind {
        self.inner.kind()
    }
    fn address(&self) -> String {
        self.inner.address()
    }
    fn put(&self, name: &str, payload: &dyn Payload) -> Result<Receipt> {
        let begun = self.clock.monotonic();
        let receipt = self.count(self.inner.put(name, payload))?;
        let took = self.clock.monotonic().saturating_sub(begun);
        self.meter.bytes_put.fetch_add(payload.len(), Ordering::Relaxed);
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.meter.put_ns.fetch_add(nanos, Ordering::Relaxed);
        Ok(receipt)
    }
    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created> {
        self.count(self.inner.create(name, bytes))
    }
    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        self.count(self.inner.open(name))
    }
    fn list(&self, dir: &str) -> Result<Vec<Entry>> {
        self.count(self.inner.list(dir))
    }
    fn confirm(&self, dir: &str) -> Result<()> {
        self.count(self.inner.confirm(dir))
    }
    fn delete(&self, name: &str) -> Result<()> {
        self.count(self.inner.delete(name))
    }
    fn mend(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        self.count(self.inner.mend(name, offset, bytes))
    }
    fn retire(&self, name: &str) -> Result<()> {
        self.count(self.inner.retire(name))
    }
    fn sweep(&self, stays: &dyn Fn(&str) -> bool) -> Result<usize> {
        self.count(self.inner.sweep(stays))
    }
}
