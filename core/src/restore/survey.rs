//! What exists: every checkpoint that any tier holds a part of, and whether all of its shards can
//! be reached.
//!
//! It reads names first and manifests only of the steps that are asked about: a run with a thousand
//! steps is listed, not read.
//!
//! # Invariants
//!
//! - A tier that did not answer is an error, never "empty".
//! - Complete means: for every rank of the saver set some tier has a good manifest and a payload of
//!   the right length, and they agree on what several of them hold; a tombstone anywhere means
//!   deleted.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
};

use crate::{
    at_once::{asked_of, try_at_once},
    commit::{Listing, read_manifest, read_seal, same_checkpoint},
    error::{Error, Result},
    manifest::{
        Seal, ShardManifest, manifest_label,
        replicated::{differences, differences_in_words},
    },
    names::{AttemptDir, BAD, CheckpointKey, Id, Rank, Step, parse_step_dir},
    observe::Observer,
    packed, record,
    sys::host,
    tier::{Entry, Tier, TierKind, label},
};

/// One checkpoint as the tiers list it, in the order of the tiers.
#[derive(Clone, Debug)]
pub struct Found {
    /// Which.
    pub key: CheckpointKey,
    /// What each tier holds.
    pub listings: Vec<Listing>,
}

impl Found {
    /// A collector has begun to delete it.
    #[must_use]
    pub fn deleted(&self) -> bool {
        self.listings.iter().any(|l| l.deleted)
    }

    /// Some tier has its seal.
    #[must_use]
    pub fn sealed(&self) -> bool {
        self.listings.iter().any(|l| l.sealed)
    }
}

/// Everything that the tiers list, oldest first.
///
/// # Errors
/// A tier did not answer.
pub fn survey(tiers: &[&dyn Tier]) -> Result<Vec<Found>> {
    let mut all: BTreeMap<CheckpointKey, Vec<Listing>> = BTreeMap::new();
    for (index, tier) in tiers.iter().enumerate() {
        let mut steps = tier.list("")?;
        steps.retain(|step| parse_step_dir(&step.name).is_some());
        let list = |step: &Entry| list_step(*tier, &step.name);
        let listed = try_at_once(asked_of(*tier), &steps, list)?;
        for (key, listing) in listed.into_iter().flatten() {
            let row = all.entry(key).or_insert_with(|| vec![Listing::default(); tiers.len()]);
            row[index] = listing;
        }
    }
    Ok(all.into_iter().map(|(key, listings)| Found { key, listings }).collect())
}

/// What a tier lists of one step, by attempts.
fn list_step(tier: &dyn Tier, name: &str) -> Result<Vec<(CheckpointKey, Listing)>> {
    let Some(step) = parse_step_dir(name) else { return Ok(Vec::new()) };
    let mut all = Vec::new();
    for attempt in unless_a_file(tier.list(name))? {
        let Some(attempt) = AttemptDir::parse(&attempt.name) else { continue };
        let key = CheckpointKey { step, attempt };
        let listing = unless_a_file(Listing::of(tier, &key))?;
        if !listing.is_empty() {
            all.push((key, listing));
        }
    }
    Ok(all)
}

/// What a listing of a bucket did not show of it, since listings may lag, and names tell: its seal, and the
/// shards that the seal names.
///
/// # Errors
/// The bucket did not answer.
pub(crate) fn look_again(
    tier: &dyn Tier,
    key: &CheckpointKey,
    listing: &mut Listing,
) -> Result<()> {
    if tier.kind() != TierKind::Object || listing.deleted {
        return Ok(());
    }
    let Some(seal) = read_good_seal(tier, key)? else { return Ok(()) };
    listing.sealed = true;
    listing.manifests.extend(seal.shards.iter().map(|shard| Rank(shard.rank)));
    listing.manifests.sort_unstable();
    listing.manifests.dedup();
    Ok(())
}

/// The same for all that seem to have none, before something is deleted for want of it.
///
/// # Errors
/// The bucket did not answer.
pub(crate) fn look_for_seals(tier: &dyn Tier, found: &mut [Found]) -> Result<()> {
    for found in found.iter_mut().filter(|found| !found.sealed()) {
        look_again(tier, &found.key, &mut found.listings[0])?;
    }
    Ok(())
}

/// A file with the name of a step or an attempt is nobody's of ours, and hides no other step.
fn unless_a_file<T: Default>(listed: Result<T>) -> Result<T> {
    match listed {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotADirectory => {
            Ok(T::default())
        }
        other => other,
    }
}

/// One good copy of a shard: a manifest that was read and checked, and where.
#[derive(Clone, Debug)]
pub struct ShardCopy {
    /// Index into the tiers.
    pub tier: usize,
    /// The manifest.
    pub manifest: Arc<ShardManifest>,
    /// Its bytes, as they lie.
    pub bytes: Arc<Vec<u8>>,
}

/// What was wrong with a copy.
#[derive(Clone, Debug)]
pub struct BadCopy {
    /// Where.
    pub tier: TierKind,
    /// One sentence.
    pub why: String,
}

/// The good copies of one shard, nearest tier first, and what was wrong with the others.
///
/// # Errors
/// A tier did not answer, or holds a newer format (which is no damage: an upgrade is needed).
pub fn copies(
    tiers: &[&dyn Tier],
    found: &Found,
    rank: Rank,
    run_id: Option<&Id>,
) -> Result<Copies> {
    Close::new(tiers, found, run_id).copies(rank, usize::MAX)
}

/// The same for several ranks, in their order.
pub(crate) fn copies_of(
    tiers: &[&dyn Tier],
    found: &Found,
    ranks: &[Rank],
    run_id: Option<&Id>,
) -> Result<Vec<Copies>> {
    Close::new(tiers, found, run_id).copies_of(ranks, usize::MAX)
}

/// Ranks whose copies are looked at together; what is read of them is kept meanwhile.
const TOGETHER: usize = 64;

/// Fewer than these are looked at one after the other.
const FEW: usize = 8;

/// Checking a manifest takes a core; so many do it at most.
const CHECKING_MAX: usize = 8;

type Copies = (Vec<ShardCopy>, Vec<BadCopy>);

/// One checkpoint, looked at closely: the seal of each tier is read once.
struct Close<'a> {
    tiers: &'a [&'a dyn Tier],
    found: &'a Found,
    run_id: Option<&'a Id>,
    seals: Vec<OnceLock<Option<Seal>>>,
}

impl<'a> Close<'a> {
    fn new(tiers: &'a [&'a dyn Tier], found: &'a Found, run_id: Option<&'a Id>) -> Self {
        let seals = tiers.iter().map(|_| OnceLock::new()).collect();
        Self { tiers, found, run_id, seals }
    }

    /// As many good copies of one shard, and what was wrong with those that were met before.
    fn copies(&self, rank: Rank, enough: usize) -> Result<Copies> {
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for (index, tier) in self.tiers.iter().enumerate() {
            if good.len() >= enough {
                break;
            }
            if !self.found.listings[index].manifests.contains(&rank) {
                continue;
            }
            match self.copy_in(index, rank) {
                // Tiers keep copies of one manifest: another one is not a copy, whatever its checksum.
                Ok((_, bytes)) if good.first().is_some_and(|g: &ShardCopy| *g.bytes != bytes) => {
                    let file = label(*tier, &manifest_label(&self.found.key, rank));
                    let why =
                        format!("{file} is damaged: it differs from the copy in a nearer tier");
                    bad.push(BadCopy { tier: tier.kind(), why });
                }
                Ok((manifest, bytes)) => {
                    let (manifest, bytes) = (Arc::new(manifest), Arc::new(bytes));
                    good.push(ShardCopy { tier: index, manifest, bytes });
                }
                Err(Error::Damaged { file, why }) => {
                    let why = format!("{file} is damaged: {why}");
                    bad.push(BadCopy { tier: tier.kind(), why });
                }
                // Retired between listing and reading.
                Err(e) if e.is_not_found() => {
                    bad.push(BadCopy { tier: tier.kind(), why: e.chain() });
                }
                Err(e) => return Err(e),
            }
        }
        Ok((good, bad))
    }

    /// The same for several ranks.
    fn copies_of(&self, ranks: &[Rank], enough: usize) -> Result<Vec<Copies>> {
        let asked = self.tiers.iter().map(|tier| asked_of(*tier)).max().unwrap_or(1);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let few = asked == 1 && ranks.len() < FEW;
        let most = if few { 1 } else { asked.max(cores.min(CHECKING_MAX)) };
        try_at_once(most, ranks, |rank| self.copies(*rank, enough))
    }

    fn seal(&self, index: usize) -> Result<Option<&Seal>> {
        if !self.found.listings[index].sealed {
            return Ok(None);
        }
        let seal = &self.seals[index];
        if let Some(seal) = seal.get() {
            return Ok(seal.as_ref());
        }
        let read = read_good_seal(self.tiers[index], &self.found.key)?;
        Ok(seal.get_or_init(|| read).as_ref())
    }

    fn copy_in(&self, index: usize, rank: Rank) -> Result<(ShardManifest, Vec<u8>)> {
        let (tier, key) = (self.tiers[index], &self.found.key);
        let (manifest, bytes) = read_manifest(tier, key, rank, self.seal(index)?)?;
        let file = label(tier, &manifest_label(key, rank));
        if self.run_id.is_some_and(|id| *id != manifest.identity.run_id) {
            return Err(Error::damaged(file, format!("it is of run {}", manifest.identity.run_id)));
        }
        let payload = key.file(manifest.payload.stored_file());
        let there = match packed::open(tier, key, &manifest.payload) {
            Ok(source) => source.len(),
            Err(e) if e.is_not_found() => {
                return Err(Error::damaged(label(tier, &payload), "it is missing"));
            }
            Err(e) => return Err(e),
        };
        if there != manifest.payload.length {
            return Err(Error::damaged(
                label(tier, &payload),
                format!("it has {there} bytes, its manifest says {}", manifest.payload.length),
            ));
        }
        Ok((manifest, bytes))
    }
}

/// A damaged seal costs its second check of the manifests, not the checkpoint: they carry their own
/// checksums. `verify` reports it.
fn read_good_seal(tier: &dyn Tier, key: &CheckpointKey) -> Result<Option<Seal>> {
    match read_seal(tier, key) {
        Err(Error::Damaged { file, why }) => {
            tracing::warn!("{file} is damaged: {why}");
            Ok(None)
        }
        other => other,
    }
}

/// Whether a checkpoint can be restored, and from whom.
#[derive(Clone, Debug)]
pub enum Reach {
    /// Every shard has a good copy; the saver set.
    Whole(Vec<u32>),
    /// Not restorable: one sentence each. Empty where it simply is not finished.
    Broken(Vec<String>),
    /// Not every rank has published.
    Unfinished(Vec<u32>),
    /// A collector is at it.
    Deleted,
}

/// One rank's shard, in all tiers.
#[derive(Clone, Debug)]
pub struct ShardLook {
    /// The rank.
    pub rank: Rank,
    /// Tiers with a good manifest and a payload of its length, nearest first.
    pub good: Vec<TierKind>,
    /// What is wrong with the other copies.
    pub bad: Vec<BadCopy>,
    /// Bytes of its payload; 0 where no copy is good.
    pub bytes: u64,
}

/// What all manifests of one checkpoint say together.
#[derive(Clone, Debug)]
pub struct Look {
    /// Whether it can be restored.
    pub reach: Reach,
    /// Every rank with a manifest in some tier, rising.
    pub shards: Vec<ShardLook>,
    /// When the last rank saved, in ms since 1970 by its wall clock; 0 where nothing says so.
    pub saved_unix_ms: u64,
}

/// Looks closely at one checkpoint, and at what of it can be restored.
///
/// # Errors
/// A tier did not answer, or holds a newer format.
pub fn reach(tiers: &[&dyn Tier], found: &Found, run_id: Option<&Id>) -> Result<Reach> {
    reached(tiers, found, run_id).map(|(reach, _)| reach)
}

/// What can be restored, and the run that it is of. Of each shard one good copy is enough: of a thousand
/// the others would be as much again to read, and would change nothing.
pub(crate) fn reached(
    tiers: &[&dyn Tier],
    found: &Found,
    run_id: Option<&Id>,
) -> Result<(Reach, Option<Id>)> {
    looked(tiers, found, run_id, 1).map(|(look, run)| (look.reach, run))
}

/// Looks closely at one checkpoint.
///
/// # Errors
/// A tier did not answer, or holds a newer format.
pub fn look(tiers: &[&dyn Tier], found: &Found, run_id: Option<&Id>) -> Result<Look> {
    looked(tiers, found, run_id, usize::MAX).map(|(look, _)| look)
}

/// How often a checkpoint is listed again that changes while it is looked at.
const LISTED_AGAIN: usize = 3;

/// A rank that closes takes its shard out of RAM once it is on disk: what was listed before that, and read
/// after it, is neither here nor there. So what is not whole is listed again, here on this node, and
/// looked at again if that is something else.
fn looked(
    tiers: &[&dyn Tier],
    found: &Found,
    run_id: Option<&Id>,
    enough: usize,
) -> Result<(Look, Option<Id>)> {
    let mut found = found.clone();
    for turn in 0.. {
        let mut look = Look { reach: Reach::Deleted, shards: Vec::new(), saved_unix_ms: 0 };
        if found.deleted() {
            return Ok((look, None));
        }
        let (reach, run) = reach_of(tiers, &found, run_id, enough, &mut look)?;
        look.reach = reach;
        let before = found.listings.clone();
        if turn < LISTED_AGAIN && !matches!(look.reach, Reach::Whole(_)) {
            for (tier, listing) in tiers.iter().zip(&mut found.listings) {
                if matches!(tier.kind(), TierKind::Ram | TierKind::Disk) {
                    *listing = unless_a_file(Listing::of(*tier, &found.key))?;
                }
            }
        }
        if found.listings == before {
            return Ok((look, run));
        }
    }
    unreachable!("the last turn lists nothing again")
}

fn reach_of(
    tiers: &[&dyn Tier],
    found: &Found,
    run_id: Option<&Id>,
    enough: usize,
    look: &mut Look,
) -> Result<(Reach, Option<Id>)> {
    let mut found = found.clone();
    for (tier, listing) in tiers.iter().zip(&mut found.listings) {
        look_again(*tier, &found.key, listing)?;
    }
    let found = &found;
    let mut ranks: Vec<Rank> = found.listings.iter().flat_map(|l| l.manifests.clone()).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let mut first: Option<Arc<ShardManifest>> = None;
    let mut trouble = Vec::new();
    let mut reached = Vec::new();
    let mut replicas = Vec::new();
    let close = Close::new(tiers, found, run_id);
    for some in ranks.chunks(TOGETHER) {
        for (rank, (good, bad)) in some.iter().zip(close.copies_of(some, enough)?) {
            look.shards.push(ShardLook {
                rank: *rank,
                good: good.iter().map(|c| tiers[c.tier].kind()).collect(),
                bad: bad.clone(),
                bytes: good.first().map_or(0, |c| c.manifest.payload.length),
            });
            let Some(copy) = good.into_iter().next() else {
                trouble.extend(bad.into_iter().map(|b| format!("{rank}, {}: {}", b.tier, b.why)));
                continue;
            };
            look.saved_unix_ms = look.saved_unix_ms.max(copy.manifest.meta.saved_unix_ms);
            let savers =
                first.as_ref().map_or(&copy.manifest.identity.savers, |m| &m.identity.savers);
            match same_checkpoint(&copy.manifest, first.as_deref(), &savers.clone()) {
                Ok(()) => reached.push(rank.0),
                Err(why) => trouble.push(format!("{rank}: {why}")),
            }
            if copy.manifest.replicated.is_some() {
                replicas.push(copy.manifest.clone());
            }
            first.get_or_insert(copy.manifest);
        }
    }
    if !trouble.is_empty() {
        return Ok((Reach::Broken(trouble), None));
    }
    let Some(first) = first else {
        let reach = match found.sealed() {
            true => Reach::Broken(vec!["no rank's shard is left in any tier".into()]),
            false => Reach::Unfinished(Vec::new()),
        };
        return Ok((reach, None));
    };
    let run = Some(first.identity.run_id);
    let savers = first.identity.savers.clone();
    let missing: Vec<u32> =
        savers.iter().copied().filter(|r| reached.binary_search(r).is_err()).collect();
    let reach = match (missing.is_empty(), found.sealed()) {
        (true, _) => match differences(replicas.iter().map(|shard| &**shard)) {
            list if list.is_empty() => Reach::Whole(savers),
            list => Reach::Broken(vec![differences_in_words(&list)]),
        },
        // It was whole once: somebody took shards away.
        (false, true) => Reach::Broken(
            missing
                .iter()
                .map(|r| format!("rank {r}: its shard is missing in every tier"))
                .collect(),
        ),
        (false, false) => Reach::Unfinished(missing),
    };
    Ok((reach, run))
}

/// Checkpoints that a rank found no good copy of, as `bad/` says: (step, attempt number, rank).
///
/// # Errors
/// The tier did not answer.
pub fn bad_marks(tier: &dyn Tier) -> Result<Vec<(Step, u32, Rank)>> {
    let parse = |name: &str| {
        let mut parts = name.strip_suffix(".json")?.split('-');
        let mark = (
            Step(parts.next()?.parse().ok()?),
            parts.next()?.parse().ok()?,
            Rank(parts.next()?.parse().ok()?),
        );
        parts.next().is_none().then_some(mark)
    };
    Ok(tier.list(BAD)?.iter().filter_map(|e| parse(&e.name)).collect())
}

/// The name of such a mark.
#[must_use]
pub fn bad_mark_name(key: &CheckpointKey, rank: Rank) -> String {
    format!("{BAD}/{}-{}-{}.json", key.step.0, key.attempt.number, rank.0)
}

/// Marks a shard as bad: told to the next decision, which then takes another step.
pub(crate) fn mark_bad(tier: &dyn Tier, observer: &Observer, key: &CheckpointKey, rank: Rank) {
    let body = format!("{{\"format\":{},\"host\":{:?}}}", record::FORMAT, host());
    let name = bad_mark_name(key, rank);
    if let Err(e) = tier.create(&name, &record::seal(body.as_bytes())) {
        let text = format!("could not record that this shard of {key} is bad: {}", e.chain());
        observer.error("mark_failed", Some(key.step.0), text);
    }
}
