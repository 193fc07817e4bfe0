//! An agent's tiers, for reading: names by question, bytes by descriptor, so that nothing goes over the
//! socket that the kernel can hand over.
//!
//! What writes belongs to the agent, and is refused here.

use std::{fs::File, path::PathBuf, sync::Arc, time::Duration};

use tierkeep_proto::trainer::{self as wire, reply::Answer, request::Call};

use super::{FETCH, dial, dial::Dial};
use crate::{
    error::{Error, Result},
    tier::{Created, Entry, Payload, Receipt, Source, Tier, TierKind, posix},
    wire::convert,
};

/// How long a listing or an open file is waited for: a disk that hangs is not the agent's doing.
const WAIT: Duration = Duration::from_secs(120);

#[derive(Debug)]
pub(super) struct FarTier {
    dial: Arc<Dial>,
    kind: TierKind,
    address: String,
}

impl FarTier {
    pub(super) fn new(dial: Arc<Dial>, kind: TierKind, address: String) -> Self {
        Self { dial, kind, address }
    }

    fn refused<T>(&self) -> Result<T> {
        Err(Error::Bug(format!("{} is written to by its agent alone", self.address)))
    }
}

#[deny(clippy::missing_trait_methods)]
impl Tier for FarTier {
    fn kind(&self) -> TierKind {
        self.kind
    }

    fn address(&self) -> String {
        self.address.clone()
    }

    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        let read = wire::Read { tier: convert::tier(self.kind).into(), name: name.into() };
        let within = if self.kind == TierKind::Peer { FETCH } else { WAIT };
        let (answer, fds) = self.dial.ask(Call::Read(read), within)?;
        let (Answer::Found(_), Some(fd)) = (answer, fds.into_iter().next()) else {
            return Err(dial::odd("Read"));
        };
        let path = PathBuf::from(&self.address).join(name);
        posix::source(File::from(fd), path, self.kind == TierKind::Disk)
    }

    fn list(&self, dir: &str) -> Result<Vec<Entry>> {
        let list = wire::List { tier: convert::tier(self.kind).into(), dir: dir.into() };
        let (Answer::Entries(found), _) = self.dial.ask(Call::List(list), WAIT)? else {
            return Err(dial::odd("List"));
        };
        let entry = |e: wire::Entry| Entry { name: e.name, is_dir: e.is_dir };
        Ok(found.entries.into_iter().map(entry).collect())
    }

    fn put(&self, _name: &str, _payload: &dyn Payload) -> Result<Receipt> {
        self.refused()
    }

    fn create(&self, _name: &str, _bytes: &[u8]) -> Result<Created> {
        self.refused()
    }

    fn confirm(&self, _dir: &str) -> Result<()> {
        self.refused()
    }

    fn delete(&self, _name: &str) -> Result<()> {
        self.refused()
    }

    fn mend(&self, _name: &str, _offset: u64, _bytes: &[u8]) -> Result<()> {
        self.refused()
    }

    fn retire(&self, _name: &str) -> Result<()> {
        self.refused()
    }

    fn sweep(&self, _stays: &dyn Fn(&str) -> bool) -> Result<usize> {
        self.refused()
    }
}
