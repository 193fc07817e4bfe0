//! `tierkeep agent` as a process, and what SIGTERM makes of it.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // Tests: real processes, real time.

mod common;

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use common::{Place, model, save};
use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    process::{Pid, Signal, kill_process},
};
use tierkeep::{begin::Begin, checkpointer::Checkpointer, config::Config, save::Level};

/// One that is ended by SIGTERM; what it said.
fn ends(agent: Child) -> String {
    kill_process(Pid::from_child(&agent), Signal::TERM).unwrap();
    let output = agent.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn agent(place: &Place, args: &[&str]) -> (Child, PathBuf) {
    let socket = place.ram().join("agent.sock");
    let mut command = Command::new(env!("CARGO_BIN_EXE_tierkeep"));
    command.args(["agent", "--ram-dir"]).arg(place.ram()).arg("--socket").arg(&socket).args(args);
    // Nothing of the machine's own settings.
    command.env("TIERKEEP_AGENT_CONFIG", "/dev/null").stderr(Stdio::piped());
    (command.spawn().unwrap(), socket)
}

/// A trainer whose steps are not due for disk; it waits for an agent that is starting.
fn trainer(place: &Place, socket: PathBuf) -> Checkpointer {
    let mut config = Config::new(&place.run()).unwrap();
    config.ram_root = place.ram().into();
    config.agent = Some(socket);
    config.disk_every = 1_000_000;
    let trainer = Checkpointer::open(config).unwrap();
    trainer.begin(&Begin::default()).unwrap();
    trainer
}

fn saves(trainer: &Checkpointer, step: u64) {
    let save = save(trainer, step, &model(0, step));
    assert!(save.poll(Level::Ram, false, Duration::from_secs(30)).unwrap());
}

#[test]
fn an_upgrade_carries_nothing_and_a_host_that_goes_away_everything() {
    let place = Place::new();
    let seal = |step: u64| {
        let listed = std::fs::read_dir(place.run().join(format!("{step:020}")));
        let attempts = listed.into_iter().flatten().flatten();
        attempts.filter(|attempt| attempt.path().join("CHECKPOINT.json").exists()).count()
    };
    let (first, socket) = agent(&place, &[]);
    let trainer = trainer(&place, socket);
    saves(&trainer, 7);
    let said = ends(first);
    assert!(said.contains("ended; what is in RAM stays for the next agent"), "{said}");
    assert_eq!(seal(7), 0);

    let (second, _) = agent(&place, &["--drain-on-sigterm", "20s"]);
    saves(&trainer, 8);
    let said = ends(second);
    assert!(said.contains("what is only in RAM goes to disk, for at most 20s"), "{said}");
    let line = format!("rank 0 of {}: nothing is in RAM only", place.run().display());
    assert!(said.contains(&line), "{said}");
    assert_eq!(seal(8), 1);

    // A host whose disk is gone: it says what is lost, in time.
    let (third, _) = agent(&place, &["--drain-on-sigterm", "1s"]);
    saves(&trainer, 9);
    let moved = place.root().join("moved");
    std::fs::File::create(&moved).unwrap();
    // At one moment: nobody makes a directory where there is none in between.
    renameat_with(CWD, &moved, CWD, place.run(), RenameFlags::EXCHANGE).unwrap();
    let said = ends(third);
    let line = format!("rank 0 of {}: step 9 is in RAM only", place.run().display());
    assert!(said.contains(&line), "{said}");
}
