//! Memory is a budget, under a real control group too.

use std::path::{Path, PathBuf};

use crate::{
    common::{Places, files, settings},
    world::{Actor, trainer},
};

const MIB: u64 = 1 << 20;

/// A memory control group (v2 or v1) of its own, removed at the end.
struct Group(PathBuf);

impl Group {
    fn new(name: &str, bytes: u64) -> Option<Self> {
        let name = format!("tierkeep-test-{}-{name}", std::process::id());
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let (dir, limit) = match v1.is_dir() {
            true => (v1.join(name), "memory.limit_in_bytes"),
            false => (Path::new("/sys/fs/cgroup").join(name), "memory.max"),
        };
        let made = std::fs::create_dir(&dir);
        let group = made.is_ok().then(|| Self(dir.clone()));
        if group.is_none() || std::fs::write(dir.join(limit), bytes.to_string()).is_err() {
            println!("NOT TESTED: no memory control group can be made here");
            return None;
        }
        group
    }

    /// Bytes that are charged to it.
    fn used(&self) -> u64 {
        let read = |name: &str| std::fs::read_to_string(self.0.join(name));
        let text = read("memory.usage_in_bytes").or_else(|_| read("memory.current")).unwrap();
        text.trim().parse().unwrap()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The last of its processes may still be dying.
        for _ in 0..200 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

fn agent_in(group: &Group, ram: &Path, mib: u64) -> Actor {
    let max = [("TIERKEEP_TEST_RAM_BYTES_MAX", (mib * MIB).to_string())];
    Actor::in_group(&group.0, "agent", ram, &max)
}

fn bytes(ram: &Path) -> u64 {
    files(ram).iter().map(|f| std::fs::metadata(ram.join(f)).map_or(0, |m| m.len())).sum()
}

#[test]
fn an_agent_does_not_start_on_less_memory_than_its_budget() {
    let places = Places::new();
    let Some(group) = Group::new("small", 256 * MIB) else { return };
    let refused = agent_in(&group, places.ram(), 200).hear("refused");
    assert_eq!(
        refused,
        "the memory budget is too small: ram_bytes_max 200.0 MiB + 64.0 MiB for the agent itself = \
         264.0 MiB, but its memory control group allows 256.0 MiB: request and budget are one number, \
         raise the one or lower the other"
    );
    let mut huge = settings(places.ram());
    huge.ram_bytes_max = Some(1 << 60);
    let refused = tierkeep::host::Host::open(huge).unwrap_err().to_string();
    assert!(refused.contains("make it larger (mount -o remount,size=...)"), "{refused}");
    agent_in(&group, places.ram(), 190).hear("serves");
}

/// The pages of a killed agent's slots stay charged to its group: what counts are the files.
#[test]
fn a_restarted_agent_keeps_to_its_budget_whoever_is_charged_for_the_old_pages() {
    let places = Places::new();
    let groups = ["first", "second"].map(|name| Group::new(name, 400 * MIB));
    let [Some(first), Some(second)] = groups else { return };
    let agent = agent_in(&first, places.ram(), 300);
    agent.hear("serves");
    let mut one = trainer(&places.destination(), places.ram(), 0, 1);
    one.hear("open");
    assert_eq!(one.ask("resume"), "0");
    for step in 1..=2 {
        assert_eq!(one.ask(&format!("save {step} 100")), "ok");
        assert_eq!(one.ask("wait disk"), "true");
    }
    assert!(first.used() > 200 * MIB, "{} bytes are charged to the agent", first.used());
    agent.kill();
    let agent = agent_in(&second, places.ram(), 300);
    agent.hear("serves");
    for step in 3..=6 {
        assert_eq!(one.ask(&format!("save {step} 100")), "ok");
        assert_eq!(one.ask("wait ram"), "true");
    }
    // Its own group has room for another 300 MiB; the budget has not.
    assert!(second.used() < 100 * MIB, "{} bytes are charged to the second", second.used());
    let other = places.destination().with_file_name("other");
    let mut two = trainer(&other, places.ram(), 0, 1);
    two.hear("open");
    assert_eq!(two.ask("resume"), "0");
    assert_eq!(two.ask("save 1 120"), "ok");
    let why = two.ask("wait ram");
    assert!(why.contains("the memory budget is too small"), "{why}");
    assert!(bytes(places.ram()) <= 300 * MIB, "{} bytes", bytes(places.ram()));
    // What fits is saved.
    assert_eq!(two.ask("save 2 40"), "ok");
    assert_eq!(two.ask("wait disk"), "true");
    assert!(bytes(places.ram()) <= 300 * MIB, "{} bytes", bytes(places.ram()));
    for trainer in [&mut one, &mut two] {
        trainer.ask("close");
    }
}
