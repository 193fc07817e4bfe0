//! Stores that stall, break off, are busy, or take nothing any more.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tierkeep::{
    names::Rank,
    reader::Reader,
    save::Level,
    testing::contract,
    tier::{Tier, read_record},
};

use crate::{
    cascade::{reaches, save, start, steps, until},
    common::{Places, SMALL, close, events, resume, wait},
    open,
    proxy::{Fate, Proxy, Request},
    servers::{self, Place},
    uploads::{Held, NAME, first, whole},
};

/// The same deed on the same thing, however it is signed.
fn deed(request: &Request) -> String {
    let target = request.target.split("X-Amz-").next().unwrap_or("");
    format!("{} {target} {:?}", request.method, request.part_number())
}

/// Does this to the first so many tries of each deed.
fn each(times: usize, fate: Fate) -> impl Fn(&Request) -> Fate {
    let tries = Mutex::<BTreeMap<String, usize>>::default();
    move |request| {
        let mut tries = tries.lock().expect("lock");
        let tries = tries.entry(deed(request)).or_default();
        *tries += 1;
        if *tries <= times { fate } else { Fate::Passes }
    }
}

fn is_listing(request: &Request) -> bool {
    request.method == "GET" && request.target.contains("list-type=2")
}

#[test]
fn a_part_that_stalls_is_sent_on_another_connection() {
    let stall = Fate::Late(Duration::from_secs(10));
    let proxy = Proxy::start(servers::s3_port(), first(Request::is_part, stall));
    let place = servers::s3_at(proxy.port);
    let (tier, held) = (open(&place).stalls_after(Duration::from_secs(2)), Held::new(21));
    tier.put(NAME, &held).map(drop).unwrap_or_else(|e| panic!("{}", e.chain()));
    assert!(proxy.count(Request::is_part) > 4, "it was waited for");
    assert!(whole(&*tier.open(NAME).expect("open")) == held.bytes);
}

#[test]
fn an_answer_that_stalls_is_asked_for_again() {
    let is_get: fn(&Request) -> bool = |request| request.method == "GET" && !is_listing(request);
    let stall = Fate::Late(Duration::from_secs(10));
    let (read, listing) = (first(is_get, stall), first(is_listing, stall));
    let proxy = Proxy::start(servers::s3_port(), move |request| match read(request) {
        Fate::Passes => listing(request),
        other => other,
    });
    let mut place = servers::s3_at(proxy.port);
    place.options.insert("timeout".into(), "2s".into());
    let (tier, held) = (open(&place), Held::new(22));
    tier.put(NAME, &held).map(drop).expect("put");
    assert_eq!(tier.list("").expect("list").len(), 1);
    let source = tier.open(NAME).expect("open");
    let mut chunk = vec![0; 4 << 20];
    source.read_at(4 << 20, &mut chunk).expect("read");
    assert!(chunk[..] == held.bytes[4 << 20..8 << 20]);
    assert!(proxy.count(is_get) > 1 && proxy.count(is_listing) > 1, "it was waited for");
}

#[test]
fn a_listing_and_a_record_that_break_off_are_asked_for_again_and_never_shorter() {
    let proxy = Proxy::start(servers::s3_port(), {
        let cut = each(2, Fate::AnswerCut);
        move |request| if request.method == "GET" { cut(request) } else { Fate::Passes }
    });
    let tier = open(&servers::s3_at(proxy.port));
    let names: Vec<String> = (0..40).map(|n| format!("{n:02}.json")).collect();
    for name in &names {
        tier.create(&format!("many/{name}"), name.as_bytes()).map(drop).expect("create");
    }
    let listed: Vec<String> =
        tier.list("many").expect("list").into_iter().map(|e| e.name).collect();
    assert_eq!(listed, names);
    assert_eq!(read_record(&tier, "many/07.json").expect("read"), b"07.json");
    assert!(proxy.count(is_listing) == 3, "it broke off twice");
}

#[test]
fn a_storm_of_refusals_and_resets_costs_time_alone() {
    for fate in [Fate::Refused(503, "SlowDown"), Fate::Refused(429, "TooManyRequests"), Fate::Reset]
    {
        let times = if fate == Fate::Reset { 1 } else { 3 };
        let proxy = Proxy::start(servers::s3_port(), each(times, fate));
        let (tier, held) = (open(&servers::s3_at(proxy.port)), Held::new(23));
        tier.put(NAME, &held).map(drop).unwrap_or_else(|e| panic!("{fate:?}: {}", e.chain()));
        assert!(whole(&*tier.open(NAME).expect("open")) == held.bytes, "{fate:?}");
        assert_eq!(tier.unfinished().expect("unfinished"), Some(0), "{fate:?}");
    }
}

#[test]
fn a_bucket_that_is_busy_at_each_first_request_keeps_the_contract() {
    let proxy = Proxy::start(servers::s3_port(), each(1, Fate::Refused(503, "SlowDown")));
    let place = servers::s3_at(proxy.port);
    contract::holds(&|| Box::new(open(&place)) as Box<dyn Tier>);
}

#[test]
fn a_bucket_that_takes_nothing_any_more_holds_nothing_up_is_told_once_and_catches_up() {
    let is_closed = Arc::new(AtomicBool::new(false));
    let told = is_closed.clone();
    let proxy = Proxy::start(servers::s3_port(), move |request| {
        let reads = matches!(&*request.method, "GET" | "HEAD");
        match told.load(Ordering::Relaxed) && !reads {
            true => Fate::Refused(403, "AccessDenied"),
            false => Fate::Passes,
        }
    });
    let (places, place) = (Places::new(), servers::s3_at(proxy.port));
    let ckpt = start(&places, &place);
    resume(&ckpt, &SMALL).expect("resume");
    reaches(&save(&ckpt, &SMALL, 1));
    is_closed.store(true, Ordering::Relaxed);
    let mut newest = None;
    for step in 2..=12 {
        let save = save(&ckpt, &SMALL, step);
        wait(&save, Level::Disk);
        newest = Some(save);
    }
    let waits = |text: &String| text.contains("object_away");
    let mut told = Vec::new();
    until("that it takes nothing is told", || {
        told.extend(events(&ckpt));
        told.iter().any(waits)
    });
    // What is there is read all the same.
    let reader =
        Reader::open_with(Path::new(&place.url), Some(Path::new("/nowhere")), &place.options);
    let reader = reader.expect("open");
    let info = reader.steps().expect("steps").into_iter().find(|info| info.sealed).expect("a step");
    assert!(reader.shard(&info.key, Rank(0)).expect("shard").verify().is_empty());
    let refused = |request: &Request| request.method == "PUT";
    let before = proxy.count(refused);
    until("it is tried again", || proxy.count(refused) > before);
    is_closed.store(false, Ordering::Relaxed);
    reaches(&newest.expect("a save"));
    told.extend(events(&ckpt));
    assert_eq!(told.iter().filter(|text| waits(text)).count(), 1, "{told:?}");
    assert!(told.iter().any(|text| text.contains("may not do that")), "{told:?}");
    assert!(!told.iter().any(|text| text.contains("given up")), "{told:?}");
    close(&ckpt);
    assert_eq!(steps(&Place { url: place.url, ..servers::s3() }).last(), Some(&12));
}
