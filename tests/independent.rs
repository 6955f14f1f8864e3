//! podium against programs that share nothing with it: a Python scorer, pandas as the reader of
//! a submission, transformers' own run of nano. Ignored by plain `cargo test`; `just test-full`
//! runs them with the Python of `just setup`, and they fail where it is missing.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::path::PathBuf;
use std::process::Command;

use support::{Scratch, root, run_ok};

/// The Python that has the independent implementations.
fn python() -> Command {
    let path = std::env::var_os("PODIUM_PYTHON")
        .map(PathBuf::from)
        .unwrap_or_else(|| root().join(".venv/bin/python"));
    assert!(
        path.exists(),
        "`{}` is missing: run `just setup`",
        path.display()
    );
    Command::new(path)
}

fn succeeds(mut command: Command) {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}\n{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
#[ignore = "needs Python with pandas: just test-full"]
fn independent_scorer_agrees_with_the_summary() {
    let scratch = Scratch::new("independent-scorer");
    let dataset = root().join("datasets/nano/mixed.jsonl");
    let out = scratch.join("run");
    run_ok(
        scratch.path(),
        &[
            "eval",
            dataset.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
            "--quiet",
        ],
    );
    let mut command = python();
    command
        .arg(root().join("tests/python/score_raw_text.py"))
        .args([&dataset, &out]);
    succeeds(command);
}

#[test]
#[ignore = "needs Python with transformers: just test-full"]
fn independent_transformers_gives_the_logits_of_nano() {
    let scratch = Scratch::new("independent-nano");
    let prompts = root().join("models/nano/prompts.golden.jsonl");
    let input: String = std::fs::read_to_string(prompts)
        .unwrap()
        .lines()
        .step_by(9)
        .map(|line| {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            let name = format!(
                "{}-{}",
                row["id"].as_str().unwrap(),
                row["effort"].as_str().unwrap()
            );
            serde_json::json!({"prompt": name, "tokens": row["ids"], "n_greedy": 24}).to_string()
                + "\n"
        })
        .collect();
    let input = scratch.write("input.jsonl", input);
    let args = [
        "logits",
        "nano",
        input.to_str().unwrap(),
        "--full",
        "--exact",
    ];
    let output = run_ok(scratch.path(), &args);
    let found = scratch.write("logits.jsonl", output.stdout);
    let mut command = python();
    command
        .arg(root().join("tests/python/check_logits.py"))
        .args([root().join("models/nano"), input, found]);
    succeeds(command);
}
