//! The rows of a log by key and sample. The last line of a (key, sample) wins: a resume that
//! tries a row again writes a second line.

use std::collections::{BTreeMap, HashMap};

use super::ResultRow;

/// The rows that count, one for each (key, sample).
#[derive(Clone, Debug, Default)]
pub struct Results {
    by_key: HashMap<String, BTreeMap<u32, ResultRow>>,
    n_rows: usize,
}

impl Results {
    /// Takes rows in the order they were written.
    pub fn new(rows: Vec<ResultRow>) -> Self {
        let mut results = Self::default();
        for row in rows {
            results.insert(row);
        }
        results
    }

    /// Adds a row; one of the same (key, sample) is replaced.
    pub fn insert(&mut self, row: ResultRow) {
        let samples = self.by_key.entry(row.key.clone()).or_default();
        if samples.insert(row.sample, row).is_none() {
            self.n_rows += 1;
        }
    }

    pub fn get(&self, key: &str, sample: u32) -> Option<&ResultRow> {
        self.by_key.get(key)?.get(&sample)
    }

    /// Whether a resume leaves this sample alone.
    pub fn is_finished(&self, key: &str, sample: u32) -> bool {
        self.get(key, sample).is_some_and(ResultRow::is_finished)
    }

    /// The samples of a row, by sample number.
    pub fn samples(&self, key: &str) -> impl Iterator<Item = &ResultRow> {
        self.by_key.get(key).into_iter().flat_map(BTreeMap::values)
    }

    /// Rows in the order of `keys`, then by sample; rows of other keys are left out.
    pub fn in_order<'a>(
        &'a self,
        keys: impl IntoIterator<Item = &'a str>,
    ) -> impl Iterator<Item = &'a ResultRow> {
        keys.into_iter().flat_map(|key| self.samples(key))
    }

    /// The number of (key, sample) pairs.
    pub fn len(&self) -> usize {
        self.n_rows
    }

    pub fn is_empty(&self) -> bool {
        self.n_rows == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::score::Status;
    use crate::submission::RowError;
    use crate::submission::test_rows::{row, unanswered, wrong};

    #[test]
    fn the_last_line_of_a_sample_wins() {
        let results = Results::new(vec![
            row("b", 1),
            row("a", 0),
            wrong("b", 1, "7"),
            row("b", 0),
        ]);
        assert_eq!(results.len(), 3);
        assert_eq!(results.get("b", 1).and_then(|row| row.correct), Some(false));
        let order: Vec<_> = results
            .in_order(["a", "missing", "b"])
            .map(|row| (row.key.as_str(), row.sample))
            .collect();
        assert_eq!(order, [("a", 0), ("b", 0), ("b", 1)]);
    }

    #[test]
    fn only_passing_failures_run_again() {
        let mut failed = unanswered("a", 0, Status::Error);
        failed.error = Some(RowError {
            message: "logits are not finite".to_owned(),
            hint: String::new(),
            file: "a.jsonl".to_owned(),
            line: 1,
            field: None,
            transient: true,
        });
        assert!(!failed.is_finished());
        if let Some(error) = &mut failed.error {
            error.transient = false;
        }
        assert!(failed.is_finished());
        assert!(unanswered("a", 0, Status::TruncatedAnalysis).is_finished());
        assert!(!unanswered("a", 0, Status::NotRun).is_finished());
        let results = Results::new(vec![failed]);
        assert!(results.is_finished("a", 0));
        assert!(!results.is_finished("a", 1));
    }
}
