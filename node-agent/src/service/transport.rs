//! How an agent talks to others: certificates, or plain text by name, connections and a limit. Where a
//! value was given, and which one counts, is `settings`' business.

use std::sync::Arc;

use bytesize::ByteSize;

use super::settings::{Given, wrong};
use crate::{
    fail::{Failure, USAGE},
    mesh::{self, Tls, TlsFiles},
};

/// What certificates are for, unless another name is given.
const DEFAULT_NAME: &str = "tierkeep";

/// More of them help nobody.
const CONNECTIONS_MAX: usize = 64;

/// For an agent that gossips. `last`: the value of a key that counts.
pub(super) fn settings<'a>(
    last: &impl Fn(&str) -> Option<&'a Given>,
) -> Result<mesh::Settings, Failure> {
    Ok(mesh::Settings {
        tls: tls(last)?.map(Arc::new),
        connections: match last("peer_connections") {
            None => 4,
            Some(given) => {
                let number = given.text.parse().ok();
                number.filter(|n| (1..=CONNECTIONS_MAX).contains(n)).ok_or_else(|| {
                    let why = format!("it is not a number from 1 to {CONNECTIONS_MAX}");
                    wrong("peer_connections", given, &why, "as in 4")
                })?
            }
        },
        rate: match last("peer_rate") {
            None => None,
            Some(given) if matches!(given.text.as_str(), "off" | "none") => None,
            Some(given) => {
                let size = given.text.parse::<ByteSize>().ok().map(|size| size.as_u64());
                Some(size.filter(|size| *size > 0).ok_or_else(|| {
                    let why = "it is not a number of bytes a second";
                    wrong("peer_rate", given, why, "as in 1GiB, or off")
                })?)
            }
        },
    })
}

fn tls<'a>(last: &impl Fn(&str) -> Option<&'a Given>) -> Result<Option<Tls>, Failure> {
    let insecure = match last("insecure") {
        None => None,
        Some(given) => match given.text.as_str() {
            "true" => Some(given),
            "false" => None,
            _ => return Err(wrong("insecure", given, "it is neither true nor false", "")),
        },
    };
    let files: Vec<_> = ["tls_cert", "tls_key", "tls_ca"].map(|key| (key, last(key))).into();
    let given = files.iter().find_map(|(key, given)| given.map(|given| (*key, given)));
    match (insecure, given) {
        (Some(insecure), Some((key, _))) => {
            let why = format!("there is {key} as well");
            return Err(wrong("insecure", insecure, &why, "one of the two"));
        }
        (Some(_), None) => return Ok(None),
        (None, None) => {
            return Err(Failure::own(
                USAGE,
                "tls_cert: agents show each other certificates",
                "give tls_cert, tls_key and tls_ca; insecure = true goes without, in plain text",
            ));
        }
        (None, Some(_)) => {}
    }
    let file = |key: &str| {
        let given = last(key).map(|given| given.text.clone().into());
        given.ok_or_else(|| {
            let why = format!("{key}: a certificate has three files");
            Failure::own(USAGE, why, "tls_cert, its key tls_key, and the authority's tls_ca")
        })
    };
    let files = TlsFiles {
        cert: file("tls_cert")?,
        key: file("tls_key")?,
        ca: file("tls_ca")?,
        name: last("tls_name").map_or_else(|| DEFAULT_NAME.into(), |given| given.text.clone()),
    };
    let hint = "files in PEM; the certificate is for the name in tls_name";
    Tls::load(files).map(Some).map_err(|why| Failure::own(USAGE, format!("tls_cert: {why}"), hint))
}

/// In the order of the keys.
pub(super) fn words(settings: Option<&mesh::Settings>) -> [String; 7] {
    let none = || "-".to_owned();
    let Some(settings) = settings else { return std::array::from_fn(|_| none()) };
    let rate = settings.rate.map_or_else(|| "off".into(), |rate| format!("{rate} bytes a second"));
    let (connections, insecure) = (settings.connections.to_string(), settings.tls.is_none());
    let [cert, key, ca, name] = match &settings.tls {
        None => std::array::from_fn(|_| none()),
        Some(tls) => {
            let files = tls.files();
            [&files.cert, &files.key, &files.ca]
                .map(|path| path.display().to_string())
                .into_iter()
                .chain([files.name.clone()])
                .collect::<Vec<_>>()
                .try_into()
                .unwrap_or_else(|_| std::array::from_fn(|_| none()))
        }
    };
    [cert, key, ca, name, insecure.to_string(), rate, connections]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(list: &[(&str, &str)]) -> Result<mesh::Settings, String> {
        let given: Vec<_> = list.iter().map(|(key, text)| (*key, Given::of(text))).collect();
        let last = |key: &str| given.iter().rev().find(|(k, _)| *k == key).map(|(_, given)| given);
        settings(&last).map_err(|failure| match failure {
            Failure::Own { why, .. } => why,
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn plain_text_is_asked_for_by_name() {
        let plain = with(&[("insecure", "true"), ("peer_rate", "1GiB"), ("peer_connections", "2")]);
        let plain = plain.unwrap();
        assert!(plain.tls.is_none());
        assert_eq!((plain.rate, plain.connections), (Some(1 << 30), 2));
        let refused = |list: &[(&str, &str)]| with(list).unwrap_err();
        assert!(refused(&[]).contains("agents show each other certificates"));
        assert!(refused(&[("insecure", "false")]).contains("show each other certificates"));
        assert!(refused(&[("insecure", "yes")]).contains("neither true nor false"));
        assert!(refused(&[("insecure", "true"), ("tls_ca", "/x")]).contains("tls_ca as well"));
        assert!(refused(&[("tls_cert", "/x")]).contains("tls_key: a certificate has three files"));
        let all = [("tls_cert", "/x.pem"), ("tls_key", "/y.pem"), ("tls_ca", "/z.pem")];
        assert!(refused(&all).contains("/x.pem"), "{}", refused(&all));
        assert!(refused(&[("insecure", "true"), ("peer_rate", "0")]).contains("bytes a second"));
        assert!(refused(&[("insecure", "true"), ("peer_connections", "0")]).contains("1 to 64"));
    }
}
