//! What must be true while the job is down, whenever it was killed. Only read: nothing here may
//! finish what the job left half done.

use std::collections::BTreeSet;

use tierkeep::{Error, names::Rank, reader::Reader};

use crate::{
    WORLD,
    common::{
        Places, SMALL, files, read_whole,
        whole::{everything_is_whole, newest},
    },
    draw::Settings,
};

/// The highest steps that any rank was told to be in a tier, all ranks' shards of them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Promised {
    pub ram: u64,
    pub disk: u64,
}

/// What the ranks said in the life that was ended.
#[derive(Debug, Default)]
pub struct Said {
    pub ram: BTreeSet<u64>,
    pub disk: BTreeSet<u64>,
    /// The step that each rank resumed from; less than all ranks where some had not come so far.
    pub resumed: Vec<u64>,
    /// Ranks that are past their restart.
    pub begun: BTreeSet<u32>,
    /// `kind: text`, of any rank.
    pub events: Vec<String>,
}

impl Said {
    pub fn of(lines: Vec<(u32, String, String)>) -> Self {
        let mut said = Self::default();
        for (rank, word, rest) in lines {
            let number = || rest.parse::<u64>().expect("a step");
            match word.as_str() {
                "ram" => drop(said.ram.insert(number())),
                "disk" => drop(said.disk.insert(number())),
                "resumed" => {
                    said.resumed.push(number());
                    said.begun.insert(rank);
                }
                "event" => said.events.push(format!("rank {rank}: {rest}")),
                "closed" => {}
                other => panic!("{other:?} in the log of rank {rank}"),
            }
        }
        said
    }
}

/// The step that a restart resumes from, with RAM as it is now; 0: none. Everything that any tier
/// shows is whole, what was promised is there, and the step's bits are right on all ranks.
pub fn resumes_from(places: &Places, promised: Promised) -> u64 {
    let Some(both) = open(places, true) else {
        assert_eq!((promised.ram, promised.disk), (0, 0), "nothing is left");
        return 0;
    };
    everything_is_whole(&both);
    let disk =
        open(places, false).and_then(|disk| newest(&disk, WORLD)).map_or(0, |key| key.step.0);
    assert!(disk >= promised.disk, "{promised:?}, but disk alone has step {disk}");
    let Some(key) = newest(&both, WORLD) else {
        assert_eq!((promised.ram, promised.disk), (0, 0), "there is no checkpoint");
        return 0;
    };
    let step = key.step.0;
    assert!(step >= promised.ram.max(promised.disk), "{promised:?}, but {key} is the newest");
    for rank in 0..WORLD {
        let shard = both.state(&key, Rank(rank)).expect("shard");
        let report = read_whole(&shard, &SMALL).expect("read");
        assert!(report.damaged.is_empty(), "{key}, rank {rank}: {:?}", report.damaged);
    }
    step
}

/// What one life of the job, under its own settings, leaves behind.
pub fn life_kept_its_settings(places: &Places, settings: &Settings, said: &Said) {
    let Some(disk) = open(places, false) else { return };
    let (found, _, lineage) = disk.survey().expect("survey");
    let kept: BTreeSet<u64> = found
        .iter()
        .filter(|f| f.sealed() && !f.deleted() && lineage.contains(&f.key))
        .map(|f| f.key.step.0)
        .collect();
    let least = settings.keep_last.min(said.disk.len());
    assert!(kept.len() >= least, "keep_last, but only {kept:?} of {:?} are on disk", said.disk);
    for step in &said.disk {
        let due = settings.keep_every.is_some_and(|every| step % every == 0);
        assert!(!due || kept.contains(step), "keep_every: step {step} is not among {kept:?}");
        assert!(step % settings.disk_every == 0, "step {step} was not due for disk");
    }
    // A slot is a file, wherever it lies.
    let slots: Vec<_> = files(places.ram())
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "slot" || e == "safetensors"))
        .collect();
    for rank in &said.begun {
        let own = |path: &&std::path::PathBuf| {
            path.file_name().unwrap().to_string_lossy().starts_with(&format!("rank-{rank:06}-"))
        };
        let own: Vec<_> = slots.iter().filter(own).collect();
        assert!(
            own.len() <= settings.slots,
            "{} slots, but rank {rank} has {own:#?}",
            settings.slots
        );
    }
}

/// `None` where there is no such tier yet.
fn open(places: &Places, ram: bool) -> Option<Reader> {
    let root = if ram { places.ram().to_path_buf() } else { places.ram().join("none") };
    match Reader::open(&places.destination(), Some(&root)) {
        Ok(reader) => Some(reader),
        Err(Error::NotFound { .. }) => None,
        Err(e) => panic!("{}", e.chain()),
    }
}
