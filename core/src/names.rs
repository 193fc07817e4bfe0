//! The words of the design as types, and the only functions that turn them into file names and
//! back.
//!
//! # Invariants
//!
//! - A name read from a disk, a user or a wire becomes a path only through `parse` here.
//! - A listing of step directories sorts by step: twenty digits, and `u64::MAX` has twenty.

use std::fmt;

use crate::error::{Error, Result};

/// Number of completed training steps.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Step(pub u64);

/// A process of the job, as in `torch.distributed` and `jax.process_index`.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rank(pub u32);

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {}", self.0)
    }
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {}", self.0)
    }
}

impl fmt::Debug for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// 128 random bits, written as 32 hex digits: the identity of a run, a process start, a writer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(pub [u8; 16]);

impl Id {
    /// A fresh one from the operating system.
    ///
    /// # Errors
    /// The operating system has no randomness to give.
    pub fn random() -> Result<Self> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|e| Error::Io {
            what: "draw a random id".into(),
            source: std::io::Error::other(e.to_string()),
        })?;
        Ok(Self(bytes))
    }

    /// The first eight hex digits, as they stand in file names.
    #[must_use]
    pub fn short(&self) -> String {
        hex(&self.0[..4])
    }

    /// 32 hex digits, or `None`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 16];
        if text.len() != 32 || !is_hex(text) {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl serde::Serialize for Id {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Id {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("an id has 32 hex digits"))
    }
}

/// One start of the run: its number in the run, and the random id of that process start.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct AttemptRef {
    /// Counts from 1.
    pub number: u32,
    /// Drawn by rank 0 at the start of the process.
    pub id: Id,
}

impl AttemptRef {
    /// `00000007-1a2b3c4d`
    #[must_use]
    pub fn dir(&self) -> String {
        format!("{:08}-{}", self.number, self.id.short())
    }
}

impl fmt::Display for AttemptRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "attempt {}", self.number)
    }
}

impl fmt::Debug for AttemptRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.dir())
    }
}

/// The directory name of an attempt, as found on storage: a number and the head of an id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptDir {
    /// The attempt's number.
    pub number: u32,
    /// The first eight digits of its id.
    pub id_head: String,
}

impl AttemptDir {
    /// `00000007-1a2b3c4d`
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let (number, id_head) = name.split_once('-')?;
        if id_head.len() != 8 || !is_hex(id_head) {
            return None;
        }
        Some(Self { number: digits(number, 8)?, id_head: id_head.into() })
    }

    /// True where `attempt` is the one that this directory belongs to.
    #[must_use]
    pub fn is(&self, attempt: &AttemptRef) -> bool {
        self.number == attempt.number && self.id_head == attempt.id.short()
    }
}

impl fmt::Display for AttemptDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08}-{}", self.number, self.id_head)
    }
}

/// One checkpoint's place in a run's directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CheckpointKey {
    /// The step.
    pub step: Step,
    /// The attempt that saved it.
    pub attempt: AttemptDir,
}

impl CheckpointKey {
    /// The place of `step` of `attempt`.
    #[must_use]
    pub fn new(step: Step, attempt: &AttemptRef) -> Self {
        let attempt = AttemptDir { number: attempt.number, id_head: attempt.id.short() };
        Self { step, attempt }
    }

    /// `00000000000000001000/00000007-1a2b3c4d`
    #[must_use]
    pub fn dir(&self) -> String {
        format!("{}/{}", step_dir(self.step), self.attempt)
    }

    /// A file in that directory.
    #[must_use]
    pub fn file(&self, name: &str) -> String {
        format!("{}/{name}", self.dir())
    }

    /// The shard manifest of `rank`.
    #[must_use]
    pub fn manifest(&self, rank: Rank) -> String {
        self.file(&manifest_name(rank))
    }
}

impl fmt::Display for CheckpointKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of attempt {}", self.step, self.attempt.number)
    }
}

/// The seal: while it exists, the checkpoint exists in this tier.
pub const SEAL: &str = "CHECKPOINT.json";
/// The tombstone: while it exists, the checkpoint does not, whatever else lies beside it.
pub const TOMBSTONE: &str = "DELETED.json";
/// Beside a node's own shards: when it was made, all ranks had theirs, each on its node.
pub const WHOLE: &str = "_whole";
/// The directory of attempt records.
pub const ATTEMPTS: &str = "attempts";
/// The directory of records of ranks that found no good copy.
pub const BAD: &str = "bad";

/// `00000000000000001000`
#[must_use]
pub fn step_dir(step: Step) -> String {
    format!("{:020}", step.0)
}

/// The inverse of [`step_dir`].
#[must_use]
pub fn parse_step_dir(name: &str) -> Option<Step> {
    digits(name, 20).map(Step)
}

/// `rank-000003.json`
#[must_use]
pub fn manifest_name(rank: Rank) -> String {
    format!("rank-{:06}.json", rank.0)
}

/// The inverse of [`manifest_name`].
#[must_use]
pub fn parse_manifest_name(name: &str) -> Option<Rank> {
    digits(name.strip_prefix("rank-")?.strip_suffix(".json")?, 6).map(Rank)
}

/// `rank-000003-1a2b3c4d.safetensors`
#[must_use]
pub fn payload_name(rank: Rank, nonce: &Id) -> String {
    format!("rank-{:06}-{}.safetensors", rank.0, nonce.short())
}

/// `rank-000003-1a2b3c4d.packed`
#[must_use]
pub fn packed_name(rank: Rank, nonce: &Id) -> String {
    format!("rank-{:06}-{}.packed", rank.0, nonce.short())
}

/// The rank in a payload's name, compressed or not, or `None` where the name is not a payload's.
#[must_use]
pub fn parse_payload_name(name: &str) -> Option<Rank> {
    let name = name.strip_prefix("rank-")?;
    let name = name.strip_suffix(".safetensors").or_else(|| name.strip_suffix(".packed"))?;
    let (rank, nonce) = name.split_once('-')?;
    if nonce.len() != 8 || !is_hex(nonce) {
        return None;
    }
    digits(rank, 6).map(Rank)
}

/// `attempts/00000007.json`
#[must_use]
pub fn attempt_file(number: u32) -> String {
    format!("{ATTEMPTS}/{number:08}.json")
}

/// The inverse of the last part of [`attempt_file`].
#[must_use]
pub fn parse_attempt_file(name: &str) -> Option<u32> {
    digits(name.strip_suffix(".json")?, 8)
}

/// A run's name: `[A-Za-z0-9._-]{1,128}`, not only dots, not reserved.
///
/// # Errors
/// [`Error::Invalid`] that says which character or length is wrong.
pub fn check_run_name(name: &str) -> Result<()> {
    let wrong = name.chars().find(|c| !c.is_ascii_alphanumeric() && !"._-".contains(*c));
    if let Some(c) = wrong {
        return Err(Error::invalid(format!(
            "run name {name:?} has {c:?}: only letters, digits, '.', '_' and '-' may be in one"
        )));
    }
    if name.is_empty() || name.len() > 128 {
        return Err(Error::invalid(format!(
            "run name {name:?} has {} characters: it must have 1 to 128",
            name.len()
        )));
    }
    if name.starts_with('.') || name.starts_with('_') {
        return Err(Error::invalid(format!(
            "run name {name:?}: names that begin with '.' or '_' are reserved"
        )));
    }
    Ok(())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

fn digits<T: std::str::FromStr>(text: &str, width: usize) -> Option<T> {
    if text.len() != width || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// `rank 3`, `ranks 3, 5 and 2 more`
pub(crate) fn ranks(list: &[u32]) -> String {
    let shown: Vec<String> = list.iter().take(4).map(ToString::to_string).collect();
    match list.len() {
        1 => format!("rank {}", list[0]),
        n if n <= 4 => format!("ranks {}", shown.join(", ")),
        n => format!("ranks {} and {} more", shown.join(", "), n - 4),
    }
}
