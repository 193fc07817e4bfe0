//! Copies that are lost are made again.

use std::{
    path::PathBuf,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use tierkeep::{begin::Begin, save::Level};

use crate::{
    common::{self, Model, SIZES, read_whole, wait},
    train,
    world::{Job, Machine, World},
};

/// A node is given some seconds to come back.
const HEALED_WITHIN: Duration = Duration::from_secs(40);

/// Waits until so many of these nodes hold the step.
fn wait_for_holders(world: &World, step: u64, count: usize) -> Vec<String> {
    let begun = Instant::now();
    loop {
        let held = world.holders(step);
        if held.len() >= count {
            return held;
        }
        assert!(begun.elapsed() < HEALED_WITHIN, "only {held:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn survivors_make_the_copies_of_a_lost_node_again_with_nobody_training() {
    let world = World::new(&["a", "b", "c", "d"]);
    let mut model = Model::new(0, &SIZES);
    let ckpt = world.open("a", 1);
    ckpt.begin(&Begin::default()).unwrap();
    for step in 1..=3 {
        wait(&train(&ckpt, &mut model, step), Level::Peer);
    }
    let first = world.holders(3).into_iter().find(|node| node != "a").unwrap();
    world.lose("a");
    drop(ckpt);
    let held = wait_for_holders(&world, 3, 2);
    // The only one that had it from the rank itself.
    world.lose(&first);
    let second = held.iter().find(|node| **node != first).unwrap();
    let last = ["b", "c", "d"].into_iter().find(|n| *n != first && n != second).unwrap();
    let ckpt = world.open(last, 1);
    let found = ckpt.begin(&Begin { ..Default::default() }).unwrap().expect("a checkpoint");
    assert_eq!(found.step().0, 3);
    read_whole(&found, &SIZES).unwrap();
    // What the attempt that goes on saves counts here too.
    wait(&train(&ckpt, &mut model, 4), Level::Peer);
}

#[test]
fn a_holder_that_is_lost_is_replaced_while_nobody_saves() {
    let world = World::new(&["a", "b", "c"]);
    let mut model = Model::new(0, &SIZES);
    let ckpt = world.open("a", 1);
    ckpt.begin(&Begin::default()).unwrap();
    wait(&train(&ckpt, &mut model, 1), Level::Peer);
    let first = world.holders(1).into_iter().find(|node| node != "a").unwrap();
    world.lose(&first);
    let held = wait_for_holders(&world, 1, 2);
    assert!(held.contains(&"a".to_owned()), "{held:?}");
}

#[test]
fn an_older_copy_goes_only_when_the_newer_one_is_confirmed() {
    let world = World::new(&["a", "b", "c"]);
    let mut model = Model::new(0, &SIZES);
    let ckpt = world.open("a", 1);
    ckpt.begin(&Begin::default()).unwrap();
    let holds = |node: &str, step| world.holders(step).iter().any(|holder| holder == node);
    wait(&train(&ckpt, &mut model, 1), Level::Peer);
    let first = world.holders(1).into_iter().find(|node| node != "a").unwrap();
    world.forgetful.store(true, Ordering::Relaxed);
    for step in 2..=4 {
        wait(&train(&ckpt, &mut model, step), Level::Peer);
        assert!(holds(&first, 1), "step 1 went, and nobody has said that it has step {step}");
    }
    world.forgetful.store(false, Ordering::Relaxed);
    for step in 5..=7 {
        wait(&train(&ckpt, &mut model, step), Level::Peer);
    }
    let begun = Instant::now();
    while ["b", "c"].iter().any(|node| holds(node, 1)) {
        assert!(begun.elapsed() < HEALED_WITHIN, "it is kept for nothing");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What lies beside the slots that a node holds for others, by rank.
fn notes(machine: &Machine) -> Vec<PathBuf> {
    let all = common::files(machine.ram.path()).into_iter();
    let notes = all.filter(|file| file.parent().is_some_and(|dir| dir.ends_with("_held")));
    notes.map(|file| machine.ram.path().join(file)).collect()
}

/// Ranks of which a node holds something, by the names of their manifests.
fn held_at(machine: &Machine) -> Vec<u32> {
    let all = common::files(machine.ram.path()).into_iter();
    let ranks = all.filter_map(|file| {
        let step = file.parent()?.parent()?.file_name()?.to_str()?.len() == 20;
        let name = file.file_name()?.to_str()?.strip_prefix("rank-")?.strip_suffix(".json")?;
        step.then(|| name.parse().ok())?
    });
    ranks.collect()
}

#[test]
fn a_holder_whose_agent_was_restarted_makes_copies_of_a_lost_node_again() {
    let world = World::new(&["a", "b"]);
    let mut model = Model::new(0, &SIZES);
    let ckpt = world.open("a", 1);
    ckpt.begin(&Begin::default()).unwrap();
    for step in 1..=2 {
        wait(&train(&ckpt, &mut model, step), Level::Peer);
    }
    world.restart("b", |b| assert_eq!(notes(b).len(), 1));
    // Another step still goes there.
    wait(&train(&ckpt, &mut model, 3), Level::Peer);
    world.restart("b", |_| {});
    world.begin("c");
    world.lose("a");
    drop(ckpt);
    assert_eq!(wait_for_holders(&world, 3, 2), ["b", "c"]);
    let told = |node: &str| world.machine(node).host.peers().unwrap();
    assert_eq!((told("b").healed_bytes > 4 << 20, told("c").held_shards > 0), (true, true));
    // The new copy is as good as the first, and its agent knows as well whose it is.
    assert_eq!(notes(&world.machine("c")).len(), 1);
    world.lose("b");
    let ckpt = world.open("c", 1);
    let found = ckpt.begin(&Begin::default()).unwrap().expect("a checkpoint");
    assert_eq!(found.step().0, 3);
    read_whole(&found, &SIZES).unwrap();
    assert!(notes(&world.machine("c")).is_empty(), "the rank is here itself");
}

#[test]
fn a_note_that_is_damaged_or_forged_heals_nobody_and_harms_nobody() {
    let world = World::new(&["a", "b"]);
    let job = Job::start(&world, &["a"], 6, 1);
    job.resume();
    job.train([1], Level::Peer);
    let elsewhere = tempfile::tempdir().unwrap();
    world.restart("b", |b| {
        let notes = notes(b);
        assert_eq!((notes.len(), held_at(b)), (6, vec![0, 1, 2, 3, 4, 5]));
        let good = std::fs::read(&notes[5]).unwrap();
        common::flip(&notes[0], 8 * 60);
        std::fs::remove_file(&notes[1]).unwrap();
        // As good as it was, by a link that leads elsewhere.
        let moved = elsewhere.path().join("note");
        std::fs::copy(&notes[2], &moved).unwrap();
        std::fs::remove_file(&notes[2]).unwrap();
        std::os::unix::fs::symlink(&moved, &notes[2]).unwrap();
        std::fs::write(&notes[3], &good).unwrap(); // Of another rank.
        std::fs::write(&notes[4], &good[..good.len() / 2]).unwrap();
    });
    world.begin("c");
    world.lose("a");
    drop(job);
    let begun = Instant::now();
    while held_at(&world.machine("c")).is_empty() {
        assert!(begun.elapsed() < HEALED_WITHIN, "the good one heals");
        std::thread::sleep(Duration::from_millis(100));
    }
    // All are healed in one round.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(held_at(&world.machine("c")), [5]);
    assert_eq!(held_at(&world.machine("b")), [0, 1, 2, 3, 4, 5]);
    // What is held without a note is as good as ever.
    let job = Job::start(&world, &["b", "c"], 6, 1);
    assert_eq!(job.resume(), 1);
}
