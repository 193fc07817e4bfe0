//! The one form of every small JSON file: an object whose first member is its own checksum.
//!
//! ```text
//! {"checksum":"1a2b3c4d","format":1,...}\n
//! ```
//!
//! The checksum is the CRC-32 of the whole file with its eight digits as zeros, so one flipped bit
//! anywhere, the digits included, is found.
//!
//! # Invariants
//!
//! - What `seal` made, `open` accepts; with any one bit flipped, `open` refuses.
//! - A file that is too long is refused before it is read into memory.
//! - A newer format and an unknown required feature are errors of their own, not damage.

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// The format that this build writes, and the newest that it reads.
pub(crate) const FORMAT: u32 = 1;
/// Features beyond the base format that this build reads.
pub(crate) const FEATURES: [&str; 3] =
    [crate::manifest::replicated::FEATURE, crate::manifest::BOXES, crate::packed::FEATURE];
/// The longest record that is read: a manifest with 4 million tensors has about 1 GiB.
pub(crate) const RECORD_BYTES_MAX: u64 = 1 << 30;

const HEAD: &[u8] = b"{\"checksum\":\"";
const DIGITS: std::ops::Range<usize> = 13..21;

/// Puts the checksum in front of `body`, which is a JSON object with at least one member.
pub(crate) fn seal(body: &[u8]) -> Vec<u8> {
    assert!(body.len() > 2 && body[0] == b'{', "a record is an object with members");
    let mut text = Vec::with_capacity(body.len() + 32);
    text.extend_from_slice(HEAD);
    text.extend_from_slice(b"00000000\",");
    text.extend_from_slice(&body[1..]);
    text.push(b'\n');
    let crc = format!("{:08x}", crc32fast::hash(&text));
    text[DIGITS].copy_from_slice(crc.as_bytes());
    text
}

/// The object in a record that [`seal`] made, without its checksum.
pub(crate) fn body(record: &[u8]) -> Vec<u8> {
    let members = record.get(DIGITS.end + 2..record.len().saturating_sub(1)).unwrap_or_default();
    [b"{", members].concat()
}

/// Whether a record, if it is one, names the feature among those that a reader must know.
pub(crate) fn requires(bytes: &[u8], feature: &str) -> bool {
    let head: Result<Head, _> = serde_json::from_slice(bytes);
    head.is_ok_and(|head| head.required_features.iter().any(|f| f == feature))
}

/// Checks a record and reads it. `file` is its name in messages.
///
/// # Errors
/// [`Error::Damaged`] or [`Error::NewerFormat`].
pub(crate) fn open<T: DeserializeOwned>(bytes: &[u8], file: &str) -> Result<T> {
    check(bytes).map_err(|why| Error::damaged(file, why))?;
    let head: Head = serde_json::from_slice(bytes)
        .map_err(|e| Error::damaged(file, format!("not a record: {e}")))?;
    if head.format > FORMAT {
        return Err(Error::NewerFormat {
            file: file.into(),
            found: head.format.to_string(),
            known: FORMAT.to_string(),
        });
    }
    if let Some(feature) = head.required_features.iter().find(|f| !FEATURES.contains(&f.as_str())) {
        return Err(Error::NewerFormat {
            file: file.into(),
            found: format!("{FORMAT} with feature {feature:?}"),
            known: format!("{FORMAT} without it"),
        });
    }
    serde_json::from_slice(bytes).map_err(|e| Error::damaged(file, format!("not a record: {e}")))
}

#[derive(serde::Deserialize)]
struct Head {
    format: u32,
    #[serde(default)]
    required_features: Vec<String>,
}

fn check(bytes: &[u8]) -> Result<(), String> {
    if bytes.is_empty() {
        return Err("it is empty".into());
    }
    let (Some(digits), true) = (bytes.get(DIGITS), bytes.starts_with(HEAD)) else {
        return Err("it does not begin with a checksum".into());
    };
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(HEAD);
    hasher.update(b"00000000");
    hasher.update(&bytes[DIGITS.end..]);
    let found = format!("{:08x}", hasher.finalize());
    if found.as_bytes() != digits {
        return Err(format!(
            "its checksum is {found}, it says {}",
            String::from_utf8_lossy(digits)
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, serde::Deserialize)]
    struct Plain {
        format: u32,
        word: String,
    }

    #[test]
    fn what_seal_made_open_accepts_and_with_any_one_bit_flipped_refuses() {
        let text = seal(br#"{"format":1,"word":"hello"}"#);
        let read: Plain = open(&text, "x").unwrap();
        assert_eq!(read, Plain { format: 1, word: "hello".into() });
        for bit in 0..text.len() * 8 {
            let mut bad = text.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let error = open::<Plain>(&bad, "x").unwrap_err();
            assert!(matches!(error, Error::Damaged { .. }), "bit {bit}: {error}");
        }
        for len in 0..text.len() {
            assert!(open::<Plain>(&text[..len], "x").is_err(), "length {len}");
        }
    }

    #[test]
    fn a_newer_format_and_an_unknown_required_feature_are_errors_of_their_own() {
        let newer = seal(br#"{"format":2,"word":"x"}"#);
        assert_eq!(
            open::<Plain>(&newer, "a/b.json").unwrap_err().to_string(),
            "a/b.json has format 2, this tierkeep reads up to 1: upgrade tierkeep"
        );
        let feature = seal(br#"{"format":1,"required_features":["parity"],"word":"x"}"#);
        assert!(matches!(open::<Plain>(&feature, "x").unwrap_err(), Error::NewerFormat { .. }));
    }
}
