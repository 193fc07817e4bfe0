//! One file a command: ask the core, print.

mod gc;
mod inspect;
mod ls;
mod pin;
mod restore;
mod verify;

use std::{io::Write, path::Path};

use tierkeep::{
    names::{CheckpointKey, Step},
    reader::{Reader, StepInfo},
    restore::{decide::Wish, survey::Reach},
};

use crate::{
    cli::{Cli, Command, Which},
    export,
    fail::{Failure, NOT_FOUND, runs_below, say},
    show,
};

/// What every command needs.
pub(crate) struct Context<'a> {
    pub(crate) dest: &'a Path,
    pub(crate) ram_dir: Option<&'a Path>,
    pub(crate) json: bool,
    pub(crate) out: &'a mut dyn Write,
}

impl Context<'_> {
    pub(crate) fn open(&self) -> Result<Reader, Failure> {
        Ok(Reader::open(self.dest, self.ram_dir)?)
    }
}

/// Runs one command; its exit code.
pub(crate) fn run(cli: &Cli, out: &mut dyn Write) -> Result<i32, Failure> {
    let dest = match &cli.command {
        Command::Ls(a) => &a.dest,
        Command::Inspect(a) => &a.dest,
        Command::Verify(a) => &a.dest,
        Command::Restore(a) => &a.dest,
        Command::Export(a) => &a.dest,
        Command::Pin(a) => &a.dest,
        Command::Gc(a) => &a.dest,
    };
    let ram_dir = cli.ram_dir.as_deref();
    let mut context = Context { dest, ram_dir, json: cli.json, out };
    let ended = match &cli.command {
        Command::Ls(args) => ls::run(&mut context, args),
        Command::Inspect(args) => inspect::run(&mut context, args),
        Command::Verify(args) => verify::run(&mut context, args),
        Command::Restore(args) => restore::run(&mut context, args),
        Command::Export(args) => export::run(&mut context, args),
        Command::Pin(args) => pin::run(&mut context, args),
        Command::Gc(args) => gc::run(&mut context, args),
    };
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
