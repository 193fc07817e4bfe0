//! Questions to other agents, by gRPC.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use tierkeep::{Error, Result};
use tierkeep_proto::{peer as wire, peer_service::peer_client::PeerClient};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

use super::Tls;
use crate::cluster::Member;

/// How long another host may take to let us in.
const CONNECT_WITHIN: Duration = Duration::from_secs(3);

/// The largest answer: what a tier holds, with the manifests of its newest steps.
pub(super) const MESSAGE_BYTES_MAX: usize = 80 << 20;

/// The default windows are for small messages: a listing would take a round trip each 64 KiB.
const STREAM_WINDOW: u32 = 4 << 20;

/// One life of an agent.
type Life = (SocketAddr, u64);

pub(super) struct Control {
    tls: Option<Arc<Tls>>,
    runtime: tokio::runtime::Handle,
    channels: Mutex<HashMap<Life, Channel>>,
}

impl Control {
    pub(super) fn new(tls: Option<Arc<Tls>>, runtime: tokio::runtime::Handle) -> Self {
        Self { tls, runtime, channels: Mutex::default() }
    }

    /// Blocks until it is answered, or the time is over; `None`: it is known to have `moved`.
    pub(super) fn ask(
        &self,
        member: &Member,
        request: wire::Request,
        within: Duration,
        moved: impl Future<Output = ()>,
    ) -> Option<Result<wire::Reply>> {
        let mut client = PeerClient::new(self.channel(member))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let asked = self.runtime.block_on(async {
            tokio::select! {
                asked = timeout(within, client.ask(request)) => Some(asked),
                () = moved => None,
            }
        });
        let failed = |source: io::Error| Error::Io {
            what: format!("ask {} at {}", member.name, member.address),
            source,
        };
        Some(match asked? {
            Ok(Ok(reply)) => Ok(reply.into_inner()),
            Ok(Err(status)) => Err(failed(io::Error::other(words(&status)))),
            Err(_) => Err(failed(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no answer within {} s", within.as_secs_f64()),
            ))),
        })
    }

    fn channel(&self, member: &Member) -> Channel {
        let life = (member.address, member.life);
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(&life) {
            return channel.clone();
        }
        // Of one address the newest life counts.
        channels.retain(|(address, _), _| *address != member.address);
        let (tls, address) = (self.tls.clone(), member.address);
        let connect = tower::service_fn(move |_: Uri| {
            let tls = tls.clone();
            async move { connected(address, tls).await }
        });
        // The name is for people: where it leads, the connector knows.
        let endpoint = Endpoint::from_static("http://tierkeep")
            .connect_timeout(CONNECT_WITHIN)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(2 * STREAM_WINDOW)
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(5))
            .keep_alive_while_idle(false);
        let _inside = self.runtime.enter();
        let channel = endpoint.connect_with_connector_lazy(connect);
        channels.insert(life, channel.clone());
        channel
    }
}

/// A stream of either kind.
pub(super) trait Stream:
    tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin
{
}

impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Stream for T {}

async fn connected(
    address: SocketAddr,
    tls: Option<Arc<Tls>>,
) -> io::Result<TokioIo<Box<dyn Stream>>> {
    let stream = connect(address).await?;
    Ok(TokioIo::new(match tls {
        None => Box::new(stream) as Box<dyn Stream>,
        Some(tls) => {
            let mut config = (*tls.client()).clone();
            config.alpn_protocols = vec![b"h2".to_vec()];
            Box::new(TlsConnector::from(Arc::new(config)).connect(tls.name(), stream).await?)
        }
    }))
}

/// A connection to another agent's port.
pub(super) async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = timeout(CONNECT_WITHIN, TcpStream::connect(address)).await;
    let stream = stream.map_err(|_| {
        let why = format!("no connection within {} s", CONNECT_WITHIN.as_secs());
        io::Error::new(io::ErrorKind::TimedOut, why)
    })??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A status with its causes: `transport error` alone helps nobody.
fn words(status: &tonic::Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(e) = cause {
        let more = e.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = e.source();
    }
    text
}
