//! What networks, servers and dying processes do to an upload.

use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::Duration,
};

use tierkeep::{
    Error, Result,
    testing::contract::pattern,
    tier::{Payload, Source, Tier, buffer::AlignedBuf},
};

use crate::{
    open,
    proxy::{Fate, Proxy, Request},
    servers,
};

pub(crate) type Such = fn(&Request) -> bool;

pub(crate) const NAME: &str =
    "00000000000000000001/00000001-aabbccdd/rank-000000-01020304.safetensors";
/// Four parts, the last one short.
const LEN: usize = (52 << 20) + 4321;

/// Bytes that a test holds, which may break off.
pub(crate) struct Held {
    pub(crate) bytes: Vec<u8>,
    /// From this offset on nothing more is handed out.
    breaks_at: u64,
}

impl Held {
    pub(crate) fn new(seed: u64) -> Self {
        Self { bytes: pattern(LEN, seed), breaks_at: u64::MAX }
    }
}

/// Of several parts, and no process to send the last ones.
pub(crate) fn dying() -> impl Payload {
    Held { breaks_at: 40 << 20, ..Held::new(7) }
}

impl Payload for Held {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn block<'a>(
        &'a self,
        offset: u64,
        len: usize,
        scratch: &'a mut AlignedBuf,
    ) -> Result<&'a [u8]> {
        if offset >= self.breaks_at {
            return Err(Error::Fenced { why: "this process is dead".into() });
        }
        let begin = usize::try_from(offset).expect("offset");
        let there = len.min(self.bytes.len() - begin);
        scratch.ensure(len);
        scratch[..there].copy_from_slice(&self.bytes[begin..begin + there]);
        Ok(&scratch[..len])
    }

    fn crc32(&self, offset: u64, len: u64) -> Option<u32> {
        let begin = usize::try_from(offset).expect("offset");
        Some(crc32fast::hash(&self.bytes[begin..begin + usize::try_from(len).expect("len")]))
    }
}

pub(crate) fn whole(source: &dyn Source) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(source.len()).expect("len")];
    source.read_at(0, &mut bytes).expect("read");
    bytes
}

/// Uploads through a proxy that does this to requests; the upload must come out right and leave nothing.
pub(crate) fn survives(
    what: &str,
    plan: impl Fn(&Request) -> Fate + Send + Sync + 'static,
) -> Proxy {
    let proxy = Proxy::start(servers::s3_port(), plan);
    let place = servers::s3_at(proxy.port);
    let tier = open(&place);
    let held = Held::new(1);
    let receipt = tier.put(NAME, &held).unwrap_or_else(|e| panic!("{what}: {}", e.chain()));
    drop(receipt);
    let direct = open(&servers::Place { url: place.url, ..servers::s3() });
    let there = direct.open(NAME).expect("open");
    assert!(whole(&*there) == held.bytes, "{what}: other bytes");
    assert_eq!(direct.unfinished().expect("unfinished"), Some(0), "{what}: parts are left");
    proxy
}

/// Does this to the first of such requests.
pub(crate) fn first(such: Such, fate: Fate) -> impl Fn(&Request) -> Fate {
    let done = AtomicBool::new(false);
    move |request| match such(request) && !done.swap(true, Ordering::Relaxed) {
        true => fate,
        false => Fate::Passes,
    }
}

#[test]
fn an_upload_survives_what_happens_to_one_of_its_requests() {
    let kinds: [(&str, Such); 3] = [
        ("part", Request::is_part),
        ("begin", Request::is_begin),
        ("complete", Request::is_complete),
    ];
    let fates = [
        Fate::Refused(500, "InternalError"),
        Fate::Refused(503, "SlowDown"),
        Fate::Reset,
        Fate::AnswerLost,
        Fate::AnswerCut,
        Fate::Late(Duration::from_secs(1)),
    ];
    for (kind, such) in kinds {
        for fate in fates {
            survives(&format!("{fate:?} to a {kind}"), first(such, fate));
        }
    }
}

#[test]
fn a_bit_that_flips_on_the_way_to_a_bucket_is_sent_again() {
    let proxy = survives("a flipped bit", first(Request::is_part, Fate::Flipped));
    assert_eq!(proxy.count(Request::is_part), 5, "four parts, and one of them again");
}

#[test]
fn a_bucket_that_is_busy_now_and_then_gets_everything() {
    let count = AtomicUsize::new(0);
    survives("every third request", move |_| match count.fetch_add(1, Ordering::Relaxed) % 6 {
        2 => Fate::Refused(503, "SlowDown"),
        5 => Fate::AnswerLost,
        _ => Fate::Passes,
    });
}

#[test]
fn a_dead_process_upload_is_taken_up_where_it_ended() {
    let proxy = Proxy::start(servers::s3_port(), |_| Fate::Passes);
    let place = servers::s3_at(proxy.port);
    let tier = open(&place);
    let dies = Held { breaks_at: 40 << 20, ..Held::new(2) };
    tier.put(NAME, &dies).map(drop).expect_err("it broke off");
    assert!(tier.open(NAME).is_err_and(|e| e.is_not_found()), "half a payload is to be seen");
    assert_eq!(tier.unfinished().expect("unfinished"), Some(1));
    let before = proxy.count(Request::is_part);
    // Another process goes on, with the same shard.
    let held = Held::new(2);
    open(&place).put(NAME, &held).map(drop).expect("put");
    let again = proxy.count(Request::is_part) - before;
    assert!((1..=2).contains(&again), "{again} of 4 parts were sent again");
    assert_eq!(proxy.count(Request::is_begin), 1, "it began anew");
    assert!(whole(&*tier.open(NAME).expect("open")) == held.bytes);
    assert_eq!(tier.unfinished().expect("unfinished"), Some(0));
}

#[test]
fn parts_of_other_bytes_are_never_completed() {
    let place = servers::s3();
    let tier = open(&place);
    let dies = Held { breaks_at: 40 << 20, ..Held::new(3) };
    tier.put(NAME, &dies).map(drop).expect_err("it broke off");
    let held = Held::new(4);
    tier.put(NAME, &held).map(drop).expect("put");
    assert!(whole(&*tier.open(NAME).expect("open")) == held.bytes, "two payloads were mixed");
    assert_eq!(tier.unfinished().expect("unfinished"), Some(0));
}

#[test]
fn a_body_that_breaks_off_while_it_is_read_is_read_again() {
    let proxy = Proxy::start(servers::s3_port(), |request| {
        match request.method == "GET" && request.number % 2 == 1 {
            true => Fate::AnswerCut,
            false => Fate::Passes,
        }
    });
    let place = servers::s3_at(proxy.port);
    let tier = open(&place);
    let held = Held::new(5);
    tier.put(NAME, &held).map(drop).expect("put");
    let source = tier.open(NAME).expect("open");
    let mut chunk = vec![0; 4 << 20];
    for at in (0..LEN).step_by(4 << 20) {
        source.read_at(at as u64, &mut chunk).expect("read");
        let there = chunk.len().min(LEN - at);
        assert!(chunk[..there] == held.bytes[at..at + there], "at {at}");
    }
}

#[test]
fn a_server_that_is_away_is_an_error_within_a_minute_and_not_a_hang() {
    let place = servers::s3_at(1); // Nobody listens there.
    let begun = std::time::Instant::now();
    let e = open(&place).put(NAME, &Held::new(6)).map(drop).expect_err("nobody is there");
    assert_eq!(e.kind(), tierkeep::ErrorKind::Unavailable, "{}", e.chain());
    assert!(begun.elapsed() < Duration::from_secs(90), "after {:?}", begun.elapsed());
}
