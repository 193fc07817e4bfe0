//! What must be true while the job is down, of the bucket alone and of everything together.

use std::{collections::BTreeSet, path::Path, sync::Arc};

use tierkeep::{
    Error, config,
    names::{CheckpointKey, Rank},
    reader::Reader,
    tier::{Tier, disk::DiskTier, memory::MemoryTier, object},
};

use super::draw::Model;
use crate::{
    common::{
        Places, read_whole,
        whole::{everything_is_whole, newest},
    },
    open,
    servers::Place,
};

/// What the ranks said in one life.
#[derive(Debug, Default)]
pub(super) struct Said {
    /// Steps that a rank was told to be in the bucket, all ranks' shards of them.
    pub(super) object: BTreeSet<u64>,
    pub(super) resumed: Vec<u64>,
    /// Events, and saves that failed.
    pub(super) strange: Vec<String>,
    /// Requests that the server did not answer in time: told and tried again, as they are to be.
    pub(super) slow: u64,
}

const SLOW: [&str; 3] = ["operation timed out", "no answer within", "took no bytes for"];

impl Said {
    pub(super) fn of(lines: Vec<(u32, String, String)>) -> Self {
        let mut said = Self::default();
        for (rank, word, rest) in lines {
            let number = || rest.parse::<u64>().expect("a step");
            match word.as_str() {
                "object" => drop(said.object.insert(number())),
                "resumed" => said.resumed.push(number()),
                "closed" => {}
                // Slots were wanted faster than disk gave them back.
                "event" if rest.contains(": skipped: ") => {}
                "event" if rest.contains("object_away: ") && is_slow(&rest) => said.slow += 1,
                _ => said.strange.push(format!("rank {rank}: {word} {rest}")),
            }
        }
        said
    }
}

fn is_slow(told: &str) -> bool {
    SLOW.iter().any(|slow| told.contains(slow))
}

/// What was promised of the bucket.
#[derive(Debug, Default)]
pub(super) struct Promised {
    /// The highest step that any rank was told to be there.
    pub(super) object: u64,
    /// The newest attempt whose record was seen there.
    attempt: u32,
}

fn bucket(place: &Place) -> Option<Reader> {
    match Reader::open_with(Path::new(&place.url), Some(Path::new("/nowhere")), &place.options) {
        Ok(reader) => Some(reader),
        Err(Error::NotFound { .. }) => None,
        Err(e) => panic!("{}", e.chain()),
    }
}

/// As another machine sees it: everything that is sealed is whole, what was promised is there, and the
/// newest has the right bits on all ranks. Its step; 0: none.
pub(super) fn bucket_alone(
    place: &Place,
    model: &Model,
    promised: &mut Promised,
    said: &Said,
) -> u64 {
    let Some(reader) = bucket(place) else {
        assert!(promised.object == 0 && said.object.is_empty(), "nothing is left");
        return 0;
    };
    everything_is_whole(&reader);
    // A rollback gives up what is newer, as soon as it is recorded.
    for record in reader.attempts().expect("attempts").records() {
        if record.attempt.number > promised.attempt {
            promised.attempt = record.attempt.number;
            if record.rollback {
                promised.object = record.parent.map_or(0, |parent| parent.step);
            }
        }
    }
    promised.object = promised.object.max(said.object.last().copied().unwrap_or(0));
    let Some(key) = newest(&reader, model.world()) else {
        assert_eq!(promised.object, 0, "there is no checkpoint");
        return 0;
    };
    assert!(key.step.0 >= promised.object, "{promised:?}, but {key} is the newest");
    for rank in 0..model.world() {
        let shard = reader.state(&key, Rank(rank)).expect("shard");
        let report = read_whole(&shard, &model.sizes(rank)).expect("read");
        assert!(report.damaged.is_empty(), "{key}, rank {rank}: {:?}", report.damaged);
    }
    key.step.0
}

/// The step that the next start resumes from; 0: none.
pub(super) fn resumes_from(places: &Places, place: &Place, model: &Model) -> u64 {
    let destination = places.destination();
    let ram = config::ram_dir(places.ram(), &destination);
    let tiers: Vec<Arc<dyn Tier>> = vec![
        Arc::new(MemoryTier::reader(&ram)),
        Arc::new(DiskTier::reader(&destination)),
        object::open(&place.url, &place.options).expect("bucket"),
    ];
    newest(&Reader::of(tiers), model.world()).map_or(0, |key| key.step.0)
}

/// The sealed steps of the lineage, oldest first.
pub(super) fn sealed(place: &Place) -> Vec<u64> {
    let steps = bucket(place).map_or_else(Vec::new, |reader| reader.steps().expect("steps"));
    let good = steps.into_iter().filter(|info| info.sealed && info.in_lineage);
    good.filter(|info| matches!(info.reach, tierkeep::restore::survey::Reach::Whole(_)))
        .map(|info| info.key.step.0)
        .collect()
}

/// After a job that ended well: one checkpoint of the lineage, no half of one, and no part of an upload.
pub(super) fn is_tidy(place: &Place, model: &Model) {
    assert_eq!(open(place).unfinished().expect("unfinished"), Some(0), "parts are left");
    let reader = bucket(place).expect("a bucket");
    let (found, _, lineage) = reader.survey().expect("survey");
    let line: Vec<_> = found.iter().filter(|found| lineage.contains(&found.key)).collect();
    let keys: Vec<&CheckpointKey> = line.iter().map(|found| &found.key).collect();
    assert!(line.len() == 1 && line[0].sealed(), "{keys:?} of one");
    let payloads = &line[0].listings[0].payloads;
    assert!(payloads.len() == model.bytes.len() && payloads.values().all(|all| all.len() == 1));
    let deleted: Vec<_> = found.iter().filter(|found| found.deleted()).map(|f| &f.key).collect();
    assert!(deleted.is_empty(), "half deleted: {deleted:?}");
}
