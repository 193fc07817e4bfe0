//! What an agent is told: a file, then `TIERKEEP_*`, then flags; the later one counts.
//!
//! # Invariants
//!
//! - Whatever is wrong is said with the key and where it was given, before anybody is served.
//! - A key that nobody knows is an error: a budget that was misspelt would be no budget.

use std::{
    ffi::OsString,
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use bytesize::ByteSize;
use tierkeep::{
    config::default_ram_root,
    host::{self, UID},
    tier::object::address::is_url,
};

use super::{
    control::socket_beside,
    identity::{self, Tokens},
    node::{self, Watching},
    peers, transport,
};
use crate::{
    cli::AgentArgs,
    cluster,
    fail::{Failure, USAGE},
    kubernetes::Api,
    mesh,
};

/// The file that is read where none is named and there is one.
const FILE: &str = "/etc/tierkeep/agent.toml";

/// Which keys there are, the variable of each, and what it means.
const KEYS: [(&str, &str); 34] = [
    ("socket", "TIERKEEP_AGENT"),
    ("control", "TIERKEEP_CONTROL"),
    ("ram_dir", "TIERKEEP_RAM_DIR"),
    ("ram_bytes_max", "TIERKEEP_RAM_BYTES_MAX"),
    ("run_bytes_max", "TIERKEEP_RUN_BYTES_MAX"),
    ("buckets", "TIERKEEP_BUCKETS"),
    ("identity", "TIERKEEP_IDENTITY"),
    ("disk_dir", "TIERKEEP_DISK_DIR"),
    ("token_keys", "TIERKEEP_TOKEN_KEYS"),
    ("token_audience", "TIERKEEP_TOKEN_AUDIENCE"),
    ("http", "TIERKEEP_AGENT_HTTP"),
    ("trainers_max", "TIERKEEP_AGENT_TRAINERS_MAX"),
    ("idle", "TIERKEEP_AGENT_IDLE"),
    ("drain_on_sigterm", "TIERKEEP_AGENT_DRAIN_ON_SIGTERM"),
    ("gossip", "TIERKEEP_GOSSIP"),
    ("advertise", "TIERKEEP_ADVERTISE"),
    ("seeds", "TIERKEEP_SEEDS"),
    ("node", "TIERKEEP_NODE"),
    ("labels", "TIERKEEP_LABELS"),
    ("cluster", "TIERKEEP_CLUSTER"),
    ("cluster_key", "TIERKEEP_CLUSTER_KEY"),
    ("tls_cert", "TIERKEEP_TLS_CERT"),
    ("tls_key", "TIERKEEP_TLS_KEY"),
    ("tls_ca", "TIERKEEP_TLS_CA"),
    ("tls_name", "TIERKEEP_TLS_NAME"),
    ("insecure", "TIERKEEP_INSECURE"),
    ("peer_rate", "TIERKEEP_PEER_RATE"),
    ("peer_connections", "TIERKEEP_PEER_CONNECTIONS"),
    ("node_watch", "TIERKEEP_NODE_WATCH"),
    ("node_labels", "TIERKEEP_NODE_LABELS"),
    ("node_taints", "TIERKEEP_NODE_TAINTS"),
    ("node_hold", "TIERKEEP_NODE_HOLD"),
    ("kubernetes_api", "TIERKEEP_KUBERNETES_API"),
    ("kubernetes_dir", "TIERKEEP_KUBERNETES_DIR"),
];

/// The settings in force.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) socket: PathBuf,
    /// Where the command asks.
    pub(crate) control: PathBuf,
    pub(crate) ram_dir: PathBuf,
    pub(crate) ram_bytes_max: Option<u64>,
    pub(crate) run_bytes_max: Option<u64>,
    /// Where other users' checkpoints may go.
    pub(crate) buckets: Vec<String>,
    /// Where trainers are known by tokens.
    tokens: Option<Tokens>,
    pub(crate) http: Option<SocketAddr>,
    pub(crate) trainers_max: usize,
    pub(crate) idle: Duration,
    pub(crate) drain_on_sigterm: Duration,
    /// Where it is told to gossip.
    pub(crate) cluster: Option<cluster::Settings>,
    /// How it then talks to the others.
    pub(crate) mesh: Option<mesh::Settings>,
    /// Where it watches its Node.
    pub(super) watching: Option<Watching>,
    /// The API server, where it asks it anything.
    api: Api,
    /// The file that has the cluster's key.
    key_file: Option<PathBuf>,
    /// Where each key was given.
    from: Vec<(&'static str, String)>,
}

/// One value as it was given.
pub(super) struct Given {
    pub(super) text: String,
    from: String,
}

#[cfg(test)]
impl Given {
    pub(super) fn of(text: &str) -> Self {
        Self { text: text.into(), from: "a test".into() }
    }
}

pub(super) fn wrong(key: &str, given: &Given, why: &str, hint: &str) -> Failure {
    let Given { text, from } = given;
    Failure::own(USAGE, format!("{key} = {text:?} ({from}): {why}"), hint)
}

impl Settings {
    /// Reads and checks them.
    pub(crate) fn load(args: &AgentArgs, ram_dir: Option<&Path>) -> Result<Self, Failure> {
        let named = args.config.clone().map(|path| (path, "--config")).or_else(|| {
            let variable = std::env::var_os("TIERKEEP_AGENT_CONFIG").filter(|v| !v.is_empty());
            variable.map(|path| (path.into(), "TIERKEEP_AGENT_CONFIG"))
        });
        let mut all: Vec<(&'static str, Given)> = match named {
            Some((path, by)) => file(&path, by)?,
            None if Path::new(FILE).exists() => file(Path::new(FILE), "the default file")?,
            None => Vec::new(),
        };
        for (key, variable) in KEYS {
            if let Some(value) = std::env::var_os(variable).filter(|value| !value.is_empty()) {
                let text = utf8(key, variable, value)?;
                all.push((key, Given { text, from: variable.into() }));
            }
        }
        let ram_dir = ram_dir.map(|dir| dir.as_os_str().to_owned());
        for (key, flag) in args.given().into_iter().chain([("ram_dir", ram_dir)]) {
            if let Some(value) = flag {
                let text = utf8(key, key, value)?;
                all.push((key, Given { text, from: format!("--{}", key.replace('_', "-")) }));
            }
        }
        Self::of(&all)
    }

    fn of(all: &[(&'static str, Given)]) -> Result<Self, Failure> {
        let last = |key: &str| all.iter().rev().find(|(k, _)| *k == key).map(|(_, given)| given);
        let path = |key: &str, default: PathBuf| match last(key) {
            Some(given) if !Path::new(&given.text).is_absolute() => {
                Err(wrong(key, given, "it is not an absolute path", "as in /dev/shm/tierkeep"))
            }
            Some(given) => Ok(PathBuf::from(&given.text)),
            None => Ok(default),
        };
        let root = rustix::process::geteuid().is_root();
        // Where jobs without an agent keep theirs: what they left is found.
        let all = PathBuf::from(format!("/dev/shm/tierkeep-{UID}"));
        let ram_dir = path("ram_dir", if root { all } else { default_ram_root() })?;
        let socket = match root {
            true => "/run/tierkeep/agent.sock".into(),
            false => ram_dir.join("agent.sock"),
        };
        let socket = path("socket", socket)?;
        let duration = |key: &str, default: Duration| match last(key) {
            Some(given) => humantime::parse_duration(&given.text)
                .map_err(|e| wrong(key, given, &e.to_string(), "as in 30s, 10m or 1h")),
            None => Ok(default),
        };
        let size = |key: &str| match last(key).map(|given| (given, given.text.parse::<ByteSize>()))
        {
            Some((_, Ok(size))) if size.as_u64() > 0 => Ok(Some(size.as_u64())),
            Some((given, _)) => {
                Err(wrong(key, given, "it is not a size in bytes", "as in 160GiB or 171798691840"))
            }
            None => Ok(None),
        };
        let http = match last("http") {
            Some(given) if matches!(given.text.as_str(), "off" | "none") => None,
            Some(given) => Some(given.text.parse().map_err(|_| {
                let why = "it is not an address and a port";
                wrong("http", given, why, "as in 127.0.0.1:9177 or [::]:9177, or off")
            })?),
            None => None,
        };
        let buckets = match last("buckets") {
            Some(given) => {
                let places: Vec<String> = given.text.split(',').map(String::from).collect();
                if !places.iter().all(|place| is_url(place.trim_end_matches('/'))) {
                    let why = "it is no list of places in buckets";
                    return Err(wrong("buckets", given, why, "as in s3://bucket/team,gs://other"));
                }
                places
            }
            None => Vec::new(),
        };
        let trainers_max = match last("trainers_max") {
            Some(given) => {
                given.text.parse().ok().filter(|n| (1..=4096).contains(n)).ok_or_else(|| {
                    wrong("trainers_max", given, "it is not a number from 1 to 4096", "as in 64")
                })?
            }
            None => 256,
        };
        let from = KEYS.iter().map(|(key, _)| {
            (*key, last(key).map_or_else(|| "default".into(), |given| given.from.clone()))
        });
        let cluster = peers::settings(&last)?;
        let hold = last("node_hold").is_some().then(|| duration("node_hold", Duration::ZERO));
        let hold = hold.transpose()?;
        Ok(Self {
            control: path("control", socket_beside(&socket))?,
            socket,
            tokens: identity::settings(&last, &buckets)?,
            watching: node::settings(&last, hold)?,
            api: node::api(&last)?,
            ram_bytes_max: size("ram_bytes_max")?,
            run_bytes_max: size("run_bytes_max")?,
            buckets,
            http,
            trainers_max,
            idle: duration("idle", Duration::from_secs(3600))?,
            drain_on_sigterm: duration("drain_on_sigterm", Duration::ZERO)?,
            mesh: cluster.is_some().then(|| transport::settings(&last)).transpose()?,
            cluster,
            key_file: last("cluster_key").map(|given| given.text.clone().into()),
            from: from.collect(),
            ram_dir,
        })
    }

    /// For the core.
    pub(crate) fn host(&self) -> host::Settings {
        host::Settings {
            socket: self.socket.clone(),
            ram_root: self.ram_dir.clone(),
            ram_bytes_max: self.ram_bytes_max,
            run_bytes_max: self.run_bytes_max,
            buckets: self.buckets.clone(),
            tenancy: self.tokens.as_ref().map(Tokens::tenancy),
            trainers_max: self.trainers_max,
            idle: self.idle,
        }
    }

    /// Prints what is in force, and where each of it was given.
    pub(crate) fn print(&self, json: bool, out: &mut dyn Write) -> Result<(), Failure> {
        let text = |time: Duration| humantime::format_duration(time).to_string();
        let values = [
            self.socket.display().to_string(),
            self.control.display().to_string(),
            self.ram_dir.display().to_string(),
            self.ram_bytes_max.map_or_else(
                || "80 % of the tmpfs, or of the control group".into(),
                |n| n.to_string(),
            ),
            self.run_bytes_max.map_or_else(|| "no limit of its own".into(), |n| n.to_string()),
            if self.buckets.is_empty() { "none".into() } else { self.buckets.join(",") },
        ];
        let values = values.into_iter().chain(identity::words(self.tokens.as_ref()));
        let values = values.chain([
            self.http.map_or_else(|| "off".into(), |address| address.to_string()),
            self.trainers_max.to_string(),
            text(self.idle),
            text(self.drain_on_sigterm),
        ]);
        let values = values.chain(peers::words(self.cluster.as_ref(), self.key_file.as_deref()));
        let values = values.chain(transport::words(self.mesh.as_ref()));
        let values = values.chain(node::words(self.watching.as_ref()));
        let values = values.chain([self.api.url.clone(), self.api.dir.display().to_string()]);
        let rows = self.from.iter().zip(values);
        if json {
            let row = |((key, from), value): (&(&str, String), String)| {
                ((*key).to_owned(), serde_json::json!({ "value": value, "from": from }))
            };
            let all: serde_json::Map<_, _> = rows.map(row).collect();
            writeln!(out, "{}", serde_json::Value::Object(all))?;
            return Ok(());
        }
        for ((key, from), value) in rows {
            writeln!(out, "{key:<17} {value}  ({from})")?;
        }
        Ok(())
    }
}

fn utf8(key: &str, from: &str, value: OsString) -> Result<String, Failure> {
    value.into_string().map_err(|value| {
        let given = Given { text: value.to_string_lossy().into(), from: from.into() };
        wrong(key, &given, "it is not UTF-8", "")
    })
}

fn file(path: &Path, by: &str) -> Result<Vec<(&'static str, Given)>, Failure> {
    let name = format!("{} ({by})", path.display());
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::own(USAGE, format!("could not read {name}: {e}"), ""))?;
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| {
        let why = e.message();
        let line = e.span().map_or(0, |at| text[..at.start.min(text.len())].lines().count().max(1));
        Failure::own(
            USAGE,
            format!("{name}, line {line}: {why}"),
            "it is TOML, one `key = value` a line",
        )
    })?;
    let mut all = Vec::new();
    for (key, value) in table {
        let Some((known, _)) = KEYS.iter().find(|(known, _)| *known == key) else {
            let keys: Vec<_> = KEYS.iter().map(|(key, _)| *key).collect();
            let hint = format!("the keys are {}", keys.join(", "));
            return Err(Failure::own(USAGE, format!("{name}: there is no key {key}"), hint));
        };
        let Some(text) = words(&value) else {
            let given = Given { text: format!("{value:?}"), from: name };
            return Err(wrong(known, &given, "it is neither text nor a whole number", ""));
        };
        all.push((*known, Given { text, from: path.display().to_string() }));
    }
    Ok(all)
}

/// A value as it would be given by a flag: a list with commas, a table as `key=value` with commas.
fn words(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Boolean(yes) => Some(yes.to_string()),
        toml::Value::Array(list) => {
            let texts: Option<Vec<_>> = list.iter().map(toml::Value::as_str).collect();
            Some(texts?.join(","))
        }
        toml::Value::Table(table) => {
            let pair =
                |(key, value): (&String, &toml::Value)| Some(format!("{key}={}", value.as_str()?));
            Some(table.iter().map(pair).collect::<Option<Vec<_>>>()?.join(","))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(list: &[&str]) -> AgentArgs {
        use clap::Parser;
        let words = ["tierkeep", "agent"].iter().chain(list);
        let cli = crate::cli::Cli::try_parse_from(words).unwrap();
        let crate::cli::Command::Agent(args) = cli.command else { panic!("no agent") };
        *args
    }

    fn said(failure: &Failure) -> String {
        let Failure::Own { why, .. } = failure else { panic!("{failure:?}") };
        why.clone()
    }

    #[test]
    fn a_flag_counts_over_a_file_and_a_mistake_names_key_and_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        let write = |text: &str| {
            use std::io::Write as _;
            std::fs::File::create(&path).unwrap().write_all(text.as_bytes()).unwrap();
        };
        let config = path.to_str().unwrap();
        write("ram_bytes_max = \"2GiB\"\nidle = \"5m\"\ntrainers_max = 7\n");
        let loaded = Settings::load(&args(&["--config", config, "--idle", "1h"]), None).unwrap();
        assert_eq!(loaded.ram_bytes_max, Some(2 << 30));
        assert_eq!((loaded.idle, loaded.trainers_max), (Duration::from_secs(3600), 7));
        let refused = |text: &str| {
            write(text);
            said(&Settings::load(&args(&["--config", config]), None).unwrap_err())
        };
        assert_eq!(
            refused("ram_bytes_max = \"lots\""),
            format!("ram_bytes_max = \"lots\" ({config}): it is not a size in bytes")
        );
        assert!(refused("ram_byte_max = 1").ends_with("(--config): there is no key ram_byte_max"));
        assert!(refused("idle = \"soon\"").starts_with("idle = \"soon\""));
        assert!(refused("idle = 1.5").contains("neither text nor a whole number"));
        assert!(refused("socket = \"here\"").contains("not an absolute path"));
        assert!(refused("http = \"9177\"").contains("not an address and a port"));
        assert!(refused("x = [").contains("line 1"));
        let gone = Settings::load(&args(&["--config", "/nowhere/agent.toml"]), None).unwrap_err();
        assert!(said(&gone).starts_with("could not read /nowhere/agent.toml (--config)"));
    }
}
