//! What a running agent offers people and programs, beside the trainers' socket.
//!
//! It owns words on the wire: gRPC for the command (`control`), pages for probes and for Prometheus
//! (`http`). It decides nothing: it asks the core's host.

mod asking;

pub mod control;
pub mod http;
mod metrics;
