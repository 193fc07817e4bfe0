//! Payloads that are compressed on their way to a bucket.

use std::{path::Path, sync::Arc};

use tierkeep::{
    bucket::Bucket,
    checkpointer::{Checkpointer, SaveRequest},
    manifest::Meta,
    names::Rank,
    reader::Reader,
    restore::copy_out::copy_out,
    save::{Level, Save},
    snapshot::{copy, strided::Address},
    state::{
        Memory, State, Tensor, TensorSpec,
        dtype::Dtype,
        value::{Lib, TensorRef, Value},
    },
    tier::{Tier, object::ObjectTier},
    verify::{Depth, verify},
};

use crate::{
    common::{Places, close, wait},
    open,
    servers::{self, Place},
};

/// Floats as a training has them: exponents that are much alike, and mantissas that are not.
fn weights(count: usize, seed: u64) -> Vec<f32> {
    let mut x = seed | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let unit = |bits: u64| (bits >> 40) as f32 / (1 << 24) as f32 - 0.5;
    (0..count).map(|_| (0..4).map(|_| unit(next())).sum::<f32>() * 0.02).collect()
}

fn spec(name: &str, dtype: Dtype, count: usize) -> Arc<TensorSpec> {
    let shape = vec![count as u64];
    Arc::new(TensorSpec { name: name.into(), dtype, shape, part_of: None, held_by: Vec::new() })
}

/// Weights, and noise that nothing makes smaller.
struct Model {
    weights: Vec<f32>,
    noise: Vec<u8>,
}

impl Model {
    fn at(step: u64) -> Self {
        let weights = weights(3_000_000, step);
        let noise = tierkeep::testing::contract::pattern(9 << 20, step);
        Self { weights, noise }
    }

    fn save(&self, ckpt: &Checkpointer, step: u64) -> Save {
        let tensor = |spec: Arc<TensorSpec>, at: *const u8| Tensor {
            spec,
            memory: Memory::Contiguous(Address::read_only(at)),
            late: false,
        };
        let tensors = vec![
            tensor(spec("w", Dtype::F32, self.weights.len()), self.weights.as_ptr().cast()),
            tensor(spec("n", Dtype::U8, self.noise.len()), self.noise.as_ptr()),
        ];
        let leaf = |name: &str| {
            let leaf = TensorRef { name: name.into(), lib: Lib::Numpy, param: false, whole: None };
            (Value::Str(name.into()), Value::Tensor(leaf))
        };
        let request = SaveRequest {
            step,
            state: State { tree: Value::Dict(vec![leaf("w"), leaf("n")]), tensors },
            meta: Meta::default(),
            bring: None,
            overlap: false,
            skip_if_busy: false,
            keep_alive: Box::new(()),
            interrupted: None,
        };
        // SAFETY: "now": the memory is read only during the call.
        unsafe { ckpt.save(request) }.expect("save")
    }

    /// Whether `found` has the same bytes.
    fn is_in(&self, found: &tierkeep::restore::read::Restorable) {
        let mut back =
            Self { weights: vec![0.0; self.weights.len()], noise: vec![0; self.noise.len()] };
        let targets = [
            ("w".to_owned(), copy::Memory::Bytes(Address::new(back.weights.as_mut_ptr().cast()))),
            ("n".to_owned(), copy::Memory::Bytes(Address::new(back.noise.as_mut_ptr()))),
        ];
        // SAFETY: the targets are vectors of our own, of the lengths that were saved.
        let report = unsafe { found.read(&targets.into(), None) }.expect("read");
        assert!(report.damaged.is_empty(), "{:?}", report.damaged);
        let bits = |all: &[f32]| all.iter().map(|w| w.to_bits()).collect::<Vec<_>>();
        assert!(bits(&back.weights) == bits(&self.weights) && back.noise == self.noise);
    }
}

fn start(places: &Places, place: &Place) -> Checkpointer {
    let mut config = places.config();
    let bucket = Bucket::new(&place.url, config.disk_every).expect("bucket");
    let options = place.options.clone();
    config.bucket = Some(Bucket { options, compress: true, ..bucket });
    Checkpointer::open(config).expect("open")
}

fn reader(place: &Place) -> Reader {
    let nowhere = Some(Path::new("/nowhere"));
    Reader::open_with(Path::new(&place.url), nowhere, &place.options).expect("open")
}

fn packed_file(place: &Place) -> (ObjectTier, String, u64) {
    let (tier, reader) = (open(place), reader(place));
    let info = reader.steps().expect("steps").pop().expect("a step");
    let listing = tierkeep::commit::Listing::of(&tier, &info.key).expect("list");
    let files: Vec<String> = listing.payloads.into_values().flatten().collect();
    assert!(files.len() == 1 && files[0].ends_with(".packed"), "{files:?}");
    let name = info.key.file(&files[0]);
    let len = tier.open(&name).expect("open").len();
    (tier, name, len)
}

#[test]
fn what_is_compressed_in_a_bucket_comes_back_bit_for_bit_everywhere() {
    let (places, place) = (Places::new(), servers::s3());
    let ckpt = start(&places, &place);
    assert!(ckpt.begin(&Default::default()).expect("begin").is_none());
    let model = Model::at(1);
    wait(&model.save(&ckpt, 1), Level::Object);
    close(&ckpt);
    let plain = (3_000_000 * 4 + (9 << 20)) as u64;
    let (_, _, len) = packed_file(&place);
    assert!(len < plain - plain / 20, "{len} of {plain}");
    // The store's word is for the file as it lies there.
    let (records, found) = tierkeep::verify::verify_records(&reader(&place)).expect("records");
    let run_id = records.good.last().map(|r| r.run_id);
    for (depth, read) in [(Depth::Told, 0), (Depth::Bytes, plain)] {
        let reader = reader(&place);
        let verdict = verify(&reader, &found[0], run_id.as_ref(), depth, &|_| ());
        assert!(verdict.is_good() && verdict.bytes.abs_diff(read) < 1 << 20, "{verdict:?}");
        assert!(verdict.told_bytes.abs_diff(plain - read) < 1 << 20, "{verdict:?}");
    }
    // By another machine, whole; by the command, to a directory; from there again, by a job.
    let reader = reader(&place);
    let info = reader.steps().expect("steps").pop().expect("a step");
    assert_eq!(info.key.step.0, 1);
    model.is_in(&reader.shard(&info.key, Rank(0)).expect("shard"));
    let elsewhere = Places::new();
    let to = elsewhere.destination();
    copy_out(&reader, &info.key, &[0], &to, Some(elsewhere.ram()), &Default::default(), &|_| ())
        .expect("copied");
    let there = Reader::open(&to, Some(elsewhere.ram())).expect("open");
    let shard = there.shard(&info.key, Rank(0)).expect("shard");
    assert!(shard.manifest().payload.stored.is_none() && shard.verify().is_empty());
    model.is_in(&shard);
    drop(there);
    let job = start(&elsewhere, &place);
    model.is_in(&job.begin(&Default::default()).expect("begin").expect("a checkpoint"));
    close(&job);
    // And where only the bucket is left.
    let third = Places::new();
    let job = start(&third, &place);
    model.is_in(&job.begin(&Default::default()).expect("begin").expect("a checkpoint"));
    wait(&Model::at(2).save(&job, 2), Level::Object);
    close(&job);
}

#[test]
fn damage_to_a_compressed_payload_is_found_by_its_chunk_and_another_copy_is_used() {
    let (places, place) = (Places::new(), servers::s3());
    let ckpt = start(&places, &place);
    assert!(ckpt.begin(&Default::default()).expect("begin").is_none());
    let model = Model::at(1);
    wait(&model.save(&ckpt, 1), Level::Object);
    close(&ckpt);
    let (tier, name, len) = packed_file(&place);
    for at in [0, len / 3, len - 1] {
        let source = tier.open(&name).expect("open");
        let mut byte = [0];
        source.read_at(at, &mut byte).expect("read");
        byte[0] ^= 0x10;
        tier.mend(&name, at, &byte).expect("flip");
        let reader = reader(&place);
        let info = reader.steps().expect("steps").pop().expect("a step");
        let found = tierkeep::restore::survey::survey(&reader.tiers()).expect("survey");
        let told = verify(&reader, &found[0], None, Depth::Told, &|_| ());
        assert!(!told.is_good() && told.findings[0].why.contains("CRC-32"), "{told:?}");
        let bad = reader.shard(&info.key, Rank(0)).expect("shard").verify();
        assert!(bad.len() == 1 && bad[0].why.contains("chunk"), "{at}: {bad:?}");
        byte[0] ^= 0x10;
        tier.mend(&name, at, &byte).expect("flip back");
    }
    let mut cut = vec![0; usize::try_from(len).expect("length")];
    tier.open(&name).expect("open").read_at(0, &mut cut).expect("read");
    cut.pop();
    tier.delete(&name).expect("delete");
    tier.create(&name, &cut).expect("cut short");
    let e = reader(&place).overview().expect("overview");
    assert!(e.resume.is_none(), "{e:?}");
    // The disk has it.
    let job = start(&places, &place);
    model.is_in(&job.begin(&Default::default()).expect("begin").expect("a checkpoint"));
    close(&job);
}
