//! One socket: it hears questions, has them answered, and ends with the process at its other end.

use std::{
    collections::HashMap,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tierkeep_proto::trainer::{Reply, Request, Welcome, reply::Answer, request::Call};

use super::{
    Host,
    hands::{Hands, OPEN_MAX},
    peer::{Came, Peer, Who, wait},
    seat::Seat,
    tell,
    tenants::Tenant,
};
use crate::{
    clock::Deadline,
    error::{Doing, Error, Result},
    observe::locked,
    wire::{FRAME_BYTES_MAX, GREETING_BYTES_MAX, PROTOCOLS, convert, program, receive, send},
};

/// How long a trainer may take to greet, then to ask for its rank, and a message to go through once it has
/// begun.
const GREETING: Duration = Duration::from_secs(10);

/// How often a thread that hears nothing looks whether the agent ends.
const LISTEN: Duration = Duration::from_secs(5);

/// A process whose files are closed because it was killed is dead within this.
const DYING: Duration = Duration::from_millis(200);

/// A trainer at the other end of a socket.
pub(super) struct Connection {
    pub(super) host: Arc<Host>,
    pub(super) id: u64,
    pub(super) peer: Arc<Peer>,
    /// Whose it is, where the agent serves tenants.
    pub(super) tenant: OnceLock<Tenant>,
    socket: UnixStream,
    writing: Mutex<()>,
    seat: Mutex<Option<Arc<Seat>>>,
    over: AtomicBool,
    /// Questions that are being answered. True: the answer is waited for no longer.
    open: Mutex<HashMap<u64, bool>>,
    hands: Hands,
}

impl Connection {
    pub(super) fn new(host: Arc<Host>, id: u64, socket: UnixStream) -> Result<Arc<Self>> {
        let set_up = || -> io::Result<Peer> {
            socket.set_nonblocking(false)?;
            socket.set_read_timeout(Some(GREETING))?;
            socket.set_write_timeout(Some(GREETING))?;
            Peer::of(&socket)
        };
        let mut peer = set_up().doing(|| "set up a trainer's socket".into())?;
        if host.settings.tenancy.is_some() {
            peer.who = Who::own(); // All files are the agent's.
        }
        Ok(Arc::new(Self {
            host,
            id,
            peer: Arc::new(peer),
            tenant: OnceLock::new(),
            socket,
            writing: Mutex::default(),
            seat: Mutex::default(),
            over: AtomicBool::new(false),
            open: Mutex::default(),
            hands: Hands::default(),
        }))
    }

    /// Answers the greeting with why there will be nothing more.
    pub(super) fn refuse(self: Arc<Self>, error: &Error) {
        if let Ok(Some((request, _))) = receive::<Request>(&self.socket, GREETING_BYTES_MAX) {
            self.answer(request.id, Answer::Failure(convert::failure(error)), &[]);
        }
    }

    /// Serves it until it hangs up or dies.
    pub(super) fn run(self: Arc<Self>) {
        let ended =
            self.greet().and_then(|greeted| if greeted { self.listen() } else { Ok(false) });
        self.over.store(true, Ordering::Release);
        self.hands.end();
        let dead = match &ended {
            Ok(dead) => *dead,
            Err(e) => {
                tracing::warn!("process {}: {e}", self.peer.pid);
                false
            }
        };
        // Whoever reads at the other end (this may be our doing) learns that it is over.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        let seat = locked(&self.seat).take();
        if let Some(seat) = seat {
            // A process that is killed closes its files a moment before it counts as dead: until that is
            // known its attempt goes on, and ranks of the next start would join it.
            let dead = dead || (!self.host.is_ending() && self.peer.dies_within(DYING));
            seat.keeper.place.signal.notify();
            seat.hung_up(self.id, dead, &self.host.clock);
            self.host.changed.notify();
        }
    }

    /// False: it hung up, or speaks another protocol.
    fn greet(&self) -> io::Result<bool> {
        let Some((request, _)) = receive::<Request>(&self.socket, GREETING_BYTES_MAX)? else {
            return Ok(false);
        };
        let refused = |error: &Error| {
            self.answer(request.id, Answer::Failure(convert::failure(error)), &[]);
            Ok(false)
        };
        let Some(Call::Hello(hello)) = request.call else {
            return refused(&Error::invalid("a trainer greets first"));
        };
        if let Err(e) = self.know(&hello.token) {
            return refused(&e);
        }
        let (oldest, newest) = PROTOCOLS;
        let protocol = newest.min(hello.newest);
        if protocol < oldest.max(hello.oldest) {
            let older = if hello.newest < oldest { &hello.program } else { &program() };
            return refused(&Error::invalid(format!(
                "{} speaks protocol {} to {}, the agent ({}) {oldest} to {newest}: upgrade {older}",
                hello.program,
                hello.oldest,
                hello.newest,
                program(),
            )));
        }
        let welcome = Welcome { protocol, program: program() };
        Ok(self.answer(request.id, Answer::Welcome(welcome), &[]))
    }

    /// Whose trainer it is.
    ///
    /// # Errors
    /// It is of nobody who is served here.
    fn know(&self, token: &str) -> Result<()> {
        let Some(tenancy) = &self.host.settings.tenancy else {
            // From here on this thread, and those that it starts, are the trainer's in all that
            // concerns files.
            return self.host.users.act_for(&self.peer);
        };
        let tenant = tenancy.tenant(token).inspect_err(|e| {
            tracing::warn!("process {} is refused: {}", self.peer.pid, e.chain());
        })?;
        self.tenant.get_or_init(|| tenant);
        Ok(())
    }

    /// True: the process is dead.
    fn listen(self: &Arc<Self>) -> io::Result<bool> {
        let to_open = Deadline::after(&self.host.clock, GREETING);
        loop {
            if self.host.is_ending() || self.is_over() {
                return Ok(false);
            }
            // Who has no rank, and asks for none, takes the place of a trainer.
            let asks = self.seat().is_some() || !locked(&self.open).is_empty();
            if !asks && to_open.left(&self.host.clock).is_none() {
                return Ok(false);
            }
            match wait(&self.socket, &self.peer, LISTEN)? {
                Came::Death => return Ok(true),
                Came::Nothing => continue,
                Came::Bytes => {}
            }
            let Some((request, _)) = receive::<Request>(&self.socket, FRAME_BYTES_MAX)? else {
                return Ok(self.peer.is_dead().unwrap_or(false));
            };
            let (id, call) = (request.id, request.call);
            if let Some(Call::Interrupt(interrupt)) = &call {
                if let Some(interrupted) = locked(&self.open).get_mut(&interrupt.request) {
                    *interrupted = true;
                }
                if let Some(seat) = self.seat() {
                    seat.keeper.place.signal.notify();
                }
                continue;
            }
            locked(&self.open).insert(id, false);
            let connection = self.clone();
            let taken = self.hands.take(Box::new(move || connection.serve(id, call)))?;
            if !taken {
                locked(&self.open).remove(&id);
                let why = format!("more than {OPEN_MAX} questions at once");
                self.answer(id, Answer::Failure(convert::failure(&Error::invalid(why))), &[]);
            }
        }
    }

    fn serve(self: Arc<Self>, id: u64, call: Option<Call>) {
        let opens = matches!(call, Some(Call::Open(_)));
        let answered = match call {
            Some(call) => self.call(id, call),
            None => Err(Error::invalid(format!(
                "the agent ({}) does not know this question: it is older than the trainer",
                program()
            ))),
        };
        locked(&self.open).remove(&id);
        if self.host.is_ending() {
            // What fails now fails because of that: the next agent is to be asked, not the trainer told.
            self.over.store(true, Ordering::Release);
            let _ = self.socket.shutdown(std::net::Shutdown::Both);
            return;
        }
        match answered {
            Ok((answer, fds)) => self.answer(id, answer, &fds),
            Err(e) => self.answer(id, Answer::Failure(convert::failure(&e)), &[]),
        };
        // The answer first: a trainer that has none yet does not listen to news.
        if opens
            && let Some(seat) = self.seat()
            && let Err(e) = tell::begin(&self, &seat)
        {
            tracing::error!("{}", e.chain());
            self.over.store(true, Ordering::Release);
        }
    }

    /// False: the other side is gone, or does not read what it is told.
    pub(super) fn answer(&self, id: u64, answer: Answer, fds: &[OwnedFd]) -> bool {
        let reply = Reply { id, answer: Some(answer) };
        let beside: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let _one_at_a_time = locked(&self.writing);
        let sent = send(&self.socket, &reply, &beside);
        if let Err(e) = &sent {
            if e.kind() == io::ErrorKind::InvalidData {
                let why = Error::invalid(format!("the answer does not fit a message: {e}"));
                let failure = Answer::Failure(convert::failure(&why));
                return send(&self.socket, &Reply { id, answer: Some(failure) }, &[]).is_ok();
            }
            // Half a message may be out: nothing that follows could be understood.
            self.over.store(true, Ordering::Release);
            let _ = self.socket.shutdown(std::net::Shutdown::Both);
        }
        sent.is_ok()
    }

    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    pub(super) fn is_interrupted(&self, id: u64) -> bool {
        self.is_over() || self.host.is_ending() || self.is_unwanted(id)
    }

    fn is_unwanted(&self, id: u64) -> bool {
        locked(&self.open).get(&id).is_some_and(|interrupted| *interrupted)
    }

    pub(super) fn seat(&self) -> Option<Arc<Seat>> {
        locked(&self.seat).clone()
    }

    pub(super) fn sit_down(&self, seat: Arc<Seat>) {
        *locked(&self.seat) = Some(seat);
    }
}
