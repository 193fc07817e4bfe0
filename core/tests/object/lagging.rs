//! A bucket whose listings lag behind what was written.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use tierkeep::{
    names::Rank,
    retain::Policy,
    save::Level,
    tier::{Tier, read_record},
    upkeep,
};

use crate::{
    cascade::{config, reaches, save, start, steps},
    common::{Places, SMALL, close, events, resume},
    open,
    proxy::{Fate, Proxy, Request},
    servers::{self, Place},
};

/// What a listing does not show.
#[derive(Default)]
struct Lag {
    /// So many listings do not show what was just written.
    fresh: usize,
    /// Keys that came by, and how many listings more do not show them.
    keys: Mutex<BTreeMap<String, usize>>,
    /// Keys that have all of these words in them are shown by none.
    never: Mutex<Vec<&'static str>>,
}

impl Lag {
    fn saw(&self, request: &Request) {
        let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
        let Some(key) = path.strip_prefix("/bucket/") else { return };
        let appears = match &*request.method {
            "PUT" => !query.contains("partNumber="),
            "POST" => request.is_complete(),
            _ => false,
        };
        if appears {
            self.keys.lock().expect("lock").entry(key.into()).or_insert(self.fresh);
        }
    }

    fn hides(&self, key: &str) -> bool {
        let never = self.never.lock().expect("lock");
        let lags = self.keys.lock().expect("lock").get(key).is_some_and(|left| *left > 0);
        lags || (!never.is_empty() && never.iter().all(|word| key.contains(word)))
    }

    fn hides_all_below(&self, prefix: &str) -> bool {
        let keys: Vec<String> = self.keys.lock().expect("lock").keys().cloned().collect();
        let mut below = keys.iter().filter(|key| key.starts_with(prefix)).peekable();
        below.peek().is_some() && below.all(|key| self.hides(key))
    }

    /// The listing without what it is not to show yet.
    fn change(&self, request: &Request, answer: Vec<u8>) -> Vec<u8> {
        if request.method != "GET" || !request.target.contains("list-type=2") {
            return answer;
        }
        let text = plain(&answer);
        let text = without(&text, "Contents", "Key", |key| self.hides(key));
        let text = without(&text, "CommonPrefixes", "Prefix", |key| self.hides_all_below(key));
        let asked = request.target.split('&').find_map(|part| part.split_once("prefix="));
        let asked = asked.map_or(String::new(), |(_, prefix)| prefix.replace("%2F", "/"));
        for (key, left) in &mut *self.keys.lock().expect("lock") {
            if key.starts_with(&asked) {
                *left = left.saturating_sub(1);
            }
        }
        format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}",
            text.len()
        )
        .into_bytes()
    }
}

/// An answer's body, whichever way it was sent.
fn plain(answer: &[u8]) -> String {
    let text = String::from_utf8(answer.to_vec()).expect("text");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    if !head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        return body.into();
    }
    let (mut rest, mut whole) = (body, String::new());
    while let Some((length, more)) = rest.split_once("\r\n") {
        let length = usize::from_str_radix(length.trim(), 16).expect("a length");
        if length == 0 {
            break;
        }
        whole += &more[..length];
        rest = more[length..].trim_start_matches("\r\n");
    }
    whole
}

/// Without each `element` whose `name` is hidden.
fn without(text: &str, element: &str, name: &str, hidden: impl Fn(&str) -> bool) -> String {
    let (open, close) = (format!("<{element}>"), format!("</{element}>"));
    let mut parts = text.split(&*open);
    let mut kept = parts.next().unwrap_or("").to_owned();
    for part in parts {
        let (inner, rest) = part.split_once(&*close).expect("it is closed");
        let (begin, end) = (format!("<{name}>"), format!("</{name}>"));
        let key =
            inner.split_once(&*begin).and_then(|(_, r)| r.split_once(&*end)).expect("a name").0;
        if !hidden(key) {
            kept += &format!("{open}{inner}{close}");
        }
        kept += rest;
    }
    kept
}

fn lagging(fresh: usize) -> (Arc<Lag>, Proxy) {
    let lag = Arc::new(Lag { fresh, ..Lag::default() });
    let (seeing, changing) = (lag.clone(), lag.clone());
    let plan = move |request: &mut Request| {
        seeing.saw(request);
        Fate::Passes
    };
    let change = move |request: &Request, answer| changing.change(request, answer);
    (lag, Proxy::changing(servers::s3_port(), plan, change))
}

#[test]
fn a_listing_that_lags_delays_a_seal_and_loses_nothing() {
    let (lag, proxy) = lagging(4);
    let (places, place) = (Places::new(), servers::s3_at(proxy.port));
    let ckpt = start(&places, &place);
    resume(&ckpt, &SMALL).expect("resume");
    for step in 1..=5 {
        reaches(&save(&ckpt, &SMALL, step));
    }
    let told = events(&ckpt);
    assert!(!told.iter().any(|text| text.contains("given up")), "{told:?}");
    close(&ckpt);
    assert!(lag.keys.lock().expect("lock").len() > 5 * 3, "nothing came by");
    let there = steps(&Place { url: place.url, ..servers::s3() });
    assert!(there.ends_with(&[3, 4, 5]), "{there:?}");
}

#[test]
fn retention_does_not_take_a_seal_that_is_not_listed_yet_for_none() {
    let (lag, proxy) = lagging(0);
    let (places, place) = (Places::new(), servers::s3_at(proxy.port));
    lag.never.lock().expect("lock").extend(["00000000000000000002/", "CHECKPOINT.json"]);
    let ckpt = start(&places, &place);
    resume(&ckpt, &SMALL).expect("resume");
    for step in 1..=4 {
        reaches(&save(&ckpt, &SMALL, step));
    }
    close(&ckpt);
    let direct = Place { url: place.url.clone(), ..servers::s3() };
    assert_eq!(steps(&direct), [2, 3, 4]);
    // On demand neither.
    let reader = tierkeep::reader::Reader::open_with(
        std::path::Path::new(&place.url),
        Some(std::path::Path::new("/nowhere")),
        &place.options,
    );
    let policy =
        Policy { keep_last: 3, every: 1, keep_every: None, keep_hours: None, abandoned: false };
    let plan = upkeep::plan(&reader.expect("open"), &policy).expect("plan");
    assert!(plan.victims.is_empty(), "{plan:?}");
}

#[test]
fn a_shard_that_is_sealed_and_not_listed_yet_is_resumed_from_and_not_marked_as_lost() {
    let (lag, proxy) = lagging(0);
    let (places, place) = (Places::new(), servers::s3_at(proxy.port));
    let ckpt = start(&places, &place);
    resume(&ckpt, &SMALL).expect("resume");
    for step in 1..=3 {
        reaches(&save(&ckpt, &SMALL, step));
    }
    close(&ckpt);
    lag.never.lock().expect("lock").extend(["00000000000000000003/", "rank-000000.json"]);
    let elsewhere = Places::new();
    let ckpt = start(&elsewhere, &place);
    assert_eq!(resume(&ckpt, &SMALL).expect("resume"), 3, "{:?}", events(&ckpt));
    close(&ckpt);
    let direct = open(&Place { url: place.url, ..servers::s3() });
    assert!(direct.list("bad").expect("list").is_empty());
    let key = direct.list("00000000000000000003").expect("list").pop().expect("an attempt").name;
    let name = format!("00000000000000000003/{key}/{}", tierkeep::names::manifest_name(Rank(0)));
    assert!(!read_record(&direct, &name).expect("it is there").is_empty());
}

#[test]
fn an_attempt_that_is_not_listed_yet_fences_the_one_before() {
    let (lag, proxy) = lagging(0);
    let place = servers::s3_at(proxy.port);
    let (old, new) = (Places::new(), Places::new());
    let late = start(&old, &place);
    resume(&late, &SMALL).expect("resume");
    reaches(&save(&late, &SMALL, 1));
    let ckpt = tierkeep::checkpointer::Checkpointer::open(config(&new, &place)).expect("open");
    assert_eq!(resume(&ckpt, &SMALL).expect("resume"), 1);
    lag.never.lock().expect("lock").extend(["attempts/00000002"]);
    let late_save = save(&late, &SMALL, 5);
    let e = late_save.poll(Level::Object, false, std::time::Duration::from_secs(300));
    let e = e.map(drop).expect_err("it was superseded");
    assert!(e.chain().contains("attempt 2"), "{}", e.chain());
    close(&late);
    close(&ckpt);
}
