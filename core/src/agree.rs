//! Decisions that all ranks obey and no rank waits for: the first that must decide records, the
//! others read.
//!
//! Where the ranks share a directory, they lie there (`board`). Where they are spread over nodes, they lie
//! with the leader's agent, their home, which the others ask and listen to (`home`). Then nobody lists
//! what others have: each rank says how far its own shard is, and the leader says when all are.
//!
//! They matter while an attempt runs and are removed as it goes on.
//!
//! # Invariants
//!
//! - Two ranks that ask the same question get the same answer.
//! - A lone rank asks nobody.

pub(crate) mod board;
pub(crate) mod home;

use std::{path::Path, sync::Arc};

use self::{board::Board, home::Home};
use crate::{
    error::{Error, Result},
    names::AttemptRef,
};

/// The name of the decision where the job stops.
const STOP: &str = "stop";
/// What is said of a step that may go to disk, or to the bucket.
const CARRY: &str = "carry";
const PASS: &str = "pass";
/// What is said of a step that was complete in RAM.
const WHOLE: &str = "whole";

/// The decisions of one attempt.
#[derive(Debug)]
pub struct Agreements {
    at: At,
    /// The ranks do not see each other's shards.
    spread: bool,
}

#[derive(Debug)]
enum At {
    /// There is nobody to agree with.
    Nobody,
    Here(Arc<Board>),
    Home(Home),
}

/// What is said of how far a rank's own shard of a step is: that is between it and the leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Own {
    /// It is in RAM.
    InRam,
    /// It is on disk.
    OnDisk,
    /// Other nodes hold it.
    Held,
    /// It is in the bucket.
    InBucket,
}

impl Own {
    fn prefix(self) -> &'static str {
        match self {
            Self::InRam => "inram-",
            Self::OnDisk => "ondisk-",
            Self::Held => "held-",
            Self::InBucket => "inbucket-",
        }
    }
}

/// A way that takes one step at a time, chosen by the leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// From RAM to disk.
    Disk,
    /// To the bucket.
    Bucket,
}

impl Lane {
    fn of(self, step: u64) -> String {
        format!("{}{step:020}", self.prefix())
    }

    fn prefix(self) -> &'static str {
        match self {
            Self::Disk => "carry-",
            Self::Bucket => "send-",
        }
    }
}

/// Between a rank and the leader: nobody else listens to that.
const OWN: [&str; 6] = ["inram-", "ondisk-", "held-", "inbucket-", "alike-", "bye-"];

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
        let board = || Arc::new(Board::new(Board::dir(shared, attempt)));
        let at = if lone { At::Nobody } else { At::Here(board()) };
        Self { at, spread: false }
    }

    /// Those of ranks that do not share directories, on the leader's node.
    pub(crate) fn spread_from(board: Arc<Board>) -> Self {
        Self { at: At::Here(board), spread: true }
    }

    /// Those of ranks that do not share directories, on another node.
    pub(crate) fn at_home(home: Home) -> Self {
        Self { at: At::Home(home), spread: true }
    }

    /// The ranks do not see each other's shards.
    pub(crate) fn is_spread(&self) -> bool {
        self.spread
    }

    /// `rank` says how far its shard of `step` is.
    ///
    /// # Errors
    /// The directory did not answer.
    pub(crate) fn say_own(&self, step: u64, rank: u32, what: Own) -> Result<()> {
        self.record(&format!("{}{step:020}-{rank}", what.prefix()), WHOLE).map(drop)
    }

    /// The leader: those of `ranks` that have not said so.
    ///
    /// # Errors
    /// The directory did not answer.
    pub(crate) fn without_own(&self, step: u64, what: Own, ranks: &[u32]) -> Result<Vec<u32>> {
        if matches!(self.at, At::Nobody) {
            return Ok(Vec::new());
        }
        let prefix = format!("{}{step:020}-", what.prefix());
        let names = self.names(&prefix)?;
        let said: std::collections::HashSet<u32> =
            names.iter().filter_map(|n| n.strip_prefix(&prefix)?.parse().ok()).collect();
        Ok(ranks.iter().copied().filter(|rank| !said.contains(rank)).collect())
    }

    /// `rank` has closed: it asks the leader nothing any more.
    ///
    /// # Errors
    /// The directory did not answer.
    pub(crate) fn say_bye(&self, rank: u32) -> Result<()> {
        let name = format!("bye-{rank}");
        match &self.at {
            // Nobody waits for a home that is gone to hear it.
            At::Home(home) => home.tell(&name, WHOLE),
            _ => self.record(&name, WHOLE).map(drop),
        }
    }

    /// The leader: all of `ranks` have said so.
    ///
    /// # Errors
    /// The directory did not answer.
    pub(crate) fn all_said_bye(&self, mut ranks: impl Iterator<Item = u32>) -> Result<bool> {
        let names: std::collections::HashSet<String> = self.names("bye-")?.into_iter().collect();
        Ok(ranks.all(|rank| names.contains(&format!("bye-{rank}"))))
    }

    /// The leader: every rank's shard of `step` is on disk.
    ///
    /// # Errors
    /// The directory did not answer.
    pub(crate) fn seal(&self, step: u64) -> Result<()> {
        self.record(&format!("sealed-{step:020}"), WHOLE).map(drop)
    }

    /// Whether the leader has said so.
    ///
    /// # Errors
    /// The directory did not answer.
    pub(crate) fn was_sealed(&self, step: u64) -> Result<bool> {
        Ok(self.said(&format!("sealed-{step:020}"))?.is_some())
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
        if said.is_some_and(|said| said != text) {
            // A save of this step that failed, and is tried again: nobody has counted on it.
            self.remove(&name)?;
            self.record(&name, &text)?;
        }
        Ok(())
    }

    /// What those of `ranks` said so that said something.
    ///
    /// # Errors
    /// The directory did not answer.
    pub(crate) fn all_said_alike(&self, step: u64, ranks: &[u32]) -> Result<Vec<String>> {
        let prefix = format!("alike-{step:020}-");
        let names = self.names(&prefix)?;
        let said = names.iter().filter_map(|name| name.strip_prefix(&prefix)?.parse().ok());
        let said: Vec<u32> = said.filter(|rank| ranks.contains(rank)).collect();
        let words = said.into_iter().filter_map(|rank| self.said_alike(step, rank).transpose());
        words.collect()
    }

    /// What `rank` said so, if it did.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn said_alike(&self, step: u64, rank: u32) -> Result<Option<String>> {
        let said = self.said(&format!("alike-{step:020}-{rank}"))?;
        Ok(said.map(|text| said_in(&text)))
    }

    /// The leader: `step` is the next one that goes this way. False: a rank passed it over before.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn choose(&self, lane: Lane, step: u64) -> Result<bool> {
        let said = self.record(&lane.of(step), CARRY)?;
        Ok(said.is_none_or(|word| word == CARRY))
    }

    /// Any rank: `step` does not go this way, its slot is wanted. False: the leader chose it before.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn pass_over(&self, lane: Lane, step: u64) -> Result<bool> {
        let said = self.record(&lane.of(step), PASS)?;
        Ok(said.is_none_or(|word| word == PASS))
    }

    /// Whether some rank passed `step` over.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn was_passed_over(&self, lane: Lane, step: u64) -> Result<bool> {
        Ok(self.said(&lane.of(step))?.as_deref() == Some(PASS))
    }

    /// The newest step that goes this way, as recorded.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn chosen(&self, lane: Lane) -> Result<Option<u64>> {
        let mut steps = self.steps(lane.prefix())?;
        steps.sort_unstable();
        for step in steps.into_iter().rev() {
            if self.said(&lane.of(step))?.as_deref() == Some(CARRY) {
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
        self.remove(&format!("gaveup-{step:020}"))
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
        self.forget(&["copy-", "peers-", "held-"], step)
    }

    /// What became of `step` in the bucket: `seen`, unless another rank has said so before.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn in_bucket(&self, step: u64, seen: InRam) -> Result<InRam> {
        let said = self.record(&format!("bucket-{step:020}"), &seen.word())?;
        Ok(said.map_or(seen, |word| InRam::of(&word)))
    }

    /// What [`in_bucket`](Self::in_bucket) answers, where some rank has decided it.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn was_in_bucket(&self, step: u64) -> Result<Option<InRam>> {
        Ok(self.said(&format!("bucket-{step:020}"))?.map(|word| InRam::of(&word)))
    }

    /// Forgets what was said of the bucket and steps before `step`.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn forget_sent_before(&self, step: u64) -> Result<()> {
        self.forget(&["send-", "bucket-", "inbucket-"], step)
    }

    /// The step after which all ranks stop: as recorded, else `wish`. It stays for as long as the
    /// attempt.
    ///
    /// # Errors
    /// The directory did not answer.
    pub fn stop(&self, wish: Option<u64>) -> Result<Option<u64>> {
        let said = match (&self.at, wish) {
            (At::Nobody, wish) => return Ok(wish),
            (_, Some(step)) => self.record(STOP, &step.to_string())?,
            (At::Here(board), None) => board.said(STOP)?,
            // Not as it was heard a moment ago: ranks that ask one after the other agree.
            (At::Home(home), None) => home.ask_for(STOP)?,
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
        let of_disk =
            ["save-", "ram-", "carry-", "gaveup-", "alike-", "inram-", "ondisk-", "sealed-"];
        self.forget(&of_disk, step)
    }

    fn forget(&self, prefixes: &[&str], step: u64) -> Result<()> {
        for prefix in prefixes {
            let upto = format!("{prefix}{step:020}");
            for name in self.names(prefix)?.into_iter().take_while(|name| *name < upto) {
                match &self.at {
                    At::Nobody => {}
                    At::Here(board) => board.forget(&name)?,
                    At::Home(home) => home.remove(&name)?,
                }
            }
        }
        Ok(())
    }

    /// Names that begin so, in order.
    fn names(&self, prefix: &str) -> Result<Vec<String>> {
        match &self.at {
            At::Nobody => Ok(Vec::new()),
            At::Here(board) => board.names(prefix),
            At::Home(home) => Ok(home.names(prefix)),
        }
    }

    fn steps(&self, prefix: &str) -> Result<Vec<u64>> {
        let names = self.names(prefix)?.into_iter();
        Ok(names.filter_map(|n| n.strip_prefix(prefix)?.parse().ok()).collect())
    }

    /// What is recorded, if anything is.
    fn said(&self, name: &str) -> Result<Option<String>> {
        match &self.at {
            At::Nobody => Ok(None),
            At::Here(board) => board.said(name),
            At::Home(home) => Ok(home.said(name)),
        }
    }

    /// The recorded text: `text`, unless somebody was first. `None`: there is nobody to agree with.
    fn record(&self, name: &str, text: &str) -> Result<Option<String>> {
        match &self.at {
            At::Nobody => Ok(None),
            At::Here(board) => board.record(name, text).map(Some),
            At::Home(home) => home.record(name, text).map(Some),
        }
    }

    fn remove(&self, name: &str) -> Result<()> {
        match &self.at {
            At::Nobody => Ok(()),
            At::Here(board) => board.remove(name),
            At::Home(home) => home.remove(name),
        }
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
