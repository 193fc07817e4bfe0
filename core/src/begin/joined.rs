//! A rank whose leader is on another node: it finds the leader's agent, claims its place there, and takes
//! the run's records home.

use std::time::Duration;

use tierkeep_proto::peer::{self as wire, reply::Answer, request::Ask};

use super::{Elsewhere, Stands, Started, check_same, fetched::Seen, find_shard};
use crate::{
    attempt,
    error::Result,
    names::{AttemptRef, Rank},
    peers::{
        Peers,
        commons::{Led, ask_who_leads},
        key_of, odd,
    },
    place::Place,
    wire::convert,
};

/// Between two questions who leads, at first and at most: this agent is told, unless it was away at that
/// moment.
const ASK_PAUSE: Duration = Duration::from_millis(250);
const ASK_PAUSE_MAX: Duration = Duration::from_secs(2);

/// Who is asked who leads, and when.
#[derive(Debug, Default)]
pub(super) struct Asking {
    asked: usize,
    next: Duration,
    pause: Duration,
    /// An attempt that could not be joined, and when it is tried again.
    refused: Option<(AttemptRef, Duration)>,
    refused_pause: Duration,
}

/// Between two tries to join an attempt, at first and at most.
const JOIN_PAUSE: Duration = Duration::from_millis(20);
const JOIN_PAUSE_MAX: Duration = Duration::from_secs(1);

impl Asking {
    /// It was tried a moment ago.
    fn is_early(&self, attempt: &AttemptRef, now: Duration) -> bool {
        self.refused.is_some_and(|(refused, next)| refused == *attempt && now < next)
    }

    fn refuse(&mut self, attempt: AttemptRef, now: Duration) {
        let same = self.refused.is_some_and(|(refused, _)| refused == attempt);
        let pause = if same { 2 * self.refused_pause } else { JOIN_PAUSE };
        self.refused_pause = pause.min(JOIN_PAUSE_MAX);
        self.refused = Some((attempt, now + self.refused_pause));
    }
}

/// Joins the attempt that the leader has begun; `None`: nobody leads yet, as far as is known.
pub(super) fn join_elsewhere(
    place: &Place,
    peers: &Peers,
    decision: u32,
    asking: &mut Asking,
) -> Result<Option<Started>> {
    let Some(led) = leader(place, peers, decision, asking) else { return Ok(None) };
    if asking.is_early(&led.record.attempt, place.clock.monotonic()) {
        return Ok(None);
    }
    let joined = join(place, peers, &led);
    if !matches!(joined, Ok(Some(_))) {
        asking.refuse(led.record.attempt, place.clock.monotonic());
    }
    joined
}

fn join(place: &Place, peers: &Peers, led: &Led) -> Result<Option<Started>> {
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
        Some(parent) => {
            Some(find_shard(place, &led.record, &parent.key(), &Seen::Asked(&led.node))?)
        }
    };
    let fallback = joined.fallback.as_ref().map(|key| key_of(Some(key))).transpose()?;
    let holders = [(rank.0, joined.holders)].into();
    let elsewhere = Elsewhere { fallback, holders, ..Elsewhere::default() };
    let stands = Stands::of(place, &led.record)?;
    Ok(Some(Started { record: led.record.clone(), restorable, elsewhere, stands }))
}

/// Who leads this start, as this agent was told; now and then another one is asked, each time the next:
/// all were told, so any of them knows it.
fn leader(place: &Place, peers: &Peers, decision: u32, asking: &mut Asking) -> Option<Led> {
    let ours = |led: &Led| {
        let start = place.config.attempt_id.is_none_or(|start| led.record.attempt.id == start);
        start && led.record.decision >= decision
    };
    if let Some(led) = peers.commons.led(&peers.site).filter(ours) {
        return Some(led);
    }
    let now = place.clock.monotonic();
    if now < asking.next {
        return None;
    }
    let others = peers.others();
    // Not everybody asks the same ones.
    let first = usize::from(u16::from_le_bytes([place.nonce.0[0], place.nonce.0[1]]));
    let node = &others.get((first + asking.asked) % others.len().max(1))?.name;
    let _ = ask_who_leads(peers, node); // The next one may know.
    asking.asked += 1;
    asking.pause = (2 * asking.pause).clamp(ASK_PAUSE, ASK_PAUSE_MAX);
    asking.next = now + asking.pause;
    peers.commons.led(&peers.site).filter(ours)
}
