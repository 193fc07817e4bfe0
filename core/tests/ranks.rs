//! Several ranks, no barrier: what is global is the same on all of them.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout)] // Tests.

mod common;

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use common::{Model, Places, SMALL, close, events, files, gate::Gate, resume, train, wait};
use tierkeep::{
    ErrorKind,
    begin::Begin,
    checkpointer::{Checkpointer, SaveRequest},
    clock::SystemClock,
    manifest::Meta,
    names::{Rank, Step},
    reader::Reader,
    restore::decide::Wish,
    save::{Level, Save},
    testing::{
        faulty::{Fault, Faulty},
        hooked::Hooked,
    },
    tier::{Tier, TierKind},
};

fn save_or_skip(ckpt: &Checkpointer, model: &Model, step: u64) -> Save {
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
    unsafe { ckpt.save(request) }.unwrap()
}

fn saved_or_skipped(ckpt: &Checkpointer, rank: u32, steps: u64) -> BTreeSet<u64> {
    let mut saved = BTreeSet::new();
    for step in 1..=steps {
        let save = save_or_skip(ckpt, &Model::at(rank, &SMALL, step), step);
        if save.progress().skipped.is_none() {
            saved.insert(step);
        }
        // Ranks train at about the same speed, as ranks do; rank 1 lags a little.
        std::thread::sleep(Duration::from_millis(2 + u64::from(rank)));
    }
    saved
}

#[test]
fn what_is_saved_or_skipped_is_the_same_on_every_rank() {
    let places = Places::new();
    let saved: Vec<BTreeSet<u64>> = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..3)
            .map(|rank| {
                let places = &places;
                scope.spawn(move || {
                    let slow = |tier: Arc<dyn Tier>| -> Arc<dyn Tier> {
                        if tier.kind() == TierKind::Disk && rank == 2 {
                            let clock = Arc::new(SystemClock);
                            let stall = Fault::Stalls(Duration::from_millis(4), clock);
                            return Arc::new(Faulty::new(tier, stall));
                        }
                        tier
                    };
                    let config = places.config_of(rank, 3);
                    let ckpt = Checkpointer::open_wrapped(config, &slow).unwrap();
                    resume(&ckpt, &SMALL).unwrap();
                    let saved = saved_or_skipped(&ckpt, rank, 150);
                    assert!(ckpt.close(Duration::from_secs(20), false).unwrap());
                    saved
                })
            })
            .collect();
        ranks.into_iter().map(|r| r.join().unwrap()).collect()
    });
    assert!(saved[0].len() > 2 && saved[0].len() < 150, "nothing skipped, or all: {saved:?}");
    assert!(saved.iter().all(|s| *s == saved[0]), "{saved:?}");
    let reader = Reader::open(&places.destination(), Some(places.ram())).unwrap();
    for info in reader.steps().unwrap() {
        let ranks: BTreeSet<usize> =
            info.ranks.iter().filter(|(_, r)| !r.is_empty()).map(|(_, r)| r.len()).collect();
        assert_eq!(ranks, BTreeSet::from([3]), "a step of some ranks: {info:?}");
    }
}

#[test]
fn ranks_that_drift_apart_agree_on_what_was_complete_and_what_goes_to_disk() {
    let places = Places::new();
    let of_ranks: Vec<BTreeSet<u64>> = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..3)
            .map(|rank| {
                let mut config = places.config_of(rank, 3);
                (config.slots, config.disk_every) = (4, 4);
                scope.spawn(move || {
                    let ckpt = Checkpointer::open(config).unwrap();
                    resume(&ckpt, &SMALL).unwrap();
                    let save = |step| Model::at(rank, &SMALL, step).save(&ckpt, step).unwrap();
                    let saves: Vec<_> = (1..=150).map(save).collect();
                    let closed = ckpt.close(Duration::from_secs(20), false).unwrap();
                    assert!(closed, "rank {rank} waits for a step that no rank writes");
                    assert_eq!(events(&ckpt), [""; 0], "rank {rank}");
                    let has = |level| {
                        let has = |s: &&Save| s.poll(level, false, Duration::ZERO).is_ok_and(|r| r);
                        saves.iter().filter(has).map(Save::step).collect::<BTreeSet<_>>()
                    };
                    assert_eq!(has(Level::Ram), (1..=150).collect(), "rank {rank}");
                    has(Level::Disk)
                })
            })
            .collect();
        ranks.into_iter().map(|r| r.join().unwrap()).collect()
    });
    assert!(of_ranks[0].len() > 1 && of_ranks.iter().all(|s| *s == of_ranks[0]), "{of_ranks:?}");
}

#[test]
fn all_ranks_restore_the_step_that_was_decided_though_more_shards_appear_meanwhile() {
    let places = Places::new();
    let open = |rank| Checkpointer::open(places.config_of(rank, 2)).unwrap();
    let old = [open(0), open(1)];
    for (rank, ckpt) in (0..).zip(&old) {
        resume(ckpt, &SMALL).unwrap();
        Model::at(rank, &SMALL, 1).save(ckpt, 1).unwrap();
    }
    Model::at(0, &SMALL, 2).save(&old[0], 2).unwrap();
    // Rank 0 decides for step 1: step 2 lacks a shard. Before rank 1 looks, the shard appears.
    let [lead, late] = old;
    drop(lead);
    let new_lead = open(0);
    let found = new_lead.begin(&Begin::default()).unwrap().unwrap();
    assert_eq!(found.step(), Step(1));
    match Model::at(1, &SMALL, 2).save(&late, 2) {
        Ok(save) => assert!(save.poll(Level::Ram, true, Duration::from_secs(5)).unwrap()),
        Err(e) => assert_eq!(e.kind(), ErrorKind::Fenced), // It has seen the new attempt already.
    }
    drop(late);
    let other = open(1);
    assert_eq!(other.begin(&Begin::default()).unwrap().unwrap().step(), Step(1));
    assert_eq!(new_lead.attempt(), other.attempt());
}

#[test]
fn a_rank_that_joins_with_the_given_id_needs_no_lock_to_find_the_record() {
    let places = Places::new();
    let id = tierkeep::names::Id::random().unwrap();
    let open = |rank| {
        let mut config = places.config_of(rank, 2);
        config.attempt_id = Some(id);
        Checkpointer::open(config).unwrap()
    };
    let ranks = [open(0), open(1)];
    for ckpt in &ranks {
        assert_eq!(resume(ckpt, &SMALL).unwrap(), 0);
    }
    assert_eq!(ranks[0].attempt().unwrap().attempt.id, id);
    assert_eq!(ranks[0].attempt(), ranks[1].attempt());
}

#[test]
fn ranks_that_disagree_about_the_saver_set_are_refused() {
    let places = Places::new();
    let lead = Checkpointer::open(places.config_of(0, 2)).unwrap();
    resume(&lead, &SMALL).unwrap();
    let other = Checkpointer::open(places.config_of(1, 3)).unwrap();
    let error = resume(&other, &SMALL).unwrap_err();
    assert!(error.to_string().contains("says that ranks [0, 1] save"), "{error}");
}

#[test]
fn a_rollback_in_a_running_process_begins_a_new_attempt_on_every_rank() {
    let places = Places::new();
    let open = |rank| Checkpointer::open(places.config_of(rank, 2)).unwrap();
    let ranks = [open(0), open(1)];
    for ckpt in &ranks {
        resume(ckpt, &SMALL).unwrap();
    }
    for step in 1..=3 {
        let saves: Vec<_> = (0..)
            .zip(&ranks)
            .map(|(rank, ckpt)| Model::at(rank, &SMALL, step).save(ckpt, step).unwrap())
            .collect();
        saves.iter().for_each(|s| wait(s, Level::Disk));
    }
    let wish = Wish { step: Some(Step(2)), ..Wish::default() };
    let back = Begin { wish, rollback: true, ..Begin::default() };
    for (rank, ckpt) in (0..).zip(&ranks) {
        let found = ckpt.begin(&back).unwrap().unwrap();
        let mut model = Model::new(rank, &SMALL);
        model.read(&found).unwrap();
        assert!(found.step() == Step(2) && model.is_at(2));
    }
    assert_eq!(ranks[0].attempt(), ranks[1].attempt());
    assert_eq!(ranks[0].attempt().unwrap().attempt.number, 2);
    let saves: Vec<_> = (0..)
        .zip(&ranks)
        .map(|(rank, ckpt)| Model::at(rank, &SMALL, 3).save(ckpt, 3).unwrap())
        .collect();
    saves.iter().for_each(|s| wait(s, Level::Disk));
}

/// A `close` is not to raise for it: the new attempt has the step, and brings it to disk.
#[test]
fn what_the_disk_has_not_yet_when_a_newer_attempt_begins_is_not_called_closed() {
    let places = Places::new();
    let held = Arc::new(AtomicBool::new(false));
    let hold = |tier| {
        let held = held.clone();
        // What carries shards looks at nothing, so that it cannot see the newer attempt by itself.
        let wrapped = Hooked::before(tier, move |call| {
            let carries = || std::thread::current().name() != Some("begins");
            while call.kind == TierKind::Disk && carries() && held.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        });
        Arc::new(wrapped) as Arc<dyn Tier>
    };
    let ckpt = Checkpointer::open_wrapped(places.config_of(0, 1), &hold).unwrap();
    resume(&ckpt, &SMALL).unwrap();
    held.store(true, Ordering::SeqCst);
    let save = Model::at(0, &SMALL, 1).save(&ckpt, 1).unwrap();
    wait(&save, Level::Ram);
    std::thread::scope(|scope| {
        let begins = std::thread::Builder::new().name("begins".into());
        let again = begins.spawn_scoped(scope, || resume(&ckpt, &SMALL)).unwrap();
        let reached = save.poll(Level::Disk, false, Duration::from_secs(20));
        held.store(false, Ordering::SeqCst);
        let error = reached.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Fenced, "{error}");
        assert_eq!(again.join().unwrap().unwrap(), 1);
    });
    close(&ckpt);
    places.wipe_ram();
    assert_eq!(resume(&places.open(), &SMALL).unwrap(), 1);
}

#[test]
fn a_job_that_was_asked_to_stop_saves_its_last_step_to_disk_on_every_rank() {
    let places = Places::new();
    let open = |rank| {
        let mut config = places.config_of(rank, 2);
        config.disk_every = 1000;
        Checkpointer::open(config).unwrap()
    };
    let ranks = [open(0), open(1)];
    assert!(!ranks[1].stop_requested(0, 2, true), "nobody has begun");
    for ckpt in &ranks {
        resume(ckpt, &SMALL).unwrap();
    }
    let mut saves = Vec::new();
    for step in 1..=8 {
        for (rank, ckpt) in (0..).zip(&ranks) {
            if step % 2 == 0 {
                let save = Model::at(rank, &SMALL, step).save(ckpt, step).unwrap();
                wait(&save, Level::Staged);
                saves.push(save);
            }
            // Rank 1 gets the signal in step 3.
            let stops = ckpt.stop_requested(step, 2, rank == 1 && step >= 3);
            assert_eq!(stops, step >= 8, "rank {rank}, step {step}");
        }
    }
    // Step 8 is not a multiple of `disk_every`, and goes to disk all the same.
    let (others, last) = saves.split_at(saves.len() - 2);
    last.iter().for_each(|save| wait(save, Level::Disk));
    assert!(last.iter().all(Save::is_due_for_disk));
    assert!(!others.iter().any(Save::is_due_for_disk));
    ranks.iter().for_each(close);
    drop(ranks);

    let ranks = [open(0), open(1)];
    for ckpt in &ranks {
        assert_eq!(resume(ckpt, &SMALL).unwrap(), 8);
    }
    for step in 9..=20 {
        assert!(
            ranks.iter().all(|ckpt| !ckpt.stop_requested(step, 2, false)),
            "of the old attempt"
        );
    }
    let decisions = places.destination().join("_decisions");
    assert!(files(&decisions).iter().all(|p| !p.ends_with("stop")), "{:?}", files(&decisions));
}

#[test]
fn the_last_step_of_a_job_is_not_skipped_though_every_slot_is_in_use() {
    let places = Places::new();
    let gate = Gate::default();
    gate.slow.store(true, Ordering::SeqCst);
    let ckpt = Checkpointer::open_wrapped(places.config(), &|tier| gate.around(tier)).unwrap();
    resume(&ckpt, &SMALL).unwrap();
    let save = |step| save_or_skip(&ckpt, &Model::at(0, &SMALL, step), step);
    // One slot has the newest checkpoint, the other one is on its way to a disk that stands still.
    let mut step = 1;
    while save(step).progress().skipped.is_none() {
        step += 1;
        assert!(step < 1000, "the disk does not stand still");
    }
    assert!(ckpt.stop_requested(step, 1, true));
    std::thread::scope(|scope| {
        let last = scope.spawn(|| save(step + 1));
        std::thread::sleep(Duration::from_millis(50)); // It waits now, most likely.
        gate.slow.store(false, Ordering::SeqCst);
        let last = last.join().unwrap();
        assert_eq!(last.progress().skipped, None);
        wait(&last, Level::Disk);
    });
}

#[test]
fn a_stop_is_over_with_a_rollback() {
    let places = Places::new();
    let open = |rank| Checkpointer::open(places.config_of(rank, 2)).unwrap();
    let ranks = [open(0), open(1)];
    for ckpt in &ranks {
        resume(ckpt, &SMALL).unwrap();
    }
    for step in 1..=4 {
        let saves: Vec<_> = (0..)
            .zip(&ranks)
            .map(|(rank, ckpt)| Model::at(rank, &SMALL, step).save(ckpt, step).unwrap())
            .collect();
        saves.iter().for_each(|s| wait(s, Level::Disk));
        for (rank, ckpt) in (0..).zip(&ranks) {
            assert_eq!(ckpt.stop_requested(step, 1, rank == 0), step >= 3);
        }
    }
    let wish = Wish { step: Some(Step(4)), ..Wish::default() };
    for ckpt in &ranks {
        ckpt.begin(&Begin { wish: wish.clone(), rollback: true, ..Begin::default() }).unwrap();
    }
    assert!((5..20).all(|step| ranks.iter().all(|ckpt| !ckpt.stop_requested(step, 1, false))));
}

#[test]
fn a_hard_linked_backup_is_never_overwritten() {
    let places = Places::new();
    let mut config = places.config();
    config.keep_last = 1;
    let ckpt = Checkpointer::open(config).unwrap();
    resume(&ckpt, &SMALL).unwrap();
    train(&ckpt, &SMALL, [1]);
    let root = places.destination();
    let payload = files(&root).into_iter().find(|p| {
        let text = p.to_string_lossy();
        text.ends_with(".safetensors") && !text.starts_with('_')
    });
    let payload = root.join(payload.unwrap());
    let backup = root.parent().unwrap().join("backup");
    let linked = std::process::Command::new("ln").arg(&payload).arg(&backup).status().unwrap();
    assert!(linked.success());
    let before = std::fs::read(&backup).unwrap();
    train(&ckpt, &SMALL, 2..=6);
    assert!(!payload.exists());
    assert!(std::fs::read(&backup).unwrap() == before, "the backup was written over");
}

#[test]
fn late_tensors_are_copied_behind_and_early_ones_before_save_returns() {
    let places = Places::new();
    let ckpt = places.open();
    resume(&ckpt, &[1]).unwrap();
    for step in 1..=10 {
        let mut model = Model::at(0, &[3 << 20, 50_000], step);
        let mut state = model.state(step);
        state.tensors[0].late = true;
        let request = SaveRequest {
            step,
            state,
            meta: Meta::default(),
            overlap: true,
            bring: None,
            skip_if_busy: false,
            keep_alive: Box::new(()),
            interrupted: None,
        };
        // SAFETY: the late tensor is not touched before `staged`, the other one only after the
        // call.
        let save = unsafe { ckpt.save(request) }.unwrap();
        model.tensors[1].fill(0); // Early: it may change at once.
        assert!(save.poll(Level::Staged, false, Duration::from_secs(10)).unwrap());
        assert!(ckpt.fence(Duration::from_secs(1)).unwrap());
        model.tensors[0].fill(0);
        wait(&save, Level::Disk);
        let reader = Reader::open(&places.destination(), Some(places.ram())).unwrap();
        let (key, ..) = reader.choose(&Wish::default()).unwrap();
        let mut read = Model::new(0, &[3 << 20, 50_000]);
        read.read(&reader.shard(&key, Rank(0)).unwrap()).unwrap();
        assert!(key.step == Step(step) && read.is_at(step), "step {step}");
    }
}
