//! The tier that survives the process: tmpfs files. A snapshot was copied into a slot of the arena,
//! and the slot *is* the payload file: putting it here moves its name and no byte.
//!
//! Nothing is synced, because there is nothing to sync to.

use std::{os::unix::fs::FileExt, path::Path, time::Duration};

use super::{
    Created, Entry, Payload, Receipt, Source, Tier, TierKind,
    buffer::{AlignedBuf, padded},
    posix::{PosixDir, usable_root},
    publish::{create_staged, publish, remove, staging_path, sweep_dead},
};
use crate::{
    chunk::CHUNK_BYTES,
    error::{Doing, Error, Result},
    snapshot::budget::Budget,
};

/// A directory on tmpfs.
#[derive(Debug)]
pub struct MemoryTier {
    dir: PosixDir,
    /// For payloads that do not come in a slot (repairs, copies); `None` for a reader.
    budget: Option<Budget>,
}

impl MemoryTier {
    /// Opens `root`, making it where it is missing. New files are counted against `budget`.
    ///
    /// # Errors
    /// It is a file, or may not be written.
    pub fn open(root: &Path, budget: Budget) -> Result<Self> {
        usable_root(root, false)?;
        // Records and repairs are staged for moments.
        sweep_dead(root, Duration::from_secs(60))?;
        let dir = PosixDir { root: root.into(), durable: false };
        Ok(Self { dir, budget: Some(budget) })
    }

    /// Opens `root` for reading only: nothing is made or tried.
    #[must_use]
    pub fn reader(root: &Path) -> Self {
        let dir = PosixDir { root: root.into(), durable: false };
        Self { dir, budget: None }
    }

    /// A payload without a slot: written to a file of its own, within the budget.
    fn put_copy(&self, dest: &Path, payload: &dyn Payload) -> Result<Created> {
        let Some(budget) = &self.budget else {
            return Err(Error::invalid(format!("{} is open for reading", self.address())));
        };
        let staged = staging_path(&self.dir.root, "copy");
        let file = create_staged(&staged)?;
        let fill = || {
            budget.grow(&file, &staged, payload.len(), &|| true)?;
            let mut scratch = AlignedBuf::new(1);
            let mut offset = 0;
            while offset < payload.len() {
                let want = (payload.len() - offset).min(CHUNK_BYTES);
                let len = usize::try_from(want).unwrap_or(0);
                let block = payload.block(offset, padded(len), &mut scratch)?;
                file.write_all_at(&block[..len], offset).at("write", &staged)?;
                offset += want;
            }
            Ok(())
        };
        match fill() {
            Ok(()) => publish(Some(file), &staged, dest, false),
            Err(e) => {
                // The error that matters is on its way up; a staged file that stays is swept.
                let _ = remove(&staged);
                Err(e)
            }
        }
    }
}

impl Tier for MemoryTier {
    fn kind(&self) -> TierKind {
        TierKind::Ram
    }

    fn address(&self) -> String {
        self.dir.root.display().to_string()
    }

    fn put(&self, name: &str, payload: &dyn Payload) -> Result<Receipt> {
        let dest = self.dir.path(name)?;
        let created = match payload.slot() {
            Some(slot) => slot.publish(&dest, payload.len())?,
            None => self.put_copy(&dest, payload)?,
        };
        if created == Created::Exists {
            self.dir.put_before(name, payload)?;
        }
        Ok(Receipt { tier: TierKind::Ram, name: name.into(), length: payload.len() })
    }

    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created> {
        self.dir.create(name, bytes)
    }

    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        self.dir.open(name)
    }

    fn list(&self, dir: &str) -> Result<Vec<Entry>> {
        self.dir.list(dir)
    }

    fn confirm(&self, dir: &str) -> Result<()> {
        self.dir.confirm(dir)
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.dir.delete(name)
    }

    fn mend(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        self.dir.mend(name, offset, bytes)
    }

    /// Deletes: a slot that is to be used again is taken back by its arena, which has it mapped.
    fn retire(&self, name: &str) -> Result<()> {
        self.dir.delete(name)
    }
}
