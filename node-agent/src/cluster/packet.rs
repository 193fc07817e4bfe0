//! Gossip in datagrams that only those who have the cluster's key can make.
//!
//! ```text
//! version u8 | message u64 | part u8 | parts u8 | bytes ... | HMAC-SHA256 of all before, its first 16 bytes
//! ```
//!
//! A message is packed by zstd and cut into parts of [`PART_BYTES`], so that no datagram becomes IP
//! fragments, which many cloud networks drop. A packet that is replayed tells nothing new to whoever
//! heard what it copies: heartbeats and versions in it are not newer. An agent that has just begun can be
//! told old news by somebody who recorded them.
//!
//! # Invariants
//!
//! - Of a packet without a good tag nothing is looked at but its length.
//! - Whoever has the key cannot take more memory than [`UNFINISHED_MAX`] messages of
//!   [`MESSAGE_BYTES_MAX`].

use std::collections::VecDeque;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Bytes of a message in one datagram: with all headers it fits the 1,280 bytes that every IPv6 link
/// carries.
const PART_BYTES: usize = 1_180;

/// The longest message, packed or not. In the longest ones each agent takes its name and some 40 bytes.
const MESSAGE_BYTES_MAX: usize = 255 * PART_BYTES;

/// Messages that are waited for at a time. The oldest goes: datagrams are lost.
const UNFINISHED_MAX: usize = 64;

const VERSION: u8 = 1;
const HEAD_BYTES: usize = 11;
const TAG_BYTES: usize = 16;

/// The longest datagram.
pub(super) const PACKET_BYTES_MAX: usize = HEAD_BYTES + PART_BYTES + TAG_BYTES;

/// What all agents of a cluster know, and nobody else.
#[derive(Clone)]
pub struct Key(Hmac<Sha256>);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// Any bytes; 32 random ones are as good as it gets.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        // For gossip alone, whatever else the key may come to be used for.
        let mut derive = hmac(bytes);
        derive.update(b"tierkeep gossip 1");
        Self(hmac(&derive.finalize().into_bytes()))
    }

    fn tag(&self, bytes: &[u8]) -> Hmac<Sha256> {
        let mut tag = self.0.clone();
        tag.update(bytes);
        tag
    }
}

fn hmac(key: &[u8]) -> Hmac<Sha256> {
    match Hmac::new_from_slice(key) {
        Ok(hmac) => hmac,
        Err(_) => panic!("HMAC takes keys of any length"),
    }
}

/// The datagrams of one message; `None`: it is too long for any.
pub(super) fn pack(key: &Key, message: u64, bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let packed = zstd::bulk::compress(bytes, 1).ok()?;
    if bytes.len() > MESSAGE_BYTES_MAX || packed.len() > MESSAGE_BYTES_MAX {
        return None;
    }
    let parts = u8::try_from(packed.chunks(PART_BYTES).len()).ok()?;
    let datagram = |(part, piece): (u8, &[u8])| {
        let mut datagram = Vec::with_capacity(HEAD_BYTES + piece.len() + TAG_BYTES);
        datagram.push(VERSION);
        datagram.extend(message.to_le_bytes());
        datagram.extend([part, parts]);
        datagram.extend(piece);
        let tag = key.tag(&datagram).finalize().into_bytes();
        datagram.extend(&tag[..TAG_BYTES]);
        datagram
    };
    Some((0..).zip(packed.chunks(PART_BYTES)).map(datagram).collect())
}

/// A message of which parts are missing.
struct Unfinished<From> {
    from: From,
    message: u64,
    parts: Vec<Option<Vec<u8>>>,
}

/// Puts messages together from datagrams.
pub(super) struct Unpacking<From> {
    key: Key,
    /// The oldest first.
    unfinished: VecDeque<Unfinished<From>>,
}

impl<From: PartialEq> Unpacking<From> {
    pub(super) fn new(key: Key) -> Self {
        Self { key, unfinished: VecDeque::new() }
    }

    /// Takes a datagram; the message that it is the last of.
    ///
    /// # Errors
    /// It is a stranger's, or noise: in words.
    pub(super) fn take(
        &mut self,
        from: From,
        datagram: &[u8],
    ) -> Result<Option<Vec<u8>>, &'static str> {
        let body = datagram.len().checked_sub(TAG_BYTES).filter(|n| *n > HEAD_BYTES);
        let (signed, tag) = datagram.split_at(body.ok_or("it is too short")?);
        // In constant time.
        if self.key.tag(signed).verify_truncated_left(tag).is_err() {
            return Err("it was not made with this cluster's key");
        }
        let (head, piece) = signed.split_at(HEAD_BYTES);
        let (&[version, ref message @ .., part, parts], true) = (head, piece.len() <= PART_BYTES)
        else {
            return Err("it is too long");
        };
        if version != VERSION {
            return Err("it is of another version of the protocol");
        }
        let message = u64::from_le_bytes(message.try_into().unwrap_or_default());
        if part >= parts {
            return Err("its part is none of the message's");
        }
        let known = self.unfinished.iter().position(|u| u.from == from && u.message == message);
        let at = known.unwrap_or_else(|| {
            if self.unfinished.len() >= UNFINISHED_MAX {
                self.unfinished.pop_front();
            }
            let parts = vec![None; parts.into()];
            self.unfinished.push_back(Unfinished { from, message, parts });
            self.unfinished.len() - 1
        });
        let all = &mut self.unfinished[at].parts;
        if all.len() != usize::from(parts) {
            return Err("it counts other parts than those before it");
        }
        all[usize::from(part)] = Some(piece.to_vec());
        if all.iter().any(Option::is_none) {
            return Ok(None);
        }
        let whole = self.unfinished.remove(at).map(|u| u.parts).unwrap_or_default();
        let packed: Vec<u8> = whole.into_iter().flatten().flatten().collect();
        let message = zstd::bulk::decompress(&packed, MESSAGE_BYTES_MAX);
        message.map(Some).map_err(|_| "it cannot be unpacked")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that do not pack.
    fn noise(len: usize, seed: u64) -> Vec<u8> {
        let mut state = seed.wrapping_mul(2).wrapping_add(1);
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        };
        (0..len).map(|_| next()).collect()
    }

    fn whole(unpacking: &mut Unpacking<u8>, datagrams: &[Vec<u8>]) -> Option<Vec<u8>> {
        datagrams.iter().filter_map(|d| unpacking.take(1, d).unwrap()).next_back()
    }

    #[test]
    fn messages_of_any_length_come_back_in_any_order_of_their_parts() {
        let key = Key::new(b"key");
        let mut unpacking = Unpacking::new(key.clone());
        for (n, len) in (0..).zip([0, 1, PART_BYTES, 5 * PART_BYTES, 200_000]) {
            for message in [noise(len, 7), vec![3; len]] {
                let mut datagrams = pack(&key, n, &message).unwrap();
                assert!(datagrams.iter().all(|d| d.len() <= PACKET_BYTES_MAX));
                datagrams.reverse();
                let again = datagrams[0].clone();
                datagrams.push(again); // One that came twice.
                datagrams.rotate_left(1);
                assert!(whole(&mut unpacking, &datagrams) == Some(message), "{len} bytes");
            }
        }
        assert!(pack(&key, 1, &noise(MESSAGE_BYTES_MAX + 1, 3)).is_none());
        // Half of each of very many messages: what is kept is bounded, and the next still gets through.
        for n in 100..10_100 {
            let datagrams = pack(&key, n, &noise(2 * PART_BYTES, n)).unwrap();
            assert_eq!(unpacking.take(1, &datagrams[0]), Ok(None));
        }
        assert_eq!(unpacking.unfinished.len(), UNFINISHED_MAX);
        assert!(whole(&mut unpacking, &pack(&key, 5, b"hello").unwrap()).is_some());
    }

    #[test]
    fn what_was_not_made_with_the_key_changes_nothing() {
        let (key, other) = (Key::new(b"key"), Key::new(b"another key"));
        let mut unpacking = Unpacking::new(key.clone());
        for len in 0..2 * PACKET_BYTES_MAX {
            assert!(unpacking.take(1, &noise(len, len as u64)).is_err());
        }
        for datagram in pack(&other, 1, &noise(3000, 1)).unwrap() {
            let refused = unpacking.take(1, &datagram);
            assert_eq!(refused, Err("it was not made with this cluster's key"));
        }
        let good = pack(&key, 1, b"a short message").unwrap().remove(0);
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(unpacking.take(1, &bad).is_err(), "bit {bit}");
        }
        for len in 0..good.len() {
            assert!(unpacking.take(1, &good[..len]).is_err(), "cut at {len}");
        }
        assert!(unpacking.unfinished.is_empty());
        assert_eq!(unpacking.take(1, &good), Ok(Some(b"a short message".to_vec())));
    }

    #[test]
    fn whoever_has_the_key_and_lies_about_parts_is_refused() {
        let key = Key::new(b"key");
        let sealed = |message: u64, part: u8, parts: u8, bytes: &[u8]| {
            let mut d = vec![VERSION];
            d.extend(message.to_le_bytes());
            d.extend([part, parts]);
            d.extend(bytes);
            let tag = key.tag(&d).finalize().into_bytes();
            d.extend(&tag[..TAG_BYTES]);
            d
        };
        let mut unpacking = Unpacking::new(key.clone());
        assert!(unpacking.take(1, &sealed(1, 2, 2, b"x")).is_err());
        assert!(unpacking.take(1, &sealed(1, 0, 0, b"x")).is_err());
        assert!(unpacking.take(1, &sealed(1, 0, 1, &[0; PART_BYTES + 1])).is_err());
        assert_eq!(unpacking.take(1, &sealed(1, 0, 2, b"x")), Ok(None));
        assert!(unpacking.take(1, &sealed(1, 2, 3, b"x")).is_err());
        assert!(unpacking.take(1, &sealed(1, 0, 3, b"x")).is_err());
        assert!(unpacking.take(1, &sealed(2, 0, 1, b"no zstd")).is_err());
        // A bomb: 64 MiB of zeros pack to a few parts.
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 19).unwrap();
        let parts = u8::try_from(bomb.chunks(PART_BYTES).len()).unwrap();
        let mut last = Ok(None);
        for (part, piece) in (0..).zip(bomb.chunks(PART_BYTES)) {
            last = unpacking.take(1, &sealed(3, part, parts, piece));
        }
        assert_eq!(last, Err("it cannot be unpacked"));
    }
}
