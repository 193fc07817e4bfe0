//! Jobs whose checkpoints go on from disk to a bucket, and come back from it.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tierkeep::{
    ErrorKind,
    begin::Begin,
    bucket::Bucket,
    checkpointer::Checkpointer,
    config::Config,
    names::Rank,
    reader::Reader,
    retain::Policy,
    save::{Level, Save},
    tier::Tier,
    upkeep,
};

use crate::{
    common::{Model, Places, SIZES, SMALL, close, events, resume, wait},
    open,
    proxy::{Fate, Proxy},
    servers::{self, Place},
};

pub(crate) fn config(places: &Places, place: &Place) -> Config {
    let mut config = places.config();
    let bucket = Bucket::new(&place.url, config.disk_every).expect("bucket");
    let (options, grace) = (place.options.clone(), Duration::ZERO);
    config.bucket = Some(Bucket { options, grace, ..bucket });
    config
}

pub(crate) fn start(places: &Places, place: &Place) -> Checkpointer {
    Checkpointer::open(config(places, place)).expect("open")
}

pub(crate) fn save(ckpt: &Checkpointer, sizes: &[usize], step: u64) -> Save {
    Model::at(ckpt.config().rank, sizes, step).save(ckpt, step).expect("save")
}

pub(crate) fn steps(place: &Place) -> Vec<u64> {
    let reader =
        Reader::open_with(Path::new(&place.url), Some(Path::new("/nowhere")), &place.options);
    let steps = reader.expect("open").steps().expect("steps");
    steps.into_iter().filter(|info| info.sealed).map(|info| info.key.step.0).collect()
}

/// Waits until it is in a bucket that makes it slow: for tests of what it does meanwhile.
pub(crate) fn reaches(save: &Save) {
    let reached = save.poll(Level::Object, false, Duration::from_secs(300));
    assert!(reached.expect("wait"), "step {} did not reach the bucket", save.step());
}

pub(crate) fn until(what: &str, mut so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !so() {
        // A minute is what a request may take that was at the server when it went away.
        assert!(begun.elapsed() < Duration::from_secs(180), "{what}: not within three minutes");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_job_goes_on_from_the_bucket_where_everything_else_is_lost() {
    let (places, place) = (Places::new(), servers::s3());
    let ckpt = start(&places, &place);
    resume(&ckpt, &SIZES).expect("resume");
    for step in 1..=3 {
        wait(&save(&ckpt, &SIZES, step), Level::Object);
    }
    close(&ckpt);
    drop((ckpt, places));
    assert_eq!(steps(&place), [1, 2, 3]);
    // Another machine.
    let elsewhere = Places::new();
    let ckpt = start(&elsewhere, &place);
    assert_eq!(resume(&ckpt, &SIZES).expect("resume"), 3, "{:?}", events(&ckpt));
    wait(&save(&ckpt, &SIZES, 4), Level::Object);
    let told = events(&ckpt);
    assert!(
        !told.iter().any(|text| text.contains("failed") || text.contains("given up")),
        "{told:?}"
    );
    close(&ckpt);
    assert_eq!(steps(&place), [2, 3, 4], "three stay");
    // And from RAM and disk again, without the bucket's bytes being asked for.
    let tier = open(&place);
    let shard = |step: u64| {
        let reader = Reader::open_with(Path::new(&place.url), None, &place.options).expect("open");
        let info = reader
            .steps()
            .expect("steps")
            .into_iter()
            .find(|i| i.key.step.0 == step)
            .expect("step");
        let file = reader.shard(&info.key, Rank(0)).expect("shard").manifest().payload.file.clone();
        info.key.file(&file)
    };
    tier.delete(&shard(4)).expect("delete");
    let ckpt = start(&elsewhere, &place);
    assert_eq!(resume(&ckpt, &SIZES).expect("resume"), 4, "the disk has it");
    close(&ckpt);
}

#[test]
fn a_job_that_goes_on_from_shards_in_the_bucket_that_nobody_sealed_seals_them_there() {
    let (places, place) = (Places::new(), servers::s3());
    let ckpt = start(&places, &place);
    resume(&ckpt, &SMALL).expect("resume");
    wait(&save(&ckpt, &SMALL, 1), Level::Object);
    wait(&save(&ckpt, &SMALL, 2), Level::Object);
    let dir = format!("{:020}/{}", 2, ckpt.attempt().expect("attempt").attempt.dir());
    close(&ckpt);
    // As if it had died right before.
    open(&place).delete(&format!("{dir}/CHECKPOINT.json")).expect("delete");
    assert_eq!(steps(&place), [1]);
    let elsewhere = Places::new();
    let ckpt = start(&elsewhere, &place);
    assert_eq!(resume(&ckpt, &SMALL).expect("resume"), 2);
    until("it is sealed", || steps(&place) == [1, 2]);
    wait(&save(&ckpt, &SMALL, 3), Level::Object);
    close(&ckpt);
    let told = events(&ckpt);
    assert!(!told.iter().any(|text| text.contains("given up")), "{told:?}");
}

#[test]
fn every_rank_sends_its_shard_and_one_seals() {
    let (places, place) = (Places::new(), servers::s3());
    let world = 3;
    let of = |rank: u32| {
        let mut config = config(&places, &place);
        config.rank = rank;
        config.world = world;
        config.savers = (0..world).collect();
        config
    };
    std::thread::scope(|scope| {
        for rank in 0..world {
            let config = of(rank);
            scope.spawn(move || {
                let ckpt = Checkpointer::open(config).expect("open");
                resume(&ckpt, &SIZES).expect("resume");
                for step in 1..=3 {
                    wait(&save(&ckpt, &SIZES, step), Level::Object);
                }
                close(&ckpt);
            });
        }
    });
    assert_eq!(steps(&place), [1, 2, 3]);
    let reader = Reader::open_with(Path::new(&place.url), None, &place.options).expect("open");
    for info in reader.steps().expect("steps") {
        for rank in 0..world {
            assert!(reader.shard(&info.key, Rank(rank)).expect("shard").verify().is_empty());
        }
    }
}

#[test]
fn a_bucket_that_is_away_holds_nothing_up_and_catches_up() {
    let away = Arc::new(AtomicBool::new(false));
    let told = away.clone();
    let proxy = Proxy::start(servers::s3_port(), move |_| match told.load(Ordering::Relaxed) {
        true => Fate::Refused(503, "ServiceUnavailable"),
        false => Fate::Passes,
    });
    let (places, place) = (Places::new(), servers::s3_at(proxy.port));
    let ckpt = start(&places, &place);
    resume(&ckpt, &SMALL).expect("resume");
    wait(&save(&ckpt, &SMALL, 1), Level::Object);
    away.store(true, Ordering::Relaxed);
    let mut saves = Vec::new();
    for step in 2..=20 {
        let save = save(&ckpt, &SMALL, step);
        wait(&save, Level::Disk);
        saves.push(save);
    }
    // The first one that went is on its way until the bucket is back; the newest follows.
    until("that it is away is told", || {
        events(&ckpt).iter().any(|text| text.contains("object_away"))
    });
    away.store(false, Ordering::Relaxed);
    let newest = saves.pop().expect("a save");
    wait(&newest, Level::Object);
    let direct = Place { url: place.url, ..servers::s3() };
    assert_eq!(steps(&direct).last(), Some(&20));
    let reached = saves.iter().filter(|save| save.progress().object).count();
    let passed = saves
        .iter()
        .filter(|save| save.poll(Level::Object, false, Duration::ZERO).is_err())
        .count();
    assert_eq!(reached + passed, 18, "what did not get there was passed over");
    assert!(reached <= 1, "{reached}: one at a time is on its way");
    close(&ckpt);
}

#[test]
fn a_step_on_its_way_to_the_bucket_gets_there_though_its_slot_is_used_again() {
    let away = Arc::new(AtomicBool::new(true));
    let told = away.clone();
    let proxy = Proxy::start(servers::s3_port(), move |request| {
        match told.load(Ordering::Relaxed) && request.target.contains("safetensors") {
            true => Fate::Refused(503, "ServiceUnavailable"),
            false => Fate::Passes,
        }
    });
    let (places, place) = (Places::new(), servers::s3_at(proxy.port));
    let ckpt = start(&places, &place);
    resume(&ckpt, &SMALL).expect("resume");
    let first = save(&ckpt, &SMALL, 1);
    until("it is on its way", || proxy.count(|r| r.target.contains("safetensors")) > 0);
    // Each slot is used several times.
    for step in 2..=8 {
        wait(&save(&ckpt, &SMALL, step), Level::Disk);
    }
    away.store(false, Ordering::Relaxed);
    wait(&first, Level::Object);
    close(&ckpt);
}

#[test]
fn a_job_that_closes_has_collected_in_the_bucket() {
    let proxy = Proxy::start(servers::s3_port(), |request| match &*request.method {
        "POST" => Fate::Late(Duration::from_millis(400)), // A deletion.
        _ => Fate::Passes,
    });
    let (places, place) = (Places::new(), servers::s3_at(proxy.port));
    let mut config = config(&places, &place);
    config.bucket.as_mut().expect("bucket").keep_last = 1;
    let ckpt = Checkpointer::open(config).expect("open");
    resume(&ckpt, &SMALL).expect("resume");
    for step in 1..=2 {
        wait(&save(&ckpt, &SMALL, step), Level::Object);
    }
    close(&ckpt);
    assert_eq!(events(&ckpt), [""; 0]);
    let tier = open(&servers::Place { url: place.url, ..servers::s3() });
    assert!(tier.list(&format!("{:020}", 1)).expect("list").is_empty(), "step 1 is there");
}

#[test]
fn a_cluster_that_was_given_up_seals_nothing_in_the_bucket_any_more() {
    let place = servers::s3();
    let (old, new) = (Places::new(), Places::new());
    let late = start(&old, &place);
    resume(&late, &SMALL).expect("resume");
    wait(&save(&late, &SMALL, 1), Level::Object);
    let ckpt = start(&new, &place);
    assert_eq!(resume(&ckpt, &SMALL).expect("resume"), 1);
    wait(&save(&ckpt, &SMALL, 2), Level::Object);
    // It still trains, on its own disk, and does not know.
    let save_late = save(&late, &SMALL, 5);
    let e = save_late
        .poll(Level::Object, false, Duration::from_secs(30))
        .expect_err("it was superseded");
    assert!(e.chain().contains("attempt 2"), "{}", e.chain());
    assert_eq!(steps(&place), [1, 2]);
    close(&late);
    close(&ckpt);
}

#[test]
fn a_bucket_that_cannot_be_used_is_an_error_at_the_start() {
    let places = Places::new();
    for (option, value, word) in [
        ("aws_secret_access_key", "wrong", "credentials"),
        ("aws_endpoint", "http://127.0.0.1:1", "does not answer"),
    ] {
        let mut place = servers::s3();
        place.options.insert(option.into(), value.into());
        let ckpt = start(&places, &place);
        let e = resume(&ckpt, &SMALL).map(drop).expect_err(option);
        assert!(e.chain().contains(word), "{option}: {}", e.chain());
    }
    let place = Place { url: "s3://no-such-bucket/root/run".into(), ..servers::s3() };
    let e = resume(&start(&places, &place), &SMALL).expect_err("no bucket");
    assert!(
        e.kind() == ErrorKind::Invalid && e.chain().contains("no such bucket"),
        "{}",
        e.chain()
    );
}

#[test]
fn what_is_not_due_for_the_bucket_does_not_go_there() {
    let (places, place) = (Places::new(), servers::s3());
    let mut config = config(&places, &place);
    config.bucket.as_mut().expect("bucket").every = 3;
    let ckpt = Checkpointer::open(config).expect("open");
    resume(&ckpt, &SMALL).expect("resume");
    let saves: Vec<Save> = (1..=7)
        .map(|step| {
            let save = save(&ckpt, &SMALL, step);
            wait(&save, if step % 3 == 0 { Level::Object } else { Level::Disk });
            save
        })
        .collect();
    for save in &saves {
        assert_eq!(save.is_due_for_object(), save.step() % 3 == 0);
        assert_eq!(save.progress().object, save.step() % 3 == 0, "{:?}", save.progress());
        assert!(save.progress().error.is_none(), "{:?}", save.progress());
    }
    close(&ckpt);
    assert_eq!(steps(&place), [3, 6]);
}

#[test]
fn what_is_deleted_in_a_bucket_is_gone_at_once_and_its_bytes_after_a_while() {
    let (places, place) = (Places::new(), servers::s3());
    let mut config = config(&places, &place);
    let bucket = config.bucket.as_mut().expect("bucket");
    (bucket.keep_last, bucket.grace) = (1, Duration::from_secs(3600));
    let ckpt = Checkpointer::open(config).expect("open");
    resume(&ckpt, &SMALL).expect("resume");
    wait(&save(&ckpt, &SMALL, 1), Level::Object);
    // Somebody reads it meanwhile.
    let reader = || {
        let nowhere = Some(Path::new("/nowhere"));
        Reader::open_with(Path::new(&place.url), nowhere, &place.options).expect("open")
    };
    let info = reader().steps().expect("steps").pop().expect("a step");
    let shard = reader().shard(&info.key, Rank(0)).expect("shard");
    wait(&save(&ckpt, &SMALL, 2), Level::Object);
    until("the older one is gone", || steps(&place) == [2]);
    close(&ckpt);
    crate::common::read_whole(&shard, &SMALL).expect("its bytes are there");
    // Once that time is over.
    let policy = tierkeep::retain::Policy {
        keep_last: 1,
        every: 1,
        keep_every: None,
        keep_hours: None,
        abandoned: false,
    };
    let plan = tierkeep::upkeep::plan(&reader(), &policy).expect("plan");
    let collect = |grace| tierkeep::upkeep::collect(&reader(), &plan, grace).expect("collect");
    let there = || !open(&place).list(&info.key.dir()).expect("list").is_empty();
    collect(Duration::from_secs(3600));
    assert!(there(), "it is young");
    collect(Duration::from_millis(1));
    assert!(!there());
}

#[test]
fn what_rots_in_a_bucket_is_told_before_anybody_needs_it() {
    let (places, place) = (Places::new(), servers::s3());
    let mut config = config(&places, &place);
    config.bucket.as_mut().expect("bucket").scrub = Some(Duration::from_millis(200));
    let ckpt = Checkpointer::open(config).expect("open");
    resume(&ckpt, &SMALL).expect("resume");
    for step in 1..=2 {
        wait(&save(&ckpt, &SMALL, step), Level::Object);
    }
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(events(&ckpt), [""; 0]);
    let tier = open(&place);
    let reader = Reader::open_with(Path::new(&place.url), None, &place.options).expect("open");
    let info = reader.steps().expect("steps").remove(0);
    let shard = reader.shard(&info.key, Rank(0)).expect("shard");
    let file = info.key.file(&shard.manifest().payload.file);
    let mut byte = [0];
    tier.open(&file).expect("open").read_at(20_000, &mut byte).expect("read");
    tier.mend(&file, 20_000, &[byte[0] ^ 1]).expect("flip");
    let damaged = |text: &String| text.contains("object_damaged") && text.contains("chunk 0");
    until("the damage is told", || events(&ckpt).iter().any(damaged));
    close(&ckpt);
}

#[test]
fn where_the_clock_says_when_one_goes_and_what_the_job_stops_with() {
    let (places, place) = (Places::new(), servers::s3());
    let mut config = config(&places, &place);
    config.bucket.as_mut().expect("bucket").every_minutes = Some(60);
    let ckpt = Checkpointer::open(config).expect("open");
    resume(&ckpt, &SMALL).expect("resume");
    wait(&save(&ckpt, &SMALL, 1), Level::Object);
    let saves: Vec<Save> = (2..=4)
        .map(|step| {
            let save = save(&ckpt, &SMALL, step);
            wait(&save, Level::Disk);
            save
        })
        .collect();
    assert!(saves.iter().all(|save| !save.is_due_for_object()));
    assert!(ckpt.stop_requested(4, 1, true));
    wait(&saves[2], Level::Object);
    assert_eq!(steps(&place), [1, 4]);
    for save in &saves[..2] {
        let e = save.poll(Level::Object, false, Duration::from_secs(30)).expect_err("not there");
        assert!(e.chain().contains("one in 60 minutes"), "{}", e.chain());
        assert!(save.progress().error.is_none(), "{:?}", save.progress());
    }
    close(&ckpt);
}

#[test]
fn what_a_dead_process_began_to_send_is_ended_by_the_next_job_and_by_gc() {
    let (places, place) = (Places::new(), servers::s3());
    let tier = open(&place);
    let dies = |step: u64| {
        let name = format!("{step:020}/00000009-aabbccdd/rank-000000-01020304.safetensors");
        tier.put(&name, &crate::uploads::dying()).map(drop).expect_err("it dies");
    };
    dies(1);
    dies(2);
    assert_eq!(tier.unfinished().expect("unfinished"), Some(2));
    let ckpt = start(&places, &place);
    resume(&ckpt, &SMALL).expect("resume");
    wait(&save(&ckpt, &SMALL, 3), Level::Object);
    until("they are ended", || tier.unfinished().expect("unfinished") == Some(0));
    close(&ckpt);
    dies(2);
    dies(9);
    let reader = Reader::open_with(Path::new(&place.url), None, &place.options).expect("open");
    let policy = tierkeep::retain::Policy {
        keep_last: 9,
        every: 1,
        keep_every: None,
        keep_hours: None,
        abandoned: false,
    };
    let plan = tierkeep::upkeep::plan(&reader, &policy).expect("plan");
    let (_, ended) = tierkeep::upkeep::collect(&reader, &plan, Duration::ZERO).expect("collect");
    assert_eq!(ended, 1, "what is newer than all that is sealed may be a live job's");
    assert_eq!(tier.unfinished().expect("unfinished"), Some(1));
}

#[test]
fn a_collector_in_the_bucket_leaves_alone_what_a_job_has_just_begun() {
    let held = Arc::new(AtomicBool::new(false));
    let told = held.clone();
    let proxy = Proxy::start(servers::s3_port(), move |request| {
        // The leader's word that its attempt has a checkpoint.
        match told.load(Ordering::Relaxed) && request.target.ends_with(".joined") {
            true => Fate::Refused(503, "ServiceUnavailable"),
            false => Fate::Passes,
        }
    });
    let (places, place) = (Places::new(), servers::s3_at(proxy.port));
    let direct = Place { url: place.url.clone(), ..servers::s3() };
    let world = 2;
    let begin = |how: &Begin| -> Vec<Checkpointer> {
        let ranks = (0..world).map(|rank| {
            let savers = (0..world).collect();
            Checkpointer::open(Config { rank, world, savers, ..config(&places, &place) })
                .expect("open")
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.iter().for_each(|ckpt| drop(ckpt.begin(how).expect("begin")));
        ranks
    };
    let save = |ranks: &[Checkpointer], step: u64| -> Vec<Save> {
        ranks.iter().map(|ckpt| save(ckpt, &SMALL, step)).collect()
    };
    let first = begin(&Begin::default());
    for step in 1..=3 {
        save(&first, step).iter().for_each(|save| wait(save, Level::Object));
    }
    first.iter().for_each(close);
    let collect = || {
        let reader =
            Reader::open_with(Path::new(&direct.url), None, &direct.options).expect("open");
        let policy =
            Policy { keep_last: 1, every: 1, keep_every: None, keep_hours: None, abandoned: true };
        let plan = upkeep::plan(&reader, &policy).expect("plan");
        upkeep::collect(&reader, &plan, Duration::ZERO).expect("collect").1
    };
    // The other rank's shard is there before anything tells that the attempt leads.
    held.store(true, Ordering::Relaxed);
    let second = begin(&Begin::default());
    let four = save(&second, 4);
    let there = |name: &str| {
        let dir = format!("{:020}/{}", 4, second[0].attempt().expect("attempt").attempt.dir());
        open(&direct).list(&dir).expect("list").iter().any(|entry| entry.name == name)
    };
    until("the other rank's shard is there", || there("rank-000001.json"));
    collect();
    assert!(there("rank-000001.json"), "it was taken from under the job");
    held.store(false, Ordering::Relaxed);
    four.iter().for_each(|save| wait(save, Level::Object));
    second.iter().for_each(close);
    // After a fresh start a job is at steps that are older than those which it left.
    let third = begin(&Begin { fresh: true, ..Begin::default() });
    let name = format!(
        "{:020}/{}/rank-000000-01020304.safetensors",
        1,
        third[0].attempt().expect("attempt").attempt.dir()
    );
    let tier = open(&direct);
    tier.put(&name, &crate::uploads::dying()).map(drop).expect_err("it dies");
    assert_eq!((collect(), tier.unfinished().expect("unfinished")), (0, Some(1)));
    third.iter().for_each(close);
}
