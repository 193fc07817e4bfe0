//! What a store answered, as one sentence with the thing that is wrong and what to do about it.

use std::io;

use super::address::Address;
use crate::error::Error;

/// A store's own word for what is wrong, from the answer's body.
#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Refusal {
    #[serde(default)]
    pub(super) code: String,
    #[serde(default)]
    pub(super) message: String,
}

const DENIED: &str =
    "these credentials may not do that: they need to list, read, write and delete there";

/// What no retry mends: the store's words for it, ours, and whether somebody can mend it while the job runs.
struct Mistake(&'static [&'static str], &'static str, bool);

const MISTAKES: [Mistake; 7] = [
    Mistake(
        &["ExpiredToken", "TokenRefreshRequired"],
        "the credentials have ended, and their source has no others that the store takes: renew them there",
        true,
    ),
    Mistake(
        &["token request", "169.254.169.254", "metadata.google.internal", "CredentialsNotFound"],
        "there are no credentials: neither the environment nor this machine's identity service has any",
        true,
    ),
    Mistake(
        &[
            "NoSuchBucket",
            "ContainerNotFound",
            "InvalidBucketName",
            "The specified bucket does not exist",
        ],
        "there is no such bucket: create it, or correct the address",
        false,
    ),
    Mistake(
        &["RequestTimeTooSkewed", "RequestExpired"],
        "this machine's clock is wrong by more than the store accepts: set it (NTP)",
        true,
    ),
    Mistake(
        &["InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthenticationFailed", "InvalidToken"],
        "the store does not know these credentials: check the access key and its secret",
        true,
    ),
    Mistake(
        &["PermanentRedirect", "AuthorizationHeaderMalformed", "incorrectly configured region"],
        "the bucket is in another region: set aws_region (AWS_REGION) to the bucket's",
        false,
    ),
    Mistake(
        &[
            "AccessDenied",
            "Forbidden",
            "AuthorizationPermissionMismatch",
            "InsufficientAccountPermissions",
        ],
        DENIED,
        true,
    ),
];

const NO_RIGHT: Mistake = Mistake(&[], DENIED, true);

impl Mistake {
    fn told(&self, address: &Address, doing: String) -> Error {
        let why = format!("{} ({})", self.1, address.hint());
        match self.2 {
            // A person's to mend all the same, and said in the same words.
            true => Error::Io {
                what: doing,
                source: io::Error::new(io::ErrorKind::PermissionDenied, Answer(why)),
            },
            false => Error::invalid(format!("could not {doing}: {why}")),
        }
    }
}

/// Turns a store's answer into ours. `doing` is the deed and its object, as in `write b/run/x`.
pub(super) fn explain(address: &Address, doing: String, e: object_store::Error) -> Error {
    use object_store::Error as Theirs;
    let text = chain(&e);
    tracing::debug!("could not {doing}: {text}");
    if let Some(mistake) = mistake(&text) {
        return mistake.told(address, doing);
    }
    match e {
        Theirs::NotFound { .. } => Error::NotFound { what: doing_object(&doing) },
        Theirs::Unauthenticated { .. } | Theirs::PermissionDenied { .. } => {
            NO_RIGHT.told(address, doing)
        }
        Theirs::UnknownConfigurationKey { key, .. } => {
            Error::invalid(format!("{key:?} is no option of {}", address.scheme()))
        }
        other => no_answer(doing, plainly(chain(&other))),
    }
}

/// The same for an answer to a request of our own.
pub(super) fn refused(address: &Address, doing: String, status: u16, refusal: &Refusal) -> Error {
    let Refusal { code, message } = refusal;
    let known = mistake(code).or_else(|| mistake(message));
    // HEAD has no body to say more in.
    let known = known.or(matches!(status, 401 | 403).then_some(&NO_RIGHT));
    match (known, status) {
        (Some(mistake), _) => mistake.told(address, doing),
        (None, 404) => Error::NotFound { what: doing_object(&doing) },
        (None, _) => {
            let text = format!("the store answered {status} {code} {message}");
            Error::Io { what: doing, source: io::Error::other(Answer(text.trim_end().into())) }
        }
    }
}

/// What the deed was done to: `read b/run/x` is about `b/run/x`.
fn doing_object(doing: &str) -> String {
    doing.split_once(' ').map_or(doing, |(_, object)| object).into()
}

fn mistake(text: &str) -> Option<&'static Mistake> {
    MISTAKES.iter().find(|Mistake(words, ..)| words.iter().any(|word| text.contains(word)))
}

/// Its causes without repeating what a message already says.
pub(super) fn chain(e: &(dyn std::error::Error + 'static)) -> String {
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(next) = cause {
        let more = next.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = next.source();
    }
    text
}

#[derive(Debug)]
struct Answer(String);

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Answer {}

/// Nobody there: that is all there is to say. What else went wrong is told in the library's words.
fn plainly(text: String) -> String {
    let nobody =
        [("Connection refused", "nothing listens there"), ("dns error", "it has no address")];
    let known = nobody.iter().find(|(words, _)| text.contains(words));
    let Some((_, why)) = known else { return text };
    let url = text
        .split("://")
        .nth(1)
        .and_then(|rest| rest.split(['/', ' ']).next())
        .unwrap_or("the store");
    format!("{url} does not answer: {why}; is the endpoint right?")
}

/// A request that had no answer.
pub(super) fn no_answer(doing: String, why: String) -> Error {
    Error::Io { what: doing, source: io::Error::other(Answer(why)) }
}
