//! The page for Prometheus (OpenMetrics text). Units are in the names; every sum begins at 0 when the
//! agent takes the rank, as a counter may.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet, text},
    metrics::{MetricType, gauge::ConstGauge},
    registry::{Registry, Unit},
};
use tierkeep::{Error, Result, host::RankView};

/// What the page is.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The page: bytes in RAM and the limit, where they are known, and the ranks.
pub(super) fn page(memory: Option<(u64, u64)>, ranks: &[RankView]) -> Result<String> {
    let mut registry = Registry::with_prefix("tierkeep");
    registry.register_collector(Box::new(Seen { memory, ranks: ranks.to_vec() }));
    let mut page = String::new();
    let written = text::encode(&mut page, &registry);
    written.map(|()| page).map_err(|e| Error::Bug(format!("the page of metrics: {e}")))
}

#[derive(Debug)]
struct Seen {
    memory: Option<(u64, u64)>,
    ranks: Vec<RankView>,
}

/// A number of a rank: its name without unit, what it is, the number; `None` where there is none yet.
type Number<N> = (&'static str, &'static str, Option<Unit>, fn(&RankView) -> N);

const GAUGES: [Number<u64>; 5] = [
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
    ("slot", "Memory of the rank's slots", Some(Unit::Bytes), |r| r.slot_bytes),
];

const COUNTERS: [Number<u64>; 9] = [
    ("saves", "Saves that were published in RAM", None, |r| r.saves),
    ("saves_failed", "Saves that failed at the agent", None, |r| r.saves_failed),
    ("saves_skipped", "Saves passed over because every slot was in use", None, |r| r.saves_skipped),
    ("captured", "Bytes copied into slots", Some(Unit::Bytes), |r| r.captured_bytes),
    ("disk", "Bytes carried to disk", Some(Unit::Bytes), |r| r.disk_bytes),
    ("disk_sealed", "Checkpoints seen sealed on disk", None, |r| r.disk_sealed),
    ("disk_passed_over", "Steps in RAM that were passed over for disk", None, |r| {
        r.disk_passed_over
    }),
    ("checksum_failures", "Chunks that did not match their checksum", None, |r| {
        r.checksum_failures
    }),
    ("repairs", "Copies written anew from a good one", None, |r| r.repairs),
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
        self.steps(&mut to)?;
        for (name, help, unit, of) in &GAUGES {
            let head = to.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
            self.each(head, |to, rank| to.encode_gauge(&of(rank)))?;
        }
        for (name, help, unit, of) in &COUNTERS {
            let head = to.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
            self.each(head, |to, rank| sum(to, of(rank)))?;
        }
        let (unit, help) = (Unit::Seconds, "Time spent carrying to disk");
        let head = to.encode_descriptor("disk", help, Some(&unit), MetricType::Counter)?;
        #[allow(clippy::cast_precision_loss)] // Below 2^53 ns, 104 days of carrying, exact.
        self.each(head, |to, rank| sum(to, rank.disk_ns as f64 / 1e9))
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
            for (tier, step) in [("ram", rank.in_ram), ("disk", rank.on_disk)] {
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
