//! What an agent is told of its Node on Kubernetes: read, checked, in words.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use super::{
    peers,
    settings::{Given, wrong},
};
use crate::{
    fail::Failure,
    kubernetes::{Api, DIR, URL},
};

/// Where a node is, without a word about it.
const LABELS: [(&str, &str); 1] = [("zone", "topology.kubernetes.io/zone")];

/// As long as the cluster autoscaler watches a node that nobody needs before it takes it down, and half of
/// that again: a job that comes back meets its state.
const HOLD: Duration = Duration::from_secs(15 * 60);

/// How an agent watches its own Node.
#[derive(Clone, Debug)]
pub(super) struct Watching {
    pub(super) api: Api,
    pub(super) name: String,
    /// Our name of a level, the Node's label.
    pub(super) labels: BTreeMap<String, String>,
    /// More taints by which the node is to go away.
    pub(super) taints: Vec<String>,
    /// For how long the node is held, at most, once nothing moves any more.
    pub(super) hold: Duration,
}

/// Where the API server is, and who this pod is to it.
pub(super) fn api<'a>(last: &impl Fn(&str) -> Option<&'a Given>) -> Result<Api, Failure> {
    let url = match last("kubernetes_api") {
        None => URL.into(),
        Some(given) if given.text.starts_with("https://") => {
            given.text.trim_end_matches('/').to_owned()
        }
        Some(given) => {
            let why = "it is no https:// address";
            return Err(wrong("kubernetes_api", given, why, "as in https://10.0.0.1:6443"));
        }
    };
    let dir = match last("kubernetes_dir") {
        None => PathBuf::from(DIR),
        Some(given) if given.text.starts_with('/') => PathBuf::from(&given.text),
        Some(given) => {
            let why = "it is not an absolute path";
            return Err(wrong("kubernetes_dir", given, why, "it has the files token and ca.crt"));
        }
    };
    Ok(Api { url, dir })
}

/// `None`: it watches none. `last`: the value of a key that counts.
pub(super) fn settings<'a>(
    last: &impl Fn(&str) -> Option<&'a Given>,
    hold: Option<Duration>,
) -> Result<Option<Watching>, Failure> {
    let watches = match last("node_watch") {
        None => false,
        Some(given) => match given.text.as_str() {
            "off" => false,
            "kubernetes" => true,
            _ => return Err(wrong("node_watch", given, "it is neither off nor kubernetes", "")),
        },
    };
    if !watches {
        for key in ["node_labels", "node_taints", "node_hold"] {
            if let Some(given) = last(key) {
                let why = "it is for node_watch = \"kubernetes\"";
                return Err(wrong(key, given, why, "say so as well, or leave this out"));
            }
        }
        return Ok(None);
    }
    let labels = match last("node_labels") {
        None => LABELS.map(|(level, label)| (level.to_owned(), label.to_owned())).into(),
        given => peers::pairs("node_labels", given, "zone=topology.kubernetes.io/zone")?,
    };
    let taints = last("node_taints").map_or("", |given| given.text.as_str()).split(',');
    let taints = taints.map(str::trim).filter(|key| !key.is_empty());
    Ok(Some(Watching {
        api: api(last)?,
        name: peers::node(last("node"))?,
        labels,
        taints: taints.map(String::from).collect(),
        hold: hold.unwrap_or(HOLD),
    }))
}

/// The same for people: `node_watch`, `node_labels`, `node_taints`, `node_hold`.
pub(super) fn words(watching: Option<&Watching>) -> [String; 4] {
    let Some(Watching { labels, taints, hold, .. }) = watching else {
        return ["off", "-", "-", "-"].map(String::from);
    };
    let pairs: Vec<_> = labels.iter().map(|(level, label)| format!("{level}={label}")).collect();
    let list = |list: &[String]| if list.is_empty() { "none".into() } else { list.join(",") };
    let hold = humantime::format_duration(*hold).to_string();
    ["kubernetes".into(), list(&pairs), list(taints), hold]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(given: &[(&str, &str)]) -> Result<Option<Watching>, String> {
        let all: Vec<_> = given.iter().map(|(key, text)| (*key, Given::of(text))).collect();
        let last = |key: &str| all.iter().find(|(k, _)| *k == key).map(|(_, given)| given);
        settings(&last, None).map_err(|failure| {
            let Failure::Own { why, .. } = failure else { panic!("{failure:?}") };
            why
        })
    }

    #[test]
    fn what_is_said_of_a_node_is_checked_before_anybody_is_served() {
        assert!(read(&[]).unwrap().is_none());
        let on = ("node_watch", "kubernetes");
        let name = ("node", "gpu-1");
        let watching = read(&[on, name]).unwrap();
        let said = ["kubernetes", "zone=topology.kubernetes.io/zone", "none", "15m"];
        assert_eq!(words(watching.as_ref()), said);
        assert_eq!(words(None)[0], "off");
        let more = ("node_labels", "rack=example.com/rack, zone=z");
        let watching = read(&[on, name, more, ("node_taints", "a, b,")]).unwrap().unwrap();
        assert_eq!(watching.labels["rack"], "example.com/rack");
        assert_eq!(watching.taints, ["a", "b"]);
        for (given, said) in [
            (&[("node_watch", "yes")][..], "neither off nor kubernetes"),
            (&[("node_hold", "1m")], "it is for node_watch"),
            (&[on, name, ("node_labels", "rack")], "not key=value"),
            (&[on, name, ("kubernetes_api", "http://10.0.0.1")], "it is no https:// address"),
            (&[on, name, ("kubernetes_dir", "here")], "not an absolute path"),
        ] {
            let why = read(given).unwrap_err();
            assert!(why.contains(said), "{why}");
        }
    }
}
