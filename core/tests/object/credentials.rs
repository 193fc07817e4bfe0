//! Where the keys of a bucket come from, and what happens when they end.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use tempfile::TempDir;
use tierkeep::{
    ErrorKind,
    tier::{
        Created, Tier, create_same,
        object::{ObjectTier, address::Options},
        read_record,
    },
};

use crate::{
    open,
    proxy::{Fate, Proxy, Request},
    servers::{self, KEY, NEXT_KEY, Place},
    uploads::{Held, NAME, first, survives, whole},
};

/// The files of a person who works with AWS's tools.
#[derive(Clone)]
struct Home(Arc<TempDir>);

impl Home {
    fn new() -> Self {
        Self(Arc::new(tempfile::tempdir().expect("tempdir")))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// As tools replace files: at once.
    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path("new"), text).expect("write");
        std::fs::rename(self.path("new"), self.path(name)).expect("rename");
    }

    fn keys(&self, (id, secret): (&str, &str)) {
        let text = format!("[job]\naws_access_key_id = {id}\naws_secret_access_key = {secret}\n");
        self.write("credentials", &text);
    }

    /// A place that these files alone have the keys of, behind something at `port`.
    fn place(&self, port: u16) -> Place {
        let mut place = servers::s3_at(port);
        place.options.retain(|name, _| name == "aws_endpoint" || name == "aws_region");
        for (option, name) in
            [("aws_config_file", "config"), ("aws_shared_credentials_file", "credentials")]
        {
            if !self.path(name).exists() {
                self.write(name, "");
            }
            place.options.insert(option.into(), self.path(name).display().to_string());
        }
        place.options.insert("aws_profile".into(), "job".into());
        place
    }

    /// Makes `job` a profile whose keys a command says: what the file `said` has.
    fn by_process(&self) {
        let script = "echo run >> \"$1/runs\"; cat \"$1/said\"";
        self.write("keys of the job.sh", script);
        let (file, dir) = (self.path("keys of the job.sh"), self.0.path().display().to_string());
        let line = format!("credential_process = sh '{}' \"{dir}\"", file.display());
        self.write("config", &format!("[profile job]\n{line}\n"));
    }

    fn say(&self, key: (&str, &str)) {
        self.write("said", &said(key));
    }
}

fn said((id, secret): (&str, &str)) -> String {
    format!(
        r#"{{"Version": 1, "AccessKeyId": "{id}", "SecretAccessKey": "{secret}",
            "Expiration": "2999-01-01T00:00:00+00:00"}}"#
    )
}

/// The keys of one kind end as soon as `at` parts have passed, and `then` happens at that moment. The parts
/// that passed.
fn ending(
    key: &'static str,
    at: usize,
    then: impl Fn() + Send + Sync + 'static,
) -> (Proxy, Arc<Mutex<Vec<u32>>>) {
    let passed = Arc::<Mutex<Vec<u32>>>::default();
    let (list, ended) = (passed.clone(), AtomicBool::new(false));
    let proxy = Proxy::start(servers::s3_port(), move |request| {
        let mut passed = list.lock().expect("lock");
        if request.is_part() && passed.len() == at && !ended.swap(true, Ordering::Relaxed) {
            then();
        }
        if ended.load(Ordering::Relaxed) && request.is_signed_by(key) {
            return Fate::Refused(400, "ExpiredToken");
        }
        passed.extend(request.part_number());
        Fate::Passes
    });
    (proxy, passed)
}

fn sorted(passed: &Mutex<Vec<u32>>) -> Vec<u32> {
    let mut passed = passed.lock().expect("lock").clone();
    passed.sort_unstable();
    passed
}

#[test]
fn an_agents_own_keys_are_read_as_the_agent_whomever_its_thread_serves() {
    const NOBODY: u32 = 65534;
    if !rustix::process::geteuid().is_root() {
        println!("not root: there is no other user to act for");
        return;
    }
    let home = Home::new();
    home.keys(KEY);
    let mine = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(home.path("credentials"), mine).expect("chmod");
    let place = home.place(servers::s3_port());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: it takes a number, and changes this thread alone.
            unsafe { libc::setfsuid(NOBODY) };
            assert!(std::fs::read(home.path("credentials")).is_err(), "it is another user's");
            let tier = open(&place);
            assert_eq!(tier.create("a record", b"bytes").expect("create"), Created::New);
            assert_eq!(read_record(&tier, "a record").expect("read"), b"bytes");
            assert!(std::fs::read(home.path("credentials")).is_err(), "it stays that");
        });
    });
}

#[test]
fn keys_and_region_and_endpoint_come_from_a_profile() {
    let home = Home::new();
    home.keys(KEY);
    let mut place = home.place(servers::s3_port());
    let endpoint = place.options.remove("aws_endpoint").expect("endpoint");
    let region = place.options.remove("aws_region").expect("region");
    home.write("config", &format!("[profile job]\nregion={region}\nendpoint_url={endpoint}\n"));
    let tier = open(&place);
    assert_eq!(tier.create("a/x.json", b"x").expect("create"), Created::New);
    tier.put(NAME, &Held::new(1)).map(drop).expect("put");
    // Keys that are given are before those of a profile, and both together are a mistake.
    place.options.insert("aws_access_key_id".into(), KEY.0.into());
    let e = ObjectTier::open(&place.url.parse().expect("address"), &place.options);
    let e = e.map(drop).expect_err("both");
    assert!(e.chain().contains("aws_profile and aws_access_key_id"), "{}", e.chain());
    place.options.remove("aws_access_key_id");
    place.options.insert("aws_profile".into(), "nobody".into());
    let e = ObjectTier::open(&place.url.parse().expect("address"), &place.options);
    let e = e.map(drop).expect_err("no such profile");
    assert!(e.kind() == ErrorKind::Invalid && e.chain().contains("\"nobody\""), "{}", e.chain());
}

#[test]
fn credentials_that_end_in_the_middle_of_an_upload_are_read_again_and_no_part_is_sent_twice() {
    let home = Home::new();
    home.keys(KEY);
    let files = home.clone();
    let (proxy, passed) = ending(KEY.0, 2, move || files.keys(NEXT_KEY));
    let place = home.place(proxy.port);
    let (tier, held) = (open(&place), Held::new(11));
    tier.put(NAME, &held).map(drop).unwrap_or_else(|e| panic!("{}", e.chain()));
    assert_eq!(sorted(&passed), [1, 2, 3, 4]);
    assert!(proxy.count(|r| r.is_part() && r.is_signed_by(KEY.0)) > 2, "none was refused");
    assert_eq!(proxy.count(Request::is_begin), 1);
    let direct = open(&Place { url: place.url, ..servers::s3() });
    assert!(whole(&*direct.open(NAME).expect("open")) == held.bytes);
    assert_eq!(direct.unfinished().expect("unfinished"), Some(0));
}

#[test]
fn credentials_that_end_between_small_requests_are_read_again() {
    let home = Home::new();
    home.keys(KEY);
    let turn = Arc::new(AtomicUsize::new(0));
    let now = turn.clone();
    let proxy = Proxy::start(servers::s3_port(), move |request| {
        let good = if now.load(Ordering::Relaxed).is_multiple_of(2) { KEY } else { NEXT_KEY };
        match request.is_signed_by(good.0) {
            true => Fate::Passes,
            false => Fate::Refused(403, "InvalidAccessKeyId"),
        }
    });
    let tier = open(&home.place(proxy.port));
    let rotate = || {
        let turn = turn.fetch_add(1, Ordering::Relaxed) + 1;
        home.keys(if turn.is_multiple_of(2) { KEY } else { NEXT_KEY });
    };
    tier.create("a/x.json", b"x").map(drop).expect("create");
    rotate();
    assert!(!create_same(&tier, "a/x.json", b"y").expect("create"), "it is there");
    rotate();
    assert_eq!(read_record(&tier, "a/x.json").expect("read"), b"x");
    rotate();
    assert_eq!(tier.list("a").expect("list").len(), 1);
    tier.put("a/large", &Held::new(12)).map(drop).expect("put");
    rotate();
    let large = tier.open("a/large").expect("open");
    rotate();
    assert!(whole(&*large) == Held::new(12).bytes);
    rotate();
    tier.delete("a/x.json").expect("delete");
    rotate();
    assert_eq!(tier.unfinished().expect("unfinished"), Some(0));
}

#[test]
fn a_command_that_says_credentials_is_run_again_when_they_end_and_once_for_all_requests() {
    let home = Home::new();
    home.by_process();
    home.say(KEY);
    let files = home.clone();
    let (proxy, passed) = ending(KEY.0, 1, move || files.say(NEXT_KEY));
    let place = home.place(proxy.port);
    open(&place).put(NAME, &Held::new(13)).map(drop).unwrap_or_else(|e| panic!("{}", e.chain()));
    assert_eq!(sorted(&passed), [1, 2, 3, 4]);
    let runs = std::fs::read_to_string(home.path("runs")).expect("read");
    assert_eq!(runs.lines().count(), 2, "once at the start, once when they had ended");
    home.write("said", "{\"Version\": 1, \"AccessKeyId\": \"hush");
    let e = open(&place).list("").expect_err("it says nothing good");
    assert!(e.chain().contains("credential_process of profile \"job\""), "{}", e.chain());
    assert!(!e.chain().contains("hush"), "{}", e.chain());
}

#[test]
fn credentials_of_a_machines_identity_service_are_asked_for_again_when_they_end() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let port = listener.local_addr().expect("address").port();
    let current = Arc::new(Mutex::new(KEY));
    let answered = current.clone();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let lines = BufReader::new(client.try_clone().expect("clone")).lines();
            let _head: Vec<_> = lines.map_while(Result::ok).take_while(|l| !l.is_empty()).collect();
            let (id, secret) = *answered.lock().expect("lock");
            // The token is empty where there is none: the server knows no sessions.
            let body = format!(
                r#"{{"AccessKeyId":"{id}","SecretAccessKey":"{secret}","Token":"",
                    "Expiration":"2999-01-01T00:00:00Z"}}"#
            );
            let head = format!("Content-Length: {}\r\nConnection: close", body.len());
            write!(&client, "HTTP/1.1 200 OK\r\n{head}\r\n\r\n{body}").ok();
        }
    });
    let (proxy, passed) = ending(KEY.0, 3, move || *current.lock().expect("lock") = NEXT_KEY);
    let home = Home::new();
    home.write("token", "who I am");
    let mut place = home.place(proxy.port);
    place.options.remove("aws_profile");
    let token = home.path("token").display().to_string();
    place.options.extend([
        ("container_credentials_full_uri".into(), format!("http://127.0.0.1:{port}/keys")),
        ("container_authorization_token_file".into(), token),
    ]);
    open(&place).put(NAME, &Held::new(14)).map(drop).unwrap_or_else(|e| panic!("{}", e.chain()));
    assert_eq!(sorted(&passed), [1, 2, 3, 4]);
}

#[test]
fn credentials_that_are_refused_twice_are_one_sentence_and_what_was_sent_stays() {
    let home = Home::new();
    home.keys(KEY);
    let (proxy, passed) = ending(KEY.0, 2, || {});
    let place = home.place(proxy.port);
    let (tier, held) = (open(&place), Held::new(15));
    let e = tier.put(NAME, &held).map(drop).expect_err("nobody renewed them");
    assert!(e.kind() == ErrorKind::Invalid && e.chain().contains("have ended"), "{}", e.chain());
    assert!(!e.chain().contains('\n'), "{}", e.chain());
    assert_eq!(passed.lock().expect("lock").len(), 2);
    // Somebody renews them: the next try goes on with what is there.
    home.keys(NEXT_KEY);
    tier.put(NAME, &held).map(drop).unwrap_or_else(|e| panic!("{}", e.chain()));
    assert_eq!(sorted(&passed), [1, 2, 3, 4]);
    assert_eq!(proxy.count(Request::is_begin), 1);
}

#[test]
fn a_refusal_of_credentials_that_are_good_after_all_costs_one_more_request() {
    let codes = ["InvalidAccessKeyId", "RequestTimeTooSkewed", "SignatureDoesNotMatch"];
    for code in codes {
        let proxy = survives(code, first(Request::is_part, Fate::Refused(403, code)));
        assert_eq!(proxy.count(Request::is_part), 5, "{code}: four parts, and one of them again");
    }
    let is_head: fn(&Request) -> bool = |request| request.method == "HEAD";
    survives("no word", first(is_head, Fate::Refused(403, "")));
}

#[test]
fn options_that_nobody_knows_are_refused_beside_those_of_profiles() {
    let options = Options::from([("aws_profil".into(), "x".into())]);
    let e = ObjectTier::open(&"s3://b/run".parse().expect("address"), &options);
    let e = e.map(drop).expect_err("a slip of the pen");
    assert!(e.chain().contains("aws_profil"), "{}", e.chain());
}
