//! Stores that do not decide which of two writers was first.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tierkeep::{
    save::Level,
    testing::contract,
    tier::{Created, Tier, read_record},
};

use crate::{
    cascade::{reaches, save, start, steps},
    common::{Places, SMALL, close, resume},
    open,
    proxy::{Fate, Proxy, Request},
    servers::{self, Place},
};

/// A server that takes a condition for a remark: what has it comes without, and unsigned, since the condition
/// was signed as well.
fn ignoring() -> Proxy {
    Proxy::rewriting(servers::s3_port(), |request| {
        if request.is_conditional() {
            request.strip(&["if-none-match:", "authorization:"]);
        }
        Fate::Passes
    })
}

/// One that says that it has never heard of it.
fn refusing() -> Proxy {
    Proxy::start(servers::s3_port(), |request| match request.is_conditional() {
        true => Fate::Refused(501, "NotImplemented"),
        false => Fate::Passes,
    })
}

#[test]
fn a_store_that_ignores_conditions_is_found_out_and_the_writers_look() {
    let proxy = ignoring();
    let place = servers::s3_at(proxy.port);
    let tier = open(&place);
    tier.check().expect("it is there");
    assert!(!tier.decides_who_was_first().expect("an answer"));
    let probes = proxy.count(Request::is_conditional);
    assert_eq!(probes, 2, "asked once, by two of one name");
    let left = tier.list("_probe").expect("list");
    assert!(left.is_empty(), "probes are left: {left:?}");
    contract::holds(&|| Box::new(open(&place)) as Box<dyn Tier>);
}

#[test]
fn a_store_that_refuses_conditions_is_found_out_and_the_writers_look() {
    let proxy = refusing();
    let place = servers::s3_at(proxy.port);
    assert!(!open(&place).decides_who_was_first().expect("an answer"));
    contract::holds(&|| Box::new(open(&place)) as Box<dyn Tier>);
}

#[test]
fn a_store_that_is_said_not_to_know_conditions_is_asked_for_none() {
    let proxy = Proxy::start(servers::s3_port(), |_| Fate::Passes);
    let mut place = servers::s3_at(proxy.port);
    assert!(open(&place).decides_who_was_first().expect("an answer"));
    let asked = proxy.count(Request::is_conditional);
    place.options.insert("aws_conditional_put".into(), "disabled".into());
    let tier = open(&place);
    assert_eq!(tier.create("a/x.json", b"x").expect("create"), Created::New);
    assert_eq!(tier.create("a/x.json", b"y").expect("create"), Created::Exists);
    assert_eq!(read_record(&tier, "a/x.json").expect("read"), b"x");
    assert_eq!(proxy.count(Request::is_conditional), asked);
}

#[test]
fn a_store_that_is_away_while_it_is_asked_is_asked_again_and_not_taken_for_one_that_cannot() {
    let away = Arc::new(AtomicBool::new(true));
    let told = away.clone();
    let proxy = Proxy::start(servers::s3_port(), move |request| {
        match request.is_conditional() && told.swap(false, Ordering::Relaxed) {
            true => Fate::Refused(503, "SlowDown"),
            false => Fate::Passes,
        }
    });
    let tier = open(&servers::s3_at(proxy.port));
    assert!(tier.decides_who_was_first().expect("an answer"));
    // Whoever may only read is not asked.
    let proxy = Proxy::start(servers::s3_port(), |request| match &*request.method {
        "GET" | "HEAD" => Fate::Passes,
        _ => Fate::Refused(403, "AccessDenied"),
    });
    open(&servers::s3_at(proxy.port)).check().expect("it may be read");
}

#[test]
fn a_job_trains_behind_a_store_without_conditions_and_another_goes_on_from_there() {
    let proxy = ignoring();
    let place = servers::s3_at(proxy.port);
    let (first, second) = (Places::new(), Places::new());
    let ckpt = start(&first, &place);
    resume(&ckpt, &SMALL).expect("resume");
    for step in 1..=2 {
        reaches(&save(&ckpt, &SMALL, step));
    }
    close(&ckpt);
    let ckpt = start(&second, &place);
    assert_eq!(resume(&ckpt, &SMALL).expect("resume"), 2);
    reaches(&save(&ckpt, &SMALL, 3));
    close(&ckpt);
    assert_eq!(steps(&Place { url: place.url, ..servers::s3() }), [1, 2, 3]);
}

#[test]
fn of_two_starts_that_took_one_attempt_the_one_whose_record_went_seals_nothing() {
    let (places, place, other) = (Places::new(), servers::s3(), servers::s3());
    let ckpt = start(&places, &place);
    resume(&ckpt, &SMALL).expect("resume");
    reaches(&save(&ckpt, &SMALL, 1));
    // What a store without conditions can do: the other's record, written late over this one's.
    let elsewhere = Places::new();
    let rival = start(&elsewhere, &other);
    resume(&rival, &SMALL).expect("resume");
    close(&rival);
    let (tier, name) = (open(&place), "attempts/00000001.json");
    let record = read_record(&open(&other), name).expect("read");
    tier.delete(name).expect("delete");
    assert_eq!(tier.create(name, &record).expect("create"), Created::New);
    let late = save(&ckpt, &SMALL, 2);
    let e = late.poll(Level::Object, false, std::time::Duration::from_secs(300));
    let e = e.map(drop).expect_err("its number is another's");
    assert!(e.chain().contains("another start of this run"), "{}", e.chain());
    assert!(!steps(&place).contains(&2));
    close(&ckpt);
}
