//! What a trial draws from its seed, all of it before anything runs: a repeated seed repeats the
//! settings and the moments, whatever the machine does meanwhile.

use std::time::Duration;

use tierkeep::{config::Config, state::replicas::Rule};

use crate::{
    WORLD,
    common::{ALIKE, lives::Random},
};

/// The settings of one start of the job; the next start may have others, as users change theirs.
#[derive(Clone, Debug)]
pub struct Settings {
    pub slots: usize,
    pub disk_every: u64,
    pub keep_last: usize,
    pub keep_every: Option<u64>,
    pub skip_if_busy: bool,
    /// A rank waits for each step to be in RAM; else the ranks drift apart as far as slots let
    /// them.
    pub lockstep: bool,
    /// A step of the training itself takes so long.
    pub step_micros: u64,
    /// For each rank the tensors that are copied late, a bit each; 0: capture "now".
    pub late: [u8; WORLD as usize],
    /// The tensor that all ranks hold alike is declared as such.
    pub replicated: bool,
}

impl Settings {
    pub fn draw(random: &mut Random) -> Self {
        let keep_every = [None, None, Some(3), Some(10)];
        Self {
            slots: 2 + random.below(3) as usize,
            disk_every: 1 + random.below(4),
            keep_last: 1 + random.below(3) as usize,
            keep_every: keep_every[random.below(4) as usize],
            skip_if_busy: random.one_in(2),
            lockstep: random.one_in(2),
            step_micros: if random.one_in(2) { 0 } else { random.below(3_000) },
            late: match random.below(3) {
                0 => [0; WORLD as usize],
                1 => [7; WORLD as usize],
                _ => std::array::from_fn(|_| random.below(8) as u8),
            },
            replicated: random.one_in(2),
        }
    }

    pub fn set(&self, config: &mut Config) {
        config.slots = self.slots;
        config.disk_every = self.disk_every;
        config.keep_last = self.keep_last;
        config.keep_every = self.keep_every;
        config.replicated = rules(self.replicated);
    }

    /// For a rank's process: the core's own variables, and those that `trainer` reads.
    pub fn variables(&self, rank: u32) -> [(&'static str, String); 9] {
        [
            ("TIERKEEP_SLOTS", self.slots.to_string()),
            ("TIERKEEP_DISK_EVERY", self.disk_every.to_string()),
            ("TIERKEEP_KEEP_LAST", self.keep_last.to_string()),
            ("TIERKEEP_KEEP_EVERY", self.keep_every.map_or_else(String::new, |n| n.to_string())),
            ("TIERKEEP_TEST_SKIP", u32::from(self.skip_if_busy).to_string()),
            ("TIERKEEP_TEST_LOCKSTEP", u32::from(self.lockstep).to_string()),
            ("TIERKEEP_TEST_STEP_MICROS", self.step_micros.to_string()),
            ("TIERKEEP_TEST_REPLICATED", u32::from(self.replicated).to_string()),
            ("TIERKEEP_TEST_LATE", self.late[rank as usize].to_string()),
        ]
    }
}

pub fn rules(replicated: bool) -> Vec<Rule> {
    let rule = || Rule { pattern: format!("t{ALIKE}"), ranks: (0..WORLD).collect() };
    replicated.then(rule).into_iter().collect()
}

/// One start of the job and its end.
#[derive(Clone, Debug)]
pub struct Trial {
    pub settings: Settings,
    /// The job closes after so many; else it goes on until it is killed.
    pub steps: Option<u64>,
    /// From the start of the job to the first kill; `None`: it is let end.
    pub moment: Option<Duration>,
    /// The rank that is killed first, and how long the others go on after it.
    pub first: usize,
    pub alone: Duration,
    /// RAM is lost with the job, as at a reboot.
    pub wiped: bool,
    /// A start between this job and the next one that restores and saves nothing.
    pub restart: Option<Settings>,
}

impl Trial {
    pub fn draw(random: &mut Random) -> Self {
        // From the first moments of a start to some dozens of saves later; one in four before most
        // have begun to save.
        let longest = if random.one_in(4) { 40_000 } else { 400_000 };
        let steps = random.one_in(4).then(|| 1 + random.below(40));
        let ends = steps.is_some() && random.one_in(3);
        Self {
            settings: Settings::draw(random),
            steps,
            moment: (!ends).then(|| Duration::from_micros(random.below(longest))),
            first: random.below(u64::from(WORLD)) as usize,
            alone: Duration::from_micros(if random.one_in(3) { random.below(30_000) } else { 0 }),
            wiped: random.one_in(4),
            restart: random.one_in(2).then(|| Settings::draw(random)),
        }
    }
}
