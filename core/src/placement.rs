//! Which nodes hold copies of which shards: every agent computes the same, nobody negotiates.
//!
//! Each pair of shard and node has a score by hash (rendezvous hashing, Thaler and Ravishankar 1998). A
//! shard asks nodes from its highest score down, and a node that is full keeps those whose scores are
//! higher (deferred acceptance, Gale and Shapley 1962): the outcome does not depend on who asks first,
//! and a node that comes or goes moves little beside its own load.
//!
//! It owns neither liveness (who is alive is the caller's to say) nor bytes.
//!
//! # Invariants
//!
//! - The same nodes and shards have the same placement, in whatever order they are given.
//! - A copy never lies on its shard's own node, nor two of them on one node.
//! - No two copies share a failure domain while a live node is in another one; level by level, the widest
//!   first. Domains count more than balance.
//! - Loads differ by one at most, unless domains or the shards' own nodes forbid it: that is said.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    hash::Hasher,
};

use siphasher::sip::SipHasher13;

/// A live node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name, which no other has.
    pub name: String,
    /// Its failure domains, the widest first, as in zone, rack, host. All nodes name the same levels.
    pub domains: Vec<String>,
}

/// A shard that is to have copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Its name, which no other has.
    pub name: String,
    /// Where it is: an index of the nodes.
    pub node: usize,
}

/// Where the copies go, and what could not be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// For each shard the nodes of its copies: indices, none of them its own.
    pub holders: Vec<Vec<usize>>,
    /// For each node how many copies it holds.
    pub loads: Vec<usize>,
    /// Guarantees that these nodes cannot give.
    pub lacks: Vec<Lack>,
}

/// A guarantee that could not be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// There are too few nodes for the copies of this shard.
    Copies {
        /// Which one.
        shard: usize,
        /// How many it has.
        has: usize,
    },
    /// Copies of this shard are in one failure domain: it, or all, may be lost with that.
    Together {
        /// Which one.
        shard: usize,
        /// The widest level at which a copy is apart from all the others; as many as there are levels:
        /// at none.
        apart: usize,
    },
    /// Some node holds at least two copies more than another.
    Uneven {
        /// The smallest load.
        least: usize,
        /// The largest.
        most: usize,
    },
}

/// Places `copies` of each shard.
///
/// # Panics
/// A shard is on a node that is not among `nodes`.
#[must_use]
pub fn place(nodes: &[Node], shards: &[Shard], copies: usize) -> Placement {
    // By name: indices are the caller's, and differ from agent to agent.
    let mut order: Vec<usize> = (0..shards.len()).collect();
    order.sort_by(|a, b| shards[*a].name.cmp(&shards[*b].name));
    let mut placing = Placing {
        nodes,
        shards,
        scores: shards.iter().map(|shard| scores(shard, nodes)).collect(),
        order,
        taken: shards.iter().map(|shard| vec![shard.node]).collect(),
        loads: vec![0; nodes.len()],
        lacks: Vec::new(),
    };
    for copy in 0..copies {
        placing.round(copy);
    }
    let Placing { taken, loads, mut lacks, .. } = placing;
    let (least, most) = (loads.iter().min(), loads.iter().max());
    if let (Some(&least), Some(&most)) = (least, most)
        && most > least + 1
    {
        lacks.push(Lack::Uneven { least, most });
    }
    let holders = taken.into_iter().map(|mut nodes| nodes.split_off(1)).collect();
    Placement { holders, loads, lacks }
}

/// How well each node suits a shard. The hash is part of the protocol: agents of different builds agree.
fn scores(shard: &Shard, nodes: &[Node]) -> Vec<u64> {
    nodes.iter().map(|node| hash(&shard.name, &node.name)).collect()
}

fn hash(what: &str, node: &str) -> u64 {
    let mut hasher = SipHasher13::new();
    hasher.write(&(what.len() as u64).to_le_bytes());
    hasher.write(what.as_bytes());
    hasher.write(node.as_bytes());
    hasher.finish()
}

/// How far two nodes are apart: 0 on one host, as many as there are levels in two of the widest domains.
fn apart(a: &Node, b: &Node) -> usize {
    let same = a.domains.iter().zip(&b.domains).take_while(|(a, b)| a == b).count();
    a.domains.len().max(b.domains.len()) - same
}

struct Placing<'a> {
    nodes: &'a [Node],
    shards: &'a [Shard],
    scores: Vec<Vec<u64>>,
    /// Shards by name.
    order: Vec<usize>,
    /// For each shard the nodes that have it: its own first.
    taken: Vec<Vec<usize>>,
    loads: Vec<usize>,
    lacks: Vec<Lack>,
}

impl Placing<'_> {
    /// One more copy of each shard.
    fn round(&mut self, copy: usize) {
        let levels = self.nodes.iter().map(|node| node.domains.len()).max().unwrap_or(0);
        let mut may: Vec<Vec<usize>> = vec![Vec::new(); self.shards.len()];
        for shard in self.order.clone() {
            let (best, nodes) = self.farthest(shard);
            if nodes.is_empty() {
                self.lacks.push(Lack::Copies { shard, has: copy });
            } else if best < levels {
                self.lacks.push(Lack::Together { shard, apart: levels - best });
            }
            may[shard] = nodes;
        }
        let wanted = may.iter().filter(|nodes| !nodes.is_empty()).count();
        let room = self.room(wanted);
        let mut round =
            Round { placing: self, may, held: vec![BinaryHeap::new(); room.len()], room };
        let rest = round.ask();
        for shard in rest {
            round.make_room(shard);
        }
        let held: Vec<Vec<usize>> = round
            .held
            .into_iter()
            .map(|held| held.into_iter().map(|Reverse((_, s))| s).collect())
            .collect();
        for (node, shards) in held.into_iter().enumerate() {
            self.loads[node] += shards.len();
            shards.into_iter().for_each(|shard| self.taken[shard].push(node));
        }
    }

    /// The nodes that are farthest from all that have the shard, and how far that is; the one that suits
    /// it best first.
    fn farthest(&self, shard: usize) -> (usize, Vec<usize>) {
        let taken = &self.taken[shard];
        let far = |node: usize| {
            taken
                .iter()
                .map(|there| apart(&self.nodes[node], &self.nodes[*there]))
                .min()
                .unwrap_or(0)
        };
        let free = (0..self.nodes.len()).filter(|node| !taken.contains(node));
        let graded: Vec<(usize, usize)> = free.map(|node| (far(node), node)).collect();
        let best = graded.iter().map(|(far, _)| *far).max().unwrap_or(0);
        let mut nodes: Vec<usize> =
            graded.into_iter().filter(|(far, _)| *far == best).map(|(_, node)| node).collect();
        nodes.sort_by_key(|node| Reverse(self.rank(shard, *node)));
        (best, nodes)
    }

    /// The order of nodes for a shard, and of shards for a node.
    fn rank(&self, shard: usize, node: usize) -> (u64, &str) {
        (self.scores[shard][node], &self.nodes[node].name)
    }

    /// How many more copies each node takes: the same for all, and one more for as many as it needs.
    fn room(&self, wanted: usize) -> Vec<usize> {
        if self.nodes.is_empty() {
            return Vec::new();
        }
        let total = self.loads.iter().sum::<usize>() + wanted;
        let (each, more) = (total / self.nodes.len(), total % self.nodes.len());
        let mut by_hash: Vec<usize> = (0..self.nodes.len()).collect();
        by_hash.sort_by_key(|node| (hash("", &self.nodes[*node].name), &self.nodes[*node].name));
        let mut room = vec![each; self.nodes.len()];
        by_hash.into_iter().take(more).for_each(|node| room[node] += 1);
        room.iter().zip(&self.loads).map(|(room, load)| room.saturating_sub(*load)).collect()
    }
}

/// Shards that a node holds of this round: the one that suits it least on top.
type Held = BinaryHeap<Reverse<(u64, usize)>>;

struct Round<'a, 'b> {
    placing: &'a Placing<'b>,
    /// For each shard the nodes that it may have, the best first.
    may: Vec<Vec<usize>>,
    held: Vec<Held>,
    room: Vec<usize>,
}

impl Round<'_, '_> {
    /// Deferred acceptance; the shards that no node has room for.
    fn ask(&mut self) -> Vec<usize> {
        let mut next = vec![0; self.may.len()];
        let mut asking: Vec<usize> = self.placing.order.iter().rev().copied().collect();
        let mut rest = Vec::new();
        while let Some(shard) = asking.pop() {
            let Some(&node) = self.may[shard].get(next[shard]) else {
                if !self.may[shard].is_empty() {
                    rest.push(shard);
                }
                continue;
            };
            next[shard] += 1;
            self.held[node].push(Reverse((self.placing.scores[shard][node], shard)));
            if self.held[node].len() > self.room[node]
                && let Some(Reverse((_, refused))) = self.held[node].pop()
            {
                asking.push(refused);
            }
        }
        rest.sort_by(|a, b| self.placing.shards[*a].name.cmp(&self.placing.shards[*b].name));
        rest
    }

    /// Finds a place by moving others, each to a node that it may have, until one has room; where there
    /// is none, the node with the least load takes one more than its share.
    fn make_room(&mut self, shard: usize) {
        let count = self.held.len();
        // How a node was come to: which shard moves there, from which node.
        let mut came: Vec<Option<(usize, Option<usize>)>> = vec![None; count];
        let mut open = VecDeque::new();
        for &node in &self.may[shard] {
            came[node] = Some((shard, None));
            open.push_back(node);
        }
        while let Some(node) = open.pop_front() {
            if self.held[node].len() < self.room[node] {
                self.shift(node, &came);
                return;
            }
            let mut movable: Vec<usize> =
                self.held[node].iter().map(|Reverse((_, s))| *s).collect();
            movable.sort_by(|a, b| self.placing.shards[*a].name.cmp(&self.placing.shards[*b].name));
            for moved in movable {
                for &to in &self.may[moved] {
                    if came[to].is_none() {
                        came[to] = Some((moved, Some(node)));
                        open.push_back(to);
                    }
                }
            }
        }
        let load = |node: &usize| self.placing.loads[*node] + self.held[*node].len();
        // The first of equals: the one that suits it best.
        if let Some(&node) = self.may[shard].iter().min_by_key(|node| load(node)) {
            self.put(shard, node);
        }
    }

    fn shift(&mut self, last: usize, came: &[Option<(usize, Option<usize>)>]) {
        let mut to = last;
        while let Some((moved, from)) = came[to] {
            self.put(moved, to);
            let Some(from) = from else { return };
            self.held[from].retain(|Reverse((_, shard))| *shard != moved);
            to = from;
        }
    }

    fn put(&mut self, shard: usize, node: usize) {
        self.held[node].push(Reverse((self.placing.scores[shard][node], shard)));
    }
}

#[cfg(test)]
mod tests;
