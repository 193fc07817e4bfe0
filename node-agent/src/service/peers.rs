//! What an agent is told of the others: read, checked, in words. It owns the meaning of these keys; where
//! a value was given, and which one counts, is `settings`' business.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use super::settings::{Given, wrong};
use crate::{
    cluster::{self, Key},
    fail::{Failure, USAGE},
};

/// Fewer bytes can be guessed.
const KEY_BYTES_MIN: usize = 16;

/// Longer names are mistakes.
const NAME_BYTES_MAX: usize = 128;

const DEFAULT_CLUSTER: &str = "tierkeep";

/// `None`: this agent has no others. `last`: the value of a key that counts.
pub(super) fn settings<'a>(
    last: &impl Fn(&str) -> Option<&'a Given>,
) -> Result<Option<cluster::Settings>, Failure> {
    let Some(gossip) = last("gossip") else {
        for key in [
            "advertise",
            "seeds",
            "labels",
            "cluster",
            "cluster_key",
            "tls_cert",
            "tls_key",
            "tls_ca",
            "tls_name",
            "insecure",
            "peer_rate",
            "peer_connections",
        ] {
            if let Some(given) = last(key) {
                let hint = "give gossip as well, as in [::]:9178, or leave this out";
                return Err(wrong(
                    key,
                    given,
                    "there is no gossip without an address for it",
                    hint,
                ));
            }
        }
        return Ok(None);
    };
    // Said in so many words: what else there is waits for another day.
    if matches!(gossip.text.as_str(), "off" | "none") {
        return Ok(None);
    }
    let listen: SocketAddr =
        gossip.text.parse().ok().filter(|at: &SocketAddr| at.port() > 0).ok_or_else(|| {
            wrong("gossip", gossip, "it is not an address and a port", "as in [::]:9178, or off")
        })?;
    Ok(Some(cluster::Settings {
        name: node(last("node"))?,
        cluster: name("cluster", last("cluster"))?.unwrap_or_else(|| DEFAULT_CLUSTER.into()),
        key: key(last("cluster_key"))?,
        listen,
        advertise: SocketAddr::new(advertised(listen, gossip, last("advertise"))?, listen.port()),
        seeds: seeds(last("seeds"))?,
        labels: pairs("labels", last("labels"), "zone=a,rack=r7")?,
    }))
}

/// What this node is called: as given, else as the host is.
pub(super) fn node(given: Option<&Given>) -> Result<String, Failure> {
    name("node", given)?.map_or_else(host, Ok)
}

/// Something to call a node, or a cluster.
fn name(key: &str, given: Option<&Given>) -> Result<Option<String>, Failure> {
    let Some(given) = given else { return Ok(None) };
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if given.text.len() > NAME_BYTES_MAX || !given.text.chars().all(good) {
        let why = "a name has letters, digits, '-', '.' and '_', 128 at most";
        return Err(wrong(key, given, why, "as in gpu-17"));
    }
    Ok(Some(given.text.clone()))
}

fn host() -> Result<String, Failure> {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    match name.as_str() {
        "" | "localhost" | "(none)" => Err(Failure::own(
            USAGE,
            "node: this host has no name of its own",
            "give the agent one, as in --node gpu-17",
        )),
        _ => Ok(name),
    }
}

/// Where others reach this agent: as given, else the one address that it listens at.
fn advertised(
    listen: SocketAddr,
    gossip: &Given,
    given: Option<&Given>,
) -> Result<IpAddr, Failure> {
    match given {
        Some(given) => {
            given.text.parse().ok().filter(|ip: &IpAddr| !ip.is_unspecified()).ok_or_else(|| {
                wrong("advertise", given, "it is not an address of one host", "as in 10.0.0.17")
            })
        }
        None if listen.ip().is_unspecified() => {
            let why = "it stands for all addresses: others have to know one of them";
            Err(wrong("gossip", gossip, why, "give advertise, as in 10.0.0.17"))
        }
        None => Ok(listen.ip()),
    }
}

fn key(given: Option<&Given>) -> Result<Key, Failure> {
    let Some(given) = given else {
        return Err(Failure::own(
            USAGE,
            "cluster_key: agents that gossip have a key",
            "the same file on all of them, as from `head -c 32 /dev/urandom | base64`",
        ));
    };
    let bytes = std::fs::read(&given.text).map_err(|e| {
        wrong("cluster_key", given, &format!("could not read it: {e}"), "it is a file")
    })?;
    // An editor's newline is no part of it.
    let key = bytes.trim_ascii();
    if key.len() < KEY_BYTES_MIN {
        let why = format!("the file has {} bytes, and a key {KEY_BYTES_MIN} at least", key.len());
        return Err(wrong(
            "cluster_key",
            given,
            &why,
            "as from `head -c 32 /dev/urandom | base64`",
        ));
    }
    Ok(Key::new(key))
}

fn seeds(given: Option<&Given>) -> Result<Vec<String>, Failure> {
    let Some(given) = given else { return Ok(Vec::new()) };
    let seeds: Vec<&str> =
        given.text.split(',').map(str::trim).filter(|seed| !seed.is_empty()).collect();
    for seed in &seeds {
        let port = seed.rsplit_once(':').filter(|(host, _)| !host.is_empty());
        if port.is_none_or(|(_, port)| port.parse::<u16>().unwrap_or(0) == 0) {
            let why = format!("{seed:?} is not a host and a port");
            return Err(wrong(
                "seeds",
                given,
                &why,
                "as in gpu-1:9178,gpu-2:9178 or agents.svc:9178",
            ));
        }
    }
    Ok(seeds.into_iter().map(String::from).collect())
}

/// Keys and values with commas; `as_in`: an example.
pub(super) fn pairs(
    key: &str,
    given: Option<&Given>,
    as_in: &str,
) -> Result<BTreeMap<String, String>, Failure> {
    let mut pairs = BTreeMap::new();
    let Some(given) = given else { return Ok(pairs) };
    for pair in given.text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
        let parts =
            pair.split_once('=').filter(|(name, value)| !name.is_empty() && !value.is_empty());
        let Some((name, value)) = parts else {
            let why = format!("{pair:?} is not key=value");
            return Err(wrong(key, given, &why, &format!("as in {as_in}")));
        };
        if pairs.insert(name.to_owned(), value.to_owned()).is_some() {
            return Err(wrong(key, given, &format!("{name} is there twice"), ""));
        }
    }
    Ok(pairs)
}

/// In the order of the keys.
pub(super) fn words(settings: Option<&cluster::Settings>, key_file: Option<&Path>) -> [String; 7] {
    let Some(settings) = settings else {
        let none = || "-".to_owned();
        return ["off".into(), none(), none(), none(), none(), none(), none()];
    };
    let list = |list: Vec<String>| if list.is_empty() { "none".into() } else { list.join(",") };
    [
        settings.listen.to_string(),
        settings.advertise.ip().to_string(),
        list(settings.seeds.clone()),
        settings.name.clone(),
        list(settings.labels.iter().map(|(key, value)| format!("{key}={value}")).collect()),
        settings.cluster.clone(),
        key_file.map_or_else(|| "-".into(), |path| path.display().to_string()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the settings are, with a good key beside them; else why not.
    fn with(list: &[(&str, &str)]) -> Result<Option<cluster::Settings>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::File::create(&path)
            .and_then(|mut file| {
                use std::io::Write as _;
                file.write_all(b"0123456789abcdef\n")
            })
            .unwrap();
        let path = path.to_str().unwrap();
        let given: Vec<(&str, Given)> = list
            .iter()
            .map(|(key, text)| (*key, Given::of(if *text == "KEY" { path } else { text })))
            .collect();
        let last = |key: &str| given.iter().rev().find(|(k, _)| *k == key).map(|(_, given)| given);
        settings(&last).map_err(|failure| match failure {
            Failure::Own { why, .. } => why,
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn an_agent_is_told_of_the_others() {
        let all = with(&[
            ("gossip", "[::]:9178"),
            ("advertise", "10.0.0.17"),
            ("seeds", "gpu-1:9178, [fd00::2]:9178,"),
            ("node", "gpu-17"),
            ("labels", "zone=a,rack=r=7"),
            ("cluster_key", "KEY"),
        ]);
        let all = all.unwrap().unwrap();
        assert_eq!((all.name.as_str(), all.cluster.as_str()), ("gpu-17", "tierkeep"));
        assert_eq!(all.advertise, "10.0.0.17:9178".parse().unwrap());
        assert_eq!(all.seeds, ["gpu-1:9178", "[fd00::2]:9178"]);
        assert_eq!(all.labels["rack"], "r=7");
        assert!(with(&[]).unwrap().is_none());
        assert!(with(&[("seeds", "gpu-1:9178"), ("gossip", "off")]).unwrap().is_none());
    }

    #[test]
    fn what_is_wrong_is_said_with_its_key() {
        let base = [("gossip", "10.0.0.1:9178"), ("cluster_key", "KEY")];
        let refused = |key: &str, value: &str| {
            let mut all = base.to_vec();
            all.push((key, value));
            let why = with(&all).unwrap_err();
            assert!(why.starts_with(&format!("{key} = ")), "{why}");
            why
        };
        assert!(with(&base).unwrap().is_some());
        assert!(refused("gossip", "9178").contains("not an address and a port"));
        assert!(refused("gossip", "10.0.0.1:0").contains("not an address and a port"));
        assert!(refused("gossip", "0.0.0.0:9178").contains("stands for all addresses"));
        assert!(refused("advertise", "::").contains("not an address of one host"));
        assert!(refused("seeds", "gpu-1").contains("\"gpu-1\" is not a host and a port"));
        assert!(refused("seeds", ":9178").contains("not a host and a port"));
        assert!(refused("node", "a b").contains("a name has letters"));
        assert!(refused("labels", "zone").contains("not key=value"));
        assert!(refused("labels", "zone=a,zone=b").contains("zone is there twice"));
        assert!(refused("cluster_key", "/dev/null").contains("0 bytes, and a key 16 at least"));
        assert!(refused("cluster_key", "/nowhere").contains("could not read it"));
        assert!(with(&base[..1]).unwrap_err().contains("agents that gossip have a key"));
        assert!(with(&[("seeds", "a:1")]).unwrap_err().contains("no gossip without an address"));
    }
}
