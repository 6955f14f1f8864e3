use super::*;
use crate::submission::identity::test_identity;
use crate::telemetry::test_dir::TestDir;
use crate::telemetry::throughput::{BatchTiming, ThroughputLog};

/// A manifest with every field in use.
pub(crate) fn manifest() -> RunManifest {
    let generation = test_identity();
    let mut config = BTreeMap::new();
    config.insert(
        "temperature".to_owned(),
        Setting {
            value: Value::from(0.6),
            origin: Origin::Flag,
        },
    );
    RunManifest {
        schema: RUN_SCHEMA.to_owned(),
        name: "mixed-4bit-01234567".to_owned(),
        generation_hash: generation.hash(),
        scoring_hash: "5c".to_owned(),
        scoring: None,
        generation,
        dataset_path: "datasets/nano/mixed.jsonl".to_owned(),
        model_path: "nano".to_owned(),
        profile: "nano".to_owned(),
        config,
        submission_format: SubmissionFormat::default(),
        shard: None,
        n_rows: 2,
        ledger: Value::Null,
        memory_plan: Value::Null,
        environment: Environment::read(["podium".to_owned(), "eval".to_owned()]),
        sessions: Vec::new(),
        totals: ThroughputTotals::default(),
        tally: None,
    }
}

#[test]
fn a_manifest_comes_back_as_written() {
    let dir = TestDir::new("manifest");
    let mut written = manifest();
    written.begin_session(dir.path(), Session::start("cpu", "cpu/avx512", 8));
    let totals = ThroughputTotals {
        live_row_steps: 10,
        decode_seconds: 0.5,
        ..ThroughputTotals::default()
    };
    written.end_session(
        Outcome::Complete,
        totals,
        Some(MemorySummary::default()),
        Default::default(),
    );
    written
        .write(dir.path())
        .expect("the test folder is writable");
    let read = RunManifest::read(dir.path()).expect("our own file");
    assert_eq!(read, written);
    assert_eq!(read.generation.hash(), read.generation_hash);
    assert_eq!(read.totals.decode_tokens_per_s(), Some(20.0));
}

#[test]
fn a_killed_session_is_closed_with_what_it_had_reached() {
    let dir = TestDir::new("killed");
    let mut manifest = manifest();
    let session = Session::start("cpu", "cpu/avx512", 8);
    let index = manifest.begin_session(dir.path(), session.clone());
    let mut log = ThroughputLog::open(dir.path(), index);
    log.record(&BatchTiming {
        live_row_steps: 7,
        decode_seconds: 1.0,
        ..BatchTiming::default()
    });
    drop(log);
    assert_eq!(manifest.begin_session(dir.path(), session), 1);
    assert_eq!(manifest.sessions[0].outcome, Some(Outcome::Killed));
    assert_eq!(manifest.sessions[0].end, None);
    assert_eq!(manifest.totals.live_row_steps, 7);
}

#[test]
fn another_generation_is_refused_by_key() {
    let manifest = manifest();
    let folder = Path::new("submissions/x");
    let mut wanted = test_identity();
    wanted.numerics = "cpu/avx2".to_owned();
    let error = manifest
        .check_same_generation(folder, &wanted, false)
        .expect_err("the numerics differ");
    assert_eq!(
        error.to_string(),
        "`submissions/x` holds another generation: `numerics` is \"cpu/avx2\", there \"cpu/avx512\""
    );
    assert!(error.hint().contains("--allow-mixed"));
    manifest
        .check_same_generation(folder, &wanted, true)
        .expect("mixing was allowed");
    wanted.seed = 1;
    let error = manifest
        .check_same_generation(folder, &wanted, true)
        .expect_err("a seed is never mixed");
    assert!(error.to_string().contains("`seed` is 1, there 0"));
    assert!(!error.hint().contains("--allow-mixed"));
}

#[test]
fn a_missing_a_broken_and_a_newer_manifest_are_told_apart() {
    let dir = TestDir::new("broken");
    assert!(matches!(
        RunManifest::read(dir.path()),
        Err(ManifestError::Missing { .. })
    ));
    let path = dir.path().join(RUN_FILE);
    for text in ["{", "{\"schema\":\"podium.run/2\"}", "{}"] {
        std::fs::write(&path, text).expect("the test folder is writable");
        assert!(matches!(
            RunManifest::read(dir.path()),
            Err(ManifestError::Invalid { .. })
        ));
    }
}

#[test]
fn a_count_that_no_run_has_is_named_by_its_field() {
    let dir = TestDir::new("counts");
    let mut whole = manifest();
    whole.begin_session(dir.path(), Session::start("cpu", "cpu/avx512", 8));
    whole.ledger = serde_json::json!([{"class": "experts", "loaded_bytes": 1}]);
    let document = serde_json::to_value(&whole).expect("it has only text keys");
    for (pointer, field) in [
        ("/ledger/0/loaded_bytes", "ledger[0].loaded_bytes"),
        (
            "/sessions/0/throughput/live_row_steps",
            "sessions[0].throughput.live_row_steps",
        ),
        ("/sessions/0/n_slots", "sessions[0].n_slots"),
        ("/totals/padded_row_steps", "totals.padded_row_steps"),
    ] {
        let mut document = document.clone();
        *document.pointer_mut(pointer).expect(pointer) = Value::from(u64::MAX);
        let text = document.to_string();
        std::fs::write(dir.path().join(RUN_FILE), text).expect("the test folder is writable");
        let error = RunManifest::read(dir.path()).expect_err(field).to_string();
        let expected = format!("`{field}` is 18446744073709551615, expected at most");
        assert!(error.contains(&expected), "{error}");
    }

    whole.generation.samples = u32::MAX;
    whole
        .write(dir.path())
        .expect("the test folder is writable");
    let error = RunManifest::read(dir.path()).expect_err("4294967295 samples");
    assert!(
        error.to_string().contains("`generation.samples`"),
        "{error}"
    );
}

#[test]
fn a_killed_session_takes_no_sums_that_cannot_be() {
    let dir = TestDir::new("killed-damaged");
    let mut manifest = manifest();
    let session = Session::start("cpu", "cpu/avx512", 8);
    for _ in 0..2 {
        let index = manifest.begin_session(dir.path(), session.clone());
        let mut log = ThroughputLog::open(dir.path(), index);
        log.record(&BatchTiming {
            live_row_steps: u64::MAX,
            ..BatchTiming::default()
        });
    }
    manifest.begin_session(dir.path(), session);
    assert_eq!(manifest.totals.live_row_steps, 0);
}

#[test]
fn a_package_that_would_replace_another_file_is_refused() {
    let dir = TestDir::new("package");
    let mut manifest = manifest();
    for zip in ["results.jsonl", "../elsewhere.zip", "/elsewhere.zip"] {
        let package = serde_json::json!({"zip": zip});
        manifest.submission_format.package =
            Some(serde_json::from_value(package).expect("the other keys have defaults"));
        manifest
            .write(dir.path())
            .expect("the test folder is writable");
        let error = RunManifest::read(dir.path()).expect_err(zip).to_string();
        assert!(
            error.contains("`submission_format.package`: `zip"),
            "{error}"
        );
    }
}
