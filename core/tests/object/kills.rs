//! SIGKILL at random moments of upload, sealing and collection in a bucket, several ranks, sometimes a
//! second collector beside them: every time the bucket alone has the newest checkpoint that was said to be
//! there, or a newer one, bit for bit, and after a start that ended well no part of an upload is left.
//!
//! A trial is one start of a job and its kill; some trials in a row are a run in one place. The ranks are
//! this test binary run again. They reach the server through a proxy, which only tells where they are and
//! lets the request at which they die pass, come late, or be lost.
//!
//! `TIERKEEP_OBJECT_KILLS` says how often (default 12); `TIERKEEP_KILL_SEED` is the seed of the first run,
//! those after it have the next numbers.

mod checks;
mod draw;
mod trainer;
mod watch;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use checks::{Promised, Said};
use draw::{Collector, Lost, Model, Trial};
use watch::{Deed, End, Phase, Watch};

use crate::{
    common::{
        Places, files,
        lives::{Random, forget, number, said, seed},
    },
    servers::{self, Place},
};

const RUN_TRIALS_MAX: u64 = 12;

#[test]
fn a_rank_of_the_job() {
    if let Ok(keep_last) = std::env::var("TIERKEEP_TEST_COLLECTOR") {
        trainer::collect(&keep_last);
    }
    if let Some(place) = std::env::var_os("TIERKEEP_TEST_TRAINER") {
        trainer::live(Path::new(&place)); // Only as a child of the test below.
    }
}

#[test]
fn sigkill_at_any_moment_costs_no_checkpoint_in_the_bucket_and_leaves_no_parts() {
    let kills = number("TIERKEEP_OBJECT_KILLS").unwrap_or(12);
    let seed = seed();
    println!("{kills} kills with a bucket, TIERKEEP_KILL_SEED={seed}");
    let (mut left, mut runs, mut sum) = (kills, 0, Sum::default());
    while left > 0 {
        let seed = seed.wrapping_add(runs);
        let mut random = Random(seed);
        let length = (1 + random.below(RUN_TRIALS_MAX)).min(left);
        let mut run = Run::new(seed, random);
        (0..length).for_each(|_| run.killed(&mut sum));
        run.ends(&mut sum);
        left -= length;
        runs += 1;
    }
    println!("{kills} kills in {runs} runs: {sum:#?}");
}

/// For the words at the end: whether the kills came to where they are of use.
#[derive(Debug, Default)]
struct Sum {
    kills: BTreeMap<Phase, u64>,
    /// Kills at the very request that they were aimed at.
    aimed: BTreeMap<Deed, u64>,
    one_rank_first: u64,
    beside_a_collector: u64,
    sealed_in_bucket: u64,
    /// Steps that a rank was told to be there.
    told: usize,
    deletions: u64,
    uploads_in_parts: u64,
    uploads_swept: u64,
    wiped: u64,
    /// Lives whose ranks all went on from the bucket alone.
    resumed_from_bucket: u64,
    rolled_back: u64,
    /// Requests that the server did not answer in time.
    slow: u64,
}

struct Run {
    seed: u64,
    random: Random,
    model: Model,
    places: Places,
    place: PathBuf,
    watch: Watch,
    bucket: Place,
    trials: u64,
    trial: Option<Trial>,
    promised: Promised,
    /// What the next start resumes from, and whether only the bucket has it.
    newest: u64,
    elsewhere: bool,
}

impl Run {
    fn new(seed: u64, mut random: Random) -> Self {
        let model = Model::draw(&mut random);
        let (places, watch, bucket) = (Places::new(), Watch::new(), servers::s3());
        let place = places.destination().parent().expect("parent").to_path_buf();
        let promised = Promised::default();
        let (trials, trial, newest, elsewhere) = (0, None, 0, false);
        Self {
            seed,
            random,
            model,
            places,
            place,
            watch,
            bucket,
            trials,
            trial,
            promised,
            newest,
            elsewhere,
        }
    }

    fn killed(&mut self, sum: &mut Sum) {
        let trial = Trial::draw(&mut self.random, self.model.world());
        self.trial(&trial, sum);
    }

    /// A job that ends by itself leaves the bucket as it is to be.
    fn ends(mut self, sum: &mut Sum) {
        let trial = Trial::last(&mut self.random);
        self.trial(&trial, sum);
        checks::is_tidy(&self.bucket, &self.model);
    }

    fn trial(&mut self, trial: &Trial, sum: &mut Sum) {
        self.trial = Some(trial.clone());
        self.trials += 1;
        let back = match &*checks::sealed(&self.bucket) {
            [oldest, .., _] if trial.rolls_back => *oldest,
            _ => 0,
        };
        forget(&self.place, self.model.world());
        self.watch.begin(trial.aim);
        self.live(trial, back, sum);
        self.watch.proxy.settle();
        let mut said = Said::of(said(&self.place, self.model.world()));
        // Whoever lives on and loses a request tells it, and asks again.
        let is_lost = trial.aim.is_some_and(|aim| aim.end == End::Lost) && !trial.alone.is_zero();
        said.strange.retain(|told| !is_lost || !told.contains("event object_away: "));
        assert!(said.strange.is_empty(), "told of, and it was only killed: {:#?}", said.strange);
        let newest = if back > 0 { back } else { self.newest };
        let right = said.resumed.iter().all(|step| *step == newest);
        assert!(right, "resumed from {:?}, step {newest} is the newest", said.resumed);
        let all_resumed = newest > 0 && said.resumed.len() == self.model.bytes.len();
        sum.resumed_from_bucket += u64::from(self.elsewhere && all_resumed);
        sum.rolled_back += u64::from(back > 0);
        checks::bucket_alone(&self.bucket, &self.model, &mut self.promised, &said);
        match trial.lost {
            Lost::Nothing => {}
            Lost::Ram => self.places.wipe_ram(),
            Lost::RamAndDisk => {
                self.places.wipe_ram();
                let _ = std::fs::remove_dir_all(self.places.destination());
                sum.wiped += 1;
            }
        }
        self.elsewhere = trial.lost == Lost::RamAndDisk;
        self.newest = checks::resumes_from(&self.places, &self.bucket, &self.model);
        let count = |deed| self.watch.count(deed);
        sum.sealed_in_bucket += count(Deed::Seal);
        sum.told += said.object.len();
        sum.slow += said.slow;
        sum.deletions += count(Deed::Tombstone);
        sum.uploads_in_parts += count(Deed::Complete);
        sum.uploads_swept += count(Deed::Abort);
    }

    /// A job from its start to its end.
    fn live(&self, trial: &Trial, back: u64, sum: &mut Sum) {
        let start = |rank| self.start(rank, trial, back);
        let mut ranks = Processes((0..self.model.world()).map(start).collect());
        let collector = trial.collector.map(|collector| self.start_collector(collector));
        let collector = Processes(collector.into_iter().collect());
        let begun = Instant::now();
        let mut met = false;
        while !met && begun.elapsed() < trial.longest && self.watch.count(Deed::Seal) < trial.seals
        {
            if ranks.have_ended(trial.steps.is_some()) {
                return;
            }
            met = self.watch.is_met(Duration::from_millis(2));
        }
        assert!(trial.steps.is_none(), "it does not end");
        std::thread::sleep(trial.then);
        *sum.kills.entry(self.watch.phase()).or_default() += 1;
        if let Some(aim) = trial.aim.filter(|_| met) {
            *sum.aimed.entry(aim.deed).or_default() += 1;
        }
        sum.beside_a_collector += u64::from(trial.collector.is_some());
        sum.one_rank_first += u64::from(!trial.alone.is_zero());
        let first = ranks.0.swap_remove(trial.first);
        drop(Processes(vec![first]));
        if !trial.alone.is_zero() {
            self.watch.release();
            // The others go on for a while.
            std::thread::sleep(trial.alone);
            assert!(!ranks.have_ended(false));
        }
        drop((ranks, collector));
        self.watch.release();
    }

    fn start(&self, rank: u32, trial: &Trial, back: u64) -> Child {
        self.command(&format!("output-{rank}"))
            .env("TIERKEEP_TEST_TRAINER", &self.place)
            .env("TIERKEEP_TEST_RAM", self.places.ram())
            .env("TIERKEEP_TEST_RANK", rank.to_string())
            .env("TIERKEEP_TEST_WORLD", self.model.world().to_string())
            .env("TIERKEEP_TEST_BYTES", self.model.sizes(rank)[0].to_string())
            .env("TIERKEEP_TEST_STEPS", trial.steps.unwrap_or(1 << 40).to_string())
            .env("TIERKEEP_TEST_BACK_TO", back.to_string())
            .envs(trial.settings.variables())
            .spawn()
            .expect("spawn")
    }

    fn start_collector(&self, collector: Collector) -> Child {
        self.command("output-collector")
            .env("TIERKEEP_TEST_COLLECTOR", collector.keep_last.to_string())
            .env("TIERKEEP_TEST_ABANDONED", u32::from(collector.abandoned).to_string())
            .spawn()
            .expect("spawn")
    }

    fn command(&self, output: &str) -> Command {
        let log = std::fs::File::create(self.place.join(output)).expect("output");
        let mut command = Command::new(std::env::current_exe().expect("self"));
        command
            .args(["kills::a_rank_of_the_job", "--exact", "--nocapture"])
            .env("TIERKEEP_TEST_URL", &self.bucket.url)
            .env("TIERKEEP_TEST_PORT", self.watch.proxy.port.to_string())
            .stdout(Stdio::from(log.try_clone().expect("output")))
            .stderr(Stdio::from(log));
        command
    }
}

impl Drop for Run {
    /// All that can be known of a trial that failed, before its directories go.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let (seed, trials) = (self.seed, self.trials);
        eprintln!("--- again: TIERKEEP_KILL_SEED={seed} TIERKEEP_OBJECT_KILLS={trials}");
        eprintln!("--- trial {trials} of the run: {:#?}\n--- {:?}", self.trial, self.model);
        eprintln!("--- {:?}, resumes from {}", self.promised, self.newest);
        let ranks = (0..self.model.world()).map(|rank| rank.to_string());
        for who in ranks.chain(["collector".into()]) {
            let read = |name: &str| {
                let path = self.place.join(format!("{name}-{who}"));
                std::fs::read_to_string(path).unwrap_or_default()
            };
            eprintln!("--- {who}\n{}{}", read("output"), read("log"));
        }
        for (tier, root) in [("disk", &*self.places.destination()), ("ram", self.places.ram())] {
            let files = files(root);
            let lines: Vec<_> = files.iter().map(|f| f.display().to_string()).collect();
            eprintln!("--- {tier}\n{}", lines.join("\n"));
        }
        eprintln!("--- asked of the bucket\n{}", self.watch.proxy.last(400));
    }
}

/// None outlives this.
struct Processes(Vec<Child>);

impl Processes {
    /// True: all of them, as they are to.
    fn have_ended(&mut self, may: bool) -> bool {
        let mut ended = true;
        for child in &mut self.0 {
            let status = child.try_wait().expect("wait");
            let right = status.is_none_or(|status| status.success() && may);
            assert!(right, "a rank ended by itself, {status:?}");
            ended &= status.is_some();
        }
        ended
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.0 {
            child.kill().expect("kill");
        }
        for child in &mut self.0 {
            child.wait().expect("wait");
        }
    }
}
