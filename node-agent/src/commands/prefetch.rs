//! `tierkeep agent prefetch`

use std::{io::Write, os::unix::ffi::OsStrExt};

use serde::Serialize;
use tierkeep::Error;
use tierkeep_proto::control::{PrefetchReply, PrefetchRequest, Prefetched, User};

use super::reach::Reached;
use crate::{
    cli::Prefetch,
    fail::{FAILED, Failure, NOT_FOUND, OK, say},
    show,
};

#[derive(Serialize)]
struct Data {
    step: Option<u64>,
    ranks: Vec<RankData>,
    silent: Vec<String>,
}

#[derive(Serialize)]
struct RankData {
    rank: u32,
    here: bool,
    fetched_bytes: u64,
    trouble: Option<String>,
}

/// Has this node's agent fetch what the ranks would resume from, and says what is here.
pub(crate) fn run(args: &Prefetch, json: bool, out: &mut dyn Write) -> Result<i32, Failure> {
    let destination = std::path::absolute(&args.dest);
    let destination =
        destination.map_err(|source| Error::Io { what: "find this directory".into(), source })?;
    let ranks: Vec<u32> = args.ranks.iter().cloned().flatten().collect();
    let request = PrefetchRequest {
        destination: destination.as_os_str().as_bytes().to_vec(),
        ranks,
        user: args.user.map(|(uid, gid)| User { uid, gid }),
        deadline_ms: u64::try_from(args.deadline.as_millis()).unwrap_or(u64::MAX),
    };
    let reply = Reached::new(args.node.agent.as_deref())?.prefetch(request)?;
    for node in &reply.silent {
        say(&format!("note: it may have something newer: {node}"));
    }
    let found = reply.step.is_some();
    let missing = reply.ranks.iter().filter(|rank| rank.trouble.is_some()).count();
    if json {
        show::json(out, &data(reply))?;
    } else if let Some(step) = reply.step {
        for rank in &reply.ranks {
            writeln!(out, "{}", show::safe(&sentence(step, rank)))?;
        }
    }
    if !found {
        let why = format!("no node has a checkpoint of {}", destination.display());
        return Err(Failure::own(NOT_FOUND, why, "it is named as the job names it, on every node"));
    }
    if missing == 0 {
        return Ok(OK);
    }
    let hint = "they are fetched when their trainers ask, if a node has them by then";
    Err(Failure::own(FAILED, format!("{} not here", show::count(missing, "shard")), hint))
}

/// `rank 3: step 1000 is here, 1.0 GiB came`
fn sentence(step: u64, rank: &Prefetched) -> String {
    match (&rank.trouble, rank.bytes) {
        (Some(why), _) => format!("rank {}: {why}", rank.rank),
        (None, 0) => format!("rank {}: step {step} was here", rank.rank),
        (None, bytes) => {
            format!("rank {}: step {step} is here, {} came", rank.rank, show::bytes(bytes))
        }
    }
}

fn data(reply: PrefetchReply) -> Data {
    let rank = |rank: Prefetched| RankData {
        rank: rank.rank,
        here: rank.trouble.is_none(),
        fetched_bytes: rank.bytes,
        trouble: rank.trouble,
    };
    let ranks = reply.ranks.into_iter().map(rank).collect();
    Data { step: reply.step, ranks, silent: reply.silent }
}
