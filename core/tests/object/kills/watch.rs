//! What a job asks of its bucket, seen from between: it is killed at a chosen request, and where it was then
//! is known.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use crate::{
    proxy::{Fate, Proxy, Request},
    servers,
};

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Deed {
    /// Parts of a large payload, and around them.
    Begin,
    Part,
    Complete,
    /// A small payload.
    Whole,
    Manifest,
    Seal,
    Tombstone,
    /// Of anything; the body says of what.
    Delete,
    /// Of an unfinished upload.
    Abort,
    /// An attempt's.
    Record,
    Look,
}

impl Deed {
    fn of(request: &Request) -> Self {
        let path = request.target.split('?').next().unwrap_or("");
        let name = path.rsplit('/').next().unwrap_or("");
        match &*request.method {
            "DELETE" if request.target.contains("uploadId=") => Self::Abort,
            "DELETE" => Self::Delete,
            "POST" if request.is_begin() => Self::Begin,
            "POST" if request.is_complete() => Self::Complete,
            "POST" => Self::Delete, // Of many.
            "PUT" if request.is_part() => Self::Part,
            "PUT" if name.ends_with(".safetensors") => Self::Whole,
            "PUT" if name.starts_with("rank-") => Self::Manifest,
            "PUT" if name == "CHECKPOINT.json" => Self::Seal,
            "PUT" if name == "DELETED.json" => Self::Tombstone,
            "PUT" => Self::Record,
            _ => Self::Look,
        }
    }

    fn phase(self) -> Option<Phase> {
        match self {
            Self::Begin | Self::Part | Self::Complete | Self::Whole => Some(Phase::Upload),
            Self::Manifest | Self::Seal => Some(Phase::Seal),
            Self::Tombstone | Self::Delete | Self::Abort => Some(Phase::Collection),
            Self::Record | Self::Look => None,
        }
    }
}

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Nothing was written yet, but for its record.
    Start,
    Upload,
    /// From the first shard that is there to the seal.
    Seal,
    /// It is sealed, and nothing of the next one has begun.
    Rest,
    Collection,
}

/// What becomes of the request at which the job is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It is done meanwhile.
    Passes,
    /// It is done when whoever sent it is dead.
    Late,
    /// It never arrives.
    Lost,
}

/// The request at which the job is killed: the so many-th of its kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct Aim {
    pub(super) deed: Deed,
    pub(super) number: u64,
    pub(super) end: End,
}

#[derive(Debug, Default)]
struct Life {
    aim: Option<Aim>,
    met: bool,
    released: bool,
    counts: BTreeMap<Deed, u64>,
    last: Option<Deed>,
}

/// The way to the bucket.
pub(super) struct Watch {
    pub(super) proxy: Proxy,
    life: Arc<(Mutex<Life>, Condvar)>,
}

impl Watch {
    pub(super) fn new() -> Self {
        let life = Arc::<(Mutex<Life>, Condvar)>::default();
        let seen = life.clone();
        let proxy = Proxy::start(servers::s3_port(), move |request| see(&seen, request));
        Self { proxy, life }
    }

    pub(super) fn begin(&self, aim: Option<Aim>) {
        *self.life.0.lock().expect("lock") = Life { aim, ..Life::default() };
    }

    /// The request that is aimed at is there, or comes in a moment.
    pub(super) fn is_met(&self, within: Duration) -> bool {
        let (life, told) = &*self.life;
        let life = life.lock().expect("lock");
        told.wait_timeout_while(life, within, |life| !life.met).expect("lock").0.met
    }

    /// It goes where it goes.
    pub(super) fn release(&self) {
        self.life.0.lock().expect("lock").released = true;
        self.life.1.notify_all();
    }

    pub(super) fn count(&self, deed: Deed) -> u64 {
        self.life.0.lock().expect("lock").counts.get(&deed).copied().unwrap_or(0)
    }

    /// Collection and upload may go on at once: then it is told by what is on its way.
    pub(super) fn phase(&self) -> Phase {
        let going = self.proxy.going();
        let now = going.iter().filter_map(|request| Deed::of(request).phase()).max();
        let last = self.life.0.lock().expect("lock").last;
        now.unwrap_or(match last {
            None => Phase::Start,
            Some(Deed::Seal | Deed::Abort) => Phase::Rest,
            Some(Deed::Complete | Deed::Whole) => Phase::Seal,
            Some(deed) => deed.phase().unwrap_or(Phase::Start),
        })
    }
}

fn see((life, told): &(Mutex<Life>, Condvar), request: &Request) -> Fate {
    let deed = Deed::of(request);
    let mut life = life.lock().expect("lock");
    let count = life.counts.entry(deed).or_default();
    *count += 1;
    let count = *count;
    if deed.phase().is_some() {
        life.last = Some(deed);
    }
    let Some(aim) = life.aim.filter(|aim| aim.deed == deed && aim.number == count) else {
        return Fate::Passes;
    };
    life.met = true;
    told.notify_all();
    match aim.end {
        End::Passes => return Fate::Passes,
        End::Late | End::Lost => {}
    }
    drop(told.wait_while(life, |life| !life.released).expect("lock"));
    if aim.end == End::Lost { Fate::Reset } else { Fate::Passes }
}
