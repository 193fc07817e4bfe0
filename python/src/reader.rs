//! `Reader`: a run looked at from outside. It takes no lock and writes nothing.

use std::path::PathBuf;

use pyo3::{
    prelude::*,
    types::{PyDict, PyList, PyTuple},
};
use tierkeep::{
    config::nearest_saver,
    names::{Rank, Step},
    reader::{self, StepInfo},
    restore::{decide::Wish, survey::Reach},
    tier::object::address::Options,
};

use crate::{found::Found, wait};

/// The tiers of one run, for reading.
#[pyclass(module = "tierkeep._tierkeep", frozen)]
pub(crate) struct Reader {
    core: reader::Reader,
}

impl Reader {
    pub(crate) fn new(core: reader::Reader) -> Self {
        Self { core }
    }
}

/// By rank.
type Shards = Vec<(u32, Found)>;

#[pymethods]
impl Reader {
    /// The run at `destination`, `<root>/<run>`, and what the ram tier below `ram_dir` has of it. `options`:
    /// of its bucket, where it lies in one.
    #[new]
    #[pyo3(signature = (destination, ram_dir = None, options = None))]
    fn open(
        py: Python<'_>,
        destination: PathBuf,
        ram_dir: Option<PathBuf>,
        options: Option<Options>,
    ) -> PyResult<Self> {
        let options = options.unwrap_or_default();
        let open = move || reader::Reader::open_with(&destination, ram_dir.as_deref(), &options);
        let core = wait::apart(py, open)?;
        Ok(Self { core })
    }

    /// The checkpoint that a resume would take, or the one that is named: (what these ranks get back,
    /// or without `ranks` every rank's shard alone; sentences about newer ones that were passed over).
    #[pyo3(signature = (step = None, attempt = None, ranks = None))]
    fn choose(
        &self,
        py: Python<'_>,
        step: Option<u64>,
        attempt: Option<u32>,
        ranks: Option<Vec<u32>>,
    ) -> PyResult<(Shards, Vec<String>)> {
        let core = self.core.clone();
        wait::apart(py, move || {
            let wish = Wish { step: step.map(Step), attempt, accept_older: false };
            let (key, savers, passed_over) = core.choose(&wish)?;
            let found = |rank: u32| {
                let shard = match &ranks {
                    Some(_) => core.state(&key, Rank(rank)),
                    None => core.shard(&key, Rank(rank)),
                };
                shard.map(|shard| (rank, Found::new(shard)))
            };
            let wanted = ranks.as_ref().unwrap_or(&savers).iter();
            let shards = wanted.map(|rank| found(*rank)).collect::<Result<_, _>>()?;
            Ok((shards, passed_over))
        })
    }

    /// The checkpoint that a resume would take, or the one that is named: what `rank` gets back of it, be it
    /// one of those that saved or not.
    #[pyo3(signature = (rank, step = None, attempt = None))]
    fn choose_for(
        &self,
        py: Python<'_>,
        rank: u32,
        step: Option<u64>,
        attempt: Option<u32>,
    ) -> PyResult<Found> {
        let core = self.core.clone();
        wait::apart(py, move || {
            let wish = Wish { step: step.map(Step), attempt, accept_older: false };
            let (key, savers, _) = core.choose(&wish)?;
            core.state(&key, Rank(nearest_saver(&savers, rank))).map(Found::new)
        })
    }

    /// Every checkpoint that any tier holds a part of, oldest first; a dict each.
    fn steps<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let core = self.core.clone();
        let steps = wait::apart(py, move || core.steps())?;
        let rows: PyResult<Vec<_>> = steps.iter().map(|info| row(py, info)).collect();
        PyList::new(py, rows?)
    }
}

fn row<'py>(py: Python<'py>, info: &StepInfo) -> PyResult<Bound<'py, PyDict>> {
    let row = PyDict::new(py);
    row.set_item("step", info.key.step.0)?;
    row.set_item("attempt", info.key.attempt.number)?;
    row.set_item("complete", matches!(info.reach, Reach::Whole(_)))?;
    row.set_item("sealed", info.sealed)?;
    row.set_item("in_lineage", info.in_lineage)?;
    row.set_item("pinned", info.pinned)?;
    let tiers = info.ranks.iter().filter(|(_, ranks)| !ranks.is_empty());
    let tiers: Vec<String> = tiers.map(|(tier, _)| tier.to_string()).collect();
    row.set_item("tiers", PyTuple::new(py, tiers)?)?;
    Ok(row)
}
