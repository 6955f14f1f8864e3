//! The command line itself: its commands are those of the README, its configuration files repeat
//! a run, its JSON is JSON.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::collections::BTreeSet;

use support::{Scratch, bits, jsonl, nano_rows, root, run_ok, snapshot};

#[test]
fn the_readme_lists_the_commands_of_the_help() {
    let scratch = Scratch::new("help");
    let help = String::from_utf8(run_ok(scratch.path(), &["help"]).stdout).unwrap();
    let listed: BTreeSet<String> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .map(|line| line.split_whitespace().next().unwrap().to_owned())
        .filter(|name| name != "help")
        .collect();
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let written: BTreeSet<String> = readme
        .lines()
        .filter_map(|line| line.strip_prefix("| `podium "))
        .map(|rest| rest.split([' ', '`']).next().unwrap().to_owned())
        .collect();
    assert_eq!(listed, written);
}

#[test]
fn every_command_explains_itself() {
    let scratch = Scratch::new("help-commands");
    for command in [
        "eval",
        "inspect",
        "plan",
        "compare",
        "score",
        "lint",
        "report",
        "merge",
        "logits",
        "selfcheck",
        "bench",
    ] {
        let help = String::from_utf8(run_ok(scratch.path(), &[command, "--help"]).stdout).unwrap();
        assert!(help.contains("Usage: podium"), "{command}: {help}");
    }
}

#[test]
fn a_runs_manifest_repeats_it() {
    let scratch = Scratch::new("repeat");
    scratch.write("rows.jsonl", nano_rows("mixed.jsonl", 8).join("\n"));
    let flags =
        "eval rows.jsonl --out a --quiet --temperature 0.7 --samples 2 --seed 9 --trace-hash";
    run_ok(scratch.path(), &flags.split(' ').collect::<Vec<_>>());
    let again = "eval --config a/run.json --out b --quiet --batch 3";
    run_ok(scratch.path(), &again.split(' ').collect::<Vec<_>>());
    assert_eq!(bits(&scratch.join("a")), bits(&scratch.join("b")));

    let config = "datasets = [\"rows.jsonl\"]\ntemperature = 0.7\nsamples = 2\nseed = 3\ntrace-hash = true\n";
    scratch.write("c.toml", config);
    // A flag wins over the file.
    let toml = "eval --config c.toml --seed 9 --out c --quiet";
    run_ok(scratch.path(), &toml.split(' ').collect::<Vec<_>>());
    assert_eq!(bits(&scratch.join("a")), bits(&scratch.join("c")));
}

#[test]
fn json_is_one_object_and_a_finished_run_prints_it_again() {
    let scratch = Scratch::new("json");
    scratch.write(
        "rows.csv",
        "id,question,answer\n007,2 + 3 = ?,5\n008,4 + 4 = ?,8\n",
    );
    let args = ["eval", "rows.csv", "--json", "--quiet"];
    let first = run_ok(scratch.path(), &args).stdout;
    let first: serde_json::Value = serde_json::from_slice(&first).unwrap();
    assert_eq!(first["schema"], "podium.summary/1");
    assert_eq!(first["tally"]["n_questions"], 2);
    let again = run_ok(scratch.path(), &args).stdout;
    let again: serde_json::Value = serde_json::from_slice(&again).unwrap();
    assert_eq!(first["tally"], again["tally"]);
    assert_eq!(
        first["n_sessions"], again["n_sessions"],
        "no session for a reprint"
    );
    let run = scratch.path().join(first["run_dir"].as_str().unwrap());
    let results = jsonl(&run.join("results.jsonl"));
    assert!(results.iter().any(|row| row["id"] == "007"), "{results:?}");
    let submission = std::fs::read_to_string(run.join("submission.csv")).unwrap();
    assert!(
        submission.lines().nth(1).unwrap().starts_with("007,"),
        "{submission}"
    );
}

#[test]
fn a_dry_run_writes_nothing() {
    let scratch = Scratch::new("dry-run");
    scratch.write("rows.jsonl", nano_rows("mixed.jsonl", 3).join("\n"));
    let output = run_ok(scratch.path(), &["eval", "rows.jsonl", "--dry-run"]);
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(stdout.contains("would run 3 samples"), "{stdout}");
    assert!(!scratch.join("submissions").exists());
}

/// A long run: what is done after five seconds is a whole submission, every id in its place.
#[test]
fn a_time_limit_leaves_a_submission_with_every_id() {
    let scratch = Scratch::new("time-limit-long");
    let rows: Vec<String> = (0..3000)
        .map(|i| {
            let question = format!("What is {} x {}?", 1234 + i, 5678 + 7 * i);
            serde_json::json!({"id": format!("q-{i:04}"), "question": question, "answer": "1"})
                .to_string()
        })
        .collect();
    scratch.write("rows.jsonl", rows.join("\n"));
    let args = "eval rows.jsonl --out run --quiet --batch 1 --threads 1 --time-limit 5s";
    let started = std::time::Instant::now();
    let output = run_ok(scratch.path(), &args.split(' ').collect::<Vec<_>>());
    assert!(started.elapsed().as_secs() < 60);
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(stdout.contains("time limit was reached"), "{stdout}");
    let n_done = jsonl(&scratch.join("run/results.jsonl")).len();
    assert!((1..3000).contains(&n_done), "{n_done} rows in five seconds");
    let submission = jsonl(&scratch.join("run/submission.jsonl"));
    let ids: Vec<String> = (0..3000).map(|i| format!("q-{i:04}")).collect();
    let found: Vec<&str> = submission
        .iter()
        .map(|r| r["id"].as_str().unwrap())
        .collect();
    assert_eq!(found, ids);
    let n_not_run = submission.iter().filter(|r| r["status"] == "not_run");
    assert_eq!(n_not_run.count(), 3000 - n_done);
    let manifest = std::fs::read_to_string(scratch.join("run/run.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!(manifest["sessions"][0]["outcome"], "time_limit");
    assert_eq!(manifest["tally"]["accuracy"]["n"], n_done);
}

#[test]
fn a_time_limit_keeps_what_is_done() {
    let scratch = Scratch::new("time-limit");
    scratch.write("rows.jsonl", nano_rows("mixed.jsonl", 40).join("\n"));
    let args = "eval rows.jsonl --out run --quiet --batch 1 --time-limit 0.05s";
    let output = run_ok(scratch.path(), &args.split(' ').collect::<Vec<_>>());
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(stdout.contains("time limit"), "{stdout}");
    let scores = std::fs::read_to_string(scratch.join("run/scores.csv")).unwrap();
    assert_eq!(scores.lines().count(), 41);
    assert!(scores.contains("not_run"), "{scores}");
    run_ok(
        scratch.path(),
        &"eval rows.jsonl --out run --quiet"
            .split(' ')
            .collect::<Vec<_>>(),
    );
    assert_eq!(jsonl(&scratch.join("run/results.jsonl")).len(), 40);
}

#[test]
fn globs_and_folders_run_every_file() {
    let scratch = Scratch::new("globs");
    for (name, file) in [("a", "sums.jsonl"), ("b", "choice.jsonl")] {
        scratch.write(&format!("data/{name}.jsonl"), nano_rows(file, 2).join("\n"));
    }
    let args = ["eval", "data", "--quiet", "--precision", "4bit,16bit"];
    let output = String::from_utf8(run_ok(scratch.path(), &args).stdout).unwrap();
    // It ends with the commands that set each file's runs side by side, as they stand.
    let commands: Vec<&str> = output
        .lines()
        .filter_map(|line| line.strip_prefix("side by side: podium "))
        .collect();
    assert_eq!(commands.len(), 2, "{output}");
    for command in commands {
        let args: Vec<&str> = command.split(' ').collect();
        assert_eq!((args[0], args.len()), ("compare", 3), "{command}");
        run_ok(scratch.path(), &args);
    }
    let comparisons = std::fs::read_dir(scratch.join("submissions")).unwrap();
    for entry in comparisons.map(Result::unwrap) {
        if entry.file_name().to_string_lossy().starts_with("compare-") {
            std::fs::remove_dir_all(entry.path()).unwrap();
        }
    }
    let n_runs = std::fs::read_dir(scratch.join("submissions"))
        .unwrap()
        .count();
    assert_eq!(n_runs, 4, "a run for each file and precision");
    run_ok(scratch.path(), &["eval", "data/*.jsonl", "--quiet"]);
    assert_eq!(
        std::fs::read_dir(scratch.join("submissions"))
            .unwrap()
            .count(),
        4
    );
}

#[test]
fn selfcheck_finds_every_way_equal() {
    let scratch = Scratch::new("selfcheck");
    for flags in [
        &["selfcheck", "--rows", "8"][..],
        &["selfcheck", "--rows", "6", "--exact"],
    ] {
        let stdout = String::from_utf8(run_ok(scratch.path(), flags).stdout).unwrap();
        assert!(
            stdout.contains("teacher forcing") && !stdout.contains("NOT EQUAL"),
            "{stdout}"
        );
    }
}

#[test]
fn inspect_shows_how_a_file_is_read() {
    let scratch = Scratch::new("inspect");
    let file = root().join("datasets/nano/choice.jsonl");
    let args = ["inspect", file.to_str().unwrap()];
    let stdout = String::from_utf8(run_ok(scratch.path(), &args).stdout).unwrap();
    for part in [
        "options <- options",
        "majority baseline",
        "<|start|>assistant",
        "median",
    ] {
        assert!(stdout.contains(part), "{part}: {stdout}");
    }
    let args = [&args[..], &["--json"]].concat();
    let document: serde_json::Value =
        serde_json::from_slice(&run_ok(scratch.path(), &args).stdout).unwrap();
    assert_eq!(document["n_rows"], 300);
}

/// Two files: lengths against a context, golds, baselines, and rows that cannot run with their
/// reasons, those that are mended alike told once.
#[test]
fn inspect_counts_what_a_run_would_meet() {
    let scratch = Scratch::new("inspect-counts");
    let long = "and then one more ".repeat(40);
    scratch.write(
        "choice.jsonl",
        [
            r#"{"id": 1, "question": "Which is red?", "options": ["moss", "rust"], "answer": "B"}"#.into(),
            r#"{"id": 2, "question": "Which is green?", "options": ["moss", "rust"], "answer": "A"}"#.into(),
            r#"{"id": 3, "question": "Which is soft?", "options": ["moss", "rust"], "answer": "A"}"#.into(),
            r#"{"id": 4, "question": "", "options": ["moss", "rust"], "answer": "A"}"#.into(),
            r#"{"id": 5, "options": ["moss", "rust"], "answer": "A"}"#.to_owned(),
            format!(r#"{{"id": 6, "question": "{long}", "options": ["moss", "rust"], "answer": "A"}}"#),
            format!(r#"{{"id": 7, "question": "{long}?", "options": ["moss", "rust"], "answer": "B"}}"#),
        ]
        .join("\n"),
    );
    scratch.write(
        "free.csv",
        "question,answer,subject\n1 + 1?,2,sums\n1 + 2?,3,sums\n",
    );
    let args = ["inspect", "choice.jsonl", "free.csv", "--context", "200"];
    snapshot::check_exact("inspect-two-files", scratch.path(), &args);
    let args = [&args[..], &["--json"]].concat();
    let stdout = String::from_utf8(run_ok(scratch.path(), &args).stdout).unwrap();
    let documents: Vec<serde_json::Value> = stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(documents.len(), 2);
    assert_eq!(documents[0]["n_defects"], 4);
    assert_eq!(documents[0]["n_too_long"], 2);
    assert_eq!(documents[0]["defects"].as_array().unwrap().len(), 2);
    assert_eq!(documents[0]["random_baseline"], 0.5);
    assert_eq!(documents[1]["groups"]["sums"], 2);
    assert_eq!(documents[1]["context"], 200);
}
