//! Two users, two runs, one agent: what one may not read or write without it, it may not with it.

use std::{
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    common::{Places, files, settings},
    world::{Actor, Hosted, trainer_as, until},
};

/// Nobody's on any machine.
const ONE: u32 = 54_321;
const TWO: u32 = 54_322;

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("NOT TESTED: several users need root");
    }
    root
}

fn open_to_all(dir: &Path) {
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o777)).unwrap();
}

/// A directory of a user's own, and a run in it.
fn home(places: &Places, uid: u32) -> PathBuf {
    let root = places.destination().parent().unwrap().to_path_buf();
    let home = root.join(format!("home-{uid}"));
    std::fs::create_dir(&home).unwrap();
    std::fs::set_permissions(&home, std::fs::Permissions::from_mode(0o700)).unwrap();
    chown(&home, Some(uid), Some(uid)).unwrap();
    home.join("run")
}

fn saves(actor: &mut Actor, step: u64) {
    assert_eq!(actor.ask(&format!("save {step}")), "ok");
    assert_eq!(actor.ask("wait disk"), "true");
}

#[test]
fn two_users_of_one_agent_cannot_read_or_write_each_others_runs() {
    if !is_root() {
        return;
    }
    let places = Places::new();
    let (hosted, [first, second]) = agent_for_all(&places, Duration::from_secs(3600));
    let mut one = trainer_as(ONE, &first, places.ram());
    let mut two = trainer_as(TWO, &second, places.ram());
    for actor in [&mut one, &mut two] {
        actor.hear("open");
        assert_eq!(actor.ask("resume"), "0");
        saves(actor, 1);
    }
    // Every file is its user's, in both tiers; the ram tier is nobody else's to enter.
    for (uid, run) in [(ONE, &first), (TWO, &second)] {
        let ram = places.ram().join(format!("of-{uid}"));
        let meta = std::fs::metadata(&ram).unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o777), (uid, 0o700));
        for root in [&ram, run] {
            let all = files(root);
            assert!(all.len() > 3, "{all:?}");
            for file in all {
                assert_eq!(std::fs::metadata(root.join(&file)).unwrap().uid(), uid, "{file:?}");
            }
        }
    }
    // The kernel refuses the other's directory to the agent's thread as it does to the user.
    let refused = trainer_as(TWO, &first, places.ram()).hear("refused");
    assert!(refused.contains("Permission denied"), "{refused}");
    let slots = places.ram().join(format!("of-{ONE}"));
    assert!(two.ask(&format!("list {}", slots.display())).contains("Permission denied"));
    // Also where the directory is open to all, a rank is its user's while the agent keeps it.
    open_to_all(first.parent().unwrap());
    let walk = std::process::Command::new("chmod").args(["-R", "a+rwX"]).arg(&first).status();
    assert!(walk.unwrap().success());
    let refused = trainer_as(TWO, &first, places.ram()).hear("refused");
    assert_eq!(refused, format!("rank 0 of {} is kept for user {ONE}", first.display()));
    saves(&mut one, 2);
    one.kill();
    // A user's restart is served, whatever others tried.
    let mut one = trainer_as(ONE, &first, places.ram());
    one.hear("open");
    assert_eq!(one.ask("resume"), "2");
    assert_eq!(two.ask("close"), "");
    drop(hosted);
}

/// An agent for all, two users with homes, and what its ram tiers are named.
fn agent_for_all(places: &Places, idle: Duration) -> (Hosted, [PathBuf; 2]) {
    open_to_all(places.ram());
    open_to_all(places.destination().parent().unwrap());
    let mut settings = settings(places.ram());
    settings.ram_root = places.ram().join("of-{uid}");
    settings.idle = idle;
    (Hosted::new(settings), [home(places, ONE), home(places, TWO)])
}

#[test]
fn what_a_user_puts_in_the_place_of_slots_leads_the_agent_to_no_other_users_files() {
    if !is_root() {
        return;
    }
    let places = Places::new();
    let (_hosted, [first, second]) = agent_for_all(&places, Duration::from_millis(1500));
    let mut victim = trainer_as(TWO, &second, places.ram());
    let mut one = trainer_as(ONE, &first, places.ram());
    for actor in [&mut victim, &mut one] {
        actor.hear("open");
        assert_eq!(actor.ask("resume"), "0");
        saves(actor, 1);
    }
    let manifest = |run: &Path| {
        let file = files(run).into_iter().find(|f| f.ends_with("rank-000000.json")).unwrap();
        run.join(file)
    };
    let theirs = manifest(&second);
    one.kill();
    // Where the agent will remove a manifest, the way leads to another user's checkpoint.
    let mine = manifest(&places.ram().join(format!("of-{ONE}")));
    let dir = mine.parent().unwrap();
    assert!(dir.ancestors().nth(2).unwrap().join("_agent/000000").exists());
    std::fs::rename(dir, dir.with_extension("away")).unwrap();
    std::os::unix::fs::symlink(theirs.parent().unwrap(), dir).unwrap();
    // Said before anything is removed.
    let words = dir.ancestors().nth(2).unwrap().join("_agent/000000");
    until("the idle rank is being given up", || !words.exists());
    // Who opens it next comes after whoever gives it up, and is led nowhere either.
    let refused = trainer_as(ONE, &first, places.ram()).hear("refused");
    assert!(refused.contains("Permission denied"), "{refused}");
    assert!(theirs.exists(), "the agent removed what its user may not");
    assert_eq!(victim.ask("close"), "");
}

#[test]
fn what_one_user_leaves_lying_keeps_no_other_waiting() {
    if !is_root() {
        return;
    }
    let places = Places::new();
    let make = |path: &Path| {
        assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
        chown(path, Some(ONE), Some(ONE)).unwrap();
    };
    // Neither a directory nor that user's.
    std::fs::write(places.ram().join("of-1"), "x").unwrap();
    let (hosted, [first, second]) = agent_for_all(&places, Duration::from_secs(3600));
    let ram = places.ram().join(format!("of-{ONE}"));
    let mut one = trainer_as(ONE, &first, places.ram());
    one.hear("open");
    make(&ram.join("pipe"));
    std::fs::rename(ram.join("pipe"), ram.join(".budget.lock")).unwrap();
    make(&first.join("_locks/start-00000000"));
    std::fs::File::create(ram.join("hole")).unwrap().set_len(1 << 60).unwrap();
    one.tell("resume");
    assert_eq!(one.hear("resume"), "0");
    assert_eq!(one.ask("save 1"), "ok");
    let why = one.ask("wait ram");
    assert!(why.contains("it is no regular file"), "{why}");
    let mut two = trainer_as(TWO, &second, places.ram());
    two.hear("open");
    assert_eq!(two.ask("resume"), "0");
    saves(&mut two, 1);
    // It may put a file in the place of all that is its own.
    std::fs::rename(&ram, ram.with_extension("away")).unwrap();
    std::fs::write(&ram, "x").unwrap();
    saves(&mut two, 2);
    assert!(hosted.host.memory().is_ok());
    assert_eq!(two.ask("close"), "");
}

#[test]
fn an_agent_of_one_user_serves_that_user_alone() {
    if !is_root() {
        return;
    }
    let places = Places::new();
    open_to_all(places.ram());
    let _hosted = Hosted::new(settings(places.ram()));
    let socket = places.ram().join("agent.sock");
    assert_eq!(std::fs::metadata(&socket).unwrap().mode() & 0o777, 0o600);
    open_to_all(&socket); // As if somebody had let others in.
    let refused = trainer_as(ONE, &places.destination(), places.ram()).hear("refused");
    assert!(refused.starts_with("this agent serves user 0 alone, not user 54321"), "{refused}");
}

#[test]
fn a_run_has_no_more_than_its_quota_and_its_training_goes_on() {
    let places = Places::new();
    let mut settings = settings(places.ram());
    settings.run_bytes_max = Some(60_000);
    let hosted = Hosted::new(settings);
    let mut actor = crate::world::trainer(&places.destination(), places.ram(), 0, 1);
    actor.hear("open");
    assert_eq!(actor.ask("resume"), "0");
    saves(&mut actor, 1);
    // A second slot of 45,056 does not fit: the first checkpoint stays, the save fails and says why.
    assert_eq!(actor.ask("save 2"), "ok");
    let why = actor.ask("wait ram");
    assert!(why.contains("run_bytes_max of its agent"), "{why}");
    assert_eq!(actor.ask("close"), "");
    drop(hosted);
}
