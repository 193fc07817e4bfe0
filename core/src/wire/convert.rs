//! The core's words as the wire's, and back. What comes from a wire is checked here, before anything
//! is made of it.

use std::{
    borrow::Cow,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tierkeep_proto::trainer::{self as wire, failure};

use crate::{
    attempt::AttemptRecord,
    begin::Begin,
    bucket::Bucket,
    config::Config,
    error::{Error, ErrorKind, Hint, Result},
    manifest::decode,
    names::{AttemptDir, CheckpointKey, Id, Rank, Step},
    observe::{Event, Observer, Severity},
    record,
    restore::{
        asks::Care,
        decide::Wish,
        read::Restorable,
        survey::{BadCopy, ShardCopy},
    },
    state::replicas::Rule,
    tier::{Tier, TierKind, object::address::is_url},
};

/// A failure for the wire.
pub(crate) fn failure(error: &Error) -> wire::Failure {
    use failure::{Detail, Hint as Said, Kind};
    let kind = match error.kind() {
        ErrorKind::Unavailable => Kind::Unavailable,
        ErrorKind::Corrupt => Kind::Corrupt,
        ErrorKind::Fenced => Kind::Fenced,
        ErrorKind::NotFound => Kind::NotFound,
        ErrorKind::Invalid => Kind::Invalid,
        ErrorKind::Bug => Kind::Bug,
    };
    let detail = match error.plain() {
        Error::Deadline { what, seconds, missing } => Some(Detail::Deadline(wire::Deadline {
            what: what.clone(),
            seconds: *seconds,
            missing: missing.clone(),
        })),
        Error::Mismatch(lines) => Some(Detail::Mismatch(wire::Lines { lines: lines.clone() })),
        Error::Budget { sum } => Some(Detail::Budget(sum.clone())),
        Error::Skipped { step, why } => {
            Some(Detail::Skipped(wire::Skipped { step: step.0, why: why.clone() }))
        }
        _ => None,
    };
    let hint = error.hint().map(|hint| match hint {
        Hint::AcceptOlder => Said::AcceptOlder(true),
        Hint::NameAttempt(number) => Said::NameAttempt(number),
        Hint::RestoreFirst => Said::RestoreFirst(true),
        Hint::Rollback => Said::Rollback(true),
    });
    wire::Failure { kind: kind.into(), message: error.chain(), detail, hint }
}

/// The failure that the other side met.
pub(crate) fn error(said: wire::Failure) -> Error {
    use failure::{Detail, Hint as Said, Kind};
    let kind = match said.kind() {
        Kind::Corrupt => ErrorKind::Corrupt,
        Kind::Fenced => ErrorKind::Fenced,
        Kind::NotFound => ErrorKind::NotFound,
        Kind::Invalid => ErrorKind::Invalid,
        Kind::Bug => ErrorKind::Bug,
        // A kind that a newer agent knows: try again later is the least that can be meant.
        Kind::Unavailable | Kind::Unknown => ErrorKind::Unavailable,
    };
    let plain = match said.detail {
        Some(Detail::Deadline(wire::Deadline { what, seconds, missing })) => {
            Error::Deadline { what, seconds, missing }
        }
        Some(Detail::Mismatch(wire::Lines { lines })) => Error::Mismatch(lines),
        Some(Detail::Budget(sum)) => Error::Budget { sum },
        Some(Detail::Skipped(wire::Skipped { step, why })) => {
            Error::Skipped { step: Step(step), why }
        }
        None => Error::Shared { kind, message: said.message },
    };
    match said.hint {
        Some(Said::AcceptOlder(_)) => plain.with_hint(Hint::AcceptOlder),
        Some(Said::NameAttempt(number)) => plain.with_hint(Hint::NameAttempt(number)),
        Some(Said::RestoreFirst(_)) => plain.with_hint(Hint::RestoreFirst),
        Some(Said::Rollback(_)) => plain.with_hint(Hint::Rollback),
        None => plain,
    }
}

pub(crate) fn id(bytes: &[u8]) -> Result<Id> {
    let bytes = bytes.try_into();
    bytes.map(Id).map_err(|_| Error::invalid("an id that has not 16 bytes"))
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What a trainer says when it takes its rank.
pub(crate) fn open(config: &Config, start: Id, nonce: Id) -> wire::Open {
    wire::Open {
        destination: config.destination.as_os_str().as_bytes().to_vec(),
        rank: config.rank,
        world: config.world,
        savers: config.savers.clone(),
        start: start.0.to_vec(),
        nonce: nonce.0.to_vec(),
        start_is_known: config.attempt_id.is_some(),
        slots: u32::try_from(config.slots).unwrap_or(u32::MAX),
        disk_every: config.disk_every,
        keep_last: config.keep_last as u64,
        keep_every: config.keep_every,
        replicated: !config.replicated.is_empty(),
        lock_wait_ms: milliseconds(config.lock_wait),
        attempt_wait_ms: milliseconds(config.attempt_wait),
        slot_wait_ms: milliseconds(config.slot_wait),
        disk_wait_ms: milliseconds(config.disk_wait),
        stragglers_wait_ms: milliseconds(config.stragglers_wait),
        back: None,
        replicas: config.replicas,
        peer_wait_ms: milliseconds(config.peer_wait),
        bucket: config.bucket.as_ref().map(|bucket| wire::Bucket {
            url: bucket.url.clone(),
            options: bucket.options.clone().into_iter().collect(),
            every: bucket.every,
            keep_last: bucket.keep_last as u64,
            keep_every: bucket.keep_every,
            bytes_per_second_max: bucket.bytes_per_second_max,
            wait_ms: milliseconds(bucket.wait),
            compress: bucket.compress,
            every_minutes: bucket.every_minutes,
            keep_hours: bucket.keep_hours,
            grace_ms: milliseconds(bucket.grace),
            scrub_ms: bucket.scrub.map(milliseconds),
        }),
    }
}

/// The settings that a trainer named, over the agent's own `ram_root`.
///
/// # Errors
/// [`Error::Invalid`] that names what is wrong.
pub(crate) fn config(open: &wire::Open, ram_root: PathBuf) -> Result<Config> {
    let destination = PathBuf::from(std::ffi::OsString::from_vec(open.destination.clone()));
    let is_url = destination.to_str().is_some_and(is_url);
    if !destination.is_absolute() && !is_url {
        return Err(Error::invalid(format!("{} is not absolute", destination.display())));
    }
    let run = destination.file_name().and_then(|name| name.to_str()).unwrap_or("");
    crate::names::check_run_name(run)?;
    let length = |ms: u64, max_s: u64| Duration::from_millis(ms).min(Duration::from_secs(max_s));
    let savers = open.savers.clone();
    let all = || vec![Rule { pattern: "*".into(), ranks: savers.clone() }];
    let config = Config {
        destination: crate::config::absolute(&destination)?,
        agent: None,
        token_file: None,
        ram_root,
        ram_bytes_max: None,
        rank: open.rank,
        world: open.world,
        // Which tensors, only the trainer need know.
        replicated: if open.replicated { all() } else { Vec::new() },
        savers: open.savers.clone(),
        attempt_id: open.start_is_known.then(|| id(&open.start)).transpose()?,
        slots: usize::try_from(open.slots).unwrap_or(usize::MAX),
        disk_every: open.disk_every,
        keep_last: usize::try_from(open.keep_last).unwrap_or(usize::MAX),
        keep_every: open.keep_every,
        threads: None,
        lock_wait: length(open.lock_wait_ms, 3_600),
        attempt_wait: length(open.attempt_wait_ms, 86_400),
        slot_wait: length(open.slot_wait_ms, 86_400),
        disk_wait: length(open.disk_wait_ms, 86_400),
        stragglers_wait: length(open.stragglers_wait_ms, 86_400),
        replicas: open.replicas,
        peer_wait: length(open.peer_wait_ms, 86_400),
        bucket: open.bucket.as_ref().map(|bucket| Bucket {
            url: bucket.url.clone(),
            options: bucket.options.clone().into_iter().collect(),
            every: bucket.every,
            keep_last: usize::try_from(bucket.keep_last).unwrap_or(usize::MAX),
            keep_every: bucket.keep_every,
            bytes_per_second_max: bucket.bytes_per_second_max,
            wait: length(bucket.wait_ms, 7 * 86_400),
            compress: bucket.compress,
            every_minutes: bucket.every_minutes,
            keep_hours: bucket.keep_hours,
            grace: length(bucket.grace_ms, 7 * 86_400),
            scrub: bucket.scrub_ms.map(|ms| length(ms, 366 * 86_400)),
        }),
    };
    config.check()?;
    if config.replicas.is_some_and(|replicas| replicas > REPLICAS_MAX) {
        let replicas = config.replicas.unwrap_or(0);
        return Err(Error::invalid(format!("replicas = {replicas}: at most {REPLICAS_MAX}")));
    }
    if config.slots > SLOTS_MAX {
        return Err(Error::invalid(format!("slots = {}: at most {SLOTS_MAX}", config.slots)));
    }
    Ok(config)
}

/// A rank that holds more snapshots than this at once has a disk that will never keep up.
const SLOTS_MAX: usize = 64;

/// More copies than that cost more than they save.
const REPLICAS_MAX: u32 = 16;

pub(crate) fn begin(how: &Begin) -> wire::Begin {
    wire::Begin {
        step: how.wish.step.map(|step| step.0),
        attempt: how.wish.attempt,
        accept_older: how.wish.accept_older,
        rollback: how.rollback,
        fresh: how.fresh,
        only_new: how.only_new,
    }
}

pub(crate) fn how_to_begin(said: &wire::Begin) -> Begin {
    let (step, attempt) = (said.step.map(Step), said.attempt);
    Begin {
        wish: Wish { step, attempt, accept_older: said.accept_older },
        rollback: said.rollback,
        fresh: said.fresh,
        only_new: said.only_new,
    }
}

/// An attempt record as it is stored.
pub(crate) fn record_bytes(record: &AttemptRecord) -> Result<Vec<u8>> {
    let body = serde_json::to_vec(record).map_err(|e| Error::Bug(e.to_string()))?;
    Ok(record::seal(&body))
}

pub(crate) fn record_of(bytes: &[u8]) -> Result<AttemptRecord> {
    record::open(bytes, "an attempt record from the other side")
}

pub(crate) fn tier(kind: TierKind) -> wire::Tier {
    match kind {
        TierKind::Ram => wire::Tier::Ram,
        TierKind::Disk => wire::Tier::Disk,
        TierKind::Peer => wire::Tier::Peer,
        TierKind::Object => wire::Tier::Object,
    }
}

pub(crate) fn tier_kind(said: i32) -> Result<TierKind> {
    match wire::Tier::try_from(said) {
        Ok(wire::Tier::Ram) => Ok(TierKind::Ram),
        Ok(wire::Tier::Disk) => Ok(TierKind::Disk),
        Ok(wire::Tier::Peer) => Ok(TierKind::Peer),
        Ok(wire::Tier::Object) => Ok(TierKind::Object),
        _ => Err(Error::invalid(format!("there is no tier {said} here"))),
    }
}

pub(crate) fn shard(found: &Restorable) -> wire::Shard {
    // The same in every copy, and said once.
    let manifest = |copy: &ShardCopy| match std::ptr::eq(copy, &raw const found.copies[0]) {
        false if *copy.bytes == *found.copies[0].bytes => Vec::new(),
        _ => copy.bytes.to_vec(),
    };
    let copy = |copy: &ShardCopy| wire::Copy {
        tier: tier(found.tiers[copy.tier].kind()).into(),
        manifest: manifest(copy),
    };
    let bad = |bad: &BadCopy| wire::Bad { tier: tier(bad.tier).into(), why: bad.why.clone() };
    wire::Shard {
        step: found.key.step.0,
        attempt: found.key.attempt.to_string(),
        rank: found.rank.0,
        copies: found.copies.iter().map(copy).collect(),
        bad: found.bad.iter().map(bad).collect(),
        others: found.others.iter().map(shard).collect(),
        mends: found.mends,
        marks: found.marks,
    }
}

/// A shard to be read from `tiers`, of which an agent takes `care`.
pub(crate) fn restorable(
    said: &wire::Shard,
    tiers: &[Arc<dyn Tier>],
    observer: &Observer,
    care: &Arc<dyn Care>,
) -> Result<Restorable> {
    let attempt = AttemptDir::parse(&said.attempt);
    let attempt = attempt.ok_or_else(|| Error::Bug(format!("attempt {:?}", said.attempt)))?;
    let (key, rank) = (CheckpointKey { step: Step(said.step), attempt }, Rank(said.rank));
    let mut first: Option<ShardCopy> = None;
    let mut copy = |copy: &wire::Copy| {
        let kind = tier_kind(copy.tier)?;
        let tier = tiers.iter().position(|t| t.kind() == kind);
        let tier = tier.ok_or_else(|| Error::Bug(format!("no {kind} tier")))?;
        if let (true, Some(first)) = (copy.manifest.is_empty(), &first) {
            return Ok(ShardCopy { tier, ..first.clone() });
        }
        let manifest = decode(&copy.manifest, "a manifest from the agent", &key, rank)?;
        let (manifest, bytes) = (Arc::new(manifest), Arc::new(copy.manifest.clone()));
        let found = ShardCopy { tier, manifest, bytes };
        first.get_or_insert_with(|| found.clone());
        Ok(found)
    };
    let bad =
        |bad: &wire::Bad| tier_kind(bad.tier).map(|tier| BadCopy { tier, why: bad.why.clone() });
    let copies: Vec<ShardCopy> = said.copies.iter().map(&mut copy).collect::<Result<_>>()?;
    if copies.is_empty() {
        return Err(Error::Bug(format!("{key}, {rank}: a shard without a copy")));
    }
    let others = said.others.iter().map(|other| restorable(other, tiers, observer, care));
    let bad = said.bad.iter().map(bad).collect::<Result<_>>()?;
    let found = Restorable::of(key, rank, tiers.to_vec(), (copies, bad), observer.clone());
    Ok(Restorable {
        mends: said.mends,
        marks: said.marks,
        care: Some(care.clone()),
        others: others.collect::<Result<_>>()?,
        ..found
    })
}

pub(crate) fn event(event: &Event) -> wire::Event {
    let severity = match event.severity {
        Severity::Info => wire::event::Severity::Info,
        Severity::Warning => wire::event::Severity::Warning,
        Severity::Error => wire::event::Severity::Error,
    };
    wire::Event {
        severity: severity.into(),
        kind: event.kind.to_string(),
        text: event.text.clone(),
        step: event.step,
    }
}

pub(crate) fn event_of(said: wire::Event) -> Event {
    let severity = match said.severity() {
        wire::event::Severity::Info => Severity::Info,
        wire::event::Severity::Warning => Severity::Warning,
        wire::event::Severity::Error => Severity::Error,
    };
    Event { severity, kind: Cow::Owned(said.kind), text: said.text, step: said.step }
}
