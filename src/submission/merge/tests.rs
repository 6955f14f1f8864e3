use super::*;
use crate::submission::log::ResultLog;
use crate::submission::manifest::tests::manifest;
use crate::submission::manifest::{Accuracy, Outcome, Session};
use crate::submission::test_rows::{row, wrong};
use crate::submission::write::{SCORES_FILE, SUBMISSION_CSV_FILE, first_sample};
use crate::telemetry::test_dir::TestDir;
use crate::telemetry::throughput::ThroughputTotals;

fn prompts() -> Vec<PromptRow> {
    ["q-1", "q-2", "q-3", "q-4"]
        .map(|key| {
            PromptRow::new(
                key,
                Some(key.into()),
                Some("sums".into()),
                Some((key, &[1])),
            )
        })
        .to_vec()
}

fn count(questions: &[&ResultRow], samples: &[&ResultRow]) -> Tally {
    let n_correct = questions
        .iter()
        .filter(|row| row.correct == Some(true))
        .count() as u64;
    Tally {
        lenient: None,
        n_questions: questions.len() as u64,
        n_samples: samples.len() as u64,
        accuracy: Accuracy {
            n_correct,
            n: questions.len() as u64,
            accuracy: None,
            low: None,
            high: None,
        },
        by_group: Vec::new(),
        statuses: Default::default(),
        majority_baseline: None,
        closed: None,
        random_baseline: None,
        over_samples: None,
    }
}

fn options(allow_mixed: bool) -> MergeOptions<'static> {
    MergeOptions {
        allow_mixed,
        pick: &first_sample,
        tally: &count,
    }
}

fn make(
    run_dir: &Path,
    shard: Option<Shard>,
    rows: &[ResultRow],
    change: impl Fn(&mut RunManifest),
) {
    std::fs::create_dir_all(run_dir).expect("the test folder is writable");
    let mut manifest = manifest();
    manifest.shard = shard;
    manifest.begin_session(run_dir, Session::start("cpu", "cpu/avx512", 2));
    let totals = ThroughputTotals {
        live_row_steps: rows.len() as u64,
        ..ThroughputTotals::default()
    };
    manifest.end_session(Outcome::Complete, totals, None, Default::default());
    change(&mut manifest);
    manifest
        .write(run_dir)
        .expect("the test folder is writable");
    write_prompts(run_dir, &prompts()).expect("the test folder is writable");
    let (mut log, _) = ResultLog::open(run_dir).expect("a new log");
    for row in rows {
        log.append(row).expect("the test folder is writable");
    }
    log.close().expect("the test folder is writable");
}

fn shard(index: usize) -> Option<Shard> {
    Some(Shard { index, count: 2 })
}

fn text(run_dir: &Path, file: &str) -> String {
    std::fs::read_to_string(run_dir.join(file)).expect("it was just written")
}

#[test]
fn shards_give_the_files_of_an_undivided_run() {
    let dir = TestDir::new("merge");
    let folder = |name: &str| dir.path().join(name);
    let rows = [
        row("q-1", 0),
        row("q-2", 0),
        wrong("q-3", 0, "8"),
        row("q-4", 0),
    ];
    make(&folder("whole"), None, &rows, |_| {});
    let whole = Results::new(rows.to_vec());
    let format = manifest().submission_format;
    write_submission(&folder("whole"), &prompts(), &whole, &format, &first_sample)
        .expect("the test folder is writable");
    // The shards ran backwards, and one row twice.
    let odd = [rows[2].clone(), wrong("q-1", 0, "0"), rows[0].clone()];
    make(&folder("one"), shard(1), &odd, |_| {});
    make(
        &folder("two"),
        shard(2),
        &[rows[3].clone(), rows[1].clone()],
        |_| {},
    );

    let merged = merge(
        &[folder("two"), folder("one")],
        &folder("out"),
        &options(false),
    )
    .expect("the shards are complete");
    assert_eq!(merged.shard, None);
    assert_eq!(merged.totals.live_row_steps, 5);
    assert_eq!(merged.sessions.len(), 2);
    assert_eq!(
        merged
            .sessions
            .iter()
            .filter(|s| s.shard == shard(1))
            .count(),
        1
    );
    assert_eq!(
        merged.tally.as_ref().map(|tally| tally.accuracy.n_correct),
        Some(3)
    );
    for file in [
        SCORES_FILE,
        SUBMISSION_CSV_FILE,
        RESULTS_FILE,
        "prompts.jsonl",
    ] {
        assert_eq!(
            text(&folder("out"), file),
            text(&folder("whole"), file),
            "{file}"
        );
    }
    assert_eq!(
        RunManifest::read(&folder("out")).expect("it was written"),
        merged
    );
    let again = merge(
        &[folder("two"), folder("one")],
        &folder("out"),
        &options(false),
    );
    assert!(matches!(again, Err(MergeError::Occupied { .. })));
}

#[test]
fn what_is_missing_is_named() {
    let dir = TestDir::new("incomplete");
    let one = dir.path().join("one");
    make(&one, shard(1), &[row("q-1", 0), row("q-3", 0)], |_| {});
    let error = merge(
        std::slice::from_ref(&one),
        &dir.path().join("out"),
        &options(false),
    )
    .expect_err("half is missing");
    assert_eq!(
        error.to_string(),
        "2 of 4 rows are missing, such as `q-2`, `q-4`"
    );
    assert_eq!(error.hint(), "shards not named: 2/2");
    assert!(!dir.path().join("out").exists());
    let error = merge(
        &[one.clone(), one],
        &dir.path().join("out"),
        &options(false),
    )
    .expect_err("the same rows twice");
    assert!(matches!(error, MergeError::Doubled { .. }));
}

#[test]
fn runs_that_differ_are_refused_and_mixed_numerics_are_recorded_per_row() {
    let dir = TestDir::new("mixed");
    let folder = |name: &str| dir.path().join(name);
    make(
        &folder("one"),
        shard(1),
        &[row("q-1", 0), row("q-3", 0)],
        |_| {},
    );
    let two = [row("q-2", 0), row("q-4", 0)];
    make(&folder("two"), shard(2), &two, |manifest| {
        manifest.generation.numerics = "cpu/avx2".to_owned();
    });
    make(&folder("seed"), shard(2), &two, |manifest| {
        manifest.generation.seed = 5
    });
    make(&folder("rules"), shard(2), &two, |manifest| {
        manifest.scoring_hash = "other".to_owned();
    });

    let joined = |other: &str, allow_mixed| {
        merge(
            &[folder("one"), folder(other)],
            &folder("out"),
            &options(allow_mixed),
        )
    };
    let error = joined("two", false).expect_err("the numerics differ");
    assert!(error.hint().contains("--allow-mixed"));
    assert!(matches!(
        joined("seed", true),
        Err(MergeError::OtherGeneration { .. })
    ));
    assert!(matches!(
        joined("rules", true),
        Err(MergeError::OtherScoring { .. })
    ));
    joined("two", true).expect("mixing was allowed");
    let numerics: Vec<_> = log::read(&folder("out"))
        .expect("it was written")
        .rows
        .into_iter()
        .filter_map(|row| row.numerics_id)
        .collect();
    assert_eq!(
        numerics,
        ["cpu/avx512", "cpu/avx2", "cpu/avx512", "cpu/avx2"]
    );
}
