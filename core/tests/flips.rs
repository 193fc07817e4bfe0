//! One flipped bit at any offset of any file of a checkpoint is found, by restore and by verify.
//! `TIERKEEP_FLIPS` says how many offsets of each file (default 40, and every byte of small files'
//! first and last 64).
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout)] // Tests.

mod common;

use std::path::Path;

use common::{Model, Places, close, files, flip, train};
use tierkeep::{
    Error,
    names::Rank,
    reader::Reader,
    restore::decide::Wish,
    verify::{Gravity, verify_records},
};

const TENSORS: [usize; 3] = [(4 << 20) + 24, 700, 13];

/// What a reader gets: `None` where damage was found and nothing good is left.
fn load(places: &Places) -> Result<Option<u64>, Error> {
    let reader = Reader::open(&places.destination(), Some(places.ram()))?;
    let (key, ..) = match reader.choose(&Wish::default()) {
        Ok(chosen) => chosen,
        Err(e) if e.is_not_found() => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut model = Model::new(0, &TENSORS);
    let shard = reader.shard(&key, Rank(0))?;
    model.read(&shard)?;
    assert!(model.is_at(key.step.0), "wrong bytes were restored");
    Ok(Some(key.step.0))
}

/// What `verify` says, as lines that name the file and the chunks.
fn verify(places: &Places) -> Vec<String> {
    let reader = Reader::open(&places.destination(), Some(places.ram())).unwrap();
    let (records, found) = verify_records(&reader).unwrap();
    let run_id = records.good.first().map(|r| r.run_id);
    let mut findings = records.findings;
    for found in &found {
        findings.extend(
            tierkeep::verify::verify(
                &reader,
                found,
                run_id.as_ref(),
                tierkeep::verify::Depth::Bytes,
                &|_| {},
            )
            .findings,
        );
    }
    let damage = findings.iter().filter(|f| f.gravity == Gravity::Damage);
    damage.map(|f| format!("{} {:?} {}", f.file, f.chunks, f.why)).collect()
}

fn each_flip(path: &Path, mut check: impl FnMut(u64)) {
    let count = std::env::var("TIERKEEP_FLIPS").ok().and_then(|v| v.parse().ok()).unwrap_or(40);
    let bits = std::fs::metadata(path).unwrap().len() * 8;
    let ends = (0..512.min(bits)).chain(bits.saturating_sub(512)..bits).step_by(7);
    let spread = (0..count).map(|i| i * (bits / count).max(1) + (i * 7919) % (bits / count).max(1));
    for bit in ends.chain(spread).filter(|b| *b < bits) {
        flip(path, bit);
        check(bit);
        flip(path, bit);
    }
}

#[test]
fn one_flipped_bit_of_a_lone_checkpoint_is_never_restored() {
    let places = Places::new();
    let ckpt = places.open();
    common::resume(&ckpt, &TENSORS).unwrap();
    train(&ckpt, &TENSORS, [5]);
    close(&ckpt);
    drop(ckpt);
    places.wipe_ram();
    assert_eq!(load(&places).unwrap(), Some(5));
    let root = places.destination();
    let mut tried = Vec::new();
    for file in files(&root).iter().filter(|f| f.to_string_lossy().starts_with("0000")) {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        each_flip(&root.join(file), |bit| match load(&places) {
            // A damaged seal does not make good shards bad; they were checked on their own.
            Ok(Some(5)) if name == "CHECKPOINT.json" => {}
            Ok(None) | Err(Error::Lost { .. } | Error::Damaged { .. }) => {}
            other => panic!("{name}, bit {bit}: {other:?}"),
        });
        each_flip(&root.join(file), |bit| {
            let found = verify(&places);
            assert!(found.iter().any(|f| f.contains(&name)), "{name}, bit {bit}: {found:?}");
            if name.ends_with(".safetensors") {
                let chunk = format!("[{}]", bit / 8 / tierkeep::chunk::CHUNK_BYTES);
                assert!(found.iter().any(|f| f.contains(&chunk)), "bit {bit}: {found:?}");
            }
        });
        tried.push(name);
    }
    for record in files(&root).iter().filter(|f| f.to_string_lossy().starts_with("attempts/")) {
        let name = record.to_string_lossy().into_owned();
        if std::fs::metadata(root.join(record)).unwrap().len() == 0 {
            continue; // A mark: its name is all there is.
        }
        each_flip(&root.join(record), |bit| {
            let found = verify(&places);
            assert!(found.iter().any(|f| f.contains(&name)), "{name}, bit {bit}: {found:?}");
        });
    }
    assert_eq!(tried.len(), 3, "payload, manifest and seal: {tried:?}");
    assert_eq!(load(&places).unwrap(), Some(5));
    assert_eq!(verify(&places), Vec::<String>::new());
}
