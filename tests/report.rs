//! `podium report` and `podium score` on real runs of nano, and pages for the browser's tests.

mod support;

use std::path::{Path, PathBuf};

use podium::report::compare::Comparison;
use podium::report::html::{write_comparison_page, write_run_page};
use serde_json::{Value, json};
use support::{Scratch, jsonl, nano_rows, root, run, run_ok};

/// What must stay text wherever it stands.
const HOSTILE: &str = "</script><script>document.title='hurt'</script><!-- <img src=x onerror=\"document.title='hurt'\"> <|end|>";

/// A run of the first rows of nano's mixed questions.
fn nano_run(scratch: &Scratch, n: usize) -> PathBuf {
    scratch.write("mixed.jsonl", nano_rows("mixed.jsonl", n).join("\n"));
    run_ok(
        scratch.path(),
        &["eval", "mixed.jsonl", "-q", "--out", "run"],
    );
    scratch.join("run")
}

/// A JSON block of a page, as a browser reads it.
fn block(html: &str, id: &str) -> Value {
    let begin = format!("<script type=\"application/json\" id=\"{id}\">");
    let start = html.find(&begin).expect("the block is there") + begin.len();
    let end = start + html[start..].find("</script>").expect("it ends");
    assert!(!html[start..end].contains('<'), "nothing can end the block");
    serde_json::from_str(&html[start..end]).expect("it is JSON")
}

fn page(run: &Path) -> String {
    std::fs::read_to_string(run.join("report.html")).expect("the page was written")
}

/// Adds hostile text to a run everywhere a page takes text from.
fn poison(run: &Path) {
    let edit = |file: &str, change: &dyn Fn(usize, &mut Value)| {
        let mut lines = jsonl(&run.join(file));
        lines
            .iter_mut()
            .enumerate()
            .for_each(|(i, line)| change(i, line));
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(run.join(file), text).expect("the run is writable");
    };
    edit("results.jsonl", &|i, line| {
        line["raw_text"] = json!(format!(
            "<|channel|>analysis<|message|>{HOSTILE} {i}<|end|><|start|>assistant<|channel|>final<|message|>{HOSTILE}<|return|>"
        ));
        line["final_text"] = json!(HOSTILE);
        line["answer"] = json!({"text": "hurt", "rule": HOSTILE, "span": [HOSTILE.find("hurt"), HOSTILE.find("hurt").map(|at| at + 4)], "rules_agree": false});
        line["group"] = json!(HOSTILE);
        line["format_issues"] = json!([HOSTILE]);
    });
    edit("prompts.jsonl", &|_, line| {
        line["text"] = json!(format!(
            "<|start|>user<|message|>{HOSTILE}<|end|><|start|>assistant"
        ));
        line["id"] = json!(HOSTILE);
        line["group"] = json!(HOSTILE);
    });
    let path = run.join("run.json");
    let text = std::fs::read_to_string(&path).expect("a run has one");
    let mut manifest: Value = serde_json::from_str(&text).expect("it is JSON");
    manifest["name"] = json!(HOSTILE);
    manifest["dataset_path"] = json!(HOSTILE);
    manifest["environment"]["command_line"] = json!([HOSTILE]);
    std::fs::write(&path, manifest.to_string()).expect("the run is writable");
    std::fs::remove_file(run.join("scores.csv")).expect("a run has one");
}

/// A run of many rows out of one of few: the same rows again under new keys.
fn multiply(run: &Path, n_rows: usize) {
    for file in ["results.jsonl", "prompts.jsonl"] {
        let lines = jsonl(&run.join(file));
        let mut text = String::new();
        for i in 0..n_rows {
            let mut line = lines[i % lines.len()].clone();
            let key = format!(
                "{}-{}",
                line["key"].as_str().expect("a key"),
                i / lines.len()
            );
            line["key"] = json!(key);
            line["id"] = json!(key);
            if file == "results.jsonl" && i == n_rows - 1 {
                line["final_text"] = json!("the needle in the haystack");
            }
            text += &format!("{line}\n");
        }
        std::fs::write(run.join(file), text).expect("the run is writable");
    }
    std::fs::remove_file(run.join("scores.csv")).expect("a run has one");
}

fn comparison() -> Comparison {
    let text = std::fs::read_to_string(root().join("tests/browser/comparison.json"))
        .expect("it is checked in");
    serde_json::from_str(&text).expect("it is a comparison")
}

#[test]
fn eval_and_report_write_the_same_page() {
    let scratch = Scratch::new("report");
    let run = nano_run(&scratch, 12);
    let first = page(&run);
    let output = run_ok(scratch.path(), &["report", "run"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "run/report.html\n");
    assert_eq!(page(&run), first);

    let data = block(&first, "data");
    assert_eq!(data["manifest"]["n_rows"], 12);
    assert_eq!(data["summary"]["tally"]["n_samples"], 12);
    assert_eq!(data["verdicts_are_the_logs"], false);
    assert!(
        !data["memory"]["seconds"]
            .as_array()
            .expect("a list")
            .is_empty()
    );
    assert!(
        !data["speed"]["seconds"]
            .as_array()
            .expect("a list")
            .is_empty()
    );
    assert!(data["manifest"]["ledger"].as_array().expect("a list").len() >= 6);

    // Every row stands on the page with what the log says of it.
    let rows = block(&first, "rows");
    let start = rows["prompt_start"].as_str().expect("text");
    let end = rows["prompt_end"].as_str().expect("text");
    let prompts = jsonl(&run.join("prompts.jsonl"));
    for (i, prompt) in prompts.iter().enumerate() {
        let middle = rows["questions"]["prompt"][i].as_str().expect("text");
        assert_eq!(prompt["text"], format!("{start}{middle}{end}"));
        let logged = jsonl(&run.join("results.jsonl"));
        let row = logged
            .iter()
            .find(|row| row["key"] == prompt["key"])
            .expect("it ran");
        assert_eq!(rows["samples"]["final"][i], row["final_text"]);
        assert_eq!(rows["samples"]["answer"][i], row["answer"]["text"]);
        assert_eq!(rows["samples"]["correct"][i] == 1, row["correct"] == true);
    }
}

#[test]
fn hostile_text_stays_text_in_both_pages() {
    let scratch = Scratch::new("hostile");
    let run = nano_run(&scratch, 6);
    poison(&run);
    write_run_page(&run, None).expect("the folder is writable");
    write_comparison_page(scratch.path(), &comparison()).expect("the folder is writable");
    let of_comparison = std::fs::read_to_string(scratch.join("comparison.html")).expect("written");
    for (html, n_scripts) in [(page(&run), 4), (of_comparison, 3)] {
        assert_eq!(html.matches("<script").count(), n_scripts);
        assert_eq!(html.matches("</script").count(), n_scripts);
        assert!(!html.contains("<img") && !html.contains("<!-- <"));
    }
    let rows = block(&page(&run), "rows");
    assert_eq!(rows["samples"]["final"][0], HOSTILE);
    assert_eq!(rows["questions"]["id"][0], HOSTILE);
    assert_eq!(block(&page(&run), "data")["verdicts_are_the_logs"], true);
}

#[test]
fn a_stopped_run_has_a_page_with_its_missing_rows() {
    let scratch = Scratch::new("stopped");
    let run = nano_run(&scratch, 4);
    let log = std::fs::read_to_string(run.join("results.jsonl")).expect("a run has one");
    let half: String = log
        .lines()
        .take(2)
        .map(|line| format!("{line}\n"))
        .collect();
    std::fs::write(run.join("results.jsonl"), half).expect("the run is writable");
    std::fs::remove_file(run.join("scores.csv")).expect("a run has one");
    std::fs::remove_file(run.join("memory.jsonl")).expect("a run has one");
    run_ok(scratch.path(), &["report", "run"]);
    let rows = block(&page(&run), "rows");
    let words = rows["words"].as_array().expect("a list");
    let statuses = rows["samples"]["status"].as_array().expect("a list");
    let n_not_run = statuses
        .iter()
        .filter(|place| words[place.as_u64().expect("a place") as usize] == "not_run")
        .count();
    assert_eq!((statuses.len(), n_not_run), (4, 2));
}

#[test]
fn score_judges_again_and_leaves_the_log_alone() {
    let scratch = Scratch::new("score");
    let run = nano_run(&scratch, 40);
    let read = |file: &str| std::fs::read(run.join(file)).expect("it is there");
    let files = [
        "scores.csv",
        "submission.csv",
        "submission.jsonl",
        "results.jsonl",
        "run.json",
    ];
    let before: Vec<_> = files.map(read).into();

    // By its own profile nothing changes, not a byte.
    let output = run_ok(scratch.path(), &["score", "run"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("0 verdicts changed"));
    assert_eq!(files.map(read).to_vec(), before);

    // A profile that finds an answer only in a box finds none.
    let profile = "name = \"boxed\"\ntemplate = \"{{ question }}\"\n[scoring]\nrules = [\"boxed\"]\n\
                   [submission]\ncolumns = [\"id\", \"answer as prediction\"]\n";
    scratch.write("boxed.toml", profile);
    let output = run_ok(
        scratch.path(),
        &["score", "run", "--profile", "boxed.toml", "--json"],
    );
    let found: Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert_eq!(found["schema"], "podium.rescore/1");
    assert_eq!(found["accuracy"]["n_correct"], 0);
    assert_eq!(found["n_changed"], 40);
    assert_eq!(found["n_lost"], found["accuracy_before"]["n_correct"]);
    assert_eq!(
        read("results.jsonl"),
        before[3],
        "the log is never rewritten"
    );
    let manifest: Value = serde_json::from_slice(&read("run.json")).expect("it is JSON");
    assert_eq!(manifest["scoring_hash"], found["scoring_hash"]);
    assert_ne!(found["scoring_hash"], found["scoring_hash_before"]);
    assert_eq!(manifest["tally"]["statuses"]["no_answer"], 40);
    assert!(read("submission.csv").starts_with(b"id,prediction\n"));
    // The page has the new verdicts, also when made again from the files alone.
    let first = block(&page(&run), "rows");
    assert_eq!(first["samples"]["correct"][0], 0);
    run_ok(scratch.path(), &["report", "run"]);
    assert_eq!(
        block(&page(&run), "rows")["samples"]["correct"],
        first["samples"]["correct"]
    );

    // And back again.
    run_ok(scratch.path(), &["score", "run"]);
    assert_eq!(files.map(read).to_vec(), before);
}

#[test]
fn score_asks_for_the_runs_own_data_set() {
    let scratch = Scratch::new("score-dataset");
    nano_run(&scratch, 4);
    let moved = scratch.join("moved.jsonl");
    std::fs::rename(scratch.join("mixed.jsonl"), &moved).expect("the folder is writable");
    let refused = |args: &[&str], words: &str| {
        let output = run(scratch.path(), args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(words) && text.contains("hint: "), "{text}");
    };
    refused(&["score", "run"], "is not there");
    run_ok(
        scratch.path(),
        &["score", "run", "--dataset", "moved.jsonl"],
    );
    scratch.write("other.jsonl", nano_rows("mixed.jsonl", 5).join("\n"));
    refused(
        &["score", "run", "--dataset", "other.jsonl"],
        "is not the data set of this run",
    );
    refused(&["report", "nothing"], "no run");
}

/// Pages for `tests/browser`, written to the folder that `PODIUM_PAGES` names.
#[test]
#[ignore = "makes the pages that `just test-browser` opens"]
fn pages_for_the_browser() {
    let out = PathBuf::from(std::env::var_os("PODIUM_PAGES").expect("PODIUM_PAGES names a folder"));
    std::fs::create_dir_all(&out).expect("the folder can be made");
    let keep = |from: PathBuf, name: &str| {
        std::fs::copy(from, out.join(name)).expect("the folder is writable");
    };
    let scratch = Scratch::new("pages");
    let run = nano_run(&scratch, 500);
    keep(run.join("report.html"), "run.html");
    for (precision, out) in [("16bit", "wide"), ("4bit", "again")] {
        let args = [
            "eval",
            "mixed.jsonl",
            "-q",
            "--precision",
            precision,
            "--batch",
            "7",
            "--out",
            out,
        ];
        run_ok(scratch.path(), &args);
    }
    // Two precisions, and the first one again at another batch size: nothing may differ.
    run_ok(
        scratch.path(),
        &["compare", "run", "wide", "again", "--out", "compared"],
    );
    keep(
        scratch.join("compared/comparison.html"),
        "comparison-nano.html",
    );
    multiply(&run, 20_000);
    write_run_page(&run, None).expect("the folder is writable");
    keep(run.join("report.html"), "run-20000.html");
    let scratch = Scratch::new("pages-hostile");
    let run = nano_run(&scratch, 60);
    poison(&run);
    write_run_page(&run, None).expect("the folder is writable");
    keep(run.join("report.html"), "run-hostile.html");
    write_comparison_page(&out, &comparison()).expect("the folder is writable");
}
