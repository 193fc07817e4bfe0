//! Ranks that do not save: they follow the checkpoints of those that do, and restore from them.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // Tests.

mod common;

use std::{sync::atomic::Ordering, time::Duration};

use common::{Model, Places, SMALL, close, events, files, flip, gate::Gate, resume, train, wait};
use tierkeep::{
    ErrorKind,
    begin::Begin,
    checkpointer::{Checkpointer, SaveRequest},
    config::{Config, nearest_saver},
    manifest::Meta,
    save::{Level, Save},
    state::{State, value::Value},
    testing::hooked::{Hooked, Op},
    tier::TierKind,
};

fn config(places: &Places, rank: u32, world: u32, savers: &[u32]) -> Config {
    let mut config = places.config_of(rank, world);
    config.savers = savers.to_vec();
    config
}

fn open_all(places: &Places, world: u32, savers: &[u32]) -> Vec<Checkpointer> {
    let open = |rank| Checkpointer::open(config(places, rank, world, savers)).unwrap();
    (0..world).map(open).collect()
}

/// Begins on every rank, the leader first: the others wait for it. All at the same step.
fn resume_all(ranks: &[Checkpointer]) -> u64 {
    let (lead, others): (Vec<_>, Vec<_>) = ranks.iter().partition(|c| c.config().leads());
    let step = resume(lead[0], &SMALL).unwrap();
    for ckpt in others {
        assert_eq!(resume(ckpt, &SMALL).unwrap(), step);
    }
    step
}

/// Every rank saves `step`, in this order; rank by rank, what each got.
fn save_all(ranks: &[Checkpointer], step: u64) -> Vec<Save> {
    let save = |c: &Checkpointer| Model::at(c.config().rank, &SMALL, step).save(c, step).unwrap();
    ranks.iter().map(save).collect()
}

/// What a rank that does not save gives: no state.
fn follow(ckpt: &Checkpointer, step: u64) -> Save {
    let request = SaveRequest {
        step,
        state: State { tree: Value::None, tensors: vec![] },
        meta: Meta::default(),
        overlap: false,
        bring: None,
        skip_if_busy: false,
        keep_alive: Box::new(()),
        interrupted: None,
    };
    // SAFETY: no memory is named.
    unsafe { ckpt.save(request) }.unwrap()
}

fn failure(save: &Save, level: Level) -> String {
    save.poll(level, false, Duration::from_secs(30)).unwrap_err().to_string()
}

#[test]
fn every_rank_follows_and_restores_what_the_nearest_saver_below_saved() {
    let places = Places::new();
    for savers in [&[0][..], &[1, 3], &[4]] {
        let places = if savers == [0] { &places } else { &Places::new() };
        let ranks = open_all(places, 5, savers);
        assert_eq!(resume_all(&ranks), 0);
        for step in 1..=3 {
            for save in save_all(&ranks, step) {
                wait(&save, Level::Ram);
                wait(&save, Level::Disk);
            }
        }
        for (rank, ckpt) in (0..).zip(&ranks) {
            let config = ckpt.config();
            assert_eq!(config.saves(), savers.contains(&rank));
            let nearest = savers.iter().rev().find(|s| **s <= rank).unwrap_or(&savers[0]);
            assert_eq!(nearest_saver(&config.savers, config.rank), *nearest);
        }
        let in_ram = files(&ranks[0].config().ram_dir());
        let in_ram: Vec<_> = in_ram.iter().map(|p| p.to_string_lossy()).collect();
        let of_a_saver = |p: &str| savers.iter().any(|s| p.contains(&format!("rank-{s:06}")));
        let mut shards = in_ram.iter().filter(|p| p.contains("rank-"));
        assert!(shards.clone().count() > 0 && shards.all(|p| of_a_saver(p)), "{in_ram:?}");
        drop(ranks);
        // In RAM, then on disk; `resume` checks every bit.
        for wiped in [false, true] {
            if wiped {
                places.wipe_ram();
            }
            let ranks = open_all(places, 5, savers);
            assert_eq!(resume_all(&ranks), 3);
            assert!(ranks.iter().all(|ckpt| ckpt.attempt() == ranks[0].attempt()));
        }
    }
}

#[test]
fn a_wait_for_ranks_that_have_not_saved_names_them() {
    let places = Places::new();
    let ranks = open_all(&places, 3, &[0, 1]);
    for ckpt in &ranks {
        resume(ckpt, &SMALL).unwrap();
    }
    let save = follow(&ranks[2], 1);
    wait(&save, Level::Staged);
    // Until it has looked.
    while save.waiting_for().is_empty() {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!save.poll(Level::Ram, false, Duration::ZERO).unwrap());
    assert_eq!(save.waiting_for(), "ranks 0, 1");
    Model::at(0, &SMALL, 1).save(&ranks[0], 1).unwrap();
    while save.waiting_for() != "rank 1" {
        std::thread::sleep(Duration::from_millis(1));
    }
    // It never does: when a newer step is complete, that is told, and the newer one is not harmed.
    let newer = save_all(&ranks, 2);
    newer.iter().for_each(|save| wait(save, Level::Disk));
    let why = failure(&save, Level::Ram);
    assert!(why.contains("step 1 was not saved: rank 1 has no shard of it left"), "{why}");
    assert!(why.contains("step 2 is complete"), "{why}");
    drop(newer);
    ranks.iter().for_each(close);
}

#[test]
fn what_is_skipped_or_given_up_fails_the_same_way_on_a_rank_that_does_not_save() {
    let places = Places::new();
    let gate = Gate::default();
    let lead = config(&places, 0, 2, &[0]);
    let lead = Checkpointer::open_wrapped(lead, &|tier| {
        // The disk takes nothing of step 1.
        let tier = std::sync::Arc::new(Hooked::before(tier, |call| {
            let first = call.name.contains("00001/") && call.kind == TierKind::Disk;
            if first && call.op == Op::Put { Err(common::gate::broken("full")) } else { Ok(()) }
        }));
        gate.around(tier)
    })
    .unwrap();
    let other = Checkpointer::open(config(&places, 1, 2, &[0])).unwrap();
    for ckpt in [&lead, &other] {
        resume(ckpt, &SMALL).unwrap();
    }
    let (mine, theirs) = (Model::at(0, &SMALL, 1).save(&lead, 1).unwrap(), follow(&other, 1));
    wait(&theirs, Level::Ram);
    let why = [failure(&mine, Level::Disk), failure(&theirs, Level::Disk)];
    assert!(why.iter().all(|w| w.contains("it was given up for disk: rank 0")), "{why:?}");
    // With every slot in use, a step is skipped: told as that, not as a failure.
    gate.slow.store(true, Ordering::SeqCst);
    let mut step = 1;
    let skipped = loop {
        step += 1;
        assert!(step < 1000, "the disk does not stand still");
        let (model, followed) = (Model::at(0, &SMALL, step), follow(&other, step));
        let request = SaveRequest {
            step,
            state: model.state(step),
            meta: Meta::default(),
            overlap: false,
            bring: None,
            skip_if_busy: true,
            keep_alive: Box::new(()),
            interrupted: None,
        };
        // SAFETY: "now": the memory is read only during the call.
        let save = unsafe { lead.save(request) }.unwrap();
        if save.progress().skipped.is_some() {
            break followed;
        }
        wait(&followed, Level::Ram);
    };
    assert!(failure(&skipped, Level::Ram).contains("every slot in use"));
    assert!(skipped.progress().skipped.is_some() && skipped.progress().error.is_none());
    gate.slow.store(false, Ordering::SeqCst);
    close(&lead);
    close(&other);
    let told = events(&other);
    assert!(told.iter().all(|e| !e.contains("disk_failed")), "told twice: {told:?}");
}

#[test]
fn a_rank_that_does_not_save_neither_repairs_nor_marks_another_ranks_shard() {
    let places = Places::new();
    let ranks = open_all(&places, 2, &[0]);
    for ckpt in &ranks {
        resume(ckpt, &SMALL).unwrap();
    }
    train(&ranks[0], &SMALL, [1]);
    let ram = ranks[0].config().ram_dir();
    drop(ranks);
    let payload = |root: &std::path::Path| {
        let is_it = |p: &std::path::PathBuf| {
            let text = p.to_string_lossy();
            text.starts_with("000") && text.ends_with(".safetensors")
        };
        root.join(files(root).into_iter().find(is_it).unwrap())
    };
    let (in_ram, on_disk) = (payload(&ram), payload(&places.destination()));
    flip(&in_ram, 8 * 20_000);
    let damaged = std::fs::read(&in_ram).unwrap();

    let ranks = open_all(&places, 2, &[0]);
    assert!(ranks[0].begin(&Begin::default()).unwrap().is_some()); // It has not read yet.
    assert_eq!(resume(&ranks[1], &SMALL).unwrap(), 1);
    assert!(std::fs::read(&in_ram).unwrap() == damaged, "it was mended by the wrong rank");
    flip(&on_disk, 8 * 20_000);
    let back = Begin { rollback: true, ..Begin::default() };
    assert!(ranks[0].begin(&back).unwrap().is_some());
    let error = resume(&ranks[1], &SMALL).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains("rank 0: no tier has a good copy"), "{error}");
    let marks = places.destination().join("bad");
    assert!(files(&marks).is_empty(), "{:?}", files(&marks));
    // The rank whose shard it is does mark it.
    assert_eq!(resume(&ranks[0], &SMALL).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(files(&marks).len(), 1);
}

#[test]
fn a_job_that_is_asked_to_stop_stops_on_ranks_that_do_not_save_too() {
    let places = Places::new();
    let open = |rank| {
        let mut config = config(&places, rank, 3, &[0]);
        config.disk_every = 1000;
        Checkpointer::open(config).unwrap()
    };
    let ranks: Vec<_> = (0..3).map(open).collect();
    for ckpt in &ranks {
        resume(ckpt, &SMALL).unwrap();
    }
    let mut last = Vec::new();
    for step in 1..=8 {
        if step % 2 == 0 {
            last = save_all(&ranks, step);
            last.iter().for_each(|save| wait(save, Level::Ram));
        }
        for (rank, ckpt) in (0..).zip(&ranks) {
            // Rank 2 gets the signal in step 3.
            let stops = ckpt.stop_requested(step, 2, rank == 2 && step >= 3);
            assert_eq!(stops, step >= 8, "rank {rank}, step {step}");
        }
    }
    last.iter().for_each(|save| wait(save, Level::Disk));
    ranks.iter().for_each(close);
    assert_eq!(resume(&open(0), &SMALL).unwrap(), 8);
}

#[test]
fn the_number_of_ranks_that_do_not_save_may_change_and_who_saves_too() {
    let places = Places::new();
    let ckpt = places.open();
    resume(&ckpt, &SMALL).unwrap();
    train(&ckpt, &SMALL, [1]);
    drop(ckpt);
    let ranks = open_all(&places, 3, &[0]);
    for ckpt in &ranks {
        assert_eq!(resume(ckpt, &SMALL).unwrap(), 1);
    }
    let other = Checkpointer::open(config(&places, 2, 3, &[0, 1])).unwrap();
    let error = resume(&other, &SMALL).unwrap_err();
    assert!(
        error.to_string().contains("rank 0 says that ranks [0] save, rank 2 says [0, 1]"),
        "{error}"
    );
    drop((ranks, other));
    let ranks = open_all(&places, 2, &[1]);
    assert_eq!(resume(&ranks[1], &SMALL).unwrap(), 1);
    let told = events(&ranks[1]);
    let text = "was saved by 1 ranks (rank 0), this job saves from 1 (rank 1)";
    assert!(told.iter().any(|e| e.contains(text)), "{told:?}");
}

#[test]
fn the_memory_of_a_rank_that_saves_no_more_is_given_back_once_it_is_not_needed() {
    let places = Places::new();
    let open = |savers: &[u32]| -> Vec<Checkpointer> {
        let of = |rank| {
            let mut config = config(&places, rank, 2, savers);
            config.disk_every = 1000; // It stays in RAM.
            Checkpointer::open(config).unwrap()
        };
        (0..2).map(of).collect()
    };
    let ranks = open(&[0, 1]);
    assert_eq!(resume_all(&ranks), 0);
    save_all(&ranks, 1).iter().for_each(|save| wait(save, Level::Ram));
    let ram = ranks[0].config().ram_dir();
    drop(ranks);
    let of_rank_1 = || files(&ram).iter().any(|p| p.to_string_lossy().contains("rank-000001"));
    for _ in 0..2 {
        let ranks = open(&[0]);
        assert_eq!(resume_all(&ranks), 1, "rank 1's shard of it is nowhere else");
        assert!(of_rank_1());
    }
    let ranks = open(&[0]);
    let fresh = Begin { fresh: true, ..Begin::default() };
    for ckpt in &ranks {
        assert!(ckpt.begin(&fresh).unwrap().is_none());
    }
    assert!(!of_rank_1(), "{:?}", files(&ram));
}

/// It begins while the saving ranks carry a step: that is theirs to wait for.
#[test]
fn a_rank_that_does_not_save_and_begins_late_closes() {
    let places = Places::new();
    let ranks = open_all(&places, 2, &[0]);
    assert_eq!(resume(&ranks[0], &SMALL).unwrap(), 0);
    let attempt = ranks[0].attempt().unwrap().attempt.dir();
    let decisions = places.destination().join("_decisions").join(attempt);
    std::fs::create_dir_all(&decisions).unwrap();
    let carried = decisions.join(format!("carry-{:020}", 5));
    std::os::unix::fs::symlink("carry", carried).unwrap();
    assert_eq!(resume(&ranks[1], &SMALL).unwrap(), 0);
    assert!(ranks[1].close(Duration::from_secs(5), false).unwrap(), "it waits for itself");
}

#[test]
fn who_saves_is_checked() {
    let places = Places::new();
    let refused = |rank, world, savers: &[u32]| {
        let error = Checkpointer::open(config(&places, rank, world, savers)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        error.to_string()
    };
    assert_eq!(refused(0, 2, &[]), "savers = []: ranks must be rising, and at least one");
    assert_eq!(refused(0, 2, &[0, 0]), "savers = [0, 0]: ranks must be rising, and at least one");
    assert_eq!(refused(0, 2, &[0, 2]), "savers = [0, 2]: there is no rank 2, the job has 2 ranks");
    assert_eq!(refused(2, 2, &[0]), "rank = 2: the job has 2 ranks, counted from 0");
}
