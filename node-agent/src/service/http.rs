//! Pages for probes, for Prometheus and for people, over HTTP/1.1.
//!
//! Whoever reaches the port may read them: they hold no state and no secrets, and change nothing.
//!
//! # Invariants
//!
//! - A connection carries one request and ends, in time: none is held open by being slow.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{DefaultBodyLimit, State},
    http::{
        StatusCode,
        header::{
            CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY,
            X_CONTENT_TYPE_OPTIONS,
        },
    },
    response::{IntoResponse, Response},
    routing::get,
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tierkeep::{Error, Result, host::Host};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};

use super::{
    asking::Asking,
    looking::Looking,
    metrics,
    page::{self, Page},
};
use crate::cluster::Cluster;

/// Connections at once: a probe, a scraper, somebody who looks. Others wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 32;

/// How long the headers of a request may take, and one connection with all that it asks.
const HEADERS_WITHIN: Duration = Duration::from_secs(5);
const CONNECTION_WITHIN: Duration = Duration::from_secs(30);

/// Headers of a request: a line or two of them are of use.
const HEADER_BYTES_MAX: usize = 16 << 10;

/// No request needs a body.
const BODY_BYTES_MAX: usize = 1 << 10;

/// How long the host may take to answer. Kubernetes asks for less, and asks again.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Questions to the host at once; those of the status page are apart, so that no probe waits for them.
const QUESTIONS_MAX: usize = 2;

/// What the pages are about.
pub struct Seen {
    /// The agent's ranks.
    pub host: Arc<Host>,
    /// The others, where it has some.
    pub cluster: Option<Arc<Cluster>>,
    /// Where trainers come.
    pub socket: PathBuf,
}

/// Takes the address; nobody is answered yet.
///
/// # Errors
/// The address cannot be had.
pub async fn listen(addr: SocketAddr) -> Result<TcpListener> {
    let listener = TcpListener::bind(addr).await;
    listener.map_err(|source| Error::Io { what: format!("listen at {addr}"), source })
}

/// Answers whoever comes to `listener`, until `ending`.
pub async fn serve(seen: Seen, listener: TcpListener, ending: impl Future<Output = ()>) {
    let about = About::new(seen);
    let pages = pages(about.clone());
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let accepting = async {
        loop {
            let place = room.clone().acquire_owned().await;
            match listener.accept().await {
                Ok((stream, _)) => {
                    let answering = answer(stream, pages.clone());
                    tokio::spawn(async move {
                        // Who is too slow is let go.
                        let _ = timeout(CONNECTION_WITHIN, answering).await;
                        drop(place);
                    });
                }
                Err(e) => {
                    // Out of descriptors, say: those that are here go on.
                    tracing::error!("a request could not be let in: {e}");
                    sleep(Duration::from_millis(500)).await;
                }
            }
        }
    };
    tokio::select! {
        () = accepting => {}
        () = about.page.watch(ANSWER_WITHIN) => {}
        () = ending => {}
    }
}

async fn answer(stream: TcpStream, pages: Router) {
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_WITHIN)
        .max_buf_size(HEADER_BYTES_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(pages));
    if let Err(e) = served.await {
        tracing::debug!("a request was not answered: {e}");
    }
}

#[derive(Clone)]
struct About {
    asking: Asking,
    page: Arc<Page>,
}

impl About {
    fn new(Seen { host, cluster, socket }: Seen) -> Self {
        let looking = Looking::new(Asking::new(host.clone(), QUESTIONS_MAX), cluster);
        let page = Arc::new(Page::new(looking, socket));
        Self { asking: Asking::new(host, QUESTIONS_MAX), page }
    }
}

fn pages(about: About) -> Router {
    Router::new()
        .route("/", get(whole))
        .route("/status.json", get(status))
        .route("/healthz", get(health))
        .route("/readyz", get(ready))
        .route("/metrics", get(numbers))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(about)
}

/// What a person reads.
async fn whole() -> Response {
    let head = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CONTENT_SECURITY_POLICY, page::POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-store"),
    ];
    (head, page::HTML).into_response()
}

/// The same for programs.
async fn status(State(about): State<About>) -> Response {
    match about.page.data(ANSWER_WITHIN).await {
        Ok(data) => {
            let head = [(CONTENT_TYPE, "application/json"), (CACHE_CONTROL, "no-store")];
            (head, data.to_string()).into_response()
        }
        Err(e) => unavailable(&e),
    }
}

fn unavailable(error: &Error) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", error.chain())).into_response()
}

/// It runs: whoever hears this need not restart it.
async fn health() -> &'static str {
    "ok\n"
}

/// It can serve trainers: its ram tier answers.
async fn ready(State(about): State<About>) -> Response {
    let memory = about.asking.ask(ANSWER_WITHIN, Host::memory).await.flatten();
    match memory {
        Ok(_) => "ok\n".into_response(),
        Err(e) => {
            let why = format!("the ram tier does not answer: {}\n", e.chain());
            (StatusCode::SERVICE_UNAVAILABLE, why).into_response()
        }
    }
}

async fn numbers(State(about): State<About>) -> Response {
    let look = |host: &Host| (host.memory(), host.ranks(), host.peers(), host.leaving());
    let seen = about.asking.ask(ANSWER_WITHIN, look).await;
    let page = seen.and_then(|(memory, ranks, peers, leaving)| {
        // Ranks are told whatever the file system does.
        let memory = memory.inspect_err(|e| tracing::warn!("no RAM to count: {}", e.chain()));
        metrics::page(memory.ok(), ranks, peers, leaving.is_some())
    });
    match page {
        Ok(page) => ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], page).into_response(),
        Err(e) => unavailable(&e),
    }
}
