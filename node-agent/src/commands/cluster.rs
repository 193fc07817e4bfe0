//! `tierkeep status --cluster`

use std::{collections::BTreeMap, io::Write};

use serde::Serialize;
use tierkeep_proto::control::{ClusterReply, Member};

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
    if reply.replaced {
        say(&format!("warning: another agent, which began later, is called {} too", reply.node));
    }
    if reply.refused > 0 {
        say(&format!("note: {} packets of gossip had not this cluster's key", reply.refused));
    }
    Ok(OK)
}
