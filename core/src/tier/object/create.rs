//! Small objects that are made where nobody has made them yet: records of attempts, claims, manifests, seals.
//!
//! Most stores decide that themselves (`If-None-Match: *`; a generation of 0). Some refuse the condition, and
//! some ignore it and overwrite. Before the first such object is made, two of one name are tried, under
//! `_probe/` and a name of random digits that no other prober has; they are removed again. Where the second
//! one is taken as well, or `aws_conditional_put=disabled` says so, it is told once, and each writer looks,
//! writes, waits for the others' writes to land, and reads back what stands there.
//!
//! # Invariants
//!
//! - Where the store decides, one of any number of writers is told that it was first.
//! - Elsewhere a name that stood there when a writer looked is never written over, and what stands there is
//!   whole and of one writer.
//! - Of writers there that look and write within [`SETTLE`] of each other, only those are told that they were
//!   first whose bytes stayed.
//!
//! # What such a store cannot give
//!
//! A writer whose write lands later than that after its look writes over what another made meanwhile, and
//! both are told that they were first. Where that could matter:
//!
//! - A seal has one writer, the leader of its attempt, and is the same bytes whoever writes it.
//! - Manifests and payloads lie in a directory that has the attempt's random id in its name, under a rank
//!   that one process has claimed: two attempts write over nothing of each other's.
//! - Of two attempts that take one number, one record stays. The leader of the other finds that before it
//!   seals anything and ends by name, as one that was superseded does. A seal that it is writing at that
//!   very moment still appears, in its own directory, of no attempt that a record tells of: nobody resumes
//!   from it.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use backon::BlockingRetryable;
use object_store::{
    Error, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, path::Path,
};

use super::{ask::Store, explain::chain, hands::wait, upload::patience};
use crate::{
    clock::{Clock, SystemClock},
    names::Id,
    observe::locked,
    tier::Created,
};

/// How long a writer waits for others' writes to land before it reads back, at least: a small object takes a
/// tenth of it. Where its own look and write took longer than half of it, twice as long as those, to a limit.
const SETTLE: Duration = Duration::from_secs(1);
const SETTLE_MAX: Duration = Duration::from_secs(5);

/// Where probes lie.
const PROBES: &str = "_probe";

/// Who decides which writer was first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// The store.
    Conditional,
    /// The writers.
    Looks,
}

/// How objects are created in one store.
#[derive(Debug)]
pub(super) struct Creates {
    /// The same store without retries: one that does not know a condition answers as if it were broken.
    once: Arc<dyn ObjectStore>,
    way: Mutex<Option<Way>>,
}

impl Creates {
    /// `way`: where it is known.
    pub(super) fn new(once: Arc<dyn ObjectStore>, way: Option<Way>) -> Self {
        Self { once, way: Mutex::new(way) }
    }

    /// Who decides: asked of the store once. `place`: where in it, and its name for a person.
    pub(super) fn way(&self, store: &Store, (at, name): (&Path, &str)) -> Result<Way, Error> {
        let mut known = locked(&self.way);
        if let Some(way) = *known {
            return Ok(way);
        }
        let way = self.probe(store, at)?;
        if way == Way::Looks {
            tracing::warn!(
                "{name}: this store does not decide which of two writers was first (If-None-Match), so each \
                 one looks, writes and reads back: two jobs of one run that start within a second of each \
                 other may both begin, and one of them then ends"
            );
        }
        Ok(*known.insert(way))
    }

    fn probe(&self, store: &Store, at: &Path) -> Result<Way, Error> {
        let id = Id::random().map_err(|e| generic(e.chain()))?;
        let path = at.clone().join(PROBES).join(id.to_string());
        let once = Store { inner: self.once.clone(), credentials: store.credentials.clone() };
        let put = || once.ask(|once| wait(create(once, &path, b"probe")));
        let passes = |e: &Error| matches!(e, Error::Generic { .. }) && !knows_no_condition(e);
        // One whose answer was lost and that meets itself says what is asked here, too.
        let first = put.retry(patience()).when(passes).call();
        let found = match first {
            Ok(Created::New) => put.retry(patience()).when(passes).call(),
            other => other,
        };
        let way = match found {
            Ok(Created::Exists) => Ok(Way::Conditional),
            Ok(Created::New) => Ok(Way::Looks),
            Err(e) if knows_no_condition(&e) => Ok(Way::Looks),
            Err(e) => Err(e),
        };
        match store.ask(|store| wait(store.delete(&path))) {
            Ok(()) | Err(Error::NotFound { .. }) => {}
            Err(e) => tracing::debug!("{path} stays: {}", chain(&e)),
        }
        way
    }

    /// Makes an object, unless its name is taken.
    pub(super) fn create(
        &self,
        store: &Store,
        place: (&Path, &str),
        path: &Path,
        bytes: &[u8],
    ) -> Result<Created, Error> {
        match self.way(store, place)? {
            Way::Conditional => store.ask(|store| wait(create(store, path, bytes))),
            Way::Looks => look_and_create(store, path, bytes),
        }
    }
}

async fn create(store: &dyn ObjectStore, path: &Path, bytes: &[u8]) -> Result<Created, Error> {
    let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
    match store.put_opts(path, PutPayload::from(bytes.to_vec()), options).await {
        Ok(_) => Ok(Created::New),
        Err(Error::AlreadyExists { .. }) => Ok(Created::Exists),
        Err(e) => Err(e),
    }
}

fn look_and_create(store: &Store, path: &Path, bytes: &[u8]) -> Result<Created, Error> {
    let clock = SystemClock;
    let begun = clock.monotonic();
    match store.ask(|store| wait(store.head(path))) {
        Ok(_) => return Ok(Created::Exists),
        Err(Error::NotFound { .. }) => {}
        Err(e) => return Err(e),
    }
    store.ask(|store| wait(store.put(path, PutPayload::from(bytes.to_vec()))))?;
    clock.pause((2 * (clock.monotonic() - begun)).clamp(SETTLE, SETTLE_MAX));
    match store.ask(|store| wait(async { store.get(path).await?.bytes().await })) {
        Ok(there) if there == bytes => Ok(Created::New),
        Ok(_) => Ok(Created::Exists),
        Err(Error::NotFound { .. }) => {
            Err(generic("it was deleted right after it was written".into()))
        }
        Err(e) => Err(e),
    }
}

/// The store says that it cannot do what was asked.
fn knows_no_condition(e: &Error) -> bool {
    let text = || chain(e);
    matches!(e, Error::NotImplemented { .. } | Error::NotSupported { .. })
        || text().contains("501 Not Implemented")
        || text().contains("<Code>NotImplemented</Code>")
}

fn generic(why: String) -> Error {
    Error::Generic { store: "object", source: why.into() }
}
