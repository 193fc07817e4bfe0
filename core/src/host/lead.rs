//! What the leader's agent is to the other nodes of its run: the home of the attempt's record, of its
//! claims and of its decisions.
//!
//! # Invariants
//!
//! - Only an agent whose leader's trainer lives lets a rank join: the attempt of a dead start is followed
//!   by nobody.
//! - A decision is recorded under the attempt that it is of, or refused.

use std::{sync::Arc, time::Duration};

use tierkeep_proto::peer::{self as wire, reply::Answer};

use super::{Host, seat::Seat};
use crate::{
    agree::board::Board,
    attempt::{self, AttemptRecord, Attempts},
    error::{Error, Result},
    names::{AttemptDir, Rank},
    peers::{Site, commons::Led, wire_key},
    wire::convert,
};

/// The longest that somebody waits for news in one question.
const NEWS_WAIT_MAX: Duration = Duration::from_secs(8);

/// A decision's name and its text are short; longer is nobody's of ours.
const NAME_BYTES_MAX: usize = 64;
const TEXT_BYTES_MAX: usize = 4000;

impl Host {
    /// Another agent has the leader of a run that may have ranks here.
    pub(super) fn is_led(&self, site: &Site, from: String, lead: wire::Lead) -> Result<Answer> {
        let record = convert::record_of(&lead.record)?;
        record.check_itself()?;
        let bytes = lead.record;
        // First: ranks that wait for it wait for no disk.
        let led = Led { node: from, record: record.clone(), bytes: bytes.clone() };
        self.commons.lead(site, led);
        // Who writes here for an older attempt learns from these files that it is over.
        for seat in self.seats_of(site) {
            for tier in [&seat.keeper.place.ram, &seat.keeper.place.disk] {
                attempt::keep(&**tier, &record, &bytes)?;
            }
            seat.keeper.place.signal.notify();
        }
        Ok(Answer::Done(wire::Done {}))
    }

    pub(super) fn who_leads(&self, site: &Site) -> Result<Answer> {
        let led = self.commons.led(site);
        let led = led.ok_or_else(|| Error::NotFound { what: "a leader of this run".into() })?;
        Ok(Answer::Led(wire::Led { node: led.node, record: led.bytes }))
    }

    /// The ranks of a run that are here.
    fn seats_of(&self, site: &Site) -> Vec<Arc<Seat>> {
        let real = crate::config::real(&site.destination);
        let of_it = self.chairs().into_iter().filter(|((destination, _), _)| *destination == real);
        let chairs = of_it.map(|(_, chair)| chair);
        chairs.filter_map(|chair| chair.seen()).collect()
    }

    /// The leader, where it is here and has begun this attempt.
    fn leader(&self, site: &Site, attempt: &str) -> Result<(Arc<Seat>, AttemptRecord)> {
        let absent = || Error::NotFound { what: format!("the leader of {attempt}") };
        let dir = AttemptDir::parse(attempt).ok_or_else(absent)?;
        let leads = |seat: &Arc<Seat>| seat.keeper.place.config.leads() && seat.who.uid == site.uid;
        let seat = self.seats_of(site).into_iter().find(leads).ok_or_else(absent)?;
        let (record, _) = seat.keeper.running().ok_or_else(absent)?;
        if !dir.is(&record.attempt) {
            if dir.number < record.attempt.number {
                let why = format!("attempt {} of this run has begun", record.attempt.number);
                return Err(Error::Fenced { why });
            }
            return Err(absent());
        }
        Ok((seat, record))
    }

    pub(super) fn join(&self, site: &Site, from: &str, join: &wire::Join) -> Result<Answer> {
        let (seat, record) = self.leader(site, &join.attempt)?;
        if seat.trainer().is_none() || seat.has_lost_trainer(&self.clock) {
            return Err(Error::NotFound { what: format!("a living leader of {}", join.attempt) });
        }
        let place = &seat.keeper.place;
        let rank = Rank(join.rank);
        if join.rank >= place.config.world {
            return Err(Error::invalid(format!("{rank} of {}", place.config.world)));
        }
        attempt::claim(&*place.disk, &record.attempt, rank, &convert::id(&join.nonce)?)?;
        let (holders, fallback) = seat.keeper.joined(join.rank, from);
        let tiers = [&*place.disk, &*place.ram];
        let attempts = Attempts::load(&tiers)?;
        let mut records = Vec::new();
        for record in attempts.records() {
            records.push(attempt::read(&tiers, record.attempt.number)?.1);
        }
        let joined = attempts.joined().to_vec();
        Ok(Answer::Joined(wire::Joined {
            records: Some(wire::Records { records, joined }),
            holders,
            fallback: fallback.as_ref().map(wire_key),
        }))
    }

    pub(super) fn roster(&self, site: &Site, roster: &wire::Roster) -> Result<Answer> {
        let (seat, _) = self.leader(site, &roster.attempt)?;
        let at = |(rank, node)| wire::RankAt { rank, node };
        let ranks = seat.keeper.roster().into_iter().map(at).collect();
        Ok(Answer::Ranks(wire::Ranks { ranks }))
    }

    pub(super) fn holders(&self, site: &Site, holders: &wire::Holders) -> Result<Answer> {
        let (seat, _) = self.leader(site, &holders.attempt)?;
        let place = |(node, kind)| wire::Place { node, tier: convert::tier(kind).into() };
        let places = seat.keeper.places_of(holders.rank).into_iter().map(place).collect();
        Ok(Answer::Places(wire::Places { places }))
    }

    fn board(&self, site: &Site, attempt: &str) -> Result<Arc<Board>> {
        let (seat, record) = self.leader(site, attempt)?;
        let shared = &seat.keeper.place.config.home();
        Ok(self.commons.board(shared, &record.attempt))
    }

    pub(super) fn decide(&self, site: &Site, decide: wire::Decide) -> Result<Answer> {
        let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let long = decide.text.as_ref().is_some_and(|text| {
            text.len() > TEXT_BYTES_MAX || text.is_empty() || text.contains('\0')
        });
        let name = &decide.name;
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(good) || long {
            return Err(Error::invalid(format!("{name:?} is no decision")));
        }
        let board = self.board(site, &decide.attempt)?;
        let text = match (decide.text, decide.remove) {
            (_, true) => {
                board.remove(name)?;
                None
            }
            (Some(text), false) => Some(board.record(name, &text)?),
            (None, false) => board.said(name)?,
        };
        Ok(Answer::Decided(wire::Decided { text }))
    }

    pub(super) fn news(&self, site: &Site, from: &str, news: &wire::News) -> Result<Answer> {
        let (seat, _) = self.leader(site, &news.attempt)?;
        seat.keeper.is_heard_at(from);
        let board = self.board(site, &news.attempt)?;
        let life = convert::id(&news.life).ok();
        let wait = Duration::from_millis(news.wait_ms).min(NEWS_WAIT_MAX);
        let heard = board.hear(life, news.since, &self.clock, wait)?;
        let word = |(name, text)| wire::Word { name, text };
        Ok(Answer::Heard(wire::Heard {
            life: heard.life.0.to_vec(),
            upto: heard.upto,
            whole: heard.whole,
            words: heard.words.into_iter().map(word).collect(),
        }))
    }
}
