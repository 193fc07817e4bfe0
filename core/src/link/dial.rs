//! Questions and answers over one socket that may be gone and come back.
//!
//! # Invariants
//!
//! - An answer goes to the question with its id; one that nobody waits for is dropped, its descriptors
//!   closed.
//! - A question whose connection is lost is asked again of the next one (`ask`) or fails (`ask_now`):
//!   every question has the same effect when it is asked twice.

use std::{
    collections::HashMap,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex,
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    time::Duration,
};

use tierkeep_proto::trainer::{
    Hello, Interrupt, Open, Opened, Reply, Request, reply::Answer, request::Call,
};

use crate::{
    clock::{Deadline, SharedClock},
    error::{Error, Result},
    observe::locked,
    owner::Asked,
    wire::{FRAME_BYTES_MAX, PROTOCOLS, convert, program, receive, send},
};

/// An answer and what came beside it.
pub(super) type Came = (Answer, Vec<OwnedFd>);

/// How long a socket may take to accept or pass on a message that has begun.
const MESSAGE_WAIT: Duration = Duration::from_secs(10);

/// How often a question that may be interrupted looks whether it is.
const ASK: Duration = Duration::from_millis(100);

#[derive(Default)]
struct State {
    socket: Option<Arc<UnixStream>>,
    last_id: u64,
    waiting: HashMap<u64, Sender<Option<Came>>>,
    closed: bool,
    /// Since when there is no agent.
    away: Option<Duration>,
    /// Why there will be none any more.
    over: Option<String>,
}

/// The way to an agent.
pub(super) struct Dial {
    path: PathBuf,
    open: Open,
    /// By which an agent of tenants knows this process.
    token: Option<PathBuf>,
    clock: SharedClock,
    state: Mutex<State>,
    changed: Condvar,
    writing: Mutex<()>,
}

impl std::fmt::Debug for Dial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dial").field("path", &self.path).finish_non_exhaustive()
    }
}

/// An answer that does not fit its question.
pub(super) fn odd(question: &str) -> Error {
    Error::Bug(format!("the agent's answer to {question} is of another kind"))
}

impl Dial {
    pub(super) fn new(
        path: PathBuf,
        open: Open,
        token: Option<PathBuf>,
        clock: SharedClock,
    ) -> Arc<Self> {
        Arc::new(Self {
            path,
            open,
            token,
            clock,
            state: Mutex::default(),
            changed: Condvar::new(),
            writing: Mutex::default(),
        })
    }

    pub(super) fn clock(&self) -> &SharedClock {
        &self.clock
    }

    /// The first connection, waiting for an agent up to `wait`: it may be starting.
    pub(super) fn first(&self, wait: Duration) -> Result<(UnixStream, Opened)> {
        let deadline = Deadline::after(&*self.clock, wait);
        loop {
            match self.greet(&self.open) {
                Err(Error::Io { source, .. })
                    if is_away(&source) && deadline.left(&*self.clock).is_some() =>
                {
                    self.clock.pause(Duration::from_millis(50));
                }
                Err(Error::Io { what, source }) if is_away(&source) => {
                    let what = format!(
                        "{what}, which agent= or TIERKEEP_AGENT names (`tierkeep agent` starts one, \
                         \"off\" does without)"
                    );
                    // Whatever the system calls it, the agent is what is not there.
                    let source = io::Error::new(io::ErrorKind::NotConnected, source.to_string());
                    return Err(Error::Io { what, source });
                }
                other => return other,
            }
        }
    }

    /// One more connection, for a trainer that was connected before.
    pub(super) fn again(
        &self,
        back: tierkeep_proto::trainer::Back,
    ) -> Result<(UnixStream, Opened)> {
        self.greet(&Open { back: Some(back), ..self.open.clone() })
    }

    fn greet(&self, open: &Open) -> Result<(UnixStream, Opened)> {
        let away = |source: io::Error| Error::Io {
            what: format!("reach the agent at {}", self.path.display()),
            source,
        };
        let socket = UnixStream::connect(&self.path).map_err(away)?;
        super::find::check_host_of(&socket, &self.path, self.token.is_some())?;
        let token = super::token::read(self.token.as_deref())?;
        let limits = socket
            .set_write_timeout(Some(MESSAGE_WAIT))
            .and_then(|()| socket.set_read_timeout(Some(MESSAGE_WAIT)));
        limits.map_err(away)?;
        let (oldest, newest) = PROTOCOLS;
        let hello = Call::Hello(Hello { oldest, newest, program: program(), token });
        match exchange(&socket, 1, hello).map_err(away)? {
            Answer::Welcome(_) => {}
            Answer::Failure(failure) => return Err(convert::error(failure)),
            _ => return Err(odd("Hello")),
        }
        // It may wait for a trainer that is still dying, and then for a process that is no agent's.
        let wait = Duration::from_millis(open.lock_wait_ms.saturating_mul(2)) + MESSAGE_WAIT;
        socket.set_read_timeout(Some(wait)).map_err(away)?;
        match exchange(&socket, 2, Call::Open(open.clone())).map_err(away)? {
            Answer::Opened(opened) => {
                socket.set_read_timeout(None).map_err(away)?;
                Ok((socket, opened))
            }
            Answer::Failure(failure) => Err(convert::error(failure)),
            _ => Err(odd("Open")),
        }
    }

    /// Questions go through `socket` from here on.
    pub(super) fn install(&self, socket: Arc<UnixStream>) {
        let mut state = locked(&self.state);
        state.socket = Some(socket);
        state.away = None;
        state.last_id = state.last_id.max(2);
        drop(state);
        self.changed.notify_all();
    }

    /// The connection is gone. True: this handle is closed, and wants no other.
    pub(super) fn lose(&self) -> bool {
        let mut state = locked(&self.state);
        if state.socket.take().is_some() {
            state.away = Some(self.clock.monotonic());
        }
        for (_, waiting) in state.waiting.drain() {
            let _ = waiting.send(None); // Whoever waited may have gone.
        }
        let closed = state.closed;
        drop(state);
        self.changed.notify_all();
        closed
    }

    /// There will be no agent any more; why.
    pub(super) fn give_up(&self, why: &str) {
        locked(&self.state).over = Some(why.into());
        self.changed.notify_all();
    }

    pub(super) fn is_closed(&self) -> bool {
        locked(&self.state).closed
    }

    /// No more questions. The thread that hears ends.
    pub(super) fn close(&self) {
        let mut state = locked(&self.state);
        state.closed = true;
        hang_up(state.socket.as_ref());
        drop(state);
        self.changed.notify_all();
    }

    /// Gives the connection up for a new one: the two sides do not know the same.
    pub(super) fn reset(&self) {
        hang_up(locked(&self.state).socket.as_ref());
    }

    /// Waits up to `pause`, or until this handle is closed.
    pub(super) fn rest(&self, pause: Duration) {
        let state = locked(&self.state);
        drop(self.changed.wait_timeout_while(state, pause, |state| !state.closed));
    }

    /// An answer that came.
    pub(super) fn hear(&self, reply: Reply, fds: Vec<OwnedFd>) {
        let waiting = locked(&self.state).waiting.remove(&reply.id);
        if let (Some(waiting), Some(answer)) = (waiting, reply.answer) {
            let _ = waiting.send(Some((answer, fds)));
        }
    }

    /// For how long there has been no agent.
    pub(super) fn away(&self) -> Option<Duration> {
        let since = locked(&self.state).away?;
        Some(self.clock.monotonic().saturating_sub(since))
    }

    /// Asks, again where the connection is lost meanwhile, and waits for the answer `within`.
    ///
    /// # Errors
    /// What the agent answered, or there is none for so long.
    pub(super) fn ask(&self, call: Call, within: Duration) -> Result<Came> {
        let deadline = Deadline::after(&*self.clock, within);
        loop {
            match self.try_once(&call, &deadline, None)? {
                Some(came) => return answer(came),
                None => self.wait_for_agent(&deadline)?,
            }
        }
    }

    /// Asks once: an agent that is away is an error at once.
    ///
    /// # Errors
    /// What the agent answered, or it went away.
    pub(super) fn ask_now(&self, call: Call, within: Duration) -> Result<Came> {
        let deadline = Deadline::after(&*self.clock, within);
        match self.try_once(&call, &deadline, None)? {
            Some(came) => answer(came),
            None => Err(self.is_away()),
        }
    }

    /// [`ask_now`](Self::ask_now), where the caller may not want to wait. `None`: the agent is away.
    ///
    /// # Errors
    /// What the agent answered.
    pub(super) fn ask_until(
        &self,
        call: &Call,
        within: Duration,
        interrupted: Asked<'_>,
    ) -> Result<Option<Came>> {
        let deadline = Deadline::after(&*self.clock, within);
        self.try_once(call, &deadline, interrupted)?.map(answer).transpose()
    }

    /// `None`: there is no agent, or the connection was lost.
    fn try_once(
        &self,
        call: &Call,
        deadline: &Deadline,
        interrupted: Asked<'_>,
    ) -> Result<Option<Came>> {
        let (sender, receiver) = channel();
        let (id, socket) = {
            let mut state = locked(&self.state);
            if let Some(why) = &state.over {
                return Err(Error::Fenced { why: why.clone() });
            }
            let Some(socket) = state.socket.clone() else { return Ok(None) };
            state.last_id += 1;
            let id = state.last_id;
            state.waiting.insert(id, sender);
            (id, socket)
        };
        if let Err(e) = self.send(&socket, id, call.clone()) {
            locked(&self.state).waiting.remove(&id);
            if e.kind() == io::ErrorKind::InvalidData {
                return Err(Error::invalid(format!(
                    "what is to be said does not fit a message to the agent ({e}): values that large \
                     belong into tensors"
                )));
            }
            hang_up(Some(&socket)); // Half a message may be out.
            return Ok(None);
        }
        let mut told = false;
        loop {
            let Some(left) = deadline.left(&*self.clock) else {
                locked(&self.state).waiting.remove(&id);
                let what = format!("an answer of the agent at {}", self.path.display());
                return Err(deadline.passed(what, ""));
            };
            match receiver.recv_timeout(left.min(ASK)) {
                Ok(came) => return Ok(came),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if !told && interrupted.is_some_and(|interrupted| interrupted()) {
                told = true;
                let interrupt = Call::Interrupt(Interrupt { request: id });
                if self.send(&socket, 0, interrupt).is_err() {
                    hang_up(Some(&socket));
                }
            }
        }
    }

    fn send(&self, socket: &UnixStream, id: u64, call: Call) -> io::Result<()> {
        let _one_at_a_time = locked(&self.writing);
        send(socket, &Request { id, call: Some(call) }, &[])
    }

    fn wait_for_agent(&self, deadline: &Deadline) -> Result<()> {
        let mut state = locked(&self.state);
        loop {
            if let Some(why) = &state.over {
                return Err(Error::Fenced { why: why.clone() });
            }
            if state.closed {
                return Err(Error::invalid("this Checkpointer is closed"));
            }
            if state.socket.is_some() {
                return Ok(());
            }
            let Some(left) = deadline.left(&*self.clock) else {
                drop(state);
                return Err(self.is_away());
            };
            state = match self.changed.wait_timeout(state, left.min(ASK)) {
                Ok((state, _)) => state,
                Err(e) => e.into_inner().0,
            };
        }
    }

    /// That it is away, in words.
    pub(super) fn is_away(&self) -> Error {
        Error::Io {
            what: format!("reach the agent at {}", self.path.display()),
            source: io::Error::new(io::ErrorKind::NotConnected, "it went away and is not back"),
        }
    }
}

fn answer((answer, fds): Came) -> Result<Came> {
    match answer {
        Answer::Failure(failure) => Err(convert::error(failure)),
        answer => Ok((answer, fds)),
    }
}

/// One question on a socket that nobody else uses yet.
fn exchange(socket: &UnixStream, id: u64, call: Call) -> io::Result<Answer> {
    send(socket, &Request { id, call: Some(call) }, &[])?;
    loop {
        let Some((reply, _)) = receive::<Reply>(socket, FRAME_BYTES_MAX)? else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        match reply.answer {
            Some(answer) if reply.id == id => return Ok(answer),
            // Told before it answered: it will be told again, or is counted there.
            _ => {}
        }
    }
}

fn hang_up(socket: Option<&Arc<UnixStream>>) {
    if let Some(socket) = socket {
        // It may be gone already.
        let _ = socket.shutdown(std::net::Shutdown::Both);
    }
}

/// Nobody listens, or whoever did went away in the middle: another try may find the next agent.
pub(super) fn is_away(source: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        source.kind(),
        Kind::NotFound
            | Kind::ConnectionRefused
            | Kind::ConnectionReset
            | Kind::ConnectionAborted
            | Kind::BrokenPipe
            | Kind::UnexpectedEof
            | Kind::WouldBlock
            | Kind::TimedOut
            | Kind::NotConnected
    )
}
