use std::collections::BTreeMap;

use super::*;

/// So many nodes in so many racks, and `each` shards on every node.
fn cluster(count: usize, racks: usize, each: usize) -> (Vec<Node>, Vec<Shard>) {
    let node = |i: usize| Node {
        name: format!("node-{i}"),
        domains: vec![format!("rack-{}", i % racks), format!("host-{i}")],
    };
    let shard = |i: usize| Shard { name: format!("run/{i}"), node: i / each };
    ((0..count).map(node).collect(), (0..count * each).map(shard).collect())
}

fn by_name(nodes: &[Node], shards: &[Shard], copies: usize) -> BTreeMap<String, Vec<String>> {
    let placed = place(nodes, shards, copies);
    let names = |at: &Vec<usize>| at.iter().map(|n| nodes[*n].name.clone()).collect();
    shards.iter().map(|s| s.name.clone()).zip(placed.holders.iter().map(names)).collect()
}

#[test]
fn every_count_of_nodes_from_2_to_512_is_balanced_to_within_one_shard() {
    for count in 2..=512 {
        let (nodes, shards) = cluster(count, count, 1);
        let placed = place(&nodes, &shards, 1);
        assert_eq!((placed.lacks, placed.loads), (vec![], vec![1; count]), "{count} nodes");
    }
    for (count, each, copies) in [(2, 8, 1), (3, 8, 2), (7, 8, 2), (64, 8, 2), (129, 3, 3)] {
        let (nodes, shards) = cluster(count, count, each);
        let placed = place(&nodes, &shards, copies);
        assert_eq!(placed.lacks, [], "{count} nodes");
        assert_eq!(placed.loads, vec![each * copies; count], "{count} nodes");
    }
    // Shards that do not divide by the nodes, and nodes that have none.
    let (nodes, mut shards) = cluster(11, 11, 5);
    shards.truncate(47);
    let placed = place(&nodes, &shards, 1);
    assert_eq!(placed.lacks, []);
    assert_eq!(placed.loads.iter().sum::<usize>(), 47);
}

#[test]
fn copies_are_in_other_domains_while_there_are_any() {
    for (count, racks) in [(4, 2), (12, 3), (30, 5), (100, 7), (9, 4)] {
        let (nodes, shards) = cluster(count, racks, 2);
        let placed = place(&nodes, &shards, 2);
        for (shard, holders) in shards.iter().zip(&placed.holders) {
            let mut all = vec![shard.node];
            all.extend(holders);
            let mut seen: Vec<&String> = all.iter().map(|n| &nodes[*n].domains[0]).collect();
            seen.sort();
            seen.dedup();
            assert_eq!(seen.len(), racks.min(3), "{shard:?} {holders:?}");
            all.sort_unstable();
            all.dedup();
            assert_eq!(all.len(), 3, "two on one node");
        }
        let together = placed.lacks.iter().any(|l| matches!(l, Lack::Together { .. }));
        assert_eq!(together, racks < 3, "{count} nodes in {racks} racks");
    }
}

#[test]
fn what_cannot_be_had_is_said() {
    let (mut nodes, shards) = cluster(4, 4, 1);
    assert_eq!(place(&nodes[..1], &shards[..1], 1).lacks, [Lack::Copies { shard: 0, has: 0 }]);
    assert_eq!(place(&nodes[..2], &shards[..1], 2).lacks[0], Lack::Copies { shard: 0, has: 1 });
    assert_eq!(place(&[], &[], 3).lacks, []);
    // One large rack and a small one: the small one's node takes what the large one may not keep.
    for node in &mut nodes[..3] {
        node.domains[0] = "large".into();
    }
    let placed = place(&nodes, &shards, 1);
    assert_eq!(placed.lacks, [Lack::Uneven { least: 0, most: 3 }]);
    assert_eq!(placed.holders[..3], [[3], [3], [3]]);
    // All in one rack: other hosts will do, and it is said of each.
    nodes[3].domains[0] = "large".into();
    let placed = place(&nodes, &shards, 1);
    assert_eq!(placed.lacks, [0, 1, 2, 3].map(|shard| Lack::Together { shard, apart: 1 }));
    assert_eq!(placed.loads, [1; 4]);
}

#[test]
fn the_order_in_which_they_are_named_changes_nothing() {
    let (nodes, shards) = cluster(23, 5, 3);
    let wanted = by_name(&nodes, &shards, 2);
    let turned: Vec<Node> = nodes.iter().rev().cloned().collect();
    let mut mixed: Vec<Shard> =
        shards.iter().map(|s| Shard { node: 22 - s.node, ..s.clone() }).collect();
    mixed.rotate_left(31);
    assert_eq!(by_name(&turned, &mixed, 2), wanted);
}

#[test]
fn a_node_that_leaves_or_joins_moves_little_beside_its_own_load() {
    for (count, racks, each) in [(16, 16, 8), (64, 8, 8), (128, 128, 1), (33, 33, 4)] {
        let (nodes, shards) = cluster(count, racks, each);
        let before = by_name(&nodes, &shards, 1);
        let mut moved = 0;
        for gone in 0..count {
            let mut left = nodes.clone();
            left.remove(gone);
            // Its own shards go with it: a replacement is a join.
            let at = |node: usize| if node > gone { node - 1 } else { node };
            let stay = shards.iter().filter(|s| s.node != gone);
            let stay: Vec<Shard> =
                stay.map(|s| Shard { name: s.name.clone(), node: at(s.node) }).collect();
            let after = by_name(&left, &stay, 1);
            let was_there = |(name, _): &(&String, _)| before[*name][0] != nodes[gone].name;
            moved += after.iter().filter(was_there).filter(|(n, at)| before[*n] != **at).count();
        }
        #[allow(clippy::cast_precision_loss)] // Small numbers.
        let share = moved as f64 / (count * shards.len()) as f64;
        println!("{count} nodes x {each}: {share:.4} of all copies move beside the leaver's own");
        assert!(share < 3.0 / f64::from(u32::try_from(count).unwrap()), "{share}");
    }
}

#[test]
fn the_hash_is_part_of_the_protocol() {
    assert_eq!(hash("run/0", "node-0"), 18_014_088_871_873_530_914);
}
