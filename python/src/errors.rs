//! The core's errors as Python exceptions: one exhaustive match. A new kind does not compile until
//! somebody has decided what it is here.
//!
//! The classes have a built-in parent beside our own, which pyo3 cannot make; they are written in
//! `tierkeep/errors.py` and looked up by name.

use pyo3::{prelude::*, types::PyModule};
use tierkeep::{Error, ErrorKind, Hint};

/// The result of the core, as Python wants it.
pub(crate) trait Raise<T> {
    fn raise(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> Raise<T> for tierkeep::Result<T> {
    fn raise(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|error| exception(py, &error))
    }
}

/// The name of the class in `tierkeep.errors`.
fn class_of(error: &Error) -> &'static str {
    // Two kinds have a finer class, because people catch them by name.
    match error {
        Error::Deadline { .. } => return "DeadlineError",
        Error::Mismatch(_) => return "MismatchError",
        _ => {}
    }
    match error.kind() {
        ErrorKind::Unavailable => "UnavailableError",
        ErrorKind::Corrupt => "CorruptError",
        ErrorKind::Fenced => "FencedError",
        ErrorKind::NotFound => "CheckpointNotFoundError",
        ErrorKind::Invalid => "InvalidError",
        ErrorKind::Bug => "BugError",
    }
}

/// `error` as an exception.
pub(crate) fn exception(py: Python<'_>, error: &Error) -> PyErr {
    let make = || {
        let class = PyModule::import(py, "tierkeep.errors")?.getattr(class_of(error))?;
        match error {
            Error::Mismatch(differences) => class.call1((error.to_string(), differences.clone())),
            _ => class.call1((in_words(error),)),
        }
    };
    make().map_or_else(|failure| failure, PyErr::from_value)
}

/// What a person reads, with the core's hint in Python's words.
fn in_words(error: &Error) -> String {
    let hint = match error.hint() {
        None => return error.chain(),
        Some(Hint::AcceptOlder) => "restore(accept_older=True) goes on without it".into(),
        Some(Hint::NameAttempt(number)) => format!("attempt={number} takes it all the same"),
        Some(Hint::RestoreFirst) => {
            "call restore(state) before the first save, or say fresh=True to begin anew".into()
        }
        Some(Hint::Rollback) => "to go back, restore with rollback=True".to_owned(),
    };
    format!("{} ({hint})", error.chain())
}

/// The caller asked for something that cannot be done as asked.
pub(crate) fn invalid(py: Python<'_>, why: impl Into<String>) -> PyErr {
    exception(py, &Error::Invalid { why: why.into() })
}

/// Something in a state cannot be stored.
pub(crate) fn unstorable(py: Python<'_>, path: &str, why: impl Into<String>) -> PyErr {
    exception(py, &Error::Unstorable { path: path.into(), why: why.into() })
}
