//! A wall clock that jumps: by hand, by NTP, after a suspend. Only labels may follow it.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::UNIX_EPOCH,
};

use crate::{
    common::{Places, files},
    world::{Actor, trainer_with},
};

/// Adds the seconds in a file to the wall clock of the process that loads it; the monotonic clocks stay.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int answer = real(id, at);
    const char *path = getenv("TIERKEEP_TEST_CLOCK");
    FILE *file = id == CLOCK_REALTIME && path ? fopen(path, "r") : NULL;
    long seconds = 0;
    if (file) {
        if (fscanf(file, "%ld", &seconds) == 1) at->tv_sec += seconds;
        fclose(file);
    }
    return answer;
}
"#;

const TEN_YEARS: i64 = 10 * 365 * 86_400;

/// The library, and the file that says by how much.
fn shim(dir: &Path) -> [(&'static str, String); 2] {
    let (source, library) = (dir.join("clock.c"), dir.join("clock.so"));
    std::fs::write(&source, SHIM).unwrap();
    let mut cc = Command::new("cc"); // Whoever built this test has one.
    let made = cc.args(["-shared", "-fPIC", "-o"]).args([&library, &source]).arg("-ldl").status();
    assert!(made.unwrap().success());
    let text = |path: PathBuf| path.display().to_string();
    [("LD_PRELOAD", text(library)), ("TIERKEEP_TEST_CLOCK", text(dir.join("jump")))]
}

#[test]
fn a_wall_clock_that_jumps_by_years_changes_labels_and_nothing_else() {
    let places = Places::new();
    let shimmed = shim(places.destination().parent().unwrap());
    let jump = |seconds: i64| std::fs::write(&shimmed[1].1, seconds.to_string()).unwrap();
    let agent = || {
        let agent = Actor::new("agent", places.ram(), &shimmed);
        agent.hear("serves");
        agent
    };
    jump(0);
    let first = agent();
    let mut trainer = trainer_with(&places.destination(), places.ram(), &shimmed);
    trainer.hear("open");
    assert_eq!(trainer.ask("resume"), "0");
    let mut step = 0;
    let mut save = |trainer: &mut Actor| {
        step += 1;
        assert_eq!(trainer.ask(&format!("save {step}")), "ok");
        assert_eq!(trainer.ask("wait disk"), "true");
    };
    for seconds in [TEN_YEARS, -TEN_YEARS, 0, -86_400, 86_400] {
        jump(seconds);
        save(&mut trainer);
        // The label did follow: the jump was seen.
        let now = UNIX_EPOCH.elapsed().unwrap().as_secs().cast_signed();
        let off = label(&places) - (now + seconds);
        assert!(off.abs() < 600, "{off} seconds off");
    }
    // Also between two agents, and between two trainers: the newest checkpoint is the newest.
    jump(TEN_YEARS);
    first.kill();
    let _second = agent();
    jump(-TEN_YEARS);
    save(&mut trainer);
    let told = trainer.ask("events");
    assert!(told.split(" | ").all(|e| e.starts_with("agent_")), "{told}");
    trainer.kill();
    let mut next = trainer_with(&places.destination(), places.ram(), &shimmed);
    next.hear("open");
    assert_eq!(next.ask("resume"), "6");
    assert_eq!(next.ask("events"), "");
    assert_eq!(next.ask("close"), "");
}

/// When the newest checkpoint was saved, in seconds of the epoch, by the clock of who saved it.
fn label(places: &Places) -> i64 {
    let shard = files(&places.destination()).into_iter().rfind(|f| f.ends_with("rank-000000.json"));
    let text = std::fs::read_to_string(places.destination().join(shard.unwrap())).unwrap();
    let digits = text.split_once("\"saved_unix_ms\":").unwrap().1.trim_start();
    digits.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse::<i64>().unwrap() / 1000
}
