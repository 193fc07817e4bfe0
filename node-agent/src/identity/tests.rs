//! Tokens as a cluster signs them, and as others would like to.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // Tests.

use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::{EncodingKey, Header, encode};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use serde_json::{Value, json};

use super::*;

/// What signs, and what a cluster publishes of it.
struct Signer {
    key: KeyPair,
    id: &'static str,
}

impl Signer {
    fn new(id: &'static str) -> Self {
        Self { key: KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap(), id }
    }

    fn published(&self) -> Value {
        use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as url};
        let point = self.key.der_bytes(); // 4, x, y
        let (x, y) = (url.encode(&point[1..33]), url.encode(&point[33..65]));
        json!({ "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": self.id, "x": x, "y": y })
    }

    fn sign(&self, claims: &Value) -> String {
        let header = Header { kid: Some(self.id.into()), ..Header::new(Algorithm::ES256) };
        encode(&header, claims, &EncodingKey::from_ec_der(self.key.serialized_der())).unwrap()
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// As the API server makes one for a projected volume.
fn claims() -> Value {
    let bound = json!({
        "namespace": "team-a",
        "node": { "name": "gpu-1", "uid": "n" },
        "pod": { "name": "trainer-0", "uid": "p" },
        "serviceaccount": { "name": "trainer", "uid": "s" },
    });
    json!({
        "aud": ["tierkeep"], "exp": now() + 3600, "nbf": now(), "iat": now(),
        "iss": "https://kubernetes.default.svc.cluster.local",
        "sub": "system:serviceaccount:team-a:trainer", "kubernetes.io": bound,
    })
}

struct Cluster {
    dir: tempfile::TempDir,
}

impl Cluster {
    fn new(signers: &[&Signer]) -> Self {
        let cluster = Self { dir: tempfile::tempdir().unwrap() };
        cluster.publish(signers);
        cluster
    }

    fn publish(&self, signers: &[&Signer]) {
        let keys: Vec<_> = signers.iter().map(|signer| signer.published()).collect();
        std::fs::write(self.dir.path().join("keys"), json!({ "keys": keys }).to_string()).unwrap();
    }

    fn identity(&self) -> Identity {
        let source = Source::File(self.dir.path().join("keys"));
        Identity::new(source, &self.dir.path().join("copy"), "tierkeep", Some("gpu-1"))
    }
}

fn why(identity: &Identity, token: &str) -> String {
    identity.identify(token).unwrap_err().chain()
}

#[test]
fn a_token_says_whose_a_trainer_is_and_nothing_else_does() {
    let signer = Signer::new("k1");
    let cluster = Cluster::new(&[&signer]);
    let identity = cluster.identity();
    let tenant = identity.identify(&signer.sign(&claims())).unwrap();
    assert_eq!(tenant.to_string(), "team-a/trainer");
    // Older clusters do not say for which node it is.
    let mut old = claims();
    old["kubernetes.io"].as_object_mut().unwrap().remove("node");
    identity.identify(&signer.sign(&old)).unwrap();

    let with = |key: &str, value: Value| {
        let mut claims = claims();
        claims[key] = value;
        signer.sign(&claims)
    };
    let without = |key: &str| {
        let mut claims = claims();
        claims.as_object_mut().unwrap().remove(key);
        signer.sign(&claims)
    };
    for (token, said) in [
        (with("exp", json!(now() - 120)), "has ended"),
        (with("nbf", json!(now() + 120)), "no token of a service account"),
        (with("aud", json!(["vault"])), "audience is \"tierkeep\""),
        (without("exp"), "has no \"exp\""),
        (without("aud"), "has no \"aud\""),
        (without("kubernetes.io"), "no token of a service account"),
        ("a.b.c".into(), "no token of a service account"),
        ("team-a/trainer".into(), "no token of a service account"),
    ] {
        let why = why(&identity, &token);
        assert!(why.contains(said), "{said}: {why}");
    }
    let mut elsewhere = claims();
    elsewhere["kubernetes.io"]["node"]["name"] = json!("gpu-2");
    let refused = why(&identity, &signer.sign(&elsewhere));
    assert!(refused.contains("node \"gpu-2\", and this is \"gpu-1\""), "{refused}");
    let mut climbing = claims();
    climbing["kubernetes.io"]["namespace"] = json!("../team-b");
    assert!(why(&identity, &signer.sign(&climbing)).contains("no name of a namespace"));
}

#[test]
fn what_the_cluster_has_not_signed_is_nobodys() {
    let (signer, other) = (Signer::new("k1"), Signer::new("k1"));
    let cluster = Cluster::new(&[&signer]);
    let identity = cluster.identity();
    assert!(why(&identity, &other.sign(&claims())).contains("not signed with the cluster's key"));
    assert!(why(&identity, &Signer::new("k2").sign(&claims())).contains("does not publish"));
    // Its claims changed after it was signed.
    let good = signer.sign(&claims());
    let mut sly = claims();
    sly["kubernetes.io"]["namespace"] = json!("team-b");
    let (head, rest) = good.split_once('.').unwrap();
    let signature = rest.split_once('.').unwrap().1;
    let forged = signer.sign(&sly);
    let claims_of = forged.split('.').nth(1).unwrap();
    let mixed = format!("{head}.{claims_of}.{signature}");
    assert!(why(&identity, &mixed).contains("not signed with the cluster's key"));
    // Signed with the published key, as if that were a secret.
    let public = EncodingKey::from_secret(signer.key.der_bytes()).unwrap();
    let header = Header { kid: Some("k1".into()), ..Header::new(Algorithm::HS256) };
    let shared = encode(&header, &claims(), &public).unwrap();
    assert!(why(&identity, &shared).contains("HS256, which no cluster does"));
    // Not signed at all.
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as url};
    let none = url.encode(json!({ "alg": "none", "kid": "k1" }).to_string());
    let bare = format!("{none}.{claims_of}.");
    assert!(why(&identity, &bare).contains("no token of a service account"));
}

#[test]
fn a_cluster_that_changes_its_keys_is_asked_again_and_one_that_is_away_is_not_needed() {
    let (first, second) = (Signer::new("k1"), Signer::new("k2"));
    let cluster = Cluster::new(&[&first]);
    let keys = || {
        Keys::new(Source::File(cluster.dir.path().join("keys")), cluster.dir.path().join("copy"))
    };
    let seconds = std::time::Duration::from_secs;
    let known = keys();
    known.find("k1", seconds(0)).unwrap();
    cluster.publish(&[&first, &second]);
    // Whoever shows tokens of keys that are not there makes nobody ask all the time.
    known.find("k2", seconds(1)).unwrap_err();
    known.find("k2", seconds(11)).unwrap();
    // One that was given up is of no use an hour later.
    cluster.publish(&[&second]);
    known.find("k1", seconds(3_600)).unwrap();
    known.find("k1", seconds(3_612)).unwrap_err();
    // Away: those that are known go on.
    std::fs::remove_file(cluster.dir.path().join("keys")).unwrap();
    known.find("k2", seconds(9_000)).unwrap();
    let away = known.find("k3", seconds(9_011)).unwrap_err();
    assert!(away.chain().contains("could not read"), "{}", away.chain());
}
