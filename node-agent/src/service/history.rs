//! What the status page draws over time: how far each tier was, and how long copies took.
//!
//! # Invariants
//!
//! - It has a bound: so many samples of a run, of so many runs. A run of which nothing is seen for longer
//!   than that is forgotten.
//! - A tier's step is one that all ranks of this node have there: a rank without one makes it unknown.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use serde::Serialize;
use tierkeep_proto::control::{Rank, StatusReply};

use super::control::path;

/// How often it is looked.
pub(super) const EVERY: Duration = Duration::from_secs(5);

/// Half an hour of a run, in some ten kilobytes.
const SAMPLES_MAX: usize = 360;

/// An agent has rarely more than one; those that come when there are so many are not drawn.
const RUNS_MAX: usize = 64;

/// All runs that were seen here lately.
#[derive(Debug, Default)]
pub(super) struct History {
    runs: BTreeMap<String, Run>,
}

#[derive(Debug, Default)]
struct Run {
    samples: VecDeque<Sample>,
    /// Sums over its ranks, as they were last.
    saves: u64,
    captured_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Sample {
    at_unix_ms: u64,
    ram: Option<u64>,
    disk: Option<u64>,
    peer: Option<u64>,
    object: Option<u64>,
    /// Milliseconds of a copy, the mean of those since the sample before; none: there was none.
    capture_ms: Option<f64>,
}

/// A run over time: one place in each list is one moment.
#[derive(Debug, Default, Serialize)]
pub(super) struct Columns {
    at_unix_ms: Vec<u64>,
    ram: Vec<Option<u64>>,
    disk: Vec<Option<u64>>,
    peer: Vec<Option<u64>>,
    object: Vec<Option<u64>>,
    capture_ms: Vec<Option<f64>>,
}

impl History {
    /// Takes a look in.
    pub(super) fn add(&mut self, at_unix_ms: u64, status: &StatusReply) {
        let mut now: BTreeMap<String, Vec<&Rank>> = BTreeMap::new();
        for rank in &status.ranks {
            now.entry(path(&rank.destination)).or_default().push(rank);
        }
        let span = u64::try_from(EVERY.as_millis()).unwrap_or(u64::MAX) * SAMPLES_MAX as u64;
        let oldest = at_unix_ms.saturating_sub(span);
        for run in self.runs.values_mut() {
            run.samples.retain(|sample| sample.at_unix_ms > oldest);
        }
        self.runs.retain(|name, run| !run.samples.is_empty() || now.contains_key(name));
        for (name, ranks) in now {
            if self.runs.contains_key(&name) || self.runs.len() < RUNS_MAX {
                self.runs.entry(name).or_default().add(at_unix_ms, &ranks);
            }
        }
    }

    /// For the page.
    pub(super) fn columns(&self) -> BTreeMap<String, Columns> {
        self.runs.iter().map(|(name, run)| (name.clone(), run.columns())).collect()
    }
}

impl Run {
    fn add(&mut self, at_unix_ms: u64, ranks: &[&Rank]) {
        let least = |step: fn(&Rank) -> Option<u64>| {
            ranks.iter().map(|rank| step(rank)).min().flatten() // None is less than any.
        };
        let sum = |number: fn(&tierkeep_proto::control::Counters) -> u64| {
            ranks.iter().filter_map(|rank| rank.counters.as_ref()).map(number).sum::<u64>()
        };
        let (saves, captured_ns) = (sum(|c| c.saves), sum(|c| c.captured_ns));
        // Sums begin anew where a rank was taken anew; at first what they are of is not known.
        let copies = saves.checked_sub(self.saves).filter(|n| *n > 0 && !self.samples.is_empty());
        let took = captured_ns.checked_sub(self.captured_ns);
        #[allow(clippy::cast_precision_loss)] // Milliseconds, to be drawn.
        let capture_ms = copies.zip(took).map(|(copies, took)| took as f64 / 1e6 / copies as f64);
        (self.saves, self.captured_ns) = (saves, captured_ns);
        if self.samples.len() == SAMPLES_MAX {
            self.samples.pop_front();
        }
        self.samples.push_back(Sample {
            at_unix_ms,
            ram: least(|r| r.ram_step),
            disk: least(|r| r.disk_step),
            peer: least(|r| r.peer_step),
            object: least(|r| r.object_step),
            capture_ms,
        });
    }

    fn columns(&self) -> Columns {
        let mut columns = Columns::default();
        for sample in &self.samples {
            columns.at_unix_ms.push(sample.at_unix_ms);
            columns.ram.push(sample.ram);
            columns.disk.push(sample.disk);
            columns.peer.push(sample.peer);
            columns.object.push(sample.object);
            columns.capture_ms.push(sample.capture_ms);
        }
        columns
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test.

    use tierkeep_proto::control::Counters;

    use super::*;

    fn rank(run: &str, rank: u32, ram_step: Option<u64>, saves: u64, captured_ns: u64) -> Rank {
        let counters = Some(Counters { saves, captured_ns, ..Counters::default() });
        Rank { destination: run.into(), rank, ram_step, counters, ..Rank::default() }
    }

    fn look(ranks: Vec<Rank>) -> StatusReply {
        StatusReply { ranks, ..StatusReply::default() }
    }

    #[test]
    fn a_step_is_what_all_ranks_have_and_a_copy_the_mean_of_those_since() {
        let mut history = History::default();
        let ms = 1_000_000;
        history.add(
            5_000,
            &look(vec![rank("/r", 0, Some(4), 9, 900 * ms), rank("/r", 1, None, 0, 0)]),
        );
        history.add(
            10_000,
            &look(vec![rank("/r", 0, Some(6), 11, 930 * ms), rank("/r", 1, Some(5), 1, 30 * ms)]),
        );
        // One was taken anew: what was counted before is gone.
        history.add(
            15_000,
            &look(vec![rank("/r", 0, Some(6), 1, 2 * ms), rank("/r", 1, Some(6), 2, 40 * ms)]),
        );
        let seen = history.columns();
        assert_eq!(seen["/r"].at_unix_ms, [5_000, 10_000, 15_000]);
        assert_eq!(seen["/r"].ram, [None, Some(5), Some(6)]);
        assert_eq!(seen["/r"].capture_ms, [None, Some(20.0), None]);
    }

    #[test]
    fn what_is_old_is_forgotten_and_there_is_a_bound() {
        let mut history = History::default();
        let step = u64::try_from(EVERY.as_millis()).unwrap();
        history.add(step, &look(vec![rank("/gone", 0, Some(1), 1, 1)]));
        for i in 2..=SAMPLES_MAX as u64 + 10 {
            history.add(i * step, &look(vec![rank("/here", 0, Some(i), i, i)]));
        }
        let seen = history.columns();
        assert_eq!(seen.keys().collect::<Vec<_>>(), ["/here"]);
        assert_eq!(seen["/here"].ram.len(), SAMPLES_MAX);
        assert_eq!(seen["/here"].ram.last(), Some(&Some(SAMPLES_MAX as u64 + 10)));
        let many =
            (0..RUNS_MAX as u32 + 9).map(|i| rank(&format!("/{i}"), 0, None, 0, 0)).collect();
        history.add(step * 999, &look(many));
        assert_eq!(history.columns().len(), RUNS_MAX);
    }
}
