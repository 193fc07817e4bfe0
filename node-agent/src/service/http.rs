//! Pages for probes and for Prometheus, over HTTP/1.1.
//!
//! Whoever reaches the port may read them: they hold no state and no secrets, and change nothing.
//!
//! # Invariants
//!
//! - A connection carries one request and ends, in time: none is held open by being slow.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{DefaultBodyLimit, State},
    http::{StatusCode, header::CONTENT_TYPE},
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

use super::{asking::Asking, metrics};

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

/// Questions to the host at once.
const QUESTIONS_MAX: usize = 2;

/// Answers at `addr` until `ending`.
///
/// # Errors
/// The address cannot be had.
pub async fn serve(
    host: Arc<Host>,
    addr: SocketAddr,
    ending: impl Future<Output = ()>,
) -> Result<()> {
    serve_at(host, listen(addr).await?, ending).await;
    Ok(())
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
pub async fn serve_at(host: Arc<Host>, listener: TcpListener, ending: impl Future<Output = ()>) {
    let pages = pages(host);
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

fn pages(host: Arc<Host>) -> Router {
    Router::new()
        .route("/healthz", get(health))
        .route("/readyz", get(ready))
        .route("/metrics", get(numbers))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(Asking::new(host, QUESTIONS_MAX))
}

/// It runs: whoever hears this need not restart it.
async fn health() -> &'static str {
    "ok\n"
}

/// It can serve trainers: its ram tier answers.
async fn ready(State(asking): State<Asking>) -> Response {
    let memory = asking.ask(ANSWER_WITHIN, Host::memory).await.flatten();
    match memory {
        Ok(_) => "ok\n".into_response(),
        Err(e) => {
            let why = format!("the ram tier does not answer: {}\n", e.chain());
            (StatusCode::SERVICE_UNAVAILABLE, why).into_response()
        }
    }
}

async fn numbers(State(asking): State<Asking>) -> Response {
    let look = |host: &Host| (host.memory(), host.ranks(), host.peers());
    let seen = asking.ask(ANSWER_WITHIN, look).await;
    let page = seen.and_then(|(memory, ranks, peers)| {
        // Ranks are told whatever the file system does.
        let memory = memory.inspect_err(|e| tracing::warn!("no RAM to count: {}", e.chain()));
        metrics::page(memory.ok(), ranks, peers)
    });
    match page {
        Ok(page) => ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], page).into_response(),
        Err(e) => (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", e.chain())).into_response(),
    }
}
