//! What S3 requests are signed with, and its renewal while they are under way.
//!
//! A source hands out credentials and knows when they end, mostly: a file may be replaced at any time, a
//! session revoked, and a store has its own clock. So the store's word counts: where it refuses the
//! credentials of a request, the source is asked anew (the files are read again, the command is run again,
//! the token is exchanged again) and the request is sent once more.
//!
//! # Invariants
//!
//! - Of many requests that are refused at a time, the first asks anew; the others use what it got.
//! - A request is refused twice before it fails: once with what it had, once with what is fresh.

use std::{
    fmt,
    os::fd::OwnedFd,
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use object_store::{
    CredentialProvider,
    aws::{AwsCredential, AwsCredentialProvider},
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Deserialize;

use super::profile::{Keys, Lookup};
use crate::{
    clock::{Clock, SystemClock},
    observe::locked,
};

/// Credentials that end are renewed so long before, or half their life where that is less.
const BEFORE_THE_END: Duration = Duration::from_secs(5 * 60);
/// How long a command may take that says them: a person may have to answer it.
const PROCESS_WITHIN: Duration = Duration::from_secs(60);

type Answer<T> = Result<T, object_store::Error>;
type Source = dyn Fn() -> Answer<AwsCredentialProvider> + Send + Sync;

/// What signs, of a source that can be asked anew.
pub(super) struct Credentials {
    source: Box<Source>,
    held: Mutex<Held>,
}

struct Held {
    provider: AwsCredentialProvider,
    /// How often the source was asked.
    count: u64,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

impl Credentials {
    /// `source` makes a provider that has cached nothing yet.
    pub(super) fn new(
        source: impl Fn() -> Answer<AwsCredentialProvider> + Send + Sync + 'static,
    ) -> Answer<Self> {
        let held = Mutex::new(Held { provider: source()?, count: 0 });
        Ok(Self { source: Box::new(source), held })
    }

    /// Which credentials are in use: to be noted before a request is signed.
    pub(super) fn count(&self) -> u64 {
        locked(&self.held).count
    }

    /// Those with this number were refused: the source is asked anew when the next request is signed.
    pub(super) fn renew(&self, refused: u64) {
        let mut held = locked(&self.held);
        if held.count != refused {
            return; // Somebody has, meanwhile.
        }
        match (self.source)() {
            Ok(provider) => {
                tracing::info!("the store refuses the credentials: their source is asked anew");
                *held = Held { provider, count: refused + 1 };
            }
            Err(e) => tracing::warn!("could not ask for credentials anew: {e}"),
        }
    }
}

#[async_trait]
impl CredentialProvider for Credentials {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> Answer<Arc<AwsCredential>> {
        let provider = locked(&self.held).provider.clone();
        provider.get_credential().await
    }
}

/// Credentials of a profile whose keys stand in a file, or are said by a command.
#[derive(Debug)]
pub(super) struct OfProfile {
    lookup: Lookup,
    got: tokio::sync::Mutex<Option<Got>>,
}

struct Got {
    credential: Arc<AwsCredential>,
    /// By the monotonic clock.
    good_until: Option<Duration>,
}

impl fmt::Debug for Got {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Got").field("good_until", &self.good_until).finish_non_exhaustive()
    }
}

impl OfProfile {
    pub(super) fn new(lookup: Lookup) -> Self {
        Self { lookup, got: tokio::sync::Mutex::default() }
    }

    async fn ask(&self) -> Result<Got, String> {
        let profile = self.lookup.load().map_err(|e| e.chain())?;
        let credential =
            |key_id, secret_key, token| Arc::new(AwsCredential { key_id, secret_key, token });
        match profile.keys().map_err(|e| e.chain())? {
            Keys::Static { id, secret, token } => {
                Ok(Got { credential: credential(id, secret, token), good_until: None })
            }
            Keys::Process(command) => {
                let failed =
                    |why| format!("credential_process of profile {:?} {why}", profile.name());
                let said = run(&command).await.map_err(failed)?;
                let good_until = said.good_until().map_err(failed)?;
                let Said { access_key_id, secret_access_key, session_token, .. } = said;
                let credential = credential(access_key_id, secret_access_key, session_token);
                Ok(Got { credential, good_until })
            }
            Keys::WebIdentity { .. } | Keys::Elsewhere => {
                Err(format!("profile {:?} has no keys any more", profile.name()))
            }
        }
    }
}

#[async_trait]
impl CredentialProvider for OfProfile {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> Answer<Arc<AwsCredential>> {
        // Who comes meanwhile waits: one command runs, not one a request.
        let mut got = self.got.lock().await;
        let now = SystemClock.monotonic();
        if let Some(Got { credential, good_until }) = &*got
            && good_until.is_none_or(|until| now < until)
        {
            return Ok(credential.clone());
        }
        let failed = |why: String| object_store::Error::Generic { store: "S3", source: why.into() };
        let fresh = self.ask().await.map_err(failed)?;
        Ok(got.insert(fresh).credential.clone())
    }
}

/// What a `credential_process` says.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Said {
    version: u32,
    access_key_id: String,
    secret_access_key: String,
    #[serde(default)]
    session_token: Option<String>,
    #[serde(default)]
    expiration: Option<String>,
}

impl Said {
    /// Until when they are used, by the monotonic clock.
    fn good_until(&self) -> Result<Option<Duration>, String> {
        let Some(text) = &self.expiration else { return Ok(None) };
        let end = chrono::DateTime::parse_from_rfc3339(text)
            .map_err(|e| format!("said an Expiration that is no date: {e}"))?;
        let end = u64::try_from(end.timestamp_millis()).unwrap_or(0);
        let left = Duration::from_millis(end.saturating_sub(SystemClock.unix_ms()));
        if left.is_zero() {
            return Err(format!("said credentials that ended at {text}"));
        }
        Ok(Some(SystemClock.monotonic() + left - BEFORE_THE_END.min(left / 2)))
    }
}

/// Runs the command and understands what it says.
async fn run(command: &str) -> Result<Said, String> {
    let words = shlex::split(command).unwrap_or_default();
    let (program, arguments) = words.split_first().ok_or("is no command: a quote is left open")?;
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("could not run {program}: {e}"))?;
    let handle: Option<OwnedFd> = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let output = tokio::task::spawn_blocking(move || child.wait_with_output());
    let Ok(ended) = tokio::time::timeout(PROCESS_WITHIN, output).await else {
        if let Some(handle) = handle {
            let _ = pidfd_send_signal(&handle, Signal::KILL); // It may have ended by now.
        }
        return Err(format!("said nothing within {} s", PROCESS_WITHIN.as_secs()));
    };
    let Output { status, stdout, stderr } = ended
        .map_err(|e| e.to_string())
        .and_then(|output| output.map_err(|e| e.to_string()))
        .map_err(|e| format!("could not be read: {e}"))?;
    if !status.success() {
        let words: String = String::from_utf8_lossy(&stderr).trim().chars().take(300).collect();
        return Err(format!("failed ({status}): {words}"));
    }
    // Where it is not understood, its words are not repeated: they may be secrets.
    let said: Said = serde_json::from_slice(&stdout).map_err(|e| {
        format!("did not say credentials, at line {} column {}", e.line(), e.column())
    })?;
    if said.version != 1 {
        return Err(format!("said version {}, 1 is known", said.version));
    }
    Ok(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn until(expiration: &str) -> Result<Option<Duration>, String> {
        let text = format!(
            r#"{{"Version":1,"AccessKeyId":"K","SecretAccessKey":"s","Expiration":"{expiration}"}}"#
        );
        serde_json::from_str::<Said>(&text).expect("it is understood").good_until()
    }

    #[test]
    fn what_a_command_says_is_used_until_shortly_before_it_ends() {
        let now = SystemClock.monotonic();
        let far = until("2999-01-01T00:00:00+00:00").expect("a date").expect("an end");
        assert!(far > now + Duration::from_secs(1 << 30));
        let past = until("2001-01-01T00:00:00Z").expect_err("it ended");
        assert!(past.contains("ended at 2001"), "{past}");
        assert!(until("tomorrow").expect_err("no date").contains("no date"));
    }

    #[derive(Debug)]
    struct Fixed(u64);

    #[async_trait]
    impl CredentialProvider for Fixed {
        type Credential = AwsCredential;
        async fn get_credential(&self) -> Answer<Arc<AwsCredential>> {
            unreachable!("nothing is signed here: {}", self.0)
        }
    }

    #[test]
    fn of_many_that_are_refused_one_asks_anew() {
        let asked = Arc::new(Mutex::new(0));
        let count = asked.clone();
        let credentials = Credentials::new(move || {
            let mut count = locked(&count);
            *count += 1;
            Ok(Arc::new(Fixed(*count)) as AwsCredentialProvider)
        });
        let credentials = credentials.expect("credentials");
        let first = credentials.count();
        for _ in 0..32 {
            credentials.renew(first);
        }
        assert_eq!(*locked(&asked), 2, "at the start, and once for all");
        credentials.renew(credentials.count());
        assert_eq!(*locked(&asked), 3);
    }
}
