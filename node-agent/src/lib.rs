//! The `tierkeep` command: looking at a run's checkpoints, and caring for them, with the job down
//! or up. The `tierkeep` of the wheel calls [`run`] too.
//!
//! arguments (`cli`) -> one command (`commands`) -> data to stdout, talk to stderr, an exit code
//!
//! An agent's own side of what it is asked is in [`service`]; which other agents there are, in
//! [`cluster`].
//!
//! It owns words, tables, JSON and file formats of other people. It decides nothing about a
//! checkpoint: that is the core's.

mod cli;
pub mod cluster;
mod commands;
mod device_plugin;
mod doctor;
mod export;
pub mod service;

mod fail;
pub mod identity;
mod kubernetes;
pub mod mesh;
mod progress;
mod show;
mod told;
mod tree;

use std::{
    ffi::OsString,
    io::{self, BufWriter, Write},
};

use clap::Parser;

use crate::{cli::Cli, fail::Failure};

/// Runs the command with these arguments, the program's name first; its exit code.
#[must_use]
pub fn run(args: Vec<OsString>) -> i32 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to stdout; a reader that is gone has seen enough.
            let _ = error.print();
            return error.exit_code();
        }
    };
    let mut out = BufWriter::new(io::stdout().lock());
    let ended = commands::run(&cli, &mut out)
        .and_then(|code| out.flush().map(|()| code).map_err(Failure::from));
    match ended {
        Ok(code) => code,
        // `tierkeep ls | head`: the reader has seen enough.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => 0,
        Err(failure) => {
            // What was found before the failure is data all the same.
            let _ = out.flush();
            failure.tell()
        }
    }
}
