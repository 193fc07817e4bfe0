//! Interleavings that once lost or sealed wrong bytes: each was proven against an earlier version.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout)] // Tests.

mod common;
use common::{
    gate::{Gate, broken},
    *,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tierkeep::{
    begin::Begin,
    checkpointer::{Checkpointer, SaveRequest},
    commit::Listing,
    error::Hint,
    manifest::Meta,
    names::*,
    reader::Reader,
    restore::{
        decide::Wish,
        survey::{Reach, look, survey},
    },
    save::Level,
    testing::hooked::Hooked,
    tier::TierKind,
};

#[test]
fn a_slot_is_never_taken_between_its_publication_and_its_announcement() {
    let mut bad_total = vec![];
    let mut lost = 0;
    let mut evs = vec![];
    for _trial in 0..20 {
        let p = Places::new();
        let c = p.open();
        resume(&c, &SIZES).unwrap();
        let mut saves = vec![];
        let models: Vec<Model> = (1..=8).map(|s| Model::at(0, &SIZES, s)).collect();
        for (i, m) in models.iter().enumerate() {
            saves.push(overlap_save(m, &c, i as u64 + 1));
        }
        for s in &saves {
            let _ = s.poll(Level::Ram, false, Duration::from_secs(5));
        }
        std::thread::sleep(Duration::from_millis(100));
        for s in &saves {
            if let Ok(false) = s.poll(Level::Ram, false, Duration::ZERO) {
                lost += 1;
            }
        }
        evs.extend(events(&c));
        c.close(Duration::from_secs(5), true).unwrap();
        bad_total.extend(verify_all(&p));
    }
    println!("BAD {bad_total:#?} pending {lost} events {evs:#?}");
    assert!(bad_total.is_empty());
}

#[test]
fn a_clean_close_keeps_a_save_that_is_still_being_published() {
    let mut bad = 0;
    let mut errs = vec![];
    for _ in 0..20 {
        let p = Places::new();
        let c = p.open();
        resume(&c, &SIZES).unwrap();
        train(&c, &SIZES, [1]);
        let m = Model::at(0, &SIZES, 2);
        let s = overlap_save(&m, &c, 2);
        close(&c);
        std::thread::sleep(Duration::from_millis(50));
        let disk = s.poll(Level::Disk, false, Duration::ZERO);
        drop(c);
        let c = p.open();
        let got = resume(&c, &SIZES).unwrap();
        if got != 2 {
            bad += 1;
            errs.push(format!("{disk:?}"));
        }
    }
    println!("lost last step in {bad} of 20 clean closes; wait(disk) said {errs:?}");
    assert_eq!(bad, 0);
}

#[test]
fn a_slot_released_in_trouble_is_carried_for_no_step() {
    let p = Places::new();
    let gate = Gate::default();
    let mut cfg = p.config();
    cfg.disk_every = 2;
    let c = Checkpointer::open_wrapped(cfg, &|t| gate.around(t)).unwrap();
    resume(&c, &SMALL).unwrap();
    gate.dead.store(true, Ordering::SeqCst);
    let m = Model::at(0, &SMALL, 2);
    let s2 = m.save(&c, 2).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    Model::at(0, &SMALL, 3).save(&c, 3).unwrap();
    Model::at(0, &SMALL, 5).save(&c, 5).unwrap();
    gate.dead.store(false, Ordering::SeqCst);
    println!("wait(disk) of 2: {:?}", s2.poll(Level::Disk, false, Duration::from_secs(5)));
    println!("{:?}", events(&c));
    c.close(Duration::ZERO, true).unwrap();
    let bad = verify_all(&p);
    println!("{bad:#?}");
    assert!(bad.is_empty());
}

#[test]
fn a_slot_released_to_a_newer_save_is_carried_for_no_step() {
    let p = Places::new();
    let gate = Gate::default();
    gate.slow.store(true, Ordering::SeqCst);
    let mut cfg = p.config();
    cfg.disk_every = 2;
    cfg.slots = 3;
    let c = Checkpointer::open_wrapped(cfg, &|t| gate.around(t)).unwrap();
    resume(&c, &SMALL).unwrap();
    let mut keep = vec![];
    for step in [2, 3, 4, 5, 7] {
        let m = Model::at(0, &SMALL, step);
        keep.push(m.save(&c, step).unwrap());
        std::thread::sleep(Duration::from_millis(50));
    }
    gate.slow.store(false, Ordering::SeqCst);
    println!("wait(disk) of 4: {:?}", keep[2].poll(Level::Disk, false, Duration::from_secs(5)));
    c.close(Duration::ZERO, true).unwrap();
    let bad = verify_all(&p);
    println!("{bad:#?}");
    assert!(bad.is_empty());
}

#[test]
fn a_metric_that_is_nan_is_data() {
    let p = Places::new();
    let c = p.open();
    resume(&c, &SMALL).unwrap();
    let m = Model::at(0, &SMALL, 1);
    let mut meta = Meta::default();
    meta.metrics.insert("loss".into(), f64::NAN);
    let r = SaveRequest {
        step: 1,
        state: m.state(1),
        meta,
        bring: None,
        overlap: false,
        skip_if_busy: false,
        keep_alive: Box::new(()),
        interrupted: None,
    };
    // SAFETY: the model outlives the call.
    let s = unsafe { c.save(r) }.unwrap();
    println!(
        "ram {:?} disk {:?} events {:?}",
        s.poll(Level::Ram, false, Duration::from_secs(1)),
        s.poll(Level::Disk, false, Duration::from_secs(2)),
        events(&c)
    );
    c.close(Duration::ZERO, true).unwrap();
    drop(c);
    let c = p.open();
    assert_eq!(resume(&c, &SMALL).unwrap(), 1);
}

#[test]
fn a_mended_ram_manifest_leaves_its_slot_whole() {
    let p = Places::new();
    let c = p.open();
    resume(&c, &SMALL).unwrap();
    train(&c, &SMALL, 1..=2);
    c.close(Duration::ZERO, true).unwrap();
    drop(c);
    let man = files(p.ram())
        .into_iter()
        .find(|f| {
            f.to_string_lossy().contains(&format!("{:020}", 2))
                && f.to_string_lossy().ends_with(".json")
        })
        .unwrap();
    flip(&p.ram().join(man), 400 * 8);
    let mut cfg = p.config();
    cfg.disk_every = 1000;
    let c = Checkpointer::open(cfg.clone()).unwrap();
    assert_eq!(resume(&c, &SMALL).unwrap(), 2);
    println!("{:#?}", events(&c));
    for step in 3..=6 {
        let s = Model::at(0, &SMALL, step).save(&c, step).unwrap();
        wait(&s, Level::Ram);
    }
    c.close(Duration::ZERO, true).unwrap();
    drop(c);
    println!("{:#?}", verify_all(&p));
    let c = Checkpointer::open(cfg.clone()).unwrap();
    println!("first restart: {:?}", resume(&c, &SMALL));
    drop(c);
    let c = Checkpointer::open(cfg).unwrap();
    let got = resume(&c, &SMALL);
    println!("second restart: {got:?}");
    assert_eq!(got.unwrap(), 6);
}

#[test]
fn a_begin_that_failed_costs_nothing() {
    let p = Places::new();
    let mut cfg = p.config();
    cfg.disk_every = 1000;
    let c = Checkpointer::open(cfg.clone()).unwrap();
    resume(&c, &SMALL).unwrap();
    for step in 1..=2 {
        let s = Model::at(0, &SMALL, step).save(&c, step).unwrap();
        wait(&s, Level::Ram);
    }
    println!("before {:#?}", files(p.ram()));
    println!(
        "{:?}",
        c.begin(&Begin {
            wish: Wish { step: Some(Step(99)), ..Wish::default() },
            ..Begin::default()
        })
        .err()
    );
    println!("again: {:?}", resume(&c, &SMALL));
    println!("after {:#?}", files(p.ram()));
    for step in 3..=5 {
        let s = Model::at(0, &SMALL, step).save(&c, step).unwrap();
        println!("save {step}: {:?}", s.poll(Level::Ram, false, Duration::from_secs(1)));
    }
    println!("{:?}", events(&c));
    std::mem::forget(c);
    let reader = Reader::open(&p.destination(), Some(p.ram())).unwrap();
    println!("{:?}", reader.choose(&Wish::default()).map(|x| x.0));
    assert!(reader.choose(&Wish::default()).unwrap().0.step.0 >= 2);
}

#[test]
fn preparing_before_restoring_keeps_what_ram_holds() {
    let p = Places::new();
    let mut cfg = p.config();
    cfg.disk_every = 1000;
    let c = Checkpointer::open(cfg.clone()).unwrap();
    resume(&c, &SMALL).unwrap();
    for step in 1..=2 {
        let s = Model::at(0, &SMALL, step).save(&c, step).unwrap();
        wait(&s, Level::Ram);
    }
    c.close(Duration::ZERO, true).unwrap();
    drop(c);
    let c = Checkpointer::open(cfg.clone()).unwrap();
    c.prepare(&Model::new(0, &SMALL).state(0).tensors).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    println!("resume: {:?}", resume(&c, &SMALL));
    println!("after {:#?}", files(p.ram()));
    for step in 3..=5 {
        let s = Model::at(0, &SMALL, step).save(&c, step).unwrap();
        println!("save {step}: {:?}", s.poll(Level::Ram, false, Duration::from_secs(1)));
    }
    println!("{:?}", events(&c));
    std::mem::forget(c);
    let c = Reader::open(&p.destination(), Some(p.ram())).unwrap();
    println!("{:?}", c.choose(&Wish::default()).map(|x| x.0));
    assert!(c.choose(&Wish::default()).unwrap().0.step.0 >= 2);
}

#[test]
fn preparing_before_the_first_save_is_allowed() {
    let p = Places::new();
    let c = p.open();
    c.prepare(&Model::new(0, &SMALL).state(0).tensors).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    for step in 1..=3 {
        let s = Model::at(0, &SMALL, step).save(&c, step).unwrap();
        println!("save {step}: {:?}", s.poll(Level::Ram, false, Duration::from_secs(1)));
    }
    let e = events(&c);
    println!("{e:?}");
    assert!(e.is_empty());
}

#[test]
fn a_parent_that_the_leader_has_no_slot_of_pins_no_follower() {
    let p = Places::new();
    let mk = |r| {
        let mut c = p.config_of(r, 2);
        c.disk_every = 10;
        c.slot_wait = Duration::from_secs(2);
        c.stragglers_wait = Duration::from_millis(300);
        Checkpointer::open(c).unwrap()
    };
    let two = [mk(0), mk(1)];
    for c in &two {
        resume(c, &SMALL).unwrap();
    }
    let mut s = vec![];
    for (r, c) in (0..).zip(&two) {
        s.push(Model::at(r, &SMALL, 10).save(c, 10).unwrap());
    }
    for x in &s {
        wait(x, Level::Disk);
    }
    two[1].close(Duration::ZERO, true).unwrap(); // rank 1 left by an exception or was killed
    close(&two[0]); // rank 0 ended cleanly: its memory went back
    drop(two);
    let two = [mk(0), mk(1)];
    for c in &two {
        assert_eq!(resume(c, &SMALL).unwrap(), 10);
    }
    let mut bad = vec![];
    for step in 11..=24 {
        let mut s = vec![];
        for (r, c) in (0..).zip(&two) {
            s.push(Model::at(r, &SMALL, step).save(c, step).unwrap());
        }
        for (r, x) in s.iter().enumerate() {
            let got = x.poll(Level::Ram, false, Duration::from_millis(500));
            if !matches!(got, Ok(true)) {
                bad.push(format!("step {step} rank {r} {got:?}"));
            }
        }
        if bad.len() > 12 {
            break;
        }
    }
    println!("{bad:#?}");
    assert!(bad.is_empty());
}

#[test]
fn a_slot_that_shrank_grows_inside_the_budget() {
    let p = Places::new();
    let mut cfg = p.alone();
    cfg.ram_bytes_max = Some(2_200_000);
    cfg.disk_every = 1000;
    let c = Checkpointer::open(cfg).unwrap();
    resume(&c, &[1_000_000]).unwrap();
    let go = |sizes: &[usize], step| {
        let s = Model::at(0, sizes, step).save(&c, step).unwrap();
        s.poll(Level::Ram, false, Duration::from_secs(1)).map_err(|e| e.to_string())
    };
    for step in 1..=2 {
        go(&[1_000_000], step).unwrap();
    }
    for step in 3..=4 {
        go(&[10], step).unwrap();
    }
    // another job takes what is free
    std::fs::write(p.ram().join("other"), vec![1; 2_000_000]).unwrap();
    println!("{:?}", go(&[1_000_000], 5));
    println!("{:?}", go(&[1_000_000], 6));
    let used: u64 =
        files(p.ram()).iter().map(|f| std::fs::metadata(p.ram().join(f)).unwrap().len()).sum();
    println!("used {used} of 2200000");
    assert!(used <= 2_200_000);
}

#[test]
fn a_resumed_shard_is_checked_before_it_is_sealed() {
    let p = Places::new();
    let mut cfg = p.config();
    cfg.keep_last = 1;
    cfg.disk_every = 2;
    let c = Checkpointer::open(cfg.clone()).unwrap();
    resume(&c, &SMALL).unwrap();
    train(&c, &SMALL, [2]);
    let s = Model::at(0, &SMALL, 3).save(&c, 3).unwrap();
    wait(&s, Level::Ram);
    // make slot of 2 go too
    let s = Model::at(0, &SMALL, 5).save(&c, 5).unwrap();
    wait(&s, Level::Ram);
    c.close(Duration::ZERO, true).unwrap();
    drop(c);
    for f in files(p.ram()) {
        let t = f.to_string_lossy().into_owned();
        if t.ends_with(".safetensors") {
            flip(&p.ram().join(f), 20_000 * 8);
        }
    }
    for i in 0..3 {
        let c = Checkpointer::open(cfg.clone()).unwrap();
        // Nobody reads it: it is on its way to disk at once.
        drop(c.begin(&Begin::default()));
        std::thread::sleep(Duration::from_millis(300));
        c.close(Duration::ZERO, true).unwrap();
        drop(c);
        let c = Checkpointer::open(cfg.clone()).unwrap();
        let r = c.begin(&Begin::default()).map(|f| {
            f.map(|f| {
                let mut m = Model::new(0, &SMALL);
                (f.step(), m.read(&f).map(|_| ()).map_err(|e| e.to_string()))
            })
        });
        println!("restart {i}: {r:?}");
        c.close(Duration::ZERO, true).unwrap();
    }
    println!(
        "{:?}",
        files(&p.destination())
            .iter()
            .filter(|f| f.to_string_lossy().contains("CHECKPOINT"))
            .collect::<Vec<_>>()
    );
    let c = Checkpointer::open(cfg.clone()).unwrap();
    assert_eq!(resume(&c, &SMALL).unwrap(), 2);
}

#[test]
fn what_is_resumed_from_ram_goes_to_disk_when_it_has_been_read() {
    let p = Places::new();
    let mut cfg = p.config();
    cfg.disk_every = 2;
    let c = Checkpointer::open(cfg.clone()).unwrap();
    resume(&c, &SMALL).unwrap();
    wait(&Model::at(0, &SMALL, 3).save(&c, 3).unwrap(), Level::Ram);
    c.close(Duration::ZERO, true).unwrap();
    drop(c);
    let c = Checkpointer::open(cfg).unwrap();
    let found = c.begin(&Begin::default()).unwrap().unwrap();
    let on_disk = || {
        let all = files(&p.destination());
        all.iter().any(|f| f.to_string_lossy().ends_with("CHECKPOINT.json"))
    };
    std::thread::sleep(Duration::from_millis(300));
    assert!(!on_disk(), "it went beside the reading");
    read_whole(&found, &SMALL).unwrap();
    let end = std::time::Instant::now() + Duration::from_secs(30);
    while !on_disk() {
        assert!(std::time::Instant::now() < end, "it stays in RAM");
        std::thread::sleep(Duration::from_millis(10));
    }
    close(&c);
}

#[test]
fn no_rank_follows_a_record_that_may_be_succeeded() {
    let p = Places::new();
    let gate = Gate::default();
    gate.no_claims.store(true, Ordering::SeqCst);
    let leader = Checkpointer::open_wrapped(p.config_of(0, 2), &|t| gate.around(t)).unwrap();
    let follower = Checkpointer::open(p.config_of(1, 2)).unwrap();
    let (told, heard) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| leader.begin(&Begin::default()).map(drop).unwrap());
        scope.spawn(|| told.send(follower.begin(&Begin::default()).map(drop)).unwrap());
        let records = p.destination().join("attempts");
        while !records.join("00000001.json").exists() {
            std::thread::yield_now();
        }
        // The record is there and rank 0 has not said that it stands.
        assert!(heard.recv_timeout(Duration::from_millis(200)).is_err(), "followed too early");
        gate.no_claims.store(false, Ordering::SeqCst);
        heard.recv().unwrap().unwrap();
    });
}

#[test]
fn a_call_that_was_left_behind_ends_with_its_handle() {
    let p = Places::new();
    // A leader that never begins; the follower would wait for a minute.
    let _leader = Checkpointer::open(p.config_of(0, 2)).unwrap();
    let mut config = p.config_of(1, 2);
    config.attempt_wait = Duration::from_secs(60);
    let follower = Checkpointer::open(config).unwrap();
    let left_behind = follower.clone();
    let call = std::thread::spawn(move || left_behind.begin(&Begin::default()).map(drop));
    assert!(follower.close(Duration::from_secs(5), true).unwrap());
    let error = call.join().unwrap().unwrap_err();
    assert!(error.to_string().contains("closed"), "{error}");
}

#[test]
fn nothing_is_made_in_ram_after_the_end() {
    let p = Places::new();
    for _ in 0..5 {
        let c = Checkpointer::open(p.alone()).unwrap();
        let huge = Model::new(0, &[200 << 20]);
        c.prepare(&huge.state(0).tensors).unwrap();
        c.close(Duration::ZERO, true).unwrap();
        drop(c);
        p.wipe_ram();
        std::thread::sleep(Duration::from_millis(50));
        let there = std::fs::read_dir(p.ram()).unwrap().flatten();
        let dirs: Vec<_> = there.map(|e| e.path()).filter(|path| path.is_dir()).collect();
        assert!(dirs.is_empty(), "{dirs:?}");
    }
}

#[test]
fn an_older_step_is_resumed_from_only_by_a_rollback() {
    let p = Places::new();
    let c = p.open();
    resume(&c, &SMALL).unwrap();
    train(&c, &SMALL, 1..=2);
    close(&c);
    drop(c);
    let c = p.open();
    let wish = |step| Wish { step: Some(Step(step)), ..Wish::default() };
    let error = c.begin(&Begin { wish: wish(1), ..Begin::default() }).unwrap_err();
    assert_eq!(error.hint(), Some(Hint::Rollback), "{error}");
    assert!(c.attempt().is_none(), "nothing was begun");
    let newest = c.begin(&Begin { wish: wish(2), ..Begin::default() }).unwrap().unwrap();
    assert_eq!(newest.step(), Step(2));
    let back = Begin { wish: wish(1), rollback: true, ..Begin::default() };
    assert_eq!(c.begin(&back).unwrap().unwrap().step(), Step(1));
}

#[test]
fn a_rank_that_saw_the_rollback_before_it_was_told_follows_it() {
    let p = Places::new();
    let two = [0, 1].map(|rank| Checkpointer::open(p.config_of(rank, 2)).unwrap());
    for c in &two {
        resume(c, &SMALL).unwrap();
    }
    for step in 1..=2 {
        let saves: Vec<_> = (0..)
            .zip(&two)
            .map(|(rank, c)| Model::at(rank, &SMALL, step).save(c, step).unwrap())
            .collect();
        saves.iter().for_each(|s| wait(s, Level::Disk));
    }
    let wish = Wish { step: Some(Step(1)), ..Wish::default() };
    let back = Begin { wish, rollback: true, ..Begin::default() };
    two[0].begin(&back).unwrap();
    let late = Model::at(1, &SMALL, 3).save(&two[1], 3).unwrap();
    let error = late.poll(Level::Ram, false, Duration::from_secs(10)).unwrap_err();
    assert!(error.to_string().contains("attempt 2"), "{error}");
    assert_eq!(two[1].begin(&back).unwrap().unwrap().step(), Step(1));
    assert_eq!(two[1].attempt(), two[0].attempt());
}

#[test]
fn a_tier_that_does_not_answer_is_gone_without_only_when_told() {
    let p = Places::new();
    let c = Checkpointer::open(p.alone()).unwrap();
    resume(&c, &SMALL).unwrap();
    train(&c, &SMALL, 1..=2);
    drop(c);
    let silent = Arc::new(AtomicBool::new(false));
    let switch = silent.clone();
    let c = Checkpointer::open_wrapped(p.config(), &move |tier| {
        let silent = switch.clone();
        Arc::new(Hooked::before(tier, move |call| {
            let fails = call.kind == TierKind::Ram && silent.load(Ordering::SeqCst);
            if fails { Err(broken("ram is away")) } else { Ok(()) }
        }))
    })
    .unwrap();
    silent.store(true, Ordering::SeqCst);
    let error = c.begin(&Begin::default()).unwrap_err();
    assert_eq!(error.hint(), Some(Hint::AcceptOlder), "{error}");
    let wish = Wish { accept_older: true, ..Wish::default() };
    let found = c.begin(&Begin { wish, ..Begin::default() }).unwrap().unwrap();
    assert_eq!(found.step(), Step(2));
    let mut model = Model::new(0, &SMALL);
    model.read(&found).unwrap();
    assert!(model.is_at(2));
    let told = events(&c);
    assert!(told.iter().any(|e| e.starts_with("tier_silent")), "{told:?}");
}

/// A rank that closes takes its shard out of RAM once it is on disk: whoever has listed the disk before
/// that, and reads RAM after it, found it neither here nor there.
#[test]
fn a_shard_that_goes_from_ram_to_disk_while_it_is_looked_at_is_whole() {
    let places = Places::new();
    let ckpt = places.open();
    resume(&ckpt, &SIZES).unwrap();
    let model = Model::at(0, &SIZES, 1);
    wait(&model.save(&ckpt, 1).unwrap(), Level::Disk);
    let reader = Reader::open(&places.destination(), Some(places.ram())).unwrap();
    let tiers = reader.tiers();
    let mut found = survey(&tiers).unwrap().remove(0);
    let on_disk = tiers.iter().position(|tier| tier.kind() == TierKind::Disk).unwrap();
    found.listings[on_disk] = Listing::default(); // As it was before the disk had it.
    close(&ckpt);
    drop(ckpt);
    places.wipe_ram();
    let whole = |found| matches!(look(&tiers, found, None).unwrap().reach, Reach::Whole(_));
    assert!(whole(&found));
    std::fs::remove_dir_all(places.destination().join(found.key.dir())).unwrap();
    assert!(!whole(&found), "it is nowhere");
}
