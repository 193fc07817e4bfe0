//! Agents that are killed in the middle of a transfer: a chunk of it has arrived, the last one has not.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use tierkeep::{
    begin::Begin,
    checkpointer::Checkpointer,
    save::{Level, Save},
};

use crate::{
    bad::run_whose_copy_is_on_b,
    offering::file_in,
    process::{Process, wait_for},
    world::{PATIENCE, bytes, resumes, save},
};

const CHUNK_BYTES: usize = 4 << 20;

/// Saves a step on `from`; returns when half of it has arrived at `to`.
fn save_half(ckpt: &Checkpointer, from: &Process, to: &Process, step: u64, data: &[u8]) -> Save {
    let saved = save(ckpt, step, data);
    assert!(saved.poll(Level::Ram, false, PATIENCE).unwrap());
    let dir = of_step(from.ram.path(), step).unwrap();
    let whole = std::fs::read(file_in(&dir, ".safetensors").unwrap()).unwrap();
    // Whether what lies before `end` has come.
    let has = |slot: &File, end: usize| {
        let mut there = vec![0; 1000];
        let begin = end - there.len();
        let read = slot.read_exact_at(&mut there, begin as u64);
        read.is_ok() && there == whole[begin..end]
    };
    // Several are on their way at once, and the rate is nobody's in particular: any may be the first.
    let ends: Vec<usize> =
        (1..=whole.len().div_ceil(CHUNK_BYTES)).map(|n| whole.len().min(n * CHUNK_BYTES)).collect();
    wait_for("a chunk arrives", || {
        let slot = file_in(to.ram.path(), ".slot").and_then(|slot| File::open(slot).ok());
        let Some(slot) = slot else { return false };
        let there = ends.iter().filter(|end| has(&slot, **end)).count();
        assert!(there < ends.len(), "it is all there");
        there > 0
    });
    saved
}

/// Where a step's shards lie in a node's memory.
fn of_step(ram: &Path, step: u64) -> Option<PathBuf> {
    let runs = std::fs::read_dir(ram).unwrap().flatten();
    runs.map(|run| run.path().join(format!("{step:020}"))).find(|dir| dir.is_dir())
}

/// Nothing of a step has a name that a reader knows.
fn has_nothing_of(node: &Process, step: u64) {
    let dir = of_step(node.ram.path(), step);
    let named = dir.and_then(|dir| file_in(&dir, ""));
    assert_eq!(named, None);
}

#[test]
fn a_holder_killed_in_the_middle_is_replaced_and_holds_nothing_half_when_it_is_back() {
    let disk = tempfile::tempdir().unwrap();
    let run = run_whose_copy_is_on_b(disk.path());
    let [mut a, mut b, c] = Process::start_all(disk.path(), ["a", "b", "c"]);
    let ckpt = a.open(&run);
    ckpt.begin(&Begin::default()).unwrap();
    let data = bytes(3);
    let saved = save_half(&ckpt, &a, &b, 1, &data);
    b.kill();
    assert!(saved.poll(Level::Peer, false, PATIENCE).unwrap(), "{:?}", saved.progress());
    assert!(of_step(c.ram.path(), 1).is_some());
    b.begin();
    b.sees(&["a", "b", "c"]);
    has_nothing_of(&b, 1);
    // And what half came is in nobody's way: it goes on there.
    a.kill();
    drop(ckpt);
    std::fs::remove_dir_all(&run).unwrap();
    b.sees(&["b", "c"]);
    resumes(&b.open(&run), 1, &data);
}

#[test]
fn a_sender_killed_in_the_middle_sends_again_when_it_is_back_and_nothing_half_is_resumed_from() {
    let disk = tempfile::tempdir().unwrap();
    let run = run_whose_copy_is_on_b(disk.path());
    let [mut a, b, c] = Process::start_all(disk.path(), ["a", "b", "c"]);
    let ckpt = a.open(&run);
    ckpt.begin(&Begin::default()).unwrap();
    let first = bytes(1);
    let saved = save_half(&ckpt, &a, &b, 1, &first);
    a.kill();
    has_nothing_of(&b, 1);
    a.begin();
    assert!(saved.poll(Level::Peer, false, PATIENCE).unwrap(), "{:?}", saved.progress());
    assert!(of_step(b.ram.path(), 1).is_some());
    // Killed again, and gone for good with all that it had.
    let second = bytes(2);
    drop(save_half(&ckpt, &a, &b, 2, &second));
    a.kill();
    has_nothing_of(&b, 2);
    drop(ckpt);
    std::fs::remove_dir_all(&run).unwrap();
    c.sees(&["b", "c"]);
    let ckpt = c.open(&run);
    resumes(&ckpt, 1, &first);
    let saved = save(&ckpt, 2, &second);
    assert!(saved.poll(Level::Peer, false, PATIENCE).unwrap(), "{:?}", saved.progress());
}
