//! Chunks of shards on their way between agents, over HTTP/1.1.
//!
//! A transfer goes over several connections (networks give one flow a share of theirs), each on a thread
//! of its own with a runtime of its own: what is read from a slot is written to the socket on the same
//! core. Connections are kept for the next transfer.
//!
//! # Invariants
//!
//! - A chunk has its time, however slowly it trickles.
//! - A chunk that did not get through is handed back before the transfer fails.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use ::bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::{
    body::{Frame, Incoming},
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use tierkeep::{
    Error, Result,
    peers::{Chunks, Landing, Ticket},
    tier::Source,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;

use super::{
    Settings, Tls,
    body::{BLOCK_BYTES, BUFFER_BYTES, Blocks},
    control::{Stream, connect},
    pace::Pace,
};

/// How long one chunk may take: a peer that sends a byte a second is given up.
const CHUNK_WITHIN: Duration = Duration::from_secs(30);

/// Idle connections that are kept to one agent.
const IDLE_MAX: usize = 16;

type Blocked = StreamBody<ReceiverStream<std::result::Result<Frame<Bytes>, io::Error>>>;

/// One connection, with what drives it.
struct Line {
    runtime: tokio::runtime::Runtime,
    sender: SendRequest<Blocked>,
}

pub(super) struct Carrier {
    tls: Option<Arc<Tls>>,
    connections: usize,
    pace: Pace,
    blocks: Blocks,
    idle: Mutex<HashMap<SocketAddr, Vec<Line>>>,
}

impl Carrier {
    pub(super) fn new(settings: &Settings) -> Self {
        Self {
            tls: settings.tls.clone(),
            connections: settings.connections.max(1),
            pace: Pace::new(settings.rate),
            blocks: Blocks::default(),
            idle: Mutex::default(),
        }
    }

    pub(super) fn push(
        &self,
        node: &str,
        address: SocketAddr,
        ticket: &Ticket,
        from: &dyn Source,
        chunks: &Chunks,
    ) -> Result<()> {
        self.on_lines(node, address, chunks, &|line, chunk| {
            let at = chunk as u64 * chunks.chunk_bytes();
            let len = from.len().saturating_sub(at).min(chunks.chunk_bytes());
            self.pace.wait(len);
            let status = line.runtime.block_on(within(self.put(
                &mut line.sender,
                ticket,
                chunk,
                from,
                (at, len),
            )))?;
            match status {
                StatusCode::NO_CONTENT => Ok(()),
                StatusCode::UNPROCESSABLE_ENTITY => {
                    chunks.refuse(chunk);
                    Ok(())
                }
                other => Err(Failed::Answer(other)),
            }
        })
    }

    pub(super) fn pull(
        &self,
        node: &str,
        address: SocketAddr,
        ticket: &Ticket,
        into: &dyn Landing,
        chunks: &Chunks,
    ) -> Result<()> {
        self.on_lines(node, address, chunks, &|line, chunk| {
            line.runtime.block_on(within(get(&mut line.sender, ticket, chunk, into, chunks)))
        })
    }

    /// Carries all chunks over several connections at once.
    fn on_lines(
        &self,
        node: &str,
        address: SocketAddr,
        chunks: &Chunks,
        carry: &(dyn Fn(&mut Line, usize) -> std::result::Result<(), Failed> + Sync),
    ) -> Result<()> {
        let trouble: Mutex<Option<Failed>> = Mutex::default();
        let work = || {
            let mut line = None;
            while let Some(chunk) = chunks.next() {
                if let Err(e) = self.carry_one(address, &mut line, chunk, carry) {
                    chunks.again(chunk);
                    let mut trouble = trouble.lock().unwrap_or_else(PoisonError::into_inner);
                    trouble.get_or_insert(e);
                    return;
                }
            }
            line.into_iter().for_each(|line| self.keep(address, line));
        };
        std::thread::scope(|scope| {
            for _ in 1..self.connections {
                scope.spawn(work);
            }
            work();
        });
        let trouble = trouble.into_inner().unwrap_or_else(PoisonError::into_inner);
        match trouble {
            None => Ok(()),
            Some(Failed::Own(e)) => Err(e),
            Some(other) => Err(Error::Io {
                what: format!("carry chunks to or from {node} at {address}"),
                source: io::Error::other(other.words()),
            }),
        }
    }

    /// One that was kept may have been closed meanwhile: then a fresh one is tried.
    fn carry_one(
        &self,
        address: SocketAddr,
        line: &mut Option<Line>,
        chunk: usize,
        carry: &(dyn Fn(&mut Line, usize) -> std::result::Result<(), Failed> + Sync),
    ) -> std::result::Result<(), Failed> {
        let kept = line.take().or_else(|| self.kept(address));
        if let Some(mut old) = kept {
            match carry(&mut old, chunk) {
                Ok(()) => {
                    *line = Some(old);
                    return Ok(());
                }
                Err(Failed::Connection(e)) => tracing::debug!("{address}: {e}; once more"),
                Err(other) => return Err(other),
            }
        }
        let mut fresh = self.connect(address).map_err(Failed::Connection)?;
        carry(&mut fresh, chunk)?;
        *line = Some(fresh);
        Ok(())
    }

    fn kept(&self, address: SocketAddr) -> Option<Line> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&address)?.pop()
    }

    fn keep(&self, address: SocketAddr, line: Line) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let lines = idle.entry(address).or_default();
        if lines.len() < IDLE_MAX && !line.sender.is_closed() {
            lines.push(line);
        }
    }

    fn connect(&self, address: SocketAddr) -> io::Result<Line> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let sender = runtime.block_on(async {
            let stream = connect(address).await?;
            let stream: Box<dyn Stream> = match &self.tls {
                None => Box::new(stream),
                Some(tls) => {
                    let connector = TlsConnector::from(tls.client());
                    let shaken = timeout(CHUNK_WITHIN, connector.connect(tls.name(), stream)).await;
                    Box::new(shaken.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??)
                }
            };
            let (sender, connection) = http1::Builder::new()
                .max_buf_size(BUFFER_BYTES)
                .handshake(TokioIo::new(stream))
                .await
                .map_err(io::Error::other)?;
            tokio::spawn(async move {
                if let Err(e) = connection.await {
                    tracing::debug!("a connection to {address} ended: {e}");
                }
            });
            Ok::<_, io::Error>(sender)
        })?;
        Ok(Line { runtime, sender })
    }

    async fn put(
        &self,
        sender: &mut SendRequest<Blocked>,
        ticket: &Ticket,
        chunk: usize,
        from: &dyn Source,
        (at, len): (u64, u64),
    ) -> std::result::Result<StatusCode, Failed> {
        sender.ready().await.map_err(Failed::hyper)?;
        let (tx, rx) = mpsc::channel(2);
        let request = request(Method::PUT, ticket, chunk)
            .header(http::header::CONTENT_LENGTH, len)
            .body(StreamBody::new(ReceiverStream::new(rx)))
            .map_err(|e| Failed::Own(Error::Bug(e.to_string())))?;
        let reading = async {
            let mut done = 0;
            while done < len {
                let piece = usize::try_from(len - done).unwrap_or(usize::MAX).min(BLOCK_BYTES);
                let block = self.blocks.filled(piece, |into| from.read_at(at + done, into))?;
                if tx.send(Ok(Frame::data(block))).await.is_err() {
                    break; // The other side has answered already.
                }
                done += piece as u64;
            }
            drop(tx);
            Ok::<(), Error>(())
        };
        let (answered, read) = tokio::join!(sender.send_request(request), reading);
        read.map_err(Failed::Own)?;
        let answer = answered.map_err(Failed::hyper)?;
        drained(answer).await
    }
}

async fn get(
    sender: &mut SendRequest<Blocked>,
    ticket: &Ticket,
    chunk: usize,
    into: &dyn Landing,
    chunks: &Chunks,
) -> std::result::Result<(), Failed> {
    sender.ready().await.map_err(Failed::hyper)?;
    let (_, rx) = mpsc::channel(1);
    let request = request(Method::GET, ticket, chunk)
        .header(http::header::CONTENT_LENGTH, 0)
        .body(StreamBody::new(ReceiverStream::new(rx)))
        .map_err(|e| Failed::Own(Error::Bug(e.to_string())))?;
    let mut answer = sender.send_request(request).await.map_err(Failed::hyper)?;
    if answer.status() != StatusCode::OK {
        let status = answer.status();
        drained(answer).await?;
        return Err(Failed::Answer(status));
    }
    let mut arriving = into.chunk(chunk).map_err(Failed::Own)?;
    while let Some(frame) = answer.body_mut().frame().await {
        let frame = frame.map_err(Failed::hyper)?;
        if let Ok(data) = frame.into_data() {
            // More than was asked for is a lie of theirs, as is a wrong byte.
            if arriving.write(&data).is_err() {
                chunks.refuse(chunk);
                return Err(Failed::Connection(io::Error::other("it sends too many bytes")));
            }
        }
    }
    if !arriving.finish() {
        chunks.refuse(chunk);
    }
    Ok(())
}

fn request(method: Method, ticket: &Ticket, chunk: usize) -> http::request::Builder {
    let ticket: String = ticket.iter().map(|byte| format!("{byte:02x}")).collect();
    Request::builder()
        .method(method)
        .uri(format!("/chunks/{ticket}/{chunk}"))
        .header(http::header::HOST, "tierkeep")
}

/// The answer's end: only then can the connection be used again, and is a TLS session's last word read.
async fn drained(mut answer: Response<Incoming>) -> std::result::Result<StatusCode, Failed> {
    while let Some(frame) = answer.body_mut().frame().await {
        frame.map_err(Failed::hyper)?;
    }
    Ok(answer.status())
}

async fn within<T>(
    deed: impl Future<Output = std::result::Result<T, Failed>>,
) -> std::result::Result<T, Failed> {
    let slow = || {
        let why = format!("a chunk did not get through within {} s", CHUNK_WITHIN.as_secs());
        Failed::Slow(why)
    };
    timeout(CHUNK_WITHIN, deed).await.unwrap_or_else(|_| Err(slow()))
}

/// Why a chunk did not get through.
enum Failed {
    /// Our own file, or our own place for it.
    Own(Error),
    Connection(io::Error),
    Slow(String),
    Answer(StatusCode),
}

impl Failed {
    fn hyper(e: hyper::Error) -> Self {
        Self::Connection(io::Error::other(e))
    }

    fn words(&self) -> String {
        match self {
            Self::Own(e) => e.chain(),
            Self::Connection(e) => {
                let cause = e.get_ref().and_then(|e| std::error::Error::source(e));
                cause.map_or_else(|| e.to_string(), |cause| format!("{e}: {cause}"))
            }
            Self::Slow(why) => why.clone(),
            Self::Answer(StatusCode::NOT_FOUND) => "the other side knows no such transfer".into(),
            Self::Answer(status) => format!("the other side answers {status}"),
        }
    }
}
