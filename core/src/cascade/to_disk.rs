//! The part of the cascade that touches the disk: choosing a step, writing this rank's shard of it,
//! sealing, giving up, and what retention lets go.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Mutex,
};

use super::{Carry, Cascade, Shard, Work};
use crate::{
    agree::{Lane, Own},
    attempt::Attempts,
    chunk::{CHUNK_BYTES, chunk_len},
    clock::Deadline,
    commit::{Gathered, Listing, gather, mark_whole, publish_shard},
    error::{Error, Result},
    manifest::replicated::differences_in_words,
    names::{ATTEMPTS, CheckpointKey, Rank, Step, parse_attempt_file, ranks},
    observe::{add, locked},
    restore::{
        decide::lineage_of,
        survey::{Found, survey},
    },
    retain,
    save::{Level, Save},
    tier::{Payload, buffer::AlignedBuf},
};

impl Cascade {
    /// The leader chooses the next step for disk; the others read what it chose.
    pub(super) fn choose(&self) -> Result<bool> {
        let (idle, chosen) = {
            let work = locked(&self.work);
            (work.carry.is_none(), work.chosen)
        };
        let newer = |step: &u64| chosen.is_none_or(|c| *step > c);
        let next = if self.parts.config.leads() {
            let work = locked(&self.work);
            let due = |s: &&Shard| s.complete && self.is_due(s.key.step.0);
            let in_ram = work.shards.values().filter(due).map(|s| s.key.step.0);
            // What was resumed goes to disk also where the leader itself has it there already.
            let parent = self.parts.record.parent.filter(|_| work.parent_waits).map(|p| p.step);
            in_ram.chain(parent).filter(newer).max().filter(|_| idle)
        } else {
            // A newer choice means that the leader is done with the old one, one way or the other.
            self.parts.agreements.chosen(Lane::Disk)?.filter(newer)
        };
        let Some(step) = next else { return Ok(false) };
        self.check_fence()?;
        if self.is_fenced() {
            return Ok(false);
        }
        if self.parts.config.leads() && !self.parts.agreements.choose(Lane::Disk, step)? {
            self.passed_by_another(step);
            return Ok(true);
        }
        let mut work = locked(&self.work);
        if self.parts.config.leads() && !self.is_parent(step) && !work.shards.contains_key(&step) {
            // Its slot was used again at this moment: a newer step is complete. Nobody else knows the
            // step to be chosen, or all give it up.
            drop(work);
            self.parts.agreements.give_up(step, "its slot was used again")?;
            return Ok(true);
        }
        // The leader chooses what is complete; a follower may not have seen it yet.
        self.completed(&mut work, step);
        let old = work.carry.take();
        work.chosen = Some(step);
        let deadline = Deadline::after(&*self.parts.clock, self.parts.config.disk_wait);
        work.carry = Some(Carry { step, deadline, own_done: false, told: false });
        let passed: Vec<Shard> = work
            .shards
            .values()
            .filter(|s| s.key.step.0 < step && old.as_ref().is_none_or(|o| o.step != s.key.step.0))
            .filter(|s| newer(&s.key.step.0))
            .cloned()
            .collect();
        drop(work);
        if let Some(old) = old {
            let key = self.key_of(old.step);
            if self.is_sealed(&key)? {
                self.sealed_on_disk(old.step, &key)?;
            } else {
                self.fail_step(old.step, "the leader went on to a newer step");
            }
        }
        for shard in passed {
            self.pass_over(&shard.save, step);
        }
        Ok(true)
    }

    /// A step that was given up may be chosen once more, where the leader says so.
    pub(super) fn carry_again(&self) -> Result<bool> {
        let Some(step) = locked(&self.work).again else { return Ok(false) };
        let agreements = &self.parts.agreements;
        if self.parts.config.leads() {
            agreements.try_again(step)?;
        } else if agreements.gave_up(step)?.is_some() {
            return Ok(false); // Its leader may be asked later, or never: on a host that stays.
        }
        let mut work = locked(&self.work);
        work.again = None;
        work.given_up.remove(&step);
        if work.chosen == Some(step) {
            work.chosen = step.checked_sub(1);
        }
        Ok(true)
    }

    /// Looks for steps that wait here to be chosen and whose slot another rank has used again.
    pub(super) fn watch_passed(&self) -> Result<bool> {
        let waiting: Vec<u64> = {
            let work = locked(&self.work);
            let newest = work.newest.as_ref().map_or(0, |k| k.step.0);
            let complete = work.shards.values().filter(|s| s.complete).map(|s| s.key.step.0);
            complete.filter(|s| *s < newest && self.may_be_chosen(&work, *s)).collect()
        };
        let mut moved = false;
        for step in waiting {
            if self.parts.agreements.was_passed_over(Lane::Disk, step)? {
                self.passed_by_another(step);
                moved = true;
            }
        }
        Ok(moved)
    }

    fn passed_by_another(&self, step: u64) {
        let mut work = locked(&self.work);
        if self.is_parent(step) {
            work.parent_waits = false;
        }
        let newest = work.newest.as_ref().map_or(0, |k| k.step.0);
        if let Some(shard) = work.shards.remove(&step) {
            self.pass_over(&shard.save, newest);
        }
        drop(work);
        self.parts.signal.notify();
    }

    pub(super) fn pass_over(&self, save: &Save, for_step: u64) {
        // It is there, or what became of it was told; so without a disk.
        if self.is_bucket_only() || !save.is_pending(Level::Disk) {
            return;
        }
        let why = if self.is_due(save.step()) {
            add(&self.parts.observer.counters.disk_passed_over, 1);
            format!(
                "it was passed over for disk: the disk is slower than the saves, step {for_step} is newer"
            )
        } else {
            format!("it is not due for disk: every {} steps", self.parts.config.disk_every)
        };
        save.fail(Level::Disk, &Error::Skipped { step: Step(save.step()), why });
    }

    /// A newer attempt began: nothing of this one may be completed any more.
    pub(super) fn check_fence(&self) -> Result<()> {
        // Names first: this is asked often, and almost always there is nothing new.
        let names = self.parts.disk.list(ATTEMPTS)?;
        let numbers = names.iter().filter_map(|e| parse_attempt_file(&e.name));
        if numbers.max().is_none_or(|n| n <= self.parts.record.attempt.number) {
            return Ok(());
        }
        let attempts = Attempts::load(&[&*self.parts.disk, &*self.parts.ram])?;
        let own = self.parts.record.attempt;
        let Some(newer) = attempts.newest().filter(|r| r.attempt.number > own.number) else {
            return Ok(());
        };
        let (number, by_us) = (newer.attempt.number, newer.attempt.id == own.id);
        let error = Error::Fenced {
            why: format!("attempt {number} of this run has begun: {own} writes no more"),
        };
        let mut work = locked(&self.work);
        work.fenced = true;
        work.fenced_by_us = by_us;
        work.carry = None;
        work.saves().for_each(|save| save.fail(Level::Ram, &error));
        self.end_sending(Some(&error));
        if !by_us {
            self.parts.observer.error("fenced", None, error.to_string());
        }
        Ok(())
    }

    /// Writes this rank's shard of the chosen step.
    pub(super) fn carry(&self) -> Result<bool> {
        let (step, shard) = {
            let work = locked(&self.work);
            let Some(carry) = work.carry.as_ref().filter(|c| !c.own_done) else { return Ok(false) };
            if self.is_parent(carry.step) && self.is_being_read(&work) {
                return Ok(false);
            }
            (carry.step, work.shards.get(&carry.step).cloned())
        };
        let done = match &shard {
            None => self.have_on_disk(step),
            Some(shard) => self.write(shard),
        };
        match done {
            Ok(()) => {
                if let Some(carry) = locked(&self.work).carry.as_mut().filter(|c| c.step == step) {
                    carry.own_done = true;
                }
            }
            // The next owner writes it anew.
            Err(_) if self.is_handed_over() => return Ok(false),
            Err(e) => {
                let why = format!("{}: {}", Rank(self.parts.config.rank), e.chain());
                // Told to the others if it can be; without, the leader's deadline does it.
                let _ = self.parts.agreements.give_up(step, &why);
                if matches!(e, Error::Fenced { .. }) && self.has_ended() {
                    self.leave_in_ram(step, &why);
                } else {
                    self.abandon(step, &why);
                }
            }
        }
        Ok(true)
    }

    pub(super) fn is_handed_over(&self) -> bool {
        locked(&self.work).handed_over
    }

    /// Somebody closed, or began anew, who did not want to wait: nothing failed.
    fn has_ended(&self) -> bool {
        let work = locked(&self.work);
        work.stop || work.fenced_by_us
    }

    fn leave_in_ram(&self, step: u64, why: &str) {
        let mut work = locked(&self.work);
        work.carry.take_if(|c| c.step == step);
        let shard = work.shards.get(&step).cloned();
        drop(work);
        let text = format!("step {step} is in RAM only: {why}");
        self.parts.observer.warn("in_ram_only", Some(step), text);
        if let Some(shard) = shard {
            let why = why.to_owned();
            shard.save.fail(Level::Disk, &Error::Skipped { step: Step(step), why });
        }
        self.parts.signal.notify();
    }

    /// A step that this rank restored from disk, or wrote before its owner died, needs no slot: its
    /// shard is there.
    pub(super) fn have_on_disk(&self, step: u64) -> Result<()> {
        let listing = Listing::of(&*self.parts.disk, &self.key_of(step))?;
        if listing.manifests.contains(&Rank(self.parts.config.rank)) {
            return Ok(());
        }
        Err(Error::Skipped { step: Step(step), why: "this rank has no shard of it".into() })
    }

    pub(super) fn write(&self, shard: &Shard) -> Result<()> {
        let disk = &*self.parts.disk;
        let rank = Rank(shard.identity.rank);
        let listing = Listing::of(disk, &shard.key)?;
        if !listing.manifests.contains(&rank) {
            retain::drop_shard(disk, &shard.key, rank)?;
            let begun = self.parts.clock.monotonic();
            let name = shard.key.file(&shard.identity.payload_name());
            let receipt =
                disk.put(&name, &Counted { shard, cascade: self, begun: Mutex::default() })?;
            self.check_fence()?;
            if self.is_fenced() {
                return Err(Error::Fenced { why: "a newer attempt has begun".into() });
            }
            publish_shard(disk, &shard.identity, &shard.manifest, receipt)?;
            let took = self.parts.clock.monotonic().saturating_sub(begun);
            let counters = &self.parts.observer.counters;
            add(&counters.disk_bytes, shard.payload.len);
            add(&counters.disk_ns, u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        }
        shard.save.reach(Level::Disk, true);
        Ok(())
    }

    /// Seals the step if every rank is done, or sees that it was sealed or given up.
    pub(super) fn watch_disk(&self) -> Result<bool> {
        let (step, done, deadline) = {
            let work = locked(&self.work);
            let Some(carry) = &work.carry else { return Ok(false) };
            (carry.step, carry.own_done, carry.deadline)
        };
        if let Some(why) = self.parts.agreements.gave_up(step)? {
            self.abandon(step, &why);
            return Ok(true);
        }
        if !done {
            return Ok(false);
        }
        let key = self.key_of(step);
        let disk = &*self.parts.disk;
        if self.parts.agreements.is_spread() {
            return self.watch_spread(step, &key, &deadline);
        }
        if self.is_sealed(&key)? {
            return self.sealed_on_disk(step, &key).map(|()| true);
        }
        match gather(disk, &key, &self.parts.config.savers)? {
            Gathered::Complete(complete) => {
                self.check_fence()?;
                if self.is_fenced() {
                    return Ok(true);
                }
                complete.seal(disk)?;
                self.sealed_on_disk(step, &key)?;
                Ok(true)
            }
            Gathered::Differ(list) => {
                let why = differences_in_words(&list);
                self.parts.agreements.give_up(step, &why)?;
                self.abandon(step, &why);
                Ok(true)
            }
            Gathered::Deleted => {
                self.abandon(step, "it is being deleted");
                Ok(true)
            }
            Gathered::Missing(missing) => {
                let who = ranks(&missing);
                if let Some(shard) = locked(&self.work).shards.get(&step) {
                    shard.save.set_waiting_for(who.clone());
                }
                if deadline.left(&*self.parts.clock).is_some() {
                    return Ok(false);
                }
                let why = format!("{who} did not write its shard in time");
                self.parts.agreements.give_up(step, &why)?;
                self.abandon(step, &why);
                Ok(true)
            }
        }
    }

    /// The same where each node has a disk of its own: every rank says that its shard is there, the leader
    /// says when all are.
    fn watch_spread(&self, step: u64, key: &CheckpointKey, deadline: &Deadline) -> Result<bool> {
        let (agreements, config) = (&self.parts.agreements, &self.parts.config);
        let told = locked(&self.work).carry.as_ref().is_some_and(|carry| carry.told);
        if !told {
            // Once: this is looked at many times a second.
            agreements.say_own(step, config.rank, Own::OnDisk)?;
            if let Some(carry) = locked(&self.work).carry.as_mut().filter(|c| c.step == step) {
                carry.told = true;
            }
        }
        // What the leader resumed from may be whole on its own disk, and not on that of a node which came
        // in the place of another: its word is for all of them.
        let sealed = match config.leads() {
            true => agreements.was_sealed(step)?,
            false => self.is_sealed(key)?,
        };
        if sealed {
            return self.sealed_on_disk(step, key).map(|()| true);
        }
        if !config.leads() {
            return Ok(false);
        }
        let missing = agreements.without_own(step, Own::OnDisk, &config.savers)?;
        if missing.is_empty() {
            self.check_fence()?;
            if !self.is_fenced() {
                agreements.seal(step)?;
                self.sealed_on_disk(step, key)?;
            }
            return Ok(true);
        }
        if let Some(shard) = locked(&self.work).shards.get(&step) {
            shard.save.set_waiting_for(ranks(&missing));
        }
        if deadline.left(&*self.parts.clock).is_some() {
            return Ok(false);
        }
        let why = format!("{} did not write its shard in time", ranks(&missing));
        agreements.give_up(step, &why)?;
        self.abandon(step, &why);
        Ok(true)
    }

    /// Whether the checkpoint exists on disk, whichever rank sealed it: what that rank has not synced
    /// yet is synced here, before anybody is told.
    pub(super) fn is_sealed(&self, key: &CheckpointKey) -> Result<bool> {
        let disk = &*self.parts.disk;
        if !Listing::of(disk, key)?.sealed {
            return Ok(self.parts.agreements.is_spread()
                && self.key_of(key.step.0) == *key
                && self.parts.agreements.was_sealed(key.step.0)?);
        }
        disk.confirm(&key.dir())?;
        Ok(true)
    }

    pub(super) fn key_of(&self, step: u64) -> CheckpointKey {
        match self.parts.record.parent.filter(|p| p.step == step) {
            Some(parent) => parent.key(),
            None => CheckpointKey::new(Step(step), &self.parts.record.attempt),
        }
    }

    pub(super) fn sealed_on_disk(&self, step: u64, key: &CheckpointKey) -> Result<()> {
        if self.parts.agreements.is_spread() && self.parts.config.saves() {
            // Said beside this node's shards: retention counts what all nodes have.
            mark_whole(&*self.parts.disk, key)?;
        }
        let before = {
            let mut work = locked(&self.work);
            if let Some(shard) = work.shards.get(&step) {
                shard.save.set_waiting_for(String::new());
                shard.save.reach(Level::Disk, false);
            }
            work.carry.take_if(|c| c.step == step);
            let before = work.sealed.replace(step);
            work.failed = work.failed.split_off(&step);
            let newest = work.newest.as_ref().map_or(0, |k| k.step.0);
            let old = Self::forget_old(&mut work);
            drop(work);
            old.iter().for_each(|shard| self.drop_shard(shard, newest));
            before.filter(|before| *before < step)
        };
        add(&self.parts.observer.counters.disk_sealed, 1);
        tracing::info!("{key} is sealed on disk");
        self.offer_to_bucket(step);
        self.parts.signal.notify();
        if self.parts.config.leads() {
            // One seal late: a rank that wrote its shard of this step may not have looked yet for
            // what became of those before it. Of the step before, all have.
            if let Some(before) = before {
                self.parts.agreements.forget_before(before)?;
            }
            self.retain()?;
            self.clear_strangers();
        } else if self.parts.agreements.is_spread() {
            self.retain()?; // Of this node's disk.
        }
        Ok(())
    }

    /// Shards whose slots were taken meanwhile are of no more use here.
    fn forget_old(work: &mut Work) -> Vec<Shard> {
        let newest = work.newest.as_ref().map_or(0, |k| k.step.0);
        // One that is on its way to other nodes is waited for there.
        let copied = work.copies.now.as_ref().map_or(u64::MAX, |now| now.step);
        let oldest = newest.min(work.chosen.unwrap_or(0)).min(copied);
        let kept = work.shards.split_off(&oldest);
        std::mem::replace(&mut work.shards, kept).into_values().collect()
    }

    pub(super) fn abandon(&self, step: u64, why: &str) {
        self.fail_step(step, why);
        let mut work = locked(&self.work);
        work.carry.take_if(|c| c.step == step);
        work.given_up.insert(step);
        drop(work);
        self.parts.signal.notify();
        // Its remains fill the disk that the next step needs.
        let collects = self.parts.config.leads() || self.parts.agreements.is_spread();
        if collects && let Err(e) = self.retain() {
            tracing::warn!("nothing was collected after step {step} was given up: {}", e.chain());
        }
    }

    pub(super) fn fail_step(&self, step: u64, why: &str) {
        let shard = locked(&self.work).shards.get(&step).cloned();
        let error =
            Error::Skipped { step: Step(step), why: format!("it was given up for disk: {why}") };
        self.parts.observer.error("disk_failed", Some(step), error.to_string());
        add(&self.parts.observer.counters.saves_failed, 1);
        if let Some(shard) = shard {
            shard.save.fail(Level::Disk, &error);
        }
    }

    /// Marks what was sealed while this node's agent was away. The leader forgets a seal one seal late.
    fn hear_of_seals(&self, found: &[Found]) -> Result<bool> {
        let mut heard = false;
        let unmarked =
            |f: &&Found| self.parts.agreements.is_spread() && !f.sealed() && !f.deleted();
        for key in found.iter().filter(unmarked).map(|f| &f.key) {
            if self.is_sealed(key)? {
                mark_whole(&*self.parts.disk, key)?;
                heard = true;
            }
        }
        Ok(heard)
    }

    /// Deletes what the policy lets go.
    pub(super) fn retain(&self) -> Result<()> {
        let disk = &*self.parts.disk;
        let mut found = survey(&[disk])?;
        let attempts = Attempts::load(&[disk, &*self.parts.ram])?;
        let newest = attempts.newest().map_or(0, |r| r.attempt.number);
        if newest != self.parts.record.attempt.number {
            return Ok(()); // Superseded: its leader collects.
        }
        if self.hear_of_seals(&found)? {
            found = survey(&[disk])?;
        }
        let lineage = lineage_of(&[disk], &found, &attempts)?;
        let in_flight: BTreeSet<CheckpointKey> = {
            let work = locked(&self.work);
            let carried = work.carry.iter().map(|c| self.key_of(c.step));
            carried.chain(self.kept_for_bucket()).collect()
        };
        let policy = retain::Policy {
            keep_last: self.parts.config.keep_last,
            every: self.parts.config.disk_every,
            keep_every: self.parts.config.keep_every,
            keep_hours: None,
            abandoned: false,
        };
        let given_up: BTreeSet<CheckpointKey> = {
            let steps = &locked(&self.work).given_up;
            // What was resumed may be nowhere else.
            let own = steps.iter().filter(|s| !self.is_parent(**s));
            own.map(|s| self.key_of(*s)).collect()
        };
        let pins = retain::pins(disk)?;
        let known = retain::Known {
            saved: &retain::Saved::new(),
            found: &found,
            lineage: &lineage,
            attempts: &attempts,
            pins: &pins,
            in_flight: &in_flight,
            given_up: &given_up,
        };
        let victims = retain::plan(&policy, &known);
        retain::collect(disk, &victims, newest, retain::Grace::default()).map(drop)
    }
}

/// The shard's payload on its way: its bytes are counted for the progress bar, those of a copy that
/// another process took are checked, and a cascade that was stopped hands out no more.
struct Counted<'a> {
    shard: &'a Shard,
    cascade: &'a Cascade,
    /// Chunks of which a part was handed out: their checksums so far.
    begun: Mutex<HashMap<u64, crc32fast::Hasher>>,
}

impl Payload for Counted<'_> {
    fn len(&self) -> u64 {
        self.shard.payload.len()
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
        let block = self.shard.payload.block(offset, len, scratch)?;
        let there = (len as u64).min(self.len().saturating_sub(offset));
        if let Some(chunks) = &self.shard.chunks {
            let bytes = &block[..usize::try_from(there).unwrap_or(0)];
            self.check(chunks, offset, bytes)?;
        }
        self.shard.save.add_disk_bytes(there);
        Ok(block)
    }

    fn block_bytes(&self) -> u64 {
        self.shard.payload.block_bytes()
    }
}

impl Counted<'_> {
    /// Blocks of a chunk come in order. Its last one is handed out only if the whole is what it was.
    fn check(&self, chunks: &[u32], offset: u64, bytes: &[u8]) -> Result<()> {
        let chunk = offset / CHUNK_BYTES;
        let index = usize::try_from(chunk).unwrap_or(usize::MAX);
        let end = chunk * CHUNK_BYTES + chunk_len(self.len(), CHUNK_BYTES, index);
        let begun = locked(&self.begun).remove(&chunk);
        let mut hasher = match begun {
            // Perhaps for the second time: a write that failed is tried again.
            _ if offset.is_multiple_of(CHUNK_BYTES) => crc32fast::Hasher::new(),
            Some(hasher) => hasher,
            None => return Err(Error::Bug(format!("block {offset} of a chunk comes first"))),
        };
        hasher.update(bytes);
        if offset + (bytes.len() as u64) < end {
            locked(&self.begun).insert(chunk, hasher);
            return Ok(());
        }
        match chunks.get(index) {
            Some(crc) if hasher.finalize() == *crc => Ok(()),
            _ => {
                Err(Error::damaged(format!("{} in RAM", self.shard.key), format!("chunk {chunk}")))
            }
        }
    }
}
