//! Nodes that are lost in the middle: after any chunk of a transfer, after any answer to the leader.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use tierkeep::{ErrorKind, begin::Begin, save::Level};

use crate::{
    PATIENCE,
    common::{self, Model, SMALL, wait},
    train,
    world::World,
};

/// A shard of three chunks, the last of them short.
const SIZES: [usize; 3] = [(8 << 20) + 24, 4096, 13];
const CHUNKS: usize = 3;

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_sender_that_is_lost_after_any_chunk_leaves_nothing_that_counts() {
    for chunks in 0..=CHUNKS {
        let world = World::new(&["a", "b", "c"]);
        let mut model = Model::new(0, &SIZES);
        let ckpt = world.open("a", 1);
        ckpt.begin(&Begin::default()).unwrap();
        wait(&train(&ckpt, &mut model, 1), Level::Peer);
        let first = world.holders(1).into_iter().find(|node| node != "a").unwrap();
        *world.aim.lock().unwrap() = Some((chunks, "a".into()));
        let save = train(&ckpt, &mut model, 2);
        wait_for("it is lost", || world.lost.lock().unwrap().contains("a"));
        let reached = save.poll(Level::Peer, false, Duration::ZERO);
        assert!(!matches!(reached, Ok(true)), "{chunks} chunks: {reached:?}");
        drop(ckpt);
        assert_eq!(world.holders(2), [""; 0], "{chunks} chunks");
        // What half came gives way to what comes next.
        let ckpt = world.open(if first == "b" { "c" } else { "b" }, 1);
        assert_eq!(common::resume(&ckpt, &SIZES).unwrap(), 1, "{chunks} chunks");
        wait(&train(&ckpt, &mut model, 2), Level::Peer);
        assert_eq!(world.holders(2), ["b", "c"], "{chunks} chunks");
    }
}

#[test]
fn a_holder_that_is_lost_after_any_chunk_is_replaced_by_another_node() {
    for chunks in 0..=CHUNKS {
        let world = World::new(&["a", "b", "c"]);
        let mut model = Model::new(0, &SIZES);
        let ckpt = world.open("a", 1);
        ckpt.begin(&Begin::default()).unwrap();
        wait(&train(&ckpt, &mut model, 1), Level::Peer);
        let first = world.holders(1).into_iter().find(|node| node != "a").unwrap();
        let other = if first == "b" { "c" } else { "b" };
        *world.aim.lock().unwrap() = Some((chunks, first));
        wait(&train(&ckpt, &mut model, 2), Level::Peer);
        assert_eq!(*world.aim.lock().unwrap(), None, "{chunks} chunks: it was lost");
        assert_eq!(world.holders(2), ["a", other], "{chunks} chunks");
        world.lose("a");
        drop(ckpt);
        let ckpt = world.open(other, 0);
        assert_eq!(common::resume(&ckpt, &SIZES).unwrap(), 2, "{chunks} chunks");
    }
}

#[test]
fn a_fetch_goes_on_from_the_other_holder_whenever_one_is_lost() {
    for chunks in 0..=CHUNKS {
        let world = World::new(&["a", "b", "c"]);
        let mut model = Model::new(0, &SIZES);
        let ckpt = world.open("a", 2);
        ckpt.begin(&Begin::default()).unwrap();
        wait(&train(&ckpt, &mut model, 1), Level::Peer);
        world.lose("a");
        drop(ckpt);
        world.begin("d");
        *world.aim.lock().unwrap() = Some((chunks, "b".into()));
        world.chunks.store(0, Ordering::Relaxed);
        let ckpt = world.open("d", 2);
        assert_eq!(common::resume(&ckpt, &SIZES).unwrap(), 1, "{chunks} chunks");
        assert_eq!(*world.aim.lock().unwrap(), None, "{chunks} chunks: it was lost");
        assert_eq!(world.chunks.load(Ordering::Relaxed), CHUNKS, "each came once");
    }
}

#[test]
fn a_leader_decides_again_whatever_the_last_answer_of_a_node_that_goes_away_was() {
    // Until it answers all that it is asked, and stays.
    let mut answers = 0;
    loop {
        let world = World::new(&["a", "b", "c"]);
        let mut model = Model::new(0, &SMALL);
        let ckpt = world.open("a", 2);
        ckpt.begin(&Begin::default()).unwrap();
        wait(&train(&ckpt, &mut model, 1), Level::Peer);
        world.lose("a");
        drop(ckpt);
        world.begin("d");
        *world.answers.lock().unwrap() = Some(("b".into(), answers));
        let ckpt = world.open("d", 2);
        assert_eq!(common::resume(&ckpt, &SMALL).unwrap(), 1, "{answers} answers");
        if world.answers.lock().unwrap().is_some() {
            break;
        }
        answers += 1;
    }
    assert!(answers > 3, "it was asked {answers} times");
}

#[test]
fn a_node_that_answers_nothing_but_names_ends_a_decision_by_name() {
    let world = World::new(&["a", "b"]);
    let mut model = Model::new(0, &SMALL);
    let ckpt = world.open("a", 1);
    ckpt.begin(&Begin::default()).unwrap();
    wait(&train(&ckpt, &mut model, 1), Level::Peer);
    world.lose("a");
    drop(ckpt);
    world.begin("c");
    world.only_names.lock().unwrap().insert("b".into());
    let error = world.open("c", 1).begin(&Begin::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.chain().contains("reach b"), "{}", error.chain());
    // It was no decision: nothing has begun.
    world.only_names.lock().unwrap().clear();
    assert_eq!(common::resume(&world.open("c", 1), &SMALL).unwrap(), 1);
}
