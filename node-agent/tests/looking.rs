//! `ls`, `inspect`, and what they say about places that are not as they should be.

mod common;

use std::process::{Command, Stdio};

use common::{Place, flip, forge, model, replace};
use tierkeep::{begin::Begin, names::Step, restore::decide::Wish};

fn two_ranks() -> Place {
    let place = Place::new();
    place.train(2, &[10, 20, 30], &Begin::default(), model);
    place
}

#[test]
fn ls_shows_what_is_where_and_marks_what_a_resume_takes() {
    let place = two_ranks();
    let ran = place.on("ls", &[]).ok();
    let lines: Vec<&str> = ran.out.lines().collect();
    assert_eq!(lines.len(), 4, "{}", ran.out);
    let words = |line: &str| line.split_whitespace().map(String::from).collect::<Vec<_>>();
    assert_eq!(words(lines[0])[..4], ["STEP", "ATTEMPT", "STATE", "RAM"]);
    assert_eq!(words(lines[1])[..7], ["10", "1", "complete", "-", "2/2", "8.0", "MiB"]);
    assert_eq!(words(lines[3])[..6], ["*", "30", "1", "complete", "2/2", "2/2"]);
    assert!(lines[3].ends_with("a resume takes it, sealed"));
    assert_eq!(ran.err, "");

    let json = place.on("ls", &["--json"]).ok().json();
    assert_eq!(json["resume"], serde_json::json!({"step": 30, "attempt": 1}));
    let steps = json["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 3);
    assert_eq!(steps[2]["tiers"], serde_json::json!({"ram": [0, 1], "disk": [0, 1]}));
    assert_eq!(steps[2]["state"], "complete");
    assert!(steps[2]["saved_unix_ms"].as_u64().unwrap() > 1_700_000_000_000);

    place.on("ls", &["--step", "20"]).ok().says("step 20 of attempt 1\n").says("ram, disk");
    place.on("ls", &["--step", "11"]).fails(3, "step 11 was not found").hints("tierkeep ls");
}

#[test]
fn a_ram_directory_can_be_given_and_disk_is_not_needed() {
    let place = two_ranks();
    let ram = std::fs::read_dir(place.ram()).unwrap().flatten();
    let ram = ram.map(|e| e.path()).find(|p| p.is_dir()).unwrap();
    let json = place.tierkeep(&["ls".as_ref(), ram.as_os_str(), "--json".as_ref()]).ok().json();
    assert_eq!(json["resume"]["step"], 30);
    assert_eq!(json["tiers"].as_array().unwrap().len(), 1);
    assert_eq!(json["tiers"][0]["tier"], "ram");
    // The disk is gone: the destination still names the run.
    std::fs::remove_dir_all(place.run()).unwrap();
    assert_eq!(place.on("ls", &["--json"]).ok().json()["resume"]["step"], 30);
}

#[test]
fn inspect_shows_tensors_values_and_tiers() {
    let place = two_ranks();
    let ran = place.on("inspect", &["--rank", "1"]).ok();
    ran.says("step 30 of attempt 1: complete, a resume takes it, sealed")
        .says("rank 1: 4.0 MiB, in ram, disk")
        .says("model/w    U8     4194309  4.0 MiB\n")
        .says("model/~s1  F32    3x4         48 B\n")
        .says("tags: small")
        .says("metric loss = 0.25")
        .says("lr = 0.001");
    assert!(!ran.out.contains("rank 0"));
    let ran = place.on("inspect", &["--step", "10", "--tensors", "*~s?"]).ok();
    assert!(ran.out.contains("model/~s1") && !ran.out.contains("model/w"));
    let json = place.on("inspect", &["--json"]).ok().json();
    assert_eq!(json["ranks"][1]["tensors"][1]["name"], "model/w");
    assert_eq!(json["ranks"][1]["meta"]["metrics"]["loss"], 0.25);
    assert!(json["ranks"][1]["tree"].is_object());
    place.on("inspect", &["--rank", "7"]).fails(3, "rank 7 of step 30");
    place.on("inspect", &["--step", "7"]).fails(3, "step 7 was not found");
}

#[test]
fn wrong_places_are_said_in_words() {
    let place = two_ranks();
    let missing = place.root().join("nothing");
    place.tierkeep(&["ls", missing.to_str().unwrap()]).fails(3, "nothing").hints("<root>/<run>");
    let file = place.root().join("file");
    std::fs::File::create(&file).unwrap();
    place.tierkeep(&["ls", file.to_str().unwrap()]).fails(1, "is a file");
    place.tierkeep(&["ls", place.root().to_str().unwrap()]).fails(3, "holds no run").hints("/run");
    let ran = place.tierkeep(&["ls"]);
    assert_eq!(ran.code, 2, "{ran:?}");
    assert_eq!(place.on("gc", &["--keep-last", "0"]).code, 2);
    assert_eq!(place.on("gc", &["--keep-every", "5"]).code, 2);
    assert_eq!(place.tierkeep(&["ls", ""]).code, 2);
    for command in ["ls", "inspect", "verify", "restore", "export", "pin", "gc"] {
        let ran = place.tierkeep(&[command, "--help"]).ok();
        ran.says("Exit codes:").says("damage was found").says("--json");
    }
    place.tierkeep(&["--version"]).ok().says(concat!("tierkeep ", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_step_on_an_abandoned_branch_is_found_with_the_flag_of_the_hint() {
    let place = two_ranks();
    let wish = Wish { step: Some(Step(10)), ..Wish::default() };
    place.train(2, &[11], &Begin { wish, rollback: true, ..Begin::default() }, model);
    let ran = place.on("pin", &["30"]).fails(3, "attempt 1 has it, on an abandoned branch");
    let ran = ran.hints("`--attempt 1` takes it");
    assert!(!ran.err.contains("attempt="), "{ran:?}");
    place.on("pin", &["30", "--attempt", "1"]).ok().says("step 30 of attempt 1 is pinned");
}

#[test]
fn no_rights_are_said_in_words() {
    use std::os::unix::fs::PermissionsExt;
    let place = two_ranks();
    let set = |mode| {
        std::fs::set_permissions(place.run(), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    set(0o000);
    let readable = std::fs::read_dir(place.run()).is_ok();
    let ran = place.on("ls", &[]);
    set(0o755);
    if readable {
        eprintln!("skipped: this user may read everything");
        return;
    }
    ran.fails(1, "Permission denied").hints("run it as the user who owns the files");
}

#[test]
fn a_manifest_that_is_cut_short_garbage_or_newer_breaks_its_step_and_no_other() {
    let place = two_ranks();
    place.wipe_ram();
    let at = |step: &str, rank: &str| place.file(&[step, rank, ".json"]);
    let newest = at("00030/", "rank-000001");
    replace(&newest, &std::fs::read(&newest).unwrap()[..100]);
    let ran = place.on("ls", &[]).ok();
    assert!(ran.err.contains("warning: a resume passes over step 30"), "{ran:?}");
    ran.says("30        1  broken");
    assert_eq!(place.on("ls", &["--json"]).json()["resume"]["step"], 20);
    place.on("ls", &["--step", "30"]).ok().says("rank-000001.json is damaged");
    place.on("inspect", &["--step", "30"]).fails(4, "rank 1: no tier has a good copy");
    place.on("restore", &["--step", "30", "--to", "/tmp/x/none"]).fails(4, "rank 1");

    replace(&at("00020/", "rank-000000"), b"\0\xff garbage");
    assert_eq!(place.on("ls", &["--json"]).json()["resume"]["step"], 10);

    // A newer tierkeep would have sealed it so.
    std::fs::remove_file(place.file(&["00010/", "CHECKPOINT.json"])).unwrap();
    forge(&at("00010/", "rank-000001"), "\"format\":1", "\"format\":9");
    let ran = place.on("ls", &[]).fails(1, "has format 9").hints("--upgrade tierkeep");
    ran.says("10        1  broken");
}

#[test]
fn a_damaged_attempt_record_is_named_and_hides_nothing() {
    let place = two_ranks();
    place.wipe_ram();
    flip(&place.file(&["attempts", "00000001.json"]), 200);
    assert_eq!(place.on("ls", &[]).code, 0, "its copy is good");
    flip(&place.file(&["attempts", "00000001.copy"]), 200);
    let ran = place.on("ls", &[]).fails(4, "attempts/00000001.json is damaged");
    ran.hints("tierkeep verify").says("30        1  complete");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let place = two_ranks();
    let mut child = Command::new(env!("CARGO_BIN_EXE_tierkeep"))
        .args(["inspect".as_ref(), place.run().as_os_str(), "--json".as_ref()])
        .env("TIERKEEP_RAM_DIR", place.ram())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    assert_eq!(String::from_utf8_lossy(&ended.stderr), "");
}

#[test]
fn the_doctor_tries_and_leaves_nothing() {
    let place = Place::new();
    let ran = place.on("doctor", &["--need", "1MiB"]).ok();
    ran.says("ok       disk");
    ran.says("ok       memory");
    assert!(ran.err.starts_with("0 errors"), "{ran:?}");
    assert!(!place.run().exists(), "it made the run's directory");
    let ran = place.tierkeep(&["doctor", "--json", "--need", "1 PiB"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    let data: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(data["errors"], 1);
    assert_eq!(data["findings"][0]["level"], "error");
    assert!(data["findings"][0]["fix"].is_string());
    assert_eq!(place.tierkeep(&["doctor", "--need", "much"]).code, 2);
}
