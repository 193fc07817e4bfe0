//! What all ranks of one agent share: the decisions that lie here, and who leads which run.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, Weak},
};

use tierkeep_proto::peer::{self as wire, reply::Answer, request::Ask};

use super::{Peers, Site, odd};
use crate::{
    agree::{board::Board, home::Line},
    attempt::AttemptRecord,
    config::real,
    error::Result,
    names::AttemptRef,
    observe::locked,
    placement::{Node, Placement, Shard, place},
    wire::convert,
};

/// Who leads a run, as it was told last.
#[derive(Clone, Debug)]
pub(crate) struct Led {
    pub(crate) node: String,
    pub(crate) record: AttemptRecord,
    /// The record as it is stored.
    pub(crate) bytes: Vec<u8>,
}

/// A run's directory here, and whose it is.
type Run = (PathBuf, u32);

/// A run, the node that has its decisions, and the attempt.
type Far = (Run, String, String);

/// Shared by all ranks of one agent.
#[derive(Debug, Default)]
pub(crate) struct Commons {
    boards: Mutex<HashMap<PathBuf, Weak<Board>>>,
    lines: Mutex<HashMap<Far, Weak<Line>>>,
    leads: Mutex<HashMap<Run, Led>>,
    placed: Mutex<HashMap<Run, Placed>>,
}

/// A placement, and of what it is one.
#[derive(Debug)]
struct Placed {
    nodes: Vec<Node>,
    shards: Vec<Shard>,
    copies: usize,
    placement: Arc<Placement>,
}

/// Runs whose placement is kept.
const PLACED_MAX: usize = 16;

impl Commons {
    /// The decisions of `attempt` that lie here, below `shared`: this agent alone writes to them.
    pub(crate) fn board(&self, shared: &Path, attempt: &AttemptRef) -> Arc<Board> {
        let dir = Board::dir(&real(shared), attempt);
        let mut boards = locked(&self.boards);
        if let Some(board) = boards.get(&dir).and_then(Weak::upgrade) {
            return board;
        }
        boards.retain(|_, board| board.strong_count() > 0);
        let board = Arc::new(Board::sole(dir.clone()));
        boards.insert(dir, Arc::downgrade(&board));
        board
    }

    /// The line to the decisions of `attempt` at `node`, which `begin` makes where there is none.
    pub(crate) fn line(
        &self,
        site: &Site,
        node: String,
        attempt: String,
        begin: impl FnOnce(String, String) -> Line,
    ) -> Arc<Line> {
        let far = (run(site), node.clone(), attempt.clone());
        let mut lines = locked(&self.lines);
        if let Some(line) = lines.get(&far).and_then(Weak::upgrade) {
            return line;
        }
        lines.retain(|_, line| line.strong_count() > 0);
        let line = Arc::new(begin(node, attempt));
        lines.insert(far, Arc::downgrade(&line));
        line
    }

    /// The placement of a run's shards, computed where it is not the last one's: of a thousand ranks that
    /// takes a sixth of a second, and each rank asks at each checkpoint.
    pub(crate) fn placed(
        &self,
        site: &Site,
        nodes: &[Node],
        shards: Vec<Shard>,
        copies: usize,
    ) -> Arc<Placement> {
        let run = run(site);
        let mut all = locked(&self.placed);
        let same = |p: &&Placed| p.nodes == nodes && p.shards == shards && p.copies == copies;
        if let Some(placed) = all.get(&run).filter(same) {
            return placed.placement.clone();
        }
        if all.len() >= PLACED_MAX {
            all.clear();
        }
        let placement = Arc::new(place(nodes, &shards, copies));
        let nodes = nodes.to_vec();
        all.insert(run, Placed { nodes, shards, copies, placement: placement.clone() });
        placement
    }

    pub(crate) fn led(&self, site: &Site) -> Option<Led> {
        let (real, uid) = run(site);
        self.led_at(&real, uid)
    }

    /// The same by the run's real directory: no disk is asked for it.
    pub(crate) fn led_at(&self, real: &Path, uid: u32) -> Option<Led> {
        locked(&self.leads).get(&(real.into(), uid)).cloned()
    }

    /// Somebody leads. What was told of a newer attempt stays.
    pub(crate) fn lead(&self, site: &Site, led: Led) {
        let mut leads = locked(&self.leads);
        let known = leads.get(&run(site)).map_or(0, |led| led.record.attempt.number);
        if led.record.attempt.number >= known {
            leads.insert(run(site), led);
        }
    }
}

/// Asks another agent who leads; what it says is known from here on.
///
/// # Errors
/// It does not answer, or does not know.
pub(crate) fn ask_who_leads(peers: &Peers, node: &str) -> Result<()> {
    let Answer::Led(said) = peers.ask(node, Ask::WhoLeads(wire::WhoLeads {}))? else {
        return Err(odd(node));
    };
    let record = convert::record_of(&said.record)?;
    peers.commons.lead(&peers.site, Led { node: said.node, record, bytes: said.record });
    Ok(())
}

fn run(site: &Site) -> Run {
    (real(&site.destination), site.uid)
}
