//! The settings of the object tier of one run.

use std::{fmt, sync::Arc, time::Duration};

use crate::{
    clock::SharedClock,
    config::number,
    error::{Error, Result},
    names::check_run_name,
    tier::{
        Tier,
        object::{
            self,
            address::{Options, is_url},
        },
        wrap::Limited,
    },
};

/// Where checkpoints go behind the disk, how often, and which stay.
#[derive(Clone, PartialEq, Eq)]
pub struct Bucket {
    /// `<root>/<run>` as a URL: `s3://bucket/root/run`.
    pub url: String,
    /// Under the names of `object_store`; beside what the environment says.
    pub options: Options,
    /// Steps that are divisible by it go there, of those that go to disk. `TIERKEEP_OBJECT_EVERY`.
    pub every: u64,
    /// Of these not more than one in so many minutes, whichever the newest is then.
    /// `TIERKEEP_OBJECT_EVERY_MINUTES`.
    pub every_minutes: Option<u64>,
    /// Newest checkpoints that stay there. `TIERKEEP_OBJECT_KEEP_LAST`.
    pub keep_last: usize,
    /// Steps divisible by it stay there for ever. `TIERKEEP_OBJECT_KEEP_EVERY`.
    pub keep_every: Option<u64>,
    /// The first of each period of so many hours stays there too. `TIERKEEP_OBJECT_KEEP_HOURS`.
    pub keep_hours: Option<u64>,
    /// Limit of what this rank sends, in bytes a second. `TIERKEEP_OBJECT_BYTES_PER_SECOND_MAX`.
    pub bytes_per_second_max: Option<u64>,
    /// Floats are compressed on their way there, where that gains something. `TIERKEEP_OBJECT_COMPRESS`: 1.
    pub compress: bool,
    /// How long bytes stay after their checkpoint was deleted, for readers: longer than it takes to decide
    /// what is restored (`attempt_wait_s`). `TIERKEEP_OBJECT_GRACE_S`; 300.
    pub grace: Duration,
    /// What lies there is read again, slowly, in such periods. `TIERKEEP_OBJECT_SCRUB_HOURS`.
    pub scrub: Option<Duration>,
    /// How long a step may take to be sealed there before it is given up.
    pub wait: Duration,
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The values of options may be secrets.
        let names: Vec<&String> = self.options.keys().collect();
        f.debug_struct("Bucket")
            .field("url", &self.url)
            .field("options", &names)
            .finish_non_exhaustive()
    }
}

impl Bucket {
    /// The defaults, then `TIERKEEP_OBJECT_*`. `disk_every`: the steps that go to disk.
    ///
    /// # Errors
    /// It is no URL of a run, or a variable is not what it must be.
    pub fn new(url: &str, disk_every: u64) -> Result<Self> {
        let url = url.trim_end_matches('/');
        if !is_url(url) {
            return Err(Error::invalid(format!(
                "{url:?} is no bucket, as in s3://bucket/root/run"
            )));
        }
        Ok(Self {
            url: url.into(),
            options: Options::new(),
            every: number("TIERKEEP_OBJECT_EVERY")?.unwrap_or(disk_every),
            every_minutes: number("TIERKEEP_OBJECT_EVERY_MINUTES")?,
            keep_hours: number("TIERKEEP_OBJECT_KEEP_HOURS")?,
            keep_last: number("TIERKEEP_OBJECT_KEEP_LAST")?.unwrap_or(3),
            keep_every: number("TIERKEEP_OBJECT_KEEP_EVERY")?,
            bytes_per_second_max: number("TIERKEEP_OBJECT_BYTES_PER_SECOND_MAX")?,
            compress: number::<u8>("TIERKEEP_OBJECT_COMPRESS")?.is_some_and(|on| on > 0),
            grace: grace()?,
            scrub: number("TIERKEEP_OBJECT_SCRUB_HOURS")?
                .map(|hours: u64| Duration::from_secs(hours.saturating_mul(3600))),
            wait: Duration::from_secs(4 * 3600),
        })
    }

    /// Checks what the fields say together with those of the disk.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the field.
    pub fn check(&self, disk_every: u64) -> Result<()> {
        check_run_name(self.url.rsplit('/').next().unwrap_or(""))?;
        let wrong = if self.every == 0 || self.keep_every == Some(0) {
            "object_every and object_keep_every count steps from 1".into()
        } else if !self.every.is_multiple_of(disk_every.max(1)) {
            format!(
                "object_every = {}, disk_every = {disk_every}: what goes to the bucket is read from disk, \
                 so object_every is a multiple of disk_every",
                self.every
            )
        } else if self.keep_last == 0 {
            "object_keep_last = 0: the last good checkpoint is never deleted, say 1 or more".into()
        } else if [self.keep_hours, self.every_minutes].contains(&Some(0))
            || self.scrub.is_some_and(|period| period.is_zero())
        {
            "object_keep_hours, object_every_minutes and TIERKEEP_OBJECT_SCRUB_HOURS are 1 or more"
                .into()
        } else if self.bytes_per_second_max == Some(0) {
            "object_bytes_per_second_max = 0: at least 1".into()
        } else {
            return Ok(());
        };
        Err(Error::invalid(wrong))
    }

    /// Opens the tier. Nothing is asked of the store yet.
    ///
    /// # Errors
    /// The options do not fit the URL.
    pub(crate) fn open(&self, clock: &SharedClock) -> Result<Arc<dyn Tier>> {
        let tier = object::open(&self.url, &self.options)?;
        Ok(match self.bytes_per_second_max {
            Some(limit) => Arc::new(Limited::new(tier, limit, clock.clone())),
            None => tier,
        })
    }
}

/// `TIERKEEP_OBJECT_GRACE_S`, else five minutes.
///
/// # Errors
/// It is not a whole number.
pub fn grace() -> Result<Duration> {
    Ok(Duration::from_secs(number("TIERKEEP_OBJECT_GRACE_S")?.unwrap_or(300)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_that_is_asked_for_wrongly_is_refused_by_name_and_keeps_its_secrets() {
        let bucket = || Bucket::new("s3://bucket/root/run/", 10).expect("a bucket");
        bucket().check(10).expect("the defaults fit");
        for (wrong, word) in [
            (Bucket { every: 0, ..bucket() }, "object_every"),
            (Bucket { every: 15, ..bucket() }, "multiple of disk_every"),
            (Bucket { keep_last: 0, ..bucket() }, "object_keep_last"),
            (Bucket { url: "s3://bucket/a b".into(), ..bucket() }, "a b"),
        ] {
            let e = wrong.check(10).expect_err(word);
            assert!(e.chain().contains(word), "{word}: {}", e.chain());
        }
        assert!(Bucket::new("/a/directory", 1).is_err());
        let options = Options::from([("aws_secret_access_key".into(), "hush".into())]);
        let shown = format!("{:?}", Bucket { options, ..bucket() });
        assert!(shown.contains("aws_secret_access_key") && !shown.contains("hush"), "{shown}");
    }
}
