//! Bytes of slots by context, for `podium plan`.

use super::{full_pages, total};
use crate::engine::{BackendMemory, EngineShape};

/// Bytes of one combination with every slot's context at full length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct GridCell {
    pub n_slots: usize,
    pub max_context: usize,
    pub total_bytes: u64,
}

/// All combinations, a row for each slot count.
pub fn grid(
    slots: &[usize],
    contexts: &[usize],
    prefill_rows: usize,
    memory: impl Fn(&EngineShape) -> BackendMemory,
) -> Vec<Vec<GridCell>> {
    let cell = |n_slots, max_context| {
        let shape = EngineShape {
            n_slots,
            n_forks: 0,
            n_pages: full_pages(n_slots, max_context, 0),
            max_context,
            prefill_rows,
        };
        GridCell {
            n_slots,
            max_context,
            total_bytes: total(&memory(&shape)),
        }
    };
    slots
        .iter()
        .map(|&n_slots| contexts.iter().map(|&n| cell(n_slots, n)).collect())
        .collect()
}
