//! Bringing a state back: decide (which attempt and step), plan (which bytes, from which tier),
//! read and check.

pub mod decide;
pub mod read;
pub mod reading;
pub mod survey;
pub mod copy_out;
