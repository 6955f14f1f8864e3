//! What an answer without the question would score: printed beside every accuracy.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::choice::letter;
use super::metric::normalize;
use crate::dataset::{Gold, Record};

/// Always giving the most frequent gold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Majority {
    /// A letter or a text.
    pub label: String,
    pub n: u64,
    /// Its share of the rows with gold.
    pub share: f64,
}

/// The most frequent gold, ties to the one that stands first; absent without gold.
pub fn majority(records: &[Record]) -> Option<Majority> {
    let distribution = gold_distribution(records);
    let n_gold: u64 = distribution.iter().map(|(_, n)| n).sum();
    let (label, n) = distribution.into_iter().next()?;
    Some(Majority {
        label,
        n,
        share: n as f64 / n_gold as f64,
    })
}

/// Expected accuracy of guessing evenly among each row's options; a row without options counts
/// as never guessed. Absent where no row with gold has options.
pub fn random(records: &[Record]) -> Option<f64> {
    let mut n_gold = 0_u64;
    let mut sum = 0.0;
    for record in records.iter().filter(|record| record.gold.is_some()) {
        n_gold += 1;
        if !record.options.is_empty() {
            sum += 1.0 / record.options.len() as f64;
        }
    }
    (sum > 0.0).then(|| sum / n_gold as f64)
}

/// Each gold and its count, the most frequent first, ties in the file's order.
pub fn gold_distribution(records: &[Record]) -> Vec<(String, u64)> {
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut counts: Vec<(String, u64)> = Vec::new();
    for gold in records.iter().filter_map(|record| record.gold.as_ref()) {
        let (same, label) = match gold {
            Gold::Option(index) => (format!("option {index}"), letter(*index)),
            Gold::Text(text) => (format!("text {}", normalize(text)), text.clone()),
        };
        let place = *places.entry(same).or_insert_with(|| {
            counts.push((label, 0));
            counts.len() - 1
        });
        if let Some(count) = counts.get_mut(place) {
            count.1 += 1;
        }
    }
    counts.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    counts
}
