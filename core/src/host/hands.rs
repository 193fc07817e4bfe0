//! Threads of one connection that answer what it asks: as many as there are open questions, up to a
//! limit, each kept for the next one.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex},
};

use crate::observe::locked;

/// Questions that one trainer may have open. A save has one at a time, its copy behind another, and
/// a listing or two go beside.
pub(super) const OPEN_MAX: usize = 16;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    idle: usize,
    busy: usize,
    over: bool,
}

/// The threads.
#[derive(Clone, Default)]
pub(super) struct Hands {
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl Hands {
    /// False: too many questions are open.
    pub(super) fn take(&self, job: Job) -> std::io::Result<bool> {
        let mut state = locked(&self.shared.0);
        if state.busy + state.jobs.len() >= OPEN_MAX {
            return Ok(false);
        }
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() {
            self.shared.1.notify_one();
            return Ok(true);
        }
        drop(state);
        let hands = self.clone();
        let thread = std::thread::Builder::new().name("tierkeep-hand".into());
        thread.spawn(move || hands.work()).map(|_| true)
    }

    fn work(&self) {
        let mut state = locked(&self.shared.0);
        loop {
            if let Some(job) = state.jobs.pop_front() {
                state.busy += 1;
                drop(state);
                // A panic is this answer's, not the thread's.
                let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
                state = locked(&self.shared.0);
                state.busy -= 1;
                continue;
            }
            if state.over {
                return;
            }
            state.idle += 1;
            state = self.shared.1.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
            state.idle -= 1;
        }
    }

    /// The threads end when they have nothing more to do.
    pub(super) fn end(&self) {
        locked(&self.shared.0).over = true;
        self.shared.1.notify_all();
    }
}
