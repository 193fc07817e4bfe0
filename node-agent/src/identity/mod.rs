//! Who a trainer's pod is, by the token that its kubelet has put there: a JSON Web Token, signed with a key
//! that the cluster publishes.
//!
//! It owns what a token proves. Where the keys come from is `keys`' business; what follows from a name, the
//! core's.
//!
//! # Invariants
//!
//! - A token counts only where the cluster has signed it, for this agent's audience, for now, and, where it
//!   says so (Kubernetes 1.30 and newer), for a pod of this node.
//! - A key is used with an algorithm of its own kind, and never as a shared secret.
//! - No token is logged, nor any part of one but the names in it once it is known to be true.

mod keys;

use std::path::Path;

use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header, errors::ErrorKind};
use serde::Deserialize;
use tierkeep::{
    Error, Result,
    clock::{Clock, SystemClock},
    host::{Identify, Tenant},
};

use self::keys::Keys;
pub use self::keys::Source;

/// What clocks of nodes may differ by, in seconds.
const LEEWAY_S: u64 = 30;

/// What a service account's token is signed with.
const ALGORITHMS: [Algorithm; 5] =
    [Algorithm::RS256, Algorithm::RS384, Algorithm::RS512, Algorithm::ES256, Algorithm::ES384];

/// Tells trainers apart by the tokens of their service accounts.
#[derive(Debug)]
pub struct Identity {
    keys: Keys,
    audience: String,
    /// This node, as its cluster calls it.
    node: Option<String>,
}

#[derive(Deserialize)]
struct Claims {
    #[serde(rename = "kubernetes.io")]
    bound: Bound,
}

#[derive(Deserialize)]
struct Bound {
    namespace: String,
    serviceaccount: Named,
    node: Option<Named>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

impl Identity {
    /// `copy`: a file where the keys are kept, for a start while `source` is away.
    #[must_use]
    pub fn new(source: Source, copy: &Path, audience: &str, node: Option<&str>) -> Self {
        let keys = Keys::new(source, copy.into());
        Self { keys, audience: audience.into(), node: node.map(String::from) }
    }

    fn key(&self, token: &str) -> Result<(Algorithm, DecodingKey)> {
        let header = decode_header(token).map_err(|e| no_token(&e))?;
        if !ALGORITHMS.contains(&header.alg) {
            let why = format!("a token is signed with {:?}, which no cluster does", header.alg);
            return Err(invalid(why));
        }
        let id = header.kid.ok_or_else(|| invalid("a token does not name its key"))?;
        let key = self.keys.find(&id, SystemClock.monotonic())?;
        DecodingKey::from_jwk(&key).map(|key| (header.alg, key)).map_err(|e| no_token(&e))
    }
}

impl Identify for Identity {
    fn identify(&self, token: &str) -> Result<Tenant> {
        let (algorithm, key) = self.key(token)?;
        let mut validation = Validation::new(algorithm);
        validation.leeway = LEEWAY_S;
        validation.validate_nbf = true;
        validation.set_audience(&[&self.audience]);
        validation.set_required_spec_claims(&["exp", "aud"]);
        let claims = decode::<Claims>(token, &key, &validation).map_err(|e| match e.kind() {
            ErrorKind::ExpiredSignature => invalid(
                "the token has ended: the file where it stands (TIERKEEP_TOKEN_FILE) is not kept up to \
                 date, as that of a projected volume is, or this node's clock is wrong",
            ),
            ErrorKind::InvalidAudience => invalid(format!(
                "the token is for somebody else: the agent's audience is {:?} (token_audience); say so \
                 in the pod's projected volume",
                self.audience
            )),
            ErrorKind::MissingRequiredClaim(claim) => {
                invalid(format!("the token has no {claim:?}: a projected token has"))
            }
            ErrorKind::InvalidSignature => {
                invalid("the token is not signed with the cluster's key of that name")
            }
            _ => no_token(&e),
        })?;
        let Bound { namespace, serviceaccount, node } = claims.claims.bound;
        let tenant = Tenant::new(&namespace, &serviceaccount.name)?;
        match (node, &self.node) {
            (Some(theirs), Some(ours)) if theirs.name != *ours => Err(invalid(format!(
                "the token of {tenant} is for a pod of node {:?}, and this is {ours:?}",
                theirs.name
            ))),
            _ => Ok(tenant),
        }
    }
}

fn invalid(why: impl Into<String>) -> Error {
    Error::Invalid { why: why.into() }
}

fn no_token(e: &jsonwebtoken::errors::Error) -> Error {
    invalid(format!("that is no token of a service account: {e}"))
}

#[cfg(test)]
mod tests;
