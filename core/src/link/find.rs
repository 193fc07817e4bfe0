//! Where the agent of this node is, if there is one.

use std::{
    ffi::OsStr,
    os::unix::{ffi::OsStrExt, fs::MetadataExt, net::UnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

use tierkeep_proto::trainer::Opened;

use super::token::token_file;
use crate::{
    clock::{Clock, Deadline, SystemClock},
    config::default_ram_root,
    error::{Doing, Error, Result},
    observe::Observer,
    sys,
};

/// The agent of a node, run by root.
const SYSTEM_SOCKET: &str = "/run/tierkeep/agent.sock";

/// Whether a trainer has an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Agent {
    /// At this socket. `named`: somebody said so; else it was found.
    At {
        /// The socket.
        socket: PathBuf,
        /// By an argument or `TIERKEEP_AGENT`.
        named: bool,
    },
    /// Nobody named one, and none listens where one would.
    None {
        /// Where it was looked for.
        looked: Vec<PathBuf>,
        /// There is a socket, and whoever listened there is gone.
        gone: Option<PathBuf>,
    },
    /// Somebody said that there is to be none.
    Off,
}

impl Agent {
    /// One line of notice where there is none.
    pub(crate) fn tell(&self, observer: &Observer) {
        match self {
            Self::None { gone: Some(socket), .. } => {
                let text = format!(
                    "the agent at {} does not answer: this process keeps its RAM tier itself, and \
                     nothing goes to disk once it is dead",
                    socket.display()
                );
                observer.warn("embedded", None, text);
            }
            Self::None { looked, .. } => {
                let looked: Vec<_> = looked.iter().map(|s| s.display().to_string()).collect();
                let text = format!(
                    "no agent listens at {}: this process keeps its RAM tier itself",
                    looked.join(" or ")
                );
                observer.info("embedded", None, text);
            }
            Self::At { .. } | Self::Off => {}
        }
    }
}

/// The sockets where an agent is looked for that nobody named: the node's, then this user's.
#[must_use]
pub fn default_sockets() -> Vec<PathBuf> {
    vec![SYSTEM_SOCKET.into(), default_ram_root().join("agent.sock")]
}

/// An agent that is being upgraded is back within this time.
const UPGRADE: Duration = Duration::from_secs(3);

/// Finds the agent: `wish`, else `TIERKEEP_AGENT`, else the first of the default sockets that somebody
/// listens at. `off` (or `0`, `none`) means that there is to be none. Whether one that was named answers
/// is not tried here.
///
/// # Errors
/// What is named is no absolute path.
pub fn find_agent(wish: Option<&OsStr>) -> Result<Agent> {
    let variable = std::env::var_os("TIERKEEP_AGENT").filter(|value| !value.is_empty());
    if let Some(named) = wish.map(OsStr::to_owned).or(variable) {
        if matches!(named.as_bytes(), b"off" | b"0" | b"none") {
            return Ok(Agent::Off);
        }
        let socket = PathBuf::from(&named);
        if !socket.is_absolute() {
            return Err(Error::invalid(format!(
                "TIERKEEP_AGENT (agent=) is {}: it is the absolute path of the agent's socket, or \"off\"",
                named.display()
            )));
        }
        return Ok(Agent::At { socket, named: true });
    }
    let (looked, mut gone) = (default_sockets(), None);
    for socket in &looked {
        match listens(socket, Duration::ZERO) {
            Ok(()) if is_trusted(socket) => {
                return Ok(Agent::At { socket: socket.clone(), named: false });
            }
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
                gone.get_or_insert(socket.clone());
            }
            _ => {}
        }
    }
    match gone {
        Some(socket) if listens(&socket, UPGRADE).is_ok() && is_trusted(&socket) => {
            Ok(Agent::At { socket, named: false })
        }
        gone => Ok(Agent::None { looked, gone }),
    }
}

/// Whether somebody listens there, or does so within `wait`.
fn listens(socket: &Path, wait: Duration) -> std::io::Result<()> {
    let deadline = Deadline::after(&SystemClock, wait);
    loop {
        match UnixStream::connect(socket) {
            Ok(_) => return Ok(()),
            Err(e) if deadline.left(&SystemClock).is_none() => return Err(e),
            Err(_) => SystemClock.pause(Duration::from_millis(50)),
        }
    }
}

fn is_trusted(socket: &Path) -> bool {
    let has_token = token_file().is_some();
    UnixStream::connect(socket).is_ok_and(|there| check_host_of(&there, socket, has_token).is_ok())
}

/// Whoever listens is root or this user: an agent sees the state, and gives it back. For a process that has a
/// token, whoever wrote its pod's description has said by a mount where the agent is: then it is enough that
/// nobody but that user could have put the socket there.
pub(super) fn check_host_of(socket: &UnixStream, path: &Path, has_token: bool) -> Result<()> {
    let uid = sys::peer_creds(socket).at("ask who listens at", path)?.uid;
    if uid == 0 || uid == rustix::process::geteuid().as_raw() {
        return Ok(());
    }
    let dir = path.parent().unwrap_or(path);
    let is_its_own = || {
        let meta = std::fs::metadata(dir).ok();
        meta.is_some_and(|meta| meta.uid() == uid && meta.mode() & 0o022 == 0)
    };
    if has_token && is_its_own() {
        return Ok(());
    }
    let hint = match has_token {
        true => format!("; and {} is not that user's alone", dir.display()),
        false => String::new(),
    };
    Err(Error::invalid(format!(
        "user {uid} listens at {}, who is neither root nor this user: that is nobody's agent{hint}",
        path.display()
    )))
}

/// Where the agent keeps the ram tier, of which it named this run's directory.
pub(super) fn ram_root(opened: &Opened, ours: PathBuf) -> PathBuf {
    let dir = Path::new(OsStr::from_bytes(&opened.ram_dir));
    dir.parent().map_or(ours, Into::into)
}
