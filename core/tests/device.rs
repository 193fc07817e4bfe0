//! Tensors that lie in no memory of the host: a device brings their bytes into the slot, and they
//! are read in parts.

#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // Tests.
mod common;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use common::{Model, Places, close, events, read_whole, resume, wait};
use tierkeep::{
    Error, Result,
    begin::Begin,
    checkpointer::{Checkpointer, SaveRequest},
    names::Step,
    restore::reading::Reading,
    save::{Level, Save},
    snapshot::{
        copy,
        device::{Bring, Landing, Pin, Placement},
        strided::Address,
    },
    state::Memory,
    tier::TierKind,
};

const SIZES: [usize; 3] = [100_000, 9 << 20, 12];

/// A "device": it copies on a thread of its own, when the gate says so.
struct Device {
    /// Address and length of each tensor.
    tensors: Vec<(usize, usize)>,
    gate: mpsc::Receiver<()>,
    /// At the end it says that it failed.
    fails: bool,
}

struct Copying(Option<JoinHandle<()>>, bool);

impl Bring for Device {
    fn begin(
        self: Box<Self>,
        slot: usize,
        len: usize,
        places: &[Placement],
    ) -> Result<Box<dyn Landing>> {
        let rows: Vec<_> = places.iter().map(|p| (self.tensors[p.tensor], *p)).collect();
        for ((_, bytes), place) in &rows {
            assert_eq!(*bytes, place.len);
            assert!(place.offset + place.len <= len);
        }
        let fails = self.fails;
        let copy = move || {
            let _ = self.gate.recv_timeout(Duration::from_secs(10));
            for ((from, bytes), place) in rows {
                let to = std::ptr::with_exposed_provenance_mut::<u8>(slot + place.offset);
                let from = std::ptr::with_exposed_provenance::<u8>(from);
                // SAFETY: the model and the slot live until `wait` returns, which joins this.
                unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
            }
        };
        Ok(Box::new(Copying(Some(std::thread::spawn(copy)), fails)))
    }
}

impl Landing for Copying {
    fn wait(&mut self, _: usize) -> Result<()> {
        if let Some(copying) = self.0.take() {
            copying.join().expect("copied");
        }
        if self.1 {
            return Err(Error::Io {
                what: "copy from the device".into(),
                source: std::io::Error::other("it fell off the bus"),
            });
        }
        Ok(())
    }
}

/// Saves `model` with its first two tensors on a device; the last is the host's.
fn save(ckpt: &Checkpointer, model: &Model, step: u64, overlap: bool, fails: bool) -> (Save, Gate) {
    let (open, gate) = mpsc::channel();
    let mut request = model.request(step);
    for tensor in &mut request.state.tensors[..2] {
        tensor.memory = Memory::InSlot;
        tensor.late = overlap;
    }
    let tensors = model.tensors.iter().map(|t| (t.as_ptr().expose_provenance(), t.len())).collect();
    let bring: Option<Box<dyn Bring>> = Some(Box::new(Device { tensors, gate, fails }));
    if !overlap {
        open.send(()).expect("it listens");
    }
    // SAFETY: the callers keep the model until the save is staged.
    let save = unsafe { ckpt.save(SaveRequest { bring, overlap, ..request }) }.expect("save");
    (save, open)
}

type Gate = mpsc::Sender<()>;

#[test]
fn bytes_of_a_device_are_checksummed_where_they_landed() {
    let places = Places::new();
    let ckpt = places.open();
    resume(&ckpt, &SIZES).unwrap();
    for (step, overlap) in [(1, false), (2, true), (3, false), (4, true)] {
        let model = Model::at(0, &SIZES, step);
        let (save, gate) = save(&ckpt, &model, step, overlap, false);
        if overlap {
            assert!(!save.poll(Level::Staged, false, Duration::from_millis(20)).unwrap());
            gate.send(()).unwrap();
        }
        wait(&save, Level::Disk);
    }
    close(&ckpt);
    let ckpt = places.open();
    let found = ckpt.begin(&Begin::default()).unwrap().unwrap();
    assert_eq!(found.step().0, 4);
    read_whole(&found, &SIZES).unwrap();
}

#[test]
fn only_the_owners_of_host_memory_wait_for_the_host() {
    let places = Places::new();
    let ckpt = places.open();
    resume(&ckpt, &SIZES).unwrap();
    let model = Model::at(0, &SIZES, 1);
    let (save, gate) = save(&ckpt, &model, 1, true, false);
    assert!(ckpt.fence_host(Duration::ZERO).unwrap(), "the device's own stream waits, not we");
    assert!(!ckpt.fence(Duration::from_millis(20)).unwrap());
    gate.send(()).unwrap();
    assert!(ckpt.fence(Duration::from_secs(10)).unwrap());
    wait(&save, Level::Ram);
}

#[test]
fn a_device_that_fails_costs_one_save() {
    let places = Places::new();
    let ckpt = places.open();
    resume(&ckpt, &SIZES).unwrap();
    let model = Model::at(0, &SIZES, 1);
    wait(&save(&ckpt, &model, 1, false, false).0, Level::Disk);
    for (step, overlap) in [(2, false), (3, true)] {
        let model = Model::at(0, &SIZES, step);
        let (failed, gate) = save(&ckpt, &model, step, overlap, true);
        drop(gate);
        let error = failed.poll(Level::Ram, false, Duration::from_secs(10)).unwrap_err();
        assert!(error.to_string().contains("device"), "{error}");
    }
    let told = events(&ckpt);
    let about = |step: u64| {
        told.iter().any(|t| {
            t.starts_with("save_failed")
                && t.contains(&format!(
                    "step {step} was not saved: could not copy from the device: it fell off the bus"
                ))
        })
    };
    assert!(about(2) && about(3), "{told:?}");
    let model = Model::at(0, &SIZES, 4);
    wait(&save(&ckpt, &model, 4, false, false).0, Level::Disk);
    close(&ckpt);
    assert_eq!(resume(&places.open(), &SIZES).unwrap(), 4);
}

/// Its first wait is interrupted; the copy goes on.
struct Interrupted(Device);

struct Waiting(bool, Box<dyn Landing>);

impl Bring for Interrupted {
    fn begin(
        self: Box<Self>,
        slot: usize,
        len: usize,
        places: &[Placement],
    ) -> Result<Box<dyn Landing>> {
        Ok(Box::new(Waiting(true, Box::new(self.0).begin(slot, len, places)?)))
    }
}

impl Landing for Waiting {
    fn wait(&mut self, upto: usize) -> Result<()> {
        if std::mem::take(&mut self.0) {
            return Err(Error::Skipped { step: Step(2), why: "interrupted".into() });
        }
        self.1.wait(upto)
    }
}

#[test]
fn a_slot_is_nobodys_while_a_device_writes_to_it() {
    let places = Places::new();
    let ckpt = places.open();
    resume(&ckpt, &SIZES).unwrap();
    let at = |step| Model::at(0, &SIZES, step);
    wait(&at(1).save(&ckpt, 1).unwrap(), Level::Disk);
    let model = at(2);
    let (open, gate) = mpsc::channel();
    let mut request = model.request(2);
    request.state.tensors[1].memory = Memory::InSlot;
    let tensors = model.tensors.iter().map(|t| (t.as_ptr().expose_provenance(), t.len())).collect();
    let device = Interrupted(Device { tensors, gate, fails: false });
    let bring: Option<Box<dyn Bring>> = Some(Box::new(device));
    // SAFETY: the model lives until the copy has ended, below.
    let save = unsafe { ckpt.save(SaveRequest { bring, ..request }) }.unwrap();
    assert!(save.poll(Level::Staged, false, Duration::ZERO).is_err());
    let model = at(3);
    let busy = SaveRequest { skip_if_busy: true, ..model.request(3) };
    // SAFETY: "now": the memory is read only during the call.
    let save = unsafe { ckpt.save(busy) }.unwrap();
    assert!(save.progress().skipped.is_some(), "two slots: one is complete, one is written to");
    open.send(()).unwrap();
    wait(&at(4).save(&ckpt, 4).unwrap(), Level::Disk);
    close(&ckpt);
    assert_eq!(resume(&places.open(), &SIZES).unwrap(), 4);
}

#[derive(Debug, Default)]
struct Pins {
    now: Mutex<BTreeMap<usize, usize>>,
    ever: Mutex<usize>,
}

impl Pins {
    fn holds(&self, from: usize, to: usize) -> bool {
        self.now.lock().expect("lock").iter().any(|(at, len)| *at <= from && to <= at + len)
    }
}

fn is_mapped(address: usize) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    maps.lines().any(|line| {
        let range = line.split_whitespace().next().and_then(|range| range.split_once('-'));
        let (low, high) = range.expect("a range");
        let number = |hex| usize::from_str_radix(hex, 16).expect("hex");
        (number(low)..number(high)).contains(&address)
    })
}

impl Pin for Pins {
    fn pin(&self, start: usize, len: usize) -> bool {
        assert!(is_mapped(start) && is_mapped(start + len - 1));
        assert!(self.now.lock().expect("lock").insert(start, len).is_none(), "pinned twice");
        *self.ever.lock().expect("lock") += 1;
        true
    }

    fn unpin(&self, start: usize) -> bool {
        assert!(is_mapped(start), "unmapped before it was unpinned");
        assert!(self.now.lock().expect("lock").remove(&start).is_some(), "it was not pinned");
        true
    }
}

/// Asks whether its slot is pinned, and brings nothing.
struct Asking(Arc<Pins>);

impl Bring for Asking {
    fn begin(
        self: Box<Self>,
        slot: usize,
        len: usize,
        _: &[Placement],
    ) -> Result<Box<dyn Landing>> {
        assert!(self.0.holds(slot, slot + len), "a slot that is not pinned");
        Ok(Box::new(Copying(Some(std::thread::spawn(|| {})), false)))
    }
}

#[test]
fn slots_are_pinned_before_they_are_used_and_unpinned_before_they_go() {
    let places = Places::new();
    let ckpt = places.open();
    resume(&ckpt, &SIZES).unwrap();
    let pins = Arc::new(Pins::default());
    // The first slot is there before anybody knows of a device; then the state grows.
    Model::at(0, &SIZES, 1).save(&ckpt, 1).unwrap();
    ckpt.pin_with(pins.clone());
    for (step, size) in
        [(2, 1 << 20), (3, 1 << 20), (4, 1 << 20), (5, 30 << 20), (6, 30 << 20), (7, 50)]
    {
        let model = Model::at(0, &[size], step);
        let mut request = model.request(step);
        request.state.tensors[0].memory = Memory::InSlot;
        let bring: Option<Box<dyn Bring>> = Some(Box::new(Asking(pins.clone())));
        // SAFETY: no memory of the host is named.
        let save = unsafe { ckpt.save(SaveRequest { bring, ..request }) }.unwrap();
        wait(&save, Level::Disk);
    }
    assert!(*pins.ever.lock().expect("lock") >= 4);
    close(&ckpt);
    drop(ckpt);
    assert!(pins.now.lock().expect("lock").is_empty(), "{pins:?}");
}

/// As a restore to devices reads: one tensor after the other, each into memory that the next one
/// may have.
#[test]
fn a_damaged_copy_is_told_once_in_however_many_parts_it_is_read() {
    let sizes = [100_000, 9 << 20, 9 << 20, 100_000];
    let places = Places::new();
    let ckpt = places.open();
    resume(&ckpt, &sizes).unwrap();
    let model = Model::at(0, &sizes, 1);
    wait(&model.save(&ckpt, 1).unwrap(), Level::Disk);
    drop(ckpt);
    let in_ram = payload_in(places.ram());
    common::flip(&in_ram, 8 * (10 << 20)); // In the chunk that two parts share.
    let ckpt = places.open();
    let found = ckpt.begin(&Begin::default()).unwrap().unwrap();
    let mut reading = Reading::of(found.clone());
    let mut live = Model::new(0, &sizes);
    for (i, tensor) in live.tensors.iter_mut().enumerate() {
        let memory = copy::Memory::Bytes(Address::new(tensor.as_mut_ptr()));
        // SAFETY: the model's own vector, of the size that was saved.
        unsafe { reading.fill(&[(format!("t{i}"), memory)].into(), None) }.unwrap();
    }
    let report = reading.finish();
    assert!(live.is_at(1));
    assert_eq!((report.tier, report.damaged.len()), (TierKind::Ram, 1), "{:?}", report.damaged);
    let told = events(&ckpt);
    let count = |kind: &str| told.iter().filter(|t| t.starts_with(kind)).count();
    assert_eq!((count("damaged_copy"), count("repaired")), (1, 1), "{told:?}");
    let mended = read_whole(&found, &sizes).unwrap();
    assert!(mended.damaged.is_empty());
}

fn payload_in(ram: &std::path::Path) -> std::path::PathBuf {
    let is_payload = |f: &std::path::PathBuf| f.to_string_lossy().ends_with(".safetensors");
    ram.join(common::files(ram).into_iter().find(is_payload).unwrap())
}
