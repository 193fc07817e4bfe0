//! One test for each sentence of GUARANTEES.md that Rust can show alone.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout)] // Tests.

mod common;

use std::time::Duration;

use common::{Model, Places, SIZES, SMALL, close, files, flip, resume, train, wait};
use tierkeep::{
    Error, ErrorKind,
    begin::Begin,
    checkpointer::Checkpointer,
    names::{Rank, Step},
    reader::Reader,
    restore::decide::Wish,
    save::Level,
};

fn payload_of(dir: &std::path::Path, step: u64) -> std::path::PathBuf {
    let prefix = format!("{step:020}");
    let all = files(dir);
    let found = all.iter().find(|p| {
        let text = p.to_string_lossy();
        text.contains(&prefix) && text.ends_with(".safetensors")
    });
    dir.join(found.unwrap_or_else(|| panic!("no payload of step {step} in {all:?}")))
}

#[test]
fn restored_bit_for_bit_or_error() {
    let places = Places::new();
    let ckpt = places.open();
    assert_eq!(resume(&ckpt, &SIZES).unwrap(), 0);
    train(&ckpt, &SIZES, 1..=3);
    close(&ckpt);
    drop(ckpt);
    // From disk (the memory went back at the clean end), then damaged everywhere.
    assert_eq!(resume(&places.open(), &SIZES).unwrap(), 3);
    let payload = payload_of(&places.destination(), 3);
    flip(&payload, 8 * 70_000 + 3);
    let ckpt = places.open();
    let error = resume(&ckpt, &SIZES).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("chunk 0 of 2"), "{error}");
    drop(ckpt);
    // The next start passes the bad step over, and says so.
    let ckpt = places.open();
    assert_eq!(resume(&ckpt, &SIZES).unwrap(), 2);
    assert!(ckpt.attempt().unwrap().passed_over[0].contains("step 3 of attempt 1"));
}

#[test]
fn exists_only_when_every_rank_is_complete() {
    let places = Places::new();
    let two: Vec<Checkpointer> =
        (0..2).map(|r| Checkpointer::open(places.config_of(r, 2)).unwrap()).collect();
    for ckpt in &two {
        assert_eq!(resume(ckpt, &SMALL).unwrap(), 0);
    }
    for (rank, ckpt) in (0..).zip(&two) {
        Model::at(rank, &SMALL, 1).save(ckpt, 1).unwrap();
    }
    let alone = Model::at(0, &SMALL, 2).save(&two[0], 2).unwrap();
    assert!(!alone.poll(Level::Ram, false, Duration::from_millis(200)).unwrap());
    assert!(alone.poll(Level::Ram, true, Duration::from_millis(200)).unwrap());
    assert_eq!(alone.waiting_for(), "rank 1");
    drop(two);
    for rank in 0..2 {
        // Rank 0's shard of step 2 lies there, whole; the checkpoint does not exist.
        let reader = Reader::open(&places.destination(), Some(places.ram())).unwrap();
        let (key, savers, _) = reader.choose(&Wish::default()).unwrap();
        assert_eq!((key.step, savers), (Step(1), vec![0, 1]));
        assert!(reader.shard(&key, Rank(rank)).is_ok());
    }
}

#[test]
fn a_save_never_makes_an_older_checkpoint_worse() {
    let places = Places::new();
    let mut config = places.config();
    config.keep_last = 1;
    let ckpt = Checkpointer::open(config).unwrap();
    resume(&ckpt, &SMALL).unwrap();
    train(&ckpt, &SMALL, [1]);
    let before = files(&places.destination());
    let seal = before.iter().find(|p| p.ends_with("CHECKPOINT.json")).unwrap();
    // Step 2 cannot be completed on disk: its directory's name is taken by a file.
    std::fs::File::create(places.destination().join(format!("{:020}", 2))).unwrap();
    let save = Model::at(0, &SMALL, 2).save(&ckpt, 2).unwrap();
    let error = save.poll(Level::Disk, false, Duration::from_secs(10)).unwrap_err();
    assert!(error.to_string().contains("step 2"), "{error}");
    assert!(places.destination().join(seal).exists(), "the last good copy on disk is gone");
    // With the newer one complete, the older goes.
    std::fs::remove_file(places.destination().join(format!("{:020}", 2))).unwrap();
    train(&ckpt, &SMALL, [3]);
    close(&ckpt);
    assert!(!places.destination().join(seal).exists());
}

#[test]
fn a_wait_that_returned_has_its_level() {
    let places = Places::new();
    let ckpt = places.open();
    resume(&ckpt, &SMALL).unwrap();
    let save = Model::at(0, &SMALL, 7).save(&ckpt, 7).unwrap();
    assert!(
        save.poll(Level::Ram, false, Duration::ZERO).unwrap(),
        "save returned before RAM had it"
    );
    wait(&save, Level::Disk);
    std::mem::forget(ckpt); // As a SIGKILL: nothing is closed.
    places.wipe_ram();
    let reader = Reader::open(&places.destination(), Some(places.ram())).unwrap();
    assert_eq!(reader.choose(&Wish::default()).unwrap().0.step, Step(7));
}

#[test]
fn a_damaged_copy_costs_time_not_the_checkpoint() {
    let places = Places::new();
    let ckpt = places.open();
    resume(&ckpt, &SIZES).unwrap();
    train(&ckpt, &SIZES, 1..=2);
    ckpt.close(Duration::ZERO, true).unwrap();
    drop(ckpt);
    let in_ram = payload_of(places.ram(), 2);
    flip(&in_ram, 8 * ((4 << 20) + 9000));
    let ckpt = places.open();
    assert_eq!(resume(&ckpt, &SIZES).unwrap(), 2);
    let mut told = Vec::new();
    while let Ok(Some(event)) = ckpt.observer().next(Duration::ZERO) {
        told.push((event.kind, event.text));
    }
    let damage: Vec<_> = told.iter().filter(|(kind, _)| *kind == "damaged_copy").collect();
    assert_eq!(damage.len(), 1, "told once: {told:?}");
    assert!(damage[0].1.contains("chunk 1 of 2"), "{told:?}");
    assert!(told.iter().any(|(kind, _)| *kind == "repaired"), "{told:?}");
    drop(ckpt);
    let ckpt = places.open();
    assert_eq!(resume(&ckpt, &SIZES).unwrap(), 2);
    assert_eq!(
        ckpt.observer().counters.checksum_failures.load(std::sync::atomic::Ordering::Relaxed),
        0,
        "the repaired copy is damaged again"
    );
}

#[test]
fn a_save_that_fails_does_not_kill_training_and_is_never_silent() {
    let places = Places::new();
    let mut config = places.alone();
    config.ram_bytes_max = Some(200_000); // Two slots of 45,056 fit, not of 250,000.
    let ckpt = Checkpointer::open(config).unwrap();
    resume(&ckpt, &SMALL).unwrap();
    let good = Model::at(0, &SMALL, 1).save(&ckpt, 1).unwrap();
    wait(&good, Level::Disk);
    let save = Model::at(0, &[250_000], 2).save(&ckpt, 2).expect("training goes on");
    let error = save.poll(Level::Staged, false, Duration::ZERO).unwrap_err();
    assert!(error.to_string().contains("the memory budget is too small"), "{error}");
    assert_eq!(ckpt.observer().counters.saves_failed.load(std::sync::atomic::Ordering::Relaxed), 1);
    let told = ckpt.observer().next(Duration::ZERO).unwrap().unwrap();
    assert_eq!(told.kind, "save_failed");
    wait(&Model::at(0, &SMALL, 3).save(&ckpt, 3).unwrap(), Level::Disk);
}

#[test]
fn nothing_waits_for_ever() {
    let places = Places::new();
    let mut config = places.config_of(1, 2);
    config.attempt_wait = Duration::from_millis(300);
    let ckpt = Checkpointer::open(config).unwrap();
    let error = ckpt.begin(&Begin::default()).unwrap_err();
    assert!(matches!(error, Error::Deadline { .. }), "{error}");
    assert!(error.to_string().contains("rank 0"), "{error}");
}

#[test]
fn memory_stays_inside_the_budget() {
    let places = Places::new();
    let mut config = places.alone();
    config.ram_bytes_max = Some(104_096);
    let ckpt = Checkpointer::open(config).unwrap();
    resume(&ckpt, &SMALL).unwrap();
    for step in 1..20 {
        wait(&Model::at(0, &SMALL, step).save(&ckpt, step).unwrap(), Level::Ram);
        let used: u64 = files(places.ram())
            .iter()
            .map(|f| std::fs::metadata(places.ram().join(f)).map_or(0, |m| m.len()))
            .sum();
        assert!(used < 100_000 + 8192, "{used} bytes: {:?}", files(places.ram()));
    }
    let error = ckpt.prepare(&Model::new(0, &[90_000]).state(0).tensors).unwrap_err();
    assert!(error.to_string().contains("2 slots x"), "{error}");
}

#[test]
fn a_late_writer_of_an_older_attempt_changes_nothing() {
    let places = Places::new();
    let old = Checkpointer::open(places.config_of(1, 2)).unwrap();
    let lead = Checkpointer::open(places.config_of(0, 2)).unwrap();
    resume(&lead, &SMALL).unwrap();
    resume(&old, &SMALL).unwrap();
    for (rank, ckpt) in [(0, &lead), (1, &old)] {
        Model::at(rank, &SMALL, 1).save(ckpt, 1).unwrap();
    }
    let first = Model::at(0, &SMALL, 2).save(&lead, 2).unwrap();
    assert!(!first.poll(Level::Ram, false, Duration::from_millis(50)).unwrap());
    // Rank 0 starts anew; the old rank 1 is still alive and finishes its save late.
    drop(lead);
    let lead = Checkpointer::open(places.config_of(0, 2)).unwrap();
    assert_eq!(resume(&lead, &SMALL).unwrap(), 1);
    Model::at(1, &SMALL, 2).save(&old, 2).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let late = Model::at(1, &SMALL, 3).save(&old, 3);
    assert!(late.is_err_and(|e| e.kind() == ErrorKind::Fenced), "the old attempt writes on");
    let reader = Reader::open(&places.destination(), Some(places.ram())).unwrap();
    for info in reader.steps().unwrap() {
        assert!(!info.sealed || info.key.step == Step(1), "{info:?}");
    }
}

#[test]
fn a_resumed_run_never_falls_back_onto_an_abandoned_branch() {
    let places = Places::new();
    let ckpt = places.open();
    resume(&ckpt, &SMALL).unwrap();
    train(&ckpt, &SMALL, 1..=2);
    wait(&Model::at(0, &SMALL, 3).save(&ckpt, 3).unwrap(), Level::Disk);
    drop(ckpt);
    // Back to step 2 on purpose, and dead before the first save.
    let ckpt = places.open();
    let wish = Wish { step: Some(Step(2)), ..Wish::default() };
    let found = ckpt.begin(&Begin { wish, rollback: true, ..Begin::default() }).unwrap().unwrap();
    assert_eq!(found.step(), Step(2));
    drop((found, ckpt));
    let ckpt = places.open();
    assert_eq!(resume(&ckpt, &SMALL).unwrap(), 2, "step 3 was abandoned");
    wait(&Model::at(0, &SMALL, 3).save(&ckpt, 3).unwrap(), Level::Disk);
    drop(ckpt);
    let ckpt = places.open();
    resume(&ckpt, &SMALL).unwrap();
    let attempt = ckpt.attempt().unwrap().parent.unwrap();
    assert_eq!((attempt.step, attempt.attempt.number), (3, 3), "the new branch's step 3");
    // The abandoned one is still there for whoever asks for it by name.
    let reader = Reader::open(&places.destination(), Some(places.ram())).unwrap();
    let wish = Wish { step: Some(Step(3)), attempt: Some(1), accept_older: false };
    assert!(reader.choose(&wish).is_ok());
}

#[test]
fn a_state_that_changes_shape_between_steps_is_saved_as_it_is() {
    let places = Places::new();
    let ckpt = places.open();
    resume(&ckpt, &SMALL).unwrap();
    for (step, sizes) in (1..).zip([vec![10_000], vec![90_000, 5], vec![1], vec![50_000], vec![]]) {
        wait(&Model::at(0, &sizes, step).save(&ckpt, step).unwrap(), Level::Disk);
        let reader = Reader::open(&places.destination(), Some(places.ram())).unwrap();
        let (key, ..) = reader.choose(&Wish::default()).unwrap();
        let mut model = Model::new(0, &sizes);
        model.read(&reader.shard(&key, Rank(0)).unwrap()).unwrap();
        assert!(key.step == Step(step) && model.is_at(step));
    }
}

#[test]
fn two_live_processes_of_one_rank_are_refused_with_the_pid() {
    let places = Places::new();
    let destination = places.destination();
    std::fs::create_dir_all(destination.join("_locks")).unwrap();
    // Another process that holds the lock: `flock`'s cousin needs fcntl, so Python's standard
    // library.
    let script = "import fcntl,sys,time\nf=open(sys.argv[1],'w')\nfcntl.lockf(f,fcntl.LOCK_EX)\n\
                  print('held',flush=True)\ntime.sleep(60)";
    let mut holder = std::process::Command::new("python3")
        .args(["-c", script])
        .arg(destination.join("_locks/rank-000000"))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 5];
    std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut line).unwrap();
    let mut config = places.config();
    config.lock_wait = Duration::from_millis(100);
    let error = Checkpointer::open(config).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fenced);
    assert!(error.to_string().contains(&format!("live process {}", holder.id())), "{error}");
    holder.kill().unwrap();
    holder.wait().unwrap();
    Checkpointer::open(places.config()).unwrap();
}

#[test]
fn a_second_checkpointer_in_one_process_takes_over() {
    let places = Places::new();
    let first = places.open();
    resume(&first, &SMALL).unwrap();
    train(&first, &SMALL, [1]);
    let second = places.open();
    assert_eq!(resume(&second, &SMALL).unwrap(), 1);
    assert_eq!(Model::at(0, &SMALL, 2).save(&first, 2).unwrap_err().kind(), ErrorKind::Fenced);
    train(&second, &SMALL, [2]);
    drop(first);
    train(&second, &SMALL, [3]);
}

#[test]
fn sixteen_jobs_share_one_ram_directory() {
    let places = Places::new();
    std::thread::scope(|scope| {
        for job in 0..16_u32 {
            let (places, ram) = (&places, places.ram());
            scope.spawn(move || {
                let destination = places.destination().join(format!("job-{job}"));
                let mut config = common::config(&destination, ram, 0, 1);
                config.ram_bytes_max = Some(16 * 100_000 + 16 * 4096);
                let ckpt = Checkpointer::open(config).unwrap();
                resume(&ckpt, &SMALL).unwrap();
                train(&ckpt, &SMALL, 1..=3);
                close(&ckpt);
            });
        }
    });
}
