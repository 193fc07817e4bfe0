//! Tensors of which each rank holds a part: saved by some ranks, restored by others.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // Tests.

mod common;

use std::{collections::BTreeSet, sync::Arc};

use common::{Places, close, events, files, flip, wait};
use tierkeep::{
    Error, ErrorKind, Result,
    begin::Begin,
    checkpointer::{Checkpointer, SaveRequest},
    config::Config,
    manifest::Meta,
    restore::{parts::Wanted, read::Restorable, reading::Reading},
    save::{Level, Save},
    snapshot::strided::Address,
    state::{
        Memory, State, Tensor, TensorSpec,
        boxes::{Region, box_name, name_of_all},
        dtype::Dtype,
        value::{Lib, TensorRef, Value, Whole},
    },
};

/// Of the one tensor: some 10 MiB of U16, so that parts cut chunks and chunks cut parts.
const SHAPE: [u64; 3] = [601, 257, 33];

/// How it is cut.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cut {
    /// Dimension `.0` over all ranks, as evenly as can be; the last ones may have nothing.
    Over(usize),
    /// Two halves of the ranks hold the same, each cut over its own.
    Twice(usize),
    /// In two dimensions, in 2 columns.
    Mesh,
    /// All ranks have all of it.
    Copies,
}

/// (its part, the ranks that hold the same) of each rank.
fn parts(cut: Cut, world: u32) -> Vec<(Region, Vec<u32>)> {
    let slab = |dim: usize, index: u64, of: u64| {
        let step = SHAPE[dim].div_ceil(of);
        let begin = (index * step).min(SHAPE[dim]);
        (begin, step.min(SHAPE[dim] - begin))
    };
    let part = |rank: u32| {
        let mut region = Region::whole(&SHAPE);
        let (ranks, at) = (u64::from(world), u64::from(rank));
        let mut cut_in = |dim: usize, index, of| {
            (region.offset[dim], region.shape[dim]) = slab(dim, index, of);
        };
        let held_by = match cut {
            Cut::Over(dim) => {
                cut_in(dim, at, ranks);
                vec![rank]
            }
            Cut::Twice(dim) => {
                let half = world / 2;
                cut_in(dim, at % u64::from(half), u64::from(half));
                vec![rank % half, rank % half + half]
            }
            Cut::Mesh => {
                cut_in(0, at / 2, ranks / 2);
                cut_in(2, at % 2, 2);
                vec![rank]
            }
            Cut::Copies => (0..world).collect(),
        };
        (region, held_by)
    };
    (0..world).map(part).collect()
}

/// The elements of a part after so many steps.
fn elements(region: &Region, step: u64) -> Vec<u16> {
    let mut all = Vec::new();
    let [i, j, k] = [0, 1, 2].map(|d| region.offset[d]..region.offset[d] + region.shape[d]);
    for i in i {
        for j in j.clone() {
            let row = (i * SHAPE[1] + j) * SHAPE[2];
            all.extend(k.clone().map(|k| (row + k).wrapping_mul(40_503).wrapping_add(step) as u16));
        }
    }
    all
}

/// What one rank saves: its part of `w`, and a number that is its own.
struct Held {
    region: Region,
    ranks: Vec<u32>,
    elements: Vec<u16>,
}

impl Held {
    fn save(&self, ckpt: &Checkpointer, step: u64) -> Save {
        let whole = Whole { dtype: Dtype::U16, shape: SHAPE.to_vec() };
        let name = name_of_all("w").into();
        let leaf = TensorRef { name, lib: Lib::Numpy, param: false, whole: Some(Arc::new(whole)) };
        let rank = Value::Int(ckpt.config().rank.into());
        let tree = Value::Dict(vec![
            (Value::Str("w".into()), Value::Tensor(leaf)),
            (Value::Str("rank".into()), rank),
        ]);
        let spec = TensorSpec {
            name: box_name("w", &self.region.offset).into(),
            dtype: Dtype::U16,
            shape: self.region.shape.clone(),
            part_of: Some((SHAPE.to_vec(), self.region.offset.clone())),
            held_by: self.ranks.clone(),
        };
        let memory = Memory::Contiguous(Address::read_only(self.elements.as_ptr().cast()));
        let tensor = Tensor { spec: Arc::new(spec), memory, late: false };
        let tensors = if self.region.is_empty() { vec![] } else { vec![tensor] };
        let request = SaveRequest {
            step,
            state: State { tree, tensors },
            meta: Meta::default(),
            bring: None,
            overlap: false,
            skip_if_busy: false,
            keep_alive: Box::new(()),
            interrupted: None,
        };
        // SAFETY: copied before the call returns.
        unsafe { ckpt.save(request) }.unwrap()
    }
}

fn open(places: &Places, world: u32) -> Vec<Checkpointer> {
    (0..world).map(|rank| Checkpointer::open(places.config_of(rank, world)).unwrap()).collect()
}

fn begin(ckpts: &[Checkpointer]) -> Vec<Option<Restorable>> {
    std::thread::scope(|scope| {
        let begun: Vec<_> = ckpts
            .iter()
            .map(|ckpt| scope.spawn(move || ckpt.begin(&Begin::default()).unwrap()))
            .collect();
        begun.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn save(ckpts: &[Checkpointer], cut: Cut, step: u64) -> Vec<Save> {
    let world = u32::try_from(ckpts.len()).unwrap();
    let held = parts(cut, world).into_iter().map(|(region, ranks)| {
        let elements = elements(&region, step);
        Held { region, ranks, elements }
    });
    held.zip(ckpts).map(|(held, ckpt)| held.save(ckpt, step)).collect()
}

/// Reads a part, and says whether all of it is what was saved.
fn read(found: &Restorable, region: &Region, step: u64) -> Result<(bool, Vec<String>)> {
    let mut target = vec![0_u16; region.shape.iter().product::<u64>() as usize];
    let wanted = Wanted {
        name: name_of_all("w"),
        rank: None,
        dtype: Dtype::U16,
        shape: SHAPE.to_vec(),
        region: region.clone(),
        start: Address::new(target.as_mut_ptr().cast()),
        strides: [region.shape[1] * region.shape[2], region.shape[2], 1]
            .map(|n| n as isize * 2)
            .to_vec(),
    };
    let mut reading = Reading::of(found.clone());
    // SAFETY: the target has the part's elements.
    unsafe { reading.fill_parts(&[wanted], None) }?;
    let report = reading.finish();
    Ok((target == elements(region, step), report.damaged))
}

const CUTS: [(Cut, u32); 7] = [
    (Cut::Over(0), 3),
    (Cut::Twice(1), 4),
    (Cut::Mesh, 4),
    (Cut::Copies, 1),
    (Cut::Over(2), 5),
    (Cut::Copies, 3),
    (Cut::Over(1), 4),
];

#[test]
fn what_was_cut_in_one_way_comes_back_cut_in_another() {
    for (first, world) in CUTS {
        let places = Places::new();
        let ckpts = open(&places, world);
        begin(&ckpts);
        for save in save(&ckpts, first, 1) {
            wait(&save, Level::Disk);
        }
        ckpts.iter().for_each(close);
        drop(ckpts);
        places.settle();
        let (mut step, mut before) = (1, (first, world));
        for (cut, world) in CUTS {
            // Sometimes from disk alone.
            if step % 2 == 0 && !places.is_hosted() {
                places.wipe_ram();
            }
            let ckpts = open(&places, world);
            let found = begin(&ckpts);
            for ((region, _), found) in parts(cut, world).iter().zip(&found) {
                let found = found.as_ref().unwrap();
                assert_eq!(found.step().0, step);
                let (same, damaged) = read(found, region, step).unwrap();
                assert!(same, "{before:?} to {:?}", (cut, world));
                assert_eq!(damaged, Vec::<String>::new());
            }
            step += 1;
            let saves = save(&ckpts, cut, step);
            saves.iter().for_each(|save| wait(save, Level::Disk));
            ckpts.iter().for_each(close);
            drop((ckpts, saves));
            places.settle();
            before = (cut, world);
        }
    }
}

/// What is read of other ranks' shards is as much as the part takes, in whole chunks.
#[test]
fn only_chunks_with_wanted_elements_are_read() {
    let places = Places::new();
    let ckpts = open(&places, 2);
    begin(&ckpts);
    save(&ckpts, Cut::Over(0), 1).iter().for_each(|save| wait(save, Level::Disk));
    ckpts.iter().for_each(close);
    drop(ckpts);
    if places.is_hosted() {
        return; // The agent may hold what lies in RAM.
    }
    places.wipe_ram();
    // Every chunk but the first of rank 1's shard is spoilt: rows that lie in the first come all the same.
    let payload = payload_of(&places, 1);
    let (length, chunk) = (payload.metadata().unwrap().len(), 4 << 20);
    assert!(length > chunk);
    for at in (chunk..length).step_by(chunk as usize) {
        flip(&payload, at * 8);
    }
    let ckpt = Checkpointer::open(places.config_of(0, 1)).unwrap();
    let found = ckpt.begin(&Begin::default()).unwrap().unwrap();
    let region = Region { offset: vec![290, 3, 5], shape: vec![100, 200, 20] };
    assert_eq!(read(&found, &region, 1).unwrap(), (true, vec![]));
    let error = read(&found, &Region::whole(&SHAPE), 1).unwrap_err();
    assert!(matches!(&error, Error::Lost { rank, .. } if rank.0 == 1), "{error}");
}

fn payload_of(places: &Places, rank: u32) -> std::path::PathBuf {
    let name = format!("rank-{rank:06}-");
    let run = places.destination();
    let all =
        files(&run).into_iter().filter(|path| path.extension().is_some_and(|e| e == "safetensors"));
    let of_rank =
        |path: &std::path::PathBuf| path.file_name().unwrap().to_string_lossy().starts_with(&name);
    run.join(all.into_iter().find(of_rank).unwrap())
}

#[test]
fn what_nobody_saved_is_an_error_that_names_it() {
    let places = Places::new();
    let ckpts = open(&places, 2);
    begin(&ckpts);
    let mut rows = parts(Cut::Over(0), 2);
    rows[1].0.shape[0] -= 7;
    let saves: Vec<Save> = rows
        .into_iter()
        .zip(&ckpts)
        .map(|((region, ranks), ckpt)| {
            let elements = elements(&region, 1);
            Held { region, ranks, elements }.save(ckpt, 1)
        })
        .collect();
    saves.iter().for_each(|save| wait(save, Level::Disk));
    ckpts.iter().for_each(close);
    drop((ckpts, saves));
    places.settle();
    let ckpt = Checkpointer::open(places.config_of(0, 1)).unwrap();
    let found = ckpt.begin(&Begin::default()).unwrap().unwrap();
    let error = read(&found, &Region::whole(&SHAPE), 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let text = error.to_string();
    assert!(text.contains("w: no rank saved [594:601, 0:257, 0:33] of it"), "{text}");
    // What there is comes.
    let there = Region { offset: vec![100, 0, 0], shape: vec![494, 257, 33] };
    assert!(read(&found, &there, 1).unwrap().0);
}

#[test]
fn what_ranks_hold_alike_is_stored_once_and_compared() {
    let places = Places::new();
    let ckpts = open(&places, 4);
    begin(&ckpts);
    save(&ckpts, Cut::Twice(0), 1).iter().for_each(|save| wait(save, Level::Disk));
    let run = places.destination();
    let sizes =
        files(&run).into_iter().filter(|f| f.extension().is_some_and(|e| e == "safetensors"));
    let sum: u64 = sizes.map(|f| run.join(f).metadata().unwrap().len()).sum();
    let whole = SHAPE.iter().product::<u64>() * 2;
    assert!((whole..whole + 8192).contains(&sum), "{sum} bytes for {whole}");
    // A bit that one of them has alone: no checkpoint, and it is named.
    let parts = parts(Cut::Twice(0), 4);
    let held = parts.into_iter().enumerate().map(|(rank, (region, ranks))| {
        let mut elements = elements(&region, 2);
        elements[17] ^= u16::from(rank == 3);
        Held { region, ranks, elements }
    });
    let saves: Vec<Save> = held.zip(&ckpts).map(|(held, ckpt)| held.save(ckpt, 2)).collect();
    for save in &saves {
        let error = save.poll(Level::Ram, false, std::time::Duration::from_secs(30)).unwrap_err();
        assert!(error.to_string().contains("differ"), "{error}");
    }
    if !places.is_hosted() {
        let told: Vec<String> = ckpts.iter().flat_map(events).collect();
        let text = "w#301.0.0 has other bytes on rank 3 than on rank 1";
        assert!(told.iter().any(|line| line.contains(text)), "{told:#?}");
    }
    ckpts.iter().for_each(close);
}

/// Where it is durable when it was read, else when a newer checkpoint is.
#[test]
fn memory_of_ranks_that_are_no_more_is_given_back() {
    if Places::new().is_hosted() {
        return; // An agent does it in its own time (`host/left.rs`).
    }
    for first in [Level::Ram, Level::Disk] {
        give_back(first);
    }
}

fn give_back(first: Level) {
    let places = Places::new();
    let open = |world: u32| -> Vec<Checkpointer> {
        let every = if first == Level::Ram { 2 } else { 1 };
        let config = |rank| Config { disk_every: every, ..places.config_of(rank, world) };
        (0..world).map(|rank| Checkpointer::open(config(rank)).unwrap()).collect()
    };
    let ckpts = open(4);
    begin(&ckpts);
    save(&ckpts, Cut::Over(0), 1).iter().for_each(|save| wait(save, first));
    ckpts.into_iter().for_each(drop); // Killed: all stays in RAM.
    let ram = places.config().ram_dir();
    let ranks = || -> BTreeSet<String> {
        let name =
            |path: std::path::PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
        let names = files(&ram).into_iter().map(name).filter(|name| name.starts_with("rank-"));
        names.map(|name| name[5..11].into()).collect()
    };
    assert_eq!(ranks().len(), 4);
    let ckpts = open(2);
    let found = begin(&ckpts);
    assert_eq!(ranks().len(), 4, "it was not read yet");
    for ((region, _), found) in parts(Cut::Over(1), 2).iter().zip(&found) {
        assert!(read(found.as_ref().unwrap(), region, 1).unwrap().0);
    }
    drop(found);
    let left = if first == Level::Ram { 4 } else { 2 };
    assert_eq!(ranks().len(), left, "the only copy of what they saved stays");
    for save in save(&ckpts, Cut::Over(1), 2) {
        wait(&save, Level::Disk);
    }
    ckpts.iter().for_each(close);
    assert!(ranks().iter().all(|rank| ["000000", "000001"].contains(&&**rank)), "{:?}", ranks());
}
