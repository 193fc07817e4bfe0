//! One file a command: ask the core, print.

pub(crate) mod cluster;
mod drain;
mod gc;
mod inspect;
mod ls;
mod pin;
mod prefetch;
mod reach;
mod restore;
mod status;
mod top;
mod verify;

use std::{io::Write, path::Path};

use tierkeep::{
    names::{CheckpointKey, Step},
    reader::{Reader, StepInfo},
    restore::{decide::Wish, survey::Reach},
    tier::object::address::Options,
};

use crate::{
    cli::{AgentCommand, Cli, Command, Which},
    device_plugin, doctor, export,
    fail::{Failure, NOT_FOUND, runs_below, say},
    service, show,
};

/// What every command needs.
pub(crate) struct Context<'a> {
    pub(crate) dest: &'a Path,
    pub(crate) ram_dir: Option<&'a Path>,
    /// For the bucket, where there is one.
    pub(crate) options: &'a Options,
    pub(crate) json: bool,
    pub(crate) out: &'a mut dyn Write,
}

impl Context<'_> {
    pub(crate) fn open(&self) -> Result<Reader, Failure> {
        Ok(Reader::open_with(self.dest, self.ram_dir, self.options)?)
    }
}

/// Runs one command; its exit code.
pub(crate) fn run(cli: &Cli, out: &mut dyn Write) -> Result<i32, Failure> {
    let ram_dir = cli.ram_dir.as_deref();
    let json = cli.json;
    match &cli.command {
        Command::Ls(args) => on(cli, out, &args.dest, |c| ls::run(c, args)),
        Command::Inspect(args) => on(cli, out, &args.dest, |c| inspect::run(c, args)),
        Command::Verify(args) => on(cli, out, &args.dest, |c| verify::run(c, args)),
        Command::Restore(args) => on(cli, out, &args.dest, |c| restore::run(c, args)),
        Command::Export(args) => on(cli, out, &args.dest, |c| export::run(c, args)),
        Command::Pin(args) => on(cli, out, &args.dest, |c| pin::run(c, args)),
        Command::Gc(args) => on(cli, out, &args.dest, |c| gc::run(c, args)),
        Command::Agent(args) => match &args.command {
            None => service::run(args, ram_dir, json, out),
            Some(AgentCommand::Drain(args)) => {
                drain::run(args.node.agent.as_deref(), args.deadline, json, out)
            }
            Some(AgentCommand::Prefetch(args)) => prefetch::run(args, json, out),
            Some(AgentCommand::DevicePlugin(args)) => device_plugin::run(args),
        },
        Command::Status(args) => status::run(args, json, out),
        Command::Top(args) => top::run(args, json, out),
        Command::Doctor(args) => {
            let options = cli.options.iter().cloned().collect();
            doctor::run(args, ram_dir, &options, json, out)
        }
    }
}

/// Runs a command on one run.
fn on(
    cli: &Cli,
    out: &mut dyn Write,
    dest: &Path,
    command: impl FnOnce(&mut Context<'_>) -> Result<i32, Failure>,
) -> Result<i32, Failure> {
    let ram_dir = cli.ram_dir.as_deref();
    let options = cli.options.iter().cloned().collect();
    let ended = command(&mut Context { dest, ram_dir, options: &options, json: cli.json, out });
    ended.map_err(|failure| failure.about(dest, ram_dir))
}

/// The checkpoint that is meant, whole, and its saver set; what was passed over is said.
pub(crate) fn choose(reader: &Reader, which: &Which) -> Result<(CheckpointKey, Vec<u32>), Failure> {
    let wish = Wish { step: which.step.map(Step), attempt: which.attempt, accept_older: false };
    let (key, savers, passed_over) = reader.choose(&wish)?;
    for why in passed_over {
        say(&format!("warning: passed over {why}"));
    }
    Ok((key, savers))
}

/// Nothing is there, in words.
pub(crate) fn no_run(dest: &Path) -> Failure {
    let hint = match runs_below(dest).as_slice() {
        [] => "give <root>/<run>, the directory that the job was given".to_owned(),
        runs => format!("these look like runs: {}", runs.join(", ")),
    };
    Failure::own(NOT_FOUND, format!("{} holds no run", dest.display()), hint)
}

/// No such step, in words.
pub(crate) fn no_step(dest: &Path, step: u64) -> Failure {
    Failure::own(
        NOT_FOUND,
        format!("step {step} was not found in {}", dest.display()),
        format!("`tierkeep ls {}` lists the steps that are there", dest.display()),
    )
}

/// One word for programs.
pub(crate) fn state_word(reach: &Reach) -> &'static str {
    match reach {
        Reach::Whole(_) => "complete",
        Reach::Broken(_) => "broken",
        Reach::Unfinished(_) => "unfinished",
        Reach::Deleted => "deleting",
    }
}

/// The same with what a person wants to know.
pub(crate) fn state_text(info: &StepInfo) -> String {
    match &info.reach {
        Reach::Unfinished(missing) if !missing.is_empty() => {
            let ranks = show::ranges(missing);
            let s = if missing.len() == 1 { "" } else { "s" };
            format!("unfinished: rank{s} {ranks} missing")
        }
        reach => state_word(reach).into(),
    }
}

/// The saver set as far as it is known.
pub(crate) fn savers(info: &StepInfo) -> Vec<u32> {
    let mut ranks: Vec<u32> = info.shards.iter().map(|s| s.rank.0).collect();
    if let Reach::Whole(savers) | Reach::Unfinished(savers) = &info.reach {
        ranks.extend(savers);
    }
    ranks.sort_unstable();
    ranks.dedup();
    ranks
}
