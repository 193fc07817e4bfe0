//! A node that is to go away: what would go with it is elsewhere before.

use std::time::{Duration, Instant};

use tierkeep::{begin::Begin, checkpointer::Checkpointer, names::Id, reader::Reader, save::Level};

use crate::{
    common::{Model, SIZES, wait},
    train,
    world::{Job, World},
};

/// A holder that is lost is given ten seconds to come back; one that is to go away is not waited for longer.
const WITHIN: Duration = Duration::from_secs(40);

fn until(what: &str, mut so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < WITHIN, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn holder(world: &World, step: u64) -> String {
    world.holders(step).into_iter().find(|node| node != "a").unwrap()
}

#[test]
fn what_a_node_that_is_to_go_away_holds_is_held_elsewhere_and_nothing_new_goes_there() {
    let world = World::new(&["a", "b", "c"]);
    let mut model = Model::new(0, &SIZES);
    let ckpt = world.open("a", 1);
    ckpt.begin(&Begin::default()).unwrap();
    wait(&train(&ckpt, &mut model, 1), Level::Peer);
    let leaves = holder(&world, 1);
    let stays = if leaves == "b" { "c" } else { "b" };
    world.leave(&leaves);
    until("the other node holds it", || world.holders(1).iter().any(|node| node == stays));
    wait(&train(&ckpt, &mut model, 2), Level::Peer);
    assert_eq!(holder(&world, 2), stays);
    // What was held there is not needed any more, and nobody has lost a copy for it.
    world.lose(&leaves);
    let lost = world.open(stays, 1);
    drop(ckpt);
    world.lose("a");
    let found = lost.begin(&Begin::default()).unwrap().expect("a checkpoint");
    assert_eq!(found.step().0, 2);
}

#[test]
fn a_node_that_is_to_go_away_holds_copies_where_there_is_no_other() {
    let world = World::new(&["a", "b"]);
    world.leave("b");
    let mut model = Model::new(0, &SIZES);
    let ckpt = world.open("a", 1);
    ckpt.begin(&Begin::default()).unwrap();
    wait(&train(&ckpt, &mut model, 1), Level::Peer);
    assert_eq!(holder(&world, 1), "b");
}

#[test]
fn what_is_newest_goes_to_disk_and_bucket_before_its_turn_while_a_ranks_node_is_to_go_away() {
    let world = World::new(&["a", "b"]);
    let bucket = tempfile::tempdir().unwrap();
    let url = format!("file://{}/run", bucket.path().display());
    *world.bucket.lock().unwrap() = Some(url.clone());
    let start = Id::random().unwrap();
    let open = |(rank, node): (u32, &str)| {
        let mut config = world.config(node, rank, 2, 0);
        config.attempt_id = Some(start);
        config.disk_every = 1000;
        config.bucket.as_mut().unwrap().every = 1000;
        (node.to_owned(), Checkpointer::open(config).unwrap())
    };
    let job = Job { ckpts: [(0, "a"), (1, "b")].map(open).into() };
    assert_eq!(job.resume(), 0);
    let sealed = || -> Vec<u64> {
        let reader = Reader::open(url.as_ref(), Some("/nowhere".as_ref())).unwrap();
        let steps = reader.steps().unwrap().into_iter().filter(|info| info.sealed);
        steps.map(|info| info.key.step.0).collect()
    };
    job.train([1], Level::Ram);
    let saves = job.each(|ckpt| Model::at(ckpt.config().rank, &SIZES, 2).save(ckpt, 2).unwrap());
    saves.iter().for_each(|save| wait(save, Level::Ram));
    assert_eq!(sealed(), [0; 0], "nothing was due");
    // Rank 0, which chooses for both, is on the other one.
    world.leave("b");
    until("what was there", || sealed() == [2]);
    for save in &saves {
        let (is_due, error) = (save.is_due_for_object(), save.progress().error);
        assert_eq!((is_due, error), (false, None), "what it was told stays so");
    }
    job.train([3], Level::Ram);
    until("what comes", || sealed().contains(&3));
    world.stay("b");
    std::thread::sleep(Duration::from_millis(1500)); // Hosts look twice a second.
    job.train([4], Level::Ram);
    std::thread::sleep(Duration::from_millis(1500));
    assert!(!sealed().contains(&4), "the schedule is what it was");
    // Another agent has the leader, to whom nobody joins anew.
    world.restart("a", |_| {});
    job.train([5], Level::Ram);
    world.leave("b");
    until("what a node has that was there before", || sealed().contains(&5));
}

#[test]
fn a_node_that_is_to_go_away_and_of_which_the_leader_never_hears_keeps_no_save_waiting() {
    let world = World::new(&["a", "b"]);
    let start = Id::random().unwrap();
    let open = |(rank, node): (u32, &str)| {
        let mut config = world.config(node, rank, 2, 0);
        config.attempt_id = Some(start);
        (config.disk_every, config.slots) = (1000, 2);
        // So long, and not for ever, as a slot that nobody gives up would.
        config.slot_wait = WITHIN;
        (node.to_owned(), Checkpointer::open(config).unwrap())
    };
    let job = Job { ckpts: [(0, "a"), (1, "b")].map(open).into() };
    assert_eq!(job.resume(), 0);
    job.train([1, 2], Level::Ram);
    for (why, steps) in [(Some("it is cordoned"), 3..=7), (None, 8..=12)] {
        world.machine("b").host.leave(why);
        std::thread::sleep(Duration::from_millis(1200)); // Hosts look twice a second.
        job.train(steps, Level::Ram);
    }
    // The same by hand: `tierkeep agent drain`.
    let drained = world.machine("b").host.drain(Duration::from_millis(500));
    assert!(!drained[0].durable, "the leader has not chosen it: {drained:?}");
    job.train(13..=17, Level::Ram);
}
