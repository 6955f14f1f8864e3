//! Submissions through the whole command: a profile's columns and package, and `podium lint` on
//! good and broken files.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::path::Path;

use support::{Scratch, root, run, run_ok, snapshot};

/// The made-up questions of all three types.
fn rows() -> String {
    let path = root().join("tests/curebench/rows.jsonl");
    path.to_str().unwrap().to_owned()
}

fn eval_curebench(scratch: &Scratch, flags: &[&str]) {
    let rows = rows();
    let mut args = vec!["eval", &rows, "--profile", "curebench", "--out", "run"];
    args.extend(["--quiet", "--max-new-tokens", "48", "--limit", "12"]);
    args.extend(flags);
    run_ok(scratch.path(), &args);
}

fn lint(folder: &Path, args: &[&str]) -> (i32, serde_json::Value) {
    let output = run(folder, &[&["lint", "--json"], args].concat());
    let code = output.status.code().unwrap();
    (code, serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
fn a_curebench_run_hands_in_a_clean_package() {
    let scratch = Scratch::new("curebench");
    eval_curebench(&scratch, &["--meta", "track=agentic_reasoning"]);
    let (code, found) = lint(scratch.path(), &["run"]);
    assert_eq!((code, &found["findings"]), (0, &serde_json::json!([])));
    // Rows past the limit are there as well, with the sentinel.
    assert_eq!(found["files"][0]["n_rows"], 60);
    let rows = rows();
    let flags = [
        "run/submission.zip",
        "--profile",
        "curebench",
        "--dataset",
        &rows,
    ];
    let (code, found) = lint(scratch.path(), &flags);
    assert_eq!((code, &found["findings"]), (0, &serde_json::json!([])));
    assert_eq!(found["files"][0]["file"], "submission.zip/submission.csv");

    let zip = std::fs::read(scratch.join("run/submission.zip")).unwrap();
    let mut archive = zip::ZipArchive::new(std::io::Cursor::new(&zip)).unwrap();
    let meta: serde_json::Value =
        serde_json::from_reader(archive.by_name("meta_data.json").unwrap()).unwrap();
    assert_eq!(meta["track"], "agentic_reasoning");
    assert_eq!(meta["model_name"], "nano");
    let tokens: f64 = meta["average_tokens_per_question"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!((1.0..=48.0).contains(&tokens), "{meta}");
    // Written anew from the log, it has the same bytes.
    run_ok(scratch.path(), &["score", "run"]);
    assert_eq!(
        std::fs::read(scratch.join("run/submission.zip")).unwrap(),
        zip
    );
    // Another profile's submission has no package, and the old one's goes.
    run_ok(scratch.path(), &["score", "run", "--profile", "qa"]);
    assert!(!scratch.join("run/submission.zip").exists());
}

#[test]
fn lint_finds_what_was_broken_by_hand() {
    let scratch = Scratch::new("lint");
    eval_curebench(&scratch, &[]);
    let path = scratch.join("run/submission.csv");
    let text = std::fs::read_to_string(&path).unwrap();
    let broken = text.replacen("\"q000\"", "q000", 1);
    let broken = broken.replacen("\"q001\"", "\"q002\"", 1);
    scratch.write("run/submission.csv", broken);
    snapshot::check("lint-broken", scratch.path(), &["lint", "run"]);
    snapshot::check("lint-nowhere", scratch.path(), &["lint", "nowhere.csv"]);
    scratch.write("alone.csv", text);
    snapshot::check("lint-alone", scratch.path(), &["lint", "alone.csv"]);
    let args = ["lint", "alone.csv", "--profile", "curebench"];
    snapshot::check("lint-without-dataset", scratch.path(), &args);
}

#[test]
fn a_time_limit_leaves_a_clean_submission_with_every_id() {
    let scratch = Scratch::new("lint-time-limit");
    let rows = rows();
    let args = "--profile curebench --out run --quiet --batch 1 --time-limit 0.05s";
    let args: Vec<&str> = ["eval", &rows].into_iter().chain(args.split(' ')).collect();
    run_ok(scratch.path(), &args);
    let (code, found) = lint(scratch.path(), &["run"]);
    assert_eq!((code, &found["findings"]), (0, &serde_json::json!([])));
    assert_eq!(found["files"][0]["n_rows"], 60);
    let text = std::fs::read_to_string(scratch.join("run/submission.csv")).unwrap();
    assert!(text.contains("\"NOTAVALUE\",\"NOTAVALUE\",\"NOTAVALUE\"\n"));
}
