//! What the command asks a running agent, over a unix socket of its own beside the trainers'.
//!
//! # Invariants
//!
//! - Only root and the agent's user are served: by the socket's mode, and by who they are.
//! - A socket that somebody listens at is never taken away.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileTypeExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tierkeep::{
    Error, ErrorKind, Result,
    host::{Drained, Host, Prefetched, RankPrefetched},
};
use tierkeep_proto::control::{
    self as wire,
    agent_client::AgentClient,
    agent_server::{Agent, AgentServer},
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Request, Response, Status,
    transport::{Channel, Endpoint, Server},
};

use super::{asking::Asking, looking::Looking};
use crate::cluster::Cluster;

/// A request is a number or two, a path and the ranks of one node.
const REQUEST_BYTES_MAX: usize = 16 << 10;

/// A rank takes some hundred bytes and a path of 4 KiB at most: room for thousands.
const REPLY_BYTES_MAX: usize = 16 << 20;

/// Requests of one connection at once.
const REQUESTS_MAX: usize = 8;

/// Questions to the host at once, all connections together. What takes long is apart.
const STATUSES_MAX: usize = 4;
const DRAINS_MAX: usize = 4;
const PREFETCHES_MAX: usize = 4;

/// How long a question may take that nobody gave a deadline.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// The same where it has to ask all other agents.
const ACROSS_WITHIN: Duration = Duration::from_secs(25);

/// A drain may be given this much: more is a slip of the pen.
const DRAIN_MAX: Duration = Duration::from_secs(24 * 3600);

/// What is being answered when the agent ends has this long.
const ENDING_WITHIN: Duration = Duration::from_secs(2);

/// Where the agent whose trainers find it at `socket` is asked.
#[must_use]
pub fn socket_beside(socket: &Path) -> PathBuf {
    socket.with_file_name("control.sock")
}

/// Answers at `socket` until `ending`, then removes it.
///
/// # Errors
/// Somebody else listens there, or it cannot be made.
pub async fn serve(
    host: Arc<Host>,
    cluster: Option<Arc<Cluster>>,
    socket: &Path,
    ending: impl Future<Output = ()>,
) -> Result<()> {
    let listener = listen(socket).await?;
    let (sender, incoming) = mpsc::channel(1);
    let accepting = tokio::spawn(accept(listener, sender));
    let service = AgentServer::new(Service {
        looking: Looking::new(Asking::new(host.clone(), STATUSES_MAX), cluster),
        drains: Asking::new(host.clone(), DRAINS_MAX),
        prefetches: Asking::new(host, PREFETCHES_MAX),
    });
    let service = service
        .max_decoding_message_size(REQUEST_BYTES_MAX)
        .max_encoding_message_size(REPLY_BYTES_MAX);
    let server = Server::builder()
        .concurrency_limit_per_connection(REQUESTS_MAX)
        .max_concurrent_streams(u32::try_from(REQUESTS_MAX).ok())
        .http2_keepalive_interval(Some(Duration::from_secs(30)));
    let (ended, end) = tokio::sync::oneshot::channel::<()>();
    let serving = server.serve_with_incoming_shutdown(
        service,
        ReceiverStream::new(incoming),
        // Ended by a word, or by the sender's end: both are an end.
        async move { drop(end.await) },
    );
    let last = async move {
        ending.await;
        drop(ended);
        sleep(ENDING_WITHIN).await;
    };
    let served = tokio::select! {
        served = serving => served,
        () = last => Ok(()),
    };
    accepting.abort();
    let _ = fs::remove_file(socket); // A next agent removes what is left.
    served.map_err(|e| failed("serve at", socket, io::Error::other(e)))
}

fn failed(verb: &str, path: &Path, source: io::Error) -> Error {
    Error::Io { what: format!("{verb} {}", path.display()), source }
}

/// The socket, open to its user alone. What a dead agent left is removed first.
async fn listen(socket: &Path) -> Result<UnixListener> {
    match fs::symlink_metadata(socket) {
        Ok(there) if !there.file_type().is_socket() => {
            let why = format!("{} is no socket: it is left as it is", socket.display());
            return Err(Error::Invalid { why });
        }
        Ok(_) if UnixStream::connect(socket).await.is_ok() => {
            let why = format!("another agent listens at {}", socket.display());
            return Err(Error::Fenced { why });
        }
        Ok(_) => fs::remove_file(socket).map_err(|e| failed("remove", socket, e))?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed("look at", socket, e)),
    }
    let listener = UnixListener::bind(socket).map_err(|e| failed("listen at", socket, e))?;
    // Whoever came before this line is sent away by `accept`.
    let mode = fs::Permissions::from_mode(0o600);
    fs::set_permissions(socket, mode).map_err(|e| failed("set the mode of", socket, e))?;
    Ok(listener)
}

/// Lets in who may ask.
async fn accept(listener: UnixListener, sender: mpsc::Sender<io::Result<UnixStream>>) {
    let ours = rustix::process::geteuid().as_raw();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if stream.peer_cred().is_ok_and(|peer| [0, ours].contains(&peer.uid()))
                    && sender.send(Ok(stream)).await.is_err()
                {
                    return;
                }
            }
            Err(e) => {
                // Out of descriptors, say: those that are here go on.
                tracing::error!("a question could not be let in: {e}");
                sleep(Duration::from_millis(500)).await;
            }
        }
    }
}

struct Service {
    looking: Looking,
    drains: Asking,
    prefetches: Asking,
}

#[tonic::async_trait]
impl Agent for Service {
    async fn status(
        &self,
        _: Request<wire::StatusRequest>,
    ) -> std::result::Result<Response<wire::StatusReply>, Status> {
        let status = self.looking.status(ANSWER_WITHIN).await;
        Ok(Response::new(status.map_err(|e| refused(&e))?))
    }

    async fn drain(
        &self,
        request: Request<wire::DrainRequest>,
    ) -> std::result::Result<Response<wire::DrainReply>, Status> {
        let within = Duration::from_millis(request.into_inner().deadline_ms);
        if within > DRAIN_MAX {
            let most = DRAIN_MAX.as_secs() / 3600;
            let why = format!("a drain has {most} hours at most");
            return Err(Status::invalid_argument(why));
        }
        tracing::info!("everything that is only in RAM goes to disk, within {within:?}");
        let asked =
            self.drains.ask(within.saturating_add(ANSWER_WITHIN), move |host| host.drain(within));
        let ranks = asked.await.map_err(|e| refused(&e))?.into_iter().map(drained).collect();
        Ok(Response::new(wire::DrainReply { ranks }))
    }

    async fn prefetch(
        &self,
        request: Request<wire::PrefetchRequest>,
    ) -> std::result::Result<Response<wire::PrefetchReply>, Status> {
        let wire::PrefetchRequest { destination, ranks, user, deadline_ms } = request.into_inner();
        let within = Duration::from_millis(deadline_ms).min(DRAIN_MAX);
        let destination = PathBuf::from(OsString::from_vec(destination));
        let user = user.map(|user| (user.uid, user.gid));
        let asked = self.prefetches.ask(within.saturating_add(ANSWER_WITHIN), move |host| {
            host.prefetch(&destination, user, &ranks, within)
        });
        let Prefetched { step, ranks, silent } =
            asked.await.and_then(|answer| answer).map_err(|e| refused(&e))?;
        let rank =
            |RankPrefetched { rank, bytes, trouble }| wire::Prefetched { rank, bytes, trouble };
        let ranks = ranks.into_iter().map(rank).collect();
        Ok(Response::new(wire::PrefetchReply { step, ranks, silent }))
    }

    async fn cluster(
        &self,
        request: Request<wire::ClusterRequest>,
    ) -> std::result::Result<Response<wire::ClusterReply>, Status> {
        let runs = request.get_ref().runs;
        let cluster = self.looking.cluster(runs, ACROSS_WITHIN).await;
        Ok(Response::new(cluster.map_err(|e| refused(&e))?))
    }
}

/// An error as gRPC has it.
fn refused(error: &Error) -> Status {
    let code = match error.kind() {
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::Corrupt => Code::DataLoss,
        ErrorKind::Fenced => Code::FailedPrecondition,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::Invalid => Code::InvalidArgument,
        ErrorKind::Bug => Code::Internal,
    };
    Status::new(code, error.chain())
}

fn drained(rank: Drained) -> wire::Drained {
    wire::Drained {
        destination: bytes(&rank.destination),
        rank: rank.rank,
        ram_step: rank.in_ram,
        disk_step: rank.on_disk,
        durable: rank.durable,
        trouble: rank.trouble,
    }
}

/// A path on the wire.
pub(super) fn bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

/// A path from the wire, for people.
pub(crate) fn path(bytes: &[u8]) -> String {
    Path::new(OsStr::from_bytes(bytes)).display().to_string()
}

/// An agent, to be asked.
pub type Client = AgentClient<Channel>;

/// How long an agent may take to let somebody in.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// Goes to the agent that answers at `socket`; where it goes away, the next question finds the next
/// one there.
///
/// # Errors
/// Nobody answers there.
pub async fn connect(socket: &Path) -> Result<Client> {
    Ok(AgentClient::new(channel(socket).await?)
        .max_decoding_message_size(REPLY_BYTES_MAX)
        .max_encoding_message_size(REQUEST_BYTES_MAX))
}

/// A way to whoever serves at `socket`.
pub(crate) async fn channel(socket: &Path) -> Result<Channel> {
    let fault = |source| failed("reach who serves at", socket, source);
    let late = || io::Error::from(io::ErrorKind::TimedOut);
    // The transport's errors hide the system's: ask the system first.
    let there = timeout(CONNECT_WITHIN, UnixStream::connect(socket)).await;
    there.unwrap_or_else(|_| Err(late())).map_err(fault)?;
    let Some(address) = socket.to_str() else {
        let why = format!("{}: the path of a socket is UTF-8", socket.display());
        return Err(Error::Invalid { why });
    };
    let endpoint = Endpoint::from_shared(format!("unix:{address}"));
    let endpoint = endpoint.map_err(|e| fault(io::Error::other(e)))?;
    let channel = timeout(CONNECT_WITHIN, endpoint.connect()).await.map_err(|_| fault(late()))?;
    channel.map_err(|e| fault(io::Error::other(e)))
}
