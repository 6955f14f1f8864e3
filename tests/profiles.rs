//! Profiles on real runs of nano: the README's walk-through, options shuffled, votes, early stop,
//! and each built-in profile on rows of its benchmark's shape.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use podium::profile::Profile;
use serde_json::{Value, json};
use support::{Scratch, bits, jsonl, nano_rows, root, run, run_ok};

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The rows of a CSV file by their header.
fn csv(path: &Path) -> Vec<BTreeMap<String, String>> {
    let mut reader = csv::Reader::from_path(path).unwrap();
    let header = reader.headers().unwrap().clone();
    let names = || header.iter().map(str::to_owned);
    reader
        .records()
        .map(|row| {
            names()
                .zip(row.unwrap().iter().map(str::to_owned))
                .collect()
        })
        .collect()
}

#[test]
fn the_readmes_profile_runs() {
    let readme = text(&root().join("README.md"));
    let start = readme.find("# mine.toml").unwrap();
    let block = &readme[start..start + readme[start..].find("```").unwrap()];
    let n_lines = block.lines().filter(|line| line.contains('=')).count();
    assert!(n_lines <= 20, "{n_lines} lines are more than twenty");

    let scratch = Scratch::new("readme-profile");
    scratch.write("mine.toml", block);
    scratch.write(
        "rows.csv",
        "problem_id,statement,key\n007,What is 33 + 724?,757\n8,What is 2 + 2?,4\n9,What is 313 + 375?,688\n",
    );
    let args = "eval rows.csv --profile mine.toml --max-new-tokens 64 --out run --json -q";
    let output = run_ok(scratch.path(), &args.split(' ').collect::<Vec<_>>());
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(summary["tally"]["n_samples"], 12);
    let figures = &summary["tally"]["over_samples"];
    assert_eq!(
        (&figures["k"], &figures["aggregate"]),
        (&json!(4), &json!("majority"))
    );
    let submission = text(&scratch.join("run/submission.csv"));
    let ids: Vec<&str> = submission
        .lines()
        .map(|line| line.split(',').next().unwrap())
        .collect();
    assert_eq!(ids, ["id", "007", "8", "9"]);
    assert!(submission.starts_with("id,prediction\n"));
    let prompts = jsonl(&scratch.join("run/prompts.jsonl"));
    let last = prompts[2]["text"].as_str().unwrap();
    assert!(
        last.contains("What is 33 + 724?")
            && last.contains("Answer: 757")
            && last.contains("Answer: 4")
    );
    for (prompt, gold) in prompts.iter().zip(["757", "Answer: 4", "688"]) {
        assert!(!prompt["text"].as_str().unwrap().contains(gold), "{prompt}");
    }
}

/// nano's own profile with other parts.
fn nano_with(parts: &str) -> String {
    let nano = text(&root().join("datasets/profiles/nano.toml"));
    nano.replace("name = \"nano\"", &format!("name = \"nano-with\"\n{parts}"))
}

#[test]
fn shuffled_options_are_submitted_by_the_files_letters() {
    let scratch = Scratch::new("shuffle");
    let rows: Vec<Value> = nano_rows("choice.jsonl", 40)
        .iter()
        .map(|row| serde_json::from_str(row).unwrap())
        .collect();
    scratch.write("rows.jsonl", nano_rows("choice.jsonl", 40).join("\n"));
    scratch.write("p.toml", nano_with("shuffle_options = true\nseed = 5"));
    let args = "eval rows.jsonl --profile p.toml --out run -q";
    run_ok(scratch.path(), &args.split(' ').collect::<Vec<_>>());
    let results: BTreeMap<String, Value> = jsonl(&scratch.join("run/results.jsonl"))
        .into_iter()
        .map(|row| (row["key"].as_str().unwrap().to_owned(), row))
        .collect();
    let submission = jsonl(&scratch.join("run/submission.jsonl"));
    let prompts = jsonl(&scratch.join("run/prompts.jsonl"));
    let mut n_right = 0;
    let mut n_moved = 0;
    for ((row, line), prompt) in rows.iter().zip(&submission).zip(&prompts) {
        let logged = &results[row["id"].as_str().unwrap()];
        let order = prompt["option_order"].as_array().unwrap();
        // The prompt shows the option that the order says.
        for (place, index) in order.iter().enumerate() {
            let letter = char::from(b'A' + place as u8);
            let option = row["options"][index.as_u64().unwrap() as usize]
                .as_str()
                .unwrap();
            let shown = format!("\n{letter}. {option}");
            assert!(
                prompt["text"].as_str().unwrap().contains(&shown),
                "{prompt}"
            );
        }
        // The log's gold is the shown one, its letter's option the file's.
        let shown = logged["gold"]["value"].as_u64().unwrap() as usize;
        let in_file = order[shown].as_u64().unwrap() as u8;
        assert_eq!(row["answer"], char::from(b'A' + in_file).to_string());
        n_moved += usize::from(shown != usize::from(in_file));
        let answered = logged["answer"]["text"].as_str().unwrap();
        let place = usize::from(answered.as_bytes()[0] - b'A');
        let index = order[place].as_u64().unwrap() as u8;
        assert_eq!(line["answer"], char::from(b'A' + index).to_string());
        // Right is what the file says is right.
        assert_eq!(logged["correct"] == true, line["answer"] == row["answer"]);
        n_right += usize::from(logged["correct"] == true);
    }
    assert!(
        n_right >= 32 && n_moved >= 20,
        "{n_right} right, {n_moved} moved"
    );

    // Rules may change, the order may not.
    let before = text(&scratch.join("run/submission.csv"));
    run_ok(scratch.path(), &["score", "run"]);
    assert_eq!(text(&scratch.join("run/submission.csv")), before);
    let other = run(scratch.path(), &["score", "run", "--profile", "nano"]);
    assert_eq!(other.status.code(), Some(2));
    let stderr = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(stderr.contains("another order"), "{stderr}");
}

/// Rows that nano is unsure of.
const HARD: &str = "eval rows.jsonl -q --temperature 1.5 --seed 3 --samples 7 --max-new-tokens 96";

fn hard_rows(scratch: &Scratch, n: usize) {
    scratch.write("rows.jsonl", nano_rows("long_products.jsonl", n).join("\n"));
}

#[test]
fn the_vote_of_the_samples_is_submitted_and_counted() {
    let scratch = Scratch::new("votes");
    hard_rows(&scratch, 12);
    let args = format!("{HARD} --out run");
    let output = run_ok(scratch.path(), &args.split(' ').collect::<Vec<_>>());
    let printed = String::from_utf8(output.stdout).unwrap();
    for part in [
        "all, maj@7",
        "maj@7 ",
        "mean@7 = pass@1",
        "pass@7 ",
        "questions.csv",
        "A tied vote goes to",
    ] {
        assert!(printed.contains(part), "{part}: {printed}");
    }
    // The votes counted again, by the text: nano writes whole numbers in one way.
    let mut samples: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for row in jsonl(&scratch.join("run/results.jsonl")) {
        samples
            .entry(row["key"].as_str().unwrap().to_owned())
            .or_default()
            .push(row);
    }
    let submission = csv(&scratch.join("run/submission.csv"));
    let questions = csv(&scratch.join("run/questions.csv"));
    let mut n_right = 0;
    let mut n_split = 0;
    for (line, question) in submission.iter().zip(&questions) {
        let rows = samples.get_mut(&line["id"]).unwrap();
        rows.sort_by_key(|row| row["sample"].as_u64());
        let answers: Vec<&str> = rows
            .iter()
            .filter(|row| row["status"] == "answered")
            .map(|row| row["answer"]["text"].as_str().unwrap())
            .collect();
        let votes = |answer: &str| answers.iter().filter(|it| **it == answer).count();
        let most = answers
            .iter()
            .map(|answer| votes(answer))
            .max()
            .unwrap_or(0);
        let winner = answers
            .iter()
            .find(|answer| votes(answer) == most)
            .copied()
            .unwrap_or("");
        assert_eq!((&*line["answer"], &*question["answer"]), (winner, winner));
        assert_eq!(question["votes"], most.to_string());
        assert_eq!(question["voters"], answers.len().to_string());
        let right = rows.iter().filter(|row| row["correct"] == true).count();
        assert_eq!(question["right"], right.to_string());
        n_right += right;
        n_split += usize::from(most < answers.len());
    }
    assert!(n_split > 3, "{n_split} of 12 votes were not unanimous");
    let manifest: Value = serde_json::from_str(&text(&scratch.join("run/run.json"))).unwrap();
    let figures = &manifest["tally"]["over_samples"];
    let mean = figures["mean"]["value"].as_f64().unwrap();
    assert!((mean - n_right as f64 / 84.0).abs() < 1e-12, "{mean}");
    let n_voted = questions
        .iter()
        .filter(|question| question["correct"] == "true")
        .count();
    assert_eq!(figures["majority"]["n_correct"], n_voted);
    assert_eq!(manifest["tally"]["accuracy"]["n_correct"], n_voted);

    // The same from the shards of a run, and from saved replies.
    for shard in ["1", "2"] {
        let args = format!("{HARD} --shard {shard}/2 --out s{shard}");
        run_ok(scratch.path(), &args.split(' ').collect::<Vec<_>>());
    }
    run_ok(scratch.path(), &["merge", "s1", "s2", "--out", "merged"]);
    run_ok(scratch.path(), &["score", "run"]);
    let again: Value = serde_json::from_str(&text(&scratch.join("run/run.json"))).unwrap();
    let merged: Value = serde_json::from_str(&text(&scratch.join("merged/run.json"))).unwrap();
    for other in [again, merged] {
        assert_eq!(other["tally"]["over_samples"], *figures);
    }
    for file in ["submission.csv", "questions.csv"] {
        assert_eq!(
            text(&scratch.join("run").join(file)),
            text(&scratch.join("merged").join(file))
        );
    }
}

#[test]
fn early_stop_leaves_out_samples_and_changes_no_vote() {
    let scratch = Scratch::new("early-stop");
    hard_rows(&scratch, 12);
    let run_into = |out: &str, flags: &str| {
        let args = format!("{HARD} --out {out}{flags}");
        run_ok(scratch.path(), &args.split(' ').collect::<Vec<_>>())
    };
    run_into("whole", "");
    run_into("early", " --early-stop");
    run_into("small", " --early-stop --batch 3 --threads 1");
    assert_eq!(
        text(&scratch.join("whole/submission.csv")),
        text(&scratch.join("early/submission.csv"))
    );
    let scores = text(&scratch.join("early/scores.csv"));
    assert_eq!(
        scores,
        text(&scratch.join("small/scores.csv")),
        "whatever the batch"
    );
    let n_left_out = scores.matches("not_run").count();
    assert!(
        (12..=36).contains(&n_left_out),
        "{n_left_out} of 84 samples"
    );
    // What ran has the bits of the whole run, and is the first samples of each row.
    let [whole, early] = ["whole", "early"].map(|run| bits(&scratch.join(run)));
    let mut n_run: BTreeMap<String, u64> = BTreeMap::new();
    for row in jsonl(&scratch.join("early/results.jsonl")) {
        if row["status"] == "not_run" {
            continue;
        }
        let key = (
            row["key"].as_str().unwrap().to_owned(),
            row["sample"].as_u64().unwrap(),
        );
        assert_eq!(whole[&key], early[&key]);
        let n = n_run.entry(key.0).or_default();
        *n += 1;
    }
    let n_run: u64 = n_run.values().sum();
    assert_eq!(n_run as usize + n_left_out, 84);

    // Done is done; without the flag the rest is run.
    let again = run_into("early", " --early-stop --json");
    let summary: Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!(summary["n_sessions"], 1);
    assert!(summary["tally"]["over_samples"]["mean"].is_null());
    run_into("early", "");
    assert_eq!(
        text(&scratch.join("early/scores.csv")),
        text(&scratch.join("whole/scores.csv"))
    );

    scratch.write(
        "p.toml",
        nano_with("").replace("[scoring]", "[scoring]\naggregate = \"pass\""),
    );
    let args = format!("{HARD} --early-stop --profile p.toml");
    let refused = run(scratch.path(), &args.split(' ').collect::<Vec<_>>());
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("does not vote"));
}

#[test]
fn the_help_lists_the_built_in_profiles() {
    let scratch = Scratch::new("profile-help");
    let help = String::from_utf8(run_ok(scratch.path(), &["eval", "--help"]).stdout).unwrap();
    let start = help.find("--profile").unwrap();
    let listed = &help[start..start + help[start..].find("--reasoning").unwrap()];
    let words: Vec<&str> = listed
        .split(|c: char| !(c.is_alphanumeric() || c == '_'))
        .collect();
    for name in Profile::builtin_names() {
        assert!(words.contains(&name), "{name}: {listed}");
    }
}

/// A profile, a file of its benchmark's shape with questions of our own, and the golds read.
fn shapes() -> Vec<(&'static str, &'static str, String, Vec<&'static str>)> {
    let lines = |rows: &[Value]| {
        rows.iter()
            .map(|row| format!("{row}\n"))
            .collect::<String>()
    };
    vec![
        (
            "gsm8k",
            "rows.jsonl",
            lines(&[
                json!({"question": "Two apples and three pears?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}),
                json!({"question": "A thousand and five?", "answer": "So it is.\n#### 1,005"}),
            ]),
            vec!["5", "1,005"],
        ),
        (
            "mmlu",
            "rows.jsonl",
            lines(&[
                json!({"question": "First letter?", "subject": "letters", "choices": ["a", "b", "c", "d"], "answer": 0}),
                json!({"question": "Last of four?", "subject": "letters", "choices": ["a", "b", "c", "d"], "answer": 3}),
            ]),
            vec!["A", "D"],
        ),
        (
            "mmlu_pro",
            "rows.jsonl",
            lines(&[
                json!({"question_id": 70, "question": "Ninth?", "options": ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"], "answer": "I", "answer_index": 8, "cot_content": "", "category": "letters", "src": "own"}),
                json!({"question_id": 71, "question": "Second?", "options": ["a", "b", "c"], "answer": "B", "answer_index": 1, "cot_content": "", "category": "letters", "src": "own"}),
            ]),
            vec!["I", "B"],
        ),
        (
            "gpqa",
            "rows.csv",
            "Pre-Revision Question,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Explanation,High-level domain,Record ID\n\
             old,\"Which, of these, is even?\",2,1,3,5,because,Numbers,q-1\nold,Which is odd?,7,2,4,6,because,Numbers,q-2\n"
                .to_owned(),
            // The right one is first in the file; shown in the orders 1 0 2 3 and 2 3 0 1.
            vec!["B", "C"],
        ),
        (
            "aime",
            "rows.jsonl",
            lines(&[
                json!({"ID": "own-1", "Problem": "What is 6 times 7?", "Solution": "It is 42.", "Answer": 42}),
                json!({"ID": "own-2", "Problem": "What is 0 times 7?", "Solution": "Nothing.", "Answer": 0}),
            ]),
            vec!["42", "0"],
        ),
        ("aimo", "rows.csv", "id,problem,answer\n0a1b,What is $6 \\times 7$?,42\n2c3d,What is $2^{10}$?,1024\n".to_owned(), vec!["42", "1024"]),
        (
            "medqa",
            "rows.jsonl",
            lines(&[
                json!({"question": "Which is a bone?", "answer": "femur", "options": {"A": "aorta", "B": "femur", "C": "iris", "D": "liver"}, "meta_info": "step1", "answer_idx": "B", "metamap_phrases": ["bone"]}),
                json!({"question": "Which is a vessel?", "answer": "aorta", "options": {"A": "aorta", "B": "femur", "C": "iris", "D": "liver"}, "meta_info": "step1", "answer_idx": "A", "metamap_phrases": ["vessel"]}),
            ]),
            vec!["B", "A"],
        ),
        (
            "arc",
            "rows.jsonl",
            lines(&[
                json!({"id": "Own_1", "question": "Which is hot?", "choices": {"text": ["ice", "fire", "fog"], "label": ["A", "B", "C"]}, "answerKey": "B"}),
                json!({"id": "Own_2", "question": "Which is cold?", "choices": {"text": ["ice", "fire", "fog"], "label": ["1", "2", "3"]}, "answerKey": "1"}),
            ]),
            vec!["B", "A"],
        ),
        (
            "reasoning_gym",
            "rows.jsonl",
            lines(&[
                json!({"question": "Spell cat backwards.", "answer": "tac", "metadata": {"source_dataset": "own", "difficulty": {"n": 3}}}),
                json!({"question": "Spell dog backwards.", "answer": "god", "metadata": {"source_dataset": "own", "difficulty": {"n": 3}}}),
            ]),
            vec!["tac", "god"],
        ),
        (
            "bbh",
            "rows.jsonl",
            lines(&[
                json!({"input": "not ( True ) is", "target": "False"}),
                json!({"input": "True and True is", "target": "True"}),
            ]),
            vec!["False", "True"],
        ),
    ]
}

#[test]
fn built_in_profiles_read_their_benchmarks_files() {
    for (profile, file, content, golds) in shapes() {
        let scratch = Scratch::new(profile);
        scratch.write(file, content);
        let output = run_ok(
            scratch.path(),
            &["inspect", file, "--profile", profile, "--json"],
        );
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(found["profile"], profile);
        assert_eq!(found["n_defects"], 0, "{profile}: {found}");
        let mut expected: Vec<Value> = golds.iter().map(|gold| json!([gold, 1])).collect();
        let mut read = found["golds"].as_array().unwrap().clone();
        let by_name = |value: &Value| value.to_string();
        expected.sort_by_key(by_name);
        read.sort_by_key(by_name);
        assert_eq!(read, expected, "{profile}");
    }
}

#[test]
fn humaneval_writes_completions_and_scores_nothing() {
    let scratch = Scratch::new("humaneval");
    let row = json!({"task_id": "own/0", "prompt": "def one():\n    \"\"\"Gives one.\"\"\"\n", "entry_point": "one", "canonical_solution": "    return 1\n", "test": "def check(candidate):\n    assert candidate() == 1\n"});
    scratch.write("rows.jsonl", row.to_string());
    let args = "eval rows.jsonl --profile humaneval --max-new-tokens 16 --out run -q";
    run_ok(scratch.path(), &args.split(' ').collect::<Vec<_>>());
    let line = &jsonl(&scratch.join("run/submission.jsonl"))[0];
    assert_eq!(line["task_id"], "own/0");
    assert!(
        line.as_object()
            .unwrap()
            .keys()
            .eq(["task_id", "completion"])
    );
    let prompt = jsonl(&scratch.join("run/prompts.jsonl"))[0]["text"].to_string();
    assert!(
        prompt.contains("Gives one") && !prompt.contains("return 1") && !prompt.contains("check(")
    );
    let manifest: Value = serde_json::from_str(&text(&scratch.join("run/run.json"))).unwrap();
    assert_eq!(manifest["tally"]["accuracy"]["n"], 0);
}
