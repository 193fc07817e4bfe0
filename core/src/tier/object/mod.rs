//! The tier that survives the cluster: a bucket that speaks S3, Google's or Azure's protocol.
//!
//! `object_store` is the client: credentials, signatures, listings, reads, small files and their conditional
//! creation. What is here is what it does not have: uploads that are taken up again, checked by the
//! checksums of the save, and counted; and words for mistakes.
//!
//! Objects do not change: a name that is there has all its bytes, and has had them since it appeared. There
//! are no directories. A reader of an object that is deleted is told that it is not there.
//!
//! # Invariants
//!
//! - A receipt is given for an object whose length, and checksum where the store keeps one, were asked for
//!   after it was written.
//! - `create` has one winner, by the store's own conditional write; what a store without one can give stands
//!   in `create.rs`.
//! - No call waits for ever: a request that makes no progress for half a minute is sent again, and given up
//!   after a few tries.

pub mod address;
mod ahead;
mod ask;
mod create;
mod credentials;
mod explain;
mod hands;
mod library;
mod profile;
mod read;
mod s3;
mod upload;
mod wire;

use std::{sync::Arc, time::Duration};

use backon::BlockingRetryable;
use object_store::{ObjectStoreExt, path::Path};

use self::{
    address::{Address, Options},
    ask::Store,
    create::{Creates, Way},
    explain::explain,
    hands::wait,
    read::{Object, Record},
    upload::{Met, STALLED, Upload, patience},
    wire::{Failure, Unfinished, Wire},
};
use super::{
    Created, Entry, Payload, Receipt, Source, Tier, TierKind, buffer::AlignedBuf, disk::DiskTier,
    posix::same_bytes,
};
use crate::{
    config::number,
    error::{Error, ErrorKind, Result},
    record::RECORD_BYTES_MAX,
    sys::AsItself,
};

/// Requests at a time for one payload, either way. One connection is given 50 to 90 MB/s by the large stores:
/// so many of them fill 10 to 20 Gbit/s. `TIERKEEP_OBJECT_REQUESTS_MAX`.
const REQUESTS_MAX: usize = 32;

/// A place in a bucket.
#[derive(Debug)]
pub struct ObjectTier {
    address: Address,
    store: Store,
    creates: Creates,
    wire: Arc<dyn Wire>,
    /// Requests at a time for one payload.
    requests: usize,
    /// How long one of an upload may make no progress.
    stalled: Duration,
}

/// Opens the place that `url` names: a bucket, or a directory that several nodes share (`file://`).
///
/// # Errors
/// It is no address, or the options do not fit it.
pub fn open(url: &str, options: &Options) -> Result<Arc<dyn Tier>> {
    if let Some(path) = url.strip_prefix("file://") {
        if !path.starts_with('/') {
            return Err(Error::invalid(format!(
                "{url:?} is no address: file:// and an absolute path"
            )));
        }
        if let Some(name) = options.keys().next() {
            return Err(Error::invalid(format!("{name:?}: a directory has no options")));
        }
        return Ok(Arc::new(DiskTier::shared(std::path::Path::new(path))));
    }
    Ok(Arc::new(ObjectTier::open(&url.parse()?, options)?))
}

impl ObjectTier {
    /// Opens it. Nothing is asked of the store yet: [`ObjectTier::check`] does.
    ///
    /// # Errors
    /// The options do not fit the address.
    pub fn open(address: &Address, options: &Options) -> Result<Self> {
        let requests = number("TIERKEEP_OBJECT_REQUESTS_MAX")?.unwrap_or(REQUESTS_MAX);
        if requests == 0 {
            return Err(Error::invalid("TIERKEEP_OBJECT_REQUESTS_MAX = 0: at least 1"));
        }
        let credentials = AsItself::begin();
        let (store, creates, wire) = address.connect(options)?;
        drop(credentials);
        let stalled = STALLED;
        Ok(Self { address: address.clone(), store, creates, wire, requests, stalled })
    }

    /// The same, less patient with a store that stalls: for tests.
    #[doc(hidden)]
    #[must_use]
    pub fn stalls_after(self, stalled: Duration) -> Self {
        Self { stalled, ..self }
    }

    /// Asks whether the bucket is there and may be listed, and whether it decides which of two writers of one
    /// name was first. Credentials that may only read are not asked that.
    ///
    /// # Errors
    /// One sentence that names what is wrong and what to do.
    pub fn check(&self) -> Result<()> {
        self.list("")?;
        match self.decides_who_was_first() {
            Err(e) if e.kind() == ErrorKind::Invalid => Ok(()),
            other => other.map(drop),
        }
    }

    /// Whether the store decides itself which of two writers of one name was first. Where it does not, that
    /// is told once, and the writers look and read back.
    ///
    /// # Errors
    /// The store did not answer, or may not be written to.
    pub fn decides_who_was_first(&self) -> Result<bool> {
        let address = self.address.to_string();
        let way = self.creates.way(&self.store, (self.address.prefix(), &address));
        way.map(|way| way == Way::Conditional)
            .map_err(|e| explain(&self.address, format!("create something in {address}"), e))
    }

    /// How many uploads below this place were begun and not ended; `None` where the store does not tell.
    ///
    /// # Errors
    /// The store did not answer.
    pub fn unfinished(&self) -> Result<Option<usize>> {
        Ok(self.uploads()?.map(|uploads| uploads.len()))
    }

    fn uploads(&self) -> Result<Option<Vec<Unfinished>>> {
        let prefix = self.address.prefix();
        let list = || wait(self.wire.unfinished(prefix));
        let found = list.retry(patience()).when(Failure::passes()).call();
        let deed = || format!("list the uploads in {}", self.address);
        let mut found = found.map_err(|e| e.explained(&self.address, deed()))?;
        // `run2` begins with `run` too.
        found.iter_mut().for_each(|all| all.retain(|upload| upload.to.prefix_matches(prefix)));
        Ok(found)
    }

    fn path(&self, name: &str) -> Result<Path> {
        let good =
            |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
        let wrong = || Error::invalid(format!("{name:?} is not a name in a tier"));
        if !name.split('/').all(good) {
            return Err(wrong());
        }
        let prefix = self.address.prefix().as_ref();
        let full = if prefix.is_empty() { name.into() } else { format!("{prefix}/{name}") };
        Path::parse(full).map_err(|_| wrong())
    }

    fn label(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    fn explained(&self, verb: &str, name: &str, e: object_store::Error) -> Error {
        explain(&self.address, format!("{verb} {}", self.label(name)), e)
    }

    fn upload<'a>(&'a self, to: &'a Path, payload: &'a dyn Payload) -> Upload<'a> {
        let (wire, address) = (self.wire.clone(), &self.address);
        let (in_flight, stalled) = (self.requests, self.stalled);
        Upload { wire, address, to, payload, in_flight, stalled }
    }
}

impl Tier for ObjectTier {
    fn kind(&self) -> TierKind {
        TierKind::Object
    }

    fn address(&self) -> String {
        self.address.to_string()
    }

    fn put(&self, name: &str, payload: &dyn Payload) -> Result<Receipt> {
        let path = self.path(name)?;
        let receipt = Receipt { tier: TierKind::Object, name: name.into(), length: payload.len() };
        // A name has a random word of its writer: nobody else makes it between this look and the write.
        let upload = self.upload(&path, payload);
        match upload.meets()? {
            None => upload.run()?,
            Some(Met::Same) => {}
            Some(Met::Unknown) if same_bytes(&*self.open(name)?, payload)? => {}
            Some(_) => {
                return Err(Error::invalid(format!("{} is there already", self.label(name))));
            }
        }
        Ok(receipt)
    }

    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created> {
        let path = self.path(name)?;
        let address = self.address.to_string();
        let place = (self.address.prefix(), &*address);
        let created = self.creates.create(&self.store, place, &path, bytes);
        created.map_err(|e| self.explained("create", name, e))
    }

    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        let path = self.path(name)?;
        let failed = |e| self.explained("read", name, e);
        if name.ends_with(".json") {
            // One request instead of two: it is read whole.
            let read = self.store.ask(|store| {
                wait(async {
                    let got = store.get(&path).await?;
                    match got.meta.size <= RECORD_BYTES_MAX {
                        true => got.bytes().await.map(Some),
                        false => Ok(None),
                    }
                })
            });
            if let Some(bytes) = read.map_err(failed)? {
                return Ok(Box::new(Record(bytes.to_vec())));
            }
        }
        let look = || wait(self.wire.stat(&path));
        let stat = look.retry(patience()).when(Failure::passes()).call();
        let deed = || format!("read {}", self.label(name));
        let stat = stat.map_err(|e| e.explained(&self.address, deed()))?;
        let stat = stat.ok_or_else(|| Error::NotFound { what: self.label(name) })?;
        let (store, address) = (self.store.clone(), self.address.clone());
        Ok(Box::new(Object::new(store, address, path, stat, self.requests)))
    }

    fn list(&self, dir: &str) -> Result<Vec<Entry>> {
        let path = if dir.is_empty() { self.address.prefix().clone() } else { self.path(dir)? };
        let listed = self.store.ask(|store| wait(store.list_with_delimiter(Some(&path))));
        let listed = listed.map_err(|e| self.explained("list", dir, e))?;
        let entry =
            |path: &Path, is_dir| path.filename().map(|name| Entry { name: name.into(), is_dir });
        let dirs = listed.common_prefixes.iter().filter_map(|path| entry(path, true));
        // `dir/` itself, an empty object: some stores keep one where a directory was, and list it in there.
        let objects = listed.objects.iter().filter(|meta| meta.location != path);
        let files = objects.filter_map(|meta| entry(&meta.location, false));
        let mut entries: Vec<Entry> = dirs.chain(files).collect();
        entries.sort();
        Ok(entries)
    }

    fn confirm(&self, _dir: &str) -> Result<()> {
        Ok(()) // What a store lists, it has.
    }

    fn delete(&self, name: &str) -> Result<()> {
        let path = self.path(name)?;
        match self.store.ask(|store| wait(store.delete(&path))) {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(self.explained("delete", name, e)),
        }
    }

    fn mend(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let path = self.path(name)?;
        let source = self.open(name)?;
        // An object is replaced as a whole: whoever reads it meanwhile has the old one or the new one.
        self.upload(&path, &Mended { source: &*source, offset, bytes }).run()
    }

    fn retire(&self, name: &str) -> Result<()> {
        self.delete(name)
    }

    fn sweep(&self, stays: &dyn Fn(&str) -> bool) -> Result<usize> {
        let prefix = self.address.prefix().as_ref();
        let mut ended = 0;
        for Unfinished { to, id } in self.uploads()?.unwrap_or_default() {
            let name = to.as_ref().strip_prefix(prefix).unwrap_or("").trim_start_matches('/');
            if !stays(name) {
                let end = || wait(self.wire.abort(&to, &id));
                let end = end.retry(patience()).when(Failure::passes()).call();
                let deed = || format!("end the upload of {}", self.label(name));
                end.map_err(|e| e.explained(&self.address, deed()))?;
                ended += 1;
            }
        }
        Ok(ended)
    }
}

/// An object with some of its bytes replaced.
struct Mended<'a> {
    source: &'a dyn Source,
    offset: u64,
    bytes: &'a [u8],
}

impl Payload for Mended<'_> {
    fn len(&self) -> u64 {
        self.source.len()
    }

    fn block<'a>(
        &'a self,
        offset: u64,
        len: usize,
        scratch: &'a mut AlignedBuf,
    ) -> Result<&'a [u8]> {
        scratch.ensure(len);
        let there =
            usize::try_from(self.len().saturating_sub(offset)).unwrap_or(usize::MAX).min(len);
        self.source.read_at(offset, &mut scratch[..there])?;
        scratch[there..len].fill(0);
        let (begin, end) = (
            self.offset.max(offset),
            (self.offset + self.bytes.len() as u64).min(offset + there as u64),
        );
        if begin < end {
            let at = |x: u64, from: u64| usize::try_from(x - from).unwrap_or(usize::MAX);
            scratch[at(begin, offset)..at(end, offset)]
                .copy_from_slice(&self.bytes[at(begin, self.offset)..at(end, self.offset)]);
        }
        Ok(&scratch[..len])
    }
}
