//! Rows of two stages, and rows at their answer headroom, by the nano model: the same bits on every
//! schedule and after every kill; the second stage is what it would be as a conversation of its
//! own.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{Scratch, bits, jsonl, nano_rows, podium, run_ok};

/// Asks rows with options openly first; other rows once. The open question is long enough beside
/// what all prompts share for its prompt to be held.
const PROFILE: &str = r#"
name = "two"
instructions = "Think briefly, then give only the answer."
template = "{{ question }}{% if group != 'choice' %}{% for option in options %}\n{{ option.letter }}. {{ option.text }}{% endfor %}{% else %}\nThe list is {{ id }}, and once more: {{ question }} It is list {{ id }}.{% endif %}"

[scoring]
scorer = "auto"
rules = ["answer_is", "boxed", "option_letter", "option_text", "last_number", "whole"]

[second_stage]
when = { group = "choice" }
template = "{{ question }}{% for option in options %}\n{{ option.letter }}. {{ option.text }}{% endfor %}"
max_new_tokens = 200

[second_stage.scoring]
scorer = "choice"
rules = ["option_letter", "option_text", "whole"]

[defaults]
max_new_tokens = 256
"#;

fn scratch(name: &str, n_rows: usize) -> Scratch {
    let scratch = Scratch::new(name);
    scratch.write("two.toml", PROFILE);
    scratch.write("rows.jsonl", nano_rows("mixed.jsonl", n_rows).join("\n"));
    scratch
}

fn eval(scratch: &Scratch, out: &str, flags: &str) -> Vec<Value> {
    let args =
        format!("eval rows.jsonl --profile two.toml --out {out} --quiet --trace-hash {flags}");
    let args: Vec<&str> = args.split_whitespace().collect();
    run_ok(scratch.path(), &args);
    jsonl(&scratch.join(out).join("results.jsonl"))
}

fn manifest(scratch: &Scratch, out: &str) -> Value {
    let text = std::fs::read_to_string(scratch.join(out).join("run.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Prompt tokens of all stages, each less its last, which decoding feeds.
fn n_prompt_tokens(rows: &[Value]) -> u64 {
    let of = |stage: &Value| stage["prompt_tokens"].as_u64().map_or(0, |n| n - 1);
    rows.iter().map(|row| of(row) + of(&row["second"])).sum()
}

#[test]
fn stages_do_not_depend_on_the_schedule_and_reuse_what_the_first_left() {
    let scratch = scratch("stages", 30);
    for (name, common, n_samples) in [
        ("greedy", "", 1),
        ("sampled", "--temperature 1 --samples 3 --seed 4", 3),
    ] {
        let out = |variant: &str| format!("{name}-{variant}");
        let base = out("base");
        let rows = eval(&scratch, &base, &format!("{common} --batch 1 --threads 1"));
        assert_eq!(rows.len(), 30 * n_samples);
        let two: Vec<&Value> = rows.iter().filter(|r| r["second"].is_object()).collect();
        assert!(
            two.len() >= 3 * n_samples,
            "{} rows of two stages",
            two.len()
        );
        for row in &rows {
            let is_choice = row["group"] == "choice" && row["final_text"].is_string();
            assert_eq!(row["second"].is_object(), is_choice, "{row}");
        }
        let base_bits = bits(&scratch.join(&base));
        for (variant, flags) in [
            ("batch-3", "--batch 3"),
            ("batch-8", "--batch 8 --threads 2"),
            ("auto", ""),
            ("static", "--batch 5 --no-refill"),
            ("no-reuse", "--batch 8 --no-prefix-reuse"),
            ("poison", "--batch 8 --poison"),
        ] {
            let name = out(variant);
            let found = eval(&scratch, &name, &format!("{common} {flags}"));
            assert!(base_bits == bits(&scratch.join(&name)), "{name} differs");
            let totals = &manifest(&scratch, &name)["totals"];
            let reused = totals["reused_prefix_tokens"].as_u64().unwrap();
            let computed = totals["prefill_tokens"].as_u64().unwrap();
            assert_eq!(reused + computed, n_prompt_tokens(&found), "{name}");
            for row in found.iter().filter(|row| row["second"].is_object()) {
                let first = row["prompt_tokens"].as_u64().unwrap();
                let taken = row["second"]["reused_tokens"].as_u64().unwrap();
                if variant == "no-reuse" {
                    assert_eq!(taken, 0);
                } else {
                    assert!(taken + 1 >= first, "{name}: {taken} of {first} tokens");
                }
            }
            for file in [
                "submission.csv",
                "submission.jsonl",
                "scores.csv",
                "prompts.jsonl",
            ] {
                let read = |run: &str| std::fs::read(scratch.join(run).join(file)).unwrap();
                assert!(read(&base) == read(&name), "{name}: {file} differs");
            }
        }
    }
}

#[test]
fn a_second_stage_is_the_conversation_it_looks_like() {
    let scratch = scratch("conversation", 24);
    let rows = eval(&scratch, "run", "--batch 4");
    let prompts = jsonl(&scratch.join("run/prompts.jsonl"));
    // The same conversation as a messages row; greedy, so that the row's key draws nothing.
    let mut conversations = Vec::new();
    for row in rows.iter().filter(|row| row["second"].is_object()) {
        let prompt = prompts.iter().find(|p| p["id"] == row["id"]).unwrap();
        let text = prompt["text"].as_str().unwrap();
        let (_, question) = text.split_once("<|start|>user<|message|>").unwrap();
        let question = Value::from(question.split_once("<|end|>").unwrap().0);
        let turn = |role: &str, content: &Value| json!({"role": role, "content": content});
        conversations.push(json!({"id": row["id"], "messages": [
            turn("user", &question),
            turn("assistant", &row["final_text"]),
            turn("user", &row["second"]["user_turn"]),
        ]}));
    }
    let lines: Vec<String> = conversations.iter().map(Value::to_string).collect();
    scratch.write("talk.jsonl", lines.join("\n"));
    let args =
        "eval talk.jsonl --profile nano --out talk --quiet --trace-hash --max-new-tokens 200";
    run_ok(scratch.path(), &args.split(' ').collect::<Vec<_>>());
    let talk = jsonl(&scratch.join("talk/results.jsonl"));
    assert_eq!(talk.len(), conversations.len());
    for alone in talk {
        let row = rows.iter().find(|row| row["id"] == alone["id"]).unwrap();
        for field in [
            "output_ids",
            "logprob_sum_bits",
            "trace_hash",
            "prompt_tokens",
        ] {
            assert_eq!(
                row["second"][field], alone[field],
                "{field} of {}",
                row["id"]
            );
        }
    }
}

#[test]
fn the_second_reply_decides_and_is_scored_again_alike() {
    let scratch = scratch("rescore", 40);
    let rows = eval(&scratch, "run", "");
    let mut n_answered = 0;
    for row in rows.iter().filter(|row| row["second"].is_object()) {
        assert_eq!(row["gold"]["kind"], "option");
        if row["status"] == "answered" {
            n_answered += 1;
            let letter = row["answer"]["text"].as_str().unwrap();
            assert!(["A", "B", "C", "D", "E"].contains(&letter), "{row}");
        }
    }
    assert!(n_answered > 0);
    let args = ["score", "run", "--json"];
    let rescored: Value = serde_json::from_slice(&run_ok(scratch.path(), &args).stdout).unwrap();
    assert_eq!(rescored["n_changed"], 0, "{rescored}");
    let page = std::fs::read_to_string(scratch.join("run/report.html")).unwrap();
    assert!(page.contains("[user] "), "the page shows both stages");
}

#[test]
fn a_kill_between_the_stages_costs_only_rows_in_flight() {
    let scratch = scratch("stage-kills", 40);
    let flags = "--batch 4 --threads 1 --temperature 1 --seed 2";
    eval(&scratch, "whole", flags);
    let expected = bits(&scratch.join("whole"));
    let mut interrupted = 0;
    for kill in 0..8 {
        let out = format!("run-{kill}");
        let args =
            format!("eval rows.jsonl --profile two.toml --out {out} --quiet --trace-hash {flags}");
        let mut child = podium(scratch.path())
            .args(args.split_whitespace())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let log = scratch.join(&out).join("results.jsonl");
        let n_lines =
            || std::fs::read(&log).map_or(0, |b| b.iter().filter(|&&c| c == b'\n').count());
        let started = Instant::now();
        while n_lines() < 4 * kill + 1 && child.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < Duration::from_secs(120));
            std::thread::sleep(Duration::from_micros(300));
        }
        let _ = child.kill();
        child.wait().unwrap();
        interrupted += usize::from(n_lines() < 40);
        eval(&scratch, &out, flags);
        assert!(expected == bits(&scratch.join(&out)), "{out} differs");
        for file in ["submission.csv", "scores.csv", "prompts.jsonl"] {
            let read = |run: &str| std::fs::read(scratch.join(run).join(file)).unwrap();
            assert!(read("whole") == read(&out), "{out}: {file} differs");
        }
    }
    assert!(interrupted >= 4, "{interrupted} of 8 runs were interrupted");
}

#[test]
fn a_second_stage_that_does_not_fit_leaves_the_open_answer() {
    let scratch = scratch("stage-context", 24);
    let whole = eval(&scratch, "whole", "");
    let n_first = |row: &Value| {
        row["prompt_tokens"].as_u64().unwrap() + row["output_ids"].as_array().unwrap().len() as u64
    };
    // Every first stage fits; the second prompts that are longer do not.
    let context = whole.iter().map(n_first).max().unwrap();
    let args = format!("eval rows.jsonl --profile two.toml --out cut --quiet --context {context}");
    let output = support::run(scratch.path(), &args.split(' ').collect::<Vec<_>>());
    let rows = jsonl(&scratch.join("cut/results.jsonl"));
    assert_eq!(rows.len(), 24);
    let errors: Vec<&Value> = rows.iter().filter(|row| row["status"] == "error").collect();
    let expected = whole.iter().filter(|row| {
        let n = row["second"]["prompt_tokens"].as_u64();
        n.is_some_and(|n| n >= context)
    });
    assert_eq!(errors.len(), expected.count());
    assert_eq!(output.status.code(), Some(i32::from(!errors.is_empty())));
    for row in errors {
        assert!(
            row["final_text"].is_string() && row["second"].is_null(),
            "{row}"
        );
        assert!(
            row["error"]["message"]
                .as_str()
                .unwrap()
                .contains("positions")
        );
    }
}

#[test]
fn rows_of_curebench_are_asked_by_their_type() {
    let scratch = Scratch::new("curebench");
    let options = json!({"A": "aspirin", "B": "warfarin", "C": "heparin", "D": "ibuprofen"});
    let rows: Vec<String> = ["multi_choice", "open_ended_multi_choice", "open_ended"]
        .into_iter()
        .cycle()
        .take(9)
        .enumerate()
        .map(|(i, kind)| {
            let mut row = json!({
                "id": format!("cure-{i}"),
                "question_type": kind,
                "question": format!("Which drug number {i} thins the blood?"),
                "correct_answer": if kind == "open_ended" { "warfarin" } else { "B" },
            });
            if kind != "open_ended" {
                row["options"] = options.clone();
            }
            row.to_string()
        })
        .collect();
    scratch.write("cure.jsonl", rows.join("\n"));
    let args = "eval cure.jsonl --profile curebench --out run --quiet --max-new-tokens 60";
    run_ok(scratch.path(), &args.split(' ').collect::<Vec<_>>());
    let prompts = jsonl(&scratch.join("run/prompts.jsonl"));
    for (prompt, kind) in prompts.iter().zip(["multi", "two", "open"].iter().cycle()) {
        let text = prompt["text"].as_str().unwrap();
        let turn = prompt["next_turn"].as_str();
        assert_eq!(text.contains("B. warfarin"), *kind == "multi", "{text}");
        assert_eq!(
            turn.is_some_and(|t| t.contains("B. warfarin")),
            *kind == "two"
        );
    }
    let results = jsonl(&scratch.join("run/results.jsonl"));
    assert_eq!(results.len(), 9);
    for row in results {
        assert!(row["gold"].is_object(), "{row}");
        let may = row["group"] == "open_ended_multi_choice" && row["final_text"].is_string();
        assert_eq!(row["second"].is_object(), may, "{row}");
    }
}

#[test]
fn the_headroom_closes_the_analysis_alike_on_every_schedule() {
    let scratch = scratch("headroom", 30);
    // nano's thoughts are short: with this budget some of them are done in time.
    let common = "--max-new-tokens 44 --answer-headroom 16";
    let rows = eval(&scratch, "base", &format!("{common} --batch 1 --threads 1"));
    let forced: Vec<&Value> = rows.iter().filter(|row| row["forced"].is_array()).collect();
    assert!(
        (1..30).contains(&forced.len()),
        "{} rows are closed",
        forced.len()
    );
    for row in &forced {
        let raw = row["raw_text"].as_str().unwrap();
        assert!(raw.contains("<|channel|>final<|message|>"), "{raw}");
        assert!(row["final_text"].is_string(), "{row}");
        let ids = row["output_ids"].as_array().unwrap();
        let (from, to) = (row["forced"][0].as_u64(), row["forced"][1].as_u64());
        assert_eq!(from, Some(28), "where the headroom begins");
        assert!(to.unwrap() < ids.len() as u64 && ids.len() <= 44);
    }
    let base = bits(&scratch.join("base"));
    for (name, flags) in [
        ("batch-8", "--batch 8"),
        ("static", "--batch 5 --no-refill"),
        ("no-reuse", "--batch 8 --no-prefix-reuse"),
        ("poison", "--batch 8 --poison"),
    ] {
        eval(&scratch, name, &format!("{common} {flags}"));
        assert!(base == bits(&scratch.join(name)), "{name} differs");
    }
    let manifest = manifest(&scratch, "base");
    assert_eq!(manifest["generation"]["answer_headroom"], 16);
    let either = |row: &&Value| row["forced"].is_array() || row["second"]["forced"].is_array();
    let n_closed = rows.iter().filter(either).count();
    assert_eq!(manifest["tally"]["closed"]["n"], n_closed);
    // Without it those rows are cut off in their analysis.
    let plain = eval(&scratch, "plain", "--max-new-tokens 44");
    let cut = |rows: &[Value]| {
        let is_cut = |row: &&Value| row["status"] == "truncated_analysis";
        rows.iter().filter(is_cut).count()
    };
    assert!(
        cut(&rows) < cut(&plain),
        "{} and {}",
        cut(&rows),
        cut(&plain)
    );
}

#[test]
fn a_headroom_without_room_is_refused() {
    let scratch = scratch("headroom-refused", 2);
    for (headroom, word) in [("256", "not below"), ("2", "no room for an answer")] {
        let args =
            format!("eval rows.jsonl --profile two.toml --out run --answer-headroom {headroom}");
        let output = support::run(scratch.path(), &args.split(' ').collect::<Vec<_>>());
        assert_eq!(output.status.code(), Some(2));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains(word), "{stderr}");
    }
}
