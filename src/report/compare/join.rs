//! The tables under a comparison, in polars: the join of the runs' rows by key, and sums by label.
//!
//! The join is a stable group-by over the stacked keys: polars' own `join` lives in a crate that
//! would make the core compile with more features, and gives the same rows in an order of its own.

use polars::prelude::{Column, DataFrame, PolarsResult};

/// A key with its row in each run that has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinedKey {
    pub key: String,
    /// Index among the run's keys.
    pub rows: Vec<Option<usize>>,
}

/// The full outer join of several lists of keys, in order of first appearance. Keys are unique
/// within a list.
#[allow(
    deprecated,
    reason = "polars wants aggregation through `lazy`, whose planner and engine would triple the \
              dependencies"
)]
pub fn join(keys: &[Vec<&str>]) -> PolarsResult<Vec<JoinedKey>> {
    let stacked: Vec<&str> = keys.iter().flatten().copied().collect();
    if stacked.is_empty() {
        return Ok(Vec::new());
    }
    let mut columns = vec![Column::new("key".into(), &stacked)];
    let mut names = Vec::new();
    for run in 0..keys.len() {
        // A run's column holds its rows counted from 1, and 0 in the other runs' part.
        let places: Vec<u64> = keys
            .iter()
            .enumerate()
            .flat_map(|(part, keys)| {
                (1..=keys.len() as u64).map(move |row| if part == run { row } else { 0 })
            })
            .collect();
        let name = format!("row_{run}");
        columns.push(Column::new(name.as_str().into(), places));
        names.push(name);
    }
    let frame = DataFrame::new_infer_height(columns)?;
    let joined = frame.group_by_stable(["key"])?.select(&names).max()?;
    let mut rows: Vec<JoinedKey> = joined
        .column("key")?
        .str()?
        .iter()
        .map(|key| JoinedKey {
            key: key.unwrap_or_default().to_owned(),
            rows: Vec::with_capacity(keys.len()),
        })
        .collect();
    for name in &names {
        let places = joined.column(&format!("{name}_max"))?.u64()?;
        for (row, place) in rows.iter_mut().zip(places.iter()) {
            let place = place.unwrap_or(0);
            row.rows.push(place.checked_sub(1).map(|row| row as usize));
        }
    }
    Ok(rows)
}

/// Sums of several value columns for each combination of labels, in order of first appearance.
/// `labels` and `values` are columns of one length.
#[allow(
    deprecated,
    reason = "polars wants aggregation through `lazy`, whose planner and engine would triple the \
              dependencies"
)]
pub fn sums(
    labels: &[Vec<&str>],
    values: &[Vec<f64>],
) -> PolarsResult<Vec<(Vec<String>, Vec<f64>)>> {
    if labels.first().is_none_or(Vec::is_empty) {
        return Ok(Vec::new());
    }
    let label_names: Vec<String> = (0..labels.len()).map(|i| format!("label_{i}")).collect();
    let value_names: Vec<String> = (0..values.len()).map(|i| format!("value_{i}")).collect();
    let columns = label_names
        .iter()
        .zip(labels)
        .map(|(name, labels)| Column::new(name.as_str().into(), labels))
        .chain(
            value_names
                .iter()
                .zip(values)
                .map(|(name, values)| Column::new(name.as_str().into(), values)),
        );
    let frame = DataFrame::new_infer_height(columns.collect())?;
    let summed = frame
        .group_by_stable(&label_names)?
        .select(&value_names)
        .sum()?;
    let mut rows = vec![(Vec::new(), Vec::new()); summed.height()];
    for name in &label_names {
        for (row, label) in rows.iter_mut().zip(summed.column(name)?.str()?.iter()) {
            row.0.push(label.unwrap_or_default().to_owned());
        }
    }
    for name in &value_names {
        let column = summed.column(&format!("{name}_sum"))?;
        for (row, sum) in rows.iter_mut().zip(column.f64()?.iter()) {
            row.1.push(sum.unwrap_or_default());
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_all_runs_are_joined_in_order_of_appearance() {
        let joined = join(&[vec!["b", "a", "c"], vec!["d", "c", "b"], vec![]]);
        let joined: Vec<(String, Vec<Option<usize>>)> = joined
            .expect("columns of our own making")
            .into_iter()
            .map(|row| (row.key, row.rows))
            .collect();
        let expected = [
            ("b", [Some(0), Some(2), None]),
            ("a", [Some(1), None, None]),
            ("c", [Some(2), Some(1), None]),
            ("d", [None, Some(0), None]),
        ];
        assert_eq!(
            joined,
            expected.map(|(k, rows)| (k.to_owned(), rows.to_vec()))
        );
        assert!(join(&[vec![], vec![]]).expect("nothing").is_empty());
    }

    #[test]
    fn values_are_summed_by_all_labels() {
        let summed = sums(
            &[vec!["x", "y", "x", "x"], vec!["1", "1", "2", "1"]],
            &[vec![1.0; 4], vec![0.5, 0.0, 0.25, 0.5]],
        );
        let expected = [
            (["x", "1"], [2.0, 1.0]),
            (["y", "1"], [1.0, 0.0]),
            (["x", "2"], [1.0, 0.25]),
        ];
        assert_eq!(
            summed.expect("columns of our own making"),
            expected.map(|(labels, sums)| (labels.map(str::to_owned).to_vec(), sums.to_vec()))
        );
    }
}
