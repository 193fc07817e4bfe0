//! A run as all nodes together hold it: who has which step of which rank, and what would be left without one
//! of them.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use super::Host;
use crate::{
    attempt::Attempts,
    error::{Error, Result},
    names::{CheckpointKey, Rank},
    observe::locked,
    peers::{Peers, Site, remote::look_at_all},
    restore::{
        decide::lineage_of,
        survey::{Found, Reach, reach, survey},
    },
    tier::{Tier, TierKind, disk::DiskTier, memory::MemoryTier},
};

/// A run over all nodes.
#[derive(Clone, Debug)]
pub struct RunAcross {
    /// Its directory, the same on all of them.
    pub destination: PathBuf,
    /// The newest checkpoint that all of them together can restore.
    pub newest: Option<u64>,
    /// Who holds what of the newest steps, by rank.
    pub held: Vec<Held>,
    /// For each node the newest step that could be restored without it.
    pub without: Vec<(String, Option<u64>)>,
    /// Why some of it is not known.
    pub trouble: Vec<String>,
}

/// A rank's newest shard in one place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Held {
    /// The rank.
    pub rank: u32,
    /// The node.
    pub node: String,
    /// Its RAM, or its disk.
    pub tier: TierKind,
    /// The newest step of the rank there.
    pub step: u64,
}

/// One tier of one node.
struct Place {
    node: String,
    tier: Arc<dyn Tier>,
    kind: TierKind,
}

impl Host {
    /// The runs that this agent has a part of, as all nodes hold them. It asks every live agent.
    #[must_use]
    pub fn across(&self) -> Vec<RunAcross> {
        let sites = self.sites();
        let all: Vec<_> = std::thread::scope(|scope| {
            // A thread for each: it acts as the run's user.
            let look = |site| scope.spawn(move || self.run_across(site));
            let looks: Vec<_> = sites.iter().map(look).collect();
            looks.into_iter().filter_map(|look| look.join().ok()).collect()
        });
        let told = |run: Result<_>| run.inspect_err(|e| tracing::warn!("{}", e.chain())).ok();
        all.into_iter().filter_map(told).collect()
    }

    /// Runs with ranks here, or with shards that are held here.
    fn sites(&self) -> Vec<Site> {
        let mut sites: BTreeMap<(PathBuf, u32), Site> = BTreeMap::new();
        let mut add = |site: Site| {
            sites.entry((site.destination.clone(), site.uid)).or_insert(site);
        };
        for seat in self.seats() {
            let super::peer::Who { uid, gid, groups } = seat.who.clone();
            let destination = seat.keeper.place.config.destination.clone();
            add(Site { destination, uid, gid, groups });
        }
        locked(&self.shelves).values().for_each(|(site, _)| add(site.clone()));
        sites.into_values().collect()
    }

    fn run_across(&self, site: &Site) -> Result<RunAcross> {
        let network = self.network.get();
        let network = network.ok_or_else(|| Error::invalid("this agent has no others"))?;
        self.act_as(site)?;
        let commons = self.commons.clone();
        let peers = Peers { network: network.clone(), site: site.clone(), commons };
        let (found, silent) = look_at_all(&peers);
        let here = |kind, tier| Place { node: network.me(), tier, kind };
        let ram = self.ram_dir(site);
        let mut places = vec![
            here(TierKind::Ram, Arc::new(MemoryTier::reader(&ram)) as Arc<dyn Tier>),
            here(TierKind::Disk, Arc::new(DiskTier::reader(&self.home(site)))),
        ];
        for remote in found {
            let kind = if remote.is_ram() { TierKind::Ram } else { TierKind::Disk };
            places.push(Place { node: remote.node.clone(), kind, tier: remote });
        }
        let mut nodes: Vec<String> = places.iter().map(|place| place.node.clone()).collect();
        nodes.sort();
        nodes.dedup();
        let newest = newest(&places, None)?;
        let without = nodes.into_iter().map(|node| {
            let left = self::newest(&places, Some(&node))?;
            Ok((node, left.map(|key| key.step.0)))
        });
        Ok(RunAcross {
            destination: site.destination.clone(),
            newest: newest.map(|key| key.step.0),
            held: held(&places)?,
            without: without.collect::<Result<_>>()?,
            trouble: silent.into_iter().map(|(node, e)| format!("{node}: {}", e.chain())).collect(),
        })
    }
}

/// The newest checkpoint that can be restored, `without` one node.
fn newest(places: &[Place], without: Option<&str>) -> Result<Option<CheckpointKey>> {
    let left = places.iter().filter(|place| without != Some(place.node.as_str()));
    let tiers: Vec<&dyn Tier> = left.map(|place| &*place.tier).collect();
    let found = survey(&tiers)?;
    let attempts = Attempts::load(&tiers)?;
    let lineage = lineage_of(&tiers, &found, &attempts)?;
    for found in found.iter().rev().filter(|found| lineage.contains(&found.key)) {
        if matches!(reach(&tiers, found, None)?, Reach::Whole(_)) {
            return Ok(Some(found.key.clone()));
        }
    }
    Ok(None)
}

fn held(places: &[Place]) -> Result<Vec<Held>> {
    let mut all = Vec::new();
    for place in places {
        let mut newest: BTreeMap<Rank, u64> = BTreeMap::new();
        for Found { key, listings } in survey(&[&*place.tier])? {
            for rank in listings.iter().flat_map(|listing| &listing.manifests) {
                let step = newest.entry(*rank).or_default();
                *step = (*step).max(key.step.0);
            }
        }
        let (node, tier) = (&place.node, place.kind);
        let one = |(rank, step): (Rank, u64)| Held { rank: rank.0, node: node.clone(), tier, step };
        all.extend(newest.into_iter().map(one));
    }
    all.sort();
    Ok(all)
}
