//! `tierkeep status --cluster`

use std::{collections::BTreeMap, io::Write};

use serde::Serialize;
use tierkeep_proto::control::{ClusterReply, Holding, Member, RunAcross};

use crate::{
    fail::{FAILED, Failure, OK, say},
    show,
};

#[derive(Serialize)]
struct Data<'a> {
    cluster: &'a str,
    node: &'a str,
    replaced: bool,
    refused_packets: u64,
    members: Vec<MemberData<'a>>,
    runs: Vec<RunData<'a>>,
}

#[derive(Serialize)]
struct RunData<'a> {
    run: String,
    newest_step: Option<u64>,
    held: Vec<HeldData<'a>>,
    newest_step_without: BTreeMap<&'a str, Option<u64>>,
    trouble: &'a [String],
}

#[derive(Serialize)]
struct HeldData<'a> {
    rank: u32,
    node: &'a str,
    tier: &'static str,
    step: u64,
}

fn run_data(run: &RunAcross) -> RunData<'_> {
    let held = run.held.iter().map(|held| HeldData {
        rank: held.rank,
        node: &held.node,
        tier: tier(held),
        step: held.step,
    });
    RunData {
        run: name(run),
        newest_step: run.newest,
        held: held.collect(),
        newest_step_without: run.without.iter().map(|w| (w.node.as_str(), w.step)).collect(),
        trouble: &run.trouble,
    }
}

fn tier(held: &Holding) -> &'static str {
    if held.on_disk { "disk" } else { "ram" }
}

fn name(run: &RunAcross) -> String {
    String::from_utf8_lossy(&run.destination).into_owned()
}

/// A run as people want to know of it: where each rank is, and which node must not die now.
fn print_run(run: &RunAcross, out: &mut dyn Write) -> Result<(), Failure> {
    let step =
        |step: Option<u64>| step.map_or_else(|| "nothing".into(), |step| format!("step {step}"));
    writeln!(out, "\n{}: {} can be restored\n", show::safe(&name(run)), step(run.newest))?;
    let mut ranks: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for held in &run.held {
        let place = format!("{} {} ({})", held.step, held.node, tier(held));
        ranks.entry(held.rank).or_default().push(show::safe(&place));
    }
    let mut rows = vec![["RANK", "NEWEST STEP, WHERE"].map(String::from).to_vec()];
    rows.extend(ranks.into_iter().map(|(rank, places)| vec![rank.to_string(), places.join(", ")]));
    show::table(out, "", &rows, &[0])?;
    let worse: Vec<String> = run
        .without
        .iter()
        .filter(|without| without.step < run.newest)
        .map(|without| {
            format!("{} ({} would be left)", show::safe(&without.node), step(without.step))
        })
        .collect();
    match worse.as_slice() {
        [] => writeln!(out, "\nany one node can be lost")?,
        worse => writeln!(out, "\nwould lose steps with: {}", worse.join(", "))?,
    }
    for trouble in &run.trouble {
        say(&format!("warning: not all is known: {trouble}"));
    }
    Ok(())
}

#[derive(Serialize)]
struct MemberData<'a> {
    name: &'a str,
    address: &'a str,
    began_unix_ms: u64,
    labels: BTreeMap<&'a str, &'a str>,
}

fn labels(member: &Member) -> BTreeMap<&str, &str> {
    member.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
}

pub(super) fn print<'a>(
    reply: &'a ClusterReply,
    json: bool,
    out: &mut dyn Write,
) -> Result<i32, Failure> {
    let Some(cluster) = &reply.cluster else {
        let hint = "give it --gossip, --seeds and --cluster-key to find others";
        return Err(Failure::own(FAILED, "this agent is alone: it does not gossip", hint));
    };
    if json {
        let member = |member: &'a Member| MemberData {
            name: &member.name,
            address: &member.address,
            began_unix_ms: member.began_ms,
            labels: labels(member),
        };
        let data = Data {
            cluster,
            node: &reply.node,
            replaced: reply.replaced,
            refused_packets: reply.refused,
            members: reply.members.iter().map(member).collect(),
            runs: reply.runs.iter().map(run_data).collect(),
        };
        show::json(out, &data)?;
        return Ok(OK);
    }
    let (cluster, agents) = (show::safe(cluster), show::count(reply.members.len(), "live agent"));
    writeln!(out, "cluster {cluster}, {agents}, as {} sees it\n", show::safe(&reply.node))?;
    let mut rows = vec![["NODE", "ADDRESS", "LABELS"].map(String::from).to_vec()];
    rows.extend(reply.members.iter().map(|member| {
        let labels: Vec<_> = labels(member).iter().map(|(k, v)| format!("{k}={v}")).collect();
        [&member.name, &member.address, &labels.join(",")].map(|text| show::safe(text)).to_vec()
    }));
    show::table(out, "", &rows, &[])?;
    reply.runs.iter().try_for_each(|run| print_run(run, out))?;
    if reply.replaced {
        say(&format!("warning: another agent, which began later, is called {} too", reply.node));
    }
    if reply.refused > 0 {
        say(&format!("note: {} packets of gossip had not this cluster's key", reply.refused));
    }
    Ok(OK)
}
