//! The tier dies after operation 0, 1, 2, ... of a save and of a retention pass: whatever that
//! number is, a complete checkpoint restores bit for bit, and none that was promised is lost.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout)] // Tests.

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use common::{Model, Places, SMALL, resume};
use tierkeep::{
    checkpointer::Checkpointer,
    save::Level,
    testing::faulty::{Fault, Faulty},
    tier::{Tier, TierKind},
};

const STEPS: u64 = 5;

/// What a run that may die was promised before it did.
#[derive(Debug, Default, PartialEq)]
struct Promised {
    ram: u64,
    disk: u64,
}

/// Trains until the fault strikes or all is done; true where it never struck.
fn run(places: &Places, kind: TierKind, fault: Fault) -> (Promised, bool) {
    let mut promised = Promised::default();
    let faulty: std::sync::Mutex<Option<Arc<Faulty>>> = std::sync::Mutex::default();
    let wrap = |tier: Arc<dyn Tier>| -> Arc<dyn Tier> {
        if tier.kind() != kind {
            return tier;
        }
        let wrapped = Arc::new(Faulty::new(tier, fault.clone()));
        *faulty.lock().unwrap() = Some(wrapped.clone());
        wrapped
    };
    let mut config = places.config();
    config.keep_last = 1;
    let Ok(ckpt) = Checkpointer::open_wrapped(config, &wrap) else {
        return (promised, false);
    };
    let faulty = faulty.into_inner().unwrap().unwrap();
    if let Ok(begun) = resume(&ckpt, &SMALL) {
        assert_eq!(begun, 0);
        for step in 1..=STEPS {
            let model = Model::at(0, &SMALL, step);
            let Ok(save) = model.save(&ckpt, step) else { break };
            if matches!(save.poll(Level::Ram, false, Duration::ZERO), Ok(true)) {
                promised.ram = step;
            }
            // Until it is there, or has failed, or cannot come any more.
            let mut after = 0;
            while after < 3 {
                match save.poll(Level::Disk, false, Duration::from_millis(10)) {
                    Ok(true) => {
                        promised.disk = step;
                        break;
                    }
                    Ok(false) => after += u32::from(faulty.has_struck()),
                    Err(_) => break,
                }
            }
        }
        let patience = if faulty.has_struck() { Duration::ZERO } else { Duration::from_secs(10) };
        let _ = ckpt.close(patience, faulty.has_struck());
    }
    drop(ckpt);
    (promised, !faulty.has_struck())
}

/// What a clean process finds.
fn recover(places: &Places) -> u64 {
    let ckpt = places.open();
    let step = resume(&ckpt, &SMALL).expect("resume");
    // Life goes on from there, also over what the dead process left behind.
    common::train(&ckpt, &SMALL, [step + 1]);
    common::close(&ckpt);
    let again = places.open();
    assert_eq!(resume(&again, &SMALL).expect("resume"), step + 1);
    step
}

fn exhaust(kind: TierKind, wipe_ram: bool, fault: fn(u64) -> Fault) {
    let tried = AtomicU64::new(0);
    for fatal in 0..2000 {
        let places = Places::new();
        let (promised, never_struck) = run(&places, kind, fault(fatal));
        if never_struck && wipe_ram {
            assert_eq!(promised.disk, STEPS);
        }
        if wipe_ram {
            places.wipe_ram();
        }
        let found = recover(&places);
        let least = if wipe_ram { promised.disk } else { promised.ram.max(promised.disk) };
        assert!(
            found >= least,
            "{kind} fault at operation {fatal}: promised {promised:?}, found step {found}"
        );
        tried.fetch_add(1, Ordering::Relaxed);
        if never_struck {
            assert!(fatal > 20, "only {fatal} operations: the fault did not reach the saves");
            return; // Every earlier moment has been tried.
        }
    }
    panic!("the run never ended without a fault");
}

#[test]
fn no_crash_of_the_disk_tier_leaves_half_a_checkpoint() {
    exhaust(TierKind::Disk, true, Fault::DiesAt);
}

#[test]
fn no_crash_of_the_disk_tier_costs_what_ram_has() {
    exhaust(TierKind::Disk, false, Fault::DiesAt);
}

#[test]
fn no_crash_of_the_ram_tier_leaves_half_a_checkpoint() {
    exhaust(TierKind::Ram, false, Fault::DiesAt);
}

#[test]
fn a_lost_answer_at_any_operation_loses_nothing() {
    exhaust(TierKind::Disk, true, Fault::LosesAnswerOf);
}

#[test]
fn a_disk_that_is_full_from_any_operation_on_costs_no_older_checkpoint() {
    exhaust(TierKind::Disk, true, Fault::FullFrom);
}
