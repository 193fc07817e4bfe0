//! The agent's side of other agents' questions and transfers.
//!
//! # Invariants
//!
//! - A connection that says nothing ends in seconds, and at once where there is no room for one that may
//!   say something; a chunk has its time.
//! - Questions are answered on threads of their own, so many at once: a disk that hangs keeps no chunk
//!   waiting.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use ::bytes::Bytes;
use axum::{
    Router,
    body::Body,
    extract::{DefaultBodyLimit, Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tierkeep::{
    Error,
    host::{Host, Outgoing},
    peers::{Landing, Ticket},
};
use tierkeep_proto::{
    peer as wire,
    peer_service::peer_server::{Peer, PeerServer},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    task::AbortHandle,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::{
    Tls,
    body::{BLOCK_BYTES, BUFFER_BYTES, Blocks},
    control::MESSAGE_BYTES_MAX,
};

/// Connections at once. Of more, those that have said nothing for longest are let go.
const CONNECTIONS_MAX: usize = 512;

/// How long a first word may take, or TLS to be agreed on.
const GREETING_WITHIN: Duration = Duration::from_secs(10);

/// A connection that is kept for the next transfer is let go after that.
const IDLE: Duration = Duration::from_secs(90);

/// How long one chunk may take to arrive.
const CHUNK_WITHIN: Duration = Duration::from_secs(30);

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
    let doors = doors(host);
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
                    let (doors, tls) = (doors.clone(), tls.clone());
                    silent.let_in(|said| let_in(stream, from, tls, doors, said, place));
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

/// Connections that have said nothing yet, oldest first.
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

/// Dropped when a connection has said something, or is over.
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

async fn let_in(
    stream: TcpStream,
    from: SocketAddr,
    tls: Option<Arc<Tls>>,
    doors: Router,
    said: Said,
    _place: OwnedSemaphorePermit,
) {
    // tonic leaves this to whoever accepts; without it every answer waits for an acknowledgement.
    if let Err(e) = stream.set_nodelay(true) {
        tracing::debug!("{from}: {e}");
        return;
    }
    let mut server = auto::Builder::new(TokioExecutor::new());
    server
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .max_buf_size(BUFFER_BYTES)
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(IDLE / 3)
        .keep_alive_timeout(GREETING_WITHIN)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(2 * STREAM_WINDOW)
        .max_concurrent_streams(256);
    let service = TowerToHyperService::new(doors);
    let served = match tls {
        None => {
            if !matches!(timeout(GREETING_WITHIN, stream.peek(&mut [0])).await, Ok(Ok(1))) {
                return;
            }
            drop(said);
            server.serve_connection(TokioIo::new(stream), service).await
        }
        Some(tls) => {
            let acceptor = TlsAcceptor::from(tls.server());
            match timeout(GREETING_WITHIN, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    drop(said);
                    server.serve_connection(TokioIo::new(stream), service).await
                }
                Ok(Err(e)) => {
                    tracing::warn!("{from} is no agent of this cluster: {e}");
                    return;
                }
                Err(_) => return,
            }
        }
    };
    if let Err(e) = served {
        tracing::debug!("{from}: {e}");
    }
}

fn doors(host: Arc<Host>) -> Router {
    let questions = Arc::new(Semaphore::new(QUESTIONS_MAX));
    let control = PeerServer::new(Answering { host: host.clone(), questions })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    Router::new()
        .route("/chunks/{ticket}/{chunk}", get(give).put(take))
        .layer(DefaultBodyLimit::disable()) // A chunk's length is known, and held to.
        .with_state(Bytesmith { host, blocks: Blocks::default() })
        .route_service("/tierkeep.peer.Peer/{*method}", control)
}

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

#[derive(Clone)]
struct Bytesmith {
    host: Arc<Host>,
    blocks: Blocks,
}

fn ticket(text: &str) -> Option<Ticket> {
    let mut ticket = [0; 16];
    if text.len() != 32 || !text.is_ascii() {
        return None;
    }
    for (index, byte) in ticket.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(ticket)
}

fn refused(e: &Error) -> Response {
    let status = if e.is_not_found() { StatusCode::NOT_FOUND } else { StatusCode::CONFLICT };
    (status, format!("{}\n", e.chain())).into_response()
}

/// Takes a chunk of a shard that was offered.
async fn take(
    State(smith): State<Bytesmith>,
    Path((text, chunk)): Path<(String, usize)>,
    body: Body,
) -> Response {
    let Some(ticket) = ticket(&text) else { return StatusCode::NOT_FOUND.into_response() };
    let incoming = match smith.host.incoming(&ticket) {
        Ok(incoming) => incoming,
        Err(e) => return refused(&e),
    };
    match timeout(CHUNK_WITHIN, arrive(&*incoming, chunk, body)).await {
        Ok(response) => response,
        Err(_) => StatusCode::REQUEST_TIMEOUT.into_response(),
    }
}

async fn arrive(incoming: &dyn Landing, chunk: usize, mut body: Body) -> Response {
    let mut arriving = match incoming.chunk(chunk) {
        Ok(arriving) => arriving,
        Err(e) => return refused(&e),
    };
    while let Some(frame) = body.frame().await {
        let data = match frame.map(Frame::into_data) {
            Ok(Ok(data)) => data,
            Ok(Err(_)) => continue, // Trailers are nobody's of ours.
            Err(_) => return StatusCode::BAD_REQUEST.into_response(),
        };
        match arriving.write(&data) {
            Ok(()) => {}
            Err(Error::Damaged { .. }) => return StatusCode::UNPROCESSABLE_ENTITY.into_response(),
            Err(e) => return refused(&e),
        }
    }
    match arriving.finish() {
        true => StatusCode::NO_CONTENT.into_response(),
        false => StatusCode::UNPROCESSABLE_ENTITY.into_response(),
    }
}

/// Gives a chunk of a file that was opened.
async fn give(
    State(smith): State<Bytesmith>,
    Path((text, chunk)): Path<(String, u64)>,
) -> Response {
    let Some(ticket) = ticket(&text) else { return StatusCode::NOT_FOUND.into_response() };
    let found = smith.host.outgoing(&ticket).and_then(|out| Ok((out.chunk(chunk)?, out)));
    let ((at, len), outgoing) = match found {
        Ok(found) => found,
        Err(e) => return refused(&e),
    };
    if !outgoing.waits {
        let leaving = Leaving { outgoing, at, left: len, blocks: smith.blocks };
        return Response::new(Body::new(leaving));
    }
    // A disk: nobody else waits for it.
    let read = tokio::task::spawn_blocking(move || {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        outgoing.read_at(at, &mut bytes).map(|()| bytes)
    });
    match read.await {
        Ok(Ok(bytes)) => Response::new(Body::from(bytes)),
        Ok(Err(e)) => refused(&e),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// A chunk on its way out of RAM.
struct Leaving {
    outgoing: Arc<Outgoing>,
    at: u64,
    left: u64,
    blocks: Blocks,
}

impl http_body::Body for Leaving {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, Error>>> {
        if self.left == 0 {
            return std::task::Poll::Ready(None);
        }
        let len = usize::try_from(self.left).unwrap_or(usize::MAX).min(BLOCK_BYTES);
        let (outgoing, at) = (self.outgoing.clone(), self.at);
        let block = self.blocks.filled(len, |into| outgoing.read_at(at, into));
        self.at += len as u64;
        self.left -= len as u64;
        std::task::Poll::Ready(Some(block.map(Frame::data)))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
