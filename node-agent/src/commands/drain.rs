//! `tierkeep agent drain`

use std::{io::Write, path::Path, time::Duration};

use serde::Serialize;
use tierkeep_proto::control::Drained;

use super::reach::Reached;
use crate::{
    fail::{FAILED, Failure, OK, say},
    service::control::path,
    show,
};

#[derive(Serialize)]
struct Data {
    durable: bool,
    ranks: Vec<RankData>,
}

#[derive(Serialize)]
struct RankData {
    destination: String,
    rank: u32,
    ram_step: Option<u64>,
    disk_step: Option<u64>,
    durable: bool,
    trouble: Option<String>,
}

/// Has the agent that `socket` names (its trainers' socket; else the one that a job would find) carry
/// everything that is only in RAM to disk, and says what made it.
pub(crate) fn run(
    socket: Option<&Path>,
    deadline: Duration,
    json: bool,
    out: &mut dyn Write,
) -> Result<i32, Failure> {
    let ranks = Reached::new(socket)?.drain(deadline)?.ranks;
    let exposed = ranks.iter().filter(|rank| !rank.durable).count();
    if json {
        let ranks = ranks.into_iter().map(rank_data).collect();
        show::json(out, &Data { durable: exposed == 0, ranks })?;
    } else {
        if ranks.is_empty() {
            say("note: the agent owns no rank: there is nothing to carry");
        }
        for rank in &ranks {
            writeln!(out, "{}", show::safe(&sentence(rank)))?;
        }
    }
    if exposed == 0 {
        return Ok(OK);
    }
    Err(Failure::own(
        FAILED,
        format!("{} would lose steps with this host's memory", show::count(exposed, "rank")),
        "drain again with a longer --deadline; `tierkeep status` says what is wrong",
    ))
}

/// `rank 3 of /ckpt/run: step 1000 is on disk`
fn sentence(rank: &Drained) -> String {
    let end = match (rank.durable, rank.ram_step.max(rank.disk_step)) {
        (true, None) => "nothing was saved".into(),
        (true, Some(step)) => format!("step {step} is on disk"),
        (false, _) => only_in_ram(rank),
    };
    let why = rank.trouble.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
    format!("rank {} of {}: {end}{why}", rank.rank, path(&rank.destination))
}

fn only_in_ram(rank: &Drained) -> String {
    match (rank.ram_step, rank.disk_step) {
        (Some(step), Some(older)) => {
            format!("step {step} is only in RAM, step {older} is on disk")
        }
        (Some(step), None) => format!("step {step} is only in RAM, nothing is on disk"),
        (None, _) => "something is still on its way to disk".into(),
    }
}

fn rank_data(rank: Drained) -> RankData {
    RankData {
        destination: path(&rank.destination),
        rank: rank.rank,
        ram_step: rank.ram_step,
        disk_step: rank.disk_step,
        durable: rank.durable,
        trouble: rank.trouble,
    }
}
