//! A tier with a test's own code before and after each operation: one that waits for the test, one
//! that fails when a switch is thrown.

use std::{fmt, sync::Arc};

use crate::{
    error::Result,
    tier::{Created, Entry, Payload, Receipt, Source, Tier, TierKind},
};

/// Which operation of a tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // They are the methods of `Tier`.
pub enum Op {
    Put,
    Create,
    Open,
    List,
    Confirm,
    Delete,
    Mend,
    Retire,
}

/// One call of an operation.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Of the tier.
    pub kind: TierKind,
    /// Which.
    pub op: Op,
    /// On what.
    pub name: &'a str,
}

type Hook = Box<dyn Fn(Call<'_>) -> Result<()> + Send + Sync>;

/// A tier with hooks.
pub struct Hooked {
    inner: Arc<dyn Tier>,
    before: Hook,
    after: Hook,
}

impl fmt::Debug for Hooked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooked").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl Hooked {
    /// `before` runs before each operation; its error is the answer, and nothing is done.
    pub fn before(
        inner: Arc<dyn Tier>,
        before: impl Fn(Call<'_>) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self { inner, before: Box::new(before), after: Box::new(|_| Ok(())) }
    }

    /// `after` runs after each operation that succeeded; its error is the answer.
    pub fn after(
        inner: Arc<dyn Tier>,
        after: impl Fn(Call<'_>) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self { inner, before: Box::new(|_| Ok(())), after: Box::new(after) }
    }

    fn around<T>(&self, op: Op, name: &str, deed: impl FnOnce() -> Result<T>) -> Result<T> {
        let call = Call { kind: self.inner.kind(), op, name };
        (self.before)(call)?;
        let done = deed()?;
        (self.after)(call)?;
        Ok(done)
    }
}

#[deny(clippy::missing_trait_methods)]
impl Tier for Hooked {
    fn kind(&self) -> TierKind {
        self.inner.kind()
    }
    fn address(&self) -> String {
        self.inner.address()
    }
    fn put(&self, name: &str, payload: &dyn Payload) -> Result<Receipt> {
        self.around(Op::Put, name, || self.inner.put(name, payload))
    }
    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created> {
        self.around(Op::Create, name, || self.inner.create(name, bytes))
    }
    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        self.around(Op::Open, name, || self.inner.open(name))
    }
    fn list(&self, dir: &str) -> Result<Vec<Entry>> {
        self.around(Op::List, dir, || self.inner.list(dir))
    }
    fn confirm(&self, dir: &str) -> Result<()> {
        self.around(Op::Confirm, dir, || self.inner.confirm(dir))
    }
    fn delete(&self, name: &str) -> Result<()> {
        self.around(Op::Delete, name, || self.inner.delete(name))
    }
    fn mend(&self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        self.around(Op::Mend, name, || self.inner.mend(name, offset, bytes))
    }
    fn retire(&self, name: &str) -> Result<()> {
        self.around(Op::Retire, name, || self.inner.retire(name))
    }
    fn sweep(&self, stays: &dyn Fn(&str) -> bool) -> Result<usize> {
        self.inner.sweep(stays)
    }
}
