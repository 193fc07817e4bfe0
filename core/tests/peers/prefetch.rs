//! What a hint brings before anybody asks.

use std::{path::Path, sync::atomic::Ordering, time::Duration};

use tierkeep::{begin::Begin, names::Rank, reader::Reader, save::Level};

use crate::{
    common::{Model, SIZES, files, flip, read_whole, wait},
    world::{Job, World},
};

const WITHIN: Duration = Duration::from_secs(20);

/// Two ranks on nodes a and b, saved up to step 3, and node a gone; a job restarted has a there again, new.
fn lost() -> std::sync::Arc<World> {
    let world = World::new(&["a", "b", "c"]);
    let job = Job::start(&world, &["a", "b"], 2, 1);
    assert_eq!(job.resume(), 0);
    job.train(1..=3, Level::Peer);
    world.lose("a");
    drop(job);
    world.begin("a");
    world
}

#[test]
fn a_hint_brings_a_shard_before_its_rank_comes() {
    let world = lost();
    let a = world.machine("a");
    let came = a.host.prefetch(&a.destination(), None, &[0, 1], WITHIN).unwrap();
    assert_eq!((came.step, came.silent.len()), (Some(3), 0));
    let [own, other] = &*came.ranks else { panic!("{came:?}") };
    assert!(own.trouble.is_none() && own.bytes > 0, "{own:?}");
    // Not expected here, and as good anywhere.
    assert!(other.trouble.is_none() && other.bytes > 0, "{other:?}");
    let again = a.host.prefetch(&a.destination(), None, &[0], WITHIN).unwrap();
    assert_eq!(again.ranks[0].bytes, 0, "it came twice");
    let before = world.fetched.load(Ordering::Relaxed);
    let job = Job::start(&world, &["a", "b"], 2, 1);
    assert_eq!(job.resume(), 3);
    assert_eq!(world.fetched.load(Ordering::Relaxed), before, "it was fetched again");
    job.train(4..=5, Level::Peer);
}

#[test]
fn what_a_hint_brought_is_checked_like_anything_else() {
    let world = lost();
    let a = world.machine("a");
    a.host.prefetch(&a.destination(), None, &[0], WITHIN).unwrap();
    let payload = |f: &&std::path::PathBuf| f.extension().is_some_and(|e| e == "safetensors");
    let all = files(a.ram.path());
    let here: Vec<_> = all.iter().filter(payload).collect();
    assert_eq!(here.len(), 1, "{all:?}");
    flip(&a.ram.path().join(here[0]), 4096 * 8);
    let job = Job::start(&world, &["a", "b"], 2, 1);
    let read = job.each(|ckpt| {
        let found = ckpt.begin(&Begin::default()).unwrap().unwrap();
        let report = read_whole(&found, &SIZES).unwrap();
        (found.key.clone(), report.damaged.len())
    });
    let key = &read[0].0;
    assert_eq!(read, [(key.clone(), 1), (key.clone(), 0)]);
    assert_eq!(key.step.0, 3);
    // It was mended from the node that has it, too.
    let here = Reader::open(&a.destination(), Some(a.ram.path())).unwrap();
    assert!(here.shard(key, Rank(0)).unwrap().verify().is_empty());
}

#[test]
fn a_hint_for_what_is_nowhere_or_here_says_so() {
    let world = World::new(&["a", "b"]);
    let a = world.machine("a");
    let nothing = a.host.prefetch(&a.destination(), None, &[0], WITHIN).unwrap();
    assert!(nothing.step.is_none() && nothing.ranks.is_empty());
    let ckpt = world.open("b", 1);
    ckpt.begin(&Begin::default()).unwrap();
    wait(&Model::at(0, &SIZES, 1).save(&ckpt, 1).unwrap(), Level::Peer);
    let came = a.host.prefetch(&a.destination(), None, &[0, 7], WITHIN).unwrap();
    assert_eq!(came.ranks[0].bytes, 0, "it holds the copy of rank 0");
    assert!(came.ranks[1].trouble.as_ref().is_some_and(|why| why.contains("rank 7")), "{came:?}");
    for odd in ["relative/run", "/tmp/../run", "/tmp/a b"] {
        a.host.prefetch(Path::new(odd), None, &[0], WITHIN).unwrap_err();
    }
}
