//! Bad input gets a clear error; nothing is lost, nothing panics.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout)] // Tests.

mod common;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use common::{Model, Places, SIZES, SMALL, close, files, mount::Mount, resume, train, wait};
use tierkeep::{
    Error, ErrorKind, Hint,
    begin::Begin,
    checkpointer::Checkpointer,
    config::Config,
    names::{Rank, Step},
    reader::Reader,
    restore::{copy_out::copy_out, decide::Wish},
    save::Level,
    tier::{
        Payload,
        buffer::{AlignedBuf, padded},
        object::address::Options,
    },
};

/// A run with steps 1 and 2 on disk and nothing in RAM.
fn two_steps() -> Places {
    let places = Places::new();
    let ckpt = places.open();
    resume(&ckpt, &SMALL).unwrap();
    train(&ckpt, &SMALL, 1..=2);
    close(&ckpt);
    places
}

fn file_of(places: &Places, step: u64, end: &str) -> PathBuf {
    let root = places.destination();
    let all = files(&root);
    let found = all.iter().find(|p| {
        let text = p.to_string_lossy();
        text.starts_with(&format!("{step:020}")) && text.ends_with(end)
    });
    root.join(found.unwrap_or_else(|| panic!("no {end} of step {step}: {all:?}")))
}

/// What a job resumes from, and what it says about what it passed over.
fn resumed(places: &Places) -> (u64, String) {
    let ckpt = places.open();
    let step = resume(&ckpt, &SMALL).unwrap();
    (step, ckpt.attempt().unwrap().passed_over.join("\n"))
}

fn write(path: &Path, bytes: &[u8]) {
    std::fs::remove_file(path).unwrap();
    use std::io::Write;
    std::fs::File::create(path).unwrap().write_all(bytes).unwrap();
}

#[test]
fn a_truncated_empty_or_garbage_manifest_costs_that_step_alone() {
    let good = std::fs::read(file_of(&two_steps(), 2, "rank-000000.json")).unwrap();
    let deep = [b"{\"checksum\":\"00000000\",".as_slice(), &[b'['; 100_000]].concat();
    let lies: Vec<Vec<u8>> = vec![
        vec![],
        good[..good.len() / 2].to_vec(),
        good[..good.len() - 1].to_vec(),
        b"{}".to_vec(),
        b"null\n".to_vec(),
        vec![0xFF; 4096],
        deep,
    ];
    for lie in lies {
        let places = two_steps();
        write(&file_of(&places, 2, "rank-000000.json"), &lie);
        let (step, said) = resumed(&places);
        assert_eq!(step, 1, "{:?}...", &lie[..lie.len().min(40)]);
        assert!(said.contains("rank-000000.json is damaged"), "{said}");
    }
}

/// Puts a member's new value into a manifest and makes its checksum right again: a lie that only
/// the manifest's own rules can find.
fn lie(places: &Places, from: &str, to: &str) {
    let path = file_of(places, 2, "rank-000000.json");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{from} is not in {text}");
    let mut bytes = text.replacen(from, to, 1).into_bytes();
    bytes[13..21].copy_from_slice(b"00000000");
    let crc = format!("{:08x}", crc32fast::hash(&bytes));
    bytes[13..21].copy_from_slice(crc.as_bytes());
    write(&path, &bytes);
    // The seal would find every lie at once; here the manifest stands alone.
    std::fs::remove_file(file_of(places, 2, "CHECKPOINT.json")).unwrap();
}

#[test]
fn a_manifest_that_lies_is_damage() {
    let huge = u64::MAX.to_string();
    let cases = [
        ("\"step\":2", "\"step\":3", "it is of step 3"),
        ("\"rank\":0", "\"rank\":1", "not in its own saver set"),
        ("\"savers\":[0]", "\"savers\":[0,1]", ""),
        ("\"length\":", "\"length\":9", "its manifest says"),
        ("\"chunk_bytes\":4194304", "\"chunk_bytes\":1", "chunks of 1 bytes"),
        ("\"chunk_bytes\":4194304", &format!("\"chunk_bytes\":{huge}"), "chunks of"),
        ("\"shape\":[40000]", &format!("\"shape\":[{huge},{huge}]"), "[18446744073709551615"),
        ("\"shape\":[40000]", "\"shape\":[39999]", "in 40000 bytes"),
        ("\"dtype\":\"U8\"", "\"dtype\":\"Q8\"", "unknown dtype"),
        ("\"name\":\"t1\",\"dtype\"", "\"name\":\"t0\",\"dtype\"", "two tensors are named t0"),
        ("\"file\":\"rank-000000-", "\"file\":\"../../../etc/passwd-", "it names the payload"),
        ("\"kind\":\"shard\"", "\"kind\":\"parity\"", "it is fragment"),
    ];
    for (from, to, why) in cases {
        let places = two_steps();
        lie(&places, from, to);
        let (step, said) = resumed(&places);
        assert_eq!(step, 1, "{from} -> {to}: {said}");
        assert!(said.contains(why), "{from} -> {to}: {said}");
    }
}

/// Gives step 2 the manifest of a build whose chunks have `chunk_bytes`.
fn rechunk(places: &Places, chunk_bytes: usize) {
    let payload = std::fs::read(file_of(places, 2, ".safetensors")).unwrap();
    let text = std::fs::read_to_string(file_of(places, 2, "rank-000000.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let crcs = payload.chunks(chunk_bytes).map(|c| format!("{:08x}", crc32fast::hash(c)));
    let (old, new) = (json["payload"]["chunks"].to_string(), crcs.collect::<String>());
    let from = format!("\"chunk_bytes\":{}", tierkeep::chunk::CHUNK_BYTES);
    let between = r#","algorithm":"crc32","codec":"none","crc":"#;
    let crc = &json["payload"]["crc"];
    lie(
        places,
        &format!("{from}{between}{crc},\"chunks\":{old}"),
        &format!("\"chunk_bytes\":{chunk_bytes}{between}{crc},\"chunks\":\"{new}\""),
    );
}

#[test]
fn chunks_of_another_size_are_read_verified_copied_and_resumed() {
    for chunk_bytes in [4096, 3 * 4096, 1 << 20, 4 << 20, 5 << 20, 64 << 20] {
        let places = Places::new();
        let ckpt = places.open();
        resume(&ckpt, &SIZES).unwrap();
        train(&ckpt, &SIZES, 1..=2);
        close(&ckpt);
        drop(ckpt);
        rechunk(&places, chunk_bytes);
        let reader = Reader::open(&places.destination(), Some(places.ram())).unwrap();
        let (key, savers, _) = reader.choose(&Wish::default()).unwrap();
        assert_eq!(key.step, Step(2));
        let shard = reader.shard(&key, Rank(0)).unwrap();
        assert_eq!(shard.manifest().payload.chunk_bytes, chunk_bytes as u64);
        assert!(shard.verify().is_empty());

        // Blocks of any size, in any order.
        let whole = std::fs::read(file_of(&places, 2, ".safetensors")).unwrap();
        let payload = shard.payload();
        let mut scratch = AlignedBuf::new(1);
        for block_bytes in [4096, 5 * 4096, 4 << 20, 64 << 20] {
            for offset in (0..whole.len()).step_by(block_bytes).rev() {
                let end = whole.len().min(offset + block_bytes);
                let want = padded(end - offset);
                let block = payload.block(offset as u64, want, &mut scratch).unwrap();
                assert!(block.len() == want, "{chunk_bytes}, block {offset}+{block_bytes}");
                let (bytes, rest) = block.split_at(end - offset);
                assert!(
                    bytes == &whole[offset..end],
                    "{chunk_bytes}, block {offset}+{block_bytes}"
                );
                assert!(rest.iter().all(|b| *b == 0));
            }
        }

        let copy = Places::new();
        let to = copy.destination();
        let options = Options::new();
        copy_out(&reader, &key, &savers, &to, Some(copy.ram()), &options, &|_| {}).unwrap();
        for run in [&places, &copy] {
            let ckpt = run.open();
            assert_eq!(resume(&ckpt, &SIZES).unwrap(), 2, "chunks of {chunk_bytes}");
            train(&ckpt, &SIZES, [3]);
        }

        // A flipped bit is found in its chunk.
        let places = copy;
        let payload = file_of(&places, 2, ".safetensors");
        common::flip(&payload, 8 * (4 << 20));
        let reader = Reader::open(&places.destination(), Some(places.ram())).unwrap();
        let shard = reader.shard(&key, Rank(0)).unwrap();
        let chunk = format!("chunk {} of", (4 << 20) / chunk_bytes);
        let found = shard.verify();
        assert!(found.len() == 1 && found[0].why.contains(&chunk), "{found:?}");
        let last = shard.payload().block(4 << 20, 4096, &mut scratch).unwrap_err();
        assert_eq!(last.kind(), ErrorKind::Corrupt, "{last}");
    }
}

#[test]
fn tensors_that_overlap_are_damage() {
    let places = two_steps();
    let text = std::fs::read_to_string(file_of(&places, 2, "rank-000000.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let second = json["tensors"][1]["at"].to_string();
    let [begin, end]: [u64; 2] = serde_json::from_str(&second).unwrap();
    lie(&places, &second, &format!("[{},{}]", begin - 1, end - 1));
    let (step, said) = resumed(&places);
    assert_eq!(step, 1);
    assert!(said.contains("overlaps the tensor before it"), "{said}");
}

#[test]
fn a_newer_format_is_refused_and_nothing_is_passed_over() {
    let places = two_steps();
    lie(&places, "\"format\":1", "\"format\":2");
    let ckpt = places.open();
    let error = resume(&ckpt, &SMALL).unwrap_err();
    assert!(error.to_string().contains("has format 2, this tierkeep reads up to 1"), "{error}");
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[test]
fn a_shard_of_another_run_or_attempt_is_damage() {
    let (places, other) = (two_steps(), two_steps());
    let theirs = file_of(&other, 2, "rank-000000.json");
    let ours = file_of(&places, 2, "rank-000000.json");
    write(&ours, &std::fs::read(theirs).unwrap());
    let (step, said) = resumed(&places);
    assert_eq!(step, 1);
    assert!(said.contains("it is of attempt") || said.contains("not the manifest"), "{said}");
}

#[test]
fn a_payload_that_is_gone_short_or_a_directory_costs_that_step_alone() {
    for what in ["gone", "short", "directory"] {
        let places = two_steps();
        let payload = file_of(&places, 2, ".safetensors");
        match what {
            "short" => {
                let file = std::fs::File::options().write(true).open(&payload).unwrap();
                file.set_len(100).unwrap();
            }
            _ => std::fs::remove_file(&payload).unwrap(),
        }
        if what == "directory" {
            std::fs::create_dir(&payload).unwrap();
        }
        let (step, said) = resumed(&places);
        assert_eq!(step, 1, "{what}: {said}");
        assert!(said.contains("step 2 of attempt 1"), "{what}: {said}");
    }
}

#[test]
fn another_world_size_goes_on_and_is_told() {
    let places = two_steps();
    let ckpt = Checkpointer::open(places.config_of(0, 2)).unwrap();
    assert_eq!(resume(&ckpt, &SMALL).unwrap(), 2);
    let told = common::events(&ckpt);
    let text = "was saved by 1 ranks (rank 0), this job saves from 2 (ranks 0, 1)";
    assert!(told.iter().any(|e| e.starts_with("other_ranks: ") && e.contains(text)), "{told:?}");
}

#[test]
fn a_destination_that_is_a_file_is_said_at_once() {
    let places = Places::new();
    let destination = places.destination();
    std::fs::File::create(&destination).unwrap();
    let error = Checkpointer::open(places.config()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("is a file: a destination is a directory"), "{error}");
}

#[test]
fn names_with_slashes_dots_nul_and_emoji() {
    for (name, why) in [
        ("..", "1 to 128"),
        (".hidden", "reserved"),
        ("_x", "reserved"),
        ("🚀", "only letters"),
        ("a b", "only letters"),
        ("nul\0", "NUL"),
    ] {
        let error = Config::new(&Path::new("/tmp/x").join(name)).unwrap_err();
        assert!(error.to_string().contains(why), "{name:?}: {error}");
    }
    let error = Config::new(Path::new("")).unwrap_err();
    assert!(error.to_string().contains("empty"), "{error}");
    assert!(Config::new(&Path::new("/tmp").join("x".repeat(129))).is_err());
}

#[test]
fn a_disk_that_fills_up_in_the_middle_of_a_save() {
    let places = Places::new();
    let Some(mount) = Mount::new(&places.destination().join("disk"), "size=3m") else { return };
    let destination = mount.0.join("run");
    let sizes = [1 << 20];
    let mut config = common::config(&destination, places.ram(), 0, 1);
    config.keep_last = 10;
    let ckpt = Checkpointer::open(config.clone()).unwrap();
    resume(&ckpt, &sizes).unwrap();
    train(&ckpt, &sizes, 1..=2);
    let full = Model::at(0, &sizes, 3).save(&ckpt, 3).unwrap();
    assert!(full.poll(Level::Ram, false, Duration::ZERO).unwrap(), "RAM does not care");
    let error = full.poll(Level::Disk, false, Duration::from_secs(10)).unwrap_err();
    assert!(error.to_string().contains("No space left on device"), "{error}");
    // RAM has step 3; without it disk has step 2, and room made is room used.
    ckpt.close(Duration::ZERO, true).unwrap();
    drop(ckpt);
    places.wipe_ram();
    config.keep_last = 1;
    let ckpt = Checkpointer::open(config).unwrap();
    assert_eq!(resume(&ckpt, &sizes).unwrap(), 2);
    let step1 = destination.join(format!("{:020}", 1));
    std::fs::remove_dir_all(step1).unwrap();
    train(&ckpt, &sizes, 3..=4);
}

#[test]
fn a_ram_of_64_mib_is_refused_with_the_sum() {
    let places = Places::new();
    let Some(mount) = Mount::new(&places.destination().join("shm"), "size=64m") else { return };
    let config = common::config(&places.destination().join("run"), &mount.0.join("ram"), 0, 1);
    let ckpt = Checkpointer::open(config).unwrap();
    resume(&ckpt, &SMALL).unwrap();
    let error = ckpt.prepare(&Model::new(0, &[100 << 20]).state(0).tensors).unwrap_err();
    assert!(matches!(error, Error::Budget { .. }), "{error}");
    assert!(error.to_string().contains("2 slots x 100.0 MiB"), "{error}");
    // A save that does not fit is told; one that fits goes through.
    let save = Model::new(0, &[100 << 20]).save(&ckpt, 1).unwrap();
    let error = save.poll(Level::Ram, false, Duration::ZERO).unwrap_err();
    assert!(error.to_string().contains("the memory budget is too small"), "{error}");
    wait(&Model::at(0, &SMALL, 2).save(&ckpt, 2).unwrap(), Level::Disk);
}

#[test]
fn a_directory_without_rights_is_said_at_once() {
    let places = Places::new();
    let Some(mount) = Mount::new(&places.destination().join("ro"), "ro,size=1m") else { return };
    let config = common::config(&mount.0.join("run"), places.ram(), 0, 1);
    let error = Checkpointer::open(config).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.chain().contains("Read-only file system"), "{}", error.chain());
}

#[test]
fn a_wished_step_that_is_not_there_is_named() {
    let places = two_steps();
    let reader = Reader::open(&places.destination(), Some(places.ram())).unwrap();
    let wish = Wish { step: Some(Step(9)), ..Wish::default() };
    let error = reader.choose(&wish).unwrap_err();
    assert_eq!(error.to_string(), "step 9 was not found");
    let wish = Wish { step: Some(Step(2)), ..Wish::default() };
    let (key, ..) = reader.choose(&wish).unwrap();
    let error = reader.shard(&key, Rank(7)).unwrap_err();
    assert_eq!(error.to_string(), "step 2, rank 7: no tier has a good copy (no tier has it)");
}

#[test]
fn a_wished_step_that_is_broken_names_its_checkpoint_and_rank() {
    let places = Places::new();
    let ranks = [0, 1].map(|rank| Checkpointer::open(places.config_of(rank, 2)).unwrap());
    for ckpt in &ranks {
        resume(ckpt, &SMALL).unwrap();
    }
    for step in 1..=2 {
        let saves = [0, 1]
            .map(|rank| Model::at(rank, &SMALL, step).save(&ranks[rank as usize], step).unwrap());
        saves.iter().for_each(|s| wait(s, Level::Disk));
    }
    ranks.iter().for_each(close);
    drop(ranks);
    let choose = |step: Option<u64>, attempt| {
        let reader = Reader::open(&places.destination(), Some(places.ram())).unwrap();
        reader.choose(&Wish { step: step.map(Step), attempt, accept_older: false }).unwrap_err()
    };
    std::fs::remove_file(file_of(&places, 2, "rank-000001.json")).unwrap();
    let gone = "rank 1: its shard is missing in every tier";
    let broken = format!("step 2 of attempt 1 cannot be restored: {gone}");
    for attempt in [None, Some(1)] {
        let error = choose(Some(2), attempt);
        assert_eq!((error.to_string(), error.kind()), (broken.clone(), ErrorKind::Corrupt));
    }
    std::fs::remove_file(file_of(&places, 1, "rank-000001.json")).unwrap();
    assert_eq!(
        choose(None, Some(1)).to_string(),
        format!(
            "what attempt 1 saved cannot be restored: step 2 of attempt 1: {gone}; step 1 of attempt \
             1: {gone}"
        )
    );
    assert_eq!(choose(None, Some(7)).to_string(), "a checkpoint of attempt 7 was not found");
}

#[test]
fn a_wished_step_of_an_abandoned_branch_is_found_by_its_attempt() {
    let places = two_steps();
    let ckpt = places.open();
    let wish = Wish { step: Some(Step(1)), ..Wish::default() };
    ckpt.begin(&Begin { wish, rollback: true, ..Begin::default() }).unwrap();
    let reader = Reader::open(&places.destination(), Some(places.ram())).unwrap();
    let mut wish = Wish { step: Some(Step(2)), ..Wish::default() };
    let error = reader.choose(&wish).unwrap_err();
    assert_eq!(
        error.to_string(),
        "step 2 (attempt 1 has it, on an abandoned branch) was not found"
    );
    assert_eq!(error.hint(), Some(Hint::NameAttempt(1)));
    wish.attempt = Some(1);
    assert_eq!(reader.choose(&wish).unwrap().0.step, Step(2));
}

#[test]
fn a_save_before_restore_on_a_run_with_history_is_refused() {
    let places = two_steps();
    let ckpt = places.open();
    let error = Model::at(0, &SMALL, 3).save(&ckpt, 3).unwrap_err();
    assert!(error.to_string().contains("already has checkpoints or attempts"), "{error}");
    assert_eq!((error.kind(), error.hint()), (ErrorKind::Invalid, Some(Hint::RestoreFirst)));
}

#[test]
fn steps_rise() {
    let places = Places::new();
    let ckpt = places.open();
    let first = Model::at(0, &SMALL, 5).save(&ckpt, 5).unwrap();
    let again = Model::at(0, &SMALL, 5).save(&ckpt, 5).unwrap();
    wait(&again, Level::Disk);
    assert!(first.poll(Level::Disk, false, Duration::ZERO).unwrap(), "not the same save");
    let error = Model::at(0, &SMALL, 4).save(&ckpt, 4).unwrap_err();
    assert!(error.to_string().contains("step 4 is older than step 5"), "{error}");
    assert_eq!((error.kind(), error.hint()), (ErrorKind::Invalid, Some(Hint::Rollback)));
}

#[test]
fn a_payload_whose_header_says_2_to_the_63_costs_that_step_alone() {
    let places = two_steps();
    let payload = file_of(&places, 2, ".safetensors");
    let mut bytes = std::fs::read(&payload).unwrap();
    bytes[..8].copy_from_slice(&(1_u64 << 63).to_le_bytes());
    write(&payload, &bytes);
    let reader = Reader::open(&places.destination(), Some(places.ram())).unwrap();
    let newest = reader.steps().unwrap().pop().unwrap().key;
    let said: Vec<String> =
        reader.shard(&newest, Rank(0)).unwrap().verify().into_iter().map(|b| b.why).collect();
    assert!(said.len() == 1 && said[0].contains("is damaged: chunk 0 of 1"), "{said:?}");
    let ckpt = places.open();
    let error = resume(&ckpt, &SMALL).unwrap_err();
    assert!(error.to_string().contains("step 2, rank 0: no tier has a good copy"), "{error}");
    drop(ckpt);
    let (step, said) = resumed(&places);
    assert_eq!(step, 1, "{said}");
}

#[test]
fn a_ram_directory_of_another_user_is_refused() {
    let places = Places::new();
    let theirs = places.ram().join("theirs");
    std::fs::create_dir(&theirs).unwrap();
    if std::os::unix::fs::chown(&theirs, Some(54_321), None).is_err() {
        println!("NOT TESTED: another user's directory needs root");
        return;
    }
    let config = common::config(&places.destination(), &theirs, 0, 1);
    let error = Checkpointer::open(config).unwrap_err();
    assert!(error.to_string().contains("belongs to user 54321"), "{error}");
}

#[test]
fn a_tmpfs_that_others_fill_up_costs_the_save_that_needs_more() {
    let places = Places::new();
    let Some(mount) = Mount::new(&places.destination().join("shm"), "size=8m") else { return };
    let mut config = common::config(&places.destination().join("run"), &mount.0.join("ram"), 0, 1);
    config.ram_bytes_max = Some(1 << 30); // The budget would allow it; the medium does not.
    let ckpt = Checkpointer::open(config).unwrap();
    resume(&ckpt, &SMALL).unwrap();
    train(&ckpt, &SMALL, 1..=3);
    let others = vec![0; 64 << 20];
    let filled = std::fs::write(mount.0.join("others"), others).unwrap_err();
    assert_eq!(filled.raw_os_error(), Some(28));
    // What has its pages goes on; a larger state is told that there is no room.
    let save = Model::new(0, &[4 << 20]).save(&ckpt, 4).unwrap();
    let error = save.poll(Level::Ram, false, Duration::from_secs(5)).unwrap_err();
    assert!(error.to_string().contains("the memory budget is too small"), "{error}");
    std::fs::remove_file(mount.0.join("others")).unwrap();
    train(&ckpt, &SMALL, 5..=6);
    drop(ckpt);
    let again = common::config(&places.destination().join("run"), &mount.0.join("ram"), 0, 1);
    assert_eq!(resume(&Checkpointer::open(again).unwrap(), &SMALL).unwrap(), 6);
}
