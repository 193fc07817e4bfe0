//! Holders without room: what they have acknowledged stays, and whoever has more for them learns why not.

use std::time::Duration;

use tierkeep::{
    begin::Begin,
    placement::{Node, Shard, place},
    save::Level,
};
use tierkeep_proto::peer::{self as wire, reply::Answer, request::Ask};

use crate::{
    PATIENCE,
    common::{self, Model, SIZES, wait},
    train,
    world::{Machine, World},
};

/// Two slots for a shard of [`SIZES`], and what lies beside them; not three.
const TWO_SHARDS: u64 = 10 << 20;

/// A state of which one shard takes more.
const LARGE: [usize; 2] = [11 << 20, 13];

#[test]
fn a_holder_without_room_says_the_sum_and_drops_nothing_it_is_to_keep() {
    let world = World::new(&["a"]);
    world.begin_with("b", Some(TWO_SHARDS));
    let mut config = world.config("a", 0, 1, 1);
    config.peer_wait = Duration::from_secs(1);
    let ckpt = tierkeep::checkpointer::Checkpointer::open(config).unwrap();
    ckpt.begin(&Begin::default()).unwrap();
    let mut model = Model::new(0, &SIZES);
    for step in 1..=2 {
        wait(&train(&ckpt, &mut model, step), Level::Peer);
    }
    assert_eq!(world.holders(1), ["a", "b"]);
    // `b` may let step 1 go for it, and that is not enough.
    let large = train(&ckpt, &mut Model::new(0, &LARGE), 3);
    let error = large.poll(Level::Peer, false, PATIENCE).unwrap_err().chain();
    assert!(error.contains("0 of 1 copies are held, other agents alive: b, lost: none"), "{error}");
    assert!(error.contains("; b: ") && error.contains("but the limit is 10.0 MiB"), "{error}");
    wait(&large, Level::Ram);
    assert!(large.progress().error.is_some());
    world.lose("a");
    drop(ckpt);
    world.begin("c");
    assert_eq!(common::resume(&world.open("c", 1), &SIZES).unwrap(), 2);
}

#[test]
fn a_copy_that_one_node_has_no_room_for_goes_to_another() {
    let world = World::new(&["a"]);
    let run = world.machine("a").destination();
    let nodes = ["a", "b", "c"].map(|name| Node { name: name.into(), domains: vec![name.into()] });
    let shard = Shard { name: format!("{}#0", run.display()), node: 0 };
    let first = place(&nodes, &[shard], 1).holders[0][0];
    for (index, node) in nodes.iter().enumerate().skip(1) {
        world.begin_with(&node.name, (index == first).then_some(1 << 20));
    }
    let ckpt = world.open("a", 1);
    ckpt.begin(&Begin::default()).unwrap();
    wait(&train(&ckpt, &mut Model::new(0, &SIZES), 1), Level::Peer);
    let other = &nodes[3 - first].name;
    assert_eq!(world.holders(1), ["a", other]);
    world.lose("a");
    drop(ckpt);
    assert_eq!(common::resume(&world.open(other, 0), &SIZES).unwrap(), 1);
}

/// Rank 0's manifest of a step, as it lies in a node's RAM, and its key.
fn manifest_of(machine: &Machine, step: u64) -> (wire::Key, Vec<u8>) {
    let all = common::files(machine.ram.path());
    let of_step = |f: &&std::path::PathBuf| {
        f.ends_with("rank-000000.json") && f.to_str().unwrap().contains(&format!("{step:020}"))
    };
    let file = all.iter().find(of_step).unwrap();
    let attempt = file.parent().unwrap().file_name().unwrap().to_str().unwrap().into();
    (wire::Key { step, attempt }, std::fs::read(machine.ram.path().join(file)).unwrap())
}

#[test]
fn a_copy_for_a_lost_node_takes_no_place_of_what_is_held() {
    let world = World::new(&["a", "b"]);
    let ckpt = world.open("a", 1);
    ckpt.begin(&Begin::default()).unwrap();
    let mut model = Model::new(0, &SIZES);
    for step in 1..=2 {
        wait(&train(&ckpt, &mut model, step), Level::Peer);
    }
    let (a, b) = (world.machine("a"), world.machine("b"));
    world.cut.lock().unwrap().insert(("a".into(), "b".into()));
    wait(&train(&ckpt, &mut model, 3), Level::Ram);
    let (key, manifest) = manifest_of(&a, 3);
    let (held, _) = manifest_of(&b, 2);
    world.lose("a");
    drop(ckpt);
    let offer = |from: &str, owner: &str| {
        let request = wire::Request {
            from: from.into(),
            site: Some(wire::Site {
                destination: b.destination().to_str().unwrap().into(),
                uid: rustix::process::geteuid().as_raw(),
                gid: 0,
                groups: vec![],
            }),
            ask: Some(Ask::Offer(wire::Offer {
                key: Some(key.clone()),
                manifest: manifest.clone(),
                keep: vec![held.clone()],
                attempt: 1,
                replicas: 1,
                owner: owner.into(),
                ..Default::default()
            })),
        };
        let host = b.host.clone();
        std::thread::spawn(move || host.answer(request)).join().unwrap().answer.unwrap()
    };
    let Answer::Failure(refused) = offer("c", "a") else { panic!("it takes a place") };
    assert!(refused.message.contains("both slots for rank 0 are in use"), "{}", refused.message);
    assert_eq!((world.holders(1), world.holders(2)), (vec!["b".into()], vec!["b".into()]));
    // By the word of the rank itself the older one may go.
    assert!(matches!(offer("a", ""), Answer::Taken(_)));
    assert_eq!((world.holders(1), world.holders(2)), (vec![], vec!["b".into()]));
    world.begin("c");
    assert_eq!(common::resume(&world.open("c", 1), &SIZES).unwrap(), 2);
}
