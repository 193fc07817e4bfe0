//! What an agent is told of how trainers show who they are. Where a value was given, and which one counts, is
//! `settings`' business; what a token proves, `crate::identity`'s.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use tierkeep::host::{NAMESPACE, Tenancy};

use super::{
    node,
    settings::{Given, wrong},
};
use crate::{
    fail::{Failure, USAGE},
    identity::{Identity, Source},
    kubernetes::Api,
};

/// Where an API server publishes what it signs tokens with; every service account may read it.
const KEYS_AT: &str = "/openid/v1/jwks";

const DISK_DIR: &str = "/var/lib/tierkeep";

const AUDIENCE: &str = "tierkeep";

/// Beside the tenants' directories: no namespace has such a name.
const COPY: &str = ".token-keys.json";

/// Trainers are known by tokens.
#[derive(Clone, Debug)]
pub(super) struct Tokens {
    disk_dir: PathBuf,
    keys: Source,
    audience: String,
    node: Option<String>,
}

impl Tokens {
    /// For the core.
    pub(super) fn tenancy(&self) -> Tenancy {
        let copy = self.disk_dir.join(COPY);
        let Self { disk_dir, keys, audience, node } = self;
        let identify = Identity::new(keys.clone(), &copy, audience, node.as_deref());
        Tenancy { disk_dir: disk_dir.clone(), identify: Arc::new(identify) }
    }
}

/// `None`: trainers are known by the kernel's word. `last`: the value of a key that counts.
pub(super) fn settings<'a>(
    last: &impl Fn(&str) -> Option<&'a Given>,
    buckets: &[String],
) -> Result<Option<Tokens>, Failure> {
    let by_tokens = match last("identity") {
        None => false,
        Some(given) => match given.text.as_str() {
            "kernel" => false,
            "kubernetes" => true,
            _ => return Err(wrong("identity", given, "it is neither kernel nor kubernetes", "")),
        },
    };
    if !by_tokens {
        for key in ["disk_dir", "token_keys", "token_audience"] {
            if let Some(given) = last(key) {
                let why = "it is for identity = \"kubernetes\"";
                return Err(wrong(key, given, why, "say so as well, or leave this out"));
            }
        }
        return Ok(None);
    }
    if let Some(place) = buckets.iter().find(|place| !place.contains(NAMESPACE)) {
        return Err(Failure::own(
            USAGE,
            format!("buckets: {place} is of all namespaces: each would read what the others have"),
            format!(
                "put {NAMESPACE} where a namespace's place begins, as in s3://models/{NAMESPACE}/"
            ),
        ));
    }
    let disk_dir = match last("disk_dir") {
        None => DISK_DIR.into(),
        Some(given) if Path::new(&given.text).is_absolute() => PathBuf::from(&given.text),
        Some(given) => {
            return Err(wrong("disk_dir", given, "it is not an absolute path", "as in /mnt/nvme"));
        }
    };
    let keys = match last("token_keys") {
        None => {
            let Api { url, dir } = node::api(last)?;
            Source::Api { url: format!("{url}{KEYS_AT}"), dir }
        }
        // The API server's own address, of some path.
        Some(given) if is_below(&given.text, &node::api(last)?.url) => {
            Source::Api { url: given.text.clone(), dir: node::api(last)?.dir }
        }
        Some(given) if given.text.starts_with("https://") => Source::Url(given.text.clone()),
        Some(given) if Path::new(&given.text).is_absolute() => {
            Source::File(given.text.clone().into())
        }
        Some(given) => {
            let why = "it is neither an https:// address nor the absolute path of a file";
            return Err(wrong("token_keys", given, why, ""));
        }
    };
    Ok(Some(Tokens {
        disk_dir,
        keys,
        audience: last("token_audience")
            .map_or_else(|| AUDIENCE.into(), |given| given.text.clone()),
        node: last("node").map(|given| given.text.clone()),
    }))
}

/// Whether an address is on that server.
fn is_below(url: &str, server: &str) -> bool {
    let of = |url: &str| {
        let url = reqwest::Url::parse(url).ok()?;
        Some((url.scheme().to_owned(), url.host_str()?.to_owned(), url.port_or_known_default()))
    };
    of(url).is_some_and(|of_url| of(server) == Some(of_url))
}

/// The same for people: `identity`, `disk_dir`, `token_keys`, `token_audience`.
pub(super) fn words(tokens: Option<&Tokens>) -> [String; 4] {
    let Some(Tokens { disk_dir, keys, audience, .. }) = tokens else {
        return ["kernel", "none", "none", "none"].map(String::from);
    };
    let keys = match keys {
        Source::File(path) => path.display().to_string(),
        Source::Api { url, .. } | Source::Url(url) => url.clone(),
    };
    ["kubernetes".into(), disk_dir.display().to_string(), keys, audience.clone()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(given: &[(&str, &str)], buckets: &[&str]) -> Result<Option<Tokens>, String> {
        let all: Vec<_> = given.iter().map(|(key, text)| (*key, Given::of(text))).collect();
        let last = |key: &str| all.iter().find(|(k, _)| *k == key).map(|(_, given)| given);
        let buckets: Vec<_> = buckets.iter().map(|place| (*place).to_owned()).collect();
        settings(&last, &buckets).map_err(|failure| {
            let Failure::Own { why, .. } = failure else { panic!("{failure:?}") };
            why
        })
    }

    #[test]
    fn what_is_said_of_tokens_is_checked_before_anybody_is_served() {
        assert!(read(&[], &["s3://models"]).unwrap().is_none());
        let tokens = read(&[("identity", "kubernetes")], &["s3://models/{namespace}/"]).unwrap();
        assert_eq!(words(tokens.as_ref())[2], "https://kubernetes.default.svc/openid/v1/jwks");
        let is_own = |url: &str| is_below(url, "https://kubernetes.default.svc");
        assert!(is_own("https://kubernetes.default.svc:443/openid/v1/jwks"));
        assert!(!is_own("https://kubernetes.default.svc.evil/openid/v1/jwks"));
        assert!(!is_own("https://kubernetes.default.svc:8443/keys"));
        for (given, buckets, said) in [
            (&[("identity", "uid")][..], &[][..], "neither kernel nor kubernetes"),
            (&[("disk_dir", "/mnt")], &[], "it is for identity"),
            (&[("identity", "kubernetes")], &["s3://models"], "s3://models is of all namespaces"),
            (&[("identity", "kubernetes"), ("disk_dir", "mnt")], &[], "not an absolute path"),
            (&[("identity", "kubernetes"), ("token_keys", "http://x")], &[], "neither an https://"),
        ] {
            let why = read(given, buckets).unwrap_err();
            assert!(why.contains(said), "{why}");
        }
    }
}
