//! The agent's port: who comes is let in, and led to where questions or chunks are answered.
//!
//! # Invariants
//!
//! - A connection that says nothing, or not all of a greeting, ends in seconds, and at once where there is
//!   no room for one that may say something.
//! - Questions are answered on threads of their own, so many at once: a disk that hangs keeps no chunk
//!   waiting.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tierkeep::host::Host;
use tierkeep_proto::{
    peer as wire,
    peer_service::peer_server::{Peer, PeerServer},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    task::AbortHandle,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::{Tls, chunks, control::MESSAGE_BYTES_MAX};

/// Connections at once. Of more, those that have said nothing for longest are let go.
const CONNECTIONS_MAX: usize = 512;

/// How long a first word may take, or TLS to be agreed on.
const GREETING_WITHIN: Duration = Duration::from_secs(10);

/// How often a connection that has no question is asked whether it is there.
const IDLE: Duration = Duration::from_secs(30);

/// Questions that are answered at once.
const QUESTIONS_MAX: usize = 1024;

/// The same default as for those who ask.
const STREAM_WINDOW: u32 = 4 << 20;

/// Answers other agents until `ending`.
pub async fn serve(
    host: Arc<Host>,
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    ending: impl Future<Output = ()>,
) {
    let house = match House::new(host, tls) {
        Ok(house) => house,
        Err(e) => {
            tracing::error!("other agents cannot be answered: {e}");
            return;
        }
    };
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let silent = Silent::default();
    let accepting = async {
        loop {
            match listener.accept().await {
                Ok((stream, from)) => {
                    if room.available_permits() == 0 {
                        silent.end_the_oldest();
                    }
                    let Ok(place) = room.clone().acquire_owned().await else { return };
                    let house = house.clone();
                    silent.let_in(|said| house.let_in(stream, from, said, place));
                }
                Err(e) => {
                    // Out of descriptors, say: those that are here go on.
                    tracing::error!("another agent could not be let in: {e}");
                    sleep(Duration::from_millis(500)).await;
                }
            }
        }
    };
    tokio::select! {
        () = accepting => {}
        () = ending => {}
    }
}

/// Connections that have not said enough to be led anywhere, oldest first.
#[derive(Clone, Default)]
struct Silent(Arc<Mutex<(u64, BTreeMap<u64, AbortHandle>)>>);

impl Silent {
    fn let_in<F>(&self, serve: impl FnOnce(Said) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let id = all.0;
        all.0 += 1;
        let serving = tokio::spawn(serve(Said { silent: self.clone(), id }));
        all.1.insert(id, serving.abort_handle());
    }

    fn end_the_oldest(&self) {
        let oldest = self.0.lock().unwrap_or_else(PoisonError::into_inner).1.pop_first();
        oldest.into_iter().for_each(|(_, serving)| serving.abort());
    }
}

/// Dropped when a connection has said enough, or is over.
struct Said {
    silent: Silent,
    id: u64,
}

impl Drop for Said {
    fn drop(&mut self) {
        let mut all = self.silent.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.1.remove(&self.id);
    }
}

/// What is behind the door.
#[derive(Clone)]
struct House {
    host: Arc<Host>,
    tls: Option<Arc<Tls>>,
    questions: PeerServer<Answering>,
    /// Hung up with the last of these: connections with threads of their own end by it.
    over: Arc<OwnedFd>,
    _open: Arc<OwnedFd>,
}

impl House {
    fn new(host: Arc<Host>, tls: Option<Arc<Tls>>) -> std::io::Result<Self> {
        let room = Arc::new(Semaphore::new(QUESTIONS_MAX));
        let questions = PeerServer::new(Answering { host: host.clone(), questions: room })
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let (over, open) = std::io::pipe()?;
        let (over, open) = (Arc::new(over.into()), Arc::new(open.into()));
        Ok(Self { host, tls, questions, over, _open: open })
    }

    async fn let_in(
        self,
        stream: TcpStream,
        from: SocketAddr,
        said: Said,
        place: OwnedSemaphorePermit,
    ) {
        // tonic leaves this to whoever accepts; without it every answer waits for an acknowledgement.
        if let Err(e) = stream.set_nodelay(true) {
            tracing::debug!("{from}: {e}");
            return;
        }
        match self.tls.clone() {
            None => match timeout(GREETING_WITHIN, asks_questions(&stream)).await {
                Ok(Ok(true)) => {
                    drop(said);
                    self.answer(stream, from).await;
                }
                Ok(Ok(false)) => {
                    drop(said);
                    self.give_and_take(stream, None, from, place);
                }
                Ok(Err(e)) => tracing::debug!("{from}: {e}"),
                Err(_) => {}
            },
            Some(tls) => {
                let acceptor = TlsAcceptor::from(tls.server());
                match timeout(GREETING_WITHIN, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => {
                        drop(said);
                        if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
                            self.answer(stream, from).await;
                        } else {
                            let (stream, tls) = stream.into_inner();
                            self.give_and_take(stream, Some(tls), from, place);
                        }
                    }
                    Ok(Err(e)) => tracing::warn!("{from} is no agent of this cluster: {e}"),
                    Err(_) => {}
                }
            }
        }
    }

    /// Questions, over HTTP/2.
    async fn answer(
        self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        from: SocketAddr,
    ) {
        let mut server = auto::Builder::new(TokioExecutor::new()).http2_only();
        server
            .http2()
            .timer(TokioTimer::new())
            .keep_alive_interval(IDLE)
            .keep_alive_timeout(GREETING_WITHIN)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(2 * STREAM_WINDOW)
            .max_concurrent_streams(256);
        let service = TowerToHyperService::new(self.questions);
        if let Err(e) = server.serve_connection(TokioIo::new(stream), service).await {
            tracing::debug!("{from}: {e}");
        }
    }

    /// Chunks, over HTTP/1.1.
    fn give_and_take(
        self,
        stream: TcpStream,
        tls: Option<rustls::ServerConnection>,
        from: SocketAddr,
        place: OwnedSemaphorePermit,
    ) {
        match stream.into_std() {
            Ok(stream) => chunks::answer_on(self.host, stream, tls, from, self.over, place),
            Err(e) => tracing::debug!("{from}: {e}"),
        }
    }
}

/// What HTTP/2 begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Whether it begins as HTTP/2 does. All of that is waited for here: whoever serves HTTP/2 would wait for the
/// rest for ever.
async fn asks_questions(stream: &TcpStream) -> std::io::Result<bool> {
    let mut seen = [0; PREFACE.len()];
    loop {
        match stream.peek(&mut seen).await? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n if !PREFACE.starts_with(&seen[..n]) => return Ok(false),
            n if n == seen.len() => return Ok(true),
            _ => sleep(Duration::from_millis(20)).await, // It could be a PUT yet.
        }
    }
}

#[derive(Clone)]
struct Answering {
    host: Arc<Host>,
    questions: Arc<Semaphore>,
}

#[tonic::async_trait]
impl Peer for Answering {
    async fn ask(
        &self,
        request: tonic::Request<wire::Request>,
    ) -> Result<tonic::Response<wire::Reply>, tonic::Status> {
        let place = self.questions.clone().acquire_owned().await;
        let place = place.map_err(|_| tonic::Status::unavailable("the agent ends"))?;
        let (answer, answered) = oneshot::channel();
        let (host, request) = (self.host.clone(), request.into_inner());
        let work = move || {
            let _ = answer.send(host.answer(request)); // Whoever asked may be gone.
            drop(place);
        };
        let spawned = std::thread::Builder::new().name("tierkeep-answer".into()).spawn(work);
        spawned.map_err(|e| tonic::Status::resource_exhausted(e.to_string()))?;
        let reply = answered.await.map_err(|_| tonic::Status::internal("the answer panicked"))?;
        Ok(tonic::Response::new(reply))
    }
}
