//! Decisions that all ranks obey and no rank waits for: the first that must decide records, the
//! others read.
//!
//! A decision is a symbolic link: it appears whole or not at all, the first one wins, and making or
//! reading one costs microseconds. Links point nowhere; their target is the decision's text. They
//! matter while an attempt runs and are removed as it goes on.
//!
//! # Invariants
//!
//! - Two ranks that ask the same question get the same answer.
//! - A lone rank asks nobody.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use crate::{
    error::{Doing, Error, Result},
    names::AttemptRef,
    tier::publish::{make_dirs, remove},
};

/// The name of the decision where the job stops.
const STOP: &str = "stop";
/// What is said of a step that may go to disk.
const CARRY: &str = "carry";
const PASS: &str = "pass";
/// What is said of a step that was complete in RAM.
const WHOLE: &str = "whole";

/// The decisions of one attempt.
#[derive(Debug)]
pub struct Agreements {
    dir: Option<PathBuf>,
}

/// Whether a due step is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Saving {
    /// It is.
    Save,
    /// Every rank passes it over: one had no free slot.
    Skip,
}

/// What became of a step in RAM, or on other nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InRam {
    /// Every rank's shard was there, and they agree.
    Whole,
    /// It will not be complete; why.
    GivenUp(String),
}

impl InRam {
    fn word(&self) -> String {
        match self {
            Self::Whole => WHOLE.into(),
            Self::GivenUp(why) => sentence(why),
        }
    }

    fn of(word: &str) -> Self {
        if word == WHOLE { Self::Whole } else { Self::GivenUp(said_in(word)) }
    }
}

impl Agreements {
    /// The decisions of `attempt`, under a directory that all ranks share; a lone rank needs none.
    #[must_use]
    pub fn new(shared: &Path, attempt: &AttemptRef, lone: bool) -> Self {
        Self { dir: (!lone).then(|| shared.join("_decisions").join(attempt.dir())) }
    }

    /// Whether `step` is saved: `wish`, unless another rank said otherwise before.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn saving(&self, step: u64, wish: Saving) -> Result<Saving> {
        let word = match wish {
            Saving::Save => "save",
            Saving::Skip => "skip",
        };
        match self.record(&format!("save-{step:020}"), word)?.as_deref() {
            None => Ok(wish),
            Some("save") => Ok(Saving::Save),
            Some("skip") => Ok(Saving::Skip),
            Some(other) => Err(Error::damaged("a decision", format!("it says {other:?}"))),
        }
    }

    /// What became of `step` in RAM: `seen`, unless another rank has said so before. Whoever sees it
    /// complete and whoever gives up waiting for it ask the same question.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn in_ram(&self, step: u64, seen: InRam) -> Result<InRam> {
        let said = self.record(&format!("ram-{step:020}"), &seen.word())?;
        Ok(said.map_or(seen, |word| InRam::of(&word)))
    }

    /// Whether `step` was saved, where some rank has decided it.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn was_saving(&self, step: u64) -> Result<Option<Saving>> {
        let said = self.said(&format!("save-{step:020}"))?;
        Ok(said.map(|word| if word == "skip" { Saving::Skip } else { Saving::Save }))
    }

    /// What [`in_ram`](Self::in_ram) answers, where some rank has decided it.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn was_in_ram(&self, step: u64) -> Result<Option<InRam>> {
        Ok(self.said(&format!("ram-{step:020}"))?.map(|word| InRam::of(&word)))
    }

    /// This rank's words about what it holds as other ranks do, at `step` (`replicated::words`).
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn say_alike(&self, step: u64, rank: u32, words: &str) -> Result<()> {
        let (name, text) = (format!("alike-{step:020}-{rank}"), format!("!{words}"));
        let said = self.record(&name, &text)?;
        if let (Some(dir), true) = (&self.dir, said.is_some_and(|said| said != text)) {
            // A save of this step that failed, and is tried again: nobody has counted on it.
            remove(&dir.join(&name))?;
            self.record(&name, &text)?;
        }
        Ok(())
    }

    /// What `rank` said so, if it did.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn said_alike(&self, step: u64, rank: u32) -> Result<Option<String>> {
        let said = self.said(&format!("alike-{step:020}-{rank}"))?;
        Ok(said.map(|text| said_in(&text)))
    }

    /// The leader: `step` is the next one that goes to disk. False: a rank passed it over before.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn carry(&self, step: u64) -> Result<bool> {
        let said = self.record(&format!("carry-{step:020}"), CARRY)?;
        Ok(said.is_none_or(|word| word == CARRY))
    }

    /// Any rank: `step` goes to no disk, its slot is wanted. False: the leader chose it before.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn pass_over(&self, step: u64) -> Result<bool> {
        let said = self.record(&format!("carry-{step:020}"), PASS)?;
        Ok(said.is_none_or(|word| word == PASS))
    }

    /// Whether some rank passed `step` over.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn was_passed_over(&self, step: u64) -> Result<bool> {
        Ok(self.said(&format!("carry-{step:020}"))?.as_deref() == Some(PASS))
    }

    /// The newest step that goes to disk, as recorded.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn carried(&self) -> Result<Option<u64>> {
        let mut steps = self.steps("carry-")?;
        steps.sort_unstable();
        for step in steps.into_iter().rev() {
            if self.said(&format!("carry-{step:020}"))?.as_deref() == Some(CARRY) {
                return Ok(Some(step));
            }
        }
        Ok(None)
    }

    /// Gives `step` up for the disk tier, for all ranks.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn give_up(&self, step: u64, why: &str) -> Result<()> {
        self.record(&format!("gaveup-{step:020}"), &sentence(why)).map(drop)
    }

    /// The leader: `step` may go to disk once more.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn try_again(&self, step: u64) -> Result<()> {
        let Some(dir) = &self.dir else { return Ok(()) };
        remove(&dir.join(format!("gaveup-{step:020}")))
    }

    /// Why `step` was given up, if it was.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn gave_up(&self, step: u64) -> Result<Option<String>> {
        let found = self.said(&format!("gaveup-{step:020}"))?;
        Ok(found.map(|text| said_in(&text)))
    }

    /// The leader: `step` is the next one that goes to other nodes.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn copy(&self, step: u64) -> Result<()> {
        self.record(&format!("copy-{step:020}"), CARRY).map(drop)
    }

    /// The newest step that goes to other nodes, as recorded.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn copied(&self) -> Result<Option<u64>> {
        Ok(self.steps("copy-")?.into_iter().max())
    }

    /// `rank` has the copies of its shard of `step` that it is to have.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn say_held(&self, step: u64, rank: u32) -> Result<()> {
        self.record(&format!("held-{step:020}-{rank}"), WHOLE).map(drop)
    }

    /// Those of `ranks` that have not said so.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn not_held(&self, step: u64, ranks: &[u32]) -> Result<Vec<u32>> {
        let mut missing = Vec::new();
        for rank in ranks {
            if self.dir.is_some() && self.said(&format!("held-{step:020}-{rank}"))?.is_none() {
                missing.push(*rank);
            }
        }
        Ok(missing)
    }

    /// What became of the copies of `step` on other nodes: `seen`, unless another rank has said so
    /// before.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn on_peers(&self, step: u64, seen: InRam) -> Result<InRam> {
        let said = self.record(&format!("peers-{step:020}"), &seen.word())?;
        Ok(said.map_or(seen, |word| InRam::of(&word)))
    }

    /// What [`on_peers`](Self::on_peers) answers, where some rank has decided it.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn was_on_peers(&self, step: u64) -> Result<Option<InRam>> {
        Ok(self.said(&format!("peers-{step:020}"))?.map(|word| InRam::of(&word)))
    }

    /// Forgets what was said of copies of steps before `step`.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn forget_copies_before(&self, step: u64) -> Result<()> {
        let Some(dir) = &self.dir else { return Ok(()) };
        for prefix in ["copy-", "peers-", "held-"] {
            let end = format!("{prefix}{step:020}");
            for name in self.names()?.into_iter().filter(|n| n.starts_with(prefix) && *n < end) {
                remove(&dir.join(name))?;
            }
        }
        Ok(())
    }

    /// The step after which all ranks stop: as recorded, else `wish`. It stays for as long as the
    /// attempt.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn stop(&self, wish: Option<u64>) -> Result<Option<u64>> {
        let Some(dir) = &self.dir else { return Ok(wish) };
        let said = match wish {
            Some(step) => self.record(STOP, &step.to_string())?,
            None => read(&dir.join(STOP))?,
        };
        let step = |text: String| {
            let step = text.parse();
            step.map_err(|_| Error::damaged("a decision", format!("it says {text:?}")))
        };
        said.map(step).transpose()
    }

    /// What a run without checkpoints begins with, of what its ranks would take: `wish`, unless
    /// another rank was first.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn init(&self, wish: &str) -> Result<String> {
        Ok(self.record("init", wish)?.unwrap_or_else(|| wish.to_owned()))
    }

    /// Forgets decisions about steps before `step`; where the job stops is not among them.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn forget_before(&self, step: u64) -> Result<()> {
        let Some(dir) = &self.dir else { return Ok(()) };
        for prefix in ["save-", "ram-", "carry-", "gaveup-"] {
            for old in self.steps(prefix)?.into_iter().filter(|s| *s < step) {
                remove(&dir.join(format!("{prefix}{old:020}")))?;
            }
        }
        let end = format!("alike-{step:020}");
        for name in self.names()?.into_iter().filter(|n| n.starts_with("alike-") && *n < end) {
            remove(&dir.join(name))?;
        }
        Ok(())
    }

    fn names(&self) -> Result<Vec<String>> {
        let Some(dir) = &self.dir else { return Ok(Vec::new()) };
        let entries = match fs::read_dir(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.at("list", dir)?,
        };
        let name = |entry: io::Result<fs::DirEntry>| {
            Ok(entry.at("list", dir)?.file_name().to_string_lossy().into_owned())
        };
        entries.map(name).collect()
    }

    fn steps(&self, prefix: &str) -> Result<Vec<u64>> {
        let names = self.names()?.into_iter();
        Ok(names.filter_map(|n| n.strip_prefix(prefix)?.parse().ok()).collect())
    }

    /// What is recorded, if anything is.
    fn said(&self, name: &str) -> Result<Option<String>> {
        self.dir.as_ref().map_or(Ok(None), |dir| read(&dir.join(name)))
    }

    /// The recorded text: `text`, unless somebody was first. `None`: there is nobody to agree with.
    fn record(&self, name: &str, text: &str) -> Result<Option<String>> {
        let Some(dir) = &self.dir else { return Ok(None) };
        let path = dir.join(name);
        for _ in 0..8 {
            match symlink(text, &path) {
                Ok(()) => return Ok(Some(text.into())),
                Err(e) if e.kind() == io::ErrorKind::NotFound => make_dirs(dir, false)?,
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                    if let Some(there) = read(&path)? {
                        return Ok(Some(there));
                    }
                }
                Err(e) => return Err(e).at("record", &path),
            }
        }
        Err(Error::Bug(format!("{} comes and goes", path.display())))
    }
}

/// A sentence as a decision's text: a link's target is at most one page, and never empty.
fn sentence(why: &str) -> String {
    let why: String = why.chars().filter(|c| *c != '\0').take(500).collect();
    format!("!{why}")
}

fn said_in(text: &str) -> String {
    text.trim_start_matches('!').to_owned()
}

fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_link(path) {
        Ok(text) => Ok(Some(text.to_string_lossy().into_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).at("read", path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::Id;

    #[test]
    fn a_ranks_own_words_are_those_of_its_last_try_and_go_with_the_step() {
        let dir = tempfile::tempdir().unwrap();
        let attempt = AttemptRef { number: 1, id: Id([1; 16]) };
        let all = Agreements::new(dir.path(), &attempt, false);
        assert_eq!(all.said_alike(5, 0).unwrap(), None);
        for words in ["2:aa:bb", "2:aa:cc", ""] {
            all.say_alike(5, 0, words).unwrap();
            assert_eq!(all.said_alike(5, 0).unwrap().as_deref(), Some(words));
        }
        all.say_alike(6, 0, "x").unwrap();
        assert_eq!(
            all.in_ram(5, InRam::GivenUp("why".into())).unwrap(),
            InRam::GivenUp("why".into())
        );
        assert_eq!(all.in_ram(5, InRam::Whole).unwrap(), InRam::GivenUp("why".into()));
        all.forget_before(6).unwrap();
        assert_eq!((all.said_alike(5, 0).unwrap(), all.was_in_ram(5).unwrap()), (None, None));
        assert_eq!(all.said_alike(6, 0).unwrap().as_deref(), Some("x"));
    }
}
