//! A trainer whose tensors are cut elsewhere than they were asks for other ranks' shards.

use tierkeep_proto::trainer::{self as wire, reply::Answer};

use super::{calls::Answered, seat::Seat};
use crate::{
    attempt::AttemptRecord,
    begin::brought::{Whereabouts, find_others, open},
    error::{Doing, Error, Result},
    names::{CheckpointKey, Rank, parse_payload_name},
    tier::TierKind,
    wire::convert,
};

/// The manifests of these ranks' shards, and whether they are here.
pub(super) fn shards(seat: &Seat, record: &AttemptRecord, ranks: &[u32]) -> Answered {
    let key = parent(record)?;
    let ranks: Vec<Rank> = ranks.iter().map(|rank| Rank(*rank)).collect();
    let found = find_others(&seat.keeper.place, record, &key, &ranks)?;
    let shard = |(rank, whereabouts): (&Rank, &Whereabouts)| match whereabouts {
        Whereabouts::Here(found) => convert::shard(found),
        Whereabouts::Elsewhere(manifest) => wire::Shard {
            step: key.step.0,
            attempt: key.attempt.to_string(),
            rank: rank.0,
            copies: vec![wire::Copy {
                tier: convert::tier(TierKind::Peer).into(),
                manifest: manifest.clone(),
            }],
            ..wire::Shard::default()
        },
    };
    let shards = ranks.iter().zip(&found).map(shard).collect();
    Ok((Answer::Shards(wire::ShardList { shards }), Vec::new()))
}

/// The payload of another rank's shard, brought here if need be.
pub(super) fn read(seat: &Seat, record: &AttemptRecord, name: &str) -> Answered {
    let key = parent(record)?;
    let file = name.strip_prefix(&format!("{}/", key.dir()));
    let rank = file.and_then(parse_payload_name);
    let rank = rank.ok_or_else(|| Error::invalid(format!("{name} is no shard of {key}")))?;
    let source = open(&seat.keeper.place, record, &key, rank)?;
    let opened = source.file().ok_or_else(|| Error::Bug("a file without one".into()))?;
    let fd = opened.try_clone().doing(|| format!("hand out {name}"))?;
    Ok((Answer::Found(wire::Found { len: source.len() }), vec![fd.into()]))
}

/// What the attempt resumes from.
fn parent(record: &AttemptRecord) -> Result<CheckpointKey> {
    let parent = record.parent.ok_or_else(|| Error::invalid("nothing was restored"))?;
    Ok(parent.key())
}
