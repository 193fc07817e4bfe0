//! What is asked of a store through the library, once more where that helps.

use std::sync::Arc;

use backon::BlockingRetryable;
use object_store::{Error, ObjectStore};

use super::{credentials::Credentials, explain::chain, upload::patience, wire::is_stale};

/// A store, and what its requests are signed with where that can be renewed.
#[derive(Clone, Debug)]
pub(super) struct Store {
    pub(super) inner: Arc<dyn ObjectStore>,
    pub(super) credentials: Option<Arc<Credentials>>,
}

impl Store {
    /// Asks, again where an answer broke off, and once more where the credentials were refused.
    pub(super) fn ask<T>(
        &self,
        mut deed: impl FnMut(&dyn ObjectStore) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let once = || {
            let used = self.credentials.as_ref().map(|credentials| credentials.count());
            let answer = deed(&*self.inner);
            if let (Err(e), Some(used), Some(credentials)) = (&answer, used, &self.credentials)
                && refuses_credentials(e)
            {
                credentials.renew(used);
            }
            answer
        };
        let mut renewed = self.credentials.is_none();
        let passes = |e: &Error| {
            let stale = refuses_credentials(e) && !std::mem::replace(&mut renewed, true);
            stale || broke_off(e)
        };
        once.retry(patience()).when(passes).call()
    }
}

/// An answer that began well and broke off. Whatever else the network does, the library has tried again.
fn broke_off(e: &Error) -> bool {
    matches!(e, Error::Generic { .. }) && {
        let text = chain(e);
        !text.contains("Error performing") && !text.contains("credential")
    }
}

/// The store's word for credentials that are no good any more; to a HEAD it has none, just a status.
fn refuses_credentials(e: &Error) -> bool {
    use Error::{Generic, PermissionDenied, Unauthenticated};
    if !matches!(e, Generic { .. } | PermissionDenied { .. } | Unauthenticated { .. }) {
        return false;
    }
    let text = chain(e);
    let code = text.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>"));
    match code {
        Some((code, _)) => is_stale(code),
        None => ["401 Unauthorized", "403 Forbidden", "400 Bad Request"]
            .iter()
            .any(|status| text.contains(status)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_that_ended_are_told_from_a_lack_of_rights() {
        let generic = |text: &str| Error::Generic { store: "S3", source: text.into() };
        let said = |code: &str| {
            generic(&format!("Error performing GET x: 400 Bad Request: <Error><Code>{code}</Code>"))
        };
        assert!(refuses_credentials(&said("ExpiredToken")));
        assert!(refuses_credentials(&generic("Error performing HEAD x: 403 Forbidden: ")));
        assert!(!refuses_credentials(&said("AccessDenied")) && !broke_off(&said("SlowDown")));
        assert!(broke_off(&generic("error reading a body from connection")));
    }
}
