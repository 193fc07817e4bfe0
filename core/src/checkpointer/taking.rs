//! Taking one save: a slot, the copy, and its place in the ram tier.

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
};

use super::{Checkpointer, Inner, SAVES_KEPT, SaveRequest};
use crate::{
    error::{Error, ErrorKind, Hint, Result},
    manifest::{Identity, Meta},
    observe::{add, locked},
    owner::{Filled, Going, Lease},
    save::{Level, Save},
    snapshot::{Snapshot, Taken, device::Flight},
};

impl Checkpointer {
    /// Saves a state. Returns when the caller may go on: the copy is done and published in RAM, or,
    /// with `overlap`, everything but the `late` tensors is copied. On a rank that does not save:
    /// at once, with a [`Save`] that follows the checkpoint of those that do.
    ///
    /// A failure of the copy is told, counted and kept in the returned [`Save`]; only mistakes of
    /// the caller are errors here.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`], [`ErrorKind::Fenced`].
    ///
    /// # Safety
    /// The memory that the state points to is readable until the save is staged, and nobody writes
    /// to it meanwhile.
    pub unsafe fn save(&self, request: SaveRequest) -> Result<Save> {
        self.check_open()?;
        let going = self.going()?;
        let record = going.record();
        if let Some(save) = self.earlier(request.step)? {
            return Ok(save);
        }
        if record.parent.is_some_and(|p| request.step <= p.step) {
            return Err(Error::invalid(format!(
                "step {} is not newer than the step that this attempt resumed from, {}",
                request.step,
                record.parent.map_or(0, |p| p.step)
            )));
        }
        let save = Save::new(request.step);
        going.mark_due(&save);
        locked(&self.inner.saves).insert(request.step, save.clone());
        if !self.config().saves() {
            going.follow(&save);
            return Ok(save);
        }
        // Steps rise: none before this one is tried again.
        self.inner.give_up_failed(request.step);
        // SAFETY: the caller's promise.
        match unsafe { self.take(&save, request, &*going) } {
            Ok(()) => Ok(save),
            // Interrupted: the caller knows, and may save the step later.
            Err(e @ Error::Skipped { .. }) => {
                save.fail(Level::Staged, &e);
                locked(&self.inner.saves).remove(&save.step());
                Ok(save)
            }
            Err(e) => {
                self.inner.failed(&save, &e);
                match e.kind() {
                    ErrorKind::Fenced | ErrorKind::Invalid
                        if !matches!(e, Error::Budget { .. }) =>
                    {
                        Err(e)
                    }
                    _ => Ok(save),
                }
            }
        }
    }

    /// The save of this step, if this attempt has one; an error for a step that is older than it.
    fn earlier(&self, step: u64) -> Result<Option<Save>> {
        let mut saves = locked(&self.inner.saves);
        if let Some(save) = saves.get(&step) {
            if !save.is_void() {
                return Ok(Some(save.clone()));
            }
            saves.remove(&step);
        }
        if let Some((newest, _)) = saves.last_key_value().filter(|(s, _)| **s > step) {
            return Err(Error::invalid(format!(
                "step {step} is older than step {newest}, which this attempt has saved: steps rise"
            ))
            .with_hint(Hint::Rollback));
        }
        while saves.len() >= SAVES_KEPT {
            saves.pop_first();
        }
        Ok(None)
    }

    /// # Safety
    /// As [`save`](Self::save).
    unsafe fn take(&self, save: &Save, request: SaveRequest, going: &dyn Going) -> Result<()> {
        let inner = &self.inner;
        let desk = inner.desk();
        let SaveRequest {
            step,
            state,
            mut meta,
            overlap,
            bring,
            skip_if_busy,
            keep_alive,
            interrupted,
        } = request;
        let layout = self.layout(state.tensors.iter().map(|t| &t.spec))?;
        if !layout.unused.is_empty() && !inner.told_unused.swap(true, Ordering::Relaxed) {
            let patterns = layout.unused.join(", ");
            let text =
                format!("replicated: no tensor matches {patterns}: nothing is compared there");
            desk.observer.warn("replicated_unused", Some(step), text);
        }
        let snapshot = Snapshot::new(state, layout, desk.config.threads)?;
        save.set_bytes(snapshot.len());
        let lease = going.lease(save, snapshot.len(), skip_if_busy, interrupted.as_deref())?;
        let Some(lease) = lease else { return Ok(()) };
        let record = going.record();
        let identity = Identity {
            run_id: record.run_id,
            attempt: record.attempt,
            writer: desk.nonce,
            step,
            rank: desk.config.rank,
            savers: desk.config.savers.clone(),
        };
        meta.saved_unix_ms = desk.clock.unix_ms();
        if bring.is_none() && !snapshot.on_device().is_empty() {
            return Err(Error::Bug("a tensor of a device, and nobody who brings it".into()));
        }
        let begun = desk.clock.monotonic();
        let len = usize::try_from(snapshot.len()).unwrap_or(usize::MAX);
        let flight = Flight::begin(bring, lease.map(), len, snapshot.on_device())?;
        let mut job = Job { flight, snapshot, lease, identity, meta, save: save.clone() };
        let overlap = overlap && !job.snapshot.is_all_now();
        let done = if overlap {
            // SAFETY: the caller's promise.
            unsafe { job.snapshot.begin(job.lease.map()) };
            inner.copy_behind(job, keep_alive)
        } else {
            // SAFETY: the caller's promise.
            match unsafe { job.snapshot.take(job.lease.map(), &mut job.flight) } {
                Ok(taken) => {
                    save.reach(Level::Staged, false);
                    inner.publish(job, taken)
                }
                Err(e) => {
                    // The slot is free when the last copy has landed; the caller is told now.
                    let _ = inner.copier(Box::new(move || drop(job)));
                    Err(e)
                }
            }
        };
        let took = desk.clock.monotonic().saturating_sub(begun);
        add(&desk.observer.counters.stall_ns, u64::try_from(took.as_nanos()).unwrap_or(0));
        done
    }
}

/// A save that goes on behind: counted as copying, then as publishing, whatever becomes of it.
struct Behind {
    inner: Arc<Inner>,
    save: Save,
    /// It reads memory of the host.
    host: bool,
    copying: AtomicBool,
    /// Published, or failed and told.
    done: AtomicBool,
}

impl Behind {
    fn new(inner: Arc<Inner>, save: Save, host: bool) -> Self {
        inner.copying.fetch_add(1, Ordering::AcqRel);
        inner.copying_host.fetch_add(usize::from(host), Ordering::AcqRel);
        inner.publishing.fetch_add(1, Ordering::AcqRel);
        Self { inner, save, host, copying: AtomicBool::new(true), done: AtomicBool::new(false) }
    }

    fn copied(&self) {
        if self.copying.swap(false, Ordering::AcqRel) {
            self.inner.copying.fetch_sub(1, Ordering::AcqRel);
            self.inner.copying_host.fetch_sub(usize::from(self.host), Ordering::AcqRel);
            self.inner.desk().signal.notify();
        }
    }
}

impl Drop for Behind {
    fn drop(&mut self) {
        if !self.done.load(Ordering::Acquire) {
            let error = Error::Bug(format!("the copy of step {} ended early", self.save.step()));
            self.inner.failed(&self.save, &error);
        }
        self.copied();
        self.inner.publishing.fetch_sub(1, Ordering::AcqRel);
        self.inner.desk().signal.notify();
    }
}

/// What the copying thread does next.
pub(super) type Work = Box<dyn FnOnce() + Send>;

struct Job {
    /// First: dropped before the slot is free for another.
    flight: Flight,
    snapshot: Snapshot,
    lease: Box<dyn Lease>,
    identity: Identity,
    meta: Meta,
    save: Save,
}

impl Inner {
    fn publish(&self, job: Job, taken: Taken) -> Result<()> {
        let Job { snapshot, lease, identity, meta, save, .. } = job;
        let described = snapshot.manifest(&identity, &meta, taken)?;
        let len = snapshot.len();
        lease.publish(Filled { identity, len, described, save })
    }

    fn copy_behind(
        self: &Arc<Self>,
        mut job: Job,
        keep_alive: Box<dyn Any + Send + Sync>,
    ) -> Result<()> {
        let save = job.save.clone();
        let behind = Behind::new(self.clone(), save.clone(), job.snapshot.reads_host_late());
        let work = move || {
            // SAFETY: `keep_alive` holds the memory, and the owners of `late` tensors wait for
            // `staged` before they write (the promise of `save`).
            let taken = unsafe { job.snapshot.finish(job.lease.map(), &mut job.flight) };
            drop(keep_alive);
            let save = job.save.clone();
            let published = taken.and_then(|taken| {
                save.reach(Level::Staged, false);
                behind.copied();
                behind.inner.publish(job, taken)
            });
            if let Err(e) = published {
                behind.inner.failed(&save, &e);
            }
            behind.done.store(true, Ordering::Release);
        };
        self.copier(Box::new(work)).map_err(|source| Error::Io {
            what: format!("start the thread that copies step {}", save.step()),
            source,
        })
    }

    /// Hands work to the copying thread, which is made at the first call: waking a thread costs the
    /// training a tenth of starting one.
    fn copier(&self, mut work: Work) -> std::io::Result<()> {
        let mut copier = locked(&self.copier);
        if let Some(sender) = copier.as_ref() {
            match sender.send(work) {
                Ok(()) => return Ok(()),
                Err(back) => work = back.0, // It is gone: a new one, then.
            }
        }
        let (sender, receiver) = mpsc::channel::<Work>();
        let run = move || {
            for work in receiver {
                // A panic ends this save (`Behind` tells its waiters), not the next ones.
                let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            }
        };
        std::thread::Builder::new().name("tierkeep-copy".into()).spawn(run)?;
        sender.send(work).map_err(|_| std::io::Error::other("the thread ended at once"))?;
        *copier = Some(sender);
        Ok(())
    }

    fn failed(&self, save: &Save, error: &Error) {
        // Told before those who wait are woken: they may look at once.
        add(&self.desk().observer.counters.saves_failed, 1);
        let text = format!("step {} was not saved: {}", save.step(), error.chain());
        self.desk().observer.error("save_failed", Some(save.step()), text);
        save.fail(Level::Staged, error);
    }
}
