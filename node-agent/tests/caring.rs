//! `verify`, `restore`, `pin`, `gc`.

#![allow(clippy::unwrap_used)] // In helpers of tests, as in tests.

mod common;

use std::{
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use common::{Place, find, flip, model};
use tierkeep::{begin::Begin, names::Step, reader::Reader, restore::decide::Wish};

fn two_ranks() -> Place {
    let place = Place::new();
    place.train(2, &[10, 20, 30], &Begin::default(), model);
    place
}

fn rollback_to(step: u64) -> Begin {
    let wish = Wish { step: Some(Step(step)), ..Wish::default() };
    Begin { wish, rollback: true, ..Begin::default() }
}

#[test]
fn verify_reads_every_copy_and_finds_nothing_wrong() {
    let place = two_ranks();
    let ran = place.on("verify", &[]).ok();
    // Step 30 lies in RAM and on disk.
    ran.says("step 10 of attempt 1: good, 8.0 MiB read")
        .says("step 30 of attempt 1: good, 16.0 MiB");
    assert!(ran.err.contains("3 checkpoints and 1 attempt record read"), "{ran:?}");
    let json = place.on("verify", &["--step", "20", "--json"]).ok().json();
    assert_eq!(json["good"], true);
    assert_eq!(json["steps"].as_array().unwrap().len(), 1);
    place.on("verify", &["--step", "21"]).fails(3, "step 21");
}

#[test]
fn verify_names_file_and_chunk_of_each_damage() {
    let kinds: [(&str, &[&str], u64, &str); 5] = [
        ("payload", &["00030/", "rank-000001-", ".safetensors"], (4 << 20) + 7, "chunk 1 of 2"),
        ("header", &["00030/", "rank-000000-", ".safetensors"], 20, "chunk 0 of 2"),
        ("manifest", &["00030/", "rank-000000.json"], 300, "not the manifest that was sealed"),
        ("seal", &["00030/", "CHECKPOINT.json"], 40, "its checksum is"),
        ("record", &["attempts", "00000001.json"], 90, "its checksum is"),
    ];
    for (kind, parts, byte, why) in kinds {
        let place = two_ranks();
        let file = place.file(parts);
        flip(&file, byte);
        let ran = place.on("verify", &[]).fails(4, "1 damaged file found");
        ran.says(&format!("damage (disk): {}: ", file.display())).says(why);
        let json = place.on("verify", &["--json"]).json();
        let all = [&json["records"]["findings"], &json["steps"][2]["findings"]];
        let found = all.iter().flat_map(|f| f.as_array().unwrap());
        let found: Vec<_> = found.filter(|f| f["gravity"] == "damage").collect();
        assert_eq!(found.len(), 1, "{kind}: {json:#}");
        assert_eq!(found[0]["file"], file.to_str().unwrap());
        assert_eq!(found[0]["tier"], "disk");
        assert_eq!(json["steps"][2]["restorable"], true, "RAM has it too: {json:#}");
        place.wipe_ram();
        let json = place.on("verify", &["--json"]).json();
        let restorable = matches!(kind, "seal" | "record");
        assert_eq!(json["steps"][2]["restorable"], restorable, "{kind}: {json:#}");
    }
}

#[test]
fn verify_finds_a_flipped_bit_anywhere_in_any_file() {
    let place = Place::new();
    place.train(1, &[1], &Begin::default(), |_, _| {
        vec![common::whole("model/w", tierkeep::state::dtype::Dtype::U8, &[500], |i| i as u8)]
    });
    place.wipe_ram();
    for parts in [
        &["00001/", ".safetensors"][..],
        &["00001/", "rank-000000.json"],
        &["CHECKPOINT.json"],
        &["attempts", ".json"],
    ] {
        let file = place.file(parts);
        let len = std::fs::metadata(&file).unwrap().len();
        for byte in (0..len).step_by(41).chain([len - 1]) {
            flip(&file, byte);
            let ran = place.on("verify", &[]);
            assert_eq!(ran.code, 4, "byte {byte} of {}: {ran:?}", file.display());
            assert!(ran.out.contains(file.to_str().unwrap()), "byte {byte}: {ran:?}");
            flip(&file, byte);
        }
    }
    place.on("verify", &[]).ok();
}

#[test]
fn verify_names_what_is_gone_and_what_does_not_belong() {
    let place = two_ranks();
    place.wipe_ram();
    let manifest = place.file(&["00030/", "rank-000001.json"]);
    std::fs::remove_file(&manifest).unwrap();
    std::fs::remove_file(place.file(&["00020/", "rank-000000-", ".safetensors"])).unwrap();
    let ran = place.on("verify", &[]);
    assert_eq!(ran.code, 4, "{ran:?}");
    ran.says("rank-000001.json: it is missing, and the seal names it")
        .says("no good manifest names it")
        .says(".safetensors: it is missing")
        .says("step 30 of attempt 1: damaged, not restorable")
        .says("step 10 of attempt 1: good");
    // A shard of another step in this one's place.
    std::fs::copy(place.file(&["00010/", "rank-000001.json"]), &manifest).unwrap();
    place.on("verify", &["--step", "30"]).says("not the manifest that was sealed");
    std::fs::remove_file(place.file(&["attempts", ".json"])).unwrap();
    place.on("verify", &["--step", "10"]).says("00000001.json: it is missing, its copy is there");
    std::fs::remove_file(place.file(&["attempts", ".copy"])).unwrap();
    place.on("verify", &["--step", "10"]).says("00000001.json: it is missing, and step 10");
}

#[test]
fn a_copy_that_a_live_job_retired_while_it_was_read_is_not_damage() {
    let place = two_ranks();
    // The slot is being filled anew, and its manifest goes while its bytes are read.
    flip(&find(place.ram(), &["00030/", "rank-000001-", ".safetensors"]), 4 << 20);
    let manifest = find(place.ram(), &["00030/", "rank-000001.json"]);
    let reader = Reader::open(&place.run(), Some(place.ram())).unwrap();
    let (records, found) = tierkeep::verify::verify_records(&reader).unwrap();
    let run_id = records.good.last().map(|r| r.run_id);
    let newest = found.last().unwrap();
    let still = tierkeep::verify::verify(
        &reader,
        newest,
        run_id.as_ref(),
        tierkeep::verify::Depth::Bytes,
        &|_| {},
    );
    assert!(!still.is_good());
    let first = find(place.ram(), &["00030/", "rank-000000-", ".safetensors"]);
    let first = std::fs::metadata(first).unwrap().len();
    let read = AtomicU64::new(0);
    let verdict = tierkeep::verify::verify(
        &reader,
        newest,
        run_id.as_ref(),
        tierkeep::verify::Depth::Bytes,
        &|bytes| {
            if read.fetch_add(bytes, Ordering::Relaxed) + bytes > first {
                let _ = std::fs::remove_file(&manifest);
            }
        },
    );
    assert!(verdict.is_good(), "{verdict:#?}");
    assert!(verdict.findings[0].why.contains("retired"), "{verdict:#?}");
}

#[test]
fn a_stray_file_with_the_name_of_a_step_hides_nothing() {
    let place = two_ranks();
    std::fs::File::create(place.run().join("00000000000000000040")).unwrap();
    std::fs::File::create(place.run().join("00000000000000000030/00000009-00000000")).unwrap();
    assert_eq!(place.on("ls", &["--json"]).ok().json()["resume"]["step"], 30);
    place.on("verify", &[]).ok();
    place.on("gc", &["--keep-last", "1"]).ok();
}

#[test]
fn verify_clears_the_marks_of_a_step_that_is_good() {
    let place = two_ranks();
    std::fs::create_dir(place.run().join("bad")).unwrap();
    let mark = place.run().join("bad/30-1-1.json");
    std::fs::File::create(&mark).unwrap();
    place.on("ls", &[]).ok().says("marked bad by rank 1");
    assert_eq!(place.on("ls", &["--json"]).json()["resume"]["step"], 20);
    let payload = place.file(&["00030/", "rank-000001-", ".safetensors"]);
    flip(&payload, 9);
    place.on("verify", &[]).fails(4, "1 damaged file");
    assert!(mark.exists(), "it is not good yet");
    flip(&payload, 9);
    let ran = place.on("verify", &[]).ok();
    assert!(ran.err.contains("cleared the mark that rank 1 left"), "{ran:?}");
    assert!(!mark.exists());
    assert_eq!(place.on("ls", &["--json"]).json()["resume"]["step"], 30);
}

/// Every shard of a step, byte by byte, as another directory has it.
fn assert_same(a: &Path, b: &Path, step: &str) {
    for name in ["rank-000000.json", "rank-000001.json", "CHECKPOINT.json"] {
        let read = |root| std::fs::read(find(root, &[step, name])).unwrap();
        assert_eq!(read(a), read(b), "{name}");
    }
    for rank in ["rank-000000-", "rank-000001-"] {
        let read = |root| std::fs::read(find(root, &[step, rank, ".safetensors"])).unwrap();
        assert_eq!(read(a), read(b), "{rank}");
    }
}

#[test]
fn restore_copies_a_checkpoint_that_a_job_can_resume_from() {
    let place = two_ranks();
    let to = place.root().join("copies/elsewhere");
    let to_text = to.to_str().unwrap();
    // A copy that died after the payload of rank 0 and left it without a manifest.
    let ran = place.on("restore", &["--to", to_text, "--step", "20"]).ok();
    ran.says("step 20 of attempt 1: 2 shards, 8.0 MiB copied to");
    assert_same(&place.run(), &to, "00020/");
    place.tierkeep(&["verify", to_text]).ok();
    let reader = Reader::open(&to, Some(place.ram())).unwrap();
    assert_eq!(reader.choose(&Wish::default()).unwrap().0.step, Step(20));
    // Again: nothing is written twice.
    let json = place.on("restore", &["--to", to_text, "--step", "20", "--json"]).ok().json();
    assert_eq!(json["present_ranks"], serde_json::json!([0, 1]));
    // What was interrupted is finished.
    std::fs::remove_file(find(&to, &["CHECKPOINT.json"])).unwrap();
    std::fs::remove_file(find(&to, &["rank-000001.json"])).unwrap();
    let json = place.on("restore", &["--to", to_text, "--step", "20", "--json"]).ok().json();
    assert_eq!(json["written_ranks"], serde_json::json!([1]));
    assert_same(&place.run(), &to, "00020/");
    let ckpt = {
        let mut config = tierkeep::config::Config::new(&to).unwrap();
        config.ram_root = place.ram().into();
        config.world = 2;
        config.savers = vec![0, 1];
        tierkeep::checkpointer::Checkpointer::open(config).unwrap()
    };
    let found = ckpt.begin(&Begin::default()).unwrap().expect("a checkpoint");
    assert_eq!(found.step(), Step(20));
    let ran = place.on("restore", &["--to", to_text]);
    ran.fails(5, "owned by live process");
}

#[test]
fn restore_takes_the_good_copy_and_refuses_other_peoples_places() {
    let place = two_ranks();
    flip(&place.file(&["00030/", "rank-000000-", ".safetensors"]), 4 << 20);
    let to = place.root().join("copy");
    place.on("restore", &["--to", to.to_str().unwrap()]).ok();
    place.tierkeep(&["verify", to.to_str().unwrap()]).ok();
    place.wipe_ram();
    let lost = place.root().join("lost");
    place.on("restore", &["--to", lost.to_str().unwrap(), "--step", "30"]).fails(4, "rank 0");
    place.on("verify", &["--step", "30"]).fails(4, "1 damaged file");

    let other = two_ranks();
    let theirs = other.run();
    place
        .on("restore", &["--step", "20", "--to", theirs.to_str().unwrap()])
        .fails(1, "holds another run");
    let busy = place.root().join("busy");
    std::fs::create_dir_all(busy.join("photos")).unwrap();
    place
        .on("restore", &["--step", "20", "--to", busy.to_str().unwrap()])
        .fails(1, "is not empty and holds no run");
    place.on("restore", &["--step", "20", "--to", "/tmp/a b"]).fails(1, "run name");
    place.on("restore", &["--step", "99", "--to", "/tmp/x"]).fails(3, "step 99");
}

#[test]
fn restore_onto_its_own_run_brings_ram_to_disk() {
    let place = two_ranks();
    std::fs::remove_dir_all(place.run().join("00000000000000000030")).unwrap();
    let run = place.run();
    place.on("restore", &["--to", run.to_str().unwrap()]).ok();
    place.wipe_ram();
    assert_eq!(place.on("ls", &["--json"]).ok().json()["resume"]["step"], 30);
    place.on("verify", &[]).ok();
}

#[test]
fn pin_keeps_a_step_from_gc() {
    let place = two_ranks();
    place.wipe_ram();
    place.on("pin", &["10"]).ok().says("step 10 of attempt 1 is pinned");
    place.on("ls", &[]).ok().says("sealed, pinned");
    place.on("pin", &["15"]).fails(3, "step 15");
    place.on("pin", &["20", "--remove"]).fails(3, "step 20 is not pinned");

    let before = place.on("ls", &["--json"]).ok().out;
    let ran = place.on("gc", &["--keep-last", "1", "--dry-run"]).ok();
    ran.says("would delete step 20 of attempt 1 (8.0 MiB): 1 newer ones are kept");
    assert_eq!(place.on("ls", &["--json"]).ok().out, before);
    let json = place.on("gc", &["--keep-last", "1", "--json"]).ok().json();
    assert_eq!(json["victims"].as_array().unwrap().len(), 1);
    let steps = |place: &Place| {
        let json = place.on("ls", &["--json"]).ok().json();
        let steps = json["steps"].as_array().unwrap().iter();
        steps.map(|s| s["step"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(steps(&place), [10, 30]);
    place.on("pin", &["10", "--remove"]).ok();
    place.on("gc", &["--keep-last", "1"]).ok().says("deleted step 10");
    assert_eq!(steps(&place), [30]);
    let ran = place.on("gc", &["--keep-last", "1"]).ok();
    assert!(ran.err.contains("nothing to delete"), "{ran:?}");
    let staging = place.run().join("_staging");
    let left = std::fs::read_dir(&staging).map_or(0, Iterator::count);
    assert_eq!(left, 0, "bytes of deleted steps are given back");
    place.on("verify", &[]).ok();
}

#[test]
fn gc_leaves_abandoned_branches_until_asked_and_then_takes_only_them() {
    let place = two_ranks();
    place.train(2, &[11, 12], &rollback_to(10), model);
    place.wipe_ram();
    place.on("ls", &[]).ok().says("sealed, abandoned");
    place.on("gc", &[]).ok();
    let ran = place.on("gc", &["--abandoned"]).ok();
    ran.says("deleted step 20 of attempt 1").says("attempt 1 was abandoned");
    let json = place.on("ls", &["--json"]).ok().json();
    let left: Vec<_> =
        json["steps"].as_array().unwrap().iter().map(|s| s["step"].clone()).collect();
    assert_eq!(left, [10, 11, 12]);
}

#[test]
fn gc_does_not_touch_ram_and_a_live_job_keeps_what_it_writes() {
    let place = two_ranks();
    let ram = std::fs::read_dir(place.ram()).unwrap().flatten();
    let ram = ram.map(|e| e.path()).find(|p| p.is_dir()).unwrap();
    place.tierkeep(&["gc", ram.to_str().unwrap()]).fails(1, "is a ram tier");
    let ranks = [place.open(0, 2), place.open(1, 2)];
    for ckpt in &ranks {
        ckpt.begin(&Begin::default()).unwrap();
    }
    let json = place.on("gc", &["--keep-last", "1", "--json"]).ok().json();
    assert_eq!(json["live"], true);
    assert_eq!(json["victims"].as_array().unwrap().len(), 2, "what it resumed from stays: {json}");
    assert_eq!(place.on("ls", &["--json"]).ok().json()["resume"]["step"], 30);
}
