//! Runs that lie in a bucket, and what else may lie there.

use std::{path::Path, time::Duration};

use tierkeep::{
    ErrorKind,
    names::{CheckpointKey, Rank},
    reader::Reader,
    restore::{copy_out::copy_out, decide::Wish, survey::Reach},
    retain::Policy,
    tier::{Tier, object::address::Options},
    upkeep,
};

use crate::{
    common::{Places, SIZES, close, files, resume, train},
    open,
    servers::{self, Place},
};

/// A run with steps 1 to 3 on disk, all copied to a bucket.
fn backed_up() -> (Places, Place) {
    let places = Places::new();
    let mut config = places.config();
    config.keep_last = 3;
    let ckpt = tierkeep::checkpointer::Checkpointer::open(config).expect("open");
    resume(&ckpt, &SIZES).expect("resume");
    train(&ckpt, &SIZES, 1..=3);
    close(&ckpt);
    places.wipe_ram();
    let place = servers::s3();
    let from = Reader::open(&places.destination(), Some(places.ram())).expect("open");
    for info in from.steps().expect("steps") {
        copy(&from, &info.key, &place.url, &place).expect("copy");
    }
    (places, place)
}

fn copy(from: &Reader, key: &CheckpointKey, to: &str, place: &Place) -> tierkeep::Result<()> {
    copy_out(from, key, &[0], Path::new(to), None, &place.options, &|_| {}).map(drop)
}

fn reader(place: &Place) -> Reader {
    Reader::open_with(Path::new(&place.url), Some(Path::new("/nowhere")), &place.options)
        .expect("open")
}

fn resumes_at(place: &Place) -> Option<u64> {
    let view = reader(place).overview().expect("overview");
    assert!(view.trouble.is_empty(), "{:?}", view.trouble);
    view.resume.map(|key| key.step.0)
}

#[test]
fn a_run_goes_to_a_bucket_and_comes_back_bit_for_bit() {
    let (places, place) = backed_up();
    let bucket = reader(&place);
    assert_eq!(resumes_at(&place), Some(3));
    let elsewhere = Places::new();
    for info in bucket.steps().expect("steps") {
        assert!(bucket.shard(&info.key, Rank(0)).expect("shard").verify().is_empty());
        let to = elsewhere.destination();
        let options = Options::new();
        copy_out(&bucket, &info.key, &[0], &to, Some(elsewhere.ram()), &options, &|_| {})
            .expect("copy");
    }
    // What a run is made of, without what its processes left beside it.
    let relative = |places: &Places| {
        let root = places.destination();
        let mut all: Vec<_> = files(&root)
            .into_iter()
            .map(|path| path.strip_prefix(&root).map(Path::to_owned).unwrap_or(path))
            .filter(|path| !path.starts_with("_locks") && !path.starts_with("_staging"))
            .map(|path| (path.clone(), std::fs::read(root.join(path)).expect("read")))
            .collect();
        all.sort();
        all
    };
    let names = |all: &[(std::path::PathBuf, Vec<u8>)]| {
        all.iter().map(|(p, _)| p.clone()).collect::<Vec<_>>()
    };
    let (there, back) = (relative(&places), relative(&elsewhere));
    let there: Vec<_> = there.into_iter().filter(|(path, _)| names(&back).contains(path)).collect();
    assert!(back.len() > 3 * 3, "{:?}", names(&back));
    assert!(there == back, "{:?}, {:?}", names(&there), names(&back));
    let ckpt = elsewhere.open();
    assert_eq!(resume(&ckpt, &SIZES).expect("resume"), 3);
    close(&ckpt);
    // Again to the same place: nothing is written, every byte is read.
    let from = Reader::open(&places.destination(), Some(places.ram())).expect("open");
    for info in from.steps().expect("steps") {
        copy(&from, &info.key, &place.url, &place).expect("copy");
    }
}

#[test]
fn what_else_lies_under_the_prefix_is_left_alone() {
    let (_places, place) = backed_up();
    let tier = open(&place);
    for name in [
        "notes.txt",
        "a b/c.json",
        "attempts/zzz.json",
        "attempts/00000001.json.bak",
        "00000000000000000003/x",
        "00000000000000000003/00000009-01020304/rank-000000.txt",
        "bad/x.json",
        "_pins/x",
        "deep/er/and/deeper",
        "umläut/名前.json",
    ] {
        tier.create(name, b"foreign").expect(name);
    }
    for name in ["//x", "/00000000000000000003//y", "/00000000000000000003/", "/attempts/"] {
        servers::put_raw(&place, name);
    }
    assert_eq!(resumes_at(&place), Some(3));
    let policy =
        Policy { keep_last: 1, every: 1, keep_every: None, keep_hours: None, abandoned: true };
    let bucket = reader(&place);
    let plan = upkeep::plan(&bucket, &policy).expect("plan");
    let steps: Vec<u64> = plan.victims.iter().map(|(v, _)| v.key.step.0).collect();
    assert_eq!(steps, [1, 2], "{plan:?}");
    upkeep::collect(&bucket, &plan, Duration::ZERO).expect("collect");
    assert_eq!(resumes_at(&place), Some(3));
    assert_eq!(reader(&place).steps().expect("steps").len(), 1);
    assert!(tier.open("00000000000000000003/x").is_ok() && tier.open("notes.txt").is_ok());
}

#[test]
fn a_seal_in_a_bucket_whose_shard_is_gone_or_damaged_is_passed_over_by_name() {
    let (_places, place) = backed_up();
    let tier = open(&place);
    let key = |step: u64| {
        let steps = reader(&place).steps().expect("steps");
        steps.into_iter().find(|info| info.key.step.0 == step).expect("step").key
    };
    let newest = key(3);
    let payload =
        reader(&place).shard(&newest, Rank(0)).expect("shard").manifest().payload.file.clone();
    tier.delete(&newest.file(&payload)).expect("delete");
    let view = reader(&place).overview().expect("overview");
    assert_eq!(view.resume.map(|key| key.step.0), Some(2));
    assert!(view.passed_over.iter().any(|why| why.contains("step 3")), "{:?}", view.passed_over);
    let second = key(2);
    tier.delete(&second.manifest(Rank(0))).expect("delete");
    assert_eq!(resumes_at(&place), Some(1));
    let of =
        |step| reader(&place).steps().expect("steps").into_iter().find(|i| i.key.step.0 == step);
    let reach = of(2).expect("step 2").reach;
    assert!(matches!(reach, Reach::Broken(_)), "{reach:?}");
    // One bit, and the bytes are those of the save again once they are written anew.
    let first = key(1);
    let shard = reader(&place).shard(&first, Rank(0)).expect("shard");
    let name = first.file(&shard.manifest().payload.file);
    tier.mend(&name, 4096, &[0xAA; 16]).expect("mend");
    assert_eq!(shard.verify().len(), 1);
    let wish = Wish { step: Some(tierkeep::names::Step(1)), ..Wish::default() };
    assert!(reader(&place).choose(&wish).is_ok(), "damage is found when it is read");
}

#[test]
fn two_runs_do_not_share_a_prefix() {
    let (_places, place) = backed_up();
    let other = Places::new();
    let ckpt = other.open();
    resume(&ckpt, &SIZES).expect("resume");
    train(&ckpt, &SIZES, 7..=7);
    close(&ckpt);
    let from = Reader::open(&other.destination(), Some(other.ram())).expect("open");
    let key = from.steps().expect("steps").pop().expect("a step").key;
    let e = copy(&from, &key, &place.url, &place).expect_err("another run lies there");
    assert!(e.kind() == ErrorKind::Invalid && e.chain().contains("another run"), "{}", e.chain());
    assert_eq!(resumes_at(&place), Some(3));
}
