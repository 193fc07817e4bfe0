//! The public keys that a cluster signs tokens with: a JSON Web Key Set, from the API server or a file.
//!
//! # Invariants
//!
//! - Keys that a cluster has given up are of no use here an hour later, where it answers.
//! - A cluster that does not answer changes nothing: the last keys that it gave stay in use, also for
//!   the next agent.
//! - Strangers' tokens make nobody ask more often than once in ten seconds.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use jsonwebtoken::jwk::{Jwk, JwkSet};
use tierkeep::{Error, Result, tier::publish::Staged};

/// Where pods find the API server's certificate, and what it knows them by.
const CLUSTER: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The API server, to pods.
const CLUSTER_URL: &str = "https://kubernetes.default.svc";

/// Keys this old are asked for again.
const FRESH: Duration = Duration::from_secs(3600);

/// A name that is not known is asked for this often.
const AGAIN: Duration = Duration::from_secs(10);

/// A trainer waits for it.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// A cluster has two or three keys, of half a kilobyte each.
const BYTES_MAX: u64 = 1 << 20;

/// Where the keys are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file, read again when a key is missing from it.
    File(PathBuf),
    /// An address that is asked over HTTPS. The pod's own API server is asked with its certificate and this
    /// pod's token, others by the certificates that this host trusts and without a token.
    Url(String),
}

#[derive(Debug, Default)]
struct State {
    keys: JwkSet,
    /// When they were asked for last, and when they came.
    asked: Option<Duration>,
    came: Option<Duration>,
}

#[derive(Debug)]
pub(super) struct Keys {
    source: Source,
    copy: PathBuf,
    /// One asks at a time, the others wait for what it hears.
    state: Mutex<State>,
}

impl Keys {
    pub(super) fn new(source: Source, copy: PathBuf) -> Self {
        let keys = read(&copy).unwrap_or_default(); // Before the first agent there is none.
        Self { source, copy, state: Mutex::new(State { keys, ..State::default() }) }
    }

    /// The key of this name. `now`: a monotonic clock's.
    ///
    /// # Errors
    /// The cluster has none of the name, or does not answer.
    pub(super) fn find(&self, id: &str, now: Duration) -> Result<Jwk> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let since = |then: Option<Duration>| then.map(|then| now.saturating_sub(then));
        let is_old = since(state.came).is_none_or(|age| age >= FRESH);
        let may_ask = since(state.asked).is_none_or(|age| age >= AGAIN);
        let mut away = None;
        if (is_old || state.keys.find(id).is_none()) && may_ask {
            state.asked = Some(now);
            match self.ask() {
                Ok(keys) => {
                    state.came = Some(now);
                    self.keep(&keys);
                    state.keys = keys;
                }
                Err(e) => {
                    tracing::warn!(
                        "the keys of service accounts' tokens (token_keys): {}",
                        e.chain()
                    );
                    away = Some(e);
                }
            }
        }
        match (state.keys.find(id), away) {
            (Some(key), _) => Ok(key.clone()),
            (None, Some(e)) => Err(e),
            (None, None) => Err(super::invalid(
                "a token is signed with a key that this cluster does not publish: it is another \
                 cluster's, or not one at all",
            )),
        }
    }

    fn ask(&self) -> Result<JwkSet> {
        match &self.source {
            Source::File(path) => {
                let what = format!("read {}", path.display());
                read(path).map_err(|source| Error::Io { what, source })
            }
            Source::Url(url) => {
                let what = format!("ask {url}");
                fetch(url).map_err(|e| Error::Io { what, source: io::Error::other(e.to_string()) })
            }
        }
    }

    /// For the next agent. Where it cannot be kept, that one asks.
    fn keep(&self, keys: &JwkSet) {
        if matches!(self.source, Source::File(_)) {
            return;
        }
        let bytes = serde_json::to_vec(keys).unwrap_or_default();
        if fs::read(&self.copy).is_ok_and(|there| there == bytes) {
            return;
        }
        let kept = || -> Result<()> {
            // Between the two there is none: the next agent asks.
            let _ = fs::remove_file(&self.copy);
            let staged = Staged::beside(&self.copy)?;
            let written = staged.file()?.write_all(&bytes);
            written.map_err(|source| Error::Io { what: "write it".into(), source })?;
            staged.appear()
        };
        if let Err(e) = kept() {
            tracing::warn!("{} is not kept: {}", self.copy.display(), e.chain());
        }
    }
}

fn read(path: &Path) -> io::Result<JwkSet> {
    use io::Read as _;
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(BYTES_MAX).read_to_end(&mut bytes)?;
    serde_json::from_slice(&bytes).map_err(io::Error::other)
}

fn fetch(url: &str) -> anyhow::Result<JwkSet> {
    use io::Read as _;
    // Whoever embeds this may have another: both can check a certificate.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut client = reqwest::blocking::Client::builder()
        .timeout(ANSWER_WITHIN)
        .https_only(true)
        .redirect(reqwest::redirect::Policy::none());
    let is_own = url.strip_prefix(CLUSTER_URL).is_some_and(|rest| rest.starts_with(['/', ':']));
    let own = |name: &str| fs::read(Path::new(CLUSTER).join(name));
    if is_own {
        client = client.tls_certs_only(reqwest::Certificate::from_pem_bundle(&own("ca.crt")?)?);
    }
    let mut request = client.build()?.get(url);
    if is_own {
        request = request.bearer_auth(String::from_utf8(own("token")?)?.trim());
    }
    let answer = request.send()?.error_for_status()?;
    let mut bytes = Vec::new();
    answer.take(BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}
