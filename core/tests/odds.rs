//! Ranks, handles and disks at odds: followers and leaders, take-overs, forks, disks that hang.
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
    Error, ErrorKind,
    begin::Begin,
    checkpointer::{Checkpointer, SaveRequest},
    names::Step,
    reader::Reader,
    restore::{decide::Wish, survey::survey},
    retain::{Collected, Grace, Victim, collect},
    save::Level,
    testing::hooked::{Call, Hooked, Op},
    tier::{disk::DiskTier, *},
};

#[test]
fn followers_report_what_was_sealed() {
    let p = Places::new();
    let mk = |r| {
        let mut c = p.config_of(r, 2);
        c.slots = 3;
        c.keep_last = 100;
        Checkpointer::open(c).unwrap()
    };
    let two = [mk(0), mk(1)];
    for c in &two {
        resume(c, &SMALL).unwrap();
    }
    let mut saves = vec![];
    for step in 1..=200 {
        for (r, c) in (0..).zip(&two) {
            let m = Model::at(r, &SMALL, step);
            saves.push((step, r, m.save(c, step).unwrap()));
        }
    }
    for c in &two {
        close(c);
    }
    let reader = Reader::open(&p.destination(), Some(p.ram())).unwrap();
    let sealed: Vec<u64> =
        reader.steps().unwrap().iter().filter(|s| s.sealed).map(|s| s.key.step.0).collect();
    let mut wrong = vec![];
    for (step, r, s) in &saves {
        if sealed.contains(step) {
            match s.poll(Level::Disk, false, Duration::ZERO) {
                Ok(true) => {}
                other => wrong.push(format!("step {step} rank {r} sealed, wait says {other:?}")),
            }
        }
    }
    let g: Vec<_> = two.iter().flat_map(events).collect();
    println!(
        "sealed {} wrong {} {:#?} events {:#?}",
        sealed.len(),
        wrong.len(),
        &wrong[..wrong.len().min(5)],
        &g[..g.len().min(6)]
    );
    assert!(wrong.is_empty());
}

#[test]
fn a_forks_child_unmaps_nothing() {
    let p = Places::new();
    let c = p.open();
    resume(&c, &SIZES).unwrap();
    train(&c, &SIZES, 1..=3);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let rs: Vec<(usize, usize)> = maps
        .lines()
        .filter(|l| l.contains("tierkeep-test-"))
        .map(|l| {
            let (a, b) = l.split(' ').next().unwrap().split_once('-').unwrap();
            (usize::from_str_radix(a, 16).unwrap(), usize::from_str_radix(b, 16).unwrap())
        })
        .collect();
    // SAFETY: the child only drops its copies and ends, without the runtime's help.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: plain system calls with valid arguments.
        unsafe {
            for (a, b) in &rs {
                let m = libc::mmap(
                    *a as *mut _,
                    b - a,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                    -1,
                    0,
                );
                if m as usize != *a {
                    libc::_exit(3);
                }
                *(m as *mut u8) = 7;
            }
            drop(c);
            for (a, _) in &rs {
                let v = std::ptr::read_volatile(*a as *const u8);
                if v != 7 {
                    libc::_exit(4);
                }
            }
            libc::_exit(0);
        }
    }
    let mut st = 0;
    // SAFETY: `st` outlives the call.
    unsafe { libc::waitpid(pid, &mut st, 0) };
    println!("child status {st:#x} (0xb = SIGSEGV)");
    assert_eq!(st, 0);
}

#[test]
fn closing_now_waits_for_no_stuck_disk() {
    let p = Places::new();
    let gate = Gate::default();
    gate.slow.store(true, Ordering::SeqCst);
    let c = Checkpointer::open_wrapped(p.config(), &|t| gate.around(t)).unwrap();
    resume(&c, &SMALL).unwrap();
    Model::at(0, &SMALL, 1).save(&c, 1).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let done = Arc::new(AtomicBool::new(false));
    let d2 = done.clone();
    let c2 = c.clone();
    std::thread::spawn(move || {
        let _ = c2.close(Duration::ZERO, true);
        d2.store(true, Ordering::SeqCst);
    });
    std::thread::sleep(Duration::from_secs(3));
    let ok = done.load(Ordering::SeqCst);
    gate.slow.store(false, Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(300));
    assert!(ok, "close(0 s, now) did not return in 3 s");
}

fn run7(ms0: u64, ms1: u64, pub1: u64) {
    let p = Places::new();
    let mk = |r: u32, ms: u64, pb: u64| {
        let mut c = p.config_of(r, 2);
        c.keep_last = 100;
        let slow = move |call: Call<'_>| {
            let manifest = call.name.ends_with(".json") && call.name.contains("rank-");
            let pause = match (call.kind, call.op) {
                (TierKind::Disk, Op::Put) => ms,
                (TierKind::Ram, Op::Create) if manifest => pb,
                _ => 0,
            };
            std::thread::sleep(Duration::from_millis(pause));
            Ok(())
        };
        Checkpointer::open_wrapped(c, &move |t| Arc::new(Hooked::after(t, slow))).unwrap()
    };
    let two = [mk(0, ms0, 0), mk(1, ms1, pub1)];
    for c in &two {
        resume(c, &SMALL).unwrap();
    }
    let mut saves = vec![];
    for step in 1..=40 {
        for (r, c) in (0..).zip(&two) {
            let m = Model::at(r, &SMALL, step);
            saves.push((step, r, m.save(c, step).unwrap()));
        }
    }
    for c in &two {
        close(c);
    }
    let reader = Reader::open(&p.destination(), Some(p.ram())).unwrap();
    let sealed: Vec<u64> =
        reader.steps().unwrap().iter().filter(|s| s.sealed).map(|s| s.key.step.0).collect();
    let mut wrong = vec![];
    for (step, r, s) in &saves {
        if sealed.contains(step) {
            match s.poll(Level::Disk, false, Duration::ZERO) {
                Ok(true) => {}
                other => wrong.push(format!("step {step} rank {r} sealed, wait says {other:?}")),
            }
        }
    }
    let g: Vec<_> = two.iter().flat_map(events).collect();
    println!(
        "sealed {sealed:?} wrong {} {:#?} events {} {:#?}",
        wrong.len(),
        &wrong[..wrong.len().min(3)],
        g.len(),
        &g[..g.len().min(4)]
    );
    assert!(wrong.is_empty() && g.is_empty());
}
#[test]
fn followers_report_what_was_sealed_though_the_leader_is_slower() {
    run7(30, 0, 0);
}
#[test]
fn a_step_is_carried_by_its_rank_though_it_is_chosen_at_once() {
    run7(0, 0, 40);
}

#[test]
fn a_handle_that_is_taken_over_stops_before_its_slots_are_used() {
    let p = Places::new();
    let gate = Gate::default();
    gate.slow.store(true, Ordering::SeqCst);
    let c = Checkpointer::open_wrapped(p.config(), &|t| gate.around(t)).unwrap();
    resume(&c, &SMALL).unwrap();
    Model::at(0, &SMALL, 1).save(&c, 1).unwrap();
    std::thread::sleep(Duration::from_millis(100)); // step 1 on its way to disk
    let s2 = Model::at(0, &SMALL, 2).save(&c, 2).unwrap();
    wait(&s2, Level::Ram);
    let mut cfg = p.alone();
    cfg.disk_every = 1000;
    let b = Checkpointer::open(cfg).unwrap();
    println!("second resumes {:?}", resume(&b, &SMALL));
    let taken_over = s2.poll(Level::Disk, false, Duration::ZERO).unwrap_err();
    assert_eq!(taken_over.kind(), ErrorKind::Fenced, "{taken_over}");
    let s3 = Model::at(0, &SMALL, 3).save(&b, 3).unwrap();
    wait(&s3, Level::Ram);
    gate.slow.store(false, Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(300));
    println!("{:?}", events(&c));
    b.close(Duration::ZERO, true).unwrap();
    let bad = verify_all(&p);
    println!("{bad:#?}");
    assert!(bad.is_empty());
}

/// The new attempt carries it on: nothing failed.
#[test]
fn a_write_that_ends_with_its_attempt_is_no_failed_save() {
    let p = Places::new();
    let gate = Gate::default();
    gate.slow.store(true, Ordering::SeqCst);
    let c = Checkpointer::open_wrapped(p.config(), &|t| gate.around(t)).unwrap();
    resume(&c, &SMALL).unwrap();
    wait(&Model::at(0, &SMALL, 1).save(&c, 1).unwrap(), Level::Ram);
    std::thread::sleep(Duration::from_millis(100)); // Step 1 is on its way to disk.
    let opens = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        gate.slow.store(false, Ordering::SeqCst);
    });
    let wish = Wish { step: Some(Step(1)), ..Wish::default() };
    c.begin(&Begin { wish, rollback: true, ..Begin::default() }).unwrap();
    opens.join().unwrap();
    wait(&Model::at(0, &SMALL, 2).save(&c, 2).unwrap(), Level::Disk);
    let told = events(&c);
    let count = |kind: &str| told.iter().filter(|t| t.starts_with(kind)).count();
    assert_eq!((count("in_ram_only"), count("disk_failed")), (1, 0), "{told:?}");
    assert_eq!(c.observer().counters.saves_failed.load(Ordering::Relaxed), 0);
}

#[test]
fn what_was_given_up_leaves_the_disk() {
    let p = Places::new();
    let full = |call: Call<'_>| match (call.kind, call.op) {
        (TierKind::Disk, Op::Put) => {
            Err(Error::Io { what: "write".into(), source: std::io::Error::from_raw_os_error(28) })
        }
        _ => Ok(()),
    };
    let a = Checkpointer::open(p.config_of(0, 2)).unwrap();
    let b = Checkpointer::open_wrapped(p.config_of(1, 2), &|t| Arc::new(Hooked::before(t, full)))
        .unwrap();
    for c in [&a, &b] {
        resume(c, &SMALL).unwrap();
    }
    for step in 1..=20 {
        let s: Vec<_> = (0..)
            .zip([&a, &b])
            .map(|(r, c)| Model::at(r, &SMALL, step).save(c, step).unwrap())
            .collect();
        for x in s {
            let _ = x.poll(Level::Disk, false, Duration::from_secs(2));
        }
    }
    let n = files(&p.destination())
        .iter()
        .filter(|f| {
            f.to_string_lossy().contains("rank-000000-")
                && f.to_string_lossy().ends_with(".safetensors")
        })
        .count();
    println!("{n} payloads of rank 0 of given-up steps lie on the full disk");
    assert!(n <= 3);
}

#[test]
fn a_step_that_some_ranks_saved_is_told() {
    let p = Places::new();
    let two: Vec<Checkpointer> = (0..2)
        .map(|r| {
            let mut c = p.config_of(r, 2);
            c.stragglers_wait = Duration::from_millis(200);
            c.slots = 3;
            Checkpointer::open(c).unwrap()
        })
        .collect();
    for c in &two {
        resume(c, &SMALL).unwrap();
    }
    for (r, c) in (0..).zip(&two) {
        wait(&Model::at(r, &SMALL, 1).save(c, 1).unwrap(), Level::Staged);
    }
    std::thread::sleep(Duration::from_millis(100));
    let lone = Model::at(0, &SMALL, 2).save(&two[0], 2).unwrap(); // rank 1 never saves 2
    // rank 0 has its slots: 1 newest, 2 incomplete. 3 waits for the straggler rule
    let s3: Vec<_> = [(1, &two[1]), (0, &two[0])]
        .into_iter()
        .map(|(r, c)| Model::at(r, &SMALL, 3).save(c, 3).unwrap())
        .collect();
    for s in &s3 {
        wait(s, Level::Disk);
    }
    let error = lone.poll(Level::Ram, false, Duration::from_secs(5)).unwrap_err();
    assert!(error.to_string().contains("step 2"), "{error}");
    let told = events(&two[0]);
    assert!(told.iter().any(|e| e.starts_with("incomplete") && e.contains("rank 1")), "{told:?}");
}

#[test]
fn a_step_is_carried_by_its_rank_though_all_are_slow() {
    run7(30, 0, 60);
}
#[test]
fn a_tier_that_does_not_answer_marks_nothing_bad() {
    let p = Places::new();
    let c = p.open();
    resume(&c, &SMALL).unwrap();
    train(&c, &SMALL, 1..=2);
    close(&c);
    drop(c);
    let f = Arc::new(AtomicBool::new(false));
    let eio = f.clone();
    let c = Checkpointer::open_wrapped(p.config(), &move |t| {
        let eio = eio.clone();
        Arc::new(Hooked::before(t, move |call| {
            let payload = call.op == Op::Open && call.name.ends_with("safetensors");
            if payload && eio.load(Ordering::SeqCst) {
                Err(broken("too many files"))
            } else {
                Ok(())
            }
        }))
    })
    .unwrap();
    let found = c.begin(&Begin::default()).unwrap().unwrap();
    f.store(true, Ordering::SeqCst);
    let mut m = Model::new(0, &SMALL);
    println!("{:?}", m.read(&found).map(|_| ()).map_err(|e| e.to_string()));
    drop(c);
    assert_eq!(resume(&p.open(), &SMALL).unwrap(), 2);
}

/// Two ranks, and a switch that makes saves of the second fail.
fn one_whose_ram_may_be_full(p: &Places) -> (Checkpointer, Checkpointer, Arc<AtomicBool>) {
    let full = Arc::new(AtomicBool::new(false));
    let switch = full.clone();
    let well = Checkpointer::open(p.config_of(0, 2)).unwrap();
    let ill = Checkpointer::open_wrapped(p.config_of(1, 2), &move |tier| {
        let full = switch.clone();
        Arc::new(Hooked::before(tier, move |call| {
            let put = call.kind == TierKind::Ram && call.op == Op::Put;
            if put && full.load(Ordering::SeqCst) { Err(broken("no room")) } else { Ok(()) }
        }))
    })
    .unwrap();
    for c in [&well, &ill] {
        resume(c, &SMALL).unwrap();
    }
    (well, ill, full)
}

#[test]
fn a_save_that_failed_on_one_rank_costs_those_that_skip_no_later_one() {
    let p = Places::new();
    let (well, ill, full) = one_whose_ram_may_be_full(&p);
    let save = |c: &Checkpointer, rank, step| {
        let model = Model::at(rank, &SMALL, step);
        // SAFETY: nobody writes to it before this returns.
        unsafe { c.save(SaveRequest { skip_if_busy: true, ..model.request(step) }) }.unwrap()
    };
    let (mine, theirs) = (save(&well, 0, 1), save(&ill, 1, 1));
    for saved in [mine, theirs] {
        assert!(saved.poll(Level::Ram, false, Duration::from_secs(10)).unwrap());
    }
    full.store(true, Ordering::SeqCst);
    save(&well, 0, 2);
    save(&ill, 1, 2);
    full.store(false, Ordering::SeqCst);
    let saved = (3..100).any(|step| {
        save(&ill, 1, step);
        let saved = save(&well, 0, step);
        saved.poll(Level::Ram, false, Duration::from_millis(100)).unwrap_or(false)
    });
    assert!(saved, "a step that one rank never had keeps the slots of the other");
    close(&ill);
    close(&well);
}

#[test]
fn a_rank_whose_save_failed_tells_the_others_when_it_ends() {
    let p = Places::new();
    let (well, ill, full) = one_whose_ram_may_be_full(&p);
    full.store(true, Ordering::SeqCst);
    let failed = Model::at(1, &SMALL, 1).save(&ill, 1).unwrap();
    assert!(failed.poll(Level::Ram, false, Duration::ZERO).is_err());
    let alone = Model::at(0, &SMALL, 1).save(&well, 1).unwrap();
    assert!(!alone.poll(Level::Ram, false, Duration::from_millis(100)).unwrap(), "it may come yet");
    ill.close(Duration::from_secs(5), false).unwrap();
    let error = alone.poll(Level::Ram, false, Duration::from_secs(10)).unwrap_err();
    assert!(error.to_string().ends_with(": its save failed on rank 1"), "{error}");
    assert!(well.close(Duration::from_secs(10), false).unwrap(), "it waited for what cannot come");
}

#[test]
fn slots_of_a_larger_state_are_used_for_a_smaller_one() {
    let places = Places::new();
    let large = [300_000, 13, 0];
    let ckpt = places.open();
    resume(&ckpt, &large).unwrap();
    train(&ckpt, &large, [1, 2]);
    drop(ckpt);
    let ckpt = places.open();
    ckpt.begin(&Begin { fresh: true, ..Begin::default() }).unwrap();
    let small = Model::at(0, &SMALL, 1);
    ckpt.prepare(&small.state(1).tensors).unwrap();
    train(&ckpt, &SMALL, [1, 2, 3]);
    close(&ckpt);
    assert_eq!(events(&ckpt), Vec::<String>::new());
}

#[test]
fn a_rollback_to_what_is_deleted_at_that_moment_abandons_nothing() {
    for dies in [false, true] {
        rolls_back_beside_a_collector(dies);
    }
}

/// `dies`: the leader, before it can look whether the step is still there.
fn rolls_back_beside_a_collector(dies: bool) {
    let p = Places::new();
    let c = p.open();
    resume(&c, &SMALL).unwrap();
    train(&c, &SMALL, 1..=3);
    close(&c);
    drop(c);
    let disk = p.destination();
    // A collector that has not seen the record puts its tombstone there right after.
    let collects = Arc::new(move |call: Call<'_>| {
        if (call.op, call.name) == (Op::Create, "attempts/00000002.json")
            && call.kind == TierKind::Disk
        {
            let tier = DiskTier::open(&disk).unwrap();
            let second =
                survey(&[&tier]).unwrap().into_iter().map(|f| f.key).find(|k| k.step.0 == 2);
            let victims = [Victim { key: second.unwrap(), why: "it is old".into() }];
            let collected = collect(&tier, &victims, 1, Grace::default()).unwrap();
            assert_eq!(collected, Collected::Superseded);
            if dies {
                return Err(broken("it dies"));
            }
        }
        Ok(())
    });
    let around = |tier| -> Arc<dyn Tier> {
        let collects = collects.clone();
        Arc::new(Hooked::after(tier, move |call| collects(call)))
    };
    let c = Checkpointer::open_wrapped(p.config(), &around).unwrap();
    let wish = Wish { step: Some(Step(2)), ..Wish::default() };
    let error = c.begin(&Begin { wish, rollback: true, ..Begin::default() }).unwrap_err();
    let withdrawn = |c: &Checkpointer| {
        events(c)
            .iter()
            .any(|told| told.contains("is withdrawn: what it was to go back to is gone"))
    };
    assert_eq!(error.kind() == ErrorKind::NotFound, !dies, "{}", error.chain());
    assert_eq!(withdrawn(&c), !dies);
    drop(c);
    let c = p.open();
    assert_eq!(resume(&c, &SMALL).unwrap(), 3);
    assert_eq!(withdrawn(&c), dies);
}
