//! Ranks and agents that come back, one before the other.

use std::time::Duration;

use tierkeep::{
    begin::Begin, checkpointer::Checkpointer, config::Config, error::Error, names::Id, save::Level,
};

use crate::{
    common::{Model, SIZES, files, wait},
    world::{Job, World},
};

/// Ranks that nobody gave an id of their start.
fn unnamed(world: &World, rank: u32, node: &str) -> Checkpointer {
    Checkpointer::open(world.config(node, rank, 2, 1)).unwrap()
}

#[test]
fn a_rank_that_its_dead_starts_leader_refuses_waits_for_the_next_one_on_another_node() {
    let world = World::new(&["a", "b"]);
    let first = Job {
        ckpts: [(0, "a"), (1, "b")]
            .map(|(rank, node)| (node.to_owned(), unnamed(&world, rank, node)))
            .into(),
    };
    assert_eq!(first.resume(), 0);
    // It is started again, and finds the record of the leader that has not ended yet.
    let second = unnamed(&world, 1, "b");
    let second = std::thread::spawn(move || {
        let begun = second.begin(&Begin::default()).map(|found| found.is_none());
        (second, begun)
    });
    std::thread::sleep(Duration::from_secs(1));
    assert!(!second.is_finished(), "{:?}", second.join().unwrap().1);
    let leader = unnamed(&world, 0, "a");
    leader.begin(&Begin::default()).unwrap();
    let (second, begun) = second.join().unwrap();
    assert!(begun.unwrap());
    let number = |ckpt: &Checkpointer| ckpt.attempt().unwrap().attempt.number;
    assert_eq!((number(&leader), number(&second)), (2, 2));
}

#[test]
fn what_was_sealed_while_an_agent_was_away_stays_on_its_nodes_disk() {
    let world = World::new(&["a", "b"]);
    let job = Job::start(&world, &["a", "b"], 2, 0);
    assert_eq!(job.resume(), 0);
    job.train([1], Level::Disk);
    let shards = || {
        let all = files(&world.machine("b").destination());
        let of_first = |file: &&std::path::PathBuf| {
            let name = file.to_string_lossy();
            name.contains("00000000000000000001/") && name.ends_with("rank-000001.json")
        };
        all.iter().filter(of_first).count()
    };
    assert_eq!(shards(), 1);
    // It ended after it had said that its shard is there, and before it heard that all have.
    world.restart("b", |b| {
        let mark =
            files(&b.destination()).into_iter().find(|file| file.ends_with("_whole")).unwrap();
        std::fs::remove_file(b.destination().join(mark)).unwrap();
    });
    job.train([2, 3], Level::Disk);
    assert_eq!(shards(), 1, "wait(disk) had returned for it");
}

#[test]
fn training_goes_on_where_there_are_too_few_nodes_for_its_copies() {
    let world = World::new(&["a", "b"]);
    let config = Config {
        attempt_id: Some(Id::random().unwrap()),
        // A step waits for nodes for far longer than a save waits for its slot.
        peer_wait: Duration::from_secs(600),
        slot_wait: Duration::from_secs(30),
        ..world.config("a", 0, 1, 1)
    };
    let ckpt = Checkpointer::open(config).unwrap();
    ckpt.begin(&Begin::default()).unwrap();
    let mut model = Model::new(0, &SIZES);
    let mut save = |step| -> Result<(), Error> {
        model.train_to(step);
        model.save(&ckpt, step).map(|save| wait(&save, Level::Disk))
    };
    save(1).unwrap();
    world.lose("b");
    for step in 2..=6 {
        save(step).unwrap();
    }
}
