//! RAM that outlives the trainer, and trainers that outlive the agent.

use crate::{
    common::{Places, files, settings},
    world::{Actor, Hosted, agent, trainer, until},
};

fn sealed(places: &Places) -> usize {
    files(&places.destination()).iter().filter(|f| f.ends_with("CHECKPOINT.json")).count()
}

#[test]
fn a_trainer_killed_after_staged_loses_nothing_and_its_agent_goes_on_to_disk() {
    let places = Places::new();
    let _agent = agent(places.ram());
    let mut first = trainer(&places.destination(), places.ram(), 0, 1);
    first.hear("open");
    assert_eq!(first.ask("resume"), "0");
    assert_eq!(first.ask("save 1"), "ok");
    first.kill();
    until("step 1 is sealed on disk by the agent", || sealed(&places) == 1);
    let mut second = trainer(&places.destination(), places.ram(), 0, 1);
    second.hear("open");
    assert_eq!(second.ask("resume"), "1");
    assert_eq!(second.ask("save 2"), "ok");
    assert_eq!(second.ask("wait disk"), "true");
    assert_eq!(second.ask("close"), "");
}

#[test]
fn an_agent_goes_on_with_what_the_one_before_it_had_though_the_trainer_is_dead() {
    let places = Places::new();
    let first = agent(places.ram());
    let mut trainer = trainer(&places.destination(), places.ram(), 0, 1);
    trainer.hear("open");
    assert_eq!(trainer.ask("resume"), "0");
    assert_eq!(trainer.ask("save 1"), "ok");
    assert_eq!(trainer.ask("wait disk"), "true");
    // Both die with a step that may be in RAM alone.
    assert_eq!(trainer.ask("save 2"), "ok");
    first.kill();
    trainer.kill();
    for seal in files(&places.destination()).iter().filter(|f| f.ends_with("CHECKPOINT.json")) {
        if seal.starts_with("00000000000000000002") {
            std::fs::remove_file(places.destination().join(seal)).unwrap();
        }
    }
    let _second = agent(places.ram());
    until("step 2 is sealed by an agent that nobody has asked", || {
        let is = |f: &std::path::PathBuf| {
            f.starts_with("00000000000000000002") && f.ends_with("CHECKPOINT.json")
        };
        files(&places.destination()).iter().any(is)
    });
    let begun = std::time::Instant::now();
    let mut third = self::trainer(&places.destination(), places.ram(), 0, 1);
    third.hear("open");
    println!("opened after {:?}", begun.elapsed());
    assert_eq!(third.ask("resume"), "2");
    assert_eq!(third.ask("close"), "");
}

#[test]
fn a_fork_that_keeps_the_socket_does_not_keep_the_rank() {
    let places = Places::new();
    let _agent = agent(places.ram());
    let mut first = trainer(&places.destination(), places.ram(), 0, 1);
    first.hear("open");
    assert_eq!(first.ask("resume"), "0");
    assert_eq!(first.ask("save 1"), "ok");
    let child: i32 = first.ask("fork").parse().unwrap();
    first.kill();
    let mut second = trainer(&places.destination(), places.ram(), 0, 1);
    second.hear("open");
    assert_eq!(second.ask("resume"), "1");
    assert_eq!(second.ask("close"), "");
    // SAFETY: a signal to a process of this test.
    unsafe { libc::kill(child, libc::SIGKILL) };
}

#[test]
fn a_second_trainer_of_a_live_one_is_refused_with_its_pid() {
    let places = Places::new();
    let _agent = agent(places.ram());
    let first = trainer(&places.destination(), places.ram(), 0, 1);
    first.hear("open");
    let refused = trainer(&places.destination(), places.ram(), 0, 1).hear("refused");
    assert!(refused.contains(&format!("owned by live process {}", first.pid())), "{refused}");
}

#[test]
fn a_second_agent_of_one_directory_is_refused() {
    let places = Places::new();
    let _agent = agent(places.ram());
    let error = tierkeep::host::Host::open(crate::common::settings(places.ram())).unwrap_err();
    assert!(error.to_string().contains("is owned by live process"), "{error}");
}

#[test]
fn a_trainer_whose_agent_is_killed_goes_on_with_the_next_one() {
    let places = Places::new();
    let first = agent(places.ram());
    let mut trainer = trainer(&places.destination(), places.ram(), 0, 1);
    trainer.hear("open");
    assert_eq!(trainer.ask("resume"), "0");
    for step in 1..=3 {
        assert_eq!(trainer.ask(&format!("save {step}")), "ok");
    }
    assert_eq!(trainer.ask("wait disk"), "true");
    first.kill();
    let second = agent(places.ram());
    for step in 4..=6 {
        assert_eq!(trainer.ask(&format!("save {step}")), "ok");
    }
    assert_eq!(trainer.ask("wait disk"), "true");
    let told = trainer.ask("events");
    assert!(
        told.contains("agent_away: the agent went away") && told.contains("agent_back"),
        "{told}"
    );
    second.kill();
    // A save that begins while there is none waits, and is told nothing that is not so.
    trainer.tell("save 7");
    std::thread::sleep(std::time::Duration::from_millis(300));
    let _third = agent(places.ram());
    assert_eq!(trainer.hear("save"), "ok");
    assert_eq!(trainer.ask("wait disk"), "true");
    assert_eq!(trainer.ask("close"), "");
    assert_eq!(sealed(&places), 2);
}

#[test]
fn an_agent_that_is_upgraded_while_it_writes_gives_nothing_up() {
    let places = Places::new();
    let first = Hosted::new(settings(places.ram()));
    let start = |rank| {
        let actor = trainer(&places.destination(), places.ram(), rank, 2);
        actor.hear("open");
        actor
    };
    let mut ranks: Vec<Actor> = (0..2).map(start).collect();
    ranks.iter_mut().for_each(|rank| rank.tell("resume"));
    ranks.iter().for_each(|rank| assert_eq!(rank.hear("resume"), "0"));
    ranks.iter_mut().for_each(|rank| rank.tell("save 1 192"));
    ranks.iter().for_each(|rank| assert_eq!(rank.hear("save"), "ok"));
    until("bytes are on their way to disk", || {
        first.host.ranks().iter().any(|rank| rank.carrying == Some(1))
    });
    drop(first);
    let there = sealed(&places);
    let _second = Hosted::new(settings(places.ram()));
    ranks.iter_mut().for_each(|rank| rank.tell("wait disk"));
    ranks.iter().for_each(|rank| assert_eq!(rank.hear("wait"), "true"));
    for rank in &mut ranks {
        let told = rank.ask("events");
        let expected = told.split(" | ").all(|e| e.is_empty() || e.starts_with("agent_"));
        assert!(expected, "{told}");
        rank.tell("close");
    }
    ranks.iter().for_each(|rank| assert_eq!(rank.hear("close"), ""));
    assert_eq!(there, 0, "it was upgraded too late to say anything");
}
