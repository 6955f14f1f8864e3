//! podium against programs that share nothing with it: a Python scorer, pandas as the reader of
//! a submission, transformers' own run of nano. Ignored by plain `cargo test`; `just test-full`
//! runs them with the Python of `just setup`, and they fail where it is missing.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::path::{Path, PathBuf};
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

/// The package of a run over the made-up questions of all three types.
fn check_package(rows: &Path, run: &Path) {
    let mut command = python();
    command
        .arg(root().join("tests/python/check_submission.py"))
        .args([rows, &run.join("submission.zip")]);
    succeeds(command);
}

#[test]
#[ignore = "needs Python with pandas: just test-full"]
fn independent_pandas_accepts_the_curebench_package() {
    let scratch = Scratch::new("independent-curebench");
    let rows = root().join("tests/curebench/rows.jsonl");
    let args = [
        "eval",
        rows.to_str().unwrap(),
        "--profile",
        "curebench",
        "--out",
        "run",
        "--max-new-tokens",
        "96",
        "--quiet",
    ];
    run_ok(scratch.path(), &args);
    let run = scratch.join("run");
    check_package(&rows, &run);

    // Replies that break submissions, in place of nano's own.
    let replies = [
        "None",
        "N/A",
        "nan",
        "=HYPERLINK(\"x\")",
        "Stop it.\nThen wait.",
        " ",
        "He said \"no\", twice",
        "Answer: B",
        "NULL",
        "µg/kg → naïve",
        "\r\n,\r",
    ];
    let log = run.join("results.jsonl");
    let edited: String = std::fs::read_to_string(&log)
        .unwrap()
        .lines()
        .zip(replies.iter().cycle())
        .map(|(line, reply)| {
            let mut row: serde_json::Value = serde_json::from_str(line).unwrap();
            row["status"] = "answered".into();
            row["final_text"] = (*reply).into();
            row["raw_text"] = format!("<|channel|>final<|message|>{reply}<|return|>").into();
            row.to_string() + "\n"
        })
        .collect();
    std::fs::write(&log, edited).unwrap();
    run_ok(scratch.path(), &["score", "run"]);
    check_package(&rows, &run);
    run_ok(scratch.path(), &["lint", "run"]);
}

#[test]
#[ignore = "needs Python with pandas: just test-full"]
fn independent_pandas_has_the_same_null_words() {
    let mut command = python();
    command
        .arg(root().join("tests/python/check_submission.py"))
        .arg("--null-words")
        .args(podium::submission::null_words::NULL_WORDS);
    succeeds(command);
}

/// Golden prompts of nano as input of `podium logits`.
fn nano_prompts(step: usize) -> String {
    let prompts = root().join("models/nano/prompts.golden.jsonl");
    std::fs::read_to_string(prompts)
        .unwrap()
        .lines()
        .step_by(step)
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
        .collect()
}

/// podium's logits of `model` in float32 arithmetic against transformers' run of `folder`.
fn transformers_agrees(scratch: &Scratch, model: &str, folder: &Path, step: usize) {
    let input = scratch.write("input.jsonl", nano_prompts(step));
    let args = [
        "logits",
        model,
        input.to_str().unwrap(),
        "--full",
        "--exact",
    ];
    let output = run_ok(scratch.path(), &args);
    let found = scratch.write("logits.jsonl", output.stdout);
    let mut command = python();
    command
        .arg(root().join("tests/python/check_logits.py"))
        .args([folder, &input, &found]);
    succeeds(command);
}

#[test]
#[ignore = "needs Python with transformers: just test-full"]
fn independent_transformers_gives_the_logits_of_nano() {
    let scratch = Scratch::new("independent-nano");
    transformers_agrees(&scratch, "nano", &root().join("models/nano"), 9);
}

/// What `quantize` writes is a checkpoint for transformers as it stands, in both precisions.
#[test]
#[ignore = "needs Python with transformers: just test-full"]
fn independent_transformers_loads_what_quantize_writes() {
    let scratch = Scratch::new("independent-quantize");
    for (input, output, precision) in [("nano", "sixteen", "16bit"), ("sixteen", "four", "4bit")] {
        let flags = ["--precision", precision, "--shard-size", "4MB", "--quiet"];
        let args = [&["quantize", input, output][..], &flags[..]].concat();
        run_ok(scratch.path(), &args);
        transformers_agrees(&scratch, output, &scratch.join(output), 30);
    }
}
