//! Where the agent of this node is, if there is one.

use std::{
    ffi::OsStr,
    os::unix::{ffi::OsStrExt, net::UnixStream},
    path::{Path, PathBuf},
};

use tierkeep_proto::trainer::Opened;

use crate::{
    config::default_ram_root,
    error::{Doing, Error, Result},
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
    },
    /// Somebody said that there is to be none.
    Off,
}

/// The sockets where an agent is looked for that nobody named: the node's, then this user's.
#[must_use]
pub fn default_sockets() -> Vec<PathBuf> {
    vec![SYSTEM_SOCKET.into(), default_ram_root().join("agent.sock")]
}

/// Finds the agent: `wish`, else `TIERKEEP_AGENT`, else the first of the default sockets that somebody
/// listens at. `off` (or `0`, `none`) means that there is to be none.
///
/// # Errors
/// What is named is no path.
pub fn find_agent(wish: Option<&OsStr>) -> Result<Agent> {
    let variable = std::env::var_os("TIERKEEP_AGENT").filter(|value| !value.is_empty());
    if let Some(named) = wish.map(OsStr::to_owned).or(variable) {
        if matches!(named.as_bytes(), b"off" | b"0" | b"none") {
            return Ok(Agent::Off);
        }
        let socket = named.as_bytes().strip_prefix(b"unix:").unwrap_or(named.as_bytes());
        let socket = PathBuf::from(OsStr::from_bytes(socket));
        if !socket.is_absolute() {
            return Err(Error::invalid(format!(
                "TIERKEEP_AGENT (agent=) is {}: it is the absolute path of the agent's socket, or \"off\"",
                named.display()
            )));
        }
        return Ok(Agent::At { socket, named: true });
    }
    let looked = default_sockets();
    for socket in &looked {
        if UnixStream::connect(socket).is_ok_and(|there| check_host_of(&there, socket).is_ok()) {
            return Ok(Agent::At { socket: socket.clone(), named: false });
        }
    }
    Ok(Agent::None { looked })
}

/// Whoever listens is root or this user: an agent sees the state, and gives it back.
pub(super) fn check_host_of(socket: &UnixStream, path: &Path) -> Result<()> {
    let creds = rustix::net::sockopt::socket_peercred(socket);
    let uid = creds.at("ask who listens at", path)?.uid;
    if uid.is_root() || uid == rustix::process::geteuid() {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "user {} listens at {}, who is neither root nor this user: that is nobody's agent",
        uid.as_raw(),
        path.display()
    )))
}

/// Where the agent keeps the ram tier, of which it named this run's directory.
pub(super) fn ram_root(opened: &Opened, ours: PathBuf) -> PathBuf {
    let dir = Path::new(OsStr::from_bytes(&opened.ram_dir));
    dir.parent().map_or(ours, Into::into)
}
