//! Objects that are read: small ones whole, large ones in ranges.

use std::{ops::Range, sync::Arc};

use futures_util::TryStreamExt;
use object_store::{GetOptions, ObjectStore, ObjectStoreExt, path::Path};
use tokio::sync::Semaphore;

use super::{
    address::Address,
    ahead::{Ahead, OnItsWay},
    ask::Store,
    explain::explain,
    hands::{hands, wait},
    wire::Stat,
};
use crate::{error::Result, tier::Source};

/// A small object, read whole.
pub(super) struct Record(pub(super) Vec<u8>);

impl Source for Record {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let begin = usize::try_from(offset).unwrap_or(usize::MAX).min(self.0.len());
        let there = &self.0[begin..];
        let count = there.len().min(into.len());
        into[..count].copy_from_slice(&there[..count]);
        Ok(())
    }
}

/// A large one, read in ranges.
pub(super) struct Object {
    store: Store,
    address: Address,
    path: Path,
    ahead: Ahead,
    /// Of requests at a time: of those who read, and of what is read ahead for them.
    permits: Arc<Semaphore>,
    len: u64,
    /// As the store has it.
    crc32: Option<u32>,
}

impl Object {
    /// What the store tells of under `path`, of which not more than `requests` ranges are on their way at a
    /// time.
    pub(super) fn new(
        store: Store,
        address: Address,
        path: Path,
        stat: Stat,
        requests: usize,
    ) -> Self {
        let Stat { len, crc32 } = stat;
        let (ahead, permits) = (Ahead::new(len, requests), Arc::new(Semaphore::new(requests)));
        Self { store, address, path, ahead, permits, len, crc32 }
    }

    /// Begins to fetch a range.
    fn ask(&self, range: Range<u64>) -> OnItsWay {
        let (store, path) = (self.store.inner.clone(), self.path.clone());
        let (len, permits) = (range.end - range.start, self.permits.clone());
        let fetch = async move {
            let _permit = permits.acquire().await; // They are never closed.
            store.get_range(&path, range).await
        };
        OnItsWay::new(hands().spawn(fetch), len)
    }

    async fn read(
        &self,
        store: &dyn ObjectStore,
        offset: u64,
        into: &mut [u8],
    ) -> Result<(), object_store::Error> {
        let _permit = self.permits.acquire().await;
        let options = GetOptions::new().with_range(Some(offset..offset + into.len() as u64));
        let got = store.get_opts(&self.path, options).await?;
        let mut blocks = got.into_stream();
        let mut at = 0;
        while let Some(block) = blocks.try_next().await? {
            let room = into.len() - at;
            let count = block.len().min(room);
            into[at..at + count].copy_from_slice(&block[..count]);
            at += count;
        }
        if at < into.len() {
            let source = format!("{at} of {} bytes came", into.len()).into();
            return Err(object_store::Error::Generic { store: "object", source });
        }
        Ok(())
    }
}

impl Source for Object {
    fn len(&self) -> u64 {
        self.len
    }

    fn crc32(&self) -> Option<u32> {
        self.crc32
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let there = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let count = there.min(into.len());
        if count == 0 {
            return Ok(());
        }
        let into = &mut into[..count];
        if let Some(on_its_way) = self.ahead.reads(offset, count as u64, |range| self.ask(range))
            && let Some(bytes) = wait(on_its_way.bytes())
            && bytes.len() == count
        {
            into.copy_from_slice(&bytes);
            return Ok(());
        }
        let read = self.store.ask(|store| wait(self.read(store, offset, into)));
        read.map_err(|e| {
            let what =
                format!("read {}://{}/{}", self.address.scheme(), self.address.bucket(), self.path);
            explain(&self.address, what, e)
        })
    }
}
