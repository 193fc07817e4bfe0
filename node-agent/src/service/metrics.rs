//! The page for Prometheus (OpenMetrics text). Units are in the names; every sum begins at 0 when the
//! agent takes the rank, as a counter may.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet, text},
    metrics::{MetricType, gauge::ConstGauge},
    registry::{Registry, Unit},
};
use tierkeep::{
    Error, Result,
    host::{PeersView, RankView},
};

/// What the page is.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The page: bytes in RAM and the limit, where they are known, the ranks, what the agent is to others, and
/// whether its node is to go away.
pub(super) fn page(
    memory: Option<(u64, u64)>,
    ranks: Vec<RankView>,
    peers: Option<PeersView>,
    leaving: bool,
) -> Result<String> {
    let mut registry = Registry::with_prefix("tierkeep");
    registry.register_collector(Box::new(Seen { memory, ranks, peers, leaving }));
    let mut page = String::new();
    let written = text::encode(&mut page, &registry);
    written.map(|()| page).map_err(|e| Error::Bug(format!("the page of metrics: {e}")))
}

#[derive(Debug)]
struct Seen {
    memory: Option<(u64, u64)>,
    ranks: Vec<RankView>,
    peers: Option<PeersView>,
    leaving: bool,
}

/// A number of something: its name without unit, what it is, its unit, the number.
type Number<T> = (&'static str, &'static str, Option<Unit>, fn(&T) -> u64);

const GAUGES: [Number<RankView>; 9] = [
    ("trainer_up", "Whether the rank's trainer lives", None, |r| r.pid.is_some().into()),
    ("attempt", "The rank's attempt, 0 before it has begun", None, |r| {
        r.attempt.unwrap_or(0).into()
    }),
    ("disk_busy", "Whether something is on its way to disk, or about to be", None, |r| {
        r.busy.into()
    }),
    ("disk_trouble", "Whether something keeps steps from the disk", None, |r| {
        r.trouble.is_some().into()
    }),
    ("object_busy", "Whether something is on its way to the bucket, or about to be", None, |r| {
        (r.to_bucket.sending.is_some() || r.to_bucket.next.is_some()).into()
    }),
    ("object_trouble", "Whether the bucket does not take what is sent", None, |r| {
        r.to_bucket.trouble.is_some().into()
    }),
    ("copies_wanted", "Copies of the rank's shard that are to be on other nodes", None, |r| {
        r.copies_wanted
    }),
    ("copies_there", "Live nodes that hold the shard that was sent last", None, |r| r.copies_there),
    ("slot", "Memory of the rank's slots", Some(Unit::Bytes), |r| r.slot_bytes),
];

const COUNTERS: [Number<RankView>; 19] = [
    ("saves", "Saves that were published in RAM", None, |r| r.saves),
    ("saves_failed", "Saves that failed at the agent", None, |r| r.saves_failed),
    ("saves_skipped", "Saves passed over because every slot was in use", None, |r| r.saves_skipped),
    ("captured", "Bytes copied into slots", Some(Unit::Bytes), |r| r.captured_bytes),
    ("disk", "Bytes carried to disk", Some(Unit::Bytes), |r| r.disk_bytes),
    ("disk_sealed", "Checkpoints seen sealed on disk", None, |r| r.disk_sealed),
    ("disk_passed_over", "Steps in RAM that were passed over for disk", None, |r| {
        r.disk_passed_over
    }),
    ("peer", "Bytes sent to other nodes, all copies together", Some(Unit::Bytes), |r| r.peer_bytes),
    ("peer_fetched", "Bytes that came back from other nodes", Some(Unit::Bytes), |r| {
        r.peer_fetched_bytes
    }),
    ("peer_whole", "Checkpoints seen held on other nodes", None, |r| r.peer_whole),
    ("peer_failed", "Steps that did not get all their copies on other nodes", None, |r| {
        r.peer_failed
    }),
    ("peer_refused", "Copies that another node refused or did not take", None, |r| r.peer_refused),
    ("object", "Bytes sent to the bucket", Some(Unit::Bytes), |r| r.object_bytes),
    ("object_fetched", "Bytes that came back from the bucket", Some(Unit::Bytes), |r| {
        r.object_fetched_bytes
    }),
    ("object_sealed", "Checkpoints seen sealed in the bucket", None, |r| r.object_sealed),
    ("object_passed_over", "Steps due for the bucket that were passed over", None, |r| {
        r.object_passed_over
    }),
    ("object_failed", "Steps that were given up for the bucket", None, |r| r.object_failed),
    ("checksum_failures", "Chunks that did not match their checksum", None, |r| {
        r.checksum_failures
    }),
    ("repairs", "Copies written anew from a good one", None, |r| r.repairs),
];

const SECONDS: [Number<RankView>; 4] = [
    (
        "captured",
        "From saves' wishes for a slot until their copies were complete",
        Some(Unit::Seconds),
        |r| r.captured_ns,
    ),
    ("disk", "Time spent carrying to disk", Some(Unit::Seconds), |r| r.disk_ns),
    ("peer", "Time spent sending to other nodes", Some(Unit::Seconds), |r| r.peer_ns),
    ("object", "Time spent sending to the bucket", Some(Unit::Seconds), |r| r.object_ns),
];

const PEER_GAUGES: [Number<PeersView>; 4] = [
    ("nodes_alive", "Agents seen alive, this one among them", None, |p| p.nodes_alive),
    ("nodes_lost", "Agents that were alive and are not any more", None, |p| p.nodes_lost),
    ("held_shards", "Shards held for ranks of other nodes", None, |p| p.held_shards),
    ("held", "Memory of the slots for ranks of other nodes", Some(Unit::Bytes), |p| p.held_bytes),
];

const PEER_COUNTERS: [Number<PeersView>; 4] = [
    ("held_received", "Bytes of shards that came to be held", Some(Unit::Bytes), |p| {
        p.received_bytes
    }),
    ("given", "Bytes that other nodes read here", Some(Unit::Bytes), |p| p.given_bytes),
    ("healed", "Bytes sent for ranks whose node is lost", Some(Unit::Bytes), |p| p.healed_bytes),
    ("offers_refused", "Shards not taken when other nodes offered them", None, |p| {
        p.offers_refused
    }),
];

impl Collector for Seen {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        let build = to.encode_descriptor("build", "The agent", None, MetricType::Info);
        build?.encode_info(&[("version", env!("CARGO_PKG_VERSION"))])?;
        if let Some((used, limit)) = self.memory {
            let bytes = Some(Unit::Bytes);
            number(&mut to, "ram", "All files of the ram tier", bytes.as_ref(), used)?;
            number(&mut to, "ram_limit", "Limit of these files", bytes.as_ref(), limit)?;
        }
        let ranks = u64::try_from(self.ranks.len()).unwrap_or(u64::MAX);
        number(&mut to, "ranks", "Ranks that the agent owns", None, ranks)?;
        let leaving = "Whether the node is to go away, by its cluster's word";
        number(&mut to, "node_leaving", leaving, None, self.leaving.into())?;
        self.steps(&mut to)?;
        for (name, help, unit, of) in &GAUGES {
            let head = to.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
            self.each(head, |to, rank| to.encode_gauge(&of(rank)))?;
        }
        for (name, help, unit, of) in &COUNTERS {
            let head = to.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
            self.each(head, |to, rank| sum(to, of(rank)))?;
        }
        for (name, help, unit, of) in &SECONDS {
            let head = to.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
            #[allow(clippy::cast_precision_loss)] // Below 2^53 ns, 104 days of carrying, exact.
            self.each(head, |to, rank| sum(to, of(rank) as f64 / 1e9))?;
        }
        let Some(peers) = &self.peers else { return Ok(()) };
        for (name, help, unit, of) in &PEER_GAUGES {
            number(&mut to, name, help, unit.as_ref(), of(peers))?;
        }
        for (name, help, unit, of) in &PEER_COUNTERS {
            let mut head = to.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
            sum(&mut head, of(peers))?;
        }
        Ok(())
    }
}

impl Seen {
    /// The newest step a tier; none where there is none yet.
    fn steps(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut to = to.encode_descriptor(
            "step",
            "The newest step that is complete in a tier",
            None,
            MetricType::Gauge,
        )?;
        for rank in &self.ranks {
            let (run, number) = labels(rank);
            let steps = [
                ("ram", rank.in_ram),
                ("disk", rank.on_disk),
                ("peer", rank.on_peers),
                ("object", rank.to_bucket.sealed),
            ];
            for (tier, step) in steps {
                let labels = [("tier", tier), ("run", run.as_str()), ("rank", number.as_str())];
                if let Some(step) = step {
                    to.encode_family(&labels)?.encode_gauge(&step)?;
                }
            }
        }
        Ok(())
    }

    /// One line a rank.
    fn each(
        &self,
        mut to: MetricEncoder<'_>,
        number: impl Fn(&mut MetricEncoder<'_>, &RankView) -> fmt::Result,
    ) -> fmt::Result {
        for rank in &self.ranks {
            let (run, of) = labels(rank);
            let labels = [("run", run.as_str()), ("rank", of.as_str())];
            number(&mut to.encode_family(&labels)?, rank)?;
        }
        Ok(())
    }
}

fn labels(rank: &RankView) -> (String, String) {
    (rank.destination.display().to_string(), rank.rank.to_string())
}

fn sum(
    to: &mut MetricEncoder<'_>,
    sum: impl prometheus_client::encoding::EncodeCounterValue,
) -> fmt::Result {
    to.encode_counter::<NoLabelSet, _, u64>(&sum, None)
}

/// A number of the agent.
fn number(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    number: u64,
) -> fmt::Result {
    let gauge = ConstGauge::new(number);
    gauge.encode(to.encode_descriptor(name, help, unit, MetricType::Gauge)?)
}
