//! Bringing a state back: decide (which attempt and step), plan (which bytes, from which tier),
//! read and check.

pub(crate) mod asks;
pub mod decide;
pub mod parts;
pub mod read;
pub mod reading;
pub mod reshard;
pub mod survey;
pub mod copy_out;
