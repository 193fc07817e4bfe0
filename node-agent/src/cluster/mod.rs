//! The agents that are alive, as this one sees it.
//!
//! Gossip and failure detector are chitchat's: each agent tells a few others, four times a second, what
//! it knows of all. This module owns who counts as a member, and the key (`packet`, `gossip`). It
//! decides nothing about copies: that is `tierkeep::placement`.
//!
//! # Invariants
//!
//! - A member has one name. Of several lives of one name the newest counts: an agent that comes back,
//!   at another address or with an empty disk, replaces the one before it at once.
//! - A packet without the cluster's key changes nothing.
//! - Where the gossip has ended nobody counts as alive but this agent: what was known grows old.

mod gossip;
mod packet;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use chitchat::{
    ChitchatConfig, ChitchatHandle, ChitchatId, FailureDetectorConfig, NodeState, spawn_chitchat,
};
use tierkeep::clock::{Clock as _, SystemClock};
use tokio::sync::watch;

use self::gossip::{Keyed, Refused};
pub use self::packet::Key;

/// How often each agent tells others. News of an agent come that often or, where there are few, more
/// often: a dead one is missed after [`PHI`] such times (1.5 s among three idle agents).
const INTERVAL: Duration = Duration::from_millis(250);

/// So many usual intervals without news of an agent: it is dead.
const PHI: f64 = 10.0;

/// So long after its start an agent knows the others, if nothing has changed for a while; one that was
/// given others to begin with and hears of none waits longer before it believes that it is alone.
const KNOWN_AFTER: Duration = Duration::from_secs(3);
const QUIET_FOR: Duration = Duration::from_secs(1);
const ALONE_AFTER: Duration = Duration::from_secs(15);

/// A dead agent is forgotten after that; one that comes back later is a new one.
const FORGET: Duration = Duration::from_secs(24 * 3600);

/// Before each label.
const LABEL: &str = "label.";

/// The key of an agent whose node is to go away; why.
const LEAVING: &str = "leaving";

/// What an agent is to the others.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its name, which no other agent of the cluster has.
    pub name: String,
    /// The cluster's name: agents of another one are not listened to.
    pub cluster: String,
    /// What all agents of the cluster know.
    pub key: Key,
    /// Where it hears gossip, by UDP.
    pub listen: SocketAddr,
    /// Where others reach that.
    pub advertise: SocketAddr,
    /// Agents to begin with, as `address:port` or `name:port`; a name with several addresses is all of
    /// them, and is asked for again every minute.
    pub seeds: Vec<String>,
    /// Where it is and what else is known of it, as in `zone`, `rack`, `host`.
    pub labels: BTreeMap<String, String>,
}

/// A live agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// This life of it, in milliseconds since 1970: larger is newer. Where the clock went back before it
    /// began, it counts when the one before it is missed.
    pub life: u64,
    /// Where others reach it.
    pub address: SocketAddr,
    /// As it gave them.
    pub labels: BTreeMap<String, String>,
    /// Why its node is to go away, where that is so.
    pub leaving: Option<String>,
}

/// This agent among the others.
pub struct Cluster {
    handle: ChitchatHandle,
    live: watch::Receiver<BTreeMap<ChitchatId, NodeState>>,
    own: ChitchatId,
    cluster: String,
    refused: Refused,
    /// The gossip has ended.
    over: Arc<AtomicBool>,
    began: Duration,
    /// When somebody came or went last.
    changed: Arc<Mutex<Duration>>,
    /// It was given others to begin with.
    has_seeds: bool,
    /// Keys of the labels that it was given: they stay as they are.
    given: BTreeSet<String>,
}

impl Cluster {
    /// Begins to tell the others, and to listen. `found`: where this node is, as something else than its
    /// settings says; they count more.
    ///
    /// # Errors
    /// The address to listen at is taken, or is none of this host's.
    pub async fn join(settings: Settings, found: BTreeMap<String, String>) -> anyhow::Result<Self> {
        let life = SystemClock.unix_ms();
        let own = ChitchatId::new(settings.name, life, settings.advertise);
        let config = ChitchatConfig {
            chitchat_id: own.clone(),
            cluster_id: settings.cluster.clone(),
            gossip_interval: INTERVAL,
            listen_addr: settings.listen,
            seed_nodes: settings.seeds,
            failure_detector_config: FailureDetectorConfig {
                phi_threshold: PHI,
                sampling_window_size: 1_000,
                // A pause that long is no sign of a slow network: it does not make the next one usual.
                max_interval: 4 * INTERVAL,
                initial_interval: INTERVAL,
                dead_node_grace_period: FORGET,
            },
            marked_for_deletion_grace_period: Duration::from_secs(3600),
            catchup_callback: None,
            extra_liveness_predicate: None,
        };
        let own_seed = settings.advertise.to_string();
        let has_seeds = config.seed_nodes.iter().any(|seed| *seed != own_seed);
        let told = |(key, value): (String, String)| (format!("{LABEL}{key}"), value);
        let given = settings.labels.keys().map(|key| format!("{LABEL}{key}")).collect();
        let labels: BTreeMap<_, _> = found.into_iter().chain(settings.labels).map(told).collect();
        let refused = Refused::default();
        let transport = Keyed { key: settings.key, refused: refused.clone() };
        let handle = spawn_chitchat(config, labels.into_iter().collect(), &transport).await?;
        let live = handle.chitchat().lock().await.live_nodes_watcher();
        let began = SystemClock.monotonic();
        let changed = Arc::new(Mutex::new(began));
        tokio::spawn(tell(live.clone(), own.clone(), changed.clone()));
        let over = Arc::new(AtomicBool::new(false));
        let (ended, flag) = (handle.termination_watcher(), over.clone());
        tokio::spawn(async move {
            let ended = ended.await;
            flag.store(true, Ordering::Release);
            if let Err(e) = ended {
                tracing::error!("the gossip ended, other agents are out of reach: {e:#}");
            }
        });
        let cluster = settings.cluster;
        Ok(Self { handle, live, own, cluster, refused, over, began, changed, has_seeds, given })
    }

    /// The live agents by name, this one among them.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        let mut members = members(&self.live.borrow());
        if self.over.load(Ordering::Acquire) {
            members.retain(|member| member.name == *self.own.node_id);
        }
        members
    }

    /// Ready when another life of the member is known: at another address, perhaps.
    pub(crate) async fn moved(&self, member: &Member) {
        let mut live = self.live.clone();
        let is_newer =
            |id: &ChitchatId| *id.node_id == member.name && id.generation_id > member.life;
        // Where the gossip has ended nobody moves.
        if live.wait_for(|live| live.keys().any(is_newer)).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Whether the members are all that there are, as far as can be told.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        let now = SystemClock.monotonic();
        let up = now.saturating_sub(self.began);
        let changed = *self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        let enough = match self.has_seeds && self.members().len() < 2 {
            true => ALONE_AFTER,
            false => KNOWN_AFTER,
        };
        up >= enough && now.saturating_sub(changed) >= QUIET_FOR
    }

    /// Whether an agent that began later has this one's name.
    #[must_use]
    pub fn is_replaced(&self) -> bool {
        self.live.borrow().keys().any(|id| is_later(id, &self.own))
    }

    /// Packets that were not made with the cluster's key, or were noise.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// The cluster's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.cluster
    }

    /// This agent's name in it.
    #[must_use]
    pub fn own(&self) -> &str {
        &self.own.node_id
    }

    /// Tells the others that this node is to go away and why, or that it stays; and where it is, as far as
    /// that is news: labels that were given at first and are not among `labels` stay.
    pub async fn say(&self, leaving: Option<&str>, labels: Option<&BTreeMap<String, String>>) {
        self.handle
            .with_chitchat(|chitchat| {
                let state = chitchat.self_node_state();
                match leaving {
                    Some(why) => state.set(LEAVING, why),
                    None if state.get(LEAVING).is_some() => state.delete(LEAVING),
                    None => {}
                }
                for (key, value) in labels.into_iter().flatten() {
                    let key = format!("{LABEL}{key}");
                    if !self.given.contains(&key) {
                        state.set(key, value);
                    }
                }
            })
            .await;
    }

    /// Tells nothing any more: the others miss it.
    pub fn leave(&self) {
        let _ = self.handle.initiate_shutdown(); // It has ended already: as good.
    }
}

/// Tells the log who comes and who goes.
async fn tell(
    mut live: watch::Receiver<BTreeMap<ChitchatId, NodeState>>,
    own: ChitchatId,
    changed: Arc<Mutex<Duration>>,
) {
    let mut before = BTreeSet::new();
    let mut replaced = false;
    while live.changed().await.is_ok() {
        let (now, newer): (BTreeSet<_>, bool) = {
            let live = live.borrow_and_update();
            let others = live.keys().filter(|id| id.node_id != own.node_id).cloned();
            (others.collect(), live.keys().any(|id| is_later(id, &own)))
        };
        if now != before {
            *changed.lock().unwrap_or_else(PoisonError::into_inner) = SystemClock.monotonic();
        }
        for id in now.difference(&before) {
            tracing::info!("{} is here, at {}", id.node_id, id.gossip_advertise_addr);
        }
        for id in before.difference(&now) {
            tracing::warn!("{} is gone, which was at {}", id.node_id, id.gossip_advertise_addr);
        }
        if newer && !replaced {
            tracing::error!("another agent, which began later, is called {} too", own.node_id);
        }
        (before, replaced) = (now, newer);
    }
}

/// Whether `id` is a later life of the same name.
fn is_later(id: &ChitchatId, own: &ChitchatId) -> bool {
    id.node_id == own.node_id && id.generation_id > own.generation_id
}

/// Of each name the newest life.
fn members(live: &BTreeMap<ChitchatId, NodeState>) -> Vec<Member> {
    let mut found: BTreeMap<&str, Member> = BTreeMap::new();
    for (id, state) in live {
        let label = |(key, value): (&str, &str)| {
            Some((key.strip_prefix(LABEL)?.to_owned(), value.to_owned()))
        };
        let member = Member {
            name: id.node_id.to_string(),
            life: id.generation_id,
            address: id.gossip_advertise_addr,
            labels: state.key_values().filter_map(label).collect(),
            leaving: state.get(LEAVING).map(String::from),
        };
        let known = found.entry(&id.node_id).or_insert_with(|| member.clone());
        if known.life < member.life {
            *known = member;
        }
    }
    found.into_values().collect()
}
