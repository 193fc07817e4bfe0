//! Every tier and every wrapper keeps the contract.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout)] // Tests.

use std::{path::Path, sync::Arc, time::Duration};

use tierkeep::{
    clock::{SharedClock, SystemClock},
    snapshot::budget::Budget,
    testing::{
        contract,
        faulty::{Fault, Faulty},
    },
    tier::{
        Tier,
        disk::DiskTier,
        memory::MemoryTier,
        wrap::{Limited, Metered, Retried},
    },
};

fn disk(dir: &Path) -> DiskTier {
    DiskTier::open(dir).expect("open")
}

fn memory(dir: &Path) -> MemoryTier {
    let budget = Budget::open(dir, Some(1 << 30)).expect("budget");
    MemoryTier::open(&dir.join("run-00000000"), budget).expect("open")
}

fn clock() -> SharedClock {
    Arc::new(SystemClock)
}

fn shm() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("tierkeep-test-").tempdir_in("/dev/shm").expect("tempdir")
}

fn holds(dir: &Path, open: fn(&Path) -> Box<dyn Tier>) {
    contract::holds(&|| open(dir));
}

#[test]
fn disk_keeps_the_contract() {
    let dir = tempfile::tempdir().expect("tempdir");
    holds(dir.path(), |dir| Box::new(disk(dir)));
}

#[test]
fn disk_on_tmpfs_keeps_the_contract() {
    holds(shm().path(), |dir| Box::new(disk(dir)));
}

#[test]
fn memory_keeps_the_contract() {
    holds(shm().path(), |dir| Box::new(memory(dir)));
}

#[test]
fn retried_limited_and_metered_keep_the_contract() {
    holds(shm().path(), |dir| Box::new(Retried::new(disk(dir), clock())));
    holds(shm().path(), |dir| Box::new(Limited::new(disk(dir), 4 << 30, clock())));
    holds(shm().path(), |dir| Box::new(Metered::new(disk(dir), clock())));
}

#[test]
fn a_stalling_tier_keeps_the_contract() {
    holds(shm().path(), |dir| {
        let stall = Fault::Stalls(Duration::from_micros(50), clock());
        Box::new(Faulty::new(Arc::new(disk(dir)), stall))
    });
}

#[test]
fn a_retry_that_meets_its_own_file_succeeds() {
    let dir = shm();
    for lost in 0..4 {
        let faulty = Faulty::new(Arc::new(disk(dir.path())), Fault::LosesAnswerOf(lost));
        let tier = Retried::new(faulty, clock());
        let name = format!("a/record-{lost}");
        let created = tierkeep::tier::create_same(&tier, &name, b"mine").expect("create");
        assert!(created, "its own record was taken for another's");
        let faulty = Faulty::new(Arc::new(disk(dir.path())), Fault::LosesAnswerOf(lost));
        let tier = Retried::new(faulty, clock());
        let payload = contract::Bytes(contract::pattern(9 << 20, lost));
        let name = format!("{:020}/00000001-aabbccdd/rank-000000-01020304.safetensors", lost + 1);
        tier.put(&name, &payload).map(drop).expect("its own payload was taken for another's");
    }
}

#[test]
fn a_limit_paces_payloads() {
    let dir = shm();
    let tier = Limited::new(disk(dir.path()), 16 << 20, clock());
    let start = SystemClock;
    use tierkeep::clock::Clock;
    let begun = start.monotonic();
    let payload = contract::Bytes(contract::pattern(8 << 20, 1));
    tier.put("00000000000000000001/00000001-aabbccdd/rank-000000-01020304.safetensors", &payload)
        .map(drop)
        .expect("put");
    // Two blocks of 4 MiB at 16 MiB/s: the second waits for the first to be paid, 0.25 s.
    assert!(start.monotonic() - begun >= Duration::from_millis(240));
}
