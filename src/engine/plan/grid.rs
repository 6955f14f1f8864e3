//! Slots by context for `podium plan`: what fits which card.

use super::{full_pages, total};
use crate::engine::{BackendMemory, EngineShape};

const GIB: u64 = 1 << 30;

/// Bytes that the driver leaves to a program on an otherwise idle card, about, by name.
pub const CARDS: [(&str, u64); 10] = [
    ("rtx-4060-8g", 15 * GIB / 2),
    ("rtx-4070-12g", 23 * GIB / 2),
    ("rtx-4080-16g", 31 * GIB / 2),
    ("rtx-3090-24g", 47 * GIB / 2),
    ("rtx-4090-24g", 47 * GIB / 2),
    ("rtx-5090-32g", 31 * GIB),
    ("a100-40g", 39 * GIB),
    ("l40s-48g", 44 * GIB),
    ("a100-80g", 79 * GIB),
    ("h100-80g", 79 * GIB),
];

/// Bytes of a card by name, in any case and with or without the size at its end where that is
/// unique.
pub fn card_bytes(name: &str) -> Option<u64> {
    let name = name.to_ascii_lowercase();
    let mut matching = CARDS
        .iter()
        .filter(|(card, _)| *card == name || card.rsplit_once('-').is_some_and(|c| c.0 == name));
    match (matching.next(), matching.next()) {
        (Some(&(_, bytes)), None) => Some(bytes),
        _ => None,
    }
}

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
