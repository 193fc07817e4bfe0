//! A client that lies: about lengths, names and slots, in every order. The agent goes on, and whoever
//! is honest is served.

use std::{
    io::Write,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt, net::UnixStream},
    },
    path::Path,
    time::Duration,
};

use prost::Message;
use tierkeep::{checkpointer::Checkpointer, passing};
use tierkeep_proto::trainer::{
    Abandon, Begin, Close, Failure, Hello, Lease, List, Mend, Open, Prepare, Publish, Read, Reply,
    Request, Slots, failure::Kind, reply::Answer, request::Call,
};

use crate::{
    common::{Places, SMALL, close, files, resume, settings, train},
    world::{Hosted, far, until},
};

struct Client {
    socket: UnixStream,
    id: u64,
}

impl Client {
    fn new(ram: &Path) -> Self {
        let socket = UnixStream::connect(ram.join("agent.sock")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { socket, id: 0 }
    }

    fn send(&mut self, call: Option<Call>) {
        self.id += 1;
        let request = Request { id: self.id, call }.encode_to_vec();
        let len = u32::try_from(request.len()).unwrap().to_le_bytes();
        // The agent may have hung up: that is for the answer to say.
        let _ = self.socket.write_all(&[&len, &request[..]].concat());
    }

    /// `None`: the agent hung up.
    fn hear(&mut self) -> Option<(Answer, Vec<OwnedFd>)> {
        loop {
            let (mut fds, mut head) = (Vec::new(), [0; 4]);
            self.fill(&mut head, &mut fds)?;
            let mut body = vec![0; u32::from_le_bytes(head) as usize];
            self.fill(&mut body, &mut fds)?;
            let reply = Reply::decode(&body[..]).unwrap();
            if reply.id == self.id {
                return reply.answer.map(|answer| (answer, fds));
            }
        }
    }

    fn fill(&self, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> Option<()> {
        let mut have = 0;
        while have < into.len() {
            let (n, came) = passing::receive(&self.socket, &mut into[have..]).ok()?;
            fds.extend(came);
            have += n;
            if n == 0 {
                return None;
            }
        }
        Some(())
    }

    fn ask(&mut self, call: Call) -> Option<(Answer, Vec<OwnedFd>)> {
        self.send(Some(call));
        self.hear()
    }

    fn refused(&mut self, call: Call) -> Failure {
        match self.ask(call) {
            Some((Answer::Failure(failure), _)) => failure,
            other => panic!("{other:?}"),
        }
    }

    fn greet(&mut self) {
        let hello = Hello { oldest: 1, newest: 1, program: "a liar".into(), ..Hello::default() };
        assert!(matches!(self.ask(Call::Hello(hello)), Some((Answer::Welcome(_), _))));
    }

    fn open(&mut self, destination: &Path) -> Option<Answer> {
        self.ask(Call::Open(open(destination))).map(|(answer, _)| answer)
    }
}

fn open(destination: &Path) -> Open {
    Open {
        destination: destination.as_os_str().as_bytes().to_vec(),
        world: 1,
        savers: vec![0],
        start: vec![1; 16],
        nonce: vec![2; 16],
        slots: 2,
        disk_every: 1,
        keep_last: 2,
        lock_wait_ms: 1000,
        attempt_wait_ms: 1000,
        slot_wait_ms: 300,
        disk_wait_ms: 10_000,
        stragglers_wait_ms: 1000,
        ..Open::default()
    }
}

fn lease(step: u64) -> Call {
    Call::Lease(Lease { step, bytes: 5000, skip_if_busy: false })
}

fn publish(slot: u64, step: u64) -> Publish {
    Publish { slot, step, bytes: 5000, chunks: vec![7], manifest: b"{}".to_vec(), words: None }
}

/// An honest trainer is served by the agent at `places`.
fn is_well(places: &Places) {
    let honest = places.destination().with_file_name("honest");
    let ckpt = Checkpointer::open(far(&honest, places.ram(), 0, 1)).unwrap();
    let from = resume(&ckpt, &SMALL).unwrap();
    train(&ckpt, &SMALL, from + 1..=from + 2);
    close(&ckpt);
}

#[test]
fn what_is_no_message_ends_that_connection_alone() {
    let places = Places::new();
    let _hosted = Hosted::new(settings(places.ram()));
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[255; 64], &[0; 4], &[3, 0, 0, 0, 255, 255, 255]]
    {
        let mut client = Client::new(places.ram());
        client.socket.write_all(bytes).unwrap();
        client.id = u64::MAX;
        let _ = client.socket.shutdown(std::net::Shutdown::Write);
        assert!(client.hear().is_none(), "{bytes:?}");
    }
    is_well(&places);
}

#[test]
fn another_protocol_and_an_unknown_question_are_answered_with_a_sentence() {
    let places = Places::new();
    let _hosted = Hosted::new(settings(places.ram()));
    let refusal = |oldest, newest| {
        let hello = Hello { oldest, newest, program: "tierkeep 9.0".into(), ..Hello::default() };
        let failure = Client::new(places.ram()).refused(Call::Hello(hello));
        assert_eq!(failure.kind(), Kind::Invalid);
        failure.message
    };
    let newer = refusal(7, 9);
    assert!(newer.starts_with("tierkeep 9.0 speaks protocol 7 to 9, the agent"), "{newer}");
    assert!(newer.contains("upgrade tierkeep 0.1"), "{newer}");
    assert!(refusal(0, 0).ends_with("upgrade tierkeep 9.0"));
    let mut client = Client::new(places.ram());
    client.greet();
    client.send(None);
    let Some((Answer::Failure(failure), _)) = client.hear() else { panic!("no answer") };
    assert!(failure.message.contains("does not know this question"), "{}", failure.message);
    let first = Client::new(places.ram()).refused(Call::Slots(Slots {})).message;
    assert_eq!(first, "a trainer greets first");
    let unknown = client.refused(Call::Slots(Slots {})).message;
    assert_eq!(unknown, "no rank is opened");
}

#[test]
fn settings_that_cannot_be_are_refused_by_name() {
    let places = Places::new();
    let _hosted = Hosted::new(settings(places.ram()));
    let mut client = Client::new(places.ram());
    client.greet();
    let destination = places.destination();
    let good = || open(&destination);
    let relative = b"here/run".to_vec();
    for (wrong, word) in [
        (Open { slots: 1, ..good() }, "slots = 1"),
        (Open { slots: 100_000, ..good() }, "slots = 100000"),
        (Open { rank: 9, ..good() }, "rank = 9"),
        (Open { savers: vec![3, 1], ..good() }, "savers"),
        (Open { nonce: vec![1], ..good() }, "16 bytes"),
        (Open { destination: relative, ..good() }, "absolute"),
        (Open { destination: b"/x/..".to_vec(), ..good() }, "run name"),
        (Open { disk_every: 0, ..good() }, "disk_every"),
        (Open { keep_last: 0, ..good() }, "keep_last"),
    ] {
        let failure = client.refused(Call::Open(wrong));
        assert_eq!(failure.kind(), Kind::Invalid, "{}", failure.message);
        assert!(failure.message.contains(word), "{word}: {}", failure.message);
    }
    assert!(matches!(client.open(&destination), Some(Answer::Opened(_))));
}

#[test]
fn slots_lengths_and_names_that_lie_are_refused() {
    let places = Places::new();
    let _hosted = Hosted::new(settings(places.ram()));
    let mut client = Client::new(places.ram());
    client.greet();
    assert!(matches!(client.open(&places.destination()), Some(Answer::Opened(_))));
    assert_eq!(client.refused(lease(1)).message, "no attempt has begun");
    assert!(matches!(client.ask(Call::Begin(Begin::default())), Some((Answer::Begun(_), _))));
    let Some((Answer::Leased(leased), fds)) = client.ask(lease(1)) else { panic!("no slot") };
    assert_eq!(fds.len(), 1);
    let slot = leased.slot;
    let mut says = |call: Publish| client.refused(Call::Publish(call)).message;
    assert!(says(publish(slot + 1, 1)).contains("is not being filled"));
    assert!(says(publish(slot, 2)).contains("is not being filled"));
    let lies = Publish { bytes: u64::MAX, ..publish(slot, 1) };
    assert!(says(lies).contains("bytes and 1 checksums for a slot of"));
    for (name, kind) in [
        ("../../etc/passwd", Kind::Invalid),
        ("/etc/passwd", Kind::Invalid),
        ("a\0b", Kind::Invalid),
        ("nothing", Kind::NotFound),
    ] {
        let read = Read { tier: 1, name: name.into() };
        assert_eq!(client.refused(Call::Read(read)).kind(), kind, "{name}");
    }
    assert_eq!(
        client.refused(Call::Read(Read { tier: 9, name: "x".into() })).kind(),
        Kind::Invalid
    );
    let dir = List { tier: 2, dir: "../..".into() };
    assert_eq!(client.refused(Call::List(dir)).kind(), Kind::Invalid);
    let huge = Prepare { bytes: u64::MAX / 2 };
    assert!(client.refused(Call::Prepare(huge)).message.contains("memory budget is too small"));
    let huge = Lease { step: 2, bytes: u64::MAX / 2, skip_if_busy: false };
    assert!(client.refused(Call::Lease(huge)).message.contains("memory budget is too small"));
    let mend = Mend { rank: 7, ..Mend::default() };
    assert_eq!(client.refused(Call::Mend(mend)).kind(), Kind::Invalid);
    is_well(&places);
}

#[test]
fn a_slot_that_its_trainer_cuts_short_costs_that_step_and_not_the_agent() {
    let places = Places::new();
    let hosted = Hosted::new(settings(places.ram()));
    let mut client = Client::new(places.ram());
    client.greet();
    client.open(&places.destination());
    client.ask(Call::Begin(Begin::default()));
    // Before it is published.
    let Some((Answer::Leased(leased), fds)) = client.ask(lease(1)) else { panic!("no slot") };
    let file = std::fs::File::from(fds.into_iter().next().unwrap());
    file.set_len(100).unwrap();
    let failure = client.refused(Call::Publish(publish(leased.slot, 1)));
    assert!(failure.message.contains("its length was changed"), "{}", failure.message);
    // After it, while the agent carries it to disk: the checksum is wrong anyway, the length soon.
    for step in 2..6 {
        let Some((Answer::Leased(leased), fds)) = client.ask(lease(step)) else {
            panic!("no slot")
        };
        let answer = client.ask(Call::Publish(publish(leased.slot, step)));
        assert!(matches!(answer, Some((Answer::Published(_), _))), "{answer:?}");
        if let Some(fd) = fds.into_iter().next() {
            std::fs::File::from(fd).set_len(0).unwrap();
        }
    }
    until("the agent has given the lies up", || {
        hosted
            .host
            .ranks()
            .iter()
            .all(|rank| rank.destination != places.destination() || !rank.busy)
    });
    let sealed = files(&places.destination()).iter().any(|f| f.ends_with("CHECKPOINT.json"));
    assert!(!sealed, "a lie was sealed on disk");
    is_well(&places);
}

#[test]
fn a_client_may_hang_up_anywhere() {
    let places = Places::new();
    let hosted = Hosted::new(settings(places.ram()));
    let destination = places.destination();
    for stop_after in 0..9 {
        let mut client = Client::new(places.ram());
        let mut slot = 0;
        for point in 0..stop_after {
            match point {
                0 => client.greet(),
                1 => drop(client.open(&destination)),
                2 => drop(client.ask(Call::Begin(Begin::default()))),
                3 => drop(client.ask(Call::Prepare(Prepare { bytes: 5000 }))),
                4 => drop(client.ask(Call::Slots(Slots {}))),
                5 => match client.ask(lease(stop_after)) {
                    Some((Answer::Leased(leased), _)) => slot = leased.slot,
                    other => panic!("{other:?}"),
                },
                6 => drop(client.ask(Call::Publish(publish(slot, stop_after)))),
                7 => drop(client.ask(Call::Abandon(Abandon { slot: 12345 }))),
                _ => drop(client.ask(Call::Close(Close { clean: true }))),
            }
        }
        // In the middle of a question, too.
        client.send(Some(lease(100 + stop_after)));
    }
    is_well(&places);
    // The one after has the rank: it is the same process.
    let mut client = Client::new(places.ram());
    client.greet();
    assert!(matches!(client.open(&destination), Some(Answer::Opened(_))));
    drop(client);
    drop(hosted);
}

#[test]
fn who_asks_too_much_at_once_is_told() {
    let places = Places::new();
    let _hosted = Hosted::new(settings(places.ram()));
    let mut client = Client::new(places.ram());
    client.greet();
    client.open(&places.destination());
    client.ask(Call::Begin(Begin::default()));
    // Two slots are had, the others are waited for: more and more questions are open.
    for step in 1..=40 {
        client.send(Some(lease(step)));
    }
    let mut told = 0;
    client.socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    loop {
        let (mut fds, mut head) = (Vec::new(), [0; 4]);
        if client.fill(&mut head, &mut fds).is_none() {
            break;
        }
        let mut body = vec![0; u32::from_le_bytes(head) as usize];
        client.fill(&mut body, &mut fds).unwrap();
        if let Some(Answer::Failure(failure)) = Reply::decode(&body[..]).unwrap().answer {
            told += usize::from(failure.message.contains("questions at once"));
        }
    }
    assert!(told > 10, "{told}");
    is_well(&places);
}

#[test]
fn who_greets_and_asks_for_no_rank_is_let_go() {
    let places = Places::new();
    let _hosted = Hosted::new(settings(places.ram()));
    let mut client = Client::new(places.ram());
    client.greet();
    client.socket.set_read_timeout(Some(crate::world::PATIENCE)).unwrap();
    assert!(client.fill(&mut [0; 4], &mut Vec::new()).is_none(), "it is told something");
    let closed = std::io::Read::read(&mut &client.socket, &mut [0]).unwrap();
    assert_eq!(closed, 0);
}
