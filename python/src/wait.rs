//! Every long call goes through here: the GIL is released, and signals are looked at every tenth of
//! a second.
//!
//! Python runs signal handlers on its main thread, between two instructions. A call that stays in
//! Rust keeps Ctrl-C waiting until it returns; so no call stays longer than one slice.

use std::{
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use pyo3::prelude::*;
use tierkeep::{
    Error, Result,
    clock::{Deadline, SystemClock},
};

use crate::errors::{Raise, exception};

/// Ctrl-C is answered within 0.2 s; half of it is for whatever else the machine is doing.
const SLICE: Duration = Duration::from_millis(100);

/// Asks `poll` again and again until it says true (then true) or `timeout` has passed (then false).
/// `poll` waits up to the time it is given.
pub(crate) fn poll(
    py: Python<'_>,
    timeout: Duration,
    mut poll: impl FnMut(Duration) -> Result<bool> + Send,
) -> PyResult<bool> {
    let deadline = Deadline::after(&SystemClock, timeout);
    loop {
        let left = deadline.left(&SystemClock);
        let slice = left.unwrap_or_default().min(SLICE);
        if py.detach(|| poll(slice)).raise(py)? {
            return Ok(true);
        }
        if left.is_none() {
            return Ok(false);
        }
        py.check_signals()?;
    }
}

/// Does `work`, which cannot be cut into slices, on a thread of its own. After Ctrl-C it goes on
/// there, without anybody to hear its result: `work` owns all that it needs.
pub(crate) fn apart<T: Send + 'static>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> PyResult<T> {
    let (sender, mut receiver) = mpsc::channel();
    let spawned = thread::Builder::new().name("tierkeep-call".into()).spawn(move || {
        // Nobody hears it after Ctrl-C.
        let _ = sender.send(work());
    });
    spawned
        .map_err(|source| Error::Io { what: "start a thread".into(), source })
        .map(drop)
        .raise(py)?;
    loop {
        let (heard, back) = py.detach(move || (receiver.recv_timeout(SLICE), receiver));
        receiver = back;
        match heard {
            Ok(result) => return result.raise(py),
            Err(RecvTimeoutError::Timeout) => py.check_signals()?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(exception(py, &Error::Bug("a thread panicked".into())));
            }
        }
    }
}

/// A timeout in seconds, as Python gives it.
pub(crate) fn seconds(py: Python<'_>, name: &str, timeout_s: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(timeout_s.min(1e9)).map_err(|_| {
        crate::errors::invalid(py, format!("{name} = {timeout_s}: seconds, 0 or more"))
    })
}
