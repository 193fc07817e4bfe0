//! Decisions in a directory.
//!
//! A decision is a symbolic link: it appears whole or not at all, the first one wins, and making or
//! reading one costs microseconds. Links point nowhere; their target is the decision's text.
//!
//! # Invariants
//!
//! - Whoever listens hears every change, in order, or everything anew.
//! - Where this process alone writes to the directory, its names are known without a look: of a thousand
//!   ranks each says three things of a step, and the leader counts them at each word.

use std::{
    collections::{BTreeSet, VecDeque},
    fs, io,
    ops::Bound,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, Weak},
    time::Duration,
};

use super::OWN;
use crate::{
    clock::{Clock, Deadline},
    error::{Doing, Error, Result},
    names::{AttemptRef, Id},
    observe::locked,
    signal::Signal,
    tier::publish::{make_dirs, remove},
};

/// Before every text, which is a rank's own: as a link it leads nowhere, or an agent that serves tenants
/// would follow it into another's directory. Nothing of this name is ever made.
const MARK: &str = "=:";

/// Changes that are kept for those who listen: who comes later is told everything.
const NEWS_MAX: usize = 4096;

/// One change: a name and what is said there now, if anything is.
pub(crate) type Word = (String, Option<String>);

/// The decisions of one attempt, in a directory. All that write to it in this process share one.
#[derive(Debug)]
pub(crate) struct Board {
    dir: PathBuf,
    /// Of this life of it: who listened to one before hears everything anew.
    life: Id,
    news: Mutex<News>,
    changed: Signal,
    /// Where nobody else writes to it: the names that are there, once they were listed.
    sole: Option<Mutex<Option<BTreeSet<String>>>>,
    /// Of ranks on this node: told of every change.
    ranks: Mutex<Vec<Weak<Signal>>>,
}

#[derive(Debug, Default)]
struct News {
    /// Changes that are no longer kept.
    before: u64,
    kept: VecDeque<Word>,
}

/// What somebody who listens hears.
#[derive(Debug)]
pub(crate) struct Heard {
    pub(crate) life: Id,
    /// Changes so far.
    pub(crate) upto: u64,
    /// These are all that there is; else what changed.
    pub(crate) whole: bool,
    pub(crate) words: Vec<Word>,
}

impl Board {
    /// Where the decisions of `attempt` lie, below a directory that its ranks share.
    pub(crate) fn dir(shared: &Path, attempt: &AttemptRef) -> PathBuf {
        shared.join("_decisions").join(attempt.dir())
    }

    pub(crate) fn new(dir: PathBuf) -> Self {
        // It tells one life from another: without randomness all are one, and hear the less.
        let life = Id::random().unwrap_or(Id([0; 16]));
        let (news, ranks) = (Mutex::default(), Mutex::default());
        Self { dir, life, news, changed: Signal::default(), sole: None, ranks }
    }

    /// One that nobody but this process writes to, and only through this.
    pub(crate) fn sole(dir: PathBuf) -> Self {
        Self { sole: Some(Mutex::default()), ..Self::new(dir) }
    }

    /// Tells `signal` of every change from here on.
    pub(crate) fn tells(&self, signal: &Arc<Signal>) {
        let mut ranks = locked(&self.ranks);
        ranks.retain(|rank| rank.strong_count() > 0);
        ranks.push(Arc::downgrade(signal));
    }

    /// Names that begin so, in order.
    pub(crate) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let Some(sole) = &self.sole else {
            let mut names = self.listed()?;
            names.retain(|name| name.starts_with(prefix));
            names.sort();
            return Ok(names);
        };
        let mut known = locked(sole);
        if known.is_none() {
            *known = Some(self.listed()?.into_iter().collect());
        }
        let from = (Bound::Included(prefix), Bound::Unbounded);
        let from = known.iter().flat_map(|names| names.range::<str, _>(from));
        Ok(from.take_while(|name| name.starts_with(prefix)).cloned().collect())
    }

    fn listed(&self) -> Result<Vec<String>> {
        let dir = &self.dir;
        let entries = match fs::read_dir(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.at("list", dir)?,
        };
        let name = |entry: io::Result<fs::DirEntry>| {
            Ok(entry.at("list", dir)?.file_name().to_string_lossy().into_owned())
        };
        entries.map(name).collect()
    }

    /// Held while a name comes or goes: what is known is what is there.
    fn changing(&self) -> Option<MutexGuard<'_, Option<BTreeSet<String>>>> {
        self.sole.as_ref().map(locked)
    }

    pub(crate) fn said(&self, name: &str) -> Result<Option<String>> {
        read(&self.dir.join(name))
    }

    /// The recorded text: `text`, unless somebody was first.
    pub(crate) fn record(&self, name: &str, text: &str) -> Result<String> {
        let path = self.dir.join(name);
        for _ in 0..8 {
            let mut known = self.changing();
            match symlink(format!("{MARK}{text}"), &path) {
                Ok(()) => {
                    if let Some(Some(names)) = known.as_deref_mut() {
                        names.insert(name.into());
                    }
                    drop(known);
                    self.tell(name, Some(text));
                    return Ok(text.into());
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => make_dirs(&self.dir, false)?,
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                    if let Some(there) = read(&path)? {
                        return Ok(there);
                    }
                }
                Err(e) => return Err(e).at("record", &path),
            }
        }
        Err(Error::Bug(format!("{} comes and goes", path.display())))
    }

    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        self.forget(name)?;
        self.wake();
        Ok(())
    }

    /// Removes what nobody looks at any more: it is heard with the next change, and wakes nobody.
    pub(crate) fn forget(&self, name: &str) -> Result<()> {
        let mut known = self.changing();
        remove(&self.dir.join(name))?;
        if let Some(Some(names)) = known.as_deref_mut() {
            names.remove(name);
        }
        drop(known);
        self.add_news(name, None);
        Ok(())
    }

    fn tell(&self, name: &str, text: Option<&str>) {
        self.add_news(name, text);
        let ranks = locked(&self.ranks).clone();
        ranks.iter().filter_map(Weak::upgrade).for_each(|rank| rank.notify());
        if !is_own(name) {
            self.changed.notify();
        }
    }

    fn wake(&self) {
        let ranks = locked(&self.ranks).clone();
        ranks.iter().filter_map(Weak::upgrade).for_each(|rank| rank.notify());
        self.changed.notify();
    }

    fn add_news(&self, name: &str, text: Option<&str>) {
        if is_own(name) {
            return;
        }
        let mut news = locked(&self.news);
        news.kept.push_back((name.into(), text.map(Into::into)));
        if news.kept.len() > NEWS_MAX {
            news.kept.pop_front();
            news.before += 1;
        }
    }

    /// What changed after `since`, waited for up to `wait`.
    pub(crate) fn hear(
        &self,
        life: Option<Id>,
        since: u64,
        clock: &dyn Clock,
        wait: Duration,
    ) -> Result<Heard> {
        let deadline = Deadline::after(clock, wait);
        loop {
            let seen = self.changed.seen();
            {
                let news = locked(&self.news);
                let upto = news.before + news.kept.len() as u64;
                let known = life == Some(self.life) && (news.before..=upto).contains(&since);
                if !known {
                    // Before the directory is read: what is recorded meanwhile is heard twice.
                    drop(news);
                    return self.everything(upto);
                }
                if upto > since {
                    let skip = usize::try_from(since - news.before).unwrap_or(usize::MAX);
                    let words = news.kept.iter().skip(skip).cloned().collect();
                    return Ok(Heard { life: self.life, upto, whole: false, words });
                }
            }
            let Some(left) = deadline.left(clock) else {
                return Ok(Heard { life: self.life, upto: since, whole: false, words: vec![] });
            };
            self.changed.wait(seen, left);
        }
    }

    fn everything(&self, upto: u64) -> Result<Heard> {
        let mut words = Vec::new();
        for name in self.names("")? {
            if !is_own(&name) {
                let text = self.said(&name)?;
                words.extend(text.map(|text| (name, Some(text))));
            }
        }
        Ok(Heard { life: self.life, upto, whole: true, words })
    }
}

/// It is between a rank and the leader.
fn is_own(name: &str) -> bool {
    OWN.iter().any(|own| name.starts_with(own))
}

fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_link(path) {
        Ok(text) => {
            let text = text.to_string_lossy();
            // Without the mark somebody else put it there: whoever reads it says so.
            Ok(Some(text.strip_prefix(MARK).unwrap_or(&text).to_owned()))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).at("read", path),
    }
}
