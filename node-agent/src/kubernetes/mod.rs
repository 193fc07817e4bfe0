//! The API server of the cluster that an agent's pod is in: how it is reached, and the three things that are
//! asked of it: this node's own Node, once and as it changes, and a few annotations on it.
//!
//! One object is watched, and each answer has all of it, so nothing is kept between two looks and no cache
//! or reflector is needed. [`node`] owns what a Node means, [`watch`] when it is asked for.
//!
//! # Invariants
//!
//! - The token goes to this one server, whose certificate its own authority has signed.
//! - Token and authority are read from their files each time: the kubelet renews both.

pub(crate) mod node;
pub(crate) mod watch;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use reqwest::{Certificate, Client, Response, StatusCode, redirect::Policy};
use serde_json::json;

use self::node::Node;

/// Where pods find the server, by the cluster's DNS.
pub(crate) const URL: &str = "https://kubernetes.default.svc";

/// Where the kubelet puts a pod's token and the authority's certificate.
pub(crate) const DIR: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Whose annotations they are, to the server.
const MANAGER: &str = "tierkeep-agent";

const CONNECT_WITHIN: Duration = Duration::from_secs(5);
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// The server ends a watch after this long; a new one begins.
const WATCH_FOR: Duration = Duration::from_secs(240);

/// A connection whose other end is gone without a word is noticed.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// A Node lists its images: hundreds of kilobytes at most.
const NODE_BYTES_MAX: usize = 4 << 20;

/// The API server.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    pub(crate) url: String,
    pub(crate) dir: PathBuf,
}

/// A change of the Node.
#[derive(Debug)]
pub(crate) enum Change {
    /// It is so now.
    Is(Box<Node>),
    /// It was deleted.
    Deleted,
}

impl Api {
    fn client(&self, timeout: Option<Duration>) -> anyhow::Result<Client> {
        let mut client = Client::builder()
            .connect_timeout(CONNECT_WITHIN)
            .tcp_keepalive(KEEPALIVE)
            .https_only(true)
            .no_proxy() // One for buckets leads nowhere near the cluster's own server.
            .redirect(Policy::none())
            .tls_certs_only(authority(&self.dir)?);
        if let Some(timeout) = timeout {
            client = client.timeout(timeout);
        }
        Ok(client.build()?)
    }

    fn at(&self, name: &str) -> String {
        format!("{}/api/v1/nodes/{name}", self.url)
    }

    /// The Node; `None`: there is none of this name.
    pub(crate) async fn node(&self, name: &str) -> anyhow::Result<Option<Node>> {
        let request = self.client(Some(ANSWER_WITHIN))?.get(self.at(name));
        let answer = request.bearer_auth(token(&self.dir)?).send().await?;
        if answer.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let mut answer = good(answer).await?;
        let mut bytes = Vec::new();
        while let Some(more) = answer.chunk().await? {
            bytes.extend_from_slice(&more);
            bounded(&bytes)?;
        }
        serde_json::from_slice(&bytes).context("a Node that is none").map(Some)
    }

    /// What changes of it from `version` on.
    pub(crate) async fn changes(&self, name: &str, version: &str) -> anyhow::Result<Changes> {
        let query = [
            ("watch", "true"),
            ("fieldSelector", &format!("metadata.name={name}")),
            ("resourceVersion", version),
            ("timeoutSeconds", &WATCH_FOR.as_secs().to_string()),
        ];
        let query = query.map(|(key, value)| format!("{key}={value}")).join("&");
        // It lasts for as long as the server lets it, and not much longer.
        let client = self.client(Some(WATCH_FOR + ANSWER_WITHIN))?;
        let request = client.get(format!("{}/api/v1/nodes?{query}", self.url));
        let answer = good(request.bearer_auth(token(&self.dir)?).send().await?).await?;
        Ok(Changes { answer, read: Vec::new() })
    }

    /// Makes these the agent's annotations of the Node, and takes back those that it had before; what
    /// somebody else wants as well stays theirs (server-side apply).
    ///
    /// # Errors
    /// Somebody else has given one of them another value ([`is_conflict`]); the server is away, or refuses.
    pub(crate) async fn annotate(
        &self,
        name: &str,
        annotations: &BTreeMap<&str, String>,
    ) -> anyhow::Result<()> {
        let mut metadata = json!({ "name": name });
        if !annotations.is_empty() {
            metadata["annotations"] = json!(annotations);
        }
        let body = json!({ "apiVersion": "v1", "kind": "Node", "metadata": metadata });
        let url = format!("{}?fieldManager={MANAGER}", self.at(name));
        let request = self.client(Some(ANSWER_WITHIN))?.patch(url);
        let request = request
            .bearer_auth(token(&self.dir)?)
            .header("content-type", "application/apply-patch+yaml")
            .body(body.to_string()); // JSON is YAML.
        good(request.send().await?).await.map(drop)
    }
}

/// A watch.
#[derive(Debug)]
pub(crate) struct Changes {
    answer: Response,
    read: Vec<u8>,
}

impl Changes {
    /// The next change; `None`: the watch is over, and it is to be asked anew.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Option<Change>> {
        #[derive(serde::Deserialize)]
        struct Event {
            r#type: String,
            object: serde_json::Value,
        }
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                let Event { r#type, object } = serde_json::from_slice(&line)?;
                return match r#type.as_str() {
                    "ADDED" | "MODIFIED" => {
                        Ok(Some(Change::Is(Box::new(serde_json::from_value(object)?))))
                    }
                    "DELETED" => Ok(Some(Change::Deleted)),
                    "BOOKMARK" => continue,
                    // It is too old to go on from, usually.
                    _ => Ok(None),
                };
            }
            let Some(more) = self.answer.chunk().await? else { return Ok(None) };
            self.read.extend_from_slice(&more);
            bounded(&self.read)?;
        }
    }
}

fn bounded(bytes: &[u8]) -> anyhow::Result<()> {
    if bytes.len() > NODE_BYTES_MAX {
        bail!("a Node of more than {NODE_BYTES_MAX} bytes");
    }
    Ok(())
}

/// Whether somebody else has another value for what was to be set.
pub(crate) fn is_conflict(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Refused>().is_some_and(|refused| refused.status == StatusCode::CONFLICT)
}

/// What the server says where it does not do what is asked.
#[derive(Debug)]
struct Refused {
    status: StatusCode,
    why: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the API server answers {}: {}", self.status.as_u16(), self.why)
    }
}

impl std::error::Error for Refused {}

async fn good(answer: Response) -> anyhow::Result<Response> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let said = answer.bytes().await.unwrap_or_default();
    let said: serde_json::Value = serde_json::from_slice(&said).unwrap_or_default();
    let why = said["message"].as_str().unwrap_or("it does not say why").chars().take(500).collect();
    Err(Refused { status, why }.into())
}

/// The certificates that the server's own is signed with.
pub(crate) fn authority(dir: &Path) -> anyhow::Result<Vec<Certificate>> {
    // Whoever embeds this may have another: both can check a certificate.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Ok(Certificate::from_pem_bundle(&read(&dir.join("ca.crt"))?)?)
}

/// What this pod shows the server.
pub(crate) fn token(dir: &Path) -> anyhow::Result<String> {
    Ok(String::from_utf8(read(&dir.join("token"))?)?.trim().to_owned())
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let read: io::Result<Vec<u8>> = std::fs::read(path);
    read.with_context(|| format!("could not read {}", path.display()))
}
