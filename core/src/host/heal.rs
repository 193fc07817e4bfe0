//! Copies of ranks whose own node is gone are made again by those that hold one: nobody else would, until
//! the job comes back.
//!
//! # Invariants
//!
//! - A rank whose node lives makes its own copies; nobody does so for it.
//! - What is of an older attempt than one whose leader lives is left alone: that one's ranks say what goes.
//! - The newest step first, one shard at a time; bytes go at the rate of all that this agent sends.
//! - Nothing that is held gives way for it: neither here nor where it goes.
//! - Whoever looks for them touches no disk; those are met on a thread of its own.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use super::Host;
use crate::{
    clock::Clock,
    commit::read_manifest,
    error::Result,
    names::{CheckpointKey, Rank},
    observe::{add, locked},
    peers::{
        Peers, Site,
        commons::ask_who_leads,
        hold::{Owner, Shelf},
        leaving,
        send::{Outbound, inform, send},
    },
    placement::{Node, Shard, place},
};

/// A node that is away for no longer is being restarted.
const HEAL_AFTER: Duration = Duration::from_secs(10);

/// Where that failed, it is tried again.
const AGAIN: Duration = Duration::from_secs(30);

/// Agents that are asked who leads, where this one does not know.
const ASKED_MAX: usize = 3;

/// What is known of a rank whose node is gone.
#[derive(Debug)]
pub(super) struct Healing {
    /// When it is looked at again.
    next: Duration,
    /// Who has copies besides this node, once there are enough.
    copies: Option<BTreeSet<String>>,
}

/// One whose copies are to be made.
struct Patient {
    /// The run's real directory and the rank.
    place: (PathBuf, u32),
    site: Site,
    shelf: Arc<Shelf>,
    owner: Owner,
}

impl Host {
    /// Looks for ranks whose nodes are gone, and heals them on a thread of its own, one round at a time.
    pub(super) fn heal(self: &Arc<Self>) {
        let Some(network) = self.network.get().filter(|network| network.is_settled()) else {
            return;
        };
        if Arc::strong_count(&self.healer) > 1 {
            return; // Somebody is at it.
        }
        let nodes = network.nodes();
        let leaving = leaving(&**network, &nodes);
        let alive: BTreeSet<String> = nodes.into_iter().map(|node| node.name).collect();
        let staying = alive.difference(&leaving).filter(|node| **node != network.me());
        let staying = staying.cloned().collect();
        let patients = self.patients(&alive, &staying);
        if patients.is_empty() {
            return;
        }
        let (host, turn) = (self.clone(), self.healer.clone());
        let work = move || {
            let _turn = turn;
            for patient in &patients {
                if !host.hears_of_newer(patient, &alive) {
                    host.heal_one(patient);
                }
            }
        };
        if let Err(e) = std::thread::Builder::new().name("tierkeep-heal".into()).spawn(work) {
            tracing::error!("no thread to make copies again: {e}");
        }
    }

    /// Those that have waited long enough, the newest step first.
    fn patients(&self, alive: &BTreeSet<String>, staying: &BTreeSet<String>) -> Vec<Patient> {
        let now = self.clock.monotonic();
        let mut healing = locked(&self.healing);
        let mut due = Vec::new();
        let mut known = BTreeSet::new();
        for (place, (site, shelf)) in locked(&self.shelves).iter() {
            let lost = |owner: &Owner| owner.replicas > 0 && !alive.contains(&owner.node);
            let Some(owner) = shelf.owner().filter(lost) else { continue };
            let held = !shelf.held().is_empty();
            if !held || self.is_led_anew(place, site, &owner, alive) == Some(true) {
                continue;
            }
            known.insert(place.clone());
            let new = || Healing { next: now.saturating_add(HEAL_AFTER), copies: None };
            let one = healing.entry(place.clone()).or_insert_with(new);
            // Whoever had a copy may be lost as well, or be about to go where another one could have it.
            let good = |all: &BTreeSet<String>| {
                all.is_subset(alive) && (all.is_subset(staying) || staying.is_subset(all))
            };
            let enough = one.copies.as_ref().is_some_and(good);
            if enough || now < one.next {
                continue;
            }
            one.next = now.saturating_add(AGAIN);
            due.push(Patient {
                place: place.clone(),
                site: site.clone(),
                shelf: shelf.clone(),
                owner,
            });
        }
        healing.retain(|place, _| known.contains(place));
        due.sort_by_cached_key(|patient| {
            std::cmp::Reverse(patient.shelf.held().into_iter().next())
        });
        due
    }

    /// Whether a newer attempt's leader lives; `None`: nobody has told this agent who leads.
    fn is_led_anew(
        &self,
        place: &(PathBuf, u32),
        site: &Site,
        owner: &Owner,
        alive: &BTreeSet<String>,
    ) -> Option<bool> {
        let led = self.commons.led_at(&place.0, site.uid)?;
        Some(led.record.attempt.number > owner.attempt && alive.contains(&led.node))
    }

    /// The same, where this agent was away when it was told: any other one knows it.
    fn hears_of_newer(&self, patient: &Patient, alive: &BTreeSet<String>) -> bool {
        let Patient { place, site, owner, .. } = patient;
        let led = || self.is_led_anew(place, site, owner, alive);
        let Some(network) = self.network.get().filter(|_| led().is_none()) else {
            return led() == Some(true);
        };
        let (network, commons) = (network.clone(), self.commons.clone());
        let peers = Peers { network, site: site.clone(), commons };
        for node in peers.others().iter().take(ASKED_MAX) {
            if let Err(e) = ask_who_leads(&peers, &node.name) {
                tracing::debug!("{} does not say who leads: {}", node.name, e.chain());
            }
        }
        led() == Some(true)
    }

    fn heal_one(&self, patient: &Patient) {
        let Patient { place, site, shelf, owner } = patient;
        let (run, rank) = (site.destination.display(), Rank(place.1));
        let healed = self.act_as(site).and_then(|()| self.copy_again(patient));
        match healed {
            Ok(copies) if copies.len() >= owner.replicas => {
                let all: Vec<&str> = copies.iter().map(String::as_str).collect();
                let step = shelf.held().into_iter().next();
                let step = step.map_or_else(String::new, |key| key.step.to_string());
                tracing::info!(
                    "{run}, {rank}: {} is gone; {step} is here and on {}",
                    owner.node,
                    all.join(" and ")
                );
                let mut healing = locked(&self.healing);
                if let Some(one) = healing.get_mut(place) {
                    one.copies = Some(copies);
                }
            }
            Ok(copies) => tracing::warn!(
                "{run}, {rank}: {} is gone, and only {} of {} other nodes take a copy",
                owner.node,
                copies.len(),
                owner.replicas
            ),
            Err(e) => tracing::warn!("{run}, {rank}: no copy was made again: {}", e.chain()),
        }
    }

    /// Makes copies of all that is held, the newest first; who has the newest now.
    fn copy_again(&self, patient: &Patient) -> Result<BTreeSet<String>> {
        let Patient { place, site, shelf, owner } = patient;
        let rank = Rank(place.1);
        let Some(network) = self.network.get() else { return Ok(BTreeSet::new()) };
        let (network, commons) = (network.clone(), self.commons.clone());
        let peers = Peers { network, site: site.clone(), commons };
        let held = shelf.held();
        let mut first = None;
        for key in &held {
            let mut copies = BTreeSet::new();
            let mut refused = BTreeSet::new();
            while copies.len() < owner.replicas {
                let next = next_holder(&peers, rank, owner.replicas, &copies, &refused);
                let Some(node) = next else { break };
                match self.copy_to(&peers, &node, shelf, rank, owner, key) {
                    Ok(()) => copies.insert(node),
                    Err(e) => {
                        tracing::debug!("{node} takes no copy of {key}, {rank}: {}", e.chain());
                        refused.insert(node)
                    }
                };
            }
            first.get_or_insert(copies);
        }
        Ok(first.unwrap_or_default())
    }

    fn copy_to(
        &self,
        peers: &Peers,
        node: &str,
        shelf: &Shelf,
        rank: Rank,
        owner: &Owner,
        key: &CheckpointKey,
    ) -> Result<()> {
        let ram = &**shelf.ram();
        let (manifest, bytes) = read_manifest(ram, key, rank, None)?;
        let source = ram.open(&key.file(&manifest.payload.file))?;
        inform(peers, node, &[ram])?;
        let outbound = Outbound {
            key,
            rank,
            manifest: &bytes,
            payload: &manifest.payload,
            source: &*source,
            arrived: &|bytes| add(&self.tally.healed_bytes, bytes),
            attempt: owner.attempt,
            replicas: owner.replicas,
            owner: Some(&owner.node),
            keep: &[],
        };
        send(peers, node, &outbound).map(drop)
    }
}

/// The node that the placement wants next, as if this one were the rank's own.
fn next_holder(
    peers: &Peers,
    rank: Rank,
    replicas: usize,
    copies: &BTreeSet<String>,
    refused: &BTreeSet<String>,
) -> Option<String> {
    let next = |nodes: Vec<Node>| {
        let node = nodes.iter().position(|node| node.name == peers.network.me())?;
        let name = format!("{}#{}", peers.site.destination.display(), rank.0);
        let placed = place(&nodes, &[Shard { name, node }], replicas.min(nodes.len()));
        let holders = placed.holders.into_iter().flatten().map(|index| nodes[index].name.clone());
        holders.into_iter().find(|node| !copies.contains(node))
    };
    peers.grounds(refused).into_iter().find_map(next)
}
