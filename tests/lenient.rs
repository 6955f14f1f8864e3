//! Strict and lenient scores through the binary: from the log's token ids by `eval`, from its texts
//! by `score`.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use support::{Scratch, jsonl, nano_rows, nano_tokenizer, reply_segments, run_ok};

const ANALYSIS: &str = "<|channel|>analysis<|message|>";
const FINAL: &str = "<|channel|>final<|message|>";
const NEXT: &str = "<|end|><|start|>assistant";

/// What a model with more to say might have written: the reply with `42` for the gold, how it
/// ended, its status, and the channel that its lenient answer is from.
fn replies() -> [(String, &'static str, &'static str, Option<&'static str>); 6] {
    [
        (
            format!("{ANALYSIS}Sum.{NEXT}{FINAL}The answer is 42. To see it, add"),
            "length",
            "truncated_final",
            Some("final"),
        ),
        (
            format!("{ANALYSIS}So the answer is 42. Let me check"),
            "length",
            "truncated_analysis",
            Some("analysis"),
        ),
        (
            format!("{ANALYSIS}Adding up, the answer is 42<|end|>"),
            "stop",
            "no_final",
            Some("analysis"),
        ),
        (
            "<|message|>The answer is 42.<|return|>".to_owned(),
            "stop",
            "malformed",
            Some(""),
        ),
        (
            format!("{ANALYSIS}42 or so, and then"),
            "length",
            "truncated_analysis",
            None,
        ),
        (
            format!("{ANALYSIS}The answer is 42. Say it.{NEXT}{FINAL}There you are.<|return|>"),
            "stop",
            "no_answer",
            Some("analysis"),
        ),
    ]
}

const N_ROWS: usize = 10;

/// A run of nano whose first replies are the ones above, in a log as older versions wrote. Its last
/// row is still to be run, so that `eval` judges all of them.
fn run_with_replies(scratch: &Scratch) -> PathBuf {
    scratch.write("sums.jsonl", nano_rows("sums.jsonl", N_ROWS).join("\n"));
    run_ok(scratch.path(), &EVAL);
    let log = scratch.join("run/results.jsonl");
    let tokenizer = nano_tokenizer();
    let mut rows = jsonl(&log);
    rows.sort_by_key(|row| row["key"].as_str().unwrap().to_owned());
    for (row, (raw, stop, status, _)) in rows.iter_mut().zip(replies()) {
        let raw = raw.replace("42", row["gold"]["value"].as_str().unwrap());
        let final_text = raw.split_once(FINAL).map(|(_, text)| text);
        row["output_ids"] = json!(tokenizer.encode(&reply_segments(&raw)).unwrap());
        row["final_text"] = json!(final_text.map(|text| text.trim_end_matches("<|return|>")));
        row["raw_text"] = json!(raw);
        row["stop_reason"] = json!(stop);
        row["status"] = json!(status);
        row["correct"] = json!(false);
        row["answer"] = Value::Null;
    }
    rows.pop();
    let lines: Vec<String> = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(&log, lines.concat()).unwrap();
    scratch.join("run")
}

const EVAL: [&str; 5] = ["eval", "sums.jsonl", "-q", "--out", "run"];

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn eval_and_score_find_what_replies_state_and_submit_none_of_it() {
    let scratch = Scratch::new("lenient");
    let run = run_with_replies(&scratch);
    let summary = run_ok(scratch.path(), &[&EVAL[..], &["--json"]].concat());
    let summary: Value = serde_json::from_slice(&summary.stdout).unwrap();
    let tally = &summary["tally"];
    let count = |of: &Value, name: &str| of[name].as_u64().unwrap();
    let n_strict = count(&tally["accuracy"], "n_correct");
    assert!(0 < n_strict && n_strict <= 4, "four replies are nano's own");
    assert_eq!(count(&tally["lenient"], "n_correct"), n_strict + 5);
    assert_eq!(
        count(&tally["lenient"], "n"),
        count(&tally["accuracy"], "n")
    );
    assert_eq!(count(&tally["lenient"], "n_unanswered"), 6);
    assert_eq!(count(&tally["lenient"], "n_found"), 5);
    assert_eq!(count(&tally["lenient"], "n_gained"), 5);

    let scores = read(&run.join("scores.csv"));
    let mut lines = scores
        .lines()
        .skip(1)
        .map(|line| line.split(',').collect::<Vec<_>>());
    for (_, _, status, channel) in replies() {
        let cells = lines.next().unwrap();
        assert_eq!(cells[2..5], ["", "false", status], "{cells:?}");
        let is_right = channel.is_some();
        assert_eq!(
            cells[7..],
            [is_right.to_string().as_str(), channel.unwrap_or("")],
            "{cells:?}"
        );
    }
    for cells in lines {
        assert_eq!(
            (cells[2], cells[3], cells[8]),
            (cells[6], cells[7], "final"),
            "{cells:?}"
        );
    }
    let submission = read(&run.join("submission.jsonl"));
    let n_blank = submission
        .lines()
        .filter(|line| line.contains("\"answer\":null"))
        .count();
    assert_eq!(n_blank, 6, "{submission}");

    // From the texts alone comes the same.
    let files = [
        "results.jsonl",
        "scores.csv",
        "submission.csv",
        "submission.jsonl",
        "run.json",
    ];
    let before = files.map(|file| read(&run.join(file)));
    let output = run_ok(scratch.path(), &["score", "run"]);
    assert_eq!(files.map(|file| read(&run.join(file))), before);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for line in [
        format!("now, strict       {n_strict:>6}/10"),
        format!("now, lenient      {:>6}/10", n_strict + 5),
        "Without a strict answer: 6; stating one elsewhere: 5; the right one: 5.".to_owned(),
    ] {
        let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(squeezed(&text).contains(&squeezed(&line)), "{line}: {text}");
    }
    let page = read(&run.join("report.html"));
    assert!(
        page.contains("\"channel\":\"analysis\""),
        "the page has them"
    );
    // The log's own lines know of no lenient answers, so a comparison gives no figure.
    let compared = run_ok(
        scratch.path(),
        &["compare", "run", "run", "--out", "compared"],
    );
    assert!(!String::from_utf8_lossy(&compared.stdout).contains("lenient"));
}

#[test]
fn a_cut_off_run_logs_both_verdicts() {
    let scratch = Scratch::new("lenient-cut");
    scratch.write("mixed.jsonl", nano_rows("mixed.jsonl", 24).join("\n"));
    let args = "eval mixed.jsonl --max-new-tokens 30 --samples 2 --temperature 1 --out run";
    let output = run_ok(scratch.path(), &args.split(' ').collect::<Vec<_>>());
    let mut kinds = [0, 0];
    for row in jsonl(&scratch.join("run/results.jsonl")) {
        let is_answered = row["answer"].is_object();
        kinds[usize::from(is_answered)] += 1;
        assert_eq!(row["lenient"].is_null(), is_answered, "{row}");
        if is_answered {
            assert_eq!(row["answer"]["channel"], "final", "{row}");
        } else {
            let lenient = &row["lenient"];
            assert!(
                lenient["correct"].is_boolean() && lenient.get("answer").is_some(),
                "{row}"
            );
        }
    }
    assert!(kinds.iter().all(|&n| n > 4), "{kinds:?}");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for label in [
        "all, maj@2, strict",
        "all, maj@2, lenient",
        "mean@2, lenient",
    ] {
        assert!(text.contains(label), "{text}");
    }
    let manifest: Value = serde_json::from_str(&read(&scratch.join("run/run.json"))).unwrap();
    let figures = &manifest["tally"]["over_samples"];
    assert!(figures["lenient_mean"]["value"].as_f64() >= figures["mean"]["value"].as_f64());
    let compared = run_ok(
        scratch.path(),
        &["compare", "run", "run", "--out", "compared"],
    );
    let compared = String::from_utf8_lossy(&compared.stdout).into_owned();
    assert!(compared.contains("  lenient "), "{compared}");
}
