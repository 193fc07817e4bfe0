//! What a trainer asks, answered.
//!
//! # Invariants
//!
//! - Whatever a trainer says about lengths, slots and names is checked before it is acted on.
//! - A question that is asked again, because its answer was lost, has the same effect once.

use std::{collections::BTreeSet, os::fd::OwnedFd, sync::Arc, time::Duration};

use tierkeep_proto::trainer::{self as wire, reply::Answer, request::Call};

use super::{
    connection::Connection,
    others,
    seat::{InHand, Seat},
};
use crate::{
    attempt::AttemptRecord,
    begin::{fetched::with_remotes, found::with_bucket},
    cascade::Cascade,
    chunk::{CHUNK_BYTES, chunk_count},
    clock::{Clock, Deadline},
    error::{Doing, Error, Result},
    keeper::Ending,
    manifest::{Identity, replicated::TOO_MUCH},
    names::{CheckpointKey, Rank, Step},
    observe::add,
    owner::Filled,
    passing::FDS_MAX,
    reader::Reader,
    save::Save,
    snapshot::{Described, slot::Slot},
    tier::{Tier, TierKind, disk::DiskTier},
    wire::convert,
};

pub(super) type Answered = Result<(Answer, Vec<OwnedFd>)>;

/// How long a trainer's question for slots waits for one to be ready.
const SLOTS_WAIT: Duration = Duration::from_secs(30);

/// How long one that was asked before may be at work: less than its trainer waits.
const PUBLISH_WAIT: Duration = Duration::from_secs(45);

/// How the save is, without what failed: that comes with the events that say why, or a trainer
/// that waits would find out before it can be told.
fn published(save: Option<&Save>) -> Answered {
    let published = wire::Published { save: save.map(Save::reached) };
    Ok((Answer::Published(published), Vec::new()))
}

fn done() -> Answered {
    Ok((Answer::Done(wire::Done {}), Vec::new()))
}

impl Connection {
    pub(super) fn call(self: &Arc<Self>, id: u64, call: Call) -> Answered {
        match call {
            Call::Hello(_) => Err(Error::invalid("it has greeted already")),
            Call::Interrupt(_) => done(), // Heard as it came.
            Call::Open(open) => self.open(&open),
            other => {
                let seat = self.seat().ok_or_else(|| Error::invalid("no rank is opened"))?;
                self.call_on(&seat, id, other)
            }
        }
    }

    fn call_on(self: &Arc<Self>, seat: &Arc<Seat>, id: u64, call: Call) -> Answered {
        let keeper = &seat.keeper;
        match call {
            Call::Begin(how) => self.begin(seat, &how),
            Call::Prepare(prepare) => keeper.prepare(prepare.bytes).and_then(|()| done()),
            Call::Slots(_) => self.slots(seat),
            Call::Lease(lease) => self.lease(seat, id, &lease),
            Call::Publish(publish) => self.publish(seat, publish),
            Call::Abandon(abandon) => {
                drop(seat.take_back(self.id, abandon.slot));
                done()
            }
            Call::Follow(follow) => {
                let (_, cascade) = running(seat)?;
                cascade.follow(&seat.follow_save(follow.step));
                done()
            }
            Call::Stop(stop) => {
                let step = running(seat)?.1.agreements().stop(stop.wish)?;
                Ok((Answer::Stopping(wire::Stopping { step }), Vec::new()))
            }
            Call::StopAfter(stop) => {
                running(seat)?.1.stop_after(stop.step);
                done()
            }
            Call::GiveUp(give_up) => {
                running(seat)?.1.give_up_steps(&give_up.steps);
                done()
            }
            Call::Init(init) => {
                let text = running(seat)?.1.agreements().init(&init.wish)?;
                Ok((Answer::Text(wire::Text { text }), Vec::new()))
            }
            Call::Restored(_) => {
                running(seat)?.1.was_read();
                done()
            }
            Call::Shards(shards) => others::shards(seat, &running(seat)?.0, &shards.ranks),
            Call::Read(read) if convert::tier_kind(read.tier)? == TierKind::Peer => {
                others::read(seat, &running(seat)?.0, &read.name)
            }
            Call::List(list) => {
                let entries = tier(seat, list.tier)?.list(&list.dir)?.into_iter();
                let entry = |e: crate::tier::Entry| wire::Entry { name: e.name, is_dir: e.is_dir };
                let entries = entries.map(entry).collect();
                Ok((Answer::Entries(wire::Entries { entries }), Vec::new()))
            }
            Call::Read(read) => {
                let source = tier(seat, read.tier)?.open(&read.name)?;
                let file = source.file().ok_or_else(|| Error::Bug("a file without one".into()))?;
                let fd = file.try_clone().doing(|| format!("hand out {}", read.name))?;
                Ok((Answer::Found(wire::Found { len: source.len() }), vec![fd.into()]))
            }
            Call::Mend(mend) => mend_shard(seat, &mend),
            Call::Pin(pin) => {
                Reader::of(keeper.tiers()).pin(Step(pin.step), None, pin.pinned)?;
                done()
            }
            Call::Close(close) => self.close(seat, &close),
            Call::Hello(_) | Call::Open(_) | Call::Interrupt(_) => {
                Err(Error::Bug("a question in the wrong place".into()))
            }
        }
    }

    fn open(self: &Arc<Self>, open: &wire::Open) -> Answered {
        if self.seat().is_some() {
            return Err(Error::invalid("it has a rank already"));
        }
        let host = &self.host;
        let open = &self.own(open)?;
        let config = convert::config(open, host.users.root_of(self.peer.who.uid))?;
        let (start, nonce) = (convert::id(&open.start)?, convert::id(&open.nonce)?);
        let chair = host.chair(&config);
        let mut taken = chair.lock();
        if self.is_over() {
            // Its trainer has lost patience, and perhaps the rank by another connection by now.
            return Err(Error::Fenced { why: "its trainer has hung up".into() });
        }
        if let Some(other) = taken.as_ref().filter(|seat| seat.who.uid != self.peer.who.uid) {
            // Whoever may not enter the directory learns nothing of it.
            DiskTier::open(&config.home())?;
            return Err(Error::Fenced {
                why: format!("{} is kept for user {}", other.name(), other.who.uid),
            });
        }
        let there = taken.as_ref().filter(|seat| seat.keeper.place.nonce == nonce).cloned();
        let seat = match (there, &open.back) {
            (Some(seat), Some(_)) => seat,
            _ => {
                if let Some(old) = taken.take() {
                    if let Err(e) = host.wait_for_death(&old, &self.peer, config.lock_wait) {
                        *taken = Some(old);
                        return Err(e);
                    }
                    // Should nobody begin, the attempt before goes on (`Host::care_for`).
                    old.end(Ending::HandOver);
                }
                let keeper = host.keeper(config, &self.peer.who, start, nonce)?;
                let seat = Arc::new(Seat::new(keeper, open, self.id, self.peer.clone()));
                if let Some(back) = open.back.as_ref().filter(|back| !back.record.is_empty()) {
                    seat.keeper.go_on(&convert::record_of(&back.record)?, back.decisions)?;
                    self.remember(&seat);
                }
                *taken = Some(seat.clone());
                seat
            }
        };
        let lost = match &open.back {
            Some(back) => come_back(&seat, self, back)?,
            None => Vec::new(),
        };
        if host.is_ending() || self.is_over() {
            return Err(Error::Fenced { why: "the agent is ending".into() });
        }
        drop(taken);
        self.sit_down(seat.clone());
        let place = &seat.keeper.place;
        let opened = wire::Opened {
            ram_dir: os_bytes(&place.config.ram_dir()),
            ram_address: place.ram.address(),
            disk_address: place.disk.address(),
            busy: is_busy(&seat),
            lost,
        };
        Ok((Answer::Opened(opened), Vec::new()))
    }

    /// What is asked for, with the places where it really is.
    fn own(&self, open: &wire::Open) -> Result<wire::Open> {
        let settings = self.host.settings();
        let Some(tenancy) = &settings.tenancy else { return Ok(open.clone()) };
        let tenant = self.tenant.get().ok_or_else(|| Error::Bug("nobody's trainer".into()))?;
        tenancy.own(tenant, &settings.buckets, open)
    }

    /// Says beside the slots whose they are. Without it, only a trainer that comes back is known to the
    /// next agent: no reason to refuse one.
    fn remember(&self, seat: &Seat) {
        if let Err(e) = seat.remember(&self.peer) {
            tracing::warn!("{}: {}", seat.name(), e.chain());
        }
    }

    fn begin(&self, seat: &Seat, how: &wire::Begin) -> Answered {
        let quiet = || Ok(()); // The trainer was, before it asked.
        let found =
            seat.keeper.begin(&convert::how_to_begin(how), &quiet, &|| seat.forget_saves())?;
        let (record, _) = running(seat)?;
        // Not before: until it has begun, the slots are the attempt's before it.
        self.remember(seat);
        let begun = wire::Begun {
            record: convert::record_bytes(&record)?,
            shard: found.as_ref().map(convert::shard),
            busy: is_busy(seat),
            decisions: seat.keeper.decisions(),
        };
        seat.set_shard(found);
        Ok((Answer::Begun(begun), Vec::new()))
    }

    /// Slots that the trainer has not mapped, so that it can before the first save.
    fn slots(&self, seat: &Seat) -> Answered {
        let place = &seat.keeper.place;
        let deadline = Deadline::after(&self.host.clock, SLOTS_WAIT);
        loop {
            let seen = place.signal.seen();
            // Asked before the slots: what is made in between is found.
            let more = seat.keeper.is_preparing();
            let slots = seat.unmapped(FDS_MAX);
            if slots.is_empty()
                && more
                && !self.is_over()
                && let Some(left) = deadline.left(&self.host.clock)
            {
                place.signal.wait(seen, left.min(Duration::from_millis(50)));
                continue;
            }
            let more = more || slots.len() == FDS_MAX;
            let fds = slots.iter().map(|slot| descriptor(slot)).collect::<Result<_>>()?;
            let slots = slots.iter().map(|slot| slot.inode()).collect();
            return Ok((Answer::Mapped(wire::Mapped { slots, more }), fds));
        }
    }

    fn lease(&self, seat: &Seat, id: u64, lease: &wire::Lease) -> Answered {
        let since = self.host.clock.monotonic();
        let (_, cascade) = running(seat)?;
        // Also by a begin of its own that came to nothing: nothing would carry it.
        seat.keeper.check_open(false)?;
        if lease.bytes == 0 {
            return Err(Error::invalid("a payload of no bytes"));
        }
        let save = seat.follow_save(lease.step);
        cascade.mark_due(&save);
        let interrupted = || self.is_interrupted(id);
        let (bytes, skip) = (lease.bytes, lease.skip_if_busy);
        let filling = seat.keeper.lease(&save, bytes, skip, Some(&interrupted), &cascade)?;
        let Some(filling) = filling else {
            let skipped = save.progress().skipped.unwrap_or_default();
            return Ok((Answer::Leased(wire::Leased { slot: 0, skipped }), Vec::new()));
        };
        let slot = filling.slot().clone();
        let fd = descriptor(&slot)?; // Before it is the trainer's: without one it is not.
        let mapped = seat.hand_out(self.id, InHand { filling, cascade, save, since })?;
        let fds = if mapped { Vec::new() } else { vec![fd] };
        let leased = wire::Leased { slot: slot.inode(), skipped: String::new() };
        Ok((Answer::Leased(leased), fds))
    }

    fn publish(&self, seat: &Seat, publish: wire::Publish) -> Answered {
        let (slot, step) = (publish.slot, publish.step);
        let (record, _) = running(seat)?;
        let Some(in_hand) = seat.take_filled(slot, step) else {
            self.wait_for_publish(seat, slot);
            let key = CheckpointKey::new(Step(step), &record.attempt);
            if seat.keeper.place.arena.has(slot, &key) {
                // The answer was lost, perhaps with the agent that gave it.
                let save = seat.save(step).unwrap_or_else(|| seat.follow_save(step));
                seat.keeper.take_up(&save, &running(seat)?.1)?;
                return published(Some(&save));
            }
            // No mistake of the caller's: its save fails, its training goes on.
            let what = format!("slot {slot}, which is not being filled with step {step},");
            return Err(Error::NotFound { what });
        };
        let published = self.publish_filled(seat, &record, in_hand, publish);
        seat.is_published(slot);
        published
    }

    /// The same question, asked through a connection that is gone, may be at work.
    fn wait_for_publish(&self, seat: &Seat, slot: u64) {
        let deadline = Deadline::after(&self.host.clock, PUBLISH_WAIT);
        let signal = &seat.keeper.place.signal;
        loop {
            let seen = signal.seen();
            if !seat.is_publishing(slot) || self.is_over() {
                return;
            }
            let Some(left) = deadline.left(&self.host.clock) else { return };
            signal.wait(seen, left.min(Duration::from_millis(50)));
        }
    }

    fn publish_filled(
        &self,
        seat: &Seat,
        record: &AttemptRecord,
        in_hand: InHand,
        publish: wire::Publish,
    ) -> Answered {
        let wire::Publish { step, bytes, chunks, manifest, words, .. } = publish;
        let InHand { filling, cascade, save, since } = in_hand;
        let file = filling.slot();
        if bytes > file.capacity() as u64 || chunks.len() as u64 != chunk_count(bytes, CHUNK_BYTES)
        {
            return Err(Error::invalid(format!(
                "step {step}: {bytes} bytes and {} checksums for a slot of {}",
                chunks.len(),
                file.capacity()
            )));
        }
        if file.file_len()? != bytes {
            return Err(Error::damaged(
                format!("the slot of step {step}"),
                "its length was changed",
            ));
        }
        let config = &seat.keeper.place.config;
        // Whoever publishes another attempt's shard is told by its name: the record is the cascade's.
        let identity = Identity {
            run_id: record.run_id,
            attempt: cascade.attempt(),
            writer: seat.keeper.place.nonce,
            step,
            rank: config.rank,
            savers: config.savers.clone(),
        };
        let words = words.unwrap_or_else(|| TOO_MUCH.into());
        let described = Described { manifest, chunks, words };
        let filled = Filled { identity, len: bytes, described, save: save.clone() };
        seat.keeper.publish(filling, filled, &cascade)?;
        let took = self.host.clock.monotonic().saturating_sub(since);
        let counters = &seat.keeper.place.observer.counters;
        add(&counters.stall_ns, u64::try_from(took.as_nanos()).unwrap_or(0));
        published(Some(&save))
    }

    fn close(&self, seat: &Arc<Seat>, close: &wire::Close) -> Answered {
        let config = seat.keeper.place.config.clone();
        seat.died(&self.host.clock);
        seat.say_bye();
        // What is in RAM alone stays somebody's: in time it goes to disk, and then the memory goes back.
        // So does a leader's seat while ranks on other nodes still ask it.
        let is_over = seat.is_durable() && !seat.is_sending() && !seat.is_asked();
        if close.clean && seat.has_begun() && is_over {
            let chair = self.host.chair(&config);
            let mut taken = chair.lock();
            if taken.as_ref().is_some_and(|there| Arc::ptr_eq(there, seat)) {
                seat.end(Ending::Clean);
                *taken = None;
            }
            drop(taken);
            self.host.forget(&(crate::config::real(&config.destination), config.rank), &chair);
        }
        self.host.changed.notify();
        done()
    }
}

fn running(seat: &Seat) -> Result<(AttemptRecord, Arc<Cascade>)> {
    seat.keeper.check_open(true)?;
    seat.keeper.running().ok_or_else(|| Error::invalid("no attempt has begun"))
}

pub(super) fn is_busy(seat: &Seat) -> bool {
    seat.keeper.running().is_some_and(|(_, cascade)| cascade.is_busy())
}

fn tier(seat: &Seat, said: i32) -> Result<Arc<dyn Tier>> {
    let kind = convert::tier_kind(said)?;
    let tier = seat.keeper.tiers().into_iter().find(|tier| tier.kind() == kind);
    tier.ok_or_else(|| Error::Bug(format!("no {kind} tier")))
}

fn descriptor(slot: &Slot) -> Result<OwnedFd> {
    Ok(slot.file().try_clone().doing(|| "hand out a slot".into())?.into())
}

fn os_bytes(path: &std::path::Path) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    path.as_os_str().as_bytes().to_vec()
}

/// A trainer that was connected before goes on here; the slots it was filling that are no more.
fn come_back(seat: &Arc<Seat>, connection: &Connection, back: &wire::Back) -> Result<Vec<u64>> {
    seat.come_back(connection.id, connection.peer.clone(), back)?;
    if !back.record.is_empty() {
        seat.keeper.set_decisions(back.decisions);
    }
    let lost = seat.take_in_hand(&back.filling);
    let Some((_, cascade)) = seat.keeper.running() else { return Ok(lost) };
    if let Some(step) = back.stop_after {
        cascade.stop_after(step);
    }
    cascade.give_up_steps(&back.failed);
    for step in &back.saves {
        // Also one that is known: the try before this one may have failed in the middle.
        let save = seat.save(*step).unwrap_or_else(|| seat.follow_save(*step));
        seat.keeper.take_up(&save, &cascade)?;
    }
    Ok(lost)
}

/// What the trainer found damaged is mended from what is good; it says where, the bytes are ours.
fn mend_shard(seat: &Seat, mend: &wire::Mend) -> Answered {
    let shard = seat.shard().ok_or_else(|| Error::invalid("nothing was restored"))?;
    let rank = Rank(mend.rank);
    let all = std::iter::once(&shard).chain(&shard.others);
    let found = all.into_iter().find(|shard| shard.rank == rank);
    let found = found.ok_or_else(|| Error::invalid(format!("{rank} was not restored")))?;
    if mend.lost {
        found.mark_lost();
        return done();
    }
    if !found.mends {
        return done();
    }
    let mut damaged = vec![BTreeSet::new(); found.copies.len()];
    for wire::Damage { copy, chunks } in &mend.damage {
        let index = usize::try_from(*copy).unwrap_or(usize::MAX);
        let Some(bad) = damaged.get_mut(index) else { continue };
        let count = found.copies[index].manifest.payload.chunks.len();
        let chunks = chunks.iter().filter_map(|chunk| usize::try_from(*chunk).ok());
        bad.extend(chunks.filter(|chunk| *chunk < count));
    }
    let place = &seat.keeper.place;
    if !mend.from_peers {
        found.mend(&damaged);
        return done();
    }
    let from_peers =
        place.peers.as_ref().map(|peers| with_remotes(peers, found)?.mend_all(&damaged));
    if matches!(from_peers, Some(Ok(()))) {
        return done();
    }
    let from_bucket = place.bucket.as_ref().map(|it| with_bucket(it, found)?.mend_all(&damaged));
    let nowhere =
        || Err(Error::NotFound { what: format!("another place that may have {}", found.key) });
    from_bucket.or(from_peers).unwrap_or_else(nowhere)?;
    done()
}
