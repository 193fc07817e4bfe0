//! Trainers with an agent: what is saved through it, what it keeps when a trainer dies, what a trainer
//! keeps when the agent dies, and what a client that lies can do (nothing).
//!
//! Trainers and agents that are killed are this test binary run again.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // Tests: real processes, real time.
#![allow(clippy::print_stdout, clippy::print_stderr, unreachable_pub)]

mod clock;
#[path = "../common/mod.rs"]
mod common;
mod liars;
mod memory;
mod outlives;
mod runs;
mod through;
mod users;
mod world;
