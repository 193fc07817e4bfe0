//! What all ranks of one agent share: the decisions that lie here, and who leads which run.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, Weak},
};

use super::Site;
use crate::{agree::board::Board, attempt::AttemptRecord, observe::locked};

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

/// Shared by all ranks of one agent.
#[derive(Debug, Default)]
pub(crate) struct Commons {
    boards: Mutex<HashMap<PathBuf, Weak<Board>>>,
    leads: Mutex<HashMap<Run, Led>>,
}

impl Commons {
    /// The decisions in `dir`.
    pub(crate) fn board(&self, dir: &Path) -> Arc<Board> {
        let mut boards = locked(&self.boards);
        if let Some(board) = boards.get(dir).and_then(Weak::upgrade) {
            return board;
        }
        boards.retain(|_, board| board.strong_count() > 0);
        let board = Arc::new(Board::new(dir.into()));
        boards.insert(dir.into(), Arc::downgrade(&board));
        board
    }

    pub(crate) fn led(&self, site: &Site) -> Option<Led> {
        locked(&self.leads).get(&run(site)).cloned()
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

fn run(site: &Site) -> Run {
    (crate::config::real(&site.destination), site.uid)
}
