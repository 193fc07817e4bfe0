//! A rank whose leader is on another node: it finds the leader's agent, claims its place there, and takes
//! the run's records home.

use tierkeep_proto::peer::{self as wire, reply::Answer, request::Ask};

use super::{Elsewhere, Started, check_same, find_shard};
use crate::{
    attempt,
    error::Result,
    names::Rank,
    peers::{Peers, commons::Led, key_of, odd},
    place::Place,
    wire::convert,
};

/// Agents that are asked who leads, where this one was not told: all were, so a few know it.
const ASKED: usize = 3;

/// Joins the attempt that the leader has begun; `None`: nobody leads yet, as far as is known.
pub(super) fn join_elsewhere(
    place: &Place,
    peers: &Peers,
    decision: u32,
) -> Result<Option<Started>> {
    let Some(led) = leader(place, peers, decision) else { return Ok(None) };
    check_same(place, &led.record)?;
    let rank = Rank(place.config.rank);
    let join = wire::Join {
        attempt: led.record.attempt.dir(),
        rank: rank.0,
        nonce: place.nonce.0.to_vec(),
    };
    let joined = match peers.ask(&led.node, Ask::Join(join)) {
        Ok(Answer::Joined(joined)) => joined,
        Ok(_) => return Err(odd(&led.node)),
        // Its node is gone, or its agent is; the next leader says so.
        Err(e) if e.kind() == crate::ErrorKind::Unavailable => {
            tracing::debug!("{} does not answer: {}", led.node, e.chain());
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    let records = joined.records.unwrap_or_default();
    let own = [&place.disk, &place.ram];
    for bytes in &records.records {
        let record = convert::record_of(bytes)?;
        own.iter().try_for_each(|tier| attempt::keep(&***tier, &record, bytes))?;
    }
    records.joined.iter().try_for_each(|number| attempt::join_number(&*place.disk, *number))?;
    // The next agent of this node finds by it whose attempt goes on.
    attempt::claim(&*place.disk, &led.record.attempt, rank, &place.nonce)?;
    let restorable = match led.record.parent {
        None => None,
        Some(parent) => Some(find_shard(place, &led.record, &parent.key())?),
    };
    let fallback = joined.fallback.as_ref().map(|key| key_of(Some(key))).transpose()?;
    let holders = [(rank.0, joined.holders)].into();
    let elsewhere = Elsewhere { fallback, holders };
    Ok(Some(Started { record: led.record, restorable, elsewhere }))
}

/// Who leads this start, as this agent or a few others were told.
fn leader(place: &Place, peers: &Peers, decision: u32) -> Option<Led> {
    let ours = |led: &Led| {
        let start = place.config.attempt_id.is_none_or(|start| led.record.attempt.id == start);
        start && led.record.decision >= decision
    };
    if let Some(led) = peers.commons.led(&peers.site).filter(ours) {
        return Some(led);
    }
    let others = peers.others();
    let first = place.nonce.0[0] as usize; // Not everybody asks the same ones.
    for at in 0..others.len().min(ASKED) {
        let node = &others[(first + at) % others.len()].name;
        if let Ok(Answer::Led(said)) = peers.ask(node, Ask::WhoLeads(wire::WhoLeads {}))
            && let Ok(record) = convert::record_of(&said.record)
        {
            peers.commons.lead(&peers.site, Led { node: said.node, record, bytes: said.record });
        }
    }
    peers.commons.led(&peers.site).filter(ours)
}
