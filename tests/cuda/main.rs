//! The CUDA backend on a GPU: kernels against plain sums, logits against the goldens, and the
//! promise about bits. Run by `just test-gpu`; without a GPU these tests fail.
//!
//! Kernels by themselves: [`dense`] and [`experts`] products, [`routing`], [`sampling`]. The
//! backend on the models of [`golden`]: [`bits`], [`steps`], [`damage`].

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]
#![allow(clippy::print_stdout, reason = "figures of a run, shown when it fails")]

mod bits;
mod common;
mod damage;
mod dense;
mod experts;
mod golden;
mod routing;
mod sampling;
mod steps;
#[path = "../support/mod.rs"]
mod support;
