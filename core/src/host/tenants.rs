//! Tenants: whom an agent serves where a uid says nothing.
//!
//! On Kubernetes any pod may run as any uid; who it is say its namespace and its service account, in a token
//! that the cluster has signed. An agent of tenants is one user with no rights over anything else: slots and
//! files go to trainers as descriptors, so theirs need none over its directories. Whether a token is true is
//! for [`Identify`] to say; here is what follows from it.
//!
//! # Invariants
//!
//! - A trainer that has not shown who it is gets no answer but why. Its uid decides nothing.
//! - What a tenant names lies in a directory of its own, or in a place in a bucket that is its namespace's:
//!   no name leads out of there.
//! - A bucket is reached as the agent was told itself, by no words of a tenant.

use std::{
    ffi::OsString,
    fmt,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use tierkeep_proto::trainer as wire;

use crate::{
    error::{Error, Result},
    tier::object::address::is_url,
};

/// What stands for a tenant's namespace in a place in a bucket.
pub const NAMESPACE: &str = "{namespace}";

/// The longest name that Kubernetes gives.
const NAME_BYTES_MAX: usize = 253;

/// A namespace and a service account in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    namespace: String,
    account: String,
}

impl Tenant {
    /// # Errors
    /// One of them is no name as Kubernetes gives it, and would be no name of a directory.
    pub fn new(namespace: &str, account: &str) -> Result<Self> {
        for (what, name) in [("namespace", namespace), ("service account", account)] {
            let good =
                |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'-' | b'.');
            let begins_well = name.bytes().next().is_some_and(|c| c.is_ascii_alphanumeric());
            if !begins_well || name.len() > NAME_BYTES_MAX || !name.bytes().all(good) {
                return Err(Error::invalid(format!("{name:?} is no name of a {what}")));
            }
        }
        Ok(Self { namespace: namespace.into(), account: account.into() })
    }
}

impl fmt::Display for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.account)
    }
}

/// Says whose a token is.
pub trait Identify: Send + Sync + fmt::Debug {
    /// It blocks, for some seconds at most.
    ///
    /// # Errors
    /// The token is nobody's, or not for this agent; or nobody can tell at the moment.
    fn identify(&self, token: &str) -> Result<Tenant>;
}

/// How tenants are served.
#[derive(Clone, Debug)]
pub struct Tenancy {
    /// The directory below which theirs are, on the disk tier: `<namespace>/<service account>/`.
    pub disk_dir: PathBuf,
    /// Who says whose a token is.
    pub identify: Arc<dyn Identify>,
}

impl Tenancy {
    /// Whose the token is that a trainer showed.
    pub(super) fn tenant(&self, token: &str) -> Result<Tenant> {
        if token.is_empty() {
            return Err(Error::invalid(
                "this agent knows trainers by their service account's token, and this one showed none: \
                 mount a projected token with the agent's audience at /var/run/secrets/tierkeep/token, \
                 or say where it is (TIERKEEP_TOKEN_FILE)",
            ));
        }
        self.identify.identify(token)
    }

    /// What a tenant asks for, as the agent itself would: with the places where it really is.
    ///
    /// `places`: where in buckets tenants may have their checkpoints.
    ///
    /// # Errors
    /// It names something that is not its own.
    pub(super) fn own(
        &self,
        tenant: &Tenant,
        places: &[String],
        open: &wire::Open,
    ) -> Result<wire::Open> {
        let mut own = open.clone();
        let destination = PathBuf::from(OsString::from_vec(open.destination.clone()));
        match destination.to_str().filter(|text| is_url(text)) {
            Some(url) => check_place(tenant, places, url)?,
            None => {
                let real = self.below(tenant, &destination)?;
                own.destination = real.into_os_string().into_vec();
            }
        }
        if let Some(bucket) = &open.bucket {
            check_place(tenant, places, &bucket.url)?;
            if let Some(name) = bucket.options.keys().next() {
                return Err(Error::invalid(format!(
                    "{name:?}: the agent reaches a bucket as it was told itself: give no storage_options"
                )));
            }
        }
        Ok(own)
    }

    /// Where a tenant's directory really is. What already is such a place, as a message named it, is that
    /// one.
    fn below(&self, tenant: &Tenant, named: &Path) -> Result<PathBuf> {
        let mut real = self.disk_dir.join(&tenant.namespace).join(&tenant.account);
        for part in named.strip_prefix(&real).unwrap_or(named).components() {
            match part {
                Component::RootDir | Component::CurDir => {}
                // Beside what tierkeep makes in a run's directory, and nowhere in it.
                Component::Normal(name) if is_plain(name.as_bytes()) => real.push(name),
                _ => {
                    let named = named.display();
                    return Err(Error::invalid(format!("{named} is no place of {tenant}'s own")));
                }
            }
        }
        Ok(real)
    }
}

/// No name of tierkeep's own, and no byte that may be read as an end.
fn is_plain(name: &[u8]) -> bool {
    !name.contains(&0) && !matches!(name.first(), Some(b'_' | b'.'))
}

/// A bucket has no directories that could be entered, but a server of one may have, and so has `file://`.
fn check_place(tenant: &Tenant, places: &[String], url: &str) -> Result<()> {
    let plain = |c: char| {
        c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | '=' | '+' | ',' | '@')
    };
    let path = url.split_once("://").map_or("", |(_, path)| path);
    let climbs = path.split('/').any(|part| matches!(part, "." | ".."));
    if climbs || !path.chars().all(plain) {
        return Err(Error::invalid(format!(
            "{url}: through an agent a bucket's path has letters, digits and \"-_.=+,@\" alone"
        )));
    }
    let own = |place: &String| {
        let place = place.replace(NAMESPACE, &tenant.namespace);
        let rest = url.strip_prefix(place.trim_end_matches('/'));
        rest.is_some_and(|rest| rest.starts_with('/'))
    };
    if places.iter().any(own) {
        return Ok(());
    }
    let theirs: Vec<_> = places.iter().map(|p| p.replace(NAMESPACE, &tenant.namespace)).collect();
    let hint = match theirs.is_empty() {
        true => "it carries nothing to buckets (buckets, TIERKEEP_BUCKETS)".into(),
        false => format!("those of {} lie below {}", tenant.namespace, theirs.join(" or ")),
    };
    Err(Error::invalid(format!(
        "{url}: this agent carries no checkpoints of {tenant} there: {hint}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Nobody;

    impl Identify for Nobody {
        fn identify(&self, _: &str) -> Result<Tenant> {
            Err(Error::invalid("nobody's"))
        }
    }

    fn tenancy() -> Tenancy {
        Tenancy { disk_dir: "/disk".into(), identify: Arc::new(Nobody) }
    }

    fn tenant() -> Tenant {
        Tenant::new("team-a", "trainer").expect("a tenant")
    }

    fn open(destination: &str) -> wire::Open {
        wire::Open { destination: destination.into(), ..wire::Open::default() }
    }

    #[test]
    fn a_name_that_would_be_another_directory_is_no_tenants() {
        for bad in ["", ".", "..", ".a", "a/b", "A", "a\0", "-a", "a b", "ä"] {
            Tenant::new(bad, "trainer").expect_err(bad);
            Tenant::new("team-a", bad).expect_err(bad);
        }
        Tenant::new("team-a", "trainer.v2").expect("a good name");
    }

    #[test]
    fn what_a_tenant_names_is_in_a_directory_of_its_own() {
        for (named, real) in [
            ("/runs/gpt", "/disk/team-a/trainer/runs/gpt"),
            ("//runs/./gpt/", "/disk/team-a/trainer/runs/gpt"),
            ("/disk/team-a/trainer/runs/gpt", "/disk/team-a/trainer/runs/gpt"),
            // Nobody's but its own, whatever it looks like.
            ("/disk/team-b/trainer/gpt", "/disk/team-a/trainer/disk/team-b/trainer/gpt"),
        ] {
            let own = tenancy().own(&tenant(), &[], &open(named)).expect(named);
            assert_eq!(String::from_utf8(own.destination).expect("a path"), real);
        }
        for bad in [
            "/../team-b/gpt",
            "/runs/../../../team-b/gpt",
            "/runs/a\0b/gpt",
            "/runs/gpt/_decisions/00001-x/init/gpt",
            "/.token-keys.json/gpt",
            "/disk/team-a/trainer/../../team-b/trainer/gpt",
        ] {
            let e = tenancy().own(&tenant(), &[], &open(bad)).expect_err(bad);
            assert!(e.chain().contains("no place of team-a/trainer's own"), "{}", e.chain());
        }
    }

    #[test]
    fn a_tenants_bucket_is_its_namespaces_and_reached_as_the_agent_was_told() {
        let places = ["s3://models/{namespace}/".to_owned(), "file:///mnt/{namespace}".to_owned()];
        for good in ["s3://models/team-a/gpt", "file:///mnt/team-a/x/gpt"] {
            tenancy().own(&tenant(), &places, &open(good)).expect(good);
            let bucket = wire::Bucket { url: good.into(), ..wire::Bucket::default() };
            let both = wire::Open { bucket: Some(bucket), ..open("/gpt") };
            tenancy().own(&tenant(), &places, &both).expect(good);
        }
        for bad in [
            "s3://models/team-b/gpt",
            "s3://models/team-ab/gpt",
            "s3://models/team-a/../team-b/gpt",
            "s3://models/team-a/%2e%2e/team-b/gpt",
            "s3://models/team-a/x?y",
            "gs://models/team-a/gpt",
            "file:///mnt/team-a/../team-b/gpt",
        ] {
            let e = tenancy().own(&tenant(), &places, &open(bad)).expect_err(bad);
            assert!(e.chain().contains(bad), "{}", e.chain());
            let bucket = wire::Bucket { url: bad.into(), ..wire::Bucket::default() };
            let beside = wire::Open { bucket: Some(bucket), ..open("/gpt") };
            tenancy().own(&tenant(), &places, &beside).expect_err(bad);
        }
        let options = [("aws_endpoint".to_owned(), "http://elsewhere".to_owned())].into();
        let sly =
            wire::Bucket { url: "s3://models/team-a/gpt".into(), options, ..Default::default() };
        let sly = wire::Open { bucket: Some(sly), ..open("/gpt") };
        let e = tenancy().own(&tenant(), &places, &sly).expect_err("a server of its own");
        assert!(e.chain().contains("aws_endpoint"), "{}", e.chain());
        let e = tenancy().own(&tenant(), &[], &open("s3://models/team-a/gpt")).expect_err("none");
        assert!(e.chain().contains("TIERKEEP_BUCKETS"), "{}", e.chain());
    }
}
