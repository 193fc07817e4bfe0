//! For tests, ours and yours: the contract that every tier keeps, and tiers that break it on a
//! schedule.

pub mod contract;
pub mod faulty;
pub mod hooked;
