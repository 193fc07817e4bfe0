//! `export`: what other people's readers make of it.

#![allow(clippy::unwrap_used)] // In helpers of tests, as in tests.

mod common;

use std::{path::PathBuf, process::Command};

use common::{Place, Stored, flip, model, part, whole};
use safetensors::SafeTensors;
use tierkeep::{
    begin::Begin,
    state::{dtype::Dtype, replicas::Rule},
};

/// A tensor cut in columns and rows over two ranks, a replicated one, and one that differs.
fn sharded(rank: u32, step: u64) -> Vec<Stored> {
    let half = u64::from(rank) * 1500;
    vec![
        part("model/columns", &[2000, 3000], &[0, half], &[2000, 1500]),
        part("model/rows", &[8, 5], &[u64::from(rank) * 4, 0], &[2, 5]),
        part("model/rows", &[8, 5], &[u64::from(rank) * 4 + 2, 0], &[2, 5]),
        whole("model/same", Dtype::BF16, &[2, 2], |i| i as u8),
        whole("model/a~1b", Dtype::C64, &[], |i| i as u8),
        whole("model/empty", Dtype::F32, &[0, 4], |_| 0),
        whole("seed", Dtype::I64, &[1], move |_| (u64::from(rank) + step) as u8),
    ]
}

fn run(make: fn(u32, u64) -> Vec<Stored>) -> Place {
    let place = Place::new();
    place.train(2, &[5], &Begin::default(), make);
    place
}

fn counted(rows: u64, columns: u64) -> Vec<u8> {
    (0..rows * columns).map(|i| (i % 251) as u8).collect()
}

fn file(place: &Place, name: &str) -> (PathBuf, String) {
    let path = place.root().join(name);
    let text = path.to_str().unwrap().to_owned();
    (path, text)
}

#[test]
fn boxes_of_all_ranks_become_whole_tensors() {
    let place = run(sharded);
    let (path, to) = file(&place, "out.safetensors");
    let ran = place.on("export", &["--to", &to, "--prefix", "model"]).ok();
    ran.says("step 5 of attempt 1: 6 tensors");
    let bytes = std::fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = tensors.names();
    names.sort_unstable();
    assert_eq!(names, ["a/b", "columns", "empty", "rows", "same", "tied"]);
    assert_eq!(tensors.tensor("columns").unwrap().shape(), [2000, 3000]);
    assert!(tensors.tensor("columns").unwrap().data() == counted(2000, 3000));
    assert!(tensors.tensor("tied").unwrap().data() == counted(2000, 3000));
    assert_eq!(tensors.tensor("rows").unwrap().data(), counted(8, 5));
    assert_eq!(tensors.tensor("a/b").unwrap().shape(), [0_usize; 0]);
    assert_eq!(tensors.tensor("empty").unwrap().shape(), [0, 4]);
    // Nothing else is left in the directory, and nothing is overwritten.
    place.on("export", &["--to", &to, "--prefix", "model"]).fails(1, "is there already");
    let left = std::fs::read_dir(place.root()).unwrap().flatten();
    let mut left: Vec<_> = left.map(|e| e.file_name().into_string().unwrap()).collect();
    left.sort();
    assert_eq!(left, ["out.safetensors", "run"]);
}

#[test]
fn ranks_that_differ_are_never_merged() {
    let place = run(sharded);
    let (path, to) = file(&place, "out.safetensors");
    place
        .on("export", &["--to", &to])
        .fails(1, "seed has different bytes on rank 0 and rank 1")
        .hints("--rank N");
    assert!(!path.exists());
    place.on("export", &["--to", &to, "--rank", "1"]).fails(1, "is not whole");
    let one = ["--to", &to, "--rank", "1", "--include", "seed", "--include", "model/same"];
    let json = place.on("export", &[&one[..], &["--json"]].concat()).ok().json();
    assert_eq!(json["ranks"], serde_json::json!([1]));
    assert_eq!(json["tensors"][1]["name"], "seed");
    let bytes = std::fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.tensor("seed").unwrap().data(), [6; 8]);
    assert_eq!(tensors.names().len(), 2);
}

#[test]
fn what_cannot_be_done_is_said() {
    let place = run(model);
    let (_, to) = file(&place, "out.safetensors");
    let (_, other) = file(&place, "out.npz");
    place.on("export", &["--to", &other]).fails(2, "says no format").hints(".safetensors");
    place.on("export", &["--to", &to, "--rank", "4"]).fails(3, "no rank 4");
    place
        .on("export", &["--to", &to, "--include", "nope*"])
        .fails(3, "no tensor that is asked for");
    place.on("export", &["--to", &to, "--step", "6"]).fails(3, "step 6");
    let (_, nowhere) = file(&place, "no/such/dir.pt");
    place.on("export", &["--to", &nowhere, "--rank", "0"]).fails(3, "could not create");
    place.wipe_ram();
    flip(&place.file(&["00005/", "rank-000000-", ".safetensors"]), 4 << 20);
    let (damaged, to) = file(&place, "damaged.safetensors");
    place.on("export", &["--to", &to, "--rank", "0"]).fails(4, "chunk 1").hints("tierkeep verify");
    assert!(!damaged.exists());
}

/// Every dtype that torch has, and a size that needs more than one byte of everything.
fn of_all_types(_: u32, _: u64) -> Vec<Stored> {
    let known = Dtype::all().filter(|d| d.bits() >= 8);
    let mut all: Vec<Stored> =
        known.map(|d| whole(&format!("model/{d}"), d, &[2, 3], |i| (i % 2) as u8)).collect();
    all.push(whole("model/long", Dtype::U8, &[5 << 20], |i| (i % 251) as u8));
    all.push(whole("model/0-d", Dtype::F32, &[], |_| 0x3f));
    all.push(whole("model/none", Dtype::F64, &[0, 3], |_| 0));
    all.push(whole("model/🦀", Dtype::I32, &[1], |_| 1));
    all
}

const LOAD: &str = r#"
import sys, torch, zipfile
path = sys.argv[1]
assert zipfile.ZipFile(path).testzip() is None
for mmap in (False, True):
    t = torch.load(path, weights_only=True, mmap=mmap)
    assert len(t) == 26, sorted(t)
    assert t["long"].shape == (5 << 20,)
    assert torch.equal(t["long"], (torch.arange(5 << 20) % 251).to(torch.uint8))
    assert t["0-d"].shape == () and t["none"].shape == (0, 3)
    assert t["\U0001f980"].item() == 0x01010101
    assert t["BF16"].dtype == torch.bfloat16
    assert t["BOOL"].tolist() == [[False, True, False], [True, False, True]]
    assert t["F8_E4M3"].dtype == torch.float8_e4m3fn and t["U64"].dtype == torch.uint64
    assert t["C32"].dtype == torch.complex32 and t["C128"].shape == (2, 3)
    assert all(x.is_contiguous() for x in t.values())
    assert t["tied"].data_ptr() == t["BOOL"].data_ptr()
    raw = t["I16"].view(torch.uint8).flatten().tolist()
    assert raw == [i % 2 for i in range(12)], raw
    assert all(x.data_ptr() % 8 == 0 for x in t.values())
torch.save(t, path + ".again")
"#;

#[test]
fn torch_loads_it_without_running_code_from_it() {
    let python = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/python");
    let has_torch = Command::new(&python).args(["-c", "import torch"]).output();
    if !has_torch.is_ok_and(|o| o.status.success()) {
        eprintln!("skipped: there is no torch in {}", python.display());
        return;
    }
    let place = Place::new();
    place.train(1, &[5], &Begin::default(), of_all_types);
    let (_, to) = file(&place, "out.pt");
    place.on("export", &["--to", &to, "--prefix", "model"]).ok();
    let loaded = Command::new(python).args(["-c", LOAD, &to]).output().unwrap();
    assert!(loaded.status.success(), "{}", String::from_utf8_lossy(&loaded.stderr));
}

#[test]
fn what_ranks_hold_alike_is_taken_from_whoever_stores_it() {
    let mut place = Place::new();
    place.replicated = vec![Rule { pattern: "model".into(), ranks: vec![0, 1] }];
    place.train(2, &[5], &Begin::default(), |rank, _| {
        vec![
            whole("model/a", Dtype::U8, &[9], |i| i as u8),
            whole("model/b", Dtype::U8, &[9], |i| 2 * i as u8),
            whole("seed", Dtype::U8, &[1], move |_| rank as u8),
        ]
    });
    for rank in ["0", "1"] {
        let (path, to) = file(&place, &format!("{rank}.safetensors"));
        place.on("export", &["--to", &to, "--rank", rank]).ok().says("4 tensors");
        let bytes = std::fs::read(&path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let data = |name: &str| tensors.tensor(name).unwrap().data().to_vec();
        assert_eq!(data("model/a"), (0..9).collect::<Vec<u8>>());
        assert_eq!(data("model/b"), (0..9).map(|i| 2 * i).collect::<Vec<u8>>());
        assert_eq!(data("seed"), [rank.parse::<u8>().unwrap()]);
    }
    let (_, to) = file(&place, "all.safetensors");
    place.on("export", &["--to", &to, "--include", "model/*"]).ok().says("3 tensors");
    let ran = place.on("inspect", &[]).ok();
    ran.says("model/b  U8     9         -  stored by rank 1");
    ran.says("model/a  U8     9         -  stored by rank 0");
    let ran = place.on("inspect", &["--rank", "1", "--json"]).ok();
    let data: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    let other = serde_json::json!([{"name": "model/a", "dtype": "U8", "shape": [9], "rank": 0}]);
    assert_eq!(data["ranks"][0]["stored_by_others"], other);
    place.on("verify", &[]).ok();
}
