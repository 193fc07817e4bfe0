//! What an upload asks of a store: whole objects and parts, with bodies that are streamed.

use std::{fmt, io};

use async_trait::async_trait;
use bytes::Bytes;
use object_store::path::Path;
use tokio::sync::mpsc;

use super::{
    address::Address,
    explain::{Refusal, explain, no_answer, refused},
};
use crate::error::Error;

/// Bytes on their way, exactly `len` of them. An error in it cuts the request short.
#[derive(Debug)]
pub(super) struct Body {
    pub(super) len: u64,
    pub(super) blocks: mpsc::Receiver<io::Result<Bytes>>,
}

/// What a store calls a part that it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tag(pub(super) String);

/// A part as the store has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    /// From 0.
    pub(super) index: u32,
    pub(super) len: u64,
    pub(super) tag: Tag,
}

/// An object as the store has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) len: u64,
    /// CRC-32 of all its bytes, where the store keeps it.
    pub(super) crc32: Option<u32>,
}

/// An upload that was begun and neither completed nor aborted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unfinished {
    pub(super) to: Path,
    pub(super) id: String,
}

/// A request that did not do what it was to do.
#[derive(Debug)]
pub(super) enum Failure {
    /// The store's answer.
    Refused(u16, Refusal),
    /// There was none, or it broke off.
    NoAnswer(String),
    /// What the library says.
    Library(Box<object_store::Error>),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(status, refusal) => {
                write!(f, "{status} {} {}", refusal.code, refusal.message)
            }
            Self::NoAnswer(why) => f.write_str(why),
            Self::Library(e) => e.fmt(f),
        }
    }
}

impl From<object_store::Error> for Failure {
    fn from(e: object_store::Error) -> Self {
        Self::Library(Box::new(e))
    }
}

impl Failure {
    /// Whether the same request may go well later: the network, and a server that is busy or broken.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::NoAnswer(_) => true,
            Self::Refused(status, refusal) => {
                matches!(status, 408 | 425 | 429 | 500..=599)
                    // Bytes that changed on the way are sent again.
                    || matches!(
                        refusal.code.as_str(),
                        "BadDigest" | "IncompleteBody" | "RequestTimeout" | "SlowDown"
                            | "XAmzContentChecksumMismatch"
                    )
            }
            // It has tried again itself.
            Self::Library(_) => false,
        }
    }

    /// The credentials are no good any more. They are asked for anew: the same request, signed with what
    /// comes then, may go well, once.
    pub(super) fn is_stale(&self) -> bool {
        match self {
            // HEAD has no body to say more in.
            Self::Refused(status, refusal) if refusal.code.is_empty() => {
                matches!(status, 400 | 401 | 403)
            }
            Self::Refused(_, refusal) => is_stale(&refusal.code),
            _ => false,
        }
    }

    /// What is tried again: what may pass, and one refusal of credentials.
    pub(super) fn passes() -> impl FnMut(&Self) -> bool {
        let mut renewed = false;
        move |failure| {
            failure.may_pass() || (failure.is_stale() && !std::mem::replace(&mut renewed, true))
        }
    }

    /// The bytes that came are not those that were sent, by the store's own count.
    pub(super) fn is_bad_digest(&self) -> bool {
        let digests = ["BadDigest", "XAmzContentChecksumMismatch"];
        matches!(self, Self::Refused(_, refusal) if digests.contains(&&*refusal.code))
    }

    /// There is no such upload: it was completed or aborted.
    pub(super) fn is_no_such_upload(&self) -> bool {
        matches!(self, Self::Refused(404, refusal) if refusal.code == "NoSuchUpload")
    }

    pub(super) fn explained(self, address: &Address, doing: String) -> Error {
        match self {
            Self::Refused(status, refusal) => refused(address, doing, status, &refusal),
            Self::NoAnswer(why) => no_answer(doing, why),
            Self::Library(e) => explain(address, doing, *e),
        }
    }
}

/// S3's codes for credentials that it takes no more, or not yet; of files that are being replaced a reader
/// may have half the old and half the new.
pub(super) fn is_stale(code: &str) -> bool {
    matches!(
        code,
        "ExpiredToken"
            | "ExpiredTokenException"
            | "InvalidAccessKeyId"
            | "InvalidToken"
            | "RequestExpired"
            | "RequestTimeTooSkewed"
            | "SignatureDoesNotMatch"
            | "TokenRefreshRequired"
    )
}

/// What this way of speaking to a store can do.
#[async_trait]
pub(super) trait Wire: Send + Sync + fmt::Debug {
    /// Makes an object in one request. `crc`: CRC-32 of the bytes, for the store to check.
    async fn put(&self, to: &Path, body: Body, crc: u32) -> Result<(), Failure>;
    /// Begins an object in parts.
    async fn begin(&self, to: &Path) -> Result<String, Failure>;
    /// Sends one; the same one again replaces it.
    async fn part(
        &self,
        to: &Path,
        id: &str,
        index: u32,
        body: Body,
        crc: u32,
    ) -> Result<Tag, Failure>;
    /// Makes the object appear, of these parts in this order. `crc`: of all bytes.
    async fn complete(&self, to: &Path, id: &str, parts: Vec<Tag>, crc: u32)
    -> Result<(), Failure>;
    /// What lies there; `None`: nothing.
    async fn stat(&self, at: &Path) -> Result<Option<Stat>, Failure>;
    /// Uploads below a path that were begun and not ended; `None` where the store does not tell.
    async fn unfinished(&self, below: &Path) -> Result<Option<Vec<Unfinished>>, Failure>;
    /// The parts of one that the store has.
    async fn parts(&self, to: &Path, id: &str) -> Result<Vec<Stored>, Failure>;
    /// Ends one without an object. One that is not there is success.
    async fn abort(&self, to: &Path, id: &str) -> Result<(), Failure>;
}
