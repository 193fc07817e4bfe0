//! What can go wrong, said twice: in words for people ([`Error`]), in six kinds for programs
//! ([`ErrorKind`]).
//!
//! A message says what was being done, to which shard, where; the cause is in `source` and is
//! printed after it by [`Error::chain`], never in both.

use std::{io, path::PathBuf};

use crate::names::{Rank, Step};

/// The result of anything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller can do. Variants of [`Error`] come and go; these six do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The tier did not answer, or not in time. Training may go on; the same call may work later.
    Unavailable,
    /// Bytes came back different from how they went in. Try another tier.
    Corrupt,
    /// A newer attempt, or another live process, owns this place. Stop.
    Fenced,
    /// There is no such run, step or tensor.
    NotFound,
    /// The caller asked for something that cannot be done as asked.
    Invalid,
    /// tierkeep is wrong. Please report it.
    Bug,
}

/// Everything that can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call failed while doing `what`.
    #[error("could not {what}")]
    Io {
        /// The deed and its object, as in `write step 1000, rank 3 to the disk tier`.
        what: String,
        /// The operating system's answer.
        source: io::Error,
    },
    /// A file does not hold what was written.
    #[error("{file} is damaged: {why}")]
    Damaged {
        /// The file, as the person sees it.
        file: String,
        /// What differs, with chunk numbers where there are any.
        why: String,
    },
    /// A file was written by a newer tierkeep.
    #[error("{file} has format {found}, this tierkeep reads up to {known}: upgrade tierkeep")]
    NewerFormat {
        /// The file.
        file: String,
        /// The format or feature in the file.
        found: String,
        /// The newest that this build knows.
        known: String,
    },
    /// Nothing is there.
    #[error("{what} was not found")]
    NotFound {
        /// What was looked for, and where.
        what: String,
    },
    /// No good copy of a rank's bytes is left in any tier.
    #[error("{step}, {rank}: no tier has a good copy ({why})")]
    Lost {
        /// The step.
        step: Step,
        /// The rank.
        rank: Rank,
        /// What each tier answered.
        why: String,
    },
    /// What was wished for is there, and no tier, or no set of them, has all of it.
    #[error("{what} cannot be restored: {why}")]
    Broken {
        /// `step 30 of attempt 1`, or all that was wished for.
        what: String,
        /// Which ranks' shards are bad, and where.
        why: String,
    },
    /// The budget is too small; `sum` shows the addition.
    #[error("the memory budget is too small: {sum}")]
    Budget {
        /// The addition, in bytes and in words.
        sum: String,
    },
    /// Another process or a newer attempt owns the place.
    #[error("{why}")]
    Fenced {
        /// Who owns what.
        why: String,
    },
    /// A deadline passed.
    #[error("{what} did not happen within {seconds:.1} s{missing}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// The deadline in seconds.
        seconds: f64,
        /// Who was missing, as `: missing rank 3`, or nothing.
        missing: String,
    },
    /// A save that was not carried out, or not to this tier.
    #[error("{step} was not saved: {why}")]
    Skipped {
        /// The step.
        step: Step,
        /// Why.
        why: String,
    },
    /// The caller's mistake.
    #[error("{why}")]
    Invalid {
        /// What is wrong, and what would be right.
        why: String,
    },
    /// The state and the checkpoint do not fit together. One line for each difference.
    #[error("{}", differences(.0))]
    Mismatch(Vec<String>),
    /// An object in the state that cannot be stored.
    #[error("cannot store {path}: {why}")]
    Unstorable {
        /// Where in the tree.
        path: String,
        /// Its type and what to do.
        why: String,
    },
    /// A failure that the caller can get around by asking otherwise.
    #[error(transparent)]
    Hinted(Hinted),
    /// An invariant of tierkeep does not hold.
    #[error("this is a bug in tierkeep: {0}")]
    Bug(String),
    /// The same failure, told to several waiters.
    #[error("{message}")]
    Shared {
        /// The kind of the first telling.
        kind: ErrorKind,
        /// The whole chain of the first telling.
        message: String,
    },
}

/// What the caller could ask for instead. The core does not say how: in Python that is a keyword
/// argument, in the command a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// Go on without the tier that does not answer.
    AcceptOlder,
    /// Name this attempt, whose branch the run has abandoned.
    NameAttempt(u32),
    /// Restore before the first save, or begin anew on purpose.
    RestoreFirst,
    /// Restore an older step by a rollback.
    Rollback,
}

/// An error, which stays what it is, and a hint.
#[derive(Debug)]
pub struct Hinted {
    error: Box<Error>,
    hint: Hint,
}

impl std::fmt::Display for Hinted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Hinted {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

fn differences(list: &[String]) -> String {
    let s = if list.len() == 1 { "" } else { "s" };
    let n = list.len();
    format!("the checkpoint does not fit the state: {n} difference{s}\n  {}", list.join("\n  "))
}

impl Error {
    /// What the caller can do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                io::ErrorKind::PermissionDenied
                | io::ErrorKind::NotADirectory
                | io::ErrorKind::IsADirectory
                | io::ErrorKind::ReadOnlyFilesystem => ErrorKind::Invalid,
                _ => ErrorKind::Unavailable,
            },
            Self::Damaged { .. } | Self::Lost { .. } | Self::Broken { .. } => ErrorKind::Corrupt,
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Fenced { .. } => ErrorKind::Fenced,
            Self::Deadline { .. } | Self::Skipped { .. } => ErrorKind::Unavailable,
            Self::NewerFormat { .. }
            | Self::Budget { .. }
            | Self::Invalid { .. }
            | Self::Mismatch(_)
            | Self::Unstorable { .. } => ErrorKind::Invalid,
            Self::Bug(_) => ErrorKind::Bug,
            Self::Hinted(hinted) => hinted.error.kind(),
            Self::Shared { kind, .. } => *kind,
        }
    }

    /// The message and its causes, joined by colons: what a person reads.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(next) = cause {
            text.push_str(": ");
            text.push_str(&next.to_string());
            cause = next.source();
        }
        text
    }

    /// What the caller could ask for instead, if there is such a thing.
    #[must_use]
    pub fn hint(&self) -> Option<Hint> {
        match self {
            Self::Hinted(hinted) => Some(hinted.hint),
            _ => None,
        }
    }

    /// Without its hint.
    pub(crate) fn plain(&self) -> &Self {
        match self {
            Self::Hinted(hinted) => &hinted.error,
            other => other,
        }
    }

    pub(crate) fn with_hint(self, hint: Hint) -> Self {
        Self::Hinted(Hinted { error: Box::new(self), hint })
    }

    /// A copy for another waiter: same kind, the whole chain as its message.
    #[must_use]
    pub fn shared(&self) -> Self {
        Self::Shared { kind: self.kind(), message: self.chain() }
    }

    /// True where the thing simply is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.kind() == ErrorKind::NotFound
    }

    pub(crate) fn invalid(why: impl Into<String>) -> Self {
        Self::Invalid { why: why.into() }
    }

    pub(crate) fn damaged(file: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Damaged { file: file.into(), why: why.into() }
    }
}

/// Adds the deed to an [`io::Error`]: `file.sync_data().doing(|| format!("sync {path}"))?`.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
    fn at(self, verb: &str, path: &std::path::Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io { what: what(), source: source.into() })
    }

    fn at(self, verb: &str, path: &std::path::Path) -> Result<T> {
        self.doing(|| format!("{verb} {}", PathBuf::from(path).display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_changes_neither_message_nor_kind_nor_cause() {
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let plain = || Error::Io { what: "write x".into(), source: full() };
        let hinted = plain().with_hint(Hint::AcceptOlder);
        assert_eq!(hinted.to_string(), "could not write x");
        assert_eq!(hinted.chain(), plain().chain());
        assert_eq!(hinted.chain(), format!("could not write x: {}", full()));
        assert_eq!(hinted.kind(), plain().kind());
        assert_eq!((hinted.hint(), plain().hint()), (Some(Hint::AcceptOlder), None));
    }
}
