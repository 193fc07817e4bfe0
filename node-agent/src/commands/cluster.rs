//! `tierkeep status --cluster`

use std::{collections::BTreeMap, io::Write};

use tierkeep_proto::control::{ClusterReply, RunAcross};

use crate::{
    fail::{FAILED, Failure, OK, say},
    show,
    told::{self, labels, name, tier},
};

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

pub(super) fn print(reply: &ClusterReply, json: bool, out: &mut dyn Write) -> Result<i32, Failure> {
    let (Some(cluster), Some(data)) = (&reply.cluster, told::cluster(reply)) else {
        let hint = "give it --gossip, --seeds and --cluster-key to find others";
        return Err(Failure::own(FAILED, "this agent is alone: it does not gossip", hint));
    };
    if json {
        show::json(out, &data)?;
        return Ok(OK);
    }
    let (cluster, agents) = (show::safe(cluster), show::count(reply.members.len(), "live agent"));
    writeln!(out, "cluster {cluster}, {agents}, as {} sees it\n", show::safe(&reply.node))?;
    let mut rows = vec![["NODE", "ADDRESS", "LABELS", "NOTES"].map(String::from).to_vec()];
    rows.extend(reply.members.iter().map(|member| {
        let labels: Vec<_> = labels(member).iter().map(|(k, v)| format!("{k}={v}")).collect();
        let leaving = member.leaving.as_ref().map(|why| format!("to go away: {why}"));
        let texts =
            [&member.name, &member.address, &labels.join(","), &leaving.unwrap_or_default()];
        texts.map(|text| show::safe(text)).to_vec()
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
