//! Tensors that several ranks hold alike: stored once, compared at every save, back on every rank.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // Tests.

mod common;

use std::{collections::BTreeMap, time::Duration};

use common::{Model, Places, close, events, files, flip, overlap_save, verify_all, wait};
use tierkeep::{
    ErrorKind,
    begin::Begin,
    checkpointer::Checkpointer,
    config::Config,
    names::{CheckpointKey, Rank},
    reader::Reader,
    restore::{copy_out::copy_out, read::Restorable, survey::Reach},
    save::{Level, Save},
    state::{Memory, replicas::Rule},
    tier::{TierKind, object::address::Options},
};

/// Six tensors: of more than a chunk, of odd lengths, of no bytes.
const SIZES: [usize; 6] = [(4 << 20) + 24, 40_000, 13, 0, 3_000_000, 4096];
/// What every rank's model is a model of: all have the same bytes.
const ALIKE: u32 = 0;

fn rule(pattern: &str, ranks: &[u32]) -> Rule {
    Rule { pattern: pattern.into(), ranks: ranks.into() }
}

fn config(places: &Places, rank: u32, world: u32, rules: &[Rule]) -> Config {
    let mut config = places.config_of(rank, world);
    config.replicated = rules.into();
    config
}

fn open(places: &Places, world: u32, rules: &[Rule]) -> Vec<Checkpointer> {
    let open = |rank| Checkpointer::open(config(places, rank, world, rules)).unwrap();
    (0..world).map(open).collect()
}

fn begin(ranks: &[Checkpointer]) -> Vec<Option<Restorable>> {
    ranks.iter().map(|ckpt| ckpt.begin(&Begin::default()).unwrap()).collect()
}

/// All ranks save the model of `of(rank)`, then wait.
fn save(ranks: &[Checkpointer], step: u64, of: impl Fn(u32) -> u32) -> Vec<Save> {
    let save = |c: &Checkpointer| Model::at(of(c.config().rank), &SIZES, step).save(c, step);
    ranks.iter().map(|c| save(c).unwrap()).collect()
}

fn read(found: &Restorable, of: u32) -> Vec<String> {
    let mut model = Model::new(of, &SIZES);
    let report = model.read(found).unwrap();
    assert!(model.is_at(found.step().0), "{}: restored bits differ", found.rank);
    report.damaged
}

/// For each tensor, the ranks whose payload has it.
fn stored(places: &Places, key: &CheckpointKey, ranks: u32) -> BTreeMap<String, Vec<u32>> {
    let reader = Reader::open(&places.destination(), Some(places.ram())).unwrap();
    let mut stored = BTreeMap::<String, Vec<u32>>::new();
    for rank in 0..ranks {
        let shard = reader.shard(key, Rank(rank)).unwrap();
        for tensor in &shard.manifest().tensors {
            stored.entry(tensor.name.clone()).or_default().push(rank);
        }
    }
    stored
}

fn failure(save: &Save, level: Level) -> String {
    save.poll(level, false, Duration::from_secs(30)).unwrap_err().to_string()
}

#[test]
fn what_ranks_hold_alike_is_stored_once_and_comes_back_on_every_rank() {
    let places = Places::new();
    let rules = [rule("*", &[0, 1, 2])];
    let ranks = open(&places, 3, &rules);
    assert!(begin(&ranks).iter().all(Option::is_none));
    for step in 1..=3 {
        for save in save(&ranks, step, |_| ALIKE) {
            wait(&save, Level::Disk);
        }
    }
    drop(ranks);
    let mut tiers = vec![TierKind::Ram, TierKind::Disk];
    while let Some(tier) = tiers.first().copied() {
        let ranks = open(&places, 3, &rules);
        for found in begin(&ranks).into_iter().map(Option::unwrap) {
            assert_eq!(found.step().0, 3);
            assert_eq!(found.tensors().count(), SIZES.len());
            let mut model = Model::new(ALIKE, &SIZES);
            assert_eq!(model.read(&found).unwrap().tier, tier);
            assert!(model.is_at(3), "{}", found.rank);
        }
        let key = begin_key(&ranks[0]);
        let stored = stored(&places, &key, 3);
        assert_eq!(stored.len(), SIZES.len());
        assert!(stored.values().all(|ranks| ranks.len() == 1), "{stored:?}");
        // The two large ones lie on two ranks, the others on the third.
        assert_ne!(stored["t0"], stored["t4"]);
        assert!(stored["t1"] != stored["t0"] && stored["t1"] != stored["t4"], "{stored:?}");
        assert_eq!(verify_all(&places), Vec::<String>::new());
        drop(ranks);
        places.wipe_ram();
        tiers.remove(0);
    }
}

fn begin_key(ckpt: &Checkpointer) -> CheckpointKey {
    ckpt.attempt().unwrap().parent.unwrap().key()
}

#[test]
fn a_difference_between_ranks_is_an_error_that_names_tensor_and_ranks() {
    for overlap in [false, true] {
        let places = Places::new();
        let rules = [rule("*", &[0, 1, 2])];
        let ranks = open(&places, 3, &rules);
        begin(&ranks);
        for save in save(&ranks, 1, |_| ALIKE) {
            wait(&save, Level::Disk);
        }
        let mut models: Vec<_> = (0..3).map(|_| Model::at(ALIKE, &SIZES, 2)).collect();
        models[1].tensors[4][2_999_999] ^= 1;
        let pairs = models.iter().zip(&ranks);
        let saves: Vec<_> = pairs
            .map(|(m, c)| if overlap { overlap_save(m, c, 2) } else { m.save(c, 2).unwrap() })
            .collect();
        let why = "step 2 was not saved: replicated tensors differ between the ranks: t4 has other \
                   bytes on rank 1 than on ranks 0, 2";
        for (save, ckpt) in saves.iter().zip(&ranks) {
            assert_eq!(failure(save, Level::Ram), why);
            assert_eq!(failure(save, Level::Disk), why);
            let told = events(ckpt);
            assert!(told.iter().any(|e| e == &format!("incomplete: {why}")), "{told:?}");
        }
        // With the job down, as it lies there.
        let reader = Reader::open(&places.destination(), Some(places.ram())).unwrap();
        let steps = reader.steps().unwrap();
        let Reach::Broken(told) = &steps.last().unwrap().reach else { panic!("{steps:?}") };
        assert_eq!(steps.last().unwrap().key.step.0, 2);
        assert!(why.ends_with(&told[0]), "{told:?}");
        drop(ranks);
        let ranks = open(&places, 3, &rules);
        for found in begin(&ranks).into_iter().map(Option::unwrap) {
            assert_eq!(found.step().0, 1);
            read(&found, ALIKE);
        }
        assert!(ranks[0].attempt().unwrap().passed_over[0].contains("t4 has other bytes"));
        for save in save(&ranks, 2, |_| ALIKE) {
            wait(&save, Level::Disk);
        }
        ranks.iter().for_each(close);
    }
}

#[test]
fn groups_patterns_and_what_a_rank_has_alone_keep_apart() {
    let places = Places::new();
    // Two groups of two; t5 is each rank's own.
    let rules = |rank: u32| match rank {
        0 | 1 => [rule("t5", &[]), rule("*", &[0, 1])],
        _ => [rule("t5", &[]), rule("*", &[2, 3])],
    };
    let open = || -> Vec<Checkpointer> {
        (0..4).map(|r| Checkpointer::open(config(&places, r, 4, &rules(r))).unwrap()).collect()
    };
    let at = |rank: u32, step| {
        let mut model = Model::at(rank / 2, &SIZES, step);
        model.tensors[5] = Model::at(100 + rank, &SIZES, step).tensors.swap_remove(5);
        model
    };
    let ranks = open();
    begin(&ranks);
    let models: Vec<_> = (0..4).map(|rank| at(rank, 1)).collect();
    let saves: Vec<_> = models.iter().zip(&ranks).map(|(m, c)| m.save(c, 1).unwrap()).collect();
    saves.iter().for_each(|save| wait(save, Level::Disk));
    drop(ranks);
    for wiped in [false, true] {
        if wiped {
            places.wipe_ram();
        }
        let ranks = open();
        for (rank, found) in (0..).zip(begin(&ranks)) {
            let mut model = Model::new(0, &SIZES);
            model.read(&found.unwrap()).unwrap();
            assert!(model.tensors == at(rank, 1).tensors, "rank {rank}");
        }
        let stored = stored(&places, &begin_key(&ranks[0]), 4);
        for (name, by) in stored {
            let pairs: Vec<u32> = by.iter().map(|rank| rank / 2).collect();
            let expected: &[u32] = if name == "t5" { &[0, 0, 1, 1] } else { &[0, 1] };
            assert_eq!(pairs, expected, "{name} on {by:?}");
        }
    }
}

#[test]
fn a_damaged_copy_of_what_another_rank_stores_is_told_and_another_is_read() {
    let places = Places::new();
    let rules = [rule("*", &[0, 1])];
    let ranks = open(&places, 2, &rules);
    begin(&ranks);
    for save in save(&ranks, 1, |_| ALIKE) {
        wait(&save, Level::Disk);
    }
    let ram = ranks[0].config().ram_dir();
    drop(ranks);
    // t0, the largest, is rank 0's.
    let in_ram = files(&ram);
    let of_leader = |p: &&std::path::PathBuf| {
        let name = p.to_string_lossy().into_owned();
        name.contains("rank-000000-") && name.ends_with(".safetensors")
    };
    flip(&ram.join(in_ram.iter().find(of_leader).unwrap()), 30_000_000);
    let ranks = open(&places, 2, &rules);
    let found: Vec<_> = begin(&ranks).into_iter().map(Option::unwrap).collect();
    let told = read(&found[1], ALIKE);
    assert!(told.len() == 1 && told[0].contains("rank-000000-"), "{told:?}");
    let told = events(&ranks[1]);
    assert!(told.iter().any(|e| e.starts_with("damaged_copy: ")), "{told:?}");
    assert!(!told.iter().any(|e| e.starts_with("repaired: ")), "mended by another: {told:?}");
    assert_eq!(read(&found[0], ALIKE).len(), 1);
    // An agent mends it, and says so a moment later.
    let observer = ranks[0].observer();
    let told = || observer.next(Duration::from_secs(30)).unwrap().expect("no word of a repair");
    while told().kind != "repaired" {}
    assert_eq!(verify_all(&places), Vec::<String>::new());
}

#[test]
fn a_rank_that_does_not_save_gets_everything_too_and_a_copied_out_checkpoint_is_whole() {
    let places = Places::new();
    let rules = [rule("*", &[0, 1])];
    let open = |places: &Places| -> Vec<Checkpointer> {
        let config = |rank| Config { savers: vec![0, 1], ..config(places, rank, 3, &rules) };
        (0..3).map(|rank| Checkpointer::open(config(rank)).unwrap()).collect()
    };
    let ranks = open(&places);
    begin(&ranks);
    for save in save(&ranks, 1, |_| ALIKE) {
        wait(&save, Level::Disk);
    }
    drop(ranks);
    let ranks = open(&places);
    let found = begin(&ranks).pop().unwrap().unwrap();
    assert_eq!((found.rank, read(&found, ALIKE)), (Rank(1), vec![]));
    drop(ranks);
    let elsewhere = Places::new();
    let reader = Reader::open(&places.destination(), Some(places.ram())).unwrap();
    let key = found.key;
    let options = Options::new();
    copy_out(
        &reader,
        &key,
        &[0, 1],
        &elsewhere.destination(),
        Some(elsewhere.ram()),
        &options,
        &|_| {},
    )
    .unwrap();
    for found in begin(&open(&elsewhere)).into_iter().map(Option::unwrap) {
        read(&found, ALIKE);
    }
}

#[test]
fn what_ranks_say_must_be_the_same() {
    let places = Places::new();
    let error = |rules: &[Rule], rank| {
        let error = config(&places, rank, 2, rules).check().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        error.to_string()
    };
    assert!(error(&[rule("*", &[0, 5])], 0).contains("\"*\" over ranks [0, 5]"));
    assert!(error(&[rule("*", &[1, 0])], 0).contains("rising"));
    assert!(error(&[rule("a", &[0, 1]), rule("*", &[3])], 1).contains("\"*\" over ranks [3]"));

    // One rank declares, the other does not: found at the start, whichever it is.
    for (leader, other) in [(true, false), (false, true)] {
        let places = Places::new();
        let rules = |declares: bool| if declares { vec![rule("*", &[0, 1])] } else { vec![] };
        let lead = Checkpointer::open(config(&places, 0, 2, &rules(leader))).unwrap();
        let rank = Checkpointer::open(config(&places, 1, 2, &rules(other))).unwrap();
        lead.begin(&Begin::default()).unwrap();
        let error = rank.begin(&Begin::default()).unwrap_err().to_string();
        let (who, who_not) = if leader { (0, 1) } else { (1, 0) };
        assert_eq!(
            error,
            format!(
                "rank {who} declares replicated tensors, rank {who_not} does not: all ranks say \
                 the same"
            )
        );
    }

    // They declare different ones: found at the first save.
    let lead = Checkpointer::open(config(&places, 0, 2, &[rule("*", &[0, 1])])).unwrap();
    let rules = [rule("t2", &[]), rule("*", &[0, 1])];
    let ranks = [lead, Checkpointer::open(config(&places, 1, 2, &rules)).unwrap()];
    begin(&ranks);
    for save in save(&ranks, 1, |_| ALIKE) {
        let why = failure(&save, Level::Ram);
        assert!(
            why.contains("t2 is said to be the same on ranks 0, 1, but not by rank 1"),
            "{why}"
        );
    }
    // Another shape on one rank: told, and not that the shares of the others shift by it.
    let small = Model::at(ALIKE, &[13, 40_000, 13, 0, 5, 4096], 2);
    let saves = [
        Model::at(ALIKE, &SIZES, 2).save(&ranks[0], 2).unwrap(),
        small.save(&ranks[1], 2).unwrap(),
    ];
    let why = failure(&saves[0], Level::Ram);
    assert!(why.contains("t2 is said to be the same on ranks 0, 1, but not by rank 1; t0 is U8"));
    assert!(why.contains("t0 is U8 [4194328] on rank 0 and U8 [13] on rank 1"), "{why}");
    assert!(!why.contains("is left to"), "{why}");
}

#[test]
fn a_damaged_manifest_in_ram_costs_its_step_and_no_other() {
    let places = Places::new();
    let rules = [rule("*", &[0, 1])];
    let ranks = open(&places, 2, &rules);
    begin(&ranks);
    for save in save(&ranks, 1, |_| ALIKE) {
        wait(&save, Level::Disk);
    }
    let first = Model::at(ALIKE, &SIZES, 2).save(&ranks[0], 2).unwrap();
    let ram = ranks[0].config().ram_dir();
    let manifest = |p: &&std::path::PathBuf| {
        let name = p.to_string_lossy().into_owned();
        name.starts_with(&format!("{:020}", 2)) && name.ends_with("rank-000000.json")
    };
    flip(&ram.join(files(&ram).iter().find(manifest).unwrap()), 400);
    // Its words say the same, so nobody reads it: it was good when it was compared.
    let second = Model::at(ALIKE, &SIZES, 2).save(&ranks[1], 2).unwrap();
    for save in [first, second] {
        wait(&save, Level::Ram);
    }
    // Without its words, the manifest is read.
    let models = [3, 3].map(|step| Model::at(ALIKE, &SIZES, step));
    let first = models[0].save(&ranks[0], 3).unwrap();
    let manifest = |p: &&std::path::PathBuf| {
        let name = p.to_string_lossy().into_owned();
        name.starts_with(&format!("{:020}", 3)) && name.ends_with("rank-000000.json")
    };
    flip(&ram.join(files(&ram).iter().find(manifest).unwrap()), 400);
    let decisions = places.destination().join("_decisions");
    let words = files(&decisions)
        .into_iter()
        .find(|p| p.to_string_lossy().ends_with(&format!("alike-{:020}-0", 3)));
    std::fs::remove_file(decisions.join(words.unwrap())).unwrap();
    let second = models[1].save(&ranks[1], 3).unwrap();
    for save in [&first, &second] {
        assert!(failure(save, Level::Ram).contains("rank-000000.json is damaged"));
    }
    for step in 4..=6 {
        for save in save(&ranks, step, |_| ALIKE) {
            wait(&save, Level::Disk);
        }
    }
    ranks.iter().for_each(close);
}

#[test]
fn what_the_storing_rank_does_not_read_is_marked_by_the_rank_that_cannot_restore() {
    let places = Places::new();
    let rules = [rule("*", &[0, 1])];
    let ranks = open(&places, 2, &rules);
    begin(&ranks);
    for step in 1..=2 {
        for save in save(&ranks, step, |_| ALIKE) {
            wait(&save, Level::Disk);
        }
    }
    drop(ranks);
    places.wipe_ram();
    let of_leader = |p: &&std::path::PathBuf| {
        let name = p.to_string_lossy().into_owned();
        name.starts_with(&format!("{:020}", 2)) && name.contains("rank-000000-")
    };
    let payload = files(&places.destination()).iter().find(of_leader).unwrap().clone();
    flip(&places.destination().join(payload), 30_000_000);
    let ranks = open(&places, 2, &rules);
    let found = begin(&ranks).pop().unwrap().unwrap();
    let error = Model::new(ALIKE, &SIZES).read(&found).unwrap_err();
    assert!(error.to_string().starts_with("step 2, rank 0: no tier has a good copy"), "{error}");
    drop(ranks);
    for found in begin(&open(&places, 2, &rules)).into_iter().map(Option::unwrap) {
        assert_eq!(found.step().0, 1);
        read(&found, ALIKE);
    }
}

#[test]
fn a_tensor_on_a_device_cannot_be_declared_replicated() {
    let places = Places::new();
    let ranks = open(&places, 2, &[rule("*", &[0, 1])]);
    begin(&ranks);
    let model = Model::at(ALIKE, &SIZES, 1);
    let mut request = model.request(1);
    for tensor in &mut request.state.tensors {
        tensor.memory = Memory::InSlot;
    }
    // On every rank, whether it stores the tensor or not, and before the first save.
    for ckpt in &ranks {
        let error = ckpt.prepare(&request.state.tensors).unwrap_err();
        assert!(error.to_string().contains("lies on a device"), "{error}");
    }
    // SAFETY: no memory is named.
    let error = unsafe { ranks[0].save(request) }.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("lies on a device"), "{error}");
}

#[test]
fn a_rank_whose_words_cannot_be_recorded_publishes_nothing() {
    let places = Places::new();
    let ranks = open(&places, 2, &[rule("*", &[0, 1])]);
    begin(&ranks);
    let decisions = places.destination().join("_decisions");
    for save in save(&ranks, 1, |_| ALIKE) {
        wait(&save, Level::Disk);
    }
    let attempt = std::fs::read_dir(&decisions).unwrap().next().unwrap().unwrap().path();
    // What stands there is not this rank's, and does not go.
    std::fs::create_dir(attempt.join(format!("alike-{:020}-0", 2))).unwrap();
    let saved = Model::at(ALIKE, &SIZES, 2).save(&ranks[0], 2).unwrap();
    assert!(failure(&saved, Level::Ram).contains("alike-"), "{saved:?}");
    let in_ram = files(&ranks[0].config().ram_dir());
    let of_step = |p: &&std::path::PathBuf| p.starts_with(format!("{:020}", 2));
    assert_eq!(in_ram.iter().find(of_step), None);
    for save in save(&ranks, 3, |_| ALIKE) {
        wait(&save, Level::Disk);
    }
}
