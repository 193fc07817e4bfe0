//! What every tier and every wrapper must do. A tier's test opens it twice over and hands both
//! here.

use crate::{
    error::Result,
    tier::{
        Created, Payload, Tier, TierKind,
        buffer::{AlignedBuf, padded},
        read_record,
    },
};

/// Plain bytes as a payload.
#[derive(Debug)]
pub struct Bytes(pub Vec<u8>);

impl Payload for Bytes {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn block<'a>(
        &'a self,
        offset: u64,
        len: usize,
        scratch: &'a mut AlignedBuf,
    ) -> Result<&'a [u8]> {
        scratch.ensure(len);
        let begin = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = self.0.len().min(begin + len);
        scratch[..end - begin].copy_from_slice(&self.0[begin..end]);
        scratch[end - begin..padded(len)].fill(0);
        Ok(&scratch[..padded(len)])
    }
}

/// Bytes that differ from place to place.
#[must_use]
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = |_| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()[3]
    };
    (0..len).map(next).collect()
}

/// What a server under test cannot do, though the tier relies on it: named in the test of that server, and
/// held against it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// Payloads of several parts.
    Parts,
}

/// Runs the whole contract. `open` opens the same place anew each time; it is empty at first.
///
/// # Panics
/// The tier breaks the contract.
pub fn holds(open: &dyn Fn() -> Box<dyn Tier>) {
    holds_but(open, &[]);
}

/// The same for a server that cannot do everything.
///
/// # Panics
/// The tier breaks the rest of the contract, or can do what it is said to lack: then that is to be said no
/// longer.
pub fn holds_but(open: &dyn Fn() -> Box<dyn Tier>, lacks: &[Lack]) {
    what_was_put_comes_back(open);
    a_put_that_failed_left_nothing(open);
    a_name_is_given_once(open);
    several_parts_become_one(open, lacks.contains(&Lack::Parts));
    a_listing_is_sorted_and_an_absent_directory_is_empty(open);
    deleting_what_is_not_there_is_success(open);
    what_was_mended_comes_back(open);
    an_open_file_outlives_its_name(open);
    names_do_not_leave_the_tier(open);
}

fn payload_name(n: u32) -> String {
    format!("00000000000000000001/00000001-aabbccdd/rank-{n:06}-01020304.safetensors")
}

fn what_was_put_comes_back(open: &dyn Fn() -> Box<dyn Tier>) {
    for (n, len) in (0..).zip([1, 4095, 4096, 4097, 3 << 20, (9 << 20) + 13]) {
        let bytes = pattern(len, u64::from(n) + 1);
        let name = payload_name(n);
        let tier = open();
        let receipt = tier.put(&name, &Bytes(bytes.clone())).expect("put");
        assert_eq!((receipt.tier, receipt.length), (tier.kind(), len as u64));
        drop(tier);
        assert!(
            read_record(&*open(), &name).expect("open") == bytes,
            "{len} bytes came back different"
        );
        // In aligned blocks too, the way a restore reads.
        let tier = open();
        let source = tier.open(&name).expect("open");
        assert!(!source.is_cached(0, len + 1), "bytes that are not there");
        let mut block = AlignedBuf::new(1 << 20);
        for offset in (0..len).step_by(1 << 20) {
            source.read_at(offset as u64, &mut block).expect("read");
            let n = (len - offset).min(1 << 20);
            assert!(block[..n] == bytes[offset..offset + n], "block at {offset} of {len}");
        }
        tier.retire(&name).expect("retire");
        assert!(tier.open(&name).is_err_and(|e| e.is_not_found()));
    }
}

struct Breaks;

impl Payload for Breaks {
    fn len(&self) -> u64 {
        32 << 20
    }
    fn block<'a>(
        &'a self,
        offset: u64,
        len: usize,
        scratch: &'a mut AlignedBuf,
    ) -> Result<&'a [u8]> {
        if offset >= 16 << 20 {
            return Err(crate::Error::Bug("the payload broke off".into()));
        }
        scratch.ensure(len);
        Ok(&scratch[..len])
    }
}

fn a_put_that_failed_left_nothing(open: &dyn Fn() -> Box<dyn Tier>) {
    let tier = open();
    let name = payload_name(77);
    assert!(tier.put(&name, &Breaks).is_err());
    assert!(tier.open(&name).is_err_and(|e| e.is_not_found()));
    tier.put(&name, &Bytes(vec![7; 5])).map(drop).expect("the name is still free");
    tier.delete(&name).expect("delete");
}

fn several_parts_become_one(open: &dyn Fn() -> Box<dyn Tier>, lacks: bool) {
    let tier = open();
    let name = payload_name(9);
    let bytes = pattern((20 << 20) + 4097, 9);
    let put = tier.put(&name, &Bytes(bytes.clone())).map(drop);
    assert_eq!(put.is_err(), lacks, "{put:?}");
    if !lacks {
        let mut read = vec![0; bytes.len()];
        tier.open(&name).expect("open").read_at(0, &mut read).expect("read");
        assert!(read == bytes, "other bytes came back");
        tier.delete(&name).expect("delete");
    }
}

fn a_name_is_given_once(open: &dyn Fn() -> Box<dyn Tier>) {
    let tier = open();
    assert_eq!(tier.create("a/record.json", b"first").expect("create"), Created::New);
    assert_eq!(tier.create("a/record.json", b"second").expect("create"), Created::Exists);
    assert_eq!(read_record(&*tier, "a/record.json").expect("read"), b"first");
    let winners = std::thread::scope(|scope| {
        let racers: Vec<_> = (0..8_u8)
            .map(|n| {
                let tier = open();
                scope.spawn(move || tier.create("a/race.json", &[n; 64]).expect("create"))
            })
            .collect();
        racers.into_iter().filter_map(|r| r.join().ok()).filter(|c| *c == Created::New).count()
    });
    assert_eq!(winners, 1, "create-if-absent has one winner");
    let record = read_record(&*tier, "a/race.json").expect("read");
    assert!(record.len() == 64 && record.iter().all(|b| *b == record[0]), "whole, from one writer");
    let name = payload_name(5);
    tier.put(&name, &Bytes(vec![1; 10])).map(drop).expect("put");
    assert!(tier.put(&name, &Bytes(vec![2; 10])).is_err());
    assert!(tier.put(&name, &Bytes(vec![1; 11])).is_err());
    assert_eq!(read_record(&*tier, &name).expect("read"), [1; 10]);
    tier.put(&name, &Bytes(vec![1; 10])).map(drop).expect("a put that meets its own bytes");
    tier.confirm("a").expect("confirm");
    tier.confirm("nowhere").expect("what is not there is safe");
    tier.delete(&name).expect("delete");
}

fn a_listing_is_sorted_and_an_absent_directory_is_empty(open: &dyn Fn() -> Box<dyn Tier>) {
    let tier = open();
    for name in ["list/b", "list/a", "list/c/d"] {
        tier.create(name, b"x").expect("create");
    }
    let names: Vec<_> =
        tier.list("list").expect("list").into_iter().map(|e| (e.name, e.is_dir)).collect();
    assert_eq!(names, [("a".into(), false), ("b".into(), false), ("c".into(), true)]);
    assert!(tier.list("nowhere").expect("list").is_empty());
}

fn deleting_what_is_not_there_is_success(open: &dyn Fn() -> Box<dyn Tier>) {
    let tier = open();
    tier.delete("nowhere/at-all").expect("delete");
    tier.retire(&payload_name(99)).expect("retire");
    tier.create("full/record", b"x").expect("create");
    tier.delete("full").expect("a directory that is not empty stays");
    assert_eq!(read_record(&*tier, "full/record").expect("read"), b"x");
}

fn what_was_mended_comes_back(open: &dyn Fn() -> Box<dyn Tier>) {
    let tier = open();
    let name = payload_name(6);
    tier.put(&name, &Bytes(vec![1; 9000])).map(drop).expect("put");
    tier.mend(&name, 4096, &[2; 4096]).expect("mend");
    let bytes = read_record(&*open(), &name).expect("read");
    assert!(bytes.len() == 9000 && bytes[4095] == 1 && bytes[4096] == 2 && bytes[8192] == 1);
    tier.delete(&name).expect("delete");
}

fn an_open_file_outlives_its_name(open: &dyn Fn() -> Box<dyn Tier>) {
    let tier = open();
    let bytes = pattern(5 << 20, 3);
    let name = payload_name(8);
    tier.put(&name, &Bytes(bytes.clone())).map(drop).expect("put");
    let source = tier.open(&name).expect("open");
    tier.retire(&name).expect("retire");
    // The next payload of the rank would take a retired file; this one is in use.
    let next = payload_name(8).replace("01020304", "05060708");
    tier.put(&next, &Bytes(pattern(5 << 20, 4))).map(drop).expect("put");
    let mut read = AlignedBuf::new(5 << 20);
    match source.read_at(0, &mut read) {
        // A bucket keeps nothing for who has it open: it says so.
        Err(e) if tier.kind() == TierKind::Object => assert!(e.is_not_found(), "{}", e.chain()),
        read => read.expect("read"),
    }
    let read = &read[..5 << 20];
    assert!(
        tier.kind() == TierKind::Object || read == bytes,
        "a reader saw the next payload's bytes"
    );
    tier.delete(&next).expect("delete");
}

fn names_do_not_leave_the_tier(open: &dyn Fn() -> Box<dyn Tier>) {
    let tier = open();
    for name in ["../x", "a/../../x", "/etc/passwd", "", "a//b", "a/./b", "nul\0"] {
        assert!(tier.create(name, b"x").is_err(), "{name:?} was taken");
        assert!(tier.open(name).is_err(), "{name:?} was opened");
    }
}
