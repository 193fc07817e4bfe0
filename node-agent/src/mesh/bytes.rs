//! Chunks of shards on their way to and from other agents.
//!
//! A transfer goes over several connections (networks give one flow a share of theirs), each on a thread
//! of its own. Connections are kept for the next transfer.
//!
//! # Invariants
//!
//! - A chunk has its time, however slowly it trickles.
//! - A chunk that did not get through is handed back before the transfer fails.

use std::{
    collections::HashMap,
    io::{self, Write},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustls::{ClientConnection, StreamOwned};
use tierkeep::{
    Error, Result,
    peers::{Broken, Chunks, Landing, Ticket},
    tier::Source,
};

use super::{
    Settings, Tls,
    head::{Answer, Method, request},
    line::{Line, Socket},
    pace::Pace,
};

/// How long one chunk may take: a peer that sends a byte a second is given up.
const CHUNK_WITHIN: Duration = Duration::from_secs(30);

/// Idle connections that are kept to one agent.
const IDLE_MAX: usize = 16;

pub(super) struct Carrier {
    tls: Option<Arc<Tls>>,
    connections: usize,
    pace: Pace,
    idle: Mutex<HashMap<SocketAddr, Vec<Line>>>,
}

impl Carrier {
    pub(super) fn new(settings: &Settings) -> Self {
        Self {
            tls: settings.tls.clone(),
            connections: settings.connections.max(1),
            pace: Pace::new(settings.rate),
            idle: Mutex::default(),
        }
    }

    pub(super) fn push(
        &self,
        node: &str,
        address: SocketAddr,
        ticket: &Ticket,
        from: &dyn Source,
        chunks: &Chunks<'_>,
    ) -> Result<()> {
        self.on_lines(node, address, chunks, &|line, chunk| {
            let at = chunk as u64 * chunks.chunk_bytes();
            let len = from.len().saturating_sub(at).min(chunks.chunk_bytes());
            self.pace.wait(len);
            match put(line, ticket, chunk, from, (at, len))? {
                204 => {
                    chunks.carried(chunk);
                    Ok(())
                }
                422 => {
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
        chunks: &Chunks<'_>,
    ) -> Result<()> {
        self.on_lines(node, address, chunks, &|line, chunk| get(line, ticket, chunk, into, chunks))
    }

    /// Carries all chunks over several connections at once.
    fn on_lines(
        &self,
        node: &str,
        address: SocketAddr,
        chunks: &Chunks<'_>,
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
        let mut fresh = self.connect(address).map_err(Failed::of)?;
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
        if lines.len() < IDLE_MAX {
            lines.push(line);
        }
    }

    fn connect(&self, address: SocketAddr) -> io::Result<Line> {
        let mut socket = Socket::connect(address)?;
        let Some(tls) = &self.tls else { return Ok(Line::Plain(socket)) };
        socket.within(CHUNK_WITHIN);
        let mut config = (*tls.client()).clone();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let client = ClientConnection::new(Arc::new(config), tls.name());
        let mut stream = StreamOwned::new(client.map_err(io::Error::other)?, socket);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Line::Client(Box::new(stream)))
    }
}

fn put(
    line: &mut Line,
    ticket: &Ticket,
    chunk: usize,
    from: &dyn Source,
    (at, len): (u64, u64),
) -> std::result::Result<u16, Failed> {
    line.within(CHUNK_WITHIN);
    let mut own = None;
    let head = request(Method::Put, ticket, chunk, len);
    let sent = line.write_all(head.as_bytes()).and_then(|()| {
        line.send(from.file(), (at, len), &mut |at, into| {
            from.read_at(at, into).map_err(|e| {
                own = Some(e);
                io::ErrorKind::Other.into()
            })
        })
    });
    if let Some(e) = own {
        return Err(Failed::Own(e));
    }
    sent.map_err(Failed::of)?;
    let answer = answer(line)?;
    line.drain(answer.length).map_err(Failed::of)?;
    Ok(answer.status)
}

fn get(
    line: &mut Line,
    ticket: &Ticket,
    chunk: usize,
    into: &dyn Landing,
    chunks: &Chunks<'_>,
) -> std::result::Result<(), Failed> {
    line.within(CHUNK_WITHIN);
    let head = request(Method::Get, ticket, chunk, 0);
    line.write_all(head.as_bytes()).map_err(Failed::of)?;
    let answer = answer(line)?;
    if answer.status != 200 {
        line.drain(answer.length).map_err(Failed::of)?;
        return Err(Failed::Answer(answer.status));
    }
    let arriving = into.chunk(chunk).map_err(Failed::Own)?;
    if answer.length != arriving.len() {
        chunks.refuse(chunk);
        let why = format!("chunk {chunk} has {} bytes there", answer.length);
        return Err(Failed::Connection(io::Error::other(why)));
    }
    match arriving.take(line) {
        Ok(true) => {
            chunks.carried(chunk);
            Ok(())
        }
        Ok(false) => {
            chunks.refuse(chunk);
            Ok(())
        }
        Err(Broken::Flow(e)) => Err(Failed::of(e)),
        Err(Broken::Place(e)) => Err(Failed::Own(e)),
    }
}

fn answer(line: &mut Line) -> std::result::Result<Answer, Failed> {
    let head = line.head().map_err(Failed::of)?;
    let head = head.ok_or_else(|| Failed::Connection(io::Error::other("it hangs up")))?;
    Answer::parse(&head).map_err(|why| Failed::Connection(io::Error::other(why)))
}

/// Why a chunk did not get through.
enum Failed {
    /// Our own file, or our own place for it.
    Own(Error),
    Connection(io::Error),
    /// Its time is over: another connection would not be quicker.
    Slow(io::Error),
    Answer(u16),
}

impl Failed {
    fn of(e: io::Error) -> Self {
        if e.kind() == io::ErrorKind::TimedOut { Self::Slow(e) } else { Self::Connection(e) }
    }

    fn words(&self) -> String {
        match self {
            Self::Own(e) => e.chain(),
            Self::Connection(e) | Self::Slow(e) => e.to_string(),
            Self::Answer(404) => "the other side knows no such transfer".into(),
            Self::Answer(status) => format!("the other side answers {status}"),
        }
    }
}
