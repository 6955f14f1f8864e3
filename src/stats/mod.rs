//! Paired statistics as pure functions: tests and intervals of a difference between two runs of
//! the same questions. Nothing here knows of runs or files.
//!
//! Every figure is held against scipy, statsmodels or numpy (`tests/golden/stats/compare.json`).

pub mod cluster;
pub mod holm;
pub mod mcnemar;
pub mod normal;
pub mod power;
pub mod resample;
pub mod tango;

#[cfg(test)]
mod tests;
