//! Which precisions fit a budget, and how many slots each leaves room for.

use super::{full_pages, total};
use crate::engine::{BackendMemory, EngineShape};

/// Most slots that a fit counts up to: the largest decode batch.
pub const MAX_FIT_SLOTS: usize = 1024;

/// Slots that fit a budget at one context, every one of them at its full length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct FitCell {
    pub max_context: usize,
    /// 0 where not even one fits.
    pub n_slots: usize,
}

/// What a precision leaves room for.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PrecisionFit {
    pub precision: &'static str,
    pub weights_bytes: u64,
    /// Weights, workspace and one slot at the shortest context.
    pub least_bytes: u64,
    pub fits: bool,
    pub cells: Vec<FitCell>,
}

/// Fits one precision; `memory` gives the bytes of a shape in it.
pub fn fit(
    precision: &'static str,
    contexts: &[usize],
    prefill_rows: usize,
    budget_bytes: u64,
    memory: impl Fn(&EngineShape) -> BackendMemory,
) -> PrecisionFit {
    let shape = |n_slots: usize, max_context: usize| EngineShape {
        n_slots,
        n_forks: 0,
        n_pages: full_pages(n_slots, max_context, 0),
        max_context,
        prefill_rows,
    };
    let shortest = contexts.iter().copied().min().unwrap_or(1);
    let least = memory(&shape(1, shortest));
    let cells: Vec<FitCell> = contexts
        .iter()
        .map(|&max_context| FitCell {
            max_context,
            n_slots: super::last_true(1, MAX_FIT_SLOTS, |n_slots| {
                total(&memory(&shape(n_slots, max_context))) <= budget_bytes
            })
            .unwrap_or(0),
        })
        .collect();
    PrecisionFit {
        precision,
        weights_bytes: least.weights_bytes,
        least_bytes: total(&least),
        fits: total(&least) <= budget_bytes,
        cells,
    }
}
