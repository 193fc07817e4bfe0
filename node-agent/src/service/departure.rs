//! A node that is to go away, by its cluster's word: the host and the others are told. And a node that should
//! not go yet: while it has what no bucket has, autoscalers are asked to leave it.
//!
//! The agent's own SIGTERM says nothing of the kind: it is an upgrade, usually.
//!
//! # Invariants
//!
//! - Autoscalers are asked for so long at most, from the last moment at which anything moved.
//! - What somebody else has said of the node to an autoscaler stays as it is.
//! - The API server is told when training begins and when it has ended, not at each step.
//! - An agent that ends asks for nothing any more.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tierkeep::{
    clock::{Clock, SystemClock},
    host::{Host, RankView},
    tier::publish::write_note,
};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{asking::Asking, node::Watching};
use crate::{
    cluster::Cluster,
    kubernetes::{
        is_conflict,
        watch::{Heard, follow},
    },
};

/// What people read on a Node that is held.
const HELD: &str = "tierkeep.dev/held";

/// What autoscalers read there, and what people do.
const HOLDS: [(&str, &str); 3] = [
    ("cluster-autoscaler.kubernetes.io/scale-down-disabled", "true"),
    ("karpenter.sh/do-not-disrupt", "true"),
    (HELD, "it has state of a training run that no bucket has"),
];

/// Where the labels are kept for the next agent, in the directory of the ram tier.
const COPY: &str = ".node-labels.json";

/// How long an agent that begins waits for the server before it goes by what the last one knew.
const FIRST_WITHIN: Duration = Duration::from_secs(5);

/// The same where that is known.
const AGAIN_WITHIN: Duration = Duration::from_secs(1);

/// How often it is looked whether the node is to be held, and how often it is asked again.
const LOOK: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_secs(30);

const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// An agent that ends says so to the server, if that answers at once.
const ENDING_WITHIN: Duration = Duration::from_secs(3);

/// What watches the Node.
pub(super) struct Departure {
    watching: Watching,
    heard: watch::Receiver<Heard>,
    following: JoinHandle<()>,
    copy: PathBuf,
}

impl Departure {
    /// Begins to watch; and where the node is, once that is known, or as the last agent knew it.
    pub(super) async fn begin(
        watching: &Watching,
        ram_dir: &Path,
    ) -> (Self, BTreeMap<String, String>) {
        let (told, mut heard) = watch::channel(Heard::Nothing);
        let (api, name) = (watching.api.clone(), watching.name.clone());
        let following = tokio::spawn(follow(api, name, told));
        // Trainers wait meanwhile. A server that refuses or is not there says so at once.
        let first = heard.wait_for(|heard| !matches!(heard, Heard::Nothing));
        let copy = ram_dir.join(COPY);
        let within = if copy.exists() { AGAIN_WITHIN } else { FIRST_WITHIN };
        let _ = timeout(within, first).await;
        let places = match &*heard.borrow() {
            Heard::Is(node) => Some(node.places(&watching.labels)),
            _ => None,
        };
        let places = places.or_else(|| {
            let kept = serde_json::from_slice(&std::fs::read(&copy).ok()?).ok();
            if kept.is_some() {
                tracing::warn!("where this node is, is taken from what the last agent knew");
            }
            kept
        });
        let watching = watching.clone();
        (Self { watching, heard, following, copy }, places.unwrap_or_default())
    }

    /// Tells whom it concerns, until `ending`. A server that is slow to hold the node delays no word that it
    /// is to go away.
    pub(super) async fn serve(
        self,
        host: Arc<Host>,
        cluster: Option<Arc<Cluster>>,
        ending: impl Future<Output = ()>,
    ) {
        let asking = Asking::new(host.clone(), 1);
        let mut hold = Hold::new(self.watching.hold);
        tokio::select! {
            () = self.tell_on(&host, cluster.as_deref()) => {}
            () = self.hold_on(&asking, &mut hold) => {}
            () = ending => {}
        }
        self.following.abort();
        if hold.may_be_asked() {
            let nothing = BTreeMap::new();
            let released = self.watching.api.annotate(&self.watching.name, &nothing);
            match timeout(ENDING_WITHIN, released).await {
                Ok(Ok(())) => {}
                // The next agent takes it back, or keeps it.
                Ok(Err(e)) => {
                    tracing::warn!("autoscalers are still asked to leave this node: {e:#}")
                }
                Err(_) => tracing::warn!("autoscalers are still asked to leave this node"),
            }
        }
    }

    /// It does not end.
    async fn tell_on(&self, host: &Host, cluster: Option<&Cluster>) {
        let mut heard = self.heard.clone();
        loop {
            let now = heard.borrow_and_update().clone();
            self.tell(&now, host, cluster).await;
            tokio::select! {
                Ok(()) = heard.changed() => {}
                () = sleep(LOOK) => {}
            }
        }
    }

    /// It does not end.
    async fn hold_on(&self, asking: &Asking, hold: &mut Hold) {
        let mut heard = self.heard.clone();
        loop {
            // What an agent before it has asked for is taken back, or goes on; so is what somebody took back.
            if let Heard::Is(node) = &*heard.borrow_and_update() {
                hold.is_asked = Some(node.has_annotation(HELD));
            }
            if self.watching.hold.is_zero() {
                hold.wanted = false;
            } else {
                match asking.ask(ANSWER_WITHIN, Host::ranks).await {
                    Ok(ranks) => hold.look(&ranks, SystemClock.monotonic()),
                    Err(e) => tracing::debug!("a look at what the node has: {}", e.chain()),
                }
            }
            self.ask_autoscalers(hold).await;
            tokio::select! {
                Ok(()) = heard.changed() => {}
                () = sleep(LOOK) => {}
            }
        }
    }

    /// What was heard last, to the host and to the others.
    async fn tell(&self, heard: &Heard, host: &Host, cluster: Option<&Cluster>) {
        let (leaving, places) = match heard {
            Heard::Nothing | Heard::Away => return,
            Heard::Deleted => (Some("its Node was deleted".to_owned()), None),
            Heard::Is(node) => {
                (node.leaving(&self.watching.taints), Some(node.places(&self.watching.labels)))
            }
        };
        if let Some(places) = &places {
            self.keep(places);
        }
        let before = host.leaving();
        host.leave(leaving.as_deref());
        if let Some(cluster) = cluster {
            cluster.say(leaving.as_deref(), places.as_ref()).await;
        }
        match leaving {
            Some(why) if before.as_ref() != Some(&why) => tracing::warn!(
                "this node is to go away: {why}; what is newest goes to disk and bucket at once, and others \
                 make its copies elsewhere"
            ),
            None if before.is_some() => tracing::info!("this node stays"),
            _ => {}
        }
    }

    /// For the next agent. Where it cannot be kept, that one asks.
    fn keep(&self, places: &BTreeMap<String, String>) {
        let bytes = serde_json::to_vec(places).unwrap_or_default();
        if let Err(e) = write_note(&self.copy, &bytes) {
            tracing::warn!("{} is not kept: {}", self.copy.display(), e.chain());
        }
    }

    async fn ask_autoscalers(&self, hold: &mut Hold) {
        let now = SystemClock.monotonic();
        let Some(wanted) = hold.wants(now) else { return };
        hold.asks = true; // From here on nobody knows until there is an answer.
        let annotations = match wanted {
            true => HOLDS.map(|(key, value)| (key, value.to_owned())).into(),
            false => BTreeMap::new(),
        };
        let asked = self.watching.api.annotate(&self.watching.name, &annotations).await;
        let first = hold.was_answered(asked.is_ok(), now);
        match asked {
            Ok(()) => {
                let what = match wanted {
                    true => "are asked to leave this node: it has what no bucket has",
                    false => "may take this node down",
                };
                tracing::info!("autoscalers {what}");
            }
            Err(e) if is_conflict(&e) && first => tracing::warn!(
                "somebody else has said whether autoscalers may take this node down, and it is left so: {e:#}"
            ),
            Err(e) if first => {
                tracing::warn!(
                    "autoscalers are not told whether they may take this node down: {e:#}"
                );
            }
            Err(_) => {}
        }
    }
}

/// Whether the node is to be held.
#[derive(Debug)]
struct Hold {
    most: Duration,
    /// What the ranks had when it was looked last.
    seen: Vec<Seen>,
    moved: Option<Duration>,
    wanted: bool,
    /// Autoscalers are asked; `None`: nobody has said so yet.
    is_asked: Option<bool>,
    asked: Option<Duration>,
    failed: bool,
    /// A question is on its way, or had no answer.
    asks: bool,
}

/// A rank whose newest step no bucket has: the step in RAM, on disk, in the bucket.
type Seen = (PathBuf, u32, [Option<u64>; 3]);

impl Hold {
    fn new(most: Duration) -> Self {
        let (seen, moved, asked) = (Vec::new(), None, None);
        Self { most, seen, moved, wanted: false, is_asked: None, asked, failed: false, asks: false }
    }

    /// Takes a look in.
    fn look(&mut self, ranks: &[RankView], now: Duration) {
        let exposed = ranks.iter().filter(|rank| is_exposed(rank)).map(|rank| {
            let steps = [rank.in_ram, rank.on_disk, rank.to_bucket.sealed];
            (rank.destination.clone(), rank.rank, steps)
        });
        let seen: Vec<Seen> = exposed.collect();
        if seen != self.seen {
            self.moved = Some(now);
            self.seen = seen;
        }
        let idle = self.moved.map_or(Duration::ZERO, |moved| now.saturating_sub(moved));
        // A bucket that keeps up has everything now and then: a thousand nodes do not tell the server each
        // time.
        let goes_on = self.is_asked == Some(true) && ranks.iter().any(|rank| rank.pid.is_some());
        self.wanted = (!self.seen.is_empty() || goes_on) && idle < self.most;
    }

    /// What the server is to be told now, if it is to be told anything.
    fn wants(&self, now: Duration) -> Option<bool> {
        let may = !self.failed || self.asked.is_none_or(|asked| now.saturating_sub(asked) >= AGAIN);
        (self.is_asked? != self.wanted && may).then_some(self.wanted)
    }

    /// Whether autoscalers may have been asked: what had no answer may have been done.
    fn may_be_asked(&self) -> bool {
        self.is_asked == Some(true) || self.asks
    }

    /// Whether this is the first answer of its kind.
    fn was_answered(&mut self, good: bool, now: Duration) -> bool {
        let first = good || !self.failed;
        (self.failed, self.asked, self.asks) = (!good, Some(now), !good);
        if good {
            self.is_asked = Some(self.wanted);
        }
        first
    }
}

/// True where its newest step is in no bucket: not the nodes' memory and not their disks outlive a whole
/// group of nodes that is taken down.
fn is_exposed(rank: &RankView) -> bool {
    let has = rank.slot_bytes > 0 || rank.to_bucket.sending.or(rank.to_bucket.next).is_some();
    has && rank.in_ram.max(rank.on_disk) > rank.to_bucket.sealed
}

#[cfg(test)]
mod tests {
    use tierkeep::host::ToBucket;

    use super::*;

    /// One rank that has memory.
    fn rank(ram: Option<u64>, bucket: Option<u64>) -> RankView {
        let to_bucket = ToBucket { sealed: bucket, ..ToBucket::default() };
        let (destination, slot_bytes) = ("/ckpt/run".into(), 1 << 20);
        RankView { destination, in_ram: ram, slot_bytes, to_bucket, ..RankView::default() }
    }

    const fn minutes(minutes: u64) -> Duration {
        Duration::from_secs(60 * minutes)
    }

    #[test]
    fn a_node_is_held_while_it_has_what_no_bucket_has() {
        let mut hold = Hold::new(minutes(15));
        hold.look(&[rank(None, None)], minutes(0));
        assert_eq!(hold.wants(minutes(0)), None, "nobody knows");
        hold.is_asked = Some(true);
        assert_eq!(hold.wants(minutes(0)), Some(false), "what an agent before it has left");
        assert!(hold.was_answered(true, minutes(0)));
        assert_eq!(hold.wants(minutes(0)), None);
        hold.look(&[rank(Some(5), Some(5)), rank(Some(5), Some(4))], minutes(1));
        assert_eq!(hold.wants(minutes(1)), Some(true));
        hold.was_answered(true, minutes(1));
        hold.look(&[rank(Some(5), Some(5)), rank(Some(5), Some(5))], minutes(2));
        assert_eq!(hold.wants(minutes(2)), Some(false));
    }

    #[test]
    fn a_bucket_that_keeps_up_with_a_training_changes_nothing() {
        let mut hold = Hold::new(minutes(15));
        hold.is_asked = Some(false);
        let trains = |ram, bucket| RankView { pid: Some(7), ..rank(Some(ram), Some(bucket)) };
        hold.look(&[trains(5, 5)], minutes(0));
        assert_eq!(hold.wants(minutes(0)), None);
        hold.look(&[trains(6, 5)], minutes(1));
        assert_eq!(hold.wants(minutes(1)), Some(true));
        hold.was_answered(true, minutes(1));
        for minute in 2..60 {
            hold.look(&[trains(minute, minute - minute % 2)], minutes(minute));
            assert_eq!(hold.wants(minutes(minute)), None);
        }
        hold.look(&[rank(Some(60), Some(60))], minutes(60));
        assert_eq!(hold.wants(minutes(60)), Some(false), "it has ended");
    }

    #[test]
    fn it_is_held_for_so_long_from_the_last_move_on() {
        let mut hold = Hold::new(minutes(15));
        for minute in 0..60 {
            hold.look(&[rank(Some(minute), None)], minutes(minute));
            assert!(hold.wanted, "it trains");
        }
        hold.look(&[rank(Some(59), None)], minutes(73));
        assert!(hold.wanted);
        hold.look(&[rank(Some(59), None)], minutes(74));
        assert!(!hold.wanted, "15 minutes after the last step");
        hold.look(&[rank(Some(60), None)], minutes(75));
        assert!(hold.wanted, "it trains again");
    }

    #[test]
    fn a_server_that_refuses_is_asked_now_and_then_and_told_of_once() {
        let mut hold = Hold::new(minutes(15));
        hold.was_answered(true, minutes(0));
        hold.look(&[rank(Some(1), None)], minutes(1));
        assert_eq!(hold.wants(minutes(1)), Some(true));
        assert!(hold.was_answered(false, minutes(1)));
        assert_eq!(hold.wants(minutes(1)), None, "not at once");
        assert_eq!(hold.wants(minutes(2)), Some(true));
        assert!(!hold.was_answered(false, minutes(2)), "it was told");
        assert!(hold.was_answered(true, minutes(3)));
        assert_eq!(hold.wants(minutes(3)), None);
    }

    #[test]
    fn a_rank_without_memory_is_none_to_wait_for_unless_it_is_on_its_way() {
        let mut rests = rank(None, Some(3));
        (rests.slot_bytes, rests.on_disk) = (0, Some(4));
        assert!(!is_exposed(&rests), "its job ended, and nobody carries it");
        rests.to_bucket.sending = Some(4);
        assert!(is_exposed(&rests));
    }
}
