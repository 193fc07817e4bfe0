//! What agents tell of each other, for people and alarms.

use std::time::Duration;

use tierkeep::{begin::Begin, host::RankView, save::Level};

use crate::{
    PATIENCE,
    common::{self, Model, SIZES, wait},
    train,
    world::World,
};

fn rank_at(world: &World, node: &str) -> RankView {
    world.machine(node).host.ranks().pop().expect("a rank")
}

#[test]
fn what_goes_between_nodes_is_counted_on_both_sides() {
    let world = World::new(&["a", "b", "c"]);
    let mut model = Model::new(0, &SIZES);
    let ckpt = world.open("a", 1);
    ckpt.begin(&Begin::default()).unwrap();
    let rank = rank_at(&world, "a");
    assert_eq!((rank.on_peers, rank.copies_wanted, rank.copies_there), (None, 1, 0));
    for step in 1..=2 {
        let save = train(&ckpt, &mut model, step);
        wait(&save, Level::Peer);
        wait(&save, Level::Disk);
    }
    let rank = rank_at(&world, "a");
    assert_eq!((rank.on_peers, rank.copies_wanted, rank.copies_there), (Some(2), 1, 1));
    assert_eq!((rank.peer_whole, rank.peer_failed, rank.peer_refused), (2, 0, 0));
    assert!(rank.peer_bytes > 8 << 20 && rank.peer_ns > 0, "{rank:?}");
    let holder = world.holders(2).into_iter().find(|node| node != "a").unwrap();
    let other = if holder == "b" { "c" } else { "b" };
    let held = world.machine(&holder).host.peers().unwrap();
    assert_eq!((held.nodes_alive, held.nodes_lost, held.held_shards), (3, 0, 2));
    assert_eq!((held.received_bytes, held.given_bytes, held.healed_bytes), (rank.peer_bytes, 0, 0));
    assert!(held.held_bytes >= held.received_bytes, "{held:?}");
    let none = world.machine(other).host.peers().unwrap();
    assert_eq!((none.held_shards, none.held_bytes, none.received_bytes), (0, 0, 0));

    // At once, though the copy is made again only in time.
    world.lose(&holder);
    assert_eq!(rank_at(&world, "a").copies_there, 0);
    assert_eq!(world.machine("a").host.peers().unwrap().nodes_lost, 1);
    let save = train(&ckpt, &mut model, 3);
    wait(&save, Level::Peer);
    wait(&save, Level::Disk);
    let later = rank_at(&world, "a");
    assert_eq!((later.copies_there, later.disk_passed_over), (1, 0));

    // It comes back from there.
    world.lose("a");
    drop(ckpt);
    world.begin("d");
    let ckpt = world.open("d", 1);
    assert_eq!(common::resume(&ckpt, &SIZES).unwrap(), 3);
    let fetched = rank_at(&world, "d").peer_fetched_bytes;
    assert_eq!(fetched, rank.peer_bytes / 2);
    assert!(world.machine(other).host.peers().unwrap().given_bytes >= fetched);

    // And nobody is left.
    world.lose(other);
    let save = train(&ckpt, &mut model, 4);
    save.poll(Level::Peer, false, PATIENCE).unwrap_err();
    let begun = std::time::Instant::now();
    while rank_at(&world, "d").peer_failed == 0 {
        assert!(begun.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(rank_at(&world, "d").copies_there, 0);
}
