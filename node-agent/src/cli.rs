//! The arguments, and the words of `--help`.

mod agent;

use std::{net::SocketAddr, ops::RangeInclusive, path::PathBuf, time::Duration};

use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand};

pub(crate) use self::agent::AgentArgs;

const EXIT_CODES: &str = "\
Data goes to stdout (with --json in stable keys), talk to stderr.

Exit codes:
  0  done
  1  it could not be done: the message says why
  2  the command line is wrong
  3  there is no such run, step, rank or tensor
  4  damage was found
  5  a live process or a newer attempt owns the place";

/// Look at the checkpoints of a run, and care for them.
///
/// DEST is <root>/<run>, the directory or the bucket (s3://bucket/root/run, gs://, az://, file://) that the
/// job was given; its ram tier is found by itself. A run's directory in the ram tier can be given too. The
/// job may be down or up.
#[derive(Debug, Parser)]
#[command(name = "tierkeep", version, after_help = EXIT_CODES, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Where the ram tiers lie [default: TIERKEEP_RAM_DIR, else /dev/shm/tierkeep-<uid>]
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) ram_dir: Option<PathBuf>,
    /// For the bucket, beside what AWS_*, GOOGLE_* or AZURE_* say, as in aws_endpoint=http://host:9000
    #[arg(long = "option", global = true, value_name = "NAME=VALUE", value_parser = option)]
    pub(crate) options: Vec<(String, String)>,
}

fn option(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => Err("it is NAME=VALUE".into()),
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the checkpoints: where they are, whether they are complete, which one a resume takes
    #[command(after_help = EXIT_CODES)]
    Ls(Ls),
    /// Show one checkpoint: its tensors and values, and where each tier stands
    #[command(after_help = EXIT_CODES)]
    Inspect(Inspect),
    /// Read every byte of every copy and name what is damaged
    ///
    /// Clears the marks of ranks that once found no good copy, where all is good now.
    #[command(after_help = EXIT_CODES)]
    Verify(Verify),
    /// Copy a checkpoint, checked, to a run's directory or a bucket: another one, or its own from RAM
    #[command(after_help = EXIT_CODES)]
    Restore(Restore),
    /// Write the whole tensors of all ranks to a .safetensors or .pt file
    #[command(after_help = EXIT_CODES)]
    Export(Export),
    /// Keep a checkpoint whatever the retention says
    #[command(after_help = EXIT_CODES)]
    Pin(Pin),
    /// Delete what a policy does not keep, and what dead writers and collectors left
    ///
    /// Without --keep-last no complete checkpoint of the run's lineage is deleted. The newest one,
    /// pinned ones and what a live job is writing are never deleted.
    #[command(after_help = EXIT_CODES)]
    Gc(Gc),
    /// Own the ram tier of this node, for trainers that may die
    ///
    /// Settings are taken from a file (/etc/tierkeep/agent.toml where no other is named), then from
    /// TIERKEEP_* variables, then from flags; the later one counts. On SIGTERM it ends, and what is in
    /// RAM stays there for the next agent: an upgrade costs no checkpoint.
    #[command(after_help = EXIT_CODES)]
    Agent(Box<AgentArgs>),
    /// Ask the agent of this node: its ranks, how far they are, what is wrong
    #[command(after_help = EXIT_CODES)]
    Status(Status),
    /// The same again and again, with the rates; Ctrl-C ends it
    ///
    /// On a terminal it is drawn anew, elsewhere it is printed once an interval (with --json, one
    /// line each time).
    #[command(after_help = EXIT_CODES)]
    Top(Top),
    /// Try what this host offers a job: memory, disk or bucket, limits; and say what to do
    ///
    /// Writes 64 MiB (to a bucket 128 MiB) beside DEST, or where it will be, and removes them again.
    #[command(after_help = EXIT_CODES)]
    Doctor(Doctor),
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// The run's directory, or its place in a bucket; it need not be there yet
    pub(crate) dest: Option<PathBuf>,
    /// Memory that the job's slots need on this host, as in 160GiB: bytes of the state of each rank,
    /// times the ranks on the host, times `slots` (2)
    #[arg(long, value_name = "SIZE")]
    pub(crate) need: Option<ByteSize>,
    /// Whether an agent could listen here for others, as in [::]:9178 (TCP and UDP)
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) gossip: Option<SocketAddr>,
    /// Whether these agents can be reached, as in gpu-1:9178; a name with many addresses is all of them
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    pub(crate) seeds: Vec<String>,
}

/// Which agent.
#[derive(Clone, Debug, Args)]
pub(crate) struct Node {
    /// The socket where its trainers find it [default: TIERKEEP_AGENT, else the one that a job would
    /// find]
    #[arg(long, value_name = "SOCKET")]
    pub(crate) agent: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AgentCommand {
    /// Carry everything that is only in RAM to disk, and say what made it; trainers go on
    #[command(after_help = EXIT_CODES)]
    Drain(Drain),
    /// Fetch what ranks that are to come to this node would resume from, before their trainers ask
    #[command(after_help = EXIT_CODES)]
    Prefetch(Prefetch),
    /// Offer this node's agent to pods that may mount nothing of the host, by the kubelet's device plugins
    ///
    /// A pod that asks for the resource gets the directory of the agent's socket. Needs a user who may
    /// write to the kubelet's directory (root), and nothing else of one.
    #[command(after_help = EXIT_CODES)]
    DevicePlugin(DevicePlugin),
}

#[derive(Clone, Debug, Args)]
pub(crate) struct DevicePlugin {
    /// The agent's socket, as this process reaches it
    #[arg(long, value_name = "PATH", default_value = "/run/tierkeep/agent.sock")]
    pub(crate) socket: PathBuf,
    /// The directory of that socket on the host, which pods get at /run/tierkeep
    #[arg(long, value_name = "PATH", default_value = "/run/tierkeep")]
    pub(crate) host_dir: PathBuf,
    /// The kubelet's directory for plugins
    #[arg(long, value_name = "PATH", default_value = "/var/lib/kubelet/device-plugins")]
    pub(crate) kubelet_dir: PathBuf,
    /// What pods ask for
    #[arg(long, value_name = "NAME", default_value = "tierkeep.dev/agent")]
    pub(crate) resource: String,
    /// How many containers of this node may have it at once
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = places())]
    pub(crate) places: u16,
}

#[derive(Debug, Args)]
pub(crate) struct Prefetch {
    #[command(flatten)]
    pub(crate) node: Node,
    /// The run's directory, as the job names it
    pub(crate) dest: PathBuf,
    /// A rank that this node will have, or several, as in 8-15; may be given more than once
    #[arg(long = "rank", value_name = "RANKS", required = true, value_parser = ranks)]
    pub(crate) ranks: Vec<RangeInclusive<u32>>,
    /// Whose run it is, as numbers; without: the user who runs the agent
    #[arg(long, value_name = "UID:GID", value_parser = user)]
    pub(crate) user: Option<(u32, u32)>,
    /// How long it may take, as in 2min
    #[arg(long, value_name = "TIME", default_value = "10min", value_parser = time)]
    pub(crate) deadline: Duration,
}

fn places() -> clap::builder::RangedI64ValueParser<u16> {
    clap::value_parser!(u16).range(1..=4096)
}

/// `3` or `8-15`.
fn ranks(text: &str) -> Result<RangeInclusive<u32>, String> {
    let number = |text: &str| text.parse::<u32>().map_err(|_| "give it as in 3 or 8-15".to_owned());
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (number(first)?, number(last)?);
    if first > last {
        return Err(format!("{first} is more than {last}"));
    }
    if last - first >= RANKS_MAX {
        return Err(format!("a node has {RANKS_MAX} ranks at most"));
    }
    Ok(first..=last)
}

/// What fits into one question.
const RANKS_MAX: u32 = 1024;

fn user(text: &str) -> Result<(u32, u32), String> {
    let pair = text.split_once(':').and_then(|(u, g)| Some((u.parse().ok()?, g.parse().ok()?)));
    pair.ok_or_else(|| "give it as in 1000:1000".into())
}

#[derive(Debug, Args)]
pub(crate) struct Drain {
    #[command(flatten)]
    pub(crate) node: Node,
    /// How long it may take, as in 2min
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = time)]
    pub(crate) deadline: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct Status {
    #[command(flatten)]
    pub(crate) node: Node,
    /// The agents that this one sees alive, who of them holds what of its runs, and which node must not
    /// be lost now; instead of its ranks
    #[arg(long)]
    pub(crate) cluster: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Top {
    #[command(flatten)]
    pub(crate) node: Node,
    /// How often, as in 500ms
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = interval)]
    pub(crate) interval: Duration,
}

/// A time between two looks.
fn interval(text: &str) -> Result<Duration, String> {
    const LEAST: Duration = Duration::from_millis(100);
    time(text).and_then(|time| if time < LEAST { Err("100ms at least".into()) } else { Ok(time) })
}

/// A length of time.
fn time(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|e| format!("{e}: give it as in 30s or 500ms"))
}

/// Which checkpoint, where it need not be named.
#[derive(Clone, Debug, Args)]
pub(crate) struct Which {
    /// The step [default: the one that a resume takes]
    #[arg(long, value_name = "N")]
    pub(crate) step: Option<u64>,
    /// The attempt that saved it, where several saved the step or the run has abandoned it
    #[arg(long, value_name = "N")]
    pub(crate) attempt: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct Ls {
    /// The run's directory, or its place in a bucket
    pub(crate) dest: PathBuf,
    /// Only this step, rank by rank
    #[arg(long, value_name = "N")]
    pub(crate) step: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// The run's directory, or its place in a bucket
    pub(crate) dest: PathBuf,
    #[command(flatten)]
    pub(crate) which: Which,
    /// Only this rank's shard
    #[arg(long, value_name = "N")]
    pub(crate) rank: Option<u32>,
    /// Only tensors whose name matches; `*` stands for any characters, `?` for one
    #[arg(long, value_name = "GLOB")]
    pub(crate) tensors: Option<String>,
    /// All values, not only the first ones
    #[arg(long)]
    pub(crate) values: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// The run's directory, or its place in a bucket
    pub(crate) dest: PathBuf,
    /// Only this step
    #[arg(long, value_name = "N", conflicts_with = "all")]
    pub(crate) step: Option<u64>,
    /// Every checkpoint (the default)
    #[arg(long)]
    pub(crate) all: bool,
    /// In a bucket that keeps checksums, read every byte all the same, instead of asking for them
    #[arg(long)]
    pub(crate) deep: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// The run's directory, or its place in a bucket
    pub(crate) dest: PathBuf,
    /// Where to copy to, <root>/<run>, a directory or in a bucket: new, or of the same run
    #[arg(long, value_name = "DEST")]
    pub(crate) to: PathBuf,
    #[command(flatten)]
    pub(crate) which: Which,
}

#[derive(Debug, Args)]
pub(crate) struct Export {
    /// The run's directory, or its place in a bucket
    pub(crate) dest: PathBuf,
    /// The file to write: .safetensors, or .pt or .pth for torch.load
    #[arg(long, value_name = "FILE")]
    pub(crate) to: PathBuf,
    #[command(flatten)]
    pub(crate) which: Which,
    /// Only this rank's shard, where ranks hold different bytes under one name
    #[arg(long, value_name = "N")]
    pub(crate) rank: Option<u32>,
    /// Only tensors whose name matches (repeatable); `*` stands for any characters, `?` for one
    #[arg(long, value_name = "GLOB")]
    pub(crate) include: Vec<String>,
    /// Only tensors below this path, without it in their names: `--prefix model` makes
    /// `model/layers.0.weight` to `layers.0.weight`
    #[arg(long, value_name = "PATH")]
    pub(crate) prefix: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Pin {
    /// The run's directory, or its place in a bucket
    pub(crate) dest: PathBuf,
    /// The step
    pub(crate) step: u64,
    /// The attempt that saved it, where several saved the step
    #[arg(long, value_name = "N")]
    pub(crate) attempt: Option<u32>,
    /// Take the pin away
    #[arg(long)]
    pub(crate) remove: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Gc {
    /// The run's directory, or its place in a bucket
    pub(crate) dest: PathBuf,
    /// Keep the newest so many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) keep_last: Option<u64>,
    /// Also keep steps divisible by it
    #[arg(long, value_name = "N", requires = "keep_last",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) keep_every: Option<u64>,
    /// Also keep the first of each period of so many hours
    #[arg(long, value_name = "N", requires = "keep_last",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) keep_hours: Option<u64>,
    /// How long the bytes of a deleted checkpoint stay in a bucket, for who reads it, as in 10m [default:
    /// TIERKEEP_OBJECT_GRACE_S, else 5m]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) grace: Option<std::time::Duration>,
    /// Also delete the branches that the run has abandoned
    #[arg(long)]
    pub(crate) abandoned: bool,
    /// Say what would be deleted, and delete nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}
