//! A disk tier that a test can kill or hold still, and let go again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tierkeep::{Error, Result, tier::*};

/// A tier with two switches; they act on disk alone.
#[derive(Debug)]
pub struct Gate {
    pub inner: Arc<dyn Tier>,
    /// Nothing answers.
    pub dead: Arc<AtomicBool>,
    /// A `put` waits until it is off.
    pub slow: Arc<AtomicBool>,
}

impl Gate {
    fn ok(&self) -> Result<()> {
        if self.dead.load(Ordering::SeqCst) && self.kind() == TierKind::Disk {
            Err(Error::Io { what: "x".into(), source: std::io::Error::other("dead") })
        } else {
            Ok(())
        }
    }
}

impl Tier for Gate {
    fn kind(&self) -> TierKind {
        self.inner.kind()
    }
    fn address(&self) -> String {
        self.inner.address()
    }
    fn put(&self, n: &str, p: &dyn Payload) -> Result<Receipt> {
        self.ok()?;
        while self.kind() == TierKind::Disk && self.slow.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.inner.put(n, p)
    }
    fn create(&self, n: &str, b: &[u8]) -> Result<Created> {
        self.ok()?;
        self.inner.create(n, b)
    }
    fn open(&self, n: &str) -> Result<Box<dyn Source>> {
        self.ok()?;
        self.inner.open(n)
    }
    fn list(&self, n: &str) -> Result<Vec<Entry>> {
        self.ok()?;
        self.inner.list(n)
    }
    fn delete(&self, n: &str) -> Result<()> {
        self.ok()?;
        self.inner.delete(n)
    }
    fn mend(&self, n: &str, o: u64, b: &[u8]) -> Result<()> {
        self.ok()?;
        self.inner.mend(n, o, b)
    }
    fn retire(&self, n: &str) -> Result<()> {
        self.ok()?;
        self.inner.retire(n)
    }
}
