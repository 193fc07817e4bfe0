//! From disk to the bucket, behind the training: a thread of its own, one step at a time, the same step on
//! every rank.
//!
//! The leader records which step goes next (the newest that is sealed on disk and due). Every rank sends its
//! shard of it, and says so; when all have, the leader seals the checkpoint in the bucket. A bucket that is
//! away keeps the step on its way until the deadline, and nothing else: slots and the disk go on.
//!
//! # Invariants
//!
//! - What is sent was checked chunk by chunk when it was read, and the bucket has it under the checksums of
//!   the save.
//! - The seal is written by a leader that found no newer attempt in the bucket right before.
//! - A step is told as being in the bucket only when it is sealed there.
//! - The disk keeps a step that is on its way.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use super::{Cascade, IDLE};
use crate::{
    agree::{InRam, Own},
    attempt::{self, Attempts},
    bucket::Bucket,
    clock::Deadline,
    commit::{Gathered, Listing, gather, publish_shard},
    error::{Error, ErrorKind, Result},
    manifest::replicated::differences_in_words,
    names::{ATTEMPTS, CheckpointKey, Rank, Step, attempt_file, parse_attempt_file, ranks},
    observe::{add, locked},
    reader::Reader,
    restore::{
        decide::lineage_of,
        survey::{look_for_seals, survey},
    },
    retain,
    save::{Level, Save},
    snapshot::slot::Slot,
    tier::{Payload, Tier, buffer::AlignedBuf},
};

/// Between two tries of a bucket that is away, at first; then twice as long each time.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(30);

/// The bucket, and what is asked of it.
pub(crate) struct Far {
    pub(crate) tier: Arc<dyn Tier>,
    pub(crate) settings: Bucket,
}

/// The step that goes to the bucket.
#[derive(Debug)]
struct Now {
    step: u64,
    deadline: Deadline,
    own_done: bool,
    /// The leader was told so.
    told: bool,
    /// The bucket was away: not before then, and the pause after that.
    not_before: Duration,
    pause: Duration,
}

/// How far this rank's way to the bucket is.
#[derive(Debug, Default)]
pub(crate) struct Sending {
    now: Option<Now>,
    /// The newest step that is sealed on disk and due here.
    next: Option<u64>,
    /// The newest step that was ever chosen.
    chosen: Option<u64>,
    /// Saves that are due here and not decided yet.
    saves: BTreeMap<u64, Save>,
    /// The records of the attempts are there.
    has_records: bool,
    /// Why it is away, where it is.
    trouble: Option<String>,
}

impl Sending {
    /// `next`: what the attempt resumed from, where the bucket lacks it.
    pub(super) fn beginning_with(next: Option<u64>) -> Self {
        Self { next, ..Self::default() }
    }

    /// The step that is to be chosen next.
    fn waits(&self) -> Option<u64> {
        self.next.filter(|next| self.chosen.is_none_or(|chosen| *next > chosen))
    }

    fn is_busy(&self) -> bool {
        self.now.is_some() || self.waits().is_some()
    }
}

impl Cascade {
    /// Says in `save` whether it goes to the bucket.
    pub(super) fn mark_due_for_bucket(&self, save: &Save) {
        let step = save.step();
        let why = match &self.parts.far {
            Some(far)
                if self.is_due(step)
                    && (step.is_multiple_of(far.settings.every) || self.is_last(step)) =>
            {
                save.set_due_for_object();
                if save.is_pending(Level::Object) {
                    locked(&self.sending).saves.insert(step, save.clone());
                }
                return;
            }
            Some(far) => {
                format!("it is not due for the bucket: every {} steps", far.settings.every)
            }
            None => "it goes to no bucket: there is none here".into(),
        };
        save.fail(Level::Object, &Error::Skipped { step: Step(step), why });
    }

    /// A step is sealed on disk.
    pub(super) fn offer_to_bucket(&self, step: u64) {
        let Some(far) = &self.parts.far else { return };
        if !step.is_multiple_of(far.settings.every) && !self.is_last(step) {
            return;
        }
        let mut sending = locked(&self.sending);
        sending.next = sending.next.max(Some(step));
        drop(sending);
        self.parts.signal.notify();
    }

    /// Steps that the disk keeps for the bucket.
    pub(super) fn kept_for_bucket(&self) -> Vec<CheckpointKey> {
        let sending = locked(&self.sending);
        let steps = sending.now.iter().map(|now| now.step).chain(sending.waits());
        steps.map(|step| self.key_of(step)).collect()
    }

    /// Something is on its way to the bucket, or about to be.
    pub(super) fn is_sending(&self) -> bool {
        self.parts.far.is_some() && locked(&self.sending).is_busy()
    }

    /// Nothing goes there any more.
    pub(super) fn end_sending(&self, fenced: Option<&Error>) {
        let saves = std::mem::take(&mut locked(&self.sending).saves);
        for (step, save) in saves {
            let why = "the Checkpointer was closed before".into();
            let closed = Error::Skipped { step: Step(step), why };
            save.fail(Level::Object, fenced.unwrap_or(&closed));
        }
    }

    /// The thread's whole life.
    pub(crate) fn run_to_bucket(&self) {
        let Some(far) = &self.parts.far else { return };
        let mut told: Option<String> = None;
        loop {
            let seen = self.parts.signal.seen();
            if locked(&self.work).stop {
                return;
            }
            let pause = match self.turn_to_bucket(far) {
                Ok(true) => continue,
                Ok(false) => {
                    told = None;
                    if locked(&self.sending).now.is_some() { self.poll() } else { IDLE }
                }
                Err(_) if locked(&self.work).stop => return,
                Err(e) => {
                    let text = e.chain();
                    if told.as_deref() != Some(&text) {
                        self.parts.observer.warn("object_away", None, text.clone());
                        told = Some(text);
                    }
                    IDLE
                }
            };
            self.parts.signal.wait(seen, pause);
        }
    }

    fn turn_to_bucket(&self, far: &Far) -> Result<bool> {
        if self.is_fenced() {
            return Ok(false);
        }
        let chosen = self.choose_for_bucket(far)?;
        let sent = self.send_to_bucket(far)?;
        Ok(self.watch_bucket(far)? || chosen || sent)
    }

    /// The leader chooses; the others read what it chose.
    fn choose_for_bucket(&self, far: &Far) -> Result<bool> {
        let (idle, before, offered) = {
            let sending = locked(&self.sending);
            (sending.now.is_none(), sending.chosen, sending.next)
        };
        let newer = |step: &u64| before.is_none_or(|before| *step > before);
        let next = match self.parts.config.leads() {
            true => offered.filter(|_| idle).filter(newer),
            // A newer choice means that the leader is done with the old one, one way or the other.
            false => self.parts.agreements.sent()?.filter(newer),
        };
        let Some(step) = next else { return Ok(false) };
        if self.parts.config.leads() {
            self.parts.agreements.send(step)?;
        }
        let deadline = Deadline::after(&*self.parts.clock, far.settings.wait);
        let now = Now {
            step,
            deadline,
            own_done: !self.parts.config.saves(),
            told: !self.parts.config.saves(),
            not_before: Duration::ZERO,
            pause: AGAIN,
        };
        let (old, passed) = {
            let mut sending = locked(&self.sending);
            sending.chosen = Some(step);
            let later = sending.saves.split_off(&step);
            (sending.now.replace(now), std::mem::replace(&mut sending.saves, later))
        };
        for (older, save) in passed {
            if old.as_ref().is_some_and(|old| old.step == older) {
                self.settle_old(older, &save)?;
                continue;
            }
            add(&self.parts.observer.counters.object_passed_over, 1);
            let why = format!("it was passed over for the bucket: step {step} is newer");
            save.fail(Level::Object, &Error::Skipped { step: Step(older), why });
        }
        Ok(true)
    }

    /// The leader went on to a newer step: what became of the one before it is recorded.
    fn settle_old(&self, step: u64, save: &Save) -> Result<()> {
        match self.parts.agreements.was_in_bucket(step)? {
            Some(InRam::Whole) => save.reach(Level::Object, false),
            Some(InRam::GivenUp(why)) => {
                save.fail(Level::Object, &Error::Skipped { step: Step(step), why })
            }
            None => {
                let why = "the leader went on to a newer step".into();
                save.fail(Level::Object, &Error::Skipped { step: Step(step), why });
            }
        }
        Ok(())
    }

    /// Sends this rank's shard of the chosen step.
    fn send_to_bucket(&self, far: &Far) -> Result<bool> {
        let clock = &*self.parts.clock;
        let (step, deadline) = {
            let sending = locked(&self.sending);
            let due = |now: &&Now| !now.own_done && clock.monotonic() >= now.not_before;
            let Some(now) = sending.now.as_ref().filter(due) else { return Ok(false) };
            (now.step, now.deadline)
        };
        let key = self.key_of(step);
        match self.send_shard_to_bucket(far, &key) {
            Ok(()) => {
                let mut sending = locked(&self.sending);
                sending.trouble = None;
                if let Some(save) = sending.saves.get(&step) {
                    save.reach(Level::Object, true);
                }
                if let Some(now) = sending.now.as_mut().filter(|now| now.step == step) {
                    now.own_done = true;
                }
                Ok(true)
            }
            Err(_) if locked(&self.work).stop => Ok(false),
            Err(e) if may_pass(&e) && deadline.left(clock).is_some() => {
                self.wait_for_bucket(step, &e);
                Ok(false)
            }
            Err(e) => {
                let why = format!("{}: {}", Rank(self.parts.config.rank), e.chain());
                let said = self.parts.agreements.in_bucket(step, InRam::GivenUp(why))?;
                self.ended_in_bucket(far, step, &said);
                Ok(true)
            }
        }
    }

    /// It is away: the step stays on its way, and it is told once.
    fn wait_for_bucket(&self, step: u64, e: &Error) {
        let mut sending = locked(&self.sending);
        let text = e.chain();
        let first = sending.trouble.replace(text.clone()).is_none();
        if let Some(now) = sending.now.as_mut().filter(|now| now.step == step) {
            now.not_before = self.parts.clock.monotonic() + now.pause;
            now.pause = (2 * now.pause).min(AGAIN_MAX);
        }
        drop(sending);
        if first {
            let text = format!("step {step} waits for the bucket, which is tried again: {text}");
            self.parts.observer.warn("object_away", Some(step), text);
        }
    }

    fn send_shard_to_bucket(&self, far: &Far, key: &CheckpointKey) -> Result<()> {
        self.keep_records_in_bucket(far)?;
        let rank = Rank(self.parts.config.rank);
        if Listing::of(&*far.tier, key)?.manifests.contains(&rank) {
            return Ok(());
        }
        let begun = self.parts.clock.monotonic();
        let reader = Reader::of(vec![self.parts.ram.clone(), self.parts.disk.clone()]);
        let shard = reader.shard(key, rank)?;
        let identity = &shard.manifest().identity;
        let name = key.file(&identity.payload_name());
        let save = locked(&self.sending).saves.get(&key.step.0).cloned();
        let payload = shard.payload();
        let receipt = far.tier.put(&name, &Sent { payload: &payload, save, cascade: self })?;
        if self.is_fenced() {
            return Err(Error::Fenced { why: "a newer attempt has begun".into() });
        }
        publish_shard(&*far.tier, identity, shard.manifest_bytes(), receipt)?;
        let took = self.parts.clock.monotonic().saturating_sub(begun);
        let counters = &self.parts.observer.counters;
        add(&counters.object_bytes, payload.len());
        add(&counters.object_ns, u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        Ok(())
    }

    /// The bucket tells the lineage without this cluster: it has the record of every attempt.
    fn keep_records_in_bucket(&self, far: &Far) -> Result<()> {
        if !self.parts.config.leads() || locked(&self.sending).has_records {
            return Ok(());
        }
        let here: [&dyn Tier; 2] = [&*self.parts.disk, &*self.parts.ram];
        attempt::keep_missing(&Attempts::load(&here)?, &here, &*far.tier)?;
        locked(&self.sending).has_records = true;
        Ok(())
    }

    /// Sees that the step was sealed or given up; the leader seals it when every rank is done.
    fn watch_bucket(&self, far: &Far) -> Result<bool> {
        let (step, deadline, done, told) = {
            let sending = locked(&self.sending);
            let Some(now) = &sending.now else { return Ok(false) };
            (now.step, now.deadline, now.own_done, now.told)
        };
        let (agreements, config) = (&self.parts.agreements, &self.parts.config);
        if done && !told {
            agreements.say_own(step, config.rank, Own::InBucket)?;
            if let Some(now) = locked(&self.sending).now.as_mut().filter(|now| now.step == step) {
                now.told = true;
            }
        }
        let said = match agreements.was_in_bucket(step)? {
            Some(said) => said,
            None if !config.leads() || !done => return Ok(false),
            None => {
                let missing = agreements.without_own(step, Own::InBucket, &config.savers)?;
                let late = deadline.left(&*self.parts.clock).is_none();
                if !missing.is_empty() {
                    if !late {
                        return Ok(false);
                    }
                    let why = format!("{} did not send its shard in time", ranks(&missing));
                    agreements.in_bucket(step, InRam::GivenUp(why))?
                } else {
                    let key = self.key_of(step);
                    match self.seal_in_bucket(far, &key) {
                        Ok(()) => agreements.in_bucket(step, InRam::Whole)?,
                        Err(e) if may_pass(&e) && !late => return Err(e),
                        Err(e) => {
                            let why = format!("it could not be sealed: {}", e.chain());
                            agreements.in_bucket(step, InRam::GivenUp(why))?
                        }
                    }
                }
            }
        };
        self.ended_in_bucket(far, step, &said);
        Ok(true)
    }

    fn seal_in_bucket(&self, far: &Far, key: &CheckpointKey) -> Result<()> {
        let tier = &*far.tier;
        if Listing::of(tier, key)?.sealed {
            return Ok(());
        }
        match gather(tier, key, &self.parts.config.savers)? {
            Gathered::Complete(complete) => {
                self.check_bucket_fence(tier)?;
                complete.seal(tier).map(drop)
            }
            Gathered::Differ(list) => {
                Err(Error::Broken { what: key.to_string(), why: differences_in_words(&list) })
            }
            Gathered::Deleted => Err(Error::Fenced { why: format!("{key} is being deleted") }),
            // They were acknowledged: a listing that lags.
            Gathered::Missing(missing) => Err(Error::Io {
                what: format!("see the shards of {}", ranks(&missing)),
                source: std::io::Error::other("the bucket does not list them yet"),
            }),
        }
    }

    /// A newer attempt of this run has begun, perhaps in another cluster: nothing of this one is sealed.
    fn check_bucket_fence(&self, tier: &dyn Tier) -> Result<()> {
        let own = self.parts.record.attempt;
        let names = tier.list(ATTEMPTS)?;
        let newest = names.iter().filter_map(|entry| parse_attempt_file(&entry.name)).max();
        // A listing may lag, and a store that does not decide may have let another start take the number:
        // these two are read by name.
        match attempt::read_file(tier, &attempt_file(own.number), own.number) {
            Ok((record, _)) if record.attempt.id != own.id => {
                let why = format!("another start of this run has taken attempt {}", own.number);
                return Err(Error::Fenced { why: format!("{why}: {own} writes no more") });
            }
            Ok(_) | Err(Error::Damaged { .. }) => {}
            Err(e) if e.is_not_found() => {}
            Err(e) => return Err(e),
        }
        let next = match tier.open(&attempt_file(own.number + 1)) {
            Ok(_) => Some(own.number + 1),
            Err(e) if e.is_not_found() => None,
            Err(e) => return Err(e),
        };
        match newest.max(next) {
            Some(number) if number > own.number => Err(Error::Fenced {
                why: format!("attempt {number} of this run has begun: {own} writes no more"),
            }),
            _ => Ok(()),
        }
    }

    /// What became of the chosen step is known.
    fn ended_in_bucket(&self, far: &Far, step: u64, said: &InRam) {
        let save = {
            let mut sending = locked(&self.sending);
            sending.now.take_if(|now| now.step == step);
            if *said == InRam::Whole {
                sending.trouble = None;
            }
            sending.saves.remove(&step)
        };
        let counters = &self.parts.observer.counters;
        match said {
            InRam::Whole => {
                add(&counters.object_sealed, 1);
                tracing::info!("{} is sealed in the bucket", self.key_of(step));
                if let Some(save) = save {
                    save.reach(Level::Object, false);
                }
            }
            InRam::GivenUp(why) => {
                add(&counters.object_failed, 1);
                let why = format!("it was given up for the bucket: {why}");
                let error = Error::Skipped { step: Step(step), why };
                self.parts.observer.error("object_failed", Some(step), error.to_string());
                if let Some(save) = save {
                    save.fail(Level::Object, &error);
                }
            }
        }
        self.parts.signal.notify();
        if !self.parts.config.leads() {
            return;
        }
        let tidied = self
            .parts
            .agreements
            .forget_sent_before(step)
            .and_then(|()| self.retain_in_bucket(far));
        if let Err(e) = tidied {
            tracing::warn!("nothing was collected in the bucket after step {step}: {}", e.chain());
        }
    }

    /// Deletes what the policy lets go there.
    fn retain_in_bucket(&self, far: &Far) -> Result<()> {
        let tier = &*far.tier;
        let mut found = survey(&[tier])?;
        look_for_seals(tier, &mut found)?;
        let attempts = Attempts::load(&[tier])?;
        let newest = attempts.newest().map_or(0, |r| r.attempt.number);
        if newest != self.parts.record.attempt.number {
            return Ok(()); // Superseded: its leader collects.
        }
        let lineage = lineage_of(&[tier], &found, &attempts)?;
        let policy = retain::Policy {
            keep_last: far.settings.keep_last,
            keep_every: far.settings.keep_every,
            abandoned: false,
        };
        let in_flight: BTreeSet<CheckpointKey> = self.kept_for_bucket().into_iter().collect();
        let known = retain::Known {
            found: &found,
            lineage: &lineage,
            attempts: &attempts,
            pins: &retain::pins(tier)?,
            in_flight: &in_flight,
            given_up: &Default::default(),
        };
        retain::collect(tier, &retain::plan(&policy, &known), newest)?;
        // What dead processes began, and no rank is at: this is the newest attempt, and between two steps.
        let kept: Vec<String> = in_flight.iter().map(CheckpointKey::dir).collect();
        let stays = |name: &str| kept.iter().any(|dir| name.starts_with(dir.as_str()));
        let ended = tier.sweep(&stays)?;
        if ended > 0 {
            tracing::info!("ended {ended} uploads in the bucket that dead processes had left");
        }
        Ok(())
    }
}

/// It may go well later: the bucket is away, or refuses what somebody can allow again while the job trains
/// (its rights, credentials that have ended, a clock).
fn may_pass(e: &Error) -> bool {
    let is_refused =
        |source: &std::io::Error| source.kind() == std::io::ErrorKind::PermissionDenied;
    e.kind() == ErrorKind::Unavailable
        || matches!(e, Error::Io { source, .. } if is_refused(source))
}

/// The shard's payload on its way: its bytes are counted, and a cascade that was stopped hands out no more.
struct Sent<'a, P> {
    payload: &'a P,
    save: Option<Save>,
    cascade: &'a Cascade,
}

#[deny(clippy::missing_trait_methods)]
impl<P: Payload> Payload for Sent<'_, P> {
    fn len(&self) -> u64 {
        self.payload.len()
    }

    fn is_empty(&self) -> bool {
        self.payload.is_empty()
    }

    fn block<'a>(
        &'a self,
        offset: u64,
        len: usize,
        scratch: &'a mut AlignedBuf,
    ) -> Result<&'a [u8]> {
        if locked(&self.cascade.work).stop {
            return Err(Error::Fenced { why: "the attempt ended in this process".into() });
        }
        let block = self.payload.block(offset, len, scratch)?;
        if let Some(save) = &self.save {
            save.add_object_bytes((len as u64).min(self.len().saturating_sub(offset)));
        }
        Ok(block)
    }

    fn block_bytes(&self) -> u64 {
        self.payload.block_bytes()
    }

    fn crc32(&self, offset: u64, len: u64) -> Option<u32> {
        self.payload.crc32(offset, len)
    }

    fn slot(&self) -> Option<&Slot> {
        self.payload.slot()
    }
}
