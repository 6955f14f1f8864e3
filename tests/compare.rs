//! `podium compare` on runs of the binary itself: that a run against itself shows nothing, that a
//! worse one is found, and that unequal runs are refused.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::path::Path;

use serde_json::Value;
use support::{Scratch, nano_rows, run, run_ok, snapshot};

fn eval(folder: &Path, out: &str, flags: &str) {
    let mut args = vec!["eval", "rows.jsonl", "--quiet", "--out", out];
    args.extend(flags.split_whitespace());
    run_ok(folder, &args);
}

fn comparison(folder: &Path) -> Value {
    let text = std::fs::read_to_string(folder.join("comparison.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Two runs of 60 rows in the folder: whole, and cut at 30 tokens.
fn whole_and_cut() -> Scratch {
    let scratch = Scratch::new("compare");
    scratch.write("rows.jsonl", nano_rows("mixed.jsonl", 60).join("\n"));
    eval(scratch.path(), "submissions/whole", "");
    eval(scratch.path(), "submissions/cut", "--max-new-tokens 30");
    scratch
}

#[test]
fn a_run_against_itself_at_another_batch_size_shows_nothing() {
    let scratch = Scratch::new("negative");
    scratch.write("rows.jsonl", nano_rows("mixed.jsonl", 30).join("\n"));
    let flags = "--trace-hash --batch";
    eval(scratch.path(), "submissions/a", &format!("{flags} 1"));
    eval(
        scratch.path(),
        "submissions/b",
        &format!("{flags} 13 --threads 2"),
    );
    let output = run_ok(scratch.path(), &["compare", "a", "b"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("gave the same tokens and log-probability bits"),
        "{text}"
    );

    let found = comparison(&scratch.join("submissions/compare-a-vs-b"));
    let pair = &found["pairs"][0];
    assert_eq!(pair["n_questions"], 30);
    assert_eq!(
        (&pair["n_flips"], &pair["n_changes"]),
        (&Value::from(0), &Value::from(0))
    );
    assert_eq!(pair["changes"].as_array().unwrap().len(), 0);
    for count in [
        "n_samples",
        "n_same_tokens",
        "n_same_bits",
        "n_same_trace_hash",
    ] {
        assert_eq!(pair["identity"][count], 30, "{count}");
    }
    assert_eq!(pair["identity"]["first_difference_min"], Value::Null);
    assert_eq!(pair["difference"]["difference"], 0.0);
    assert_eq!(pair["tests"]["significant"], false);
    let slots: Vec<&Value> = (0..2).map(|i| &found["runs"][i]["n_slots"]).collect();
    assert_eq!(slots, [1, 13]);
}

#[test]
fn a_run_cut_short_is_worse_by_truncation() {
    let scratch = whole_and_cut();
    let args = [
        "compare", "whole", "cut", "--force", "--out", "result", "--json",
    ];
    let output = run_ok(scratch.path(), &args);
    let found = comparison(&scratch.join("result"));
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed["pairs"][0]["tests"], found["pairs"][0]["tests"]);

    let keys: Vec<&Value> = found["differences"].as_array().unwrap().iter().collect();
    assert_eq!(keys.len(), 1);
    assert_eq!(keys[0]["key"], "max_new_tokens");
    let pair = &found["pairs"][0];
    assert_eq!(pair["tests"]["significant"], true);
    assert!(pair["difference"]["high"].as_f64().unwrap() < 0.0);
    assert!(pair["detectable"]["difference"].as_f64().unwrap() > 0.0);
    let lost = pair["table"]["lost"].as_u64().unwrap();
    assert!(lost > 20);
    let truncated = pair["causes"].as_array().unwrap().iter();
    let truncated: Vec<&Value> = truncated
        .filter(|c| c["cause"] == "truncated_in_one")
        .collect();
    assert_eq!(truncated[0]["lost"], lost, "every loss is a truncation");
    for change in pair["changes"].as_array().unwrap() {
        assert_eq!(change["first_differing_token"], 30, "{change}");
        assert!(change["base"]["final_text"].is_string(), "{change}");
        assert!(change["prompt"].as_str().unwrap().contains("<|start|>"));
    }
    // Both texts of every change, and a line a question.
    let markdown = std::fs::read_to_string(scratch.join("result/comparison.md")).unwrap();
    let n_changes = pair["n_changes"].as_u64().unwrap() as usize;
    assert_eq!(markdown.matches("\n### ").count(), n_changes);
    let mut csv = csv::Reader::from_path(scratch.join("result/comparison.csv")).unwrap();
    let header: Vec<String> = csv.headers().unwrap().iter().map(str::to_owned).collect();
    assert_eq!(
        header,
        [
            "key",
            "group",
            "a_status",
            "a_correct",
            "a_answer",
            "b_status",
            "b_correct",
            "b_answer",
            "b_change",
            "b_cause"
        ]
    );
    let lines: Vec<csv::StringRecord> = csv.records().map(Result::unwrap).collect();
    assert_eq!(lines.len(), 60);
    let n_lost = lines.iter().filter(|line| &line[8] == "lost").count() as u64;
    assert_eq!(n_lost, lost);
}

#[test]
fn unequal_runs_and_wrong_names_are_refused() {
    let scratch = whole_and_cut();
    let check = |name: &str, args: &[&str]| {
        let output = run(scratch.path(), args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        snapshot::check_output(name, scratch.path(), args, &output);
    };
    check("compare-differs", &["compare", "whole", "cut"]);
    check("compare-unknown", &["compare", "whole", "other"]);
    check("compare-one", &["compare", "whole"]);
    let into = [
        "compare",
        "whole",
        "cut",
        "--force",
        "--out",
        "submissions/cut",
    ];
    check("compare-into-a-run", &into);
    assert!(!scratch.join("submissions/compare-whole-vs-cut").exists());
}
