//! `tierkeep doctor`: what this host offers a job, and what to do where it lacks something.
//!
//! Each finding is one line of what was found and, where something is to be done, one of what. It
//! tries (`tierkeep::probe`) rather than reads settings, where it can; what only a log-out or a full
//! machine would show is read from the host's files (`host`).

mod host;
mod network;
mod tiers;

use std::{io::Write, path::Path};

use serde::Serialize;
use tierkeep::{
    config,
    tier::object::address::{Options, is_url},
};

use self::host::Host;
use crate::{
    cli::Doctor,
    fail::{FAILED, Failure, OK, say},
    show,
};

/// How much it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    /// Worth knowing.
    Note,
    /// It works, and something will be lost or slow one day.
    Warning,
    /// A job will fail.
    Error,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    level: Level,
    topic: &'static str,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

impl Finding {
    fn new(level: Level, topic: &'static str, found: impl Into<String>) -> Self {
        Self { level, topic, found: found.into(), fix: None }
    }

    fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }
}

#[derive(Serialize)]
struct Data<'a> {
    findings: &'a [Finding],
    warnings: usize,
    errors: usize,
}

pub(crate) fn run(
    args: &Doctor,
    ram_dir: Option<&Path>,
    options: &Options,
    json: bool,
    out: &mut dyn Write,
) -> Result<i32, Failure> {
    let ram_root = ram_dir.map_or_else(config::default_ram_root, Into::into);
    let host = Host::here();
    let need = args.need.map(|need| need.as_u64());
    let mut findings = tiers::memory(&ram_root, config::ram_bytes_max()?, need);
    findings.extend(host.memory(&ram_root));
    findings.extend(host.limits());
    findings.extend(host.confinement());
    findings.push(tiers::descriptors());
    findings.extend(args.gossip.map(network::port));
    findings.extend(network::seeds(&args.seeds));
    let dest = args.dest.as_deref();
    // file:// is a directory.
    let dest =
        dest.map(|dest| dest.strip_prefix("file:").map_or(dest.into(), |p| Path::new("/").join(p)));
    match dest {
        Some(dest) => match dest.to_str().filter(|dest| is_url(dest)) {
            Some(url) => findings.extend(tiers::bucket(url, options)),
            None => findings.extend(tiers::disk(&dest)),
        },
        None => {
            let found = "not looked at: give the run's directory or its place in a bucket, as in \
                         `tierkeep doctor /ckpt/run`";
            findings.push(Finding::new(Level::Note, "disk", found));
        }
    }
    let count = |level| findings.iter().filter(|f| f.level == level).count();
    let (warnings, errors) = (count(Level::Warning), count(Level::Error));
    if json {
        show::json(out, &Data { findings: &findings, warnings, errors })?;
    } else {
        text(out, &findings)?;
        out.flush()?;
        let (w, e) = (show::count(warnings, "warning"), show::count(errors, "error"));
        say(&format!("{e}, {w}"));
    }
    Ok(if errors > 0 { FAILED } else { OK })
}

/// `ok       memory  ...`, with what to do on a line of its own.
fn text(out: &mut dyn Write, findings: &[Finding]) -> Result<(), Failure> {
    let width = findings.iter().map(|f| f.topic.len()).max().unwrap_or(0);
    for finding in findings {
        let level = match finding.level {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Warning => "warning",
            Level::Error => "error",
        };
        writeln!(out, "{level:7}  {:width$}  {}", finding.topic, show::safe(&finding.found))?;
        if let Some(fix) = &finding.fix {
            writeln!(out, "{:7}  {:width$}  -> {}", "", "", show::safe(fix))?;
        }
    }
    Ok(())
}
