//! A tier that dies, lies, stalls or fills up, at the operation that a test names.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    clock::SharedClock,
    error::{Error, Result},
    snapshot::slot::Slot,
    tier::{Created, Entry, Payload, Receipt, Source, Tier, TierKind, buffer::AlignedBuf},
};

/// What goes wrong.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Every operation from this one on fails, before it does anything: the process died.
    DiesAt(u64),
    /// This one operation does its work and its answer is lost.
    LosesAnswerOf(u64),
    /// Every `put` and `create` from this operation on finds the medium full, `put` half-way.
    FullFrom(u64),
    /// Every operation takes this long.
    Stalls(Duration, SharedClock),
    /// Every read returns its bytes with one bit flipped.
    Lies,
}

/// A tier with one fault.
#[derive(Debug)]
pub struct Faulty {
    inner: Arc<dyn Tier>,
    fault: Fault,
    operations: AtomicU64,
}

enum Turn {
    Well,
    Full,
    LoseAnswer,
}

impl Faulty {
    /// `inner`, with `fault`. Operations count from 0.
    pub fn new(inner: Arc<dyn Tier>, fault: Fault) -> Self {
        Self { inner, fault, operations: AtomicU64::new(0) }
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.operations.load(Ordering::Relaxed)
    }

    /// True once the fault has struck.
    pub fn has_struck(&self) -> bool {
        match self.fault {
            Fault::DiesAt(n) | Fault::LosesAnswerOf(n) | Fault::FullFrom(n) => {
                self.operations() > n
            }
            Fault::Stalls(..) | Fault::Lies => true,
        }
    }

    fn turn(&self) -> Result<Turn> {
        let now = self.operations.fetch_add(1, Ordering::Relaxed);
        match &self.fault {
            Fault::DiesAt(n) if now >= *n => Err(broken("the tier is dead")),
            Fault::LosesAnswerOf(n) if now == *n => Ok(Turn::LoseAnswer),
            Fault::FullFrom(n) if now >= *n => Ok(Turn::Full),
            Fault::Stalls(time, clock) => {
                clock.pause(*time);
                Ok(Turn::Well)
            }
            _ => Ok(Turn::Well),
        }
    }

    fn around<T>(&self, deed: impl FnOnce() -> Result<T>) -> Result<T> {
        match self.turn()? {
            Turn::LoseAnswer => deed().and_then(|_| Err(broken("the answer was lost"))),
            Turn::Well | Turn::Full => deed(),
        }
    }
}

fn broken(why: &str) -> Error {
    Error::Io { what: "reach the tier".into(), source: std::io::Error::other(why.to_owned()) }
}

fn full() -> Error {
    Error::Io { what: "write".into(), source: std::io::Error::from_raw_os_error(libc::ENOSPC) }
}

/// A payload that ends in the middle with a full disk.
struct Half<'a>(&'a dyn Payload);

impl Payload for Half<'_> {
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn block<'a>(
        &'a self,
        offset: u64,
        len: usize,
        scratch: &'a mut AlignedBuf,
    ) -> Result<&'a [u8]> {
        if offset + len as u64 > self.len() / 2 {
            return Err(full());
        }
        self.0.block(offset, len, scratch)
    }
    fn slot(&self) -> Option<&Slot> {
        None
    }
}

struct Liar(Box<dyn Source>);

impl Source for Liar {
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, into)?;
        if let Some(byte) = into.first_mut() {
            *byte ^= 1;
        }
        Ok(())
    }
}

#[deny(clippy::missing_trait_methods)]
impl Tier for Faulty {
    fn kind(&self) -> TierKind {
        self.inner.kind()
    }
    fn address(&self) -> String {
        self.inner.address()
    }
    fn put(&self, name: &str, payload: &dyn Payload) -> Result<Receipt> {
        match self.turn()? {
            Turn::Well => self.inner.put(name, payload),
            Turn::Full => self.inner.put(name, &Half(payload)).and_then(|_| Err(full())),
            Turn::LoseAnswer => {
                self.inner.put(name, payload).and_then(|_| Err(broken("the answer was lost")))
            }
        }
    }
    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created> {
        match self.turn()? {
            Turn::Well => self.inner.create(name, bytes),
            Turn::Full => Err(full()),
            Turn::LoseAnswer => {
                self.inner.create(name, bytes).and_then(|_| Err(broken("the answer was lost")))
            }
        }
    }
    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        let source = self.around(|| self.inner.open(name))?;
        Ok(if matches!(self.fault, Fault::Lies) { Box::new(Liar(source)) } else { source })
    }
    fn list(&self, dir: &str) -> Result<Vec<Entry>> {
        self.around(|| self.inner.list(dir))
    }
    fn confirm(&self, dir: &str) -> Result<()> {
        self.around(|| self.inner.confirm(dir))
    }
    fn delete(&self, name: &str) -> Result<()> {
        self.around(|| self.inner.delete(name))
    }
    fn mend(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        self.around(|| self.inner.mend(name, offset, bytes))
    }
    fn retire(&self, name: &str) -> Result<()> {
        self.around(|| self.inner.retire(name))
    }
    fn sweep(&self, stays: &dyn Fn(&str) -> bool) -> Result<usize> {
        self.around(|| self.inner.sweep(stays))
    }
}
