//! Where the requests to object storage run: a small runtime of its own, apart from the training and from
//! the agent's, and the bridge to it from threads that block.
//!
//! Requests are signed with the credentials of this process. The files where those stand (a profile, the
//! token of a workload identity) are read as this process, whichever user an agent's thread acts for.

use std::{future::Future, sync::LazyLock, time::Duration};

use tokio::runtime::{Builder, Runtime};

use crate::sys::AsItself;

/// Threads that move bytes between sockets and buffers. TLS takes one core for each 1 to 2 GB/s; two leave
/// the training its cores.
const THREADS: usize = 2;

static HANDS: LazyLock<Runtime> = LazyLock::new(|| {
    // With two providers compiled in and none installed, rustls panics at the first connection. Somebody
    // else may have installed one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let built = Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("tierkeep-object")
        .on_thread_start(|| std::mem::forget(AsItself::begin()))
        .enable_all()
        .build();
    match built {
        Ok(runtime) => runtime,
        // No thread or no descriptor is to be had: nothing else would work either.
        Err(e) => panic!("could not start the threads for object storage: {e}"),
    }
});

/// The runtime.
pub(super) fn hands() -> &'static Runtime {
    &HANDS
}

/// Waits for `work` on a thread that may block.
pub(super) fn wait<T>(work: impl Future<Output = T>) -> T {
    let _credentials = AsItself::begin();
    HANDS.block_on(work)
}

/// The same within `limit`; `None` where it took longer.
pub(super) fn wait_within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    let _credentials = AsItself::begin();
    HANDS.block_on(async { tokio::time::timeout(limit, work).await.ok() })
}
