//! One rank's life: resume, then save every step until killed. What it was promised goes to a log,
//! one line a fact, each written whole.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use tierkeep::{
    checkpointer::{Checkpointer, SaveRequest},
    save::{Level, Save},
};

use crate::{
    WORLD,
    common::{Model, SMALL, config, events, lives::say, resume},
    draw::rules,
};

pub fn live(place: &Path) {
    let number = |name: &str| std::env::var(name).expect(name).parse::<u64>().expect(name);
    let flag = |name: &str| number(name) == 1;
    let rank = number("TIERKEEP_TEST_RANK") as u32;
    let late = number("TIERKEEP_TEST_LATE");
    let (lockstep, skip_if_busy) = (flag("TIERKEEP_TEST_LOCKSTEP"), flag("TIERKEEP_TEST_SKIP"));
    let steps = number("TIERKEEP_TEST_STEPS");
    let pause = Duration::from_micros(number("TIERKEEP_TEST_STEP_MICROS"));
    let ram = PathBuf::from(std::env::var_os("TIERKEEP_TEST_RAM").expect("ram"));
    let mut config = config(&place.join("run"), &ram, rank, WORLD);
    config.replicated = rules(flag("TIERKEEP_TEST_REPLICATED"));
    let ckpt = Checkpointer::open(config).expect("open");
    let begun = resume(&ckpt, &SMALL).expect("resume");
    say(place, rank, &format!("resumed {begun}"));
    // Not dropped when something panics: a copy behind may still read it.
    let model = Box::leak(Box::new(Model::at(rank, &SMALL, begun)));
    let is_late = |tensor: usize| late >> tensor & 1 == 1;
    let mut open = Vec::new();
    for step in begun + 1..=begun + steps {
        std::thread::sleep(pause);
        // What is not late may change as soon as the last save returned, the rest after the fence.
        (0..SMALL.len()).filter(|t| !is_late(*t)).for_each(|t| model.train_tensor(t, step));
        if late != 0 {
            assert!(ckpt.fence(Duration::from_secs(10)).expect("fence"), "a copy goes on for ever");
            (0..SMALL.len()).filter(|t| is_late(*t)).for_each(|t| model.train_tensor(t, step));
        }
        let mut state = model.state(step);
        for (t, tensor) in state.tensors.iter_mut().enumerate() {
            tensor.late = is_late(t);
        }
        let request =
            SaveRequest { state, overlap: late != 0, skip_if_busy, ..model.request(step) };
        // SAFETY: the model is never dropped; late tensors change after the fence, others after
        // this call.
        let save = unsafe { ckpt.save(request) }.expect("save");
        if lockstep {
            let _ = save.poll(Level::Ram, false, Duration::from_secs(10));
            if step % 3 == 0 {
                let _ = save.poll(Level::Disk, false, Duration::from_millis(50));
            }
        }
        open.push(Open { save, in_ram: false });
        open.retain_mut(|save| save.look(place, rank));
        events(&ckpt).iter().for_each(|event| say(place, rank, &format!("event {event}")));
    }
    assert!(ckpt.close(Duration::from_secs(10), false).expect("close"), "it does not close");
    open.retain_mut(|save| save.look(place, rank));
    assert!(open.is_empty(), "closed, and undecided: {open:?}");
    events(&ckpt).iter().for_each(|event| say(place, rank, &format!("event {event}")));
    say(place, rank, "closed");
}

/// A save of which something may still become true.
#[derive(Debug)]
struct Open {
    save: Save,
    in_ram: bool,
}

impl Open {
    /// Says what became true of it; whether there may be more.
    fn look(&mut self, place: &Path, rank: u32) -> bool {
        let step = self.save.step();
        let now = |level| self.save.poll(level, false, Duration::ZERO);
        if !self.in_ram && matches!(now(Level::Ram), Ok(true)) {
            self.in_ram = true;
            say(place, rank, &format!("ram {step}"));
        }
        let disk = now(Level::Disk);
        if matches!(disk, Ok(true)) {
            say(place, rank, &format!("disk {step}"));
        }
        matches!(disk, Ok(false))
    }
}
