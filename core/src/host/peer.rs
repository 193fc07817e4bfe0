//! Who is at the other end of a socket, and whether that process lives.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};

use crate::sys;

/// As whom files are touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Who {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

/// A process that connected.
#[derive(Debug)]
pub(super) struct Peer {
    /// 0 where it is in another pid namespace, which we cannot see into.
    pub(super) pid: u32,
    pub(super) who: Who,
    /// When it started, in ticks since the boot; 0: nobody knows.
    pub(super) started: u64,
    /// Readable once the process is dead; a number can be given to another one.
    pidfd: Option<OwnedFd>,
}

impl Who {
    /// This process.
    pub(super) fn own() -> Self {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        Self { uid: uid.as_raw(), gid: gid.as_raw(), groups: Vec::new() }
    }
}

impl Peer {
    pub(super) fn of(socket: &UnixStream) -> io::Result<Self> {
        let creds = sys::peer_creds(socket)?;
        let by_number =
            || Pid::from_raw(creds.pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let pidfd = sys::peer_pidfd(socket).or_else(by_number);
        let pid = creds.pid.unsigned_abs();
        let started = started(pid).unwrap_or(0);
        let groups = sys::peer_groups(socket)?;
        let who = Who { uid: creds.uid, gid: creds.gid, groups };
        Ok(Self { pid, who, started, pidfd })
    }

    /// The process that an agent before this one knew, if it lives.
    pub(super) fn still_there(pid: u32, since: u64, who: Who) -> Option<Self> {
        let number = Pid::from_raw(i32::try_from(pid).ok()?)?;
        let pidfd = pidfd_open(number, PidfdFlags::empty()).ok()?;
        // After it is held: a number can be another process's by now.
        if since == 0 || started(pid) != Some(since) {
            return None;
        }
        let peer = Self { pid, who, started: since, pidfd: Some(pidfd) };
        (peer.is_dead() == Some(false)).then_some(peer)
    }

    /// True where both are known to be one process.
    pub(super) fn is(&self, other: &Self) -> bool {
        let process = |peer: &Self| peer.pidfd().and_then(sys::process_of);
        match (process(self), process(other)) {
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => self.pid != 0 && self.pid == other.pid && self.started == other.started,
        }
    }

    pub(super) fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(AsFd::as_fd)
    }

    /// Whether the process is dead; `None` where nothing can tell.
    pub(super) fn is_dead(&self) -> Option<bool> {
        let fd = self.pidfd()?;
        readable(fd, Duration::ZERO).ok()
    }

    /// Whether it is dead, by then at the latest.
    pub(super) fn dies_within(&self, time: Duration) -> bool {
        self.pidfd().is_some_and(|fd| readable(fd, time).unwrap_or(false))
    }
}

/// When a process started: the 22nd field of its `stat`, whose 2nd may have spaces in it.
fn started(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(time.subsec_nanos()),
    }
}

/// Waits up to `timeout` until there is something to read.
pub(super) fn readable(fd: impl AsFd, timeout: Duration) -> io::Result<bool> {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    match poll(&mut fds, Some(&timespec(timeout))) {
        Err(rustix::io::Errno::INTR) => Ok(false),
        other => Ok(other? > 0),
    }
}

/// What a thread that serves a trainer waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Came {
    /// Something to read, or the end of it.
    Bytes,
    /// Nothing, for a while.
    Nothing,
    /// The process is dead, whoever still has the socket open (a data loader's fork).
    Death,
}

/// Waits for bytes or death, up to `timeout`.
pub(super) fn wait(socket: &UnixStream, peer: &Peer, timeout: Duration) -> io::Result<Came> {
    loop {
        let pidfd = peer.pidfd();
        let mut fds = vec![PollFd::new(socket, PollFlags::IN)];
        fds.extend(pidfd.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
        match poll(&mut fds, Some(&timespec(timeout))) {
            Err(rustix::io::Errno::INTR) => continue,
            Ok(0) => return Ok(Came::Nothing),
            other => other?,
        };
        // What it said before it died is heard first.
        if !fds[0].revents().is_empty() {
            return Ok(Came::Bytes);
        }
        if fds.len() > 1 && !fds[1].revents().is_empty() {
            return Ok(Came::Death);
        }
    }
}
