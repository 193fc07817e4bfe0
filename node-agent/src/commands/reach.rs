//! The agent of this node, found and asked.

use std::{
    ffi::{OsStr, OsString},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use tierkeep::{
    Error,
    link::{Agent, find_agent},
};
use tierkeep_proto::control::{
    ClusterReply, ClusterRequest, DrainReply, DrainRequest, PrefetchReply, PrefetchRequest,
    StatusReply, StatusRequest,
};
use tokio::{
    runtime::{Builder, Runtime},
    signal::unix::{Signal, SignalKind, signal},
};
use tonic::{Request, Response, Status};

use crate::{
    fail::{FAILED, Failure},
    service::control::{self, Client, socket_beside},
};

/// How long an agent may take to say how it is.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);

const START_OR_NAME: &str = "`tierkeep agent` starts one; --agent (or TIERKEEP_AGENT) names the \
                             socket where its trainers find it, TIERKEEP_CONTROL its other one where that \
                             is not beside it";

/// An agent that answers.
pub(super) struct Reached {
    runtime: Runtime,
    client: Client,
    socket: PathBuf,
}

impl Reached {
    /// Goes to the agent that `named` names: its trainers' socket, as for a job; else to the one that
    /// a job would find.
    pub(super) fn new(named: Option<&Path>) -> Result<Self, Failure> {
        let socket = control_socket(named)?;
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|source| {
            Failure::from(Error::Io { what: "start an async runtime".into(), source })
        })?;
        let client = runtime.block_on(control::connect(&socket));
        let client = client.map_err(|e| unreached(e, &socket))?;
        Ok(Self { runtime, client, socket })
    }

    /// Where it answers.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// How it is.
    pub(super) fn status(&mut self) -> Result<StatusReply, Failure> {
        let Self { runtime, client, socket } = self;
        let answer = runtime.block_on(client.status(within(StatusRequest {}, ANSWER_WITHIN)));
        answered(answer, socket)
    }

    /// The agents that it sees alive.
    pub(super) fn cluster(&mut self) -> Result<ClusterReply, Failure> {
        let Self { runtime, client, socket } = self;
        // It asks all the others.
        let request = within(ClusterRequest { runs: true }, 3 * ANSWER_WITHIN);
        answered(runtime.block_on(client.cluster(request)), socket)
    }

    /// Carries what is only in RAM to disk.
    pub(super) fn drain(&mut self, deadline: Duration) -> Result<DrainReply, Failure> {
        let deadline_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
        let patience = deadline.saturating_add(ANSWER_WITHIN);
        let Self { runtime, client, socket } = self;
        let answer = runtime.block_on(client.drain(within(DrainRequest { deadline_ms }, patience)));
        answered(answer, socket)
    }

    /// Fetches shards before they are asked for.
    pub(super) fn prefetch(&mut self, request: PrefetchRequest) -> Result<PrefetchReply, Failure> {
        let patience = Duration::from_millis(request.deadline_ms).saturating_add(ANSWER_WITHIN);
        let Self { runtime, client, socket } = self;
        answered(runtime.block_on(client.prefetch(within(request, patience))), socket)
    }

    /// Ctrl-C and SIGTERM, which from here on end [`look`](Self::look) alone.
    pub(super) fn stops(&self) -> Result<Stops, Failure> {
        let _inside = self.runtime.enter();
        let hear = |kind| {
            let heard = signal(kind);
            heard.map_err(|source| Error::Io { what: "hear signals".into(), source })
        };
        Ok(Stops { ctrl_c: hear(SignalKind::interrupt())?, term: hear(SignalKind::terminate())? })
    }

    /// How it is `after` a while; `None`: the person has seen enough.
    pub(super) fn look(
        &mut self,
        after: Duration,
        stops: &mut Stops,
    ) -> Option<Result<StatusReply, Failure>> {
        let Self { runtime, client, socket } = self;
        let asked = async {
            tokio::time::sleep(after).await;
            answered(client.status(within(StatusRequest {}, ANSWER_WITHIN)).await, socket)
        };
        runtime.block_on(async {
            tokio::select! {
                status = asked => Some(status),
                _ = stops.ctrl_c.recv() => None,
                _ = stops.term.recv() => None,
            }
        })
    }
}

/// How a person ends what runs for ever.
pub(super) struct Stops {
    ctrl_c: Signal,
    term: Signal,
}

fn within<T>(question: T, time: Duration) -> Request<T> {
    let mut request = Request::new(question);
    request.set_timeout(time);
    request
}

fn answered<T>(answer: Result<Response<T>, Status>, socket: &Path) -> Result<T, Failure> {
    let answer = answer.map_err(|status| {
        let mut why = format!("the agent at {}: {}", socket.display(), status.message());
        let mut cause = std::error::Error::source(&status);
        while let Some(next) = cause {
            why = format!("{why}: {next}");
            cause = next.source();
        }
        Failure::own(FAILED, why, "its log may say more")
    })?;
    Ok(answer.into_inner())
}

/// Where the agent is asked.
fn control_socket(named: Option<&Path>) -> Result<PathBuf, Failure> {
    let variable = std::env::var_os("TIERKEEP_CONTROL").filter(|value| !value.is_empty());
    if let (None, Some(control)) = (named, variable) {
        return Ok(control.into());
    }
    let named = named.map(whole).transpose()?;
    match find_agent(named.as_deref())? {
        Agent::At { socket, .. } => Ok(socket_beside(&socket)),
        Agent::None { looked, .. } => {
            let looked: Vec<String> = looked.iter().map(|p| p.display().to_string()).collect();
            let hint = format!("it was looked for at {}; {START_OR_NAME}", looked.join(", "));
            Err(Failure::own(FAILED, "no agent runs on this node", hint))
        }
        Agent::Off => Err(Failure::own(
            FAILED,
            "there is to be no agent: TIERKEEP_AGENT (or --agent) says so",
            START_OR_NAME,
        )),
    }
}

/// A path on the command line may be relative; what a job is given may not.
fn whole(named: &Path) -> Result<OsString, Failure> {
    let text = named.as_os_str();
    if named.is_absolute() || text == "off" || starts_with(text, "unix:") {
        return Ok(text.to_owned());
    }
    let whole = std::path::absolute(named);
    let whole = whole.map_err(|source| Error::Io { what: "find this directory".into(), source })?;
    Ok(whole.into())
}

fn starts_with(text: &OsStr, start: &str) -> bool {
    text.as_encoded_bytes().starts_with(start.as_bytes())
}

fn unreached(error: Error, socket: &Path) -> Failure {
    use io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied};
    let kind = match &error {
        Error::Io { source, .. } => Some(source.kind()),
        _ => None,
    };
    match kind {
        Some(NotFound | ConnectionRefused) => {
            let why = format!("no agent answers at {}", socket.display());
            Failure::own(FAILED, why, START_OR_NAME)
        }
        Some(PermissionDenied) => {
            let hint = "run it as the user who runs the agent, or as root";
            Failure::own(FAILED, error.chain(), hint)
        }
        _ => error.into(),
    }
}
