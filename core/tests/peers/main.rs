//! Shards on other nodes.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // Tests.

#[path = "../common/mod.rs"]
mod common;
mod again;
mod bucket;
mod full;
mod heal;
mod prefetch;
mod killed;
mod leaving;
mod told;
mod world;

use std::{sync::atomic::Ordering, time::Duration};

use common::{Model, SIZES, SMALL, read_whole, wait};
use tierkeep::{begin::Begin, checkpointer::Checkpointer, save::Level};
use tierkeep_proto::peer::{self as wire, reply::Answer, request::Ask};
use world::{Job, World};

const PATIENCE: Duration = Duration::from_secs(20);

/// Trains to `step` and saves it.
fn train(ckpt: &Checkpointer, model: &mut Model, step: u64) -> tierkeep::save::Save {
    model.train_to(step);
    model.save(ckpt, step).unwrap()
}

#[test]
fn a_rank_whose_node_is_lost_goes_on_elsewhere_from_the_newest_step_that_was_on_a_peer() {
    let world = World::new(&["a", "b", "c"]);
    let mut model = Model::new(0, &SIZES);
    let ckpt = world.open("a", 1);
    ckpt.begin(&Begin::default()).unwrap();
    for step in 1..=5 {
        wait(&train(&ckpt, &mut model, step), Level::Peer);
    }
    let mut held = world.holders(5);
    held.retain(|node| node != "a");
    assert_eq!(held.len(), 1, "{held:?}");
    world.lose("a");
    drop(ckpt);
    // Where nothing of it is.
    let other = if held[0] == "b" { "c" } else { "b" };
    let ckpt = world.open(other, 1);
    let found = ckpt.begin(&Begin::default()).unwrap().expect("a checkpoint");
    assert_eq!(found.step().0, 5);
    read_whole(&found, &SIZES).unwrap();
    let next = train(&ckpt, &mut model, 6);
    wait(&next, Level::Peer);
    wait(&next, Level::Disk);
    // Lost again.
    world.begin("a");
    world.lose(other);
    drop(ckpt);
    let ckpt = world.open("a", 1);
    let found = ckpt.begin(&Begin::default()).unwrap().expect("a checkpoint");
    assert_eq!((found.step().0, found.key.attempt.number), (6, 2));
}

#[test]
fn a_job_over_four_nodes_loses_one_and_loses_nothing() {
    let world = World::new(&["a", "b", "c", "d"]);
    let job = Job::start(&world, &["a", "b", "c", "d"], 8, 1);
    assert_eq!(job.resume(), 0);
    job.train(1..=3, Level::Peer);
    job.train([4], Level::Disk);
    job.train([5], Level::Peer);
    world.lose("b");
    drop(job);
    world.begin("e");
    let job = Job::start(&world, &["a", "e", "c", "d"], 8, 1);
    assert_eq!(job.resume(), 5);
    job.train([6, 7], Level::Peer);
    // With the leader's node.
    world.lose("a");
    drop(job);
    world.begin("f");
    let job = Job::start(&world, &["c", "d", "e", "f"], 8, 1);
    assert_eq!(job.resume(), 7);
    job.train([8], Level::Disk);
    // Faster than anything is carried anywhere.
    job.each(|ckpt| {
        for step in 9..30 {
            Model::at(ckpt.config().rank, &SMALL, step).save(ckpt, step).unwrap();
        }
    });
    drop(job);
    let job = Job::start(&world, &["c", "d", "e", "f"], 8, 1);
    let step = job.each(|ckpt| common::resume(ckpt, &SMALL).unwrap())[0];
    assert!(step > 8, "{step}");
    job.each(|ckpt| {
        for step in step + 1..step + 20 {
            Model::at(ckpt.config().rank, &SMALL, step).save(ckpt, step).unwrap();
        }
        common::close(ckpt);
    });
}

#[test]
fn a_bit_that_flips_on_the_wire_is_found_and_sent_or_fetched_again() {
    let world = World::new(&["a", "b", "c"]);
    let mut model = Model::new(0, &SIZES);
    let ckpt = world.open("a", 1);
    ckpt.begin(&Begin::default()).unwrap();
    world.flips.store(3, Ordering::Relaxed);
    wait(&train(&ckpt, &mut model, 1), Level::Peer);
    assert_eq!(world.flips.load(Ordering::Relaxed), 0, "bits were flipped");
    world.lose("a");
    drop(ckpt);
    world.begin("d");
    world.flips.store(2, Ordering::Relaxed);
    let ckpt = world.open("d", 1);
    assert_eq!(common::resume(&ckpt, &SIZES).unwrap(), 1);
    assert_eq!(world.flips.load(Ordering::Relaxed), 0, "bits were flipped");
}

#[test]
fn a_bit_that_flips_in_one_holders_ram_is_fetched_from_another() {
    let world = World::new(&["a", "b", "c"]);
    let mut model = Model::new(0, &SIZES);
    let ckpt = world.open("a", 2);
    ckpt.begin(&Begin::default()).unwrap();
    wait(&train(&ckpt, &mut model, 1), Level::Peer);
    world.lose("a");
    drop(ckpt);
    let spoil = |node: &str, byte: u64| {
        let machine = world.machine(node);
        let held = common::files(machine.ram.path());
        let is_payload =
            |f: &&std::path::PathBuf| f.extension().is_some_and(|e| e == "safetensors");
        common::flip(&machine.ram.path().join(held.iter().find(is_payload).unwrap()), 8 * byte);
    };
    // Each of them has one good chunk, and each chunk is good somewhere.
    spoil("b", 100);
    spoil("c", (4 << 20) + 100);
    world.begin("d");
    let ckpt = world.open("d", 2);
    assert_eq!(common::resume(&ckpt, &SIZES).unwrap(), 1);
    // And with both bad there is none.
    world.lose("d");
    drop(ckpt);
    spoil("c", 100);
    world.begin("e");
    let ckpt = world.open("e", 2);
    let error = ckpt.begin(&Begin::default()).unwrap_err().chain();
    assert!(error.contains("could not be had"), "{error}");
}

#[test]
fn too_few_nodes_are_named_after_the_deadline_and_none_at_once() {
    let world = World::new(&["a", "b", "c"]);
    let mut model = Model::new(0, &SIZES);
    let ckpt = world.open("a", 2);
    ckpt.begin(&Begin::default()).unwrap();
    wait(&train(&ckpt, &mut model, 1), Level::Peer);
    world.lose("c");
    let save = train(&ckpt, &mut model, 2);
    let error = save.poll(Level::Peer, false, PATIENCE).unwrap_err().chain();
    assert!(error.contains("1 of 2 copies are held, other agents alive: b, lost: c"), "{error}");
    wait(&save, Level::Ram);
    // One more comes, and the next step has both.
    world.begin("d");
    wait(&train(&ckpt, &mut model, 3), Level::Peer);
    drop(ckpt);
    let ckpt = world.open("b", 0);
    ckpt.begin(&Begin::default()).unwrap();
    let save = train(&ckpt, &mut model, 4);
    let error = save.poll(Level::Peer, false, Duration::ZERO).unwrap_err().chain();
    assert!(error.contains("replicas = 0"), "{error}");
    assert_eq!(save.progress().error, None, "what was not asked for has not failed");
}

#[test]
fn what_a_newer_agent_asks_is_refused_in_words_and_what_it_adds_is_not_in_the_way() {
    use prost::Message as _;
    let world = World::new(&["a", "b"]);
    let mut model = Model::new(0, &SIZES);
    let ckpt = world.open("a", 1);
    ckpt.begin(&Begin::default()).unwrap();
    wait(&train(&ckpt, &mut model, 1), Level::Peer);
    let (a, b) = (world.machine("a"), world.machine("b"));
    let mut site = wire::Site {
        destination: a.destination().into_os_string().into_encoded_bytes(),
        uid: rustix::process::getuid().as_raw(),
        ..Default::default()
    };
    world::elsewhere(&a, &b, &mut site);
    // A question of the next version, and a field of it.
    let unknown = [0xC2, 0x3E, 0x01, 0x78]; // Field 1000: one byte.
    let asked = |ask: Option<Ask>| {
        let request = wire::Request { from: "a".into(), site: Some(site.clone()), ask };
        let bytes = [request.encode_to_vec(), unknown.to_vec()].concat();
        b.host.answer(wire::Request::decode(&bytes[..]).unwrap()).answer.unwrap()
    };
    let Answer::Failure(refused) = asked(None) else { panic!("answered") };
    assert!(format!("{refused:?}").contains("it does not know this question: it is older"));
    let look = wire::Look { tier: 1, names_only: true, ..Default::default() };
    let Answer::Seen(seen) = asked(Some(Ask::Look(look))) else { panic!("no answer") };
    assert!(seen.files.iter().any(|file| file.name.ends_with("rank-000000.json")), "{seen:?}");
    wait(&train(&ckpt, &mut model, 2), Level::Peer);
}

#[test]
fn what_a_liar_offers_is_refused() {
    let world = World::new(&["a", "b"]);
    let mut model = Model::new(0, &SIZES);
    let ckpt = world.open("a", 1);
    ckpt.begin(&Begin::default()).unwrap();
    wait(&train(&ckpt, &mut model, 1), Level::Peer);
    let (a, b) = (world.machine("a"), world.machine("b"));
    let file = common::files(a.ram.path());
    let manifest = file.iter().find(|f| f.ends_with("rank-000000.json")).unwrap();
    let attempt = manifest.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    let manifest = std::fs::read(a.ram.path().join(manifest)).unwrap();
    let site = || wire::Site {
        destination: b.destination().to_str().unwrap().into(),
        uid: rustix::process::geteuid().as_raw(),
        gid: 0,
        groups: vec![],
    };
    let ask = |site: wire::Site, ask: wire::request::Ask| {
        let request = wire::Request { from: "liar".into(), site: Some(site), ask: Some(ask) };
        let host = b.host.clone();
        std::thread::spawn(move || host.answer(request)).join().unwrap().answer.unwrap()
    };
    let refused = |site: wire::Site, asked: wire::request::Ask, why: &str| {
        let wire::reply::Answer::Failure(failure) = ask(site, asked) else { panic!("{why}") };
        assert!(failure.message.contains(why), "{:?} is not: {why}", failure.message);
    };
    let offer = |step: u64, attempt: &str, rank: u32, manifest: Vec<u8>| {
        let key = Some(wire::Key { step, attempt: attempt.into() });
        wire::request::Ask::Offer(wire::Offer {
            key,
            rank,
            manifest,
            attempt: 1,
            ..Default::default()
        })
    };
    let mut flipped = manifest.clone();
    flipped[300] ^= 1;
    refused(site(), offer(1, &attempt, 0, flipped), "its checksum is");
    refused(site(), offer(2, &attempt, 0, manifest.clone()), "it is of step 1");
    refused(site(), offer(1, "00000002-aaaaaaaa", 0, manifest.clone()), "it is of attempt");
    refused(site(), offer(1, &attempt, 1, manifest.clone()), "it is of rank 0");
    refused(site(), offer(1, "../../etc", 0, manifest.clone()), "without the name of an attempt");
    assert_eq!(b.host.peers().unwrap().offers_refused, 5);
    for path in ["/tmp/../etc/run", "relative/run", "/tmp/x/..", "/tmp/_run"] {
        let site = wire::Site { destination: path.into(), ..site() };
        let asked = offer(1, &attempt, 0, manifest.clone());
        let wire::reply::Answer::Failure(_) = ask(site, asked) else { panic!("{path}") };
    }
    let open = |name: &str, chunk_bytes: u64| {
        wire::request::Ask::Open(wire::Open { tier: 1, name: name.into(), chunk_bytes })
    };
    refused(site(), open("../../../etc/passwd", 4096), "is not a name in a tier");
    refused(site(), open("attempts/00000001.json", 1), "chunks of 1 bytes");
    // Chunks that nobody offered, and those past the end.
    assert!(b.host.incoming(&[7; 16]).is_err());
    let wire::reply::Answer::Opened(opened) = ask(site(), open("attempts/00000001.json", 4096))
    else {
        panic!("it is there")
    };
    let ticket: tierkeep::peers::Ticket = opened.ticket.try_into().unwrap();
    assert!(b.host.outgoing(&ticket).unwrap().chunk(9).is_err());
    assert!(b.host.outgoing(&ticket).unwrap().chunk(u64::MAX).is_err());
    assert!(b.host.incoming(&ticket).is_err(), "a ticket for reading");
    let decide = |name: &str| {
        let (attempt, name) = (attempt.clone(), name.into());
        let text = Some("x".into());
        wire::request::Ask::Decide(wire::Decide { attempt, name, text, remove: false })
    };
    refused(site(), decide("../x"), "is no decision");
    refused(site(), decide("save-1"), "was not found");
}

#[test]
fn a_side_that_misses_more_nodes_than_may_be_lost_decides_nothing() {
    let world = World::new(&["a", "b", "c", "d"]);
    let job = Job::start(&world, &["a", "b", "c", "d"], 4, 1);
    job.resume();
    job.train(1..=2, Level::Peer);
    drop(job);
    for far in ["c", "d"] {
        for near in ["a", "b"] {
            world.cut.lock().unwrap().insert((near.into(), far.into()));
        }
    }
    let open = |accept_older: bool| {
        let start = tierkeep::names::Id::random().unwrap();
        let mut config = world.config("a", 0, 4, 1);
        config.attempt_id = Some(start);
        config.attempt_wait = Duration::from_secs(2);
        let ckpt = Checkpointer::open(config).unwrap();
        let mut how = Begin::default();
        how.wish.accept_older = accept_older;
        let begun = ckpt.begin(&how).map(|found| found.map(|f| f.step().0));
        (begun, common::events(&ckpt).join("\n"))
    };
    let error = open(false).0.unwrap_err();
    assert_eq!(error.hint(), Some(tierkeep::Hint::AcceptOlder));
    assert!(error.chain().contains("c, d, of the last attempt"), "{}", error.chain());
    let (begun, events) = open(true);
    // Half of the shards may be here: whatever it is, it was asked for.
    assert!(begun.is_ok(), "{begun:?}");
    assert!(events.contains("not all nodes answer: c, d"), "{events}");
    world.cut.lock().unwrap().clear();
    let job = Job::start(&world, &["a", "b", "c", "d"], 4, 1);
    assert_eq!(job.resume(), 2);
}

#[test]
fn a_rank_that_does_not_save_has_the_shard_of_one_that_does_from_another_node() {
    let world = World::new(&["a", "b", "c"]);
    let start = |nodes: [&str; 2]| {
        let id = tierkeep::names::Id::random().unwrap();
        let open = |rank: u32| {
            let node = nodes[rank as usize];
            let mut config = world.config(node, rank, 2, 1);
            config.attempt_id = Some(id);
            config.savers = vec![0];
            (node.to_owned(), Checkpointer::open(config).unwrap())
        };
        Job { ckpts: vec![open(0), open(1)] }
    };
    let job = start(["a", "b"]);
    job.each(|ckpt| assert!(ckpt.begin(&Begin::default()).unwrap().is_none()));
    job.each(|ckpt| wait(&Model::at(0, &SIZES, 1).save(ckpt, 1).unwrap(), Level::Disk));
    drop(job);
    let job = start(["a", "c"]);
    assert_eq!(job.each(|ckpt| common::resume(ckpt, &SIZES).unwrap()), [1, 1]);
}

#[test]
fn ranks_that_change_places_have_their_copies_where_they_were_before() {
    let world = World::new(&["a", "b"]);
    let job = Job::start(&world, &["a", "b"], 2, 1);
    assert_eq!(job.resume(), 0);
    job.train(1..=3, Level::Peer);
    drop(job);
    let mut step = 3;
    for nodes in [["b", "a"], ["a", "b"], ["b", "a"]] {
        let job = Job::start(&world, &nodes, 2, 1);
        assert_eq!(job.resume(), step);
        job.train(step + 1..=step + 2, Level::Peer);
        step += 2;
    }
    // Each node has both ranks of the newest step: the other one can go.
    world.lose("b");
    let job = Job::start(&world, &["a"], 2, 1);
    assert_eq!(job.resume(), step);
}
