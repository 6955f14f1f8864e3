//! Counts over result rows: accuracy with its interval, by group, statuses, baselines. polars
//! does the grouping.

use std::collections::BTreeMap;

use polars::prelude::{Column, DataFrame, PolarsResult};

use crate::dataset::Gold;
use crate::score::Status;
use crate::score::interval::wilson;
use crate::submission::ResultRow;
use crate::submission::manifest::{Accuracy, GroupAccuracy, LenientAccuracy, Tally};
use crate::submission::write::status_name;

/// The label of rows without a group, where others have one.
pub const NO_GROUP: &str = "(none)";

/// Counts a run. `questions` holds the row that speaks for each question, `samples` all rows;
/// with one sample a question they are the same. The baseline by chance needs the option counts,
/// so it comes from the data set.
pub fn tally(
    questions: &[&ResultRow],
    samples: &[&ResultRow],
    random_baseline: Option<f64>,
) -> Tally {
    let scored: Vec<&ResultRow> = questions
        .iter()
        .copied()
        .filter(|row| counts(row))
        .collect();
    let n_correct = scored.iter().filter(|row| is_correct(row)).count() as u64;
    let closed: Vec<&ResultRow> = scored.iter().copied().filter(|r| r.is_closed()).collect();
    let n_closed_correct = closed.iter().filter(|row| is_correct(row)).count() as u64;
    let has_groups = questions.iter().any(|row| row.group.is_some());
    Tally {
        n_questions: questions.len() as u64,
        n_samples: samples.len() as u64,
        accuracy: accuracy(n_correct, scored.len() as u64),
        lenient: lenient(&scored),
        by_group: if has_groups {
            by_group(&scored).expect("columns of our own making fit together")
        } else {
            Vec::new()
        },
        statuses: statuses(samples).expect("columns of our own making fit together"),
        majority_baseline: majority(&scored).expect("columns of our own making fit together"),
        random_baseline,
        over_samples: None,
        closed: (!closed.is_empty()).then(|| accuracy(n_closed_correct, closed.len() as u64)),
    }
}

/// Of the rows that the strict accuracy is over.
fn lenient(scored: &[&ResultRow]) -> Option<LenientAccuracy> {
    if scored.is_empty() || !scored.iter().all(|row| row.has_lenient()) {
        return None;
    }
    let count = |is: fn(&ResultRow) -> bool| scored.iter().filter(|row| is(row)).count() as u64;
    let is_right = |row: &ResultRow| row.lenient_correct() == Some(true);
    Some(LenientAccuracy {
        accuracy: accuracy(count(is_right), scored.len() as u64),
        n_unanswered: count(|row| row.status.is_unanswered()),
        n_found: count(|row| row.answer.is_none() && row.lenient_answer().is_some()),
        n_gained: count(|row| !is_correct(row) && row.lenient_correct() == Some(true)),
    })
}

/// Strict accuracy counts every question with gold that was run, whatever became of it.
fn counts(row: &ResultRow) -> bool {
    row.gold.is_some() && row.status != Status::NotRun
}

fn is_correct(row: &ResultRow) -> bool {
    row.correct == Some(true)
}

/// An accuracy with its interval.
pub fn accuracy(n_correct: u64, n: u64) -> Accuracy {
    let interval = wilson(n_correct, n);
    Accuracy {
        n_correct,
        n,
        accuracy: (n > 0).then(|| n_correct as f64 / n as f64),
        low: interval.map(|interval| interval.low),
        high: interval.map(|interval| interval.high),
    }
}

fn by_group(scored: &[&ResultRow]) -> PolarsResult<Vec<GroupAccuracy>> {
    let labels = scored
        .iter()
        .map(|row| row.group.as_deref().unwrap_or(NO_GROUP));
    let correct = scored.iter().map(|row| u64::from(is_correct(row)));
    let groups =
        sums(labels.collect(), correct.collect())?
            .into_iter()
            .map(|(group, n, n_correct)| GroupAccuracy {
                group,
                accuracy: accuracy(n_correct, n),
            });
    Ok(groups.collect())
}

fn statuses(samples: &[&ResultRow]) -> PolarsResult<BTreeMap<String, u64>> {
    let names: Vec<&str> = samples.iter().map(|row| status_name(row.status)).collect();
    let ones = vec![0; names.len()];
    let counted = sums(names, ones)?
        .into_iter()
        .map(|(status, n, _)| (status, n));
    Ok(counted.collect())
}

fn majority(scored: &[&ResultRow]) -> PolarsResult<Option<f64>> {
    let golds: Vec<String> = scored
        .iter()
        .filter_map(|row| match row.gold.as_ref()? {
            Gold::Option(index) => Some(format!("option {index}")),
            Gold::Text(text) => Some(format!("text {text}")),
        })
        .collect();
    let zeros = vec![0; golds.len()];
    let counted = sums(golds.iter().map(String::as_str).collect(), zeros)?;
    let most = counted.iter().map(|(_, n, _)| *n).max();
    Ok(most.map(|n| n as f64 / golds.len() as f64))
}

/// Rows and the sum of `values` for each label, in order of first appearance.
#[allow(
    deprecated,
    reason = "polars wants aggregation through `lazy`, whose planner and engine would triple the \
              dependencies for one sum"
)]
fn sums(labels: Vec<&str>, values: Vec<u64>) -> PolarsResult<Vec<(String, u64, u64)>> {
    if labels.is_empty() {
        return Ok(Vec::new());
    }
    let ones = vec![1_u64; labels.len()];
    let frame = DataFrame::new_infer_height(vec![
        Column::new("label".into(), labels),
        Column::new("n".into(), ones),
        Column::new("value".into(), values),
    ])?;
    let summed = frame
        .group_by_stable(["label"])?
        .select(["n", "value"])
        .sum()?;
    let labels = summed.column("label")?.str()?;
    let counts = summed.column("n_sum")?.u64()?;
    let values = summed.column("value_sum")?.u64()?;
    let rows = labels
        .iter()
        .zip(counts.iter())
        .zip(values.iter())
        .map(|((label, n), value)| {
            let label = label.unwrap_or_default().to_owned();
            (label, n.unwrap_or(0), value.unwrap_or(0))
        });
    Ok(rows.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::submission::test_rows::{cut_off, row, unanswered, wrong};

    #[test]
    fn every_question_with_gold_that_was_run_counts() {
        let mut other = wrong("d", 0, "9");
        other.group = Some("products".to_owned());
        other.gold = Some(Gold::Text("12".to_owned()));
        let mut no_gold = row("e", 0);
        (no_gold.gold, no_gold.correct, no_gold.group) = (None, None, None);
        let rows = [
            row("a", 0),
            row("b", 0),
            unanswered("c", 0, Status::Error),
            other,
            no_gold,
            unanswered("f", 0, Status::NotRun),
        ];
        let refs: Vec<&ResultRow> = rows.iter().collect();
        let tally = tally(&refs, &refs, Some(0.25));
        assert_eq!((tally.n_questions, tally.n_samples), (6, 6));
        assert_eq!((tally.accuracy.n_correct, tally.accuracy.n), (2, 4));
        let groups: Vec<_> = tally
            .by_group
            .iter()
            .map(|group| {
                (
                    group.group.as_str(),
                    group.accuracy.n_correct,
                    group.accuracy.n,
                )
            })
            .collect();
        assert_eq!(groups, [("sums", 2, 3), ("products", 0, 1)]);
        assert_eq!(tally.statuses["answered"], 4);
        assert_eq!(tally.statuses["error"], 1);
        assert_eq!(tally.statuses.len(), 3);
        assert_eq!(tally.majority_baseline, Some(0.75));
    }

    #[test]
    fn the_lenient_accuracy_is_over_the_same_questions() {
        let rows = [
            row("a", 0),
            wrong("b", 0, "9"),
            cut_off("c", 0),
            unanswered("d", 0, Status::NoFinal),
            unanswered("e", 0, Status::Error),
            unanswered("f", 0, Status::NotRun),
        ];
        let refs: Vec<&ResultRow> = rows.iter().collect();
        let found = tally(&refs, &refs, None);
        assert_eq!((found.accuracy.n_correct, found.accuracy.n), (1, 5));
        let lenient = found.lenient.expect("there is gold");
        assert_eq!((lenient.accuracy.n_correct, lenient.accuracy.n), (2, 5));
        let counts = (lenient.n_unanswered, lenient.n_found, lenient.n_gained);
        assert_eq!(counts, (2, 1, 1));
        // A line of a version that looked for none: no figure is better than one too low.
        let older = ResultRow {
            lenient: None,
            ..unanswered("d", 0, Status::NoFinal)
        };
        let mixed = [&rows[0], &older, &rows[2]];
        assert_eq!(tally(&mixed, &mixed, None).lenient, None);
    }

    #[test]
    fn no_rows_have_no_figures() {
        let tally = tally(&[], &[], None);
        assert_eq!((tally.accuracy.accuracy, tally.lenient), (None, None));
        assert_eq!(tally.majority_baseline, None);
        assert!(tally.by_group.is_empty() && tally.statuses.is_empty());
    }
}
