//! SIGKILL at random moments of save, flush and retention, several ranks: every time the newest or
//! an older complete checkpoint restores bit for bit, never an error, never a mix of steps.
//!
//! The trainers are this test binary run again, one process a rank. `TIERKEEP_KILL_TRIALS` says how
//! often (default 20), `TIERKEEP_KILL_SEED` repeats a run.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout)] // Tests.

mod common;

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use common::{Model, Places, SMALL, config, resume};
use tierkeep::{checkpointer::Checkpointer, reader::Reader, save::Level};

const WORLD: u32 = 3;

/// One rank's life: resume, then save every step until killed. What it was promised goes to a log,
/// one line a fact, each written whole.
#[test]
fn trainer() {
    let Some(place) = std::env::var_os("TIERKEEP_TEST_TRAINER").map(PathBuf::from) else {
        return; // Only as a child of the test below.
    };
    let number = |name: &str| std::env::var(name).expect(name).parse::<u32>().expect(name);
    let (rank, steps) = (number("TIERKEEP_TEST_RANK"), number("TIERKEEP_TEST_STEPS"));
    let ram = PathBuf::from(std::env::var_os("TIERKEEP_TEST_RAM").expect("ram"));
    let mut settings = config(&place.join("run"), &ram, rank, WORLD);
    settings.keep_last = 2;
    let ckpt = Checkpointer::open(settings).expect("open");
    let begun = resume(&ckpt, &SMALL).expect("resume");
    say(&place, rank, &format!("resumed {begun}"));
    for step in begun + 1..=begun + u64::from(steps) {
        let model = Model::at(rank, &SMALL, step);
        let save = model.save(&ckpt, step).expect("save");
        if save.poll(Level::Ram, false, Duration::from_secs(10)).expect("ram") {
            say(&place, rank, &format!("ram {step}"));
        }
        if step % 3 == 0
            && matches!(save.poll(Level::Disk, false, Duration::from_millis(50)), Ok(true))
        {
            say(&place, rank, &format!("disk {step}"));
        }
    }
    ckpt.close(Duration::from_secs(20), false).expect("close");
    say(&place, rank, "closed");
}

fn say(place: &Path, rank: u32, line: &str) {
    use std::io::Write;
    let path = place.join(format!("log-{rank}"));
    let mut log = std::fs::File::options().create(true).append(true).open(path).expect("log");
    log.write_all(format!("{line}\n").as_bytes()).expect("log");
}

/// The highest number after `word` in any rank's log.
fn said(place: &Path, word: &str) -> u64 {
    let logs =
        (0..WORLD).filter_map(|r| std::fs::read_to_string(place.join(format!("log-{r}"))).ok());
    let numbers = logs.flat_map(|log| {
        let of_word = |l: &str| l.strip_prefix(word)?.trim().parse::<u64>().ok();
        log.lines().filter_map(of_word).collect::<Vec<_>>()
    });
    numbers.max().unwrap_or(0)
}

fn start(place: &Path, ram: &Path, rank: u32, steps: u32) -> Child {
    let log = std::fs::File::create(place.join(format!("output-{rank}"))).expect("output");
    Command::new(std::env::current_exe().expect("self"))
        .args(["trainer", "--exact", "--nocapture"])
        .env("TIERKEEP_TEST_TRAINER", place)
        .env("TIERKEEP_TEST_RAM", ram)
        .env("TIERKEEP_TEST_RANK", rank.to_string())
        .env("TIERKEEP_TEST_STEPS", steps.to_string())
        .stdout(Stdio::from(log.try_clone().expect("output")))
        .stderr(Stdio::from(log))
        .spawn()
        .expect("spawn")
}

fn output(place: &Path) -> String {
    let read = |r| std::fs::read_to_string(place.join(format!("output-{r}"))).unwrap_or_default();
    (0..WORLD).map(|r| format!("--- rank {r}\n{}", read(r))).collect()
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

#[test]
#[allow(clippy::disallowed_methods)] // Real processes, real time.
fn sigkill_at_any_moment_costs_no_complete_checkpoint() {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let trials = number("TIERKEEP_KILL_TRIALS").unwrap_or(20);
    let seed = number("TIERKEEP_KILL_SEED").unwrap_or_else(|| u64::from(std::process::id()) * 7919);
    println!("{trials} trials, TIERKEEP_KILL_SEED={seed}");
    let mut random = Random(seed);
    let mut places = Places::new();
    let mut lost = [0_u64; 3];
    for trial in 0..trials {
        if trial % 25 == 0 {
            places = Places::new(); // A short run is killed in other places than a long one.
        }
        let place = places.destination().parent().expect("parent").to_path_buf();
        let (ram_before, disk_before) = (said(&place, "ram "), said(&place, "disk "));
        let mut ranks: Vec<Child> =
            (0..WORLD).map(|r| start(&place, places.ram(), r, 100_000)).collect();
        // From the first moments of a start to some dozens of saves later.
        let moment = Duration::from_micros(random.below(400_000));
        let begun = Instant::now();
        while begun.elapsed() < moment {
            std::thread::sleep(Duration::from_millis(1));
            for (rank, child) in ranks.iter_mut().enumerate() {
                let ended = child.try_wait().expect("wait");
                assert!(
                    ended.is_none(),
                    "trial {trial}: rank {rank} ended by itself\n{}",
                    output(&place)
                );
            }
        }
        // Sometimes one rank goes first and the others go on for a while.
        let first = random.below(u64::from(WORLD)) as usize;
        ranks[first].kill().expect("kill");
        if random.below(3) == 0 {
            std::thread::sleep(Duration::from_micros(random.below(30_000)));
        }
        for child in &mut ranks {
            child.kill().expect("kill");
            child.wait().expect("wait");
        }
        let wiped = random.below(4) == 0;
        if wiped {
            places.wipe_ram();
        }
        let (ram, disk) =
            (said(&place, "ram ").max(ram_before), said(&place, "disk ").max(disk_before));
        let found = newest(&places);
        let least = if wiped { disk } else { ram.max(disk) };
        assert!(
            found >= least,
            "trial {trial} (seed {seed}): wiped={wiped}, promised ram {ram} disk {disk}, found {found}\n{}",
            output(&place)
        );
        lost[usize::from(wiped)] += ram.saturating_sub(found);
        if wiped {
            // What was only promised for RAM is gone with it.
            for r in 0..WORLD {
                let _ = std::fs::remove_file(place.join(format!("log-{r}")));
            }
            say(&place, 0, &format!("disk {disk}"));
        }
    }
    println!("{trials} kills: steps lost with RAM {}, without RAM {}", lost[0], lost[1]);
}

/// All ranks restore, in this process, one after the other: the bits are checked in `resume`.
fn newest(places: &Places) -> u64 {
    let reader = Reader::open(&places.destination(), Some(places.ram()));
    let Ok(reader) = reader else { return 0 };
    let attempts = reader.attempts().expect("attempts");
    if attempts.newest().is_none() {
        return 0;
    }
    let ckpts: Vec<Checkpointer> =
        (0..WORLD).map(|r| Checkpointer::open(places.config_of(r, WORLD)).expect("open")).collect();
    let steps: Vec<u64> = ckpts.iter().map(|c| resume(c, &SMALL).expect("resume")).collect();
    assert!(steps.iter().all(|s| *s == steps[0]), "ranks restored different steps: {steps:?}");
    for ckpt in &ckpts {
        ckpt.close(Duration::ZERO, true).expect("close");
    }

    steps[0]
}
