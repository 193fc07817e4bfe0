//! Checksums as text: eight hex digits each.

/// One checksum.
pub(crate) mod one {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(crc: &u32, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&format_args!("{crc:08x}"))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
        let text = String::deserialize(d)?;
        super::parse_crc(&text).ok_or_else(|| D::Error::custom("a CRC-32 has 8 hex digits"))
    }
}

/// Many, in one string.
pub(crate) mod many {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use std::fmt::Write as _;

    pub(crate) fn serialize<S: Serializer>(crcs: &[u32], s: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(crcs.len() * 8);
        for crc in crcs {
            let _ = write!(text, "{crc:08x}");
        }
        s.serialize_str(&text)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u32>, D::Error> {
        let text = String::deserialize(d)?;
        let crcs = text
            .as_bytes()
            .chunks(8)
            .map(|digits| std::str::from_utf8(digits).ok().and_then(super::parse_crc));
        crcs.collect::<Option<_>>().ok_or_else(|| D::Error::custom("a CRC-32 has 8 hex digits"))
    }
}

/// Many, in one string, of which some were not taken: eight dashes.
pub(crate) mod some {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use std::fmt::Write as _;

    const NONE: &str = "--------";

    pub(crate) fn serialize<S: Serializer>(crcs: &[Option<u32>], s: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(crcs.len() * 8);
        for crc in crcs {
            let _ = match crc {
                Some(crc) => write!(text, "{crc:08x}"),
                None => text.write_str(NONE),
            };
        }
        s.serialize_str(&text)
    }

    pub(crate) fn deserialize<'de, D>(d: D) -> Result<Vec<Option<u32>>, D::Error>
    where
        D: Deserializer<'de>,
    {
        let text = String::deserialize(d)?;
        let parse = |digits: &[u8]| match std::str::from_utf8(digits).ok()? {
            NONE => Some(None),
            digits => super::parse_crc(digits).map(Some),
        };
        let crcs = text.as_bytes().chunks(8).map(parse);
        crcs.collect::<Option<_>>().ok_or_else(|| D::Error::custom("a CRC-32 has 8 hex digits"))
    }
}

fn parse_crc(text: &str) -> Option<u32> {
    (text.len() == 8 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)))
        .then(|| u32::from_str_radix(text, 16).ok())?
}
