//! Comparisons of runs made by hand.

use std::path::PathBuf;

use super::load::{CompareError, LoadedRun};
use super::*;
use crate::submission::manifest::tests::manifest;
use crate::submission::manifest::{Outcome, Session};
use crate::submission::prompts::PromptRow;
use crate::submission::test_rows::{row, unanswered, wrong};
use crate::submission::{ResultRow, Results};

/// A complete run of these rows; every key has a prompt.
pub(crate) fn run(name: &str, precision: &str, samples: u32, rows: Vec<ResultRow>) -> LoadedRun {
    let mut manifest = manifest();
    manifest.generation.precision = precision.to_owned();
    manifest.generation.samples = samples;
    manifest.begin_session(
        &PathBuf::from("/nonexistent"),
        Session::start("cpu", "cpu/avx512", 8),
    );
    manifest.end_session(
        Outcome::Complete,
        Default::default(),
        None,
        Default::default(),
    );
    let scheme = if precision == "4bit" {
        "bf16"
    } else {
        "mxint8"
    };
    manifest.ledger = serde_json::json!([
        {"class": "experts", "scheme": "mxfp4", "stored_bytes": 17, "loaded_bytes": 17,
         "lossless": true},
        {"class": "attention", "scheme": scheme, "stored_bytes": 64, "loaded_bytes": 33,
         "lossless": scheme == "bf16"},
    ]);
    let mut prompts: Vec<PromptRow> = Vec::new();
    for row in &rows {
        if !prompts.iter().any(|prompt| prompt.key == row.key) {
            let ids: &[u32] = &[1];
            let prompt = Some(("2+2?", ids));
            prompts.push(PromptRow::new(
                &row.key,
                row.id.clone(),
                row.group.clone(),
                prompt,
            ));
        }
    }
    LoadedRun {
        dir: PathBuf::from("submissions").join(name),
        name: name.to_owned(),
        manifest,
        prompts,
        results: Results::new(rows),
    }
}

/// `n` questions of which the first `n_wrong` are wrong.
fn rows(n: usize, n_wrong: usize) -> Vec<ResultRow> {
    let row_of = |i: usize| {
        let key = format!("q-{i}");
        let mut row = if i < n_wrong {
            wrong(&key, 0, "7")
        } else {
            row(&key, 0)
        };
        row.output_ids.push(if i < n_wrong { 7 } else { 4 });
        if i < n_wrong {
            row.final_text = Some("It is <b>7</b>.".to_owned());
        }
        row
    };
    (0..n).map(row_of).collect()
}

/// Three runs: 8 bits the same, 2 bits clearly worse.
pub(crate) fn three() -> Comparison {
    let runs = [
        run("val-4bit", "4bit", 1, rows(40, 2)),
        run("val-8bit", "8bit", 1, rows(40, 2)),
        run("val-2bit", "2bit", 1, rows(40, 20)),
    ];
    check::check(&runs).expect("only the precision differs");
    compare(&runs, 0)
}

#[test]
fn a_worse_run_is_told_from_an_equal_one() {
    let comparison = three();
    let [same, worse] = &comparison.pairs[..] else {
        panic!("two pairs");
    };
    assert_eq!((same.n_changes, same.n_flips), (0, 0));
    assert!(words::is_identical(&same.identity));
    assert_eq!(same.tests.p, Some(1.0));
    assert_eq!(
        worse.table.map(|table| (table.lost, table.gained)),
        Some((18, 0))
    );
    assert_eq!((worse.n_flips, worse.n_changes), (18, 18));
    let p = worse.tests.p.expect("there are pairs");
    // Two-sided of 18 heads in a row; twice that as the smaller of two.
    assert!((p - 2.0 * 0.5_f64.powi(18)).abs() < 1e-15);
    assert_eq!(worse.tests.p_holm, Some(2.0 * p));
    assert_eq!(worse.tests.significant, Some(true));
    assert_eq!(worse.identity.n_same_tokens, 22);
    assert_eq!(worse.identity.first_difference_median, Some(4.0));
    let attention = &comparison.ledger[1];
    assert_eq!(attention.values, [ValuesVerdict::Differ; 2]);
    assert_eq!(comparison.ledger[0].values, [ValuesVerdict::Same; 2]);

    let text = comparison.render(false, None);
    assert!(text.contains("C is worse than A: -45.0 points"), "{text}");
    assert!(
        text.contains("13 more flips are in comparison.md"),
        "{text}"
    );
    let long: Vec<&str> = text
        .lines()
        .filter(|line| line.chars().count() > 80)
        .collect();
    assert!(long.is_empty(), "{long:#?}");
    let markdown = comparison.to_markdown();
    assert_eq!(markdown.matches("\n### ").count(), 18);
    assert!(
        markdown.contains("```text\nIt is <b>7</b>.\n```"),
        "{markdown}"
    );
}

#[test]
fn pairs_that_cannot_count_are_counted_apart() {
    let mut base = rows(6, 1);
    base.push(unanswered("error", 0, Status::Error));
    base.push(row("only-base", 0));
    let mut no_gold = row("no-gold", 0);
    (no_gold.gold, no_gold.correct) = (None, None);
    base.push(no_gold.clone());
    let mut other = rows(5, 2);
    other.push(unanswered("q-5", 0, Status::NotRun));
    other.push(row("error", 0));
    other.push(row("only-other", 0));
    no_gold.status = Status::NoAnswer;
    other.push(no_gold);
    let comparison = compare(&[run("a", "4bit", 1, base), run("b", "8bit", 1, other)], 0);
    let pair = &comparison.pairs[0];
    let expected = Excluded {
        missing: 2,
        not_run: 1,
        error: 1,
        no_gold: 1,
    };
    assert_eq!(pair.excluded, expected);
    assert_eq!((pair.n_questions, pair.n_samples), (5, 5));
    assert_eq!(
        (pair.n_flips, pair.n_changes),
        (1, 2),
        "a change without gold is no flip"
    );
    assert_eq!(pair.changes[0].direction, Direction::Lost);
    // The same final text, in which no answer was found this time.
    assert_eq!(pair.changes[1].cause, Cause::ExtractionChanged);
    let keys: Vec<&str> = comparison
        .questions
        .iter()
        .map(|q| q.key.as_str())
        .collect();
    assert_eq!(keys[6..], ["error", "only-base", "no-gold", "only-other"]);
    assert_eq!(comparison.questions[7].sides[1], None);
}

#[test]
fn several_samples_go_by_the_questions_means() {
    // The other run loses every second sample of each question; questions come in 20 clusters.
    let sampled = |is_other: bool| -> Vec<ResultRow> {
        let row_of = |i: u32| {
            let (question, sample) = (i / 4, i % 4);
            let key = format!("q-{question}");
            let is_wrong = is_other && sample.is_multiple_of(2) && !question.is_multiple_of(4);
            let mut row = if is_wrong {
                wrong(&key, sample, "7")
            } else {
                row(&key, sample)
            };
            row.cluster = Some(format!("passage-{}", question % 20));
            row
        };
        (0..160).map(row_of).collect()
    };
    let runs = [
        run("a", "4bit", 4, sampled(false)),
        run("b", "8bit", 4, sampled(true)),
    ];
    let comparison = compare(&runs, 3);
    let pair = &comparison.pairs[0];
    assert_eq!((pair.n_questions, pair.n_samples), (40, 160));
    assert_eq!((pair.table, pair.tests.mcnemar_exact_p), (None, None));
    assert_eq!(
        (pair.accuracy_base, pair.accuracy_other),
        (Some(1.0), Some(0.625))
    );
    let estimate = pair.difference.as_ref().expect("there are questions");
    assert!(estimate.low < -0.375 && -0.375 < estimate.high && estimate.high < -0.25);
    assert!(pair.tests.permutation_p.is_some_and(|p| p < 0.001));
    let clustered = pair.clustered.expect("20 clusters are enough");
    assert_eq!(clustered.n_clusters, 20);
    assert_eq!(pair.tests.p, Some(clustered.p));
    assert_eq!(pair.causes[1].lost, 60, "the same text read differently");
    assert_eq!(
        compare(&runs, 3),
        comparison,
        "the seed decides the figures"
    );
    assert_ne!(compare(&runs, 4).pairs[0].difference, pair.difference);
}

#[test]
fn anything_besides_the_precision_is_refused_by_key() {
    let mut runs = [
        run("a", "4bit", 1, rows(2, 0)),
        run("b", "8bit", 1, rows(2, 0)),
    ];
    check::check(&runs).expect("only the precision differs");
    runs[1].manifest.generation.seed = 1;
    runs[1].manifest.generation.model = "9".repeat(64);
    runs[1].manifest.scoring_hash = "77".to_owned();
    runs[1].manifest.profile = "qa".to_owned();
    let error = check::check(&runs).expect_err("four things differ");
    assert_eq!(
        error.to_string(),
        "more than the precision differs from `a`: `model` is 99999999 in `b`, there \"f2\"; \
         `seed` is 1 in `b`, there 0; `profile` is \"qa\" in `b`, there \"nano\"; `scoring` is \
         \"77\" in `b`, there \"5c\""
    );
    assert!(error.hint().contains("another checkpoint may be the point"));
    assert!(matches!(error, CompareError::Differs { .. }));
    let forced = compare(&runs, 0);
    assert_eq!(forced.differences.len(), 4);
    assert!(
        forced
            .render(false, None)
            .contains("NOT ONLY THE PRECISION DIFFERS")
    );
    assert!(
        forced
            .ledger
            .iter()
            .all(|class| class.values == [ValuesVerdict::Unknown])
    );
}

#[test]
fn nothing_in_common_is_said_and_not_tested() {
    let runs = [
        run("a", "4bit", 1, vec![]),
        run("b", "8bit", 1, vec![row("q", 0)]),
    ];
    let comparison = compare(&runs, 0);
    assert_eq!(comparison.pairs[0].tests, Tests::default());
    assert!(
        comparison
            .render(false, None)
            .contains("there is nothing to test")
    );
}
