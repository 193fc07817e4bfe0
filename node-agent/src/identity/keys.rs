//! The public keys that a cluster signs tokens with: a JSON Web Key Set, from the API server or a file.
//!
//! # Invariants
//!
//! - Keys that a cluster has given up are of no use here an hour later, where it answers.
//! - A cluster that does not answer changes nothing: the last keys that it gave stay in use, also for
//!   the next agent.
//! - Strangers' tokens make nobody ask more often than once in ten seconds.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use jsonwebtoken::jwk::{Jwk, JwkSet};
use tierkeep::{Error, Result, tier::publish::write_note};

use crate::kubernetes;

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
    /// The API server of this pod's cluster, which is asked over HTTPS, by the authority's certificate and
    /// with the token that are in `dir` (`ca.crt`, `token`).
    Api {
        /// The address of the keys.
        url: String,
        /// Where the two files are.
        dir: PathBuf,
    },
    /// An address that is asked over HTTPS, by the certificates that this host trusts and without a token.
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
            Source::Api { url, dir } => asked(url, fetch(url, Some(dir))),
            Source::Url(url) => asked(url, fetch(url, None)),
        }
    }

    /// For the next agent. Where it cannot be kept, that one asks.
    fn keep(&self, keys: &JwkSet) {
        if matches!(self.source, Source::File(_)) {
            return;
        }
        let bytes = serde_json::to_vec(keys).unwrap_or_default();
        if let Err(e) = write_note(&self.copy, &bytes) {
            tracing::warn!("{} is not kept: {}", self.copy.display(), e.chain());
        }
    }
}

fn asked(url: &str, answer: anyhow::Result<JwkSet>) -> Result<JwkSet> {
    answer.map_err(|e| Error::Io {
        what: format!("ask {url}"),
        source: io::Error::other(format!("{e:#}")),
    })
}

fn read(path: &Path) -> io::Result<JwkSet> {
    use io::Read as _;
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(BYTES_MAX).read_to_end(&mut bytes)?;
    serde_json::from_slice(&bytes).map_err(io::Error::other)
}

/// `api`: where a pod's credentials for the server are, where it is its own cluster's.
fn fetch(url: &str, api: Option<&Path>) -> anyhow::Result<JwkSet> {
    use io::Read as _;
    // Whoever embeds this may have another: both can check a certificate.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut client = reqwest::blocking::Client::builder()
        .timeout(ANSWER_WITHIN)
        .https_only(true)
        .redirect(reqwest::redirect::Policy::none());
    if let Some(dir) = api {
        client = client.no_proxy().tls_certs_only(kubernetes::authority(dir)?);
    }
    let mut request = client.build()?.get(url);
    if let Some(dir) = api {
        request = request.bearer_auth(kubernetes::token(dir)?);
    }
    let answer = request.send()?.error_for_status()?;
    let mut bytes = Vec::new();
    answer.take(BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}
