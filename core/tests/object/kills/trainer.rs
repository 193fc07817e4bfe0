//! A rank's life: resume, then save every step until killed. What it was promised goes to a log.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use tierkeep::{
    begin::Begin,
    bucket::Bucket,
    checkpointer::Checkpointer,
    names::Step,
    reader::Reader,
    restore::decide::Wish,
    retain::Policy,
    save::{Level, Save},
    upkeep,
};

use crate::{
    common::{Model, config, events, lives::say, read_whole},
    servers::{Place, s3_place},
};

/// Longer than any wait of a rank that is well, also where the server stands still for a minute because the
/// machine has other things to do: nothing here is about how long things take.
const LONG: Duration = Duration::from_secs(600);

fn text(name: &str) -> String {
    std::env::var(name).expect(name)
}

fn number(name: &str) -> u64 {
    text(name).parse().expect(name)
}

fn bucket() -> Place {
    s3_place(text("TIERKEEP_TEST_URL"), number("TIERKEEP_TEST_PORT") as u16)
}

pub(super) fn live(place: &Path) {
    let (rank, world) = (number("TIERKEEP_TEST_RANK") as u32, number("TIERKEEP_TEST_WORLD") as u32);
    let (steps, back) = (number("TIERKEEP_TEST_STEPS"), number("TIERKEEP_TEST_BACK_TO"));
    let lockstep = number("TIERKEEP_TEST_LOCKSTEP") == 1;
    let pause = Duration::from_micros(number("TIERKEEP_TEST_STEP_MICROS"));
    let sizes = [number("TIERKEEP_TEST_BYTES") as usize, 13, 0];
    let ram = PathBuf::from(text("TIERKEEP_TEST_RAM"));
    let mut config = config(&place.join("run"), &ram, rank, world);
    (config.lock_wait, config.attempt_wait, config.slot_wait) = (LONG, LONG, LONG);
    let there = bucket();
    let settings = Bucket::new(&there.url, config.disk_every).expect("bucket");
    config.bucket = Some(Bucket { options: there.options, grace: Duration::ZERO, ..settings });
    let ckpt = Checkpointer::open(config).expect("open");
    let how = match back {
        0 => Begin::default(),
        step => {
            let wish = Wish { step: Some(Step(step)), ..Wish::default() };
            Begin { wish, rollback: true, ..Begin::default() }
        }
    };
    let found = ckpt.begin(&how).expect("begin");
    let begun = found.map_or(0, |found| {
        read_whole(&found, &sizes).expect("read");
        found.step().0
    });
    say(place, rank, &format!("resumed {begun}"));
    let mut open = Vec::new();
    for step in begun + 1..=begun.saturating_add(steps) {
        std::thread::sleep(pause);
        let save = Model::at(rank, &sizes, step).save(&ckpt, step).expect("save");
        if lockstep && save.is_due_for_object() {
            let _ = save.poll(Level::Object, false, LONG);
        }
        open.push(save);
        open.retain_mut(|save| is_open(save, place, rank));
        events(&ckpt).iter().for_each(|event| say(place, rank, &format!("event {event}")));
    }
    assert!(ckpt.close(LONG, false).expect("close"), "it does not close");
    open.retain_mut(|save| is_open(save, place, rank));
    assert!(open.is_empty(), "closed, and undecided: {open:?}");
    events(&ckpt).iter().for_each(|event| say(place, rank, &format!("event {event}")));
    say(place, rank, "closed");
}

/// Says what became of a save; whether something still may.
fn is_open(save: &mut Save, place: &Path, rank: u32) -> bool {
    match save.poll(Level::Object, false, Duration::ZERO) {
        Ok(true) => say(place, rank, &format!("object {}", save.step())),
        Ok(false) => return true,
        // Not due there, or passed over for a newer one.
        Err(e) if e.chain().contains("not due for") => {}
        Err(e) if e.chain().contains("passed over for the bucket") => {}
        Err(e)
            if e.chain().contains("passed over for disk")
                && !matches!(save.poll(Level::Disk, false, Duration::ZERO), Ok(true)) => {}
        Err(e) => say(place, rank, &format!("failed {}: {}", save.step(), e.chain())),
    }
    false
}

/// Collects in the bucket for as long as it lives.
pub(super) fn collect(keep_last: &str) {
    let (place, policy) = (
        bucket(),
        Policy {
            keep_last: keep_last.parse().expect("keep_last"),
            every: 1,
            keep_every: None,
            keep_hours: None,
            abandoned: number("TIERKEEP_TEST_ABANDONED") == 1,
        },
    );
    loop {
        let elsewhere = Path::new("/nowhere");
        let opened = Reader::open_with(Path::new(&place.url), Some(elsewhere), &place.options);
        let reader = match opened {
            Err(e) if e.is_not_found() => continue, // The job has not begun.
            other => other.expect("open"),
        };
        let plan = upkeep::plan(&reader, &policy).expect("plan");
        upkeep::collect(&reader, &plan, Duration::ZERO).expect("collect");
        std::thread::sleep(Duration::from_millis(20));
    }
}
