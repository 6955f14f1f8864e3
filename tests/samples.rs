//! Real benchmark files, where `PODIUM_SAMPLES` names a folder that holds some: podium's reading of
//! every row against a few lines of Python's (`tests/python/read_samples.py`), and a run of nano
//! over each file. No benchmark text is a part of the project, so these tests are ignored by plain
//! `cargo test`; `just test-samples FOLDER` runs them.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use podium::dataset::{self, Gold};
use podium::score::option_letter;
use serde_json::{Value, json};
use support::{Scratch, root, run, run_ok};

fn samples() -> Vec<PathBuf> {
    let folder = std::env::var_os("PODIUM_SAMPLES").expect("PODIUM_SAMPLES names no folder");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|it| it != "md"))
        .collect();
    files.sort();
    assert!(!files.is_empty());
    files
}

/// How podium reads a file: a line a row, or the message of the refusal.
fn reading(path: &Path) -> Value {
    match dataset::read(path) {
        Err(error) => json!({"refused": error.to_string()}),
        Ok(dataset) => {
            let rows = dataset.records.iter().map(|record| {
                assert_eq!(record.defect, None, "{}", path.display());
                let gold = match &record.gold {
                    Some(Gold::Option(index)) => Some(option_letter(*index)),
                    Some(Gold::Text(text)) => Some(text.clone()),
                    None => None,
                };
                json!({
                    "id": record.id, "question": record.question, "options": record.options,
                    "gold": gold, "fields": record.fields.keys().collect::<Vec<_>>(),
                })
            });
            json!({"rows": rows.collect::<Vec<_>>()})
        }
    }
}

fn python(args: &[&Path]) {
    let python = std::env::var_os("PODIUM_PYTHON").unwrap_or_else(|| "python3".into());
    let output = Command::new(python)
        .arg(root().join("tests/python/read_samples.py"))
        .args(args)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
#[ignore = "needs files of benchmarks: just test-samples FOLDER"]
fn samples_are_read_as_python_reads_them() {
    for path in samples() {
        let scratch = Scratch::new("samples");
        let rows = scratch.write("rows.json", reading(&path).to_string());
        python(&[&path, &rows]);
    }
}

#[test]
#[ignore = "needs files of benchmarks: just test-samples FOLDER"]
fn samples_are_evaluated_with_nothing_but_their_name() {
    for path in samples() {
        let scratch = Scratch::new("samples-eval");
        let read = reading(&path);
        let rows = scratch.write("rows.json", read.to_string());
        let args = ["eval", path.to_str().unwrap(), "--out", "run", "--quiet"];
        if read.get("refused").is_some() {
            let output = run(scratch.path(), &args);
            assert_eq!(output.status.code(), Some(2), "{}", path.display());
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(stderr.contains("hint: "), "{stderr}");
            continue;
        }
        run_ok(scratch.path(), &args);
        let submission = scratch.join("run/submission.csv");
        python(&[
            &path,
            &rows,
            &submission,
            &scratch.join("run/prompts.jsonl"),
        ]);
    }
}
