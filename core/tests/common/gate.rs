//! A disk tier that a test can kill or hold still, and let go again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tierkeep::{
    Error, Result,
    testing::hooked::{Call, Hooked, Op},
    tier::{Tier, TierKind},
};

/// Switches; they act on disk alone.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    /// Nothing answers.
    pub dead: Arc<AtomicBool>,
    /// A `put` waits until it is off.
    pub slow: Arc<AtomicBool>,
    /// A claim waits until it is off.
    pub no_claims: Arc<AtomicBool>,
}

impl Gate {
    /// Around a tier: what `open_wrapped` takes.
    pub fn around(&self, tier: Arc<dyn Tier>) -> Arc<dyn Tier> {
        let gate = self.clone();
        Arc::new(Hooked::before(tier, move |call| gate.pass(call)))
    }

    fn pass(&self, call: Call<'_>) -> Result<()> {
        if call.kind != TierKind::Disk {
            return Ok(());
        }
        if self.dead.load(Ordering::SeqCst) {
            return Err(broken("dead"));
        }
        while call.op == Op::Put && self.slow.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        while call.name.starts_with("_claims") && self.no_claims.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// The operating system's refusal.
pub fn broken(why: &str) -> Error {
    Error::Io { what: "x".into(), source: std::io::Error::other(why.to_owned()) }
}
