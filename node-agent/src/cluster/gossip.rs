//! chitchat's packets by UDP, each under the cluster's key.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::Context;
use async_trait::async_trait;
use chitchat::{
    ChitchatMessage, Deserializable, Serializable,
    transport::{Socket, Transport},
};
use tokio::net::UdpSocket;

use super::packet::{Key, PACKET_BYTES_MAX, Unpacking, pack};

/// Packets that were refused.
pub(super) type Refused = Arc<AtomicU64>;

/// UDP under a key.
pub(super) struct Keyed {
    pub(super) key: Key,
    pub(super) refused: Refused,
}

struct KeyedSocket {
    socket: UdpSocket,
    key: Key,
    /// Counts from a random number: no two runs of an agent use the same.
    next: u64,
    unpacking: Unpacking<SocketAddr>,
    /// One byte more than the longest: what is longer is seen to be.
    buffer: Box<[u8; PACKET_BYTES_MAX + 1]>,
    refused: Refused,
}

#[async_trait]
impl Transport for Keyed {
    async fn open(&self, address: SocketAddr) -> anyhow::Result<Box<dyn Socket>> {
        let socket = UdpSocket::bind(address).await;
        let socket = socket.with_context(|| format!("listen at {address}/udp for gossip"))?;
        let mut next = [0; 8];
        getrandom::fill(&mut next).map_err(io::Error::other)?;
        Ok(Box::new(KeyedSocket {
            socket,
            key: self.key.clone(),
            next: u64::from_le_bytes(next),
            unpacking: Unpacking::new(self.key.clone()),
            buffer: Box::new([0; PACKET_BYTES_MAX + 1]),
            refused: self.refused.clone(),
        }))
    }
}

#[async_trait]
impl Socket for KeyedSocket {
    async fn send(&mut self, to: SocketAddr, message: ChitchatMessage) -> anyhow::Result<()> {
        self.next = self.next.wrapping_add(1);
        let bytes = message.serialize_to_vec();
        let Some(datagrams) = pack(&self.key, self.next, &bytes) else {
            tracing::error!("{} bytes of gossip are too many: not sent to {to}", bytes.len());
            return Ok(());
        };
        for datagram in datagrams {
            // An address that cannot be reached is one peer's trouble, not the socket's.
            if let Err(e) = self.socket.send_to(&datagram, to).await {
                tracing::debug!("gossip to {to}: {e}");
                break;
            }
        }
        Ok(())
    }

    /// May be dropped while it waits: nothing that was received is lost by it.
    async fn recv(&mut self) -> anyhow::Result<(SocketAddr, ChitchatMessage)> {
        loop {
            let (len, from) = match self.socket.recv_from(&mut self.buffer[..]).await {
                Ok(received) => received,
                // What was sent before met nobody.
                Err(e) if may_pass(&e) => continue,
                Err(e) => return Err(e).context("receive gossip"),
            };
            let taken = self.unpacking.take(from, &self.buffer[..len]);
            let message = taken.and_then(|whole| {
                let read = |bytes: Vec<u8>| ChitchatMessage::deserialize(&mut &bytes[..]);
                whole.map(read).transpose().map_err(|_| "it is not a message of chitchat's")
            });
            match message {
                Ok(Some(message)) => return Ok((from, message)),
                Ok(None) => {}
                Err(why) => {
                    self.refused.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!("a packet of gossip from {from} is refused: {why}");
                }
            }
        }
    }
}

fn may_pass(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::OutOfMemory
            | Kind::ConnectionReset
            | Kind::ConnectionRefused
            | Kind::HostUnreachable
            | Kind::NetworkUnreachable
            | Kind::Interrupted
    )
}
