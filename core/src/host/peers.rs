//! What other agents ask of this one, answered.
//!
//! # Invariants
//!
//! - What concerns a user's files is done as that user, on a thread of its own.
//! - A ticket is good for one transfer, and for a while: what nobody goes on with is given back.
//! - Whatever is asked twice, because its answer was lost, has the same effect once.

use std::{collections::HashMap, path::PathBuf, sync::Arc, time::Duration};

use tierkeep_proto::peer::{self as wire, reply::Answer, request::Ask};

use super::{Host, peer::Who, view::Tally};
use crate::{
    attempt,
    begin::roster::ROSTER,
    chunk::{CHUNK_BYTES_MAX, CHUNK_BYTES_MIN},
    clock::Clock,
    error::{Error, Result},
    names::{
        ATTEMPTS, AttemptDir, BAD, CheckpointKey, Id, Rank, parse_payload_name, parse_step_dir,
    },
    observe::{add, locked},
    peers::{
        Incoming, SMALL_BYTES, Site, Ticket,
        hold::{Offered, Owner},
        key_of,
    },
    tier::{Source, Tier, TierKind, disk::DiskTier, find_record, memory::MemoryTier},
    wire::convert,
};

/// A transfer that nobody goes on with for this long is over.
const TICKET_FOR: Duration = Duration::from_secs(60);

/// Transfers at once; a transfer into this node takes a slot besides.
const TICKETS_MAX: usize = 1024;

/// What is told of one tier at once: manifests of a run's newest steps are among it.
const SEEN_BYTES_MAX: usize = 48 << 20;

/// A file that another agent reads.
pub struct Outgoing {
    source: Box<dyn Source>,
    chunk_bytes: u64,
    /// It may wait for a disk.
    waits: bool,
    tally: Arc<Tally>,
}

impl std::fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outgoing").field("bytes", &self.source.len()).finish_non_exhaustive()
    }
}

impl Outgoing {
    /// Where a chunk begins, and how many bytes it has.
    ///
    /// # Errors
    /// There is no such chunk.
    pub fn chunk(&self, index: u64) -> Result<(u64, u64)> {
        let at = index.checked_mul(self.chunk_bytes).filter(|at| *at < self.source.len());
        let at = at.ok_or_else(|| {
            Error::invalid(format!("chunk {index} of a file of {} bytes", self.source.len()))
        })?;
        let length = (self.source.len() - at).min(self.chunk_bytes);
        add(&self.tally.given_bytes, length); // Whoever asks where it is reads it.
        Ok((at, length))
    }

    /// The file, where its bytes lie in memory.
    #[must_use]
    pub fn in_memory(&self) -> Option<&std::fs::File> {
        self.source.file().filter(|_| !self.waits)
    }

    /// Reads.
    ///
    /// # Errors
    /// The file system's, or the file is shorter than it was.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.source.read_at(offset, into)
    }
}

/// A transfer.
#[derive(Clone, Debug)]
pub(super) enum Transfer {
    In { place: (PathBuf, u32), incoming: Arc<Incoming> },
    Out(Arc<Outgoing>),
}

#[derive(Debug, Default)]
pub(super) struct Transfers {
    pub(super) open: HashMap<Ticket, (Transfer, Duration)>,
}

impl Host {
    /// Answers another agent. It blocks: each question has a thread of its own.
    pub fn answer(&self, request: wire::Request) -> wire::Reply {
        let from = request.from.clone();
        let answer = self.answer_peer(request).unwrap_or_else(|e| {
            tracing::debug!("{from:?} is refused: {}", e.chain());
            Answer::Failure(convert::failure(&e))
        });
        wire::Reply { answer: Some(answer) }
    }

    fn answer_peer(&self, request: wire::Request) -> Result<Answer> {
        let site = request.site.ok_or_else(|| Error::invalid("a question about no run"))?;
        let site = Site::of(site)?;
        self.act_as(&site)?;
        match request.ask {
            Some(Ask::Look(look)) => self.look(&site, &look),
            Some(Ask::Offer(offer)) => {
                let offered = self.offer(&site, request.from, offer);
                offered.inspect_err(|_| add(&self.tally.offers_refused, 1))
            }
            Some(Ask::Finish(finish)) => self.finish(&finish.ticket),
            Some(Ask::Open(open)) => self.open_for(&site, &open),
            Some(Ask::Records(records)) => self.keep_records(&site, records),
            Some(Ask::Confirm(confirm)) => self.confirm(&site, &confirm),
            Some(Ask::Release(release)) => self.release(&site, &release),
            Some(Ask::Lead(lead)) => self.is_led(&site, request.from, lead),
            Some(Ask::WhoLeads(_)) => self.who_leads(&site),
            Some(Ask::Join(join)) => self.join(&site, &request.from, &join),
            Some(Ask::Roster(roster)) => self.roster(&site, &roster),
            Some(Ask::Holders(holders)) => self.holders(&site, &holders),
            Some(Ask::Decide(decide)) => self.decide(&site, decide),
            Some(Ask::News(news)) => self.news(&site, &request.from, &news),
            None => Err(Error::invalid("it does not know this question: it is older")),
        }
    }

    /// This thread acts for a run's user from here on.
    pub(super) fn act_as(&self, site: &Site) -> Result<()> {
        let (uid, gid, groups) = (site.uid, site.gid, site.groups.clone());
        self.users.act_as(&Who { uid, gid, groups })
    }

    /// Where a chunk that comes under this ticket lands.
    ///
    /// # Errors
    /// There is no such transfer, or not any more.
    pub fn incoming(&self, ticket: &Ticket) -> Result<Arc<Incoming>> {
        match self.transfer(ticket)? {
            Transfer::In { incoming, .. } => Ok(incoming),
            Transfer::Out(_) => Err(Error::invalid("this ticket is for reading")),
        }
    }

    /// What is read under this ticket.
    ///
    /// # Errors
    /// There is no such transfer, or not any more.
    pub fn outgoing(&self, ticket: &Ticket) -> Result<Arc<Outgoing>> {
        match self.transfer(ticket)? {
            Transfer::Out(outgoing) => Ok(outgoing),
            Transfer::In { .. } => Err(Error::invalid("this ticket is for sending")),
        }
    }

    fn transfer(&self, ticket: &Ticket) -> Result<Transfer> {
        let mut transfers = locked(&self.transfers);
        let open = transfers.open.get_mut(ticket);
        let (transfer, used) =
            open.ok_or_else(|| Error::NotFound { what: "this transfer".into() })?;
        *used = self.clock.monotonic();
        Ok(transfer.clone())
    }

    fn ticket_for(&self, transfer: Transfer) -> Result<Ticket> {
        let ticket = Id::random()?.0;
        let mut transfers = locked(&self.transfers);
        if transfers.open.len() >= TICKETS_MAX {
            return Err(Error::Io {
                what: format!("begin more than {TICKETS_MAX} transfers at once"),
                source: std::io::ErrorKind::QuotaExceeded.into(),
            });
        }
        transfers.open.insert(ticket, (transfer, self.clock.monotonic()));
        Ok(ticket)
    }

    /// Gives back what transfers hold that nobody goes on with.
    pub(super) fn end_transfers(&self) {
        let now = self.clock.monotonic();
        let old: Vec<_> = {
            let open = &mut locked(&self.transfers).open;
            let over = |used: &Duration| now.saturating_sub(*used) > TICKET_FOR;
            let over: Vec<Ticket> =
                open.iter().filter(|(_, (_, used))| over(used)).map(|(t, _)| *t).collect();
            over.iter().filter_map(|ticket| open.remove(ticket)).collect()
        };
        drop(old);
    }

    pub(super) fn ram_dir(&self, site: &Site) -> PathBuf {
        crate::config::ram_dir(&self.users.root_of(site.uid), &site.destination)
    }

    /// Where a run's records lie here.
    pub(super) fn home(&self, site: &Site) -> PathBuf {
        crate::config::home(&self.users.root_of(site.uid), &site.destination)
    }

    fn offer(&self, site: &Site, from: String, offer: wire::Offer) -> Result<Answer> {
        let (key, rank) = (key_of(offer.key.as_ref())?, Rank(offer.rank));
        let keep: Vec<CheckpointKey> =
            offer.keep.iter().map(|key| key_of(Some(key))).collect::<Result<_>>()?;
        // What the rank itself does not offer takes no place of anything.
        let keep = Some(&*keep).filter(|_| offer.owner.is_empty());
        let owner = Owner {
            node: if offer.owner.is_empty() { from } else { offer.owner },
            attempt: offer.attempt,
            replicas: usize::try_from(offer.replicas).unwrap_or(usize::MAX),
        };
        let (place, shelf) = self.shelf(site, rank)?;
        let store = shelf.store().0.to_vec();
        // Asked again: what has come so far stays, unless its file was cut short by somebody.
        let before = locked(&self.transfers).open.iter().find_map(|(ticket, (t, _))| match t {
            Transfer::In { place: p, incoming } if *p == place => Some((*ticket, incoming.clone())),
            _ => None,
        });
        if let Some((ticket, incoming)) = before {
            let goes_on = !incoming.missing().is_empty() && incoming.has_its_length();
            if incoming.bytes == offer.manifest && goes_on {
                return Ok(Answer::Taken(wire::Taken { ticket: ticket.to_vec(), store }));
            }
            locked(&self.transfers).open.remove(&ticket);
            drop(incoming.take());
        }
        let ticket = match shelf.offer(&key, offer.manifest, Some(owner), keep)? {
            Offered::Held => Vec::new(),
            Offered::Wanted(incoming) => {
                self.ticket_for(Transfer::In { place, incoming })?.to_vec()
            }
        };
        Ok(Answer::Taken(wire::Taken { ticket, store }))
    }

    fn finish(&self, ticket: &[u8]) -> Result<Answer> {
        let ticket = ticket.try_into().map_err(|_| Error::invalid("a ticket has 16 bytes"))?;
        let Transfer::In { place, incoming } = self.transfer(&ticket)? else {
            return Err(Error::invalid("this ticket is for reading"));
        };
        let shelf = locked(&self.shelves).get(&place).map(|(_, shelf)| shelf.clone());
        let shelf = shelf.ok_or_else(|| Error::Fenced { why: "the rank is here itself".into() })?;
        let store = shelf.store().0.to_vec();
        let missing: Vec<u64> = incoming.missing().iter().map(|chunk| *chunk as u64).collect();
        if missing.is_empty() {
            // The ticket stays for a while: the answer may be lost, and asked for again.
            add(&self.tally.received_bytes, shelf.publish(&incoming)?);
        }
        Ok(Answer::Finished(wire::Finished { missing, store }))
    }

    fn confirm(&self, site: &Site, confirm: &wire::Confirm) -> Result<Answer> {
        let (key, rank) = (key_of(confirm.key.as_ref())?, Rank(confirm.rank));
        let (_, shelf) = self.shelf(site, rank)?;
        if shelf.store().0 != confirm.store.as_slice() || !shelf.holds(&key) {
            return Err(Error::NotFound { what: format!("{key} of {rank}") });
        }
        Ok(Answer::Done(wire::Done {}))
    }

    fn release(&self, site: &Site, release: &wire::Release) -> Result<Answer> {
        let keep: Vec<CheckpointKey> =
            release.keep.iter().map(|key| key_of(Some(key))).collect::<Result<_>>()?;
        let (place, shelf) = self.shelf(site, Rank(release.rank))?;
        if shelf.release(&keep)? {
            locked(&self.shelves).remove(&place);
        }
        Ok(Answer::Done(wire::Done {}))
    }

    /// A tier of the run as it lies here, for reading; `None`: there is nothing.
    fn tier_of(&self, site: &Site, kind: TierKind) -> Option<Box<dyn Tier>> {
        let root = match kind {
            TierKind::Ram => self.ram_dir(site),
            _ => self.home(site),
        };
        root.is_dir().then(|| match kind {
            TierKind::Ram => Box::new(MemoryTier::reader(&root)) as Box<dyn Tier>,
            _ => Box::new(DiskTier::reader(&root)),
        })
    }

    fn look(&self, site: &Site, look: &wire::Look) -> Result<Answer> {
        let Some(tier) = self.tier_of(site, convert::tier_kind(look.tier)?) else {
            return Ok(Answer::Seen(wire::Seen::default()));
        };
        let left = if look.names_only { 0 } else { SEEN_BYTES_MAX };
        let mut seen = Looking { tier: &*tier, files: Vec::new(), left };
        if !look.files.is_empty() || look.key.is_some() {
            look.files.iter().try_for_each(|file| seen.file(file.clone()))?;
            if let Some(key) = &look.key {
                seen.dir(&key_of(Some(key))?.dir())?;
            }
            let (address, files) = (tier.address(), seen.files);
            return Ok(Answer::Seen(wire::Seen { address, files }));
        }
        for dir in [ATTEMPTS, BAD, ROSTER] {
            seen.dir(dir)?;
        }
        let steps = tier.list("")?.into_iter().filter(|e| parse_step_dir(&e.name).is_some());
        let steps: Vec<_> = steps.collect();
        for step in steps.iter().rev() {
            for attempt in tier.list(&step.name)? {
                if AttemptDir::parse(&attempt.name).is_some() {
                    seen.dir(&format!("{}/{}", step.name, attempt.name))?;
                }
            }
        }
        let (address, files) = (tier.address(), seen.files);
        Ok(Answer::Seen(wire::Seen { address, files }))
    }

    fn open_for(&self, site: &Site, open: &wire::Open) -> Result<Answer> {
        let chunk_bytes = open.chunk_bytes;
        if !(CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&chunk_bytes) {
            return Err(Error::invalid(format!("chunks of {chunk_bytes} bytes")));
        }
        let kind = convert::tier_kind(open.tier)?;
        let absent = || Error::NotFound { what: open.name.clone() };
        let source = self.tier_of(site, kind).ok_or_else(absent)?.open(&open.name)?;
        let length = source.len();
        let outgoing = Outgoing {
            source,
            chunk_bytes,
            waits: kind != TierKind::Ram,
            tally: self.tally.clone(),
        };
        let ticket = self.ticket_for(Transfer::Out(Arc::new(outgoing)))?;
        Ok(Answer::Opened(wire::Opened { ticket: ticket.to_vec(), length }))
    }

    /// The records of a run whose shards are held here: without them nobody could tell its lineage.
    fn keep_records(&self, site: &Site, records: wire::Records) -> Result<Answer> {
        let ram_dir = self.ram_dir(site);
        let budget = self.users.budget(site.uid, &self.settings, &ram_dir)?;
        let ram = MemoryTier::open(&ram_dir, budget)?;
        for bytes in &records.records {
            let record = convert::record_of(bytes)?;
            attempt::keep(&ram, &record, bytes)?;
        }
        for number in &records.joined {
            attempt::join_number(&ram, *number)?;
        }
        Ok(Answer::Done(wire::Done {}))
    }
}

/// One tier as it is told.
struct Looking<'a> {
    tier: &'a dyn Tier,
    files: Vec<wire::File>,
    left: usize,
}

impl Looking<'_> {
    fn dir(&mut self, dir: &str) -> Result<()> {
        let entries = self.tier.list(dir)?.into_iter().filter(|entry| !entry.is_dir);
        entries.map(|entry| format!("{dir}/{}", entry.name)).try_for_each(|name| self.file(name))
    }

    fn file(&mut self, name: String) -> Result<()> {
        let length = match self.tier.open(&name) {
            Ok(source) => source.len(),
            Err(e) if e.is_not_found() => return Ok(()), // Retired at this moment.
            Err(e) => return Err(e),
        };
        let last = name.rsplit('/').next().unwrap_or(&name);
        let small = parse_payload_name(last).is_none()
            && length <= SMALL_BYTES
            && usize::try_from(length).is_ok_and(|length| length <= self.left);
        let bytes = if small { find_record(self.tier, &name)? } else { None };
        if small && bytes.is_none() {
            return Ok(());
        }
        self.left -= bytes.as_ref().map_or(0, Vec::len);
        self.files.push(wire::File { name, length, bytes });
        Ok(())
    }
}
