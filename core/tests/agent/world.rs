//! Agents and trainers for tests: in this process, or as children that can be killed.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::{net::UnixListener, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use tierkeep::{
    checkpointer::Checkpointer,
    config::Config,
    host::{Host, Settings},
    save::{Level, Save},
};

use crate::common::{self, Model, SMALL, config, events, resume, settings};

/// How long anything here may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// An agent in this process.
pub struct Hosted {
    pub host: Arc<Host>,
    serving: Option<std::thread::JoinHandle<()>>,
}

impl Hosted {
    pub fn new(settings: Settings) -> Self {
        let (host, listener) = Host::open(settings).unwrap();
        Self { host: host.clone(), serving: Some(serve(host, listener)) }
    }

    fn stop(&mut self) {
        self.host.end();
        if let Some(serving) = self.serving.take() {
            serving.join().unwrap();
        }
    }
}

impl Drop for Hosted {
    fn drop(&mut self) {
        self.stop();
    }
}

fn serve(host: Arc<Host>, listener: UnixListener) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || host.serve(&listener).unwrap())
}

/// The settings of a rank that has the agent at `ram`.
pub fn far(destination: &Path, ram: &Path, rank: u32, world: u32) -> Config {
    let mut config = config(destination, ram, rank, world);
    config.agent = Some(ram.join("agent.sock"));
    config
}

/// Looks until it is so.
pub fn until(what: &str, mut so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// This binary again, in a part: it says lines, and is told lines.
pub struct Actor {
    child: Child,
    lines: mpsc::Receiver<String>,
    stdin: ChildStdin,
}

impl Actor {
    pub fn new(part: &str, place: &Path, more: &[(&str, String)]) -> Self {
        Self::of(part, place, more, None)
    }

    fn of(part: &str, place: &Path, more: &[(&str, String)], uid: Option<u32>) -> Self {
        // By this name another user runs it too, where this checkout lies in a home of ours.
        Self::start(Command::new("/proc/self/exe"), part, place, more, uid)
    }

    /// In a control group, from its first page on.
    pub fn in_group(group: &Path, part: &str, place: &Path, more: &[(&str, String)]) -> Self {
        let mut command = Command::new("sh");
        let enter = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", group.display());
        command.args(["-c", &enter, "sh"]).arg(std::env::current_exe().unwrap());
        Self::start(command, part, place, more, None)
    }

    fn start(
        mut command: Command,
        part: &str,
        place: &Path,
        more: &[(&str, String)],
        uid: Option<u32>,
    ) -> Self {
        command.args(["world::a_part", "--exact", "--nocapture", "--test-threads=1"]);
        command.env("TIERKEEP_TEST_PART", part).env("TIERKEEP_TEST_PLACE", place);
        command.envs(more.iter().map(|(name, value)| (*name, value)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(uid) = uid {
            command.uid(uid).gid(uid).current_dir("/");
        }
        let mut child = command.spawn().unwrap();
        let (sender, lines) = mpsc::channel();
        let stdout = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // libtest begins a line of its own before ours.
                let Some(at) = line.find("> ") else { continue };
                if sender.send(line[at + 2..].to_owned()).is_err() {
                    return;
                }
            }
        });
        let stdin = child.stdin.take().unwrap();
        Self { child, lines, stdin }
    }

    /// The next line that begins so; the rest of it.
    pub fn hear(&self, begins: &str) -> String {
        let begun = Instant::now();
        loop {
            let left = PATIENCE.saturating_sub(begun.elapsed());
            let line = self.lines.recv_timeout(left);
            let line = line.unwrap_or_else(|e| panic!("waiting for {begins:?}: {e}"));
            if let Some(rest) = line.strip_prefix(begins) {
                return rest.trim().to_owned();
            }
            println!("heard {line:?} before {begins:?}");
        }
    }

    pub fn tell(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").unwrap();
    }

    pub fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.hear(line.split(' ').next().unwrap())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn agent(ram: &Path) -> Actor {
    let actor = Actor::new("agent", ram, &[]);
    actor.hear("serves");
    actor
}

pub fn trainer(destination: &Path, ram: &Path, rank: u32, world: u32) -> Actor {
    let more = of_rank(destination, rank, world);
    Actor::new("trainer", ram, &more)
}

/// A lone trainer, with more variables.
pub fn trainer_with(destination: &Path, ram: &Path, more: &[(&'static str, String)]) -> Actor {
    let mut all = of_rank(destination, 0, 1).to_vec();
    all.extend_from_slice(more);
    Actor::new("trainer", ram, &all)
}

/// A lone trainer that is another user's process.
pub fn trainer_as(uid: u32, destination: &Path, ram: &Path) -> Actor {
    Actor::of("trainer", ram, &of_rank(destination, 0, 1), Some(uid))
}

fn of_rank(destination: &Path, rank: u32, world: u32) -> [(&'static str, String); 3] {
    [
        ("TIERKEEP_TEST_DEST", destination.display().to_string()),
        ("TIERKEEP_TEST_RANK", rank.to_string()),
        ("TIERKEEP_TEST_WORLD", world.to_string()),
    ]
}

fn say(line: &str) {
    // Whole, whatever else prints.
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(format!("> {line}\n").as_bytes());
    let _ = out.flush();
}

#[test]
fn a_part() {
    let Some(part) = std::env::var_os("TIERKEEP_TEST_PART") else { return };
    let place = PathBuf::from(std::env::var_os("TIERKEEP_TEST_PLACE").unwrap());
    match part.to_str().unwrap() {
        "agent" => {
            let mut settings = settings(&place);
            let max = std::env::var("TIERKEEP_TEST_RAM_BYTES_MAX").ok();
            settings.ram_bytes_max = max.map(|max| max.parse().unwrap());
            let (host, listener) = match Host::open(settings) {
                Ok(opened) => opened,
                Err(e) => return say(&format!("refused {}", e.chain())),
            };
            say("serves");
            host.serve(&listener).unwrap();
        }
        "trainer" => train(&place),
        other => panic!("{other}"),
    }
}

/// Does what it is told, one line after the other.
fn train(ram: &Path) {
    let text = |name: &str| std::env::var(name).unwrap();
    let number = |name: &str| text(name).parse::<u32>().unwrap();
    let (rank, world) = (number("TIERKEEP_TEST_RANK"), number("TIERKEEP_TEST_WORLD"));
    let mut config = far(Path::new(&text("TIERKEEP_TEST_DEST")), ram, rank, world);
    if std::env::var_os("TIERKEEP_TEST_DISK_EVERY").is_some() {
        config.disk_every = number("TIERKEEP_TEST_DISK_EVERY").into();
    }
    let ckpt = match Checkpointer::open(config) {
        Ok(ckpt) => ckpt,
        Err(e) => return say(&format!("refused {}", e.chain())),
    };
    say("open");
    let mut last: Option<Save> = None;
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split(' ').collect();
        let step = || words[1].parse::<u64>().unwrap();
        match words[0] {
            "resume" => match resume(&ckpt, &SMALL) {
                Ok(step) => say(&format!("resume {step}")),
                Err(e) => say(&format!("resume {}", e.chain())),
            },
            "save" => {
                // Mebibytes, where they are named.
                let large = words.get(2).map(|mib| vec![mib.parse::<usize>().unwrap() << 20]);
                let sizes = large.as_deref().unwrap_or(&SMALL);
                let saved = Model::at(rank, sizes, step()).save(&ckpt, step());
                say(&format!(
                    "save {}",
                    saved.as_ref().map_or_else(|e| e.chain(), |_| "ok".into())
                ));
                last = saved.ok();
            }
            "wait" => {
                let level = if words[1] == "disk" { Level::Disk } else { Level::Ram };
                let reached = last.as_ref().unwrap().poll(level, false, PATIENCE);
                say(&format!("wait {}", reached.map_or_else(|e| e.chain(), |r| r.to_string())));
            }
            "list" => {
                let listed = std::fs::read_dir(words[1]).map(|all| all.count());
                say(&format!("list {listed:?}"));
            }
            "fork" => {
                // SAFETY: the child calls nothing but what is safe after a fork, and never returns.
                let child = unsafe { libc::fork() };
                if child == 0 {
                    loop {
                        // SAFETY: it waits, with all that it inherited, for its death.
                        unsafe { libc::pause() };
                    }
                }
                say(&format!("fork {child}"));
            }
            "events" => say(&format!("events {}", events(&ckpt).join(" | "))),
            "close" => {
                common::close(&ckpt);
                say("close");
            }
            other => panic!("{other}"),
        }
    }
}
