//! A bucket behind agents: what all nodes together lose comes back from it.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tierkeep::{checkpointer::Checkpointer, config::Config, reader::Reader, save::Level};

use crate::{
    common::{self, Model, SIZES, events, wait},
    world::{Job, World},
};

/// Some seconds long at 4 MiB a second.
const LARGE: [usize; 2] = [24 << 20, 13];

/// A world with a bucket that all its nodes reach.
fn world(names: &[&str]) -> (std::sync::Arc<World>, tempfile::TempDir) {
    let world = World::new(names);
    let bucket = tempfile::tempdir().unwrap();
    *world.bucket.lock().unwrap() = Some(format!("file://{}/run", bucket.path().display()));
    (world, bucket)
}

fn sealed(bucket: &Path) -> Vec<u64> {
    let url = format!("file://{}/run", bucket.display());
    let steps =
        Reader::open(Path::new(&url), Some(Path::new("/nowhere"))).unwrap().steps().unwrap();
    steps.into_iter().filter(|info| info.sealed).map(|info| info.key.step.0).collect()
}

fn until(what: &str, mut so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < Duration::from_secs(30), "{what}: not within half a minute");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// How often each rank says that its shard came from the bucket.
fn came_from_bucket(job: &Job) -> Vec<usize> {
    std::thread::sleep(Duration::from_millis(300)); // Events are told behind.
    let from = |text: &&String| text.contains("came from the bucket");
    job.each(|ckpt| events(ckpt).iter().filter(from).count())
}

#[test]
fn a_cluster_that_is_lost_whole_goes_on_from_the_bucket_on_another_number_of_nodes() {
    let (world, bucket) = world(&["a", "b", "c", "d"]);
    let job = Job::start(&world, &["a", "b", "c", "d"], 4, 1);
    assert_eq!(job.resume(), 0);
    job.train(1..=3, Level::Object);
    assert_eq!(sealed(bucket.path()), [1, 2, 3]);
    for (nodes, resumes) in
        [(vec!["e", "f", "g"], 3), (vec!["h"], 4), (vec!["i", "j", "k", "l", "m"], 5)]
    {
        let all: Vec<String> = world.machines.lock().unwrap().keys().cloned().collect();
        all.iter().for_each(|name| world.lose(name));
        world.lost.lock().unwrap().clear(); // Nobody is left who would remember them.
        nodes.iter().for_each(|name| world.begin(name));
        let job = Job::start(&world, &nodes, 4, 1);
        assert_eq!(job.resume(), resumes);
        assert_eq!(came_from_bucket(&job), [1; 4]);
        job.train([resumes + 1], Level::Object);
    }
    until("older ones are collected", || sealed(bucket.path()) == [4, 5, 6]);
    drop(job);
}

#[test]
fn what_ranks_share_is_read_from_the_bucket_by_one_of_them() {
    let (world, _bucket) = world(&["a", "b", "c"]);
    let savers = |mut config: Config| {
        config.savers = vec![0];
        config
    };
    let start = |nodes: &[&str]| {
        let start = tierkeep::names::Id::random().unwrap();
        let open = |rank: u32| {
            let node = nodes[rank as usize % nodes.len()];
            let mut config = savers(world.config(node, rank, 3, 1));
            config.attempt_id = Some(start);
            (node.to_owned(), Checkpointer::open(config).unwrap())
        };
        Job { ckpts: (0..3).map(open).collect() }
    };
    let job = start(&["a", "b", "c"]);
    job.each(|ckpt| ckpt.begin(&tierkeep::begin::Begin::default()).unwrap().is_none());
    let save = Model::at(0, &SIZES, 1).save(&job.ckpts[0].1, 1).unwrap();
    wait(&save, Level::Object);
    drop((job, save));
    for name in ["a", "b", "c"] {
        world.lose(name);
    }
    world.lost.lock().unwrap().clear();
    ["d", "e", "f"].iter().for_each(|name| world.begin(name));
    let job = start(&["d", "e", "f"]);
    let steps = job.each(|ckpt| {
        let found = ckpt.begin(&tierkeep::begin::Begin::default()).unwrap().expect("a checkpoint");
        common::read_whole(&found, &SIZES).unwrap();
        found.step().0
    });
    assert_eq!(steps, [1; 3]);
    assert_eq!(came_from_bucket(&job), [1, 0, 0], "the others have it from the first one's node");
}

#[test]
fn an_agent_that_is_upgraded_in_the_middle_of_an_upload_finishes_it() {
    let (world, bucket) = world(&["a", "b"]);
    // Slow enough to be met in the middle.
    *world.bucket_rate.lock().unwrap() = Some(4 << 20);
    let job = Job::start(&world, &["a", "b"], 2, 1);
    assert_eq!(job.resume(), 0);
    let saves = job.each(|ckpt| {
        let model = Model::at(ckpt.config().rank, &LARGE, 1);
        let save = model.save(ckpt, 1).unwrap();
        wait(&save, Level::Disk);
        save
    });
    for name in ["b", "a"] {
        world.restart(name, |_| assert_eq!(sealed(bucket.path()), [0_u64; 0]));
    }
    until("it is in the bucket", || sealed(bucket.path()) == [1]);
    for (save, (_, ckpt)) in saves.iter().zip(&job.ckpts) {
        let reached = save.poll(Level::Object, false, Duration::from_secs(10));
        assert!(matches!(reached, Ok(true)), "{reached:?} {:?}", events(ckpt));
    }
    job.each(common::close);
    drop(job);
    until("the ranks give their memory back", || {
        ["a", "b"].iter().all(|name| world.machine(name).host.ranks().is_empty())
    });
}

#[test]
fn a_trainer_that_leaves_before_its_checkpoint_is_in_the_bucket_loses_nothing() {
    let (world, bucket) = world(&["a"]);
    *world.bucket_rate.lock().unwrap() = Some(4 << 20);
    let ckpt = world.open("a", 0);
    assert_eq!(common::resume(&ckpt, &LARGE).unwrap(), 0);
    wait(&Model::at(0, &LARGE, 1).save(&ckpt, 1).unwrap(), Level::Disk);
    drop(ckpt); // As a process that dies.
    assert_eq!(sealed(bucket.path()), [0_u64; 0]);
    until("it is in the bucket", || sealed(bucket.path()) == [1]);
}

#[test]
fn a_rank_that_nobody_trains_gives_its_memory_back_while_the_bucket_has_not_all() {
    let (world, bucket) = world(&[]);
    *world.idle.lock().unwrap() = Some(Duration::ZERO);
    world.begin("a");
    *world.bucket_rate.lock().unwrap() = Some(2 << 20);
    let ckpt = world.open("a", 0);
    assert_eq!(common::resume(&ckpt, &LARGE).unwrap(), 0);
    wait(&Model::at(0, &LARGE, 1).save(&ckpt, 1).unwrap(), Level::Disk);
    drop(ckpt);
    let slots = || world.machine("a").host.ranks().first().map(|rank| rank.slot_bytes);
    until("its slots are given back", || slots() == Some(0));
    assert_eq!(sealed(bucket.path()), [0_u64; 0], "too late to say");
    until("it is in the bucket", || sealed(bucket.path()) == [1]);
    until("the rank is done", || slots().is_none());
}

#[test]
fn a_shard_that_is_damaged_where_only_the_bucket_has_it_is_an_error_once_and_then_passed_over() {
    let (world, bucket) = world(&["a", "b"]);
    let job = Job::start(&world, &["a", "b"], 2, 1);
    assert_eq!(job.resume(), 0);
    job.train(1..=2, Level::Object);
    drop(job);
    for name in ["a", "b"] {
        world.lose(name);
    }
    world.lost.lock().unwrap().clear();
    let damaged = |file: &PathBuf| {
        let text = file.display().to_string();
        text.contains("00000000000000000002/") && text.contains("rank-000001-")
    };
    let payload = common::files(bucket.path()).into_iter().find(damaged).expect("a payload");
    let payload = bucket.path().join(payload);
    common::flip(&payload, 8 * (std::fs::metadata(&payload).unwrap().len() / 2));
    ["c", "d"].iter().for_each(|name| world.begin(name));
    let job = Job::start(&world, &["c", "d"], 2, 1);
    let begun = job.each(|ckpt| ckpt.begin(&tierkeep::begin::Begin::default()).map(drop));
    let e = begun[1].as_ref().expect_err("it is damaged");
    assert!(e.chain().contains("chunk"), "{}", e.chain());
    drop(job);
    let job = Job::start(&world, &["c", "d"], 2, 1);
    assert_eq!(job.resume(), 1);
}

#[test]
fn damage_on_a_nodes_disk_is_mended_from_the_bucket() {
    let (world, _bucket) = world(&["a"]);
    let ckpt = world.open("a", 0);
    assert_eq!(common::resume(&ckpt, &SIZES).unwrap(), 0);
    wait(&Model::at(0, &SIZES, 1).save(&ckpt, 1).unwrap(), Level::Object);
    common::close(&ckpt);
    drop(ckpt);
    let disk: PathBuf = world.machine("a").destination();
    let payload = common::files(&disk)
        .into_iter()
        .find(|file| file.extension().is_some_and(|e| e == "safetensors"));
    let payload = disk.join(payload.expect("a payload"));
    common::flip(&payload, 8 * (std::fs::metadata(&payload).unwrap().len() / 2));
    let ckpt = world.open("a", 0);
    assert_eq!(common::resume(&ckpt, &SIZES).unwrap(), 1);
    let found = Reader::open(&disk, Some(Path::new("/nowhere"))).unwrap();
    let info = found.steps().unwrap().pop().expect("a step");
    let bad = found.shard(&info.key, tierkeep::names::Rank(0)).unwrap().verify();
    assert!(bad.is_empty(), "{bad:?}");
}
