//! One connection that chunks go over, on a thread of its own: HTTP/1.1 by hand, for what is between its
//! heads. In plain text a body goes from a slot's pages to the socket and from the socket into a slot's
//! pages without a buffer of ours, which no HTTP library does; that is most of a transfer's cost.
//!
//! # Invariants
//!
//! - Nothing waits longer than it was given, however slowly bytes trickle.
//! - Of a body exactly as many bytes are read, or sent, as its head says; else the connection ends.

use std::{
    fs::File,
    io::{self, BufRead, Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::sendfile,
    net::{RecvFlags, recv},
};
use rustls::{ClientConnection, ServerConnection, StreamOwned};
use tierkeep::{
    clock::{Deadline, SystemClock},
    peers::Flow,
    tier::buffer::AlignedBuf,
};

/// How long another host may take to let us in.
pub(super) const CONNECT_WITHIN: Duration = Duration::from_secs(3);

/// The longest head of a request or an answer.
const HEAD_BYTES_MAX: usize = 4096;

/// What is read and sent at a time where it goes through a buffer: a few of these fit a core's second
/// cache, and the kernel copies from there at two to three times the speed.
const BLOCK_BYTES: usize = 64 << 10;

/// A socket whose calls end in time.
pub(super) struct Socket {
    stream: TcpStream,
    until: Deadline,
    given: Duration,
    /// Hung up when nobody is to wait any more.
    over: Option<Arc<OwnedFd>>,
}

impl Socket {
    pub(super) fn new(stream: TcpStream, over: Option<Arc<OwnedFd>>) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let given = Duration::ZERO;
        Ok(Self { stream, until: Deadline::after(&SystemClock, given), given, over })
    }

    pub(super) fn connect(address: SocketAddr) -> io::Result<Self> {
        Self::new(TcpStream::connect_timeout(&address, CONNECT_WITHIN)?, None)
    }

    /// All calls from here on end within `time`.
    pub(super) fn within(&mut self, time: Duration) {
        self.until = Deadline::after(&SystemClock, time);
        self.given = time;
    }

    fn wait(&self, what: PollFlags) -> io::Result<()> {
        let late = || {
            let why = format!("it did not get through within {} s", self.given.as_secs());
            io::Error::new(io::ErrorKind::TimedOut, why)
        };
        let left = self.until.left(&SystemClock).ok_or_else(late)?;
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut all = vec![PollFd::new(&self.stream, what)];
        all.extend(self.over.iter().map(|over| PollFd::new(over, PollFlags::empty())));
        match poll(&mut all, Some(&left)) {
            Ok(0) => return Err(late()),
            Err(rustix::io::Errno::INTR) | Ok(_) => {}
            Err(e) => return Err(e.into()),
        }
        match all.get(1).is_some_and(|over| !over.revents().is_empty()) {
            true => Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the agent ends")),
            false => Ok(()),
        }
    }

    /// Again and again until it does not have to wait.
    fn patiently<T>(
        &self,
        what: PollFlags,
        mut deed: impl FnMut() -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            match deed() {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait(what)?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    /// From the file's pages to the socket; they are not copied on the way.
    fn send_file(&self, file: &File, at: u64, len: u64) -> io::Result<()> {
        let (mut from, end) = (at, at + len);
        while from < end {
            let left = usize::try_from(end - from).unwrap_or(usize::MAX);
            let sent = self.patiently(PollFlags::OUT, || {
                Ok(sendfile(&self.stream, file, Some(&mut from), left)?)
            })?;
            if sent == 0 {
                let why = "the file was cut short by whoever fills it";
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
            }
        }
        Ok(())
    }
}

impl Read for Socket {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.patiently(PollFlags::IN, || (&self.stream).read(into))
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.patiently(PollFlags::OUT, || (&self.stream).write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection in plain text or under TLS.
pub(super) enum Line {
    Plain(Socket),
    Client(Box<StreamOwned<ClientConnection, Socket>>),
    Server(Box<StreamOwned<ServerConnection, Socket>>),
}

impl Line {
    fn socket(&mut self) -> &mut Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::Client(stream) => &mut stream.sock,
            Self::Server(stream) => &mut stream.sock,
        }
    }

    /// All calls from here on end within `time`.
    pub(super) fn within(&mut self, time: Duration) {
        self.socket().within(time);
    }

    /// Returns when something has come, or the other side has hung up.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.wait(PollFlags::IN),
            Self::Client(stream) => stream.fill_buf().map(drop),
            Self::Server(stream) => stream.fill_buf().map(drop),
        }
    }

    /// The next head, to its empty line; `None`: the other side has hung up.
    pub(super) fn head(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut head = Vec::new();
        loop {
            let known = head.len();
            let mut peeked = [0; HEAD_BYTES_MAX];
            let seen = self.peek(&mut peeked)?;
            if seen.is_empty() {
                let cut = || Err(io::ErrorKind::UnexpectedEof.into());
                return if head.is_empty() { Ok(None) } else { cut() };
            }
            head.extend_from_slice(seen);
            let begin = known.saturating_sub(3);
            let end = head[begin..].windows(4).position(|four| four == b"\r\n\r\n");
            head.truncate(end.map_or(head.len(), |end| begin + end + 4));
            self.consume(head.len() - known)?;
            if end.is_some() {
                return Ok(Some(head));
            }
            if head.len() >= HEAD_BYTES_MAX {
                return Err(io::Error::other("it says too much"));
            }
        }
    }

    /// What has come, without taking it; empty where the other side has hung up.
    fn peek<'a>(&'a mut self, into: &'a mut [u8]) -> io::Result<&'a [u8]> {
        match self {
            Self::Plain(socket) => {
                let peek = || Ok(recv(&socket.stream, &mut *into, RecvFlags::PEEK)?.1);
                let n = socket.patiently(PollFlags::IN, peek)?;
                Ok(&into[..n])
            }
            Self::Client(stream) => stream.fill_buf(),
            Self::Server(stream) => stream.fill_buf(),
        }
    }

    /// Takes so many of the bytes that were peeked at.
    fn consume(&mut self, len: usize) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.read_exact(&mut vec![0; len]),
            Self::Client(stream) => {
                stream.consume(len);
                Ok(())
            }
            Self::Server(stream) => {
                stream.consume(len);
                Ok(())
            }
        }
    }

    /// Sends a body: from `file` at `at` where that lies in memory, else as `read` has it.
    pub(super) fn send(
        &mut self,
        file: Option<&File>,
        (at, len): (u64, u64),
        read: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        if let (Self::Plain(socket), Some(file)) = (&*self, file) {
            return socket.send_file(file, at, len);
        }
        let mut block = AlignedBuf::new(BLOCK_BYTES);
        let mut done = 0;
        while done < len {
            let piece = usize::try_from(len - done).unwrap_or(usize::MAX).min(BLOCK_BYTES);
            read(at + done, &mut block[..piece])?;
            self.write_all(&block[..piece])?;
            done += piece as u64;
        }
        self.flush()
    }

    /// Reads a body to its end and keeps nothing of it.
    pub(super) fn drain(&mut self, len: u64) -> io::Result<()> {
        let took = io::copy(&mut Read::take(&mut *self, len), &mut io::sink())?;
        if took < len { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }
}

impl Read for Line {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(into),
            Self::Client(stream) => stream.read(into),
            Self::Server(stream) => stream.read(into),
        }
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(bytes),
            Self::Client(stream) => stream.write(bytes),
            Self::Server(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.flush(),
            Self::Client(stream) => stream.flush(),
            Self::Server(stream) => stream.flush(),
        }
    }
}

impl Flow for Line {
    fn ready(&mut self) -> io::Result<()> {
        // What TLS has taken from the socket already, no poll would show: its reads wait by themselves.
        if let Self::Plain(socket) = self { socket.wait(PollFlags::IN) } else { Ok(()) }
    }

    fn receive(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => Ok(recv(&socket.stream, into, RecvFlags::empty())?.1),
            other => other.read(into),
        }
    }

    fn is_direct(&self) -> bool {
        matches!(self, Self::Plain(_))
    }
}
