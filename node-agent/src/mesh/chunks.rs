//! The agent's side of connections that chunks go over, each on a thread of its own.
//!
//! # Invariants
//!
//! - A connection that says nothing ends in time, one that says half of something in seconds; a chunk has
//!   its time.
//! - Whoever sends what is not wanted learns so: its body is read to its end first, where it has a
//!   reasonable one.

use std::{
    io::{self, Write},
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use rustls::{ServerConnection, StreamOwned};
use tierkeep::{
    Error,
    chunk::CHUNK_BYTES_MAX,
    host::Host,
    peers::{Broken, Landing, Ticket},
};
use tokio::sync::OwnedSemaphorePermit;

use super::{
    head::{Method, Request, answer},
    line::{Line, Socket},
};

/// A connection that is kept for the next transfer is let go after that.
const IDLE: Duration = Duration::from_secs(90);

/// How long a head may take.
const HEAD_WITHIN: Duration = Duration::from_secs(10);

/// How long one chunk may take.
const CHUNK_WITHIN: Duration = Duration::from_secs(30);

/// There may be hundreds of them, and they call nothing deep.
const STACK_BYTES: usize = 256 << 10;

/// Answers on this connection until it ends, or `over` is hung up.
pub(super) fn answer_on(
    host: Arc<Host>,
    stream: TcpStream,
    tls: Option<ServerConnection>,
    from: SocketAddr,
    over: Arc<OwnedFd>,
    place: OwnedSemaphorePermit,
) {
    let serve = move || {
        let _place = place;
        let served = Socket::new(stream, Some(over)).and_then(|socket| {
            let line = match tls {
                None => Line::Plain(socket),
                Some(tls) => Line::Server(Box::new(StreamOwned::new(tls, socket))),
            };
            Answering { host, line }.serve()
        });
        if let Err(e) = served {
            tracing::debug!("{from}: {e}");
        }
    };
    let spawned = std::thread::Builder::new()
        .name("tierkeep-chunks".into())
        .stack_size(STACK_BYTES)
        .spawn(serve);
    if let Err(e) = spawned {
        tracing::error!("{from} could not be let in: {e}");
    }
}

struct Answering {
    host: Arc<Host>,
    line: Line,
}

impl Answering {
    fn serve(&mut self) -> io::Result<()> {
        loop {
            self.line.within(IDLE);
            self.line.wait()?;
            self.line.within(HEAD_WITHIN);
            let Some(head) = self.line.head()? else { return Ok(()) };
            let request = match Request::parse(&head) {
                Ok(request) => request,
                Err(why) => {
                    self.refuse(400, &why)?; // What follows nobody knows.
                    return Ok(());
                }
            };
            if request.length > CHUNK_BYTES_MAX {
                self.refuse(413, "no chunk has so many bytes")?;
                return Ok(());
            }
            self.line.within(CHUNK_WITHIN);
            match (request.method, request.chunk) {
                (Method::Put, Some((ticket, chunk))) => {
                    self.take(&ticket, chunk, request.length)?;
                }
                (Method::Get, Some((ticket, chunk))) => {
                    self.line.drain(request.length)?;
                    self.give(&ticket, chunk)?;
                }
                (_, None) => {
                    self.line.drain(request.length)?;
                    self.refuse(404, "nothing is here")?;
                }
            }
            if request.last {
                return Ok(());
            }
        }
    }

    /// Takes a chunk of a shard that was offered.
    fn take(&mut self, ticket: &Ticket, chunk: usize, length: u64) -> io::Result<()> {
        let incoming = match self.host.incoming(ticket) {
            Ok(incoming) => incoming,
            Err(e) => return self.drain_and_refuse(length, &e),
        };
        let arriving = match incoming.chunk(chunk) {
            Ok(arriving) => arriving,
            Err(e) => return self.drain_and_refuse(length, &e),
        };
        if arriving.len() != length {
            drop(arriving);
            self.line.drain(length)?;
            return self.say(422, "");
        }
        match arriving.take(&mut self.line) {
            Ok(true) => self.say(204, ""),
            Ok(false) => self.say(422, ""),
            Err(Broken::Flow(e)) => Err(e),
            Err(Broken::Place(e)) => {
                // How much of the body is left is not known.
                self.refuse_as(&e)?;
                Err(io::Error::other(e.chain()))
            }
        }
    }

    /// Gives a chunk of a file that was opened.
    fn give(&mut self, ticket: &Ticket, chunk: usize) -> io::Result<()> {
        let found = self.host.outgoing(ticket);
        let found = found.and_then(|out| Ok((out.chunk(chunk as u64)?, out)));
        let ((at, length), outgoing) = match found {
            Ok(found) => found,
            Err(e) => return self.refuse_as(&e),
        };
        self.line.write_all(answer(200, length).as_bytes())?;
        self.line.send(outgoing.in_memory(), (at, length), &mut |at, into| {
            outgoing.read_at(at, into).map_err(|e| io::Error::other(e.chain()))
        })
    }

    fn drain_and_refuse(&mut self, length: u64, e: &Error) -> io::Result<()> {
        self.line.drain(length)?;
        self.refuse_as(e)
    }

    fn refuse_as(&mut self, e: &Error) -> io::Result<()> {
        self.refuse(if e.is_not_found() { 404 } else { 409 }, &e.chain())
    }

    fn refuse(&mut self, status: u16, why: &str) -> io::Result<()> {
        self.say(status, &format!("{why}\n"))
    }

    fn say(&mut self, status: u16, words: &str) -> io::Result<()> {
        let head = answer(status, words.len() as u64);
        self.line.write_all(format!("{head}{words}").as_bytes())?;
        self.line.flush()
    }
}
