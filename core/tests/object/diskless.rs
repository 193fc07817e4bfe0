//! Jobs without a disk: from RAM to the bucket, and back from whichever has the newest.

use std::{path::Path, time::Duration};

use tierkeep::{
    bucket::Bucket,
    checkpointer::Checkpointer,
    config::Config,
    names::Rank,
    reader::Reader,
    save::{Level, Save},
};

use crate::{
    cascade::{save, steps, until},
    common::{Model, Places, SIZES, SMALL, close, events, resume, wait},
    servers::{self, Place},
};

fn config(places: &Places, place: &Place, rank: u32, world: u32) -> Config {
    let like = places.config_of(rank, world);
    let new = Config::new(Path::new(&place.url)).expect("config");
    let bucket = new.bucket.expect("a bucket");
    Config {
        destination: new.destination,
        slots: new.slots,
        bucket: Some(Bucket { options: place.options.clone(), ..bucket }),
        ..like
    }
}

fn start(places: &Places, place: &Place) -> Checkpointer {
    Checkpointer::open(config(places, place, 0, 1)).expect("open")
}

#[test]
fn a_job_without_a_disk_goes_on_from_ram_and_where_that_is_gone_from_the_bucket() {
    let (places, place) = (Places::new(), servers::s3());
    let ckpt = start(&places, &place);
    assert_eq!(resume(&ckpt, &SIZES).expect("resume"), 0);
    let first = save(&ckpt, &SIZES, 1);
    wait(&first, Level::Object);
    let e = first.poll(Level::Disk, false, Duration::ZERO).expect_err("there is no disk");
    assert!(e.chain().contains("there is none here"), "{}", e.chain());
    wait(&save(&ckpt, &SIZES, 2), Level::Object);
    let third = save(&ckpt, &SIZES, 3);
    wait(&third, Level::Ram);
    drop((ckpt, third)); // As a process that dies.
    places.settle();
    let ckpt = start(&places, &place);
    let found = ckpt.begin(&tierkeep::begin::Begin::default()).expect("begin").expect("found");
    assert_eq!(found.step().0, 3);
    until("what was resumed is in the bucket too", || steps(&place).contains(&3));
    drop(ckpt);
    places.settle();
    places.wipe_ram();
    if places.is_hosted() {
        return; // Its agent is another matter: it was not told.
    }
    let ckpt = start(&places, &place);
    assert_eq!(resume(&ckpt, &SIZES).expect("resume"), 3, "{:?}", events(&ckpt));
    wait(&save(&ckpt, &SIZES, 4), Level::Object);
    close(&ckpt);
    assert_eq!(steps(&place), [2, 3, 4]);
    assert!(files(&places).iter().all(|file| !file.ends_with(".safetensors")), "memory");
}

fn files(places: &Places) -> Vec<String> {
    let files = crate::common::files(places.ram()).into_iter();
    files.map(|file| file.display().to_string()).collect()
}

/// Saves so many steps on each rank, one after the other; those of the first rank.
fn train(
    places: &Places,
    place: &Place,
    rate: Option<u64>,
    steps: std::ops::RangeInclusive<u64>,
) -> Vec<Save> {
    const WORLD: u32 = 3;
    let all = std::thread::scope(|scope| {
        let of = |rank: u32| {
            let mut config = config(places, place, rank, WORLD);
            config.bucket.as_mut().expect("bucket").bytes_per_second_max = rate;
            let steps = steps.clone();
            move || {
                let ckpt = Checkpointer::open(config).expect("open");
                assert_eq!(resume(&ckpt, &SMALL).expect("resume"), steps.start() - 1);
                let save = |step| {
                    let save = Model::at(rank, &SMALL, step).save(&ckpt, step).expect("save");
                    wait(&save, Level::Ram);
                    save
                };
                let saves: Vec<Save> = steps.map(save).collect();
                close(&ckpt);
                saves
            }
        };
        let ranks: Vec<_> = (0..WORLD).map(|rank| scope.spawn(of(rank))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank")).collect::<Vec<_>>()
    });
    all.into_iter().next().expect("the first rank")
}

#[test]
fn ranks_without_a_disk_are_not_held_up_by_a_slow_bucket_which_gets_fewer_whole_checkpoints() {
    let (places, place) = (Places::new(), servers::s3());
    let saves = train(&places, &place, Some(200_000), 1..=30);
    let there: Vec<u64> = saves.iter().filter(|s| s.progress().object).map(Save::step).collect();
    assert!(there.contains(&30), "{there:?}: the newest one goes there before the job is over");
    let rest = saves.iter().filter(|save| !there.contains(&save.step()));
    for save in rest.clone() {
        let e = save.poll(Level::Object, false, Duration::ZERO).expect_err("it is not there");
        assert!(e.chain().contains("passed over"), "{}", e.chain());
    }
    assert!(rest.count() > 5, "{there:?}: it is not so slow");
    let reader =
        Reader::open_with(Path::new(&place.url), Some(Path::new("/nowhere")), &place.options);
    let reader = reader.expect("open");
    let mut infos = reader.steps().expect("steps");
    // Of more than three the first one goes again, its tombstone last.
    infos.retain(|info| !matches!(info.reach, tierkeep::restore::survey::Reach::Deleted));
    assert!(infos.iter().all(|info| info.sealed && there.contains(&info.key.step.0)), "{infos:?}");
    for info in &infos {
        for rank in 0..3 {
            assert!(reader.shard(&info.key, Rank(rank)).expect("shard").verify().is_empty());
        }
    }
    train(&places, &place, None, 31..=33);
    assert_eq!(steps(&place).last(), Some(&33));
}

#[test]
fn settings_that_need_a_disk_are_refused_without_one() {
    let (places, place) = (Places::new(), servers::s3());
    let mut config = config(&places, &place, 0, 1);
    config.slots = 2;
    let e = Checkpointer::open(config).map(drop).expect_err("too few slots");
    assert!(e.chain().contains("at least 3 without a disk"), "{}", e.chain());
}
