//! `tierkeep status`

use std::{io::Write, time::Duration};

use tierkeep_proto::control::{Peers, Rank, StatusReply};

use super::{cluster, reach::Reached};
use crate::{
    cli::Status,
    fail::{Failure, OK, say},
    service::control::path,
    show, told,
};

pub(super) fn run(args: &Status, json: bool, out: &mut dyn Write) -> Result<i32, Failure> {
    let mut agent = Reached::new(args.node.agent.as_deref())?;
    if args.cluster {
        return cluster::print(&agent.cluster()?, json, out);
    }
    let status = agent.status()?;
    if json {
        show::json(out, &told::status(agent.socket(), &status))?;
        return Ok(OK);
    }
    writeln!(out, "{}", headline(&status))?;
    if let Some(peers) = &status.peers {
        writeln!(out, "{}", others(peers))?;
    }
    if let Some(why) = &status.leaving {
        writeln!(out, "this node is to go away: {}", show::safe(why))?;
    }
    if status.ranks.is_empty() {
        say("note: no trainer has come yet");
        return Ok(OK);
    }
    writeln!(out)?;
    let bucket = has_bucket(&status);
    let head = ["RUN", "RANK", "TRAINER", "ATTEMPT"].into_iter().chain(tiers(bucket));
    let mut rows = vec![head.chain(["SLOTS", "NOTES"]).map(String::from).collect::<Vec<_>>()];
    rows.extend(status.ranks.iter().map(|rank| {
        let mut row = who(rank).to_vec();
        row.push(or_dash(rank.attempt));
        row.extend(steps(rank, bucket));
        row.extend([show::bytes(rank.slot_bytes), notes(rank).join("; ")]);
        row
    }));
    show::table(out, "", &rows, &numbers(rows[0].len()))?;
    Ok(OK)
}

/// Where no rank goes to a bucket, the tables have no column of it.
pub(super) fn has_bucket(status: &StatusReply) -> bool {
    status.ranks.iter().any(|rank| rank.bucket.is_some())
}

/// The heads of [`steps`].
pub(super) fn tiers(bucket: bool) -> impl Iterator<Item = &'static str> {
    ["IN RAM", "ON DISK", "ON PEERS"].into_iter().chain(bucket.then_some("IN BUCKET"))
}

/// Which columns of a table are numbers: the rank, and what is between the trainer and the notes.
pub(super) fn numbers(columns: usize) -> Vec<usize> {
    std::iter::once(1).chain(3..columns - 1).collect()
}

/// `agent 0.1.0, up 2h 3m, 1.2 GiB of 8.0 GiB of RAM, 2 ranks`
pub(super) fn headline(status: &StatusReply) -> String {
    format!(
        "agent {}, up {}, {} of {} of RAM, {}",
        show::safe(&status.version),
        seconds(status.uptime_ms),
        show::bytes(status.ram_bytes),
        show::bytes(status.ram_limit_bytes),
        show::count(status.ranks.len(), "rank")
    )
}

/// `3 live nodes, 1 lost; 4 shards held for ranks of other nodes, in 1.2 GiB`
pub(super) fn others(peers: &Peers) -> String {
    let count = |n: u64, what: &str| show::count(usize::try_from(n).unwrap_or(usize::MAX), what);
    let lost =
        if peers.nodes_lost > 0 { format!(", {} lost", peers.nodes_lost) } else { "".into() };
    format!(
        "{}{lost}; {} held for ranks of other nodes, in {}",
        count(peers.nodes_alive, "live node"),
        count(peers.held_shards, "shard"),
        show::bytes(peers.held_bytes)
    )
}

/// Run, rank, trainer.
pub(super) fn who(rank: &Rank) -> [String; 3] {
    let trainer = match (rank.pid, rank.gone_ms) {
        (Some(pid), _) => format!("pid {pid}"),
        (None, Some(gone)) => format!("gone {}", seconds(gone)),
        (None, None) => "gone".into(),
    };
    let number = format!("{}/{}", rank.rank, rank.world);
    [path(&rank.destination), number, trainer]
}

/// The newest step in RAM, on disk, on other nodes, and in the bucket where the table has it.
pub(super) fn steps(rank: &Rank, bucket: bool) -> impl Iterator<Item = String> {
    let near = [rank.ram_step, rank.disk_step, rank.peer_step];
    near.into_iter().chain(bucket.then_some(rank.object_step)).map(or_dash)
}

/// What is on its way, and what is wrong.
pub(super) fn notes(rank: &Rank) -> Vec<String> {
    let mut notes = Vec::new();
    match rank.carrying {
        Some(step) => notes.push(format!("step {step} is on its way to disk")),
        None if rank.busy => notes.push("about to go to disk".into()),
        None => {}
    }
    if let Some(trouble) = &rank.trouble {
        notes.push(format!("nothing goes to disk: {trouble}"));
    }
    match (rank.sending, rank.object_next) {
        (Some(step), None) => notes.push(format!("step {step} is on its way to the bucket")),
        (Some(step), Some(next)) => {
            notes.push(format!("step {step} is on its way to the bucket, step {next} is next"));
        }
        (None, Some(next)) => notes.push(format!("step {next} is about to go to the bucket")),
        (None, None) => {}
    }
    if let Some(trouble) = &rank.object_trouble {
        let time = seconds(rank.object_trouble_ms.unwrap_or_default());
        notes.push(format!("the bucket has not answered for {time}: {trouble}"));
    }
    if rank.ram_step.is_some() && rank.copies_there < rank.copies_wanted {
        let (there, wanted) = (rank.copies_there, rank.copies_wanted);
        notes.push(format!("{there} of {wanted} copies on other nodes"));
    }
    let counters = rank.counters.unwrap_or_default();
    let mut count = |n: u64, one: &str, what: &str| {
        if n > 0 {
            let n = usize::try_from(n).unwrap_or(usize::MAX);
            notes.push(format!("{} {what}", show::count(n, one)));
        }
    };
    count(counters.saves_failed, "save", "failed");
    count(counters.saves_skipped, "save", "passed over");
    count(counters.peer_failed, "step", "without all copies on other nodes");
    count(counters.object_passed_over, "step", "passed over for the bucket");
    count(counters.object_failed, "step", "given up for the bucket");
    count(counters.checksum_failures, "chunk", "damaged");
    count(counters.repairs, "copy", "repaired");
    notes
}

fn or_dash<T: ToString>(number: Option<T>) -> String {
    number.map_or_else(|| "-".into(), |n| n.to_string())
}

/// Whole seconds: `2h 3m 4s`
fn seconds(ms: u64) -> String {
    humantime::format_duration(Duration::from_secs(ms / 1000)).to_string()
}
