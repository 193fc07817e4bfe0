//! Several users, one agent.
//!
//! An agent that is root acts on a user's files as that user: the thread that serves a trainer, and all
//! that it starts, have the trainer's user and groups for everything that concerns files. What a user may
//! not read or write without an agent, the kernel refuses with one too. An agent that is somebody else
//! serves that user alone.
//!
//! # Invariants
//!
//! - Each user's ram tier is a directory of its own, which only that user and root can enter.
//! - A rank that is kept for one user is given to no other.
//! - The budget counts the ram tiers of all.

use std::{
    collections::BTreeSet,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use super::{
    Settings,
    peer::{Peer, Who},
};
use crate::{
    bucket::Bucket,
    error::{Doing, Error, Result},
    observe::locked,
    snapshot::budget::{Budget, Counted},
    sys,
};

/// What stands for a user's number in the path of the ram tier.
pub const UID: &str = "{uid}";

/// Whom it serves.
#[derive(Debug)]
pub(super) struct Users {
    template: PathBuf,
    own: u32,
    /// The ram tiers that there are.
    roots: Counted,
}

impl Users {
    pub(super) fn new(settings: &Settings) -> Self {
        let own = rustix::process::geteuid().as_raw();
        let users =
            Self { template: settings.ram_root.clone(), own, roots: Arc::new(Mutex::default()) };
        locked(&users.roots).extend(users.there());
        users
    }

    /// The ram tier of a user.
    pub(super) fn root_of(&self, uid: u32) -> PathBuf {
        let text = self.template.as_os_str().to_str().map(|t| t.replace(UID, &uid.to_string()));
        text.map_or_else(|| self.template.clone(), PathBuf::from)
    }

    pub(super) fn own_root(&self) -> PathBuf {
        self.root_of(self.own)
    }

    /// Every user is served.
    pub(super) fn are_many(&self) -> bool {
        self.own == 0 && self.template.to_str().is_some_and(|text| text.contains(UID))
    }

    /// This thread acts for the trainer from here on.
    ///
    /// # Errors
    /// It is of a user that is not served.
    pub(super) fn act_for(&self, peer: &Peer) -> Result<()> {
        let uid = peer.who.uid;
        if uid == self.own {
            return Ok(());
        }
        if !self.are_many() {
            return Err(Error::invalid(format!(
                "this agent serves user {} alone, not user {}: it serves all where root runs it with \
                 {UID} in ram_dir",
                self.own, uid
            )));
        }
        self.act_as(&peer.who)
    }

    /// This thread acts for a user from here on.
    ///
    /// # Errors
    /// That user is not served.
    pub(super) fn act_as(&self, who: &Who) -> Result<()> {
        let uid = who.uid;
        if uid == self.own {
            return Ok(());
        }
        if !self.are_many() {
            return Err(Error::invalid(format!("user {uid} is not served")));
        }
        sys::files_as(uid, who.gid, &who.groups).doing(|| format!("act for user {uid}"))
    }

    /// The ram tiers that there are.
    pub(super) fn roots(&self) -> BTreeSet<PathBuf> {
        locked(&self.roots).clone()
    }

    /// A bucket is reached with the agent's own credentials: its own user may send them anywhere, others
    /// only where the agent was told to, and by no words of theirs.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names what the agent has to be told.
    pub(super) fn check_bucket(&self, uid: u32, bucket: &Bucket, allowed: &[String]) -> Result<()> {
        // A directory is reached as the user.
        if uid == self.own || bucket.url.starts_with("file://") {
            return Ok(());
        }
        let below = |place: &String| {
            let place = place.trim_end_matches('/');
            bucket.url.strip_prefix(place).is_some_and(|rest| rest.starts_with('/'))
        };
        if !allowed.iter().any(below) {
            return Err(Error::invalid(format!(
                "{}: this agent carries checkpoints of user {uid} to no such bucket: say so to the agent \
                 (buckets, TIERKEEP_BUCKETS)",
                bucket.url
            )));
        }
        match bucket.options.keys().next() {
            None => Ok(()),
            Some(name) => Err(Error::invalid(format!(
                "{name:?}: the agent of another user reaches a bucket as it was told itself: give no \
                 storage_options"
            ))),
        }
    }

    /// The budget of a user's run, which is everybody's.
    pub(super) fn budget(&self, uid: u32, settings: &Settings, run: &Path) -> Result<Budget> {
        let root = self.root_of(uid);
        let budget = Budget::open(&root, settings.ram_bytes_max)?;
        locked(&self.roots).insert(root);
        Ok(budget.among(self.roots.clone()).with_quota(run, settings.run_bytes_max))
    }

    /// The budget as the agent itself sees it.
    pub(super) fn whole_budget(&self, settings: &Settings) -> Result<Budget> {
        Ok(Budget::open(&self.own_root(), settings.ram_bytes_max)?.among(self.roots.clone()))
    }

    /// Ram tiers that are there, of whomever.
    fn there(&self) -> BTreeSet<PathBuf> {
        let mut roots: BTreeSet<PathBuf> = [self.own_root()].into();
        let (Some(parent), Some(name)) = (self.template.parent(), self.template.file_name()) else {
            return roots;
        };
        let Some((before, after)) = name.to_str().and_then(|name| name.split_once(UID)) else {
            return roots;
        };
        for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let uid = name.to_str().and_then(|name| name.strip_prefix(before)?.strip_suffix(after));
            let Some(uid) = uid.and_then(|uid| uid.parse::<u32>().ok()) else { continue };
            // Anybody may make anything in a directory that is open to all.
            let theirs = std::fs::symlink_metadata(entry.path())
                .is_ok_and(|meta| meta.is_dir() && (meta.uid() == uid || meta.uid() == self.own));
            if theirs {
                roots.insert(entry.path());
            }
        }
        roots
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_agents_credentials_go_where_it_was_told_and_by_no_word_of_another_user() {
        let settings = Settings {
            socket: "/nowhere/agent.sock".into(),
            ram_root: format!("/nowhere/tierkeep-{UID}").into(),
            ram_bytes_max: None,
            run_bytes_max: None,
            buckets: Vec::new(),
            tenancy: None,
            trainers_max: 1,
            idle: Duration::ZERO,
        };
        let users = Users::new(&settings);
        let (own, other) = (users.own, users.own + 1);
        let bucket = |url: &str| Bucket::new(url, 1).expect("a bucket");
        let allowed = ["s3://models/team-a/".to_owned(), "gs://all".to_owned()];
        users.check_bucket(own, &bucket("s3://any/run"), &[]).expect("its own user");
        for good in ["s3://models/team-a/run", "gs://all/x/run", "file:///shared/run"] {
            users.check_bucket(other, &bucket(good), &allowed).expect(good);
        }
        for bad in ["s3://models/team-b/run", "s3://models/team-ab/run", "s3://all/run"] {
            let e = users.check_bucket(other, &bucket(bad), &allowed).expect_err(bad);
            assert!(e.chain().contains("TIERKEEP_BUCKETS"), "{}", e.chain());
        }
        let mut sly = bucket("gs://all/run");
        sly.options.insert("google_base_url".into(), "http://elsewhere".into());
        let e = users.check_bucket(other, &sly, &allowed).expect_err("a server of its own");
        assert!(e.chain().contains("google_base_url"), "{}", e.chain());
    }
}
