//! SIGKILL at random moments of save, flush and retention, several ranks: every time the newest or
//! an older complete checkpoint restores bit for bit, never an error, never a mix of steps.
//!
//! A trial is one start of a job and its kill; some trials in a row, each with settings of its own,
//! are a run in one directory. The trainers are this test binary run again, one process a rank.
//!
//! `TIERKEEP_KILL_TRIALS` says how often (default 20). `TIERKEEP_KILL_SEED` is the seed of the first
//! run, those after it have the next numbers: a run that failed is repeated alone by its own seed,
//! which the failure prints.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // Tests: real processes, real time.
#![allow(clippy::print_stdout, clippy::print_stderr, unreachable_pub)]

mod agent;
mod checks;
#[path = "../common/mod.rs"]
mod common;
mod draw;
mod trainer;

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use agent::{Agent, Agents};
use checks::{Promised, Said};
use common::{
    Places, SMALL, events, files,
    lives::{Random, forget, number, said, seed},
    resume,
};
use draw::{Settings, Trial};
use tierkeep::checkpointer::Checkpointer;

const WORLD: u32 = 3;
/// Trials of one run: a short one is killed in other places than a long one.
const RUN_TRIALS_MAX: u64 = 25;
/// All that a rank may tell of until it is killed: slots were wanted faster than disk gave them back.
const SKIPPED: &str = ": skipped: ";

#[test]
fn a_rank_of_the_job() {
    if let Some(ram) = std::env::var_os("TIERKEEP_TEST_AGENT") {
        agent::serve(Path::new(&ram));
    }
    if let Some(place) = std::env::var_os("TIERKEEP_TEST_TRAINER") {
        trainer::live(Path::new(&place)); // Only as a child of the test below.
    }
}

#[test]
fn sigkill_at_any_moment_costs_no_complete_checkpoint() {
    let trials = number("TIERKEEP_KILL_TRIALS").unwrap_or(20);
    let seed = seed();
    println!("{trials} trials, TIERKEEP_KILL_SEED={seed}");
    let (mut left, mut runs, mut sum) = (trials, 0, Sum::default());
    while left > 0 {
        let seed = seed.wrapping_add(runs);
        let mut random = Random(seed);
        let length = (1 + random.below(RUN_TRIALS_MAX)).min(left);
        let mut run = Run::new(seed, random, None);
        (0..length).for_each(|_| run.trial(&mut sum));
        left -= length;
        runs += 1;
    }
    println!("{trials} trials in {runs} runs: {sum:?}");
}

/// Its trainers go on meanwhile, and the next agent takes their ranks over. Each trial ends with the
/// trainers' deaths as well. `TIERKEEP_AGENT_KILLS` says how often (default 15).
#[test]
fn sigkill_of_the_agent_at_any_moment_costs_no_checkpoint_and_stops_no_training() {
    let kills = number("TIERKEEP_AGENT_KILLS").unwrap_or(15);
    let seed = seed();
    println!("{kills} kills of agents, TIERKEEP_KILL_SEED={seed}");
    let (mut runs, mut sum) = (0, Sum::default());
    while sum.agents_killed < kills {
        let seed = seed.wrapping_add(runs);
        let mut random = Random(seed);
        let length = 1 + random.below(6);
        let mut run = Run::new(seed, random, Some(Agents::new(seed)));
        (0..length).for_each(|_| run.trial(&mut sum));
        runs += 1;
    }
    println!("{runs} runs: {sum:?}");
}

/// For the line at the end: whether the trials came to where they are of use.
#[derive(Debug, Default)]
struct Sum {
    steps_in_ram: usize,
    steps_on_disk: usize,
    skips: usize,
    /// Trials whose ranks all went on from a checkpoint.
    resumed: u64,
    ended: u64,
    wiped: u64,
    /// Steps that were in RAM alone when it was wiped.
    lost_with_ram: u64,
    agents_killed: u64,
}

struct Run {
    seed: u64,
    random: Random,
    places: Places,
    place: PathBuf,
    trials: u64,
    /// The one that goes on.
    trial: Option<Trial>,
    promised: Promised,
    /// What the next start resumes from.
    newest: u64,
    agents: Option<Agents>,
}

impl Run {
    fn new(seed: u64, random: Random, agents: Option<Agents>) -> Self {
        let places = Places::new();
        let place = places.destination().parent().expect("parent").to_path_buf();
        let promised = Promised::default();
        Self { seed, random, places, place, trials: 0, trial: None, promised, newest: 0, agents }
    }

    fn trial(&mut self, sum: &mut Sum) {
        let trial = Trial::draw(&mut self.random);
        self.trial = Some(trial.clone());
        self.trials += 1;
        forget(&self.place, WORLD);
        self.live(&trial);
        self.places.settle();
        let said = Said::of(said(&self.place, WORLD));
        // A step that one rank passed over because its agent was away is not complete on the others.
        let away = [": agent_", "could not reach the agent", ": incomplete: "];
        let away = if self.agents.is_some() { &away[..] } else { &[] };
        let expected = |e: &str| e.contains(SKIPPED) || away.iter().any(|part| e.contains(part));
        let strange: Vec<_> = said.events.iter().filter(|e| !expected(e)).collect();
        assert!(strange.is_empty(), "told of, and it was only killed: {strange:#?}");
        let right = said.resumed.iter().all(|step| *step == self.newest);
        assert!(right, "resumed from {:?}, step {} is the newest", said.resumed, self.newest);
        self.promised.ram = self.promised.ram.max(said.ram.last().copied().unwrap_or(0));
        self.promised.disk = self.promised.disk.max(said.disk.last().copied().unwrap_or(0));
        checks::life_kept_its_settings(&self.places, &trial.settings, &said);
        self.newest = checks::resumes_from(&self.places, self.promised);
        if trial.wiped {
            self.places.wipe_ram();
            self.promised.ram = 0;
            let before = self.newest;
            self.newest = checks::resumes_from(&self.places, self.promised);
            sum.lost_with_ram += before - self.newest;
        }
        if let Some(settings) = &trial.restart {
            self.restart(settings);
        }
        let all_resumed = said.resumed.iter().filter(|step| **step > 0).count() == WORLD as usize;
        sum.resumed += u64::from(all_resumed);
        sum.steps_in_ram += said.ram.len();
        sum.steps_on_disk += said.disk.len();
        sum.skips += said.events.iter().filter(|e| e.contains(SKIPPED)).count();
        sum.agents_killed += self.agents.as_mut().map_or(0, Agents::killed);
        sum.ended += u64::from(trial.moment.is_none());
        sum.wiped += u64::from(trial.wiped);
    }

    /// A job from its start to its end.
    fn live(&mut self, trial: &Trial) {
        let mut agents = self.agents.as_mut().map(|agents| agents.at(self.places.ram()));
        let hosted = agents.is_some();
        let start = |rank| start(&self.place, self.places.ram(), rank, trial, hosted);
        let mut ranks = Ranks((0..WORLD).map(start).collect());
        let Some(moment) = trial.moment else {
            // Longer than any wait of a rank that is well.
            let ended = ranks.go_on_for(trial, Duration::from_secs(60), agents.as_mut());
            assert!(ended, "it does not end");
            return;
        };
        ranks.go_on_for(trial, moment, agents.as_mut());
        let mut first = ranks.0.swap_remove(trial.first);
        first.kill().expect("kill");
        first.wait().expect("wait");
        // Sometimes the others go on for a while.
        ranks.go_on_for(trial, trial.alone, agents.as_mut());
        // The trainers before their agent: nobody looks for it.
        drop(ranks);
    }

    /// All ranks restore, in this process, one after the other, and save nothing.
    fn restart(&mut self, settings: &Settings) {
        let agent = self.agents.as_mut().map(|agents| agents.at(self.places.ram()));
        let open = |rank| {
            let mut config = self.places.config_of(rank, WORLD);
            if agent.is_some() {
                config.agent = Some(self.places.ram().join("agent.sock"));
            }
            settings.set(&mut config);
            Checkpointer::open(config).expect("open")
        };
        let ranks: Vec<Checkpointer> = (0..WORLD).map(open).collect();
        let steps: Vec<u64> = ranks.iter().map(|c| resume(c, &SMALL).expect("resume")).collect();
        assert_eq!(steps, [self.newest; WORLD as usize], "restored");
        for ckpt in &ranks {
            assert_eq!(events(ckpt), [""; 0]);
        }
        for ckpt in &ranks {
            ckpt.close(Duration::ZERO, true).expect("close");
        }
    }
}

impl Drop for Run {
    /// All that can be known of a trial that failed, before its directories go.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let (seed, trials) = (self.seed, self.trials);
        eprintln!("--- again: TIERKEEP_KILL_SEED={seed} TIERKEEP_KILL_TRIALS={trials}");
        eprintln!("--- trial {trials} of the run: {:#?}", self.trial);
        eprintln!("--- {:?}, resumed from {}", self.promised, self.newest);
        for rank in 0..WORLD {
            let read = |name: &str| {
                let path = self.place.join(format!("{name}-{rank}"));
                std::fs::read_to_string(path).unwrap_or_default()
            };
            eprintln!("--- rank {rank}\n{}{}", read("output"), read("log"));
        }
        for (tier, root) in [("disk", &*self.places.destination()), ("ram", self.places.ram())] {
            let files = files(root);
            let lines: Vec<_> = files.iter().map(|f| f.display().to_string()).collect();
            eprintln!("--- {tier}\n{}", lines.join("\n"));
        }
    }
}

/// The processes of one job. None outlives this.
struct Ranks(Vec<Child>);

impl Ranks {
    /// True: all of them ended by themselves, as the trial wants it.
    fn go_on_for(&mut self, trial: &Trial, time: Duration, mut agent: Option<&mut Agent>) -> bool {
        let begun = Instant::now();
        loop {
            let mut ended = true;
            for child in &mut self.0 {
                let status = child.try_wait().expect("wait");
                let right = status.is_none_or(|s| s.success() && trial.steps.is_some());
                assert!(right, "a rank ended by itself, {status:?}");
                ended &= status.is_some();
            }
            if ended || begun.elapsed() >= time {
                return ended;
            }
            if let Some(agent) = &mut agent {
                agent.live_or_die();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.0 {
            child.kill().expect("kill");
        }
        for child in &mut self.0 {
            child.wait().expect("wait");
        }
    }
}

fn start(place: &Path, ram: &Path, rank: u32, trial: &Trial, hosted: bool) -> Child {
    let log = std::fs::File::create(place.join(format!("output-{rank}"))).expect("output");
    let mut command = Command::new(std::env::current_exe().expect("self"));
    if hosted {
        command.env("TIERKEEP_TEST_HOSTED", "1");
    }
    command
        .args(["a_rank_of_the_job", "--exact", "--nocapture"])
        .env("TIERKEEP_TEST_TRAINER", place)
        .env("TIERKEEP_TEST_RAM", ram)
        .env("TIERKEEP_TEST_RANK", rank.to_string())
        .env("TIERKEEP_TEST_STEPS", trial.steps.unwrap_or(1 << 40).to_string())
        .envs(trial.settings.variables(rank))
        .stdout(Stdio::from(log.try_clone().expect("output")))
        .stderr(Stdio::from(log))
        .spawn()
        .expect("spawn")
}
