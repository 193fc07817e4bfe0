//! When a job ends because it was asked to: one recorded step, after which all ranks stop.
//!
//! A rank that was asked proposes a step, the first proposal is the answer for all, and nobody waits
//! for anybody. Ranks look for it where they enter a new period of `every` steps, so at the same
//! steps; the proposal is the beginning of the period after next. By then every rank that is less
//! than a period apart has looked.
//!
//! It does not own what asked (a signal, in Python), nor the save of that last step.
//!
//! # Invariants
//!
//! - Ranks that are less than a period apart stop after the same step.
//! - The training gets no error from here: a directory that does not answer is told, once, and
//!   asked again in the next period.
//! - A rank that learns of the step too late stops at once and tells both steps.
//! - A stop belongs to its attempt: the next one begins without it.

use super::Checkpointer;
use crate::{
    error::{Error, Result},
    names::AttemptRef,
    observe::{Observer, locked},
};

/// What one rank knows.
#[derive(Debug, Default)]
pub(super) struct Stopping {
    /// The attempt that the rest is about.
    attempt: Option<AttemptRef>,
    /// The step of the call before.
    before: Option<u64>,
    /// The period that was looked in last.
    looked: Option<u64>,
    /// All stop after this step.
    last: Option<u64>,
    /// The directory did not answer, and that was told; whether this rank was asked by then.
    silent: Option<bool>,
}

impl Checkpointer {
    /// Whether the job stops after `step`, the newest that this rank has completed. Asked after each
    /// step; `asked` says that this process is to stop.
    ///
    /// A lone rank has its answer. Of several, one that was asked proposes a step which is a multiple
    /// of `every`; true from that step on, on every rank. Before the attempt has begun there is
    /// nobody to agree with: false.
    ///
    /// From the last step on, steps go to disk whatever `disk_every` says.
    #[must_use]
    pub fn stop_requested(&self, step: u64, every: u64, asked: bool) -> bool {
        let inner = &self.inner;
        let desk = inner.desk();
        if !desk.is_ours() {
            return false;
        }
        let lone = desk.config.is_lone();
        let Some(going) = inner.owner.going() else { return lone && asked };
        let attempt = going.record().attempt;
        if lone {
            if asked {
                going.stop_after(step);
            }
            return asked;
        }
        let mut known = locked(&inner.stopping);
        if known.attempt != Some(attempt) {
            *known = Stopping { attempt: Some(attempt), ..Stopping::default() };
        }
        let stops = known.ask(&|wish| going.stop(wish), &desk.observer, step, every, asked);
        if let Some(last) = known.last {
            going.stop_after(last);
        }
        stops
    }
}

/// Asks for the recorded step, proposing one.
type Ask<'a> = &'a dyn Fn(Option<u64>) -> Result<Option<u64>>;

impl Stopping {
    fn ask(
        &mut self,
        stop: Ask<'_>,
        observer: &Observer,
        step: u64,
        every: u64,
        asked: bool,
    ) -> bool {
        let before = self.before.replace(step);
        let period = step / every.max(1);
        if self.last.is_none() && self.looked != Some(period) {
            self.looked = Some(period);
            let wish = asked.then(|| period.saturating_add(2).saturating_mul(every.max(1)));
            self.learn(stop(wish), observer, (before, step), asked);
        }
        self.last.is_some_and(|last| step >= last)
    }

    /// `steps`: of the call before and of this one.
    fn learn(
        &mut self,
        answer: Result<Option<u64>>,
        observer: &Observer,
        (before, step): (Option<u64>, u64),
        asked: bool,
    ) {
        match answer {
            Ok(last) => {
                self.last = last;
                self.silent = None;
                let Some(last) = last else { return };
                if before.map_or(step > last, |before| before >= last) {
                    let text = format!(
                        "the job was asked to stop after step {last}; this rank learned of it past \
                         that, and stops after step {step}"
                    );
                    observer.warn("stopping_late", Some(last), text);
                } else {
                    let text = format!("the job was asked to stop: it ends after step {last}");
                    observer.info("stopping", Some(last), text);
                }
            }
            Err(e) if self.silent.is_none_or(|told| asked && !told) => {
                self.silent = Some(asked);
                self.tell_silent(&e, observer, step, asked);
            }
            Err(_) => {}
        }
    }

    fn tell_silent(&self, error: &Error, observer: &Observer, step: u64, asked: bool) {
        let why = error.chain();
        if asked {
            let text = format!(
                "this process was asked to stop, and the other ranks cannot be told: {why}; the \
                 training goes on, and they are told once the directory answers"
            );
            observer.error("stop_unknown", Some(step), text);
        } else {
            let text = format!("whether the job is to stop cannot be told: {why}; it goes on");
            observer.warn("stop_unknown", Some(step), text);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, time::Duration};

    use proptest::prelude::*;

    use super::*;
    use crate::{agree::Agreements, names::Id};

    fn attempt(number: u32) -> AttemptRef {
        AttemptRef { number, id: Id([7; 16]) }
    }

    struct Rank {
        agreements: Agreements,
        observer: Observer,
        stopping: Stopping,
        step: u64,
        /// The step that it stopped after.
        stopped: Option<u64>,
    }

    impl Rank {
        fn new(shared: &Path) -> Self {
            Self {
                agreements: Agreements::new(shared, &attempt(1), false),
                observer: Observer::default(),
                stopping: Stopping::default(),
                step: 0,
                stopped: None,
            }
        }

        fn ask(&mut self, step: u64, every: u64, asked: bool) -> bool {
            self.step = step;
            let stop = |wish| self.agreements.stop(wish);
            let stops = self.stopping.ask(&stop, &self.observer, step, every, asked);
            if stops {
                self.stopped.get_or_insert(step);
            }
            stops
        }

        fn told(&self) -> Vec<String> {
            std::iter::from_fn(|| self.observer.next(Duration::ZERO).ok().flatten())
                .map(|e| format!("{}: {}", e.kind, e.text))
                .collect()
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

        #[test]
        fn ranks_less_than_a_period_apart_stop_after_the_same_step(
            every in 1_u64..5,
            stride in 1_u64..8,
            asked in prop::collection::vec((0_usize..3, 0_u64..40), 1..4),
            order in prop::collection::vec(0_usize..3, 400),
            dies in prop::option::of(0_usize..3),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut ranks: Vec<Rank> = (0..3).map(|_| Rank::new(dir.path())).collect();
            let mut proposed = false;
            for turn in order.into_iter().chain((0..600).map(|n| n % 3)) {
                // A collective in each step: nobody is more than one ahead.
                let slowest = ranks.iter().filter(|r| r.stopped.is_none()).map(|r| r.step).min();
                let Some(slowest) = slowest else { break };
                let rank = &mut ranks[turn];
                if rank.stopped.is_some() || rank.step > slowest {
                    continue;
                }
                let step = rank.step + stride;
                let signal = asked.iter().any(|(r, at)| *r == turn && step >= at * stride);
                rank.ask(step, every, signal);
                proposed |= rank.stopping.last.is_some();
                if proposed && dies == Some(turn) {
                    rank.stopped = Some(u64::MAX); // Killed, whoever proposed.
                }
            }
            let last: Vec<u64> = ranks.iter().filter_map(|r| r.stopped).collect();
            prop_assert_eq!(last.len(), 3);
            let alive: Vec<u64> = last.into_iter().filter(|s| *s < u64::MAX).collect();
            prop_assert!(alive.iter().all(|s| *s == alive[0]), "{alive:?}");
            // A loop that calls for every due step stops after one of them.
            prop_assert!(!every.is_multiple_of(stride) || alive[0].is_multiple_of(every));
            for rank in &ranks {
                prop_assert!(rank.told().iter().all(|e| e.starts_with("stopping: ")));
            }
        }
    }

    #[test]
    fn the_first_proposal_holds_and_is_at_least_two_due_steps_ahead() {
        let dir = tempfile::tempdir().unwrap();
        let mut ranks = [Rank::new(dir.path()), Rank::new(dir.path())];
        for step in 1..=10 {
            assert!(!ranks[0].ask(step, 10, false) && !ranks[1].ask(step, 10, false));
        }
        // Between two due steps nothing is asked and nothing proposed.
        assert!(!ranks[1].ask(15, 10, true) && ranks[1].stopping.last.is_none());
        assert!(!ranks[1].ask(20, 10, true));
        assert_eq!(ranks[1].stopping.last, Some(40));
        // The other was asked as well, and comes a step later.
        assert!(!ranks[0].ask(21, 10, true));
        assert_eq!(ranks[0].stopping.last, Some(40));
        for rank in &mut ranks {
            assert!(!rank.ask(39, 10, true) && rank.ask(40, 10, true) && rank.ask(41, 10, true));
            assert_eq!(rank.told(), ["stopping: the job was asked to stop: it ends after step 40"]);
        }
    }

    #[test]
    fn a_rank_that_learns_too_late_stops_at_once_and_tells_both_steps() {
        let dir = tempfile::tempdir().unwrap();
        let mut ranks = [Rank::new(dir.path()), Rank::new(dir.path())];
        (1..=57).for_each(|step| assert!(!ranks[0].ask(step, 10, false)));
        assert!(!ranks[1].ask(10, 10, true));
        (58..60).for_each(|step| assert!(!ranks[0].ask(step, 10, false)));
        assert!(ranks[0].ask(60, 10, false));
        assert_eq!(
            ranks[0].told(),
            [
                "stopping_late: the job was asked to stop after step 30; this rank learned of it past \
              that, and stops after step 60"
            ]
        );
        assert!(ranks[1].ask(30, 10, true));
    }

    #[test]
    fn a_directory_that_does_not_answer_is_told_once_and_asked_again() {
        let dir = tempfile::tempdir().unwrap();
        let shared = dir.path().join("run");
        std::fs::File::create(&shared).unwrap();
        let mut rank = Rank::new(&shared);
        (1..=5).for_each(|step| assert!(!rank.ask(step, 1, false)));
        let told = rank.told();
        assert!(
            told.len() == 1 && told[0].starts_with("stop_unknown: whether the job"),
            "{told:?}"
        );
        (6..=9).for_each(|step| assert!(!rank.ask(step, 1, true)));
        let told = rank.told();
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].contains("the other ranks cannot be told: could not record"), "{told:?}");
        std::fs::remove_file(&shared).unwrap();
        assert!(!rank.ask(10, 1, true) && !rank.ask(11, 1, true) && rank.ask(12, 1, true));
        assert_eq!(rank.told(), ["stopping: the job was asked to stop: it ends after step 12"]);
    }

    #[test]
    fn a_stop_is_not_forgotten_with_old_steps_and_not_known_to_another_attempt() {
        let dir = tempfile::tempdir().unwrap();
        let mut rank = Rank::new(dir.path());
        assert!(!rank.ask(1, 1, true));
        rank.agreements.forget_before(u64::MAX).unwrap();
        assert_eq!(rank.agreements.stop(None).unwrap(), Some(3));
        let next = Agreements::new(dir.path(), &attempt(2), false);
        assert_eq!(next.stop(None).unwrap(), None);
        let lone = Agreements::new(dir.path(), &attempt(1), true);
        assert_eq!((lone.stop(None).unwrap(), lone.stop(Some(5)).unwrap()), (None, Some(5)));
    }

    #[test]
    fn a_stop_that_says_nothing_is_told_as_damage() {
        let dir = tempfile::tempdir().unwrap();
        let mut rank = Rank::new(dir.path());
        let decisions = dir.path().join("_decisions").join(attempt(1).dir());
        std::fs::create_dir_all(&decisions).unwrap();
        std::os::unix::fs::symlink("soon", decisions.join("stop")).unwrap();
        assert!(!rank.ask(1, 1, true));
        let told = rank.told();
        assert!(told.len() == 1 && told[0].contains("it says \"soon\""), "{told:?}");
    }
}
