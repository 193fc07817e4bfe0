//! Copies that are lost are made again.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use tierkeep::{begin::Begin, save::Level};

use crate::{
    common::{Model, SIZES, read_whole, wait},
    train,
    world::World,
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
