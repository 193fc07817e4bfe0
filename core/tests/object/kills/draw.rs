//! What a trial draws from its seed, all of it before anything runs.

use std::time::Duration;

use super::watch::{Aim, Deed, End};
use crate::common::lives::Random;

const MIB: u64 = 1 << 20;

/// Of one run: whoever resumes has what was saved.
#[derive(Clone, Debug)]
pub(super) struct Model {
    /// Bytes of each rank's largest tensor.
    pub(super) bytes: Vec<u64>,
}

impl Model {
    pub(super) fn draw(random: &mut Random) -> Self {
        let world = 2 + random.below(2);
        // A part of an upload is 16 MiB.
        let large = if random.one_in(3) { world } else { random.below(world) };
        let bytes = (0..world).map(|rank| {
            if rank == large || large == world && random.one_in(2) {
                16 * MIB + random.below(18 * MIB)
            } else {
                MIB / 2 + random.below(3 * MIB)
            }
        });
        Self { bytes: bytes.collect() }
    }

    pub(super) fn world(&self) -> u32 {
        self.bytes.len() as u32
    }

    pub(super) fn sizes(&self, rank: u32) -> [usize; 3] {
        [self.bytes[rank as usize] as usize, 13, 0]
    }
}

/// The settings of one start of the job.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    disk_every: u64,
    object_every: u64,
    keep_last: u64,
    pub(super) object_keep_last: u64,
    object_keep_every: Option<u64>,
    requests: u64,
    /// A rank waits for each step to be in the bucket; else saves run ahead of it.
    lockstep: bool,
    step_micros: u64,
}

impl Settings {
    pub(super) fn draw(random: &mut Random) -> Self {
        let disk_every = 1 + random.below(2);
        Self {
            disk_every,
            object_every: disk_every * (1 + random.below(2)),
            keep_last: 1 + random.below(2),
            object_keep_last: [1, 1, 2, 3][random.below(4) as usize],
            object_keep_every: random.one_in(4).then_some(5),
            requests: [1, 2, 32][random.below(3) as usize],
            lockstep: random.one_in(2),
            step_micros: random.below(30_000),
        }
    }

    /// All steps go to the bucket, and the newest stays there alone.
    pub(super) fn last() -> Self {
        Self {
            disk_every: 1,
            object_every: 1,
            keep_last: 1,
            object_keep_last: 1,
            object_keep_every: None,
            requests: 8,
            lockstep: true,
            step_micros: 0,
        }
    }

    /// For a rank's process: the core's own variables, and those that `trainer` reads.
    pub(super) fn variables(&self) -> [(&'static str, String); 8] {
        let keep_every = self.object_keep_every.map_or_else(String::new, |n| n.to_string());
        [
            ("TIERKEEP_DISK_EVERY", self.disk_every.to_string()),
            ("TIERKEEP_OBJECT_EVERY", self.object_every.to_string()),
            ("TIERKEEP_KEEP_LAST", self.keep_last.to_string()),
            ("TIERKEEP_OBJECT_KEEP_LAST", self.object_keep_last.to_string()),
            ("TIERKEEP_OBJECT_KEEP_EVERY", keep_every),
            ("TIERKEEP_OBJECT_REQUESTS_MAX", self.requests.to_string()),
            ("TIERKEEP_TEST_LOCKSTEP", u32::from(self.lockstep).to_string()),
            ("TIERKEEP_TEST_STEP_MICROS", self.step_micros.to_string()),
        ]
    }
}

/// What is lost with the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    Nothing,
    Ram,
    /// It goes on elsewhere, from the bucket.
    RamAndDisk,
}

/// Somebody who collects in the bucket beside the job.
#[derive(Clone, Copy, Debug)]
pub(super) struct Collector {
    pub(super) keep_last: u64,
    pub(super) abandoned: bool,
}

/// One start of the job and its end.
#[derive(Clone, Debug)]
pub(super) struct Trial {
    pub(super) settings: Settings,
    /// It goes back to the oldest checkpoint in the bucket, where there are several.
    pub(super) rolls_back: bool,
    pub(super) aim: Option<Aim>,
    /// It is killed no later than after so many seals, or this long.
    pub(super) seals: u64,
    pub(super) longest: Duration,
    /// After the request that was aimed at.
    pub(super) then: Duration,
    /// The rank that is killed first, and how long the others go on after it.
    pub(super) first: usize,
    pub(super) alone: Duration,
    pub(super) collector: Option<Collector>,
    pub(super) lost: Lost,
    /// The job ends by itself after so many steps.
    pub(super) steps: Option<u64>,
}

impl Trial {
    pub(super) fn draw(random: &mut Random, world: u32) -> Self {
        use Deed::{
            Abort, Begin, Complete, Delete, Look, Manifest, Part, Record, Seal, Tombstone, Whole,
        };
        let aims = [
            // Kind, and the highest number of one.
            (Begin, 2),
            (Part, 6),
            (Part, 6),
            (Complete, 2),
            (Whole, 4),
            (Manifest, 6),
            (Manifest, 6),
            (Seal, 2),
            (Seal, 2),
            (Tombstone, 2),
            (Delete, 14),
            (Delete, 14),
            (Delete, 14),
            (Abort, 1),
            (Record, 4),
            (Look, 100),
        ];
        let (deed, most) = aims[random.below(aims.len() as u64) as usize];
        let number = 1 + random.below(most);
        let end = [End::Passes, End::Passes, End::Late, End::Lost][random.below(4) as usize];
        let abandoned = random.one_in(3);
        let collector = Collector { keep_last: 1 + random.below(3), abandoned };
        let collector = random.one_in(4).then_some(collector);
        let aim = (!random.one_in(4)).then_some(Aim { deed, number, end });
        // One in four before most have begun to save.
        let most = if random.one_in(4) { 500_000 } else { 4_000_000 };
        let longest = if aim.is_some() { 10_000_000 } else { random.below(most) };
        Self {
            settings: Settings::draw(random),
            rolls_back: collector.is_none() && random.one_in(10),
            aim,
            seals: 2 + random.below(4),
            longest: Duration::from_micros(longest),
            then: Duration::from_micros(if random.one_in(2) { 0 } else { random.below(30_000) }),
            first: random.below(u64::from(world)) as usize,
            alone: Duration::from_micros(if random.one_in(4) { random.below(400_000) } else { 0 }),
            collector,
            lost: match random.below(6) {
                0 => Lost::Ram,
                1 | 2 => Lost::RamAndDisk,
                _ => Lost::Nothing,
            },
            steps: None,
        }
    }

    /// After the kills: it ends by itself, and leaves the bucket as it is to be.
    pub(super) fn last(random: &mut Random) -> Self {
        Self {
            settings: Settings::last(),
            rolls_back: false,
            aim: None,
            seals: u64::MAX,
            // More than all waits of a rank that is well.
            longest: Duration::from_secs(1800),
            collector: None,
            lost: Lost::Nothing,
            steps: Some(2),
            ..Self::draw(random, 1)
        }
    }
}
