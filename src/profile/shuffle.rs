//! Options in an order of the row's own, for files that always put the right one first (GPQA),
//! and against a model's liking for a letter.
//!
//! What a record holds from here on is what is shown: options, gold and everything scored and
//! logged. The submission gives letters in the file's order again, by the order that
//! `prompts.jsonl` keeps.

use super::draws::Draws;
use crate::dataset::{Gold, Record};

const PURPOSE: &str = "options";

/// The file's index of the option that is shown at each place (Fisher and Yates, from the end).
pub fn order(seed: u64, key: &str, n_options: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n_options).collect();
    let mut draws = Draws::new(seed, PURPOSE, key);
    for place in (1..n_options).rev() {
        order.swap(place, draws.below(place + 1));
    }
    order
}

/// Puts a record's options in the row's own order; the gold follows.
pub fn shuffle(record: &mut Record, seed: u64) {
    let order = order(seed, &record.key, record.options.len());
    record.options = order
        .iter()
        .filter_map(|&index| record.options.get(index).cloned())
        .collect();
    if let Some(Gold::Option(gold)) = &mut record.gold
        && let Some(place) = order.iter().position(|index| index == gold)
    {
        *gold = place;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected orders are made by hashlib, as `draws.rs` says.
    #[test]
    fn an_order_is_of_seed_and_key() {
        for (seed, key, expected) in [
            (0, "q-1", &[1, 0, 2, 3][..]),
            (0, "q-2", &[2, 3, 0, 1]),
            (7, "q-1", &[1, 3, 2, 0]),
            (0, "ü", &[3, 4, 2, 0, 1]),
            (0, "q-1", &[0]),
            (0, "q-1", &[]),
        ] {
            assert_eq!(order(seed, key, expected.len()), expected, "{seed} {key}");
        }
    }

    #[test]
    fn every_place_gets_every_option_as_often() {
        const N_ROWS: usize = 4000;
        let mut counts = [[0_usize; 4]; 4];
        for row in 0..N_ROWS {
            for (place, index) in order(0, &format!("row-{row}"), 4).into_iter().enumerate() {
                counts[place][index] += 1;
            }
        }
        // 1,000 expected, standard deviation 27: five of them.
        let even = counts
            .iter()
            .flatten()
            .all(|n| n.abs_diff(N_ROWS / 4) < 137);
        assert!(even, "{counts:?}");
    }
}
