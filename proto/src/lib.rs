//! What tierkeep's processes say to each other, as types. The sentences are in `proto/*.proto`.

/// A trainer and the agent of its node, over one unix socket.
///
/// A frame is four bytes of length (little-endian), then a message: [`Request`](trainer::Request)
/// from the trainer, [`Reply`](trainer::Reply) from the agent. Descriptors travel beside a frame's
/// first byte.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod trainer {
    include!(concat!(env!("OUT_DIR"), "/tierkeep.trainer.rs"));
}

/// One agent and another.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod peer {
    include!(concat!(env!("OUT_DIR"), "/tierkeep.peer.rs"));
}

/// One agent and another, by gRPC.
#[cfg(feature = "control")]
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod peer_service {
    include!(concat!(env!("OUT_DIR"), "/tierkeep.peer.Peer.rs"));
}

/// A kubelet, and what offers an agent's socket to its pods.
#[cfg(feature = "control")]
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod deviceplugin {
    include!(concat!(env!("OUT_DIR"), "/v1beta1.rs"));
}

/// People and programs, and an agent: gRPC over a unix socket that only the agent's user can open.
#[cfg(feature = "control")]
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod control {
    include!(concat!(env!("OUT_DIR"), "/tierkeep.control.rs"));
}
