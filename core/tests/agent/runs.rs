//! Several runs on one node: whose memory goes back, whose bytes go first, what a full tmpfs costs.

use std::{fs, path::Path, time::Duration};

use crate::{
    common::{Places, files, mount::Mount, settings},
    world::{Actor, Hosted, trainer, trainer_with, until},
};

fn ends(root: &Path, end: &str) -> usize {
    files(root).iter().filter(|f| f.to_string_lossy().ends_with(end)).count()
}

/// A trainer whose step 1 is in RAM and not due for disk.
fn saved_one_that_is_not_due(run: &Path, places: &Places) -> Actor {
    let never_due = [("TIERKEEP_TEST_DISK_EVERY", "1000000".to_string())];
    let mut actor = trainer_with(run, places.ram(), &never_due);
    actor.hear("open");
    assert_eq!(actor.ask("resume"), "0");
    assert_eq!(actor.ask("save 1"), "ok");
    assert_eq!(actor.ask("wait ram"), "true");
    actor
}

/// At one moment: nobody makes a directory where there is none in between.
fn swap(a: &Path, b: &Path) {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).unwrap();
}

#[test]
fn an_idle_run_gives_its_memory_back_after_its_checkpoint_is_durable_and_not_before() {
    let places = Places::new();
    let mut settings = settings(places.ram());
    settings.idle = Duration::from_millis(200);
    let hosted = Hosted::new(settings);
    let (run, moved) = (places.destination(), places.destination().with_extension("moved"));
    let first = saved_one_that_is_not_due(&run, &places);
    // The disk is no disk for a while.
    fs::File::create(&moved).unwrap();
    swap(&moved, &run);
    first.kill();
    let rank = || hosted.host.ranks().pop();
    until("the agent meets the disk's trouble", || rank().unwrap().trouble.is_some());
    let idle = || rank().is_some_and(|r| r.gone.is_some_and(|g| g > Duration::from_secs(2)));
    until("ten times the time after which it is idle", idle);
    assert_eq!(ends(places.ram(), ".safetensors"), 1, "{:?}", files(places.ram()));
    swap(&moved, &run);
    until("the memory is given back", || {
        ends(places.ram(), ".safetensors") + ends(places.ram(), ".slot") == 0
    });
    assert_eq!(ends(&run, "CHECKPOINT.json"), 1);
    until("the rank is given up", || rank().is_none());
    let mut second = trainer(&run, places.ram(), 0, 1);
    second.hear("open");
    assert_eq!(second.ask("resume"), "1");
    assert_eq!(second.ask("close"), "");
}

#[test]
fn what_a_full_disk_refused_is_carried_again_by_a_drain_and_after_its_trainer() {
    let places = Places::new();
    let mut settings = settings(places.ram());
    settings.idle = Duration::from_millis(200);
    let hosted = Hosted::new(settings);
    let at = places.destination().with_file_name("disk");
    let Some(mount) = Mount::new(&at, "size=1m") else { return };
    let run = mount.0.join("run");
    let filler = mount.0.join("filler");
    let fill = || {
        let mut file = fs::File::create(&filler).unwrap();
        std::io::copy(&mut std::io::repeat(1), &mut file).unwrap_err();
    };
    let mut ranks = [0, 1].map(|rank| trainer(&run, places.ram(), rank, 2));
    for (words, answer) in [("resume", "0"), ("save 1", "ok"), ("wait disk", "true")] {
        ranks.iter_mut().for_each(|rank| rank.tell(words));
        let word = words.split(' ').next().unwrap();
        ranks.iter().for_each(|rank| assert_eq!(rank.hear(word), answer));
    }
    fill();
    ranks.iter_mut().for_each(|rank| rank.tell("save 2"));
    ranks.iter().for_each(|rank| assert_eq!(rank.hear("save"), "ok"));
    ranks.iter_mut().for_each(|rank| rank.tell("wait disk"));
    for why in ranks.iter().map(|rank| rank.hear("wait")) {
        assert!(why.contains("No space left on device"), "{why}");
    }
    let durable = |within| {
        let drained = hosted.host.drain(Duration::from_secs(within));
        drained.iter().map(|d| (d.on_disk, d.durable)).collect::<Vec<_>>()
    };
    assert_eq!(durable(2), [(Some(1), false); 2]);
    fs::remove_file(&filler).unwrap();
    assert_eq!(durable(20), [(Some(2), true); 2]);
    // The same, and nobody is left who would save anything newer.
    fill();
    ranks.iter_mut().for_each(|rank| rank.tell("save 3"));
    ranks.iter().for_each(|rank| assert_eq!(rank.hear("save"), "ok"));
    ranks.iter_mut().for_each(|rank| rank.tell("wait disk"));
    ranks.iter().for_each(|rank| drop(rank.hear("wait")));
    ranks.into_iter().for_each(Actor::kill);
    fs::remove_file(&filler).unwrap();
    until("the memory is given back", || ends(places.ram(), ".safetensors") == 0);
    let third = |f: &std::path::PathBuf| f.starts_with(format!("{:020}", 3));
    assert!(files(&run).iter().any(|f| third(f) && f.ends_with("CHECKPOINT.json")));
}

#[test]
fn what_a_dead_trainer_left_is_carried_on_though_the_next_one_dies_before_it_begins() {
    let places = Places::new();
    let mut settings = settings(places.ram());
    settings.idle = Duration::from_millis(200);
    let hosted = Hosted::new(settings);
    let run = places.destination();
    let first = saved_one_that_is_not_due(&run, &places);
    first.kill();
    let second = trainer(&run, places.ram(), 0, 1);
    second.hear("open");
    // Nobody carries it at this moment, and nobody says that it is safe.
    let drained = hosted.host.drain(Duration::from_millis(100));
    assert_eq!(drained.iter().map(|d| d.durable).collect::<Vec<_>>(), [false], "{drained:?}");
    assert_eq!(ends(&run, "CHECKPOINT.json"), 0);
    second.kill();
    until("step 1 is on disk", || ends(&run, "CHECKPOINT.json") == 1);
    until("the memory is given back", || ends(places.ram(), ".safetensors") == 0);
    let mut third = trainer(&run, places.ram(), 0, 1);
    third.hear("open");
    assert_eq!(third.ask("resume"), "1");
    assert_eq!(third.ask("close"), "");
}

#[test]
fn what_is_not_due_when_its_trainer_closes_goes_to_disk_in_time() {
    let places = Places::new();
    let mut settings = settings(places.ram());
    settings.idle = Duration::from_millis(200);
    let hosted = Hosted::new(settings);
    let mut actor = saved_one_that_is_not_due(&places.destination(), &places);
    assert_eq!(actor.ask("close"), "");
    until("the memory is given back", || ends(places.ram(), ".safetensors") == 0);
    assert_eq!(ends(&places.destination(), "CHECKPOINT.json"), 1);
    until("the rank is given up", || hosted.host.ranks().is_empty());
}

#[test]
fn a_small_run_does_not_wait_behind_a_large_one() {
    let places = Places::new();
    let hosted = Hosted::new(settings(places.ram()));
    let other = places.destination().with_file_name("other");
    let [mut large, mut small] =
        [&places.destination(), &other].map(|run| trainer(run, places.ram(), 0, 1));
    for actor in [&mut large, &mut small] {
        actor.hear("open");
        assert_eq!(actor.ask("resume"), "0");
    }
    assert_eq!(large.ask("save 1 256"), "ok");
    assert_eq!(small.ask("save 1"), "ok");
    assert_eq!(small.ask("wait disk"), "true");
    let of_large = hosted.host.ranks().into_iter().find(|r| r.destination == places.destination());
    assert_eq!(of_large.unwrap().on_disk, None, "it was there first: this run says nothing");
    assert_eq!(large.ask("wait disk"), "true");
    for actor in [&mut large, &mut small] {
        assert_eq!(actor.ask("close"), "");
    }
}

#[test]
fn a_full_tmpfs_refuses_no_trainer_and_its_saves_say_why() {
    let places = Places::new();
    let at = places.destination().with_file_name("shm");
    let Some(mount) = Mount::new(&at, "size=64m") else { return };
    let ram = mount.0.join("ram");
    fs::create_dir(&ram).unwrap();
    let _hosted = Hosted::new(settings(&ram));
    // Somebody else's file, to the last byte.
    let filler = mount.0.join("filler");
    let mut file = fs::File::create(&filler).unwrap();
    let full = std::io::copy(&mut std::io::repeat(1), &mut file).unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    let mut actor = trainer(&places.destination(), &ram, 0, 1);
    actor.hear("open");
    assert_eq!(actor.ask("resume"), "0");
    assert_eq!(actor.ask("save 1"), "ok");
    let why = actor.ask("wait ram");
    assert!(why.contains("memory budget is too small") || why.contains("No space left"), "{why}");
    drop(file);
    fs::remove_file(&filler).unwrap();
    assert_eq!(actor.ask("save 2"), "ok");
    assert_eq!(actor.ask("wait disk"), "true");
    assert_eq!(actor.ask("close"), "");
}
