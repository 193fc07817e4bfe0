//! How a command ends badly: a message, a hint, an exit code.

use std::{
    io::{self, Write},
    path::Path,
};

use tierkeep::{Error, ErrorKind, Hint, config, tier::TierKind};

use crate::show::safe;

/// Done.
pub(crate) const OK: i32 = 0;
/// It could not be done.
pub(crate) const FAILED: i32 = 1;
/// The command line is wrong.
pub(crate) const USAGE: i32 = 2;
/// There is no such thing.
pub(crate) const NOT_FOUND: i32 = 3;
/// Damage was found.
pub(crate) const DAMAGE: i32 = 4;
/// Somebody else owns the place.
pub(crate) const FENCED: i32 = 5;

/// Why a command did not do what it was asked.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The core says so.
    Core { error: Box<Error>, hint: Option<String> },
    /// The command says so.
    Own { code: i32, why: String, hint: Option<String> },
    /// Stdout did not take the data.
    Output(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Core { error: Box::new(error), hint: None }
    }
}

impl Failure {
    pub(crate) fn own(code: i32, why: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Own { code, why: why.into(), hint: Some(hint.into()) }
    }

    /// Tells the person; the exit code.
    pub(crate) fn tell(&self) -> i32 {
        let (code, hint) = match self {
            Self::Core { error, hint } => (code_of(error.kind()), hint.clone()),
            Self::Own { code, hint, .. } => (*code, hint.clone()),
            Self::Output(_) => (FAILED, None),
        };
        say(&format!("error: {}", self.why()));
        if let Some(hint) = hint {
            say(&format!("hint: {hint}"));
        }
        code
    }

    /// What went wrong, in a sentence.
    pub(crate) fn why(&self) -> String {
        match self {
            Self::Core { error, .. } => error.chain(),
            Self::Own { why, .. } => why.clone(),
            Self::Output(e) => format!("could not write to stdout: {e}"),
        }
    }

    /// Adds the next step for a person who works on `dest`, where there is one and none is said.
    pub(crate) fn about(mut self, dest: &Path, ram_dir: Option<&Path>) -> Self {
        if let Self::Core { error, hint: hint @ None } = &mut self {
            *hint = hint_for(error, dest, ram_dir);
        }
        self
    }
}

/// The exit code of a kind of error.
pub(crate) fn code_of(kind: ErrorKind) -> i32 {
    match kind {
        ErrorKind::Unavailable | ErrorKind::Invalid | ErrorKind::Bug => FAILED,
        ErrorKind::NotFound => NOT_FOUND,
        ErrorKind::Corrupt => DAMAGE,
        ErrorKind::Fenced => FENCED,
    }
}

/// The core's hint in the command's words; `None` for those that only a job gets.
fn in_flags(hint: Hint) -> Option<String> {
    match hint {
        Hint::AcceptOlder => Some(
            "to leave the ram tier out, give `--ram-dir` an empty directory; to leave the disk out, \
             give the run's directory in the ram tier"
                .into(),
        ),
        Hint::NameAttempt(number) => Some(format!("`--attempt {number}` takes it all the same")),
        Hint::RestoreFirst | Hint::Rollback => None,
    }
}

/// The next step.
pub(crate) fn hint_for(error: &Error, dest: &Path, ram_dir: Option<&Path>) -> Option<String> {
    if let Some(hint) = error.hint().and_then(in_flags) {
        return Some(hint);
    }
    let shown = dest.display();
    let denied = |e: &io::Error| e.kind() == io::ErrorKind::PermissionDenied;
    match error {
        Error::NewerFormat { .. } => Some("`pip install --upgrade tierkeep`".into()),
        Error::Lost { .. } | Error::Broken { .. } | Error::Damaged { .. } => {
            Some(format!("`tierkeep verify {shown}` reads every copy and names what is damaged"))
        }
        Error::Io { source, .. } if denied(source) => {
            Some("run it as the user who owns the files".into())
        }
        Error::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
            Some("make room, or give a directory on another file system".into())
        }
        _ => match error.kind() {
            ErrorKind::NotFound if dest.is_dir() => Some(match runs_below(dest).as_slice() {
                [] => format!("`tierkeep ls {shown}` lists what is there"),
                runs => format!("these look like runs: {}", runs.join(", ")),
            }),
            ErrorKind::NotFound => {
                let root = ram_dir.map_or_else(config::default_ram_root, Into::into);
                Some(format!(
                    "give <root>/<run>, the directory that the job was given; its ram tier was \
                     looked for in {} (--ram-dir, TIERKEEP_RAM_DIR)",
                    root.display()
                ))
            }
            ErrorKind::Bug => Some("please report it, with the whole message".into()),
            _ => None,
        },
    }
}

/// Directories below `dest` that a run's records lie in.
pub(crate) fn runs_below(dest: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dest).into_iter().flatten().flatten();
    let mut runs: Vec<String> = entries
        .filter(|e| e.path().join(tierkeep::names::ATTEMPTS).is_dir())
        .map(|e| e.path().display().to_string())
        .take(5)
        .collect();
    runs.sort();
    runs
}

/// One line to stderr. A terminal gets no control characters that came from a file.
pub(crate) fn say(line: &str) {
    let mut err = io::stderr().lock();
    // Whoever closed stderr wants no talk.
    let _ = writeln!(err, "{}", safe_lines(line));
}

fn safe_lines(text: &str) -> String {
    text.split('\n').map(safe).collect::<Vec<_>>().join("\n")
}

/// `ram` or `disk`, as in the JSON.
pub(crate) fn tier_name(kind: TierKind) -> String {
    kind.to_string()
}
