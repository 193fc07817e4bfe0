//! From disk to the bucket, behind the training: a thread of its own, one step at a time, the same step on
//! every rank.
//!
//! The leader records which step goes next (the newest that is sealed on disk and due). Every rank sends its
//! shard of it, and says so; when all have, the leader seals the checkpoint in the bucket. A bucket that is
//! away keeps the step on its way until the deadline, and nothing else: slots and the disk go on. What lies
//! in the bucket beside shards is `in_bucket`'s.
//!
//! # Invariants
//!
//! - What is sent was checked chunk by chunk when it was read, and the bucket has it under the checksums of
//!   the save.
//! - A step is told as being in the bucket only when it is sealed there.
//! - The disk keeps a step that is on its way.

use std::{path::PathBuf, sync::Arc};

use super::{
    Cascade, IDLE, Work,
    sending::{AGAIN_MAX, Now, Sent},
};
use crate::{
    agree::{InRam, Lane, Own},
    bucket::Bucket,
    clock::Deadline,
    commit::{Listing, publish_shard},
    error::{Error, ErrorKind, Result},
    names::{CheckpointKey, Rank, Step, ranks},
    observe::{add, locked},
    packed::pack,
    reader::Reader,
    save::{Level, Save},
    tier::{Payload, Tier},
};

/// The bucket, and what is asked of it.
pub(crate) struct Far {
    pub(crate) tier: Arc<dyn Tier>,
    pub(crate) settings: Bucket,
}

impl Cascade {
    /// Says in `save` whether it goes to the bucket.
    pub(super) fn mark_due_for_bucket(&self, save: &Save) {
        let step = save.step();
        let why = match &self.parts.far {
            Some(far) if self.is_due_for_bucket(far, step) => {
                // One that was told that it is not due stays so, though it goes there after all.
                if save.is_pending(Level::Object) {
                    // Which one is, the clock of the leader says.
                    if far.settings.every_minutes.is_none() {
                        save.set_due_for_object();
                    }
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

    /// Steps go there from RAM, by no disk.
    pub(super) fn is_bucket_only(&self) -> bool {
        self.parts.config.is_bucket_only()
    }

    pub(super) fn is_due_for_bucket(&self, far: &Far, step: u64) -> bool {
        let chosen = step.is_multiple_of(far.settings.every) || self.is_last(step);
        match self.is_bucket_only() {
            true => chosen || self.is_parent(step) || self.is_hurried(step),
            false => (chosen || self.leaves()) && self.is_due(step),
        }
    }

    /// Whether a slot of this rank stays for the bucket's sake.
    pub(super) fn is_kept_for_bucket(&self, key: &CheckpointKey) -> bool {
        let now = locked(&self.sending).now.as_ref().map(|now| now.step);
        self.is_bucket_only() && now.is_some_and(|step| self.key_of(step) == *key)
    }

    /// The leader may choose it, from RAM.
    pub(super) fn may_be_sent(&self, step: u64) -> bool {
        let Some(far) = self.parts.far.as_ref().filter(|_| self.is_bucket_only()) else {
            return false;
        };
        let chosen = locked(&self.sending).chosen;
        self.is_due_for_bucket(far, step) && chosen.is_none_or(|chosen| step > chosen)
    }

    /// Whether all ranks know that a step which the leader may choose will not go there. While another one is
    /// on its way this rank may say so itself: the bucket is slower than the saves.
    pub(super) fn is_passed_for_bucket(&self, step: u64) -> bool {
        let agreements = &self.parts.agreements;
        // Where the clock says when, the leader takes what is newest then.
        let by_clock = self.parts.far.as_ref().is_some_and(|f| f.settings.every_minutes.is_some());
        // While the leader collects there, which may take as long as a request, it chooses nothing.
        let is_busy = {
            let sending = locked(&self.sending);
            sending.now.is_some() || sending.tidies
        };
        let passed = match is_busy || by_clock {
            true => agreements.pass_over(Lane::Bucket, step),
            false => agreements.was_passed_over(Lane::Bucket, step),
        };
        passed.unwrap_or(false)
    }

    /// The newest step that is sealed there, as far as this owner saw.
    pub(crate) fn in_bucket(&self) -> Option<u64> {
        locked(&self.sending).sealed
    }

    /// A step is sealed on disk; without one, it is complete in RAM.
    pub(super) fn offer_to_bucket(&self, step: u64) {
        let Some(far) = &self.parts.far else { return };
        // On disk, where the node is to go away, it would go with it.
        let leaves = !self.is_bucket_only() && self.leaves();
        if !leaves && !self.is_due_for_bucket(far, step) {
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
    pub(crate) fn is_sending(&self) -> bool {
        let Some(far) = &self.parts.far else { return false };
        let (busy, waits) = {
            let sending = locked(&self.sending);
            (sending.now.is_some() || sending.tidies, sending.waits())
        };
        busy || waits.is_some_and(|step| self.is_time(far, step))
    }

    /// A step that waits may be chosen now. What the job stops with is chosen whatever the clock says.
    fn is_time(&self, far: &Far, step: u64) -> bool {
        let (minutes, now) = (far.settings.every_minutes, self.parts.clock.monotonic());
        if minutes.is_none() || self.is_last(step) || self.is_hurried(step) || self.leaves() {
            return true;
        }
        // The others do not know when: they wait for nothing.
        self.parts.config.leads() && locked(&self.sending).is_time(minutes, now)
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
        let watched = self.watch_bucket(far)?;
        Ok(self.settle_older(far)? || watched || chosen || sent)
    }

    /// The leader chooses; the others read what it chose.
    fn choose_for_bucket(&self, far: &Far) -> Result<bool> {
        let (idle, before, offered) = {
            let sending = locked(&self.sending);
            (sending.now.is_none(), sending.chosen, sending.next)
        };
        let newer = |step: &u64| before.is_none_or(|before| *step > before);
        let next = match self.parts.config.leads() {
            true => offered.filter(|step| idle && self.is_time(far, *step)).filter(newer),
            // A newer choice means that the leader is done with the old one, one way or the other.
            false => self.parts.agreements.chosen(Lane::Bucket)?.filter(newer),
        };
        let Some(step) = next else { return Ok(false) };
        if self.parts.config.leads() {
            if !self.parts.agreements.choose(Lane::Bucket, step)? {
                locked(&self.sending).chosen = Some(step); // A rank had no other slot.
                return Ok(true);
            }
            let has = |work: &Work| self.is_parent(step) || work.shards.contains_key(&step);
            if self.is_bucket_only() && self.parts.config.saves() && !has(&locked(&self.work)) {
                let why = "its slot was used again".into();
                self.parts.agreements.in_bucket(step, InRam::GivenUp(why))?;
                locked(&self.sending).chosen = Some(step);
                return Ok(true);
            }
        }
        let deadline = Deadline::after(&*self.parts.clock, far.settings.wait);
        let now = Now::new(step, deadline, self.parts.config.saves());
        let mut sending = locked(&self.sending);
        sending.chosen = Some(step);
        sending.chosen_at = Some(self.parts.clock.monotonic());
        sending.saves.get(&step).iter().for_each(|save| save.set_due_for_object());
        if let Some(old) = sending.now.replace(now) {
            sending.doubtful.insert(old.step);
        }
        Ok(true)
    }

    /// Tells the saves that an older choice has left behind what became of them.
    fn settle_older(&self, far: &Far) -> Result<bool> {
        let older: Vec<(Save, bool, u64)> = {
            let sending = locked(&self.sending);
            let Some(chosen) = sending.chosen else { return Ok(false) };
            let now = sending.now.as_ref().map(|now| now.step);
            let older = sending.saves.range(..=chosen).filter(|(step, _)| Some(**step) != now);
            older.map(|(step, s)| (s.clone(), sending.doubtful.contains(step), chosen)).collect()
        };
        for (save, is_doubtful, chosen) in &older {
            let step = save.step();
            let said = self.parts.agreements.was_in_bucket(step)?;
            let is_there = match said {
                Some(InRam::Whole) => true,
                None if *is_doubtful => Listing::of(&*far.tier, &self.key_of(step))?.sealed,
                Some(InRam::GivenUp(_)) | None => false,
            };
            let is_due = save.is_due_for_object();
            let why = match (said, far.settings.every_minutes) {
                (Some(InRam::GivenUp(why)), _) => format!("it was given up for the bucket: {why}"),
                (_, Some(minutes)) if !is_due => {
                    format!("it is not due for the bucket: one in {minutes} minutes")
                }
                _ => format!("it was passed over for the bucket: step {chosen} is newer"),
            };
            let mut sending = locked(&self.sending);
            sending.saves.remove(&step);
            sending.doubtful.remove(&step);
            drop(sending);
            if is_there {
                locked(&self.sending).has(step);
                save.reach(Level::Object, false);
            } else {
                add(&self.parts.observer.counters.object_passed_over, u64::from(is_due));
                save.fail(Level::Object, &Error::Skipped { step: Step(step), why });
            }
        }
        Ok(!older.is_empty())
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
        let clock = self.parts.clock.monotonic();
        if let Some(now) = locked(&self.sending).now.as_mut().filter(|now| now.step == step) {
            now.not_before = clock + now.pause;
            now.pause = (2 * now.pause).min(AGAIN_MAX);
        }
        self.tell_away(step, "it waits for the bucket, which is tried again", e);
    }

    /// The bucket is away: that is told once.
    fn tell_away(&self, step: u64, what: &str, e: &Error) {
        let why = e.chain();
        if locked(&self.sending).is_away(self.parts.clock.monotonic(), why.clone()) {
            let text = format!("step {step}: {what}: {why}");
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
        let save = locked(&self.sending).saves.get(&key.step.0).cloned();
        let whole = shard.payload();
        let packed = match far.settings.compress {
            true => {
                let payload = Sent { payload: &whole, save: None, cascade: self };
                match pack(&payload, shard.manifest(), shard.manifest_bytes(), &self.room()) {
                    // Without room for it, it goes as it is.
                    Err(e @ Error::Io { .. }) => {
                        tracing::warn!("{key} is not compressed: {}", e.chain());
                        None
                    }
                    packed => packed?,
                }
            }
            false => None,
        };
        let (name, manifest, payload): (_, _, &dyn Payload) = match &packed {
            Some(packed) => (packed.name.clone(), packed.manifest.as_slice(), packed),
            None => (identity.payload_name(), shard.manifest_bytes(), &whole),
        };
        let sent = Sent { payload, save, cascade: self };
        let receipt = far.tier.put(&key.file(&name), &sent)?;
        if self.is_fenced() {
            return Err(Error::Fenced { why: "a newer attempt has begun".into() });
        }
        publish_shard(&*far.tier, identity, manifest, receipt)?;
        let took = self.parts.clock.monotonic().saturating_sub(begun);
        let counters = &self.parts.observer.counters;
        add(&counters.object_bytes, payload.len());
        add(&counters.object_ns, u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        Ok(())
    }

    /// Where a compressed shard lies on its way: on the disk; without one, where this host has temporary
    /// files.
    fn room(&self) -> PathBuf {
        if self.is_bucket_only() { std::env::temp_dir() } else { self.parts.config.home() }
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
                        Err(e) if may_pass(&e) && !late => {
                            let clock = self.parts.clock.monotonic();
                            locked(&self.sending).is_away(clock, e.chain());
                            return Err(e);
                        }
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

    /// What became of the chosen step is known.
    fn ended_in_bucket(&self, far: &Far, step: u64, said: &InRam) {
        let save = {
            let mut sending = locked(&self.sending);
            sending.now.take_if(|now| now.step == step);
            sending.tidies = self.parts.config.leads();
            if *said == InRam::Whole {
                sending.has(step);
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
        let agreements = &self.parts.agreements;
        let tidied = agreements
            .forget_sent_before(step)
            // Without a disk nobody else forgets what was said of RAM.
            .and_then(
                |()| if self.is_bucket_only() { agreements.forget_before(step) } else { Ok(()) },
            )
            .and_then(|()| self.retain_in_bucket(far));
        if let Err(e) = tidied {
            tracing::warn!("nothing was collected in the bucket after step {step}: {}", e.chain());
            if may_pass(&e) {
                self.tell_away(step, "what is older was not collected in the bucket", &e);
            }
        }
        // Whoever closes waits for it: after the last step nobody else would do it.
        locked(&self.sending).tidies = false;
        self.parts.signal.notify();
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
