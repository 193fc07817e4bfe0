//! Stores that are spoken to through `object_store` alone: Google's and Azure's, and doubles in tests.
//!
//! A part is collected before it is sent, and what arrived is checked by its length: the protocols have
//! other checksums than CRC-32. TLS protects the bytes on their way.

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use object_store::{
    ObjectStore, ObjectStoreExt, PutPayload,
    multipart::{MultipartStore, PartId},
    path::Path,
};

use super::wire::{Body, Failure, Stat, Stored, Tag, Unfinished, Wire};

/// A store through the library.
pub(super) struct Library<S> {
    store: Arc<S>,
}

impl<S> Library<S> {
    pub(super) fn new(store: Arc<S>) -> Self {
        Self { store }
    }
}

impl<S: fmt::Display> fmt::Debug for Library<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.store.fmt(f)
    }
}

async fn collected(mut body: Body) -> Result<PutPayload, Failure> {
    let mut blocks = Vec::new();
    while let Some(block) = body.blocks.recv().await {
        blocks.push(block.map_err(|e| Failure::NoAnswer(e.to_string()))?);
    }
    let payload = PutPayload::from_iter(blocks);
    if payload.content_length() as u64 != body.len {
        return Err(Failure::NoAnswer("the bytes broke off".into()));
    }
    Ok(payload)
}

#[async_trait]
impl<S: ObjectStore + MultipartStore + fmt::Display> Wire for Library<S> {
    async fn put(&self, to: &Path, body: Body, _crc: u32) -> Result<(), Failure> {
        let payload = collected(body).await?;
        self.store.put(to, payload).await.map(drop).map_err(Failure::from)
    }

    async fn begin(&self, to: &Path) -> Result<String, Failure> {
        Ok(self.store.create_multipart(to).await?)
    }

    async fn part(
        &self,
        to: &Path,
        id: &str,
        index: u32,
        body: Body,
        _crc: u32,
    ) -> Result<Tag, Failure> {
        let payload = collected(body).await?;
        let part = self.store.put_part(to, &id.to_owned(), index as usize, payload).await?;
        Ok(Tag(part.content_id))
    }

    async fn complete(
        &self,
        to: &Path,
        id: &str,
        parts: Vec<Tag>,
        _crc: u32,
    ) -> Result<(), Failure> {
        let parts = parts.into_iter().map(|Tag(content_id)| PartId { content_id }).collect();
        self.store
            .complete_multipart(to, &id.to_owned(), parts)
            .await
            .map(drop)
            .map_err(Failure::from)
    }

    async fn stat(&self, at: &Path) -> Result<Option<Stat>, Failure> {
        match self.store.head(at).await {
            Ok(meta) => Ok(Some(Stat { len: meta.size, crc32: None })),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    async fn unfinished(&self, _below: &Path) -> Result<Option<Vec<Unfinished>>, Failure> {
        Ok(None)
    }

    async fn parts(&self, _to: &Path, _id: &str) -> Result<Vec<Stored>, Failure> {
        Ok(Vec::new())
    }

    async fn abort(&self, to: &Path, id: &str) -> Result<(), Failure> {
        self.store.abort_multipart(to, &id.to_owned()).await.map_err(Failure::from)
    }
}
