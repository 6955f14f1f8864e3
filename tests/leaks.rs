//! No gold, and nothing that gives it away, reaches a rendered prompt: whatever the file's shape,
//! the field's name and spelling, the profile and what its template prints.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use podium::dataset::{self, Dataset};
use podium::profile::Profile;
use podium::prompt::{Reasoning, harmony};
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use support::{Scratch, root};

const MARK: &str = "GIVEN-AWAY";

/// Names that golds and their like go by, as published files spell them.
const GOLD_ONLY: [&str; 28] = [
    "answer",
    "answers",
    "solution",
    "canonical_solution",
    "test",
    "test_list",
    "rationale",
    "explanation",
    "exp",
    "cot_content",
    "correct_answer",
    "Correct Answer",
    "correct_answers",
    "Incorrect Answer 1",
    "incorrect_answers",
    "distractor3",
    "reference",
    "references",
    "target",
    "target_scores",
    "gold",
    "gold_label",
    "answerKey",
    "final_answer",
    "ground_truth",
    "is_correct",
    "expected_output",
    "reasoning",
];

/// Prints every part and every field.
const ALL: &str = "{{ question }} {{ options }} {{ row }}\
    {% for name in row %} {{ name }} {{ row[name] }}{% endfor %}";

/// A name in another of the spellings that mean the same.
fn spelled(name: &str, way: usize) -> String {
    match way {
        0 => name.to_owned(),
        1 => name.to_uppercase(),
        2 => name.replace('_', " "),
        _ => name.replace(['_', ' '], "-"),
    }
}

/// Rows of one question each, with fields that give the gold away, as a file of the shape.
fn file(shape: usize, hidden: &[String]) -> (&'static str, Vec<u8>) {
    let away = || -> Map<String, Value> {
        hidden
            .iter()
            .map(|name| (name.clone(), MARK.into()))
            .collect()
    };
    let with = |mut row: Value| -> Value {
        let fields = row.as_object_mut().unwrap();
        fields.extend(away());
        fields.insert("meta".into(), json!({"level": 1, "deep": [away()]}));
        row
    };
    let lines = |rows: [Value; 2]| rows.map(|row| row.to_string() + "\n").concat().into_bytes();
    let text = |n: usize| format!("Which is number {n}?");
    match shape {
        0 => (
            "a.jsonl",
            lines([1, 2].map(|n| with(json!({"id": n, "question": text(n)})))),
        ),
        1 => {
            let rows = [1, 2].map(|n| with(json!({"input": text(n)})));
            (
                "a.json",
                json!({"canary": "x", "examples": rows}).to_string().into(),
            )
        }
        2 => {
            let rows = [1, 2].map(|n| with(json!({"question": text(n), "choices": ["x", "y"]})));
            ("a.json", json!(rows).to_string().into())
        }
        3 => {
            let choices = json!([
                {"label": "A", "text": "x", "is_correct": MARK},
                {"label": "B", "text": "y", "is_correct": MARK},
            ]);
            let row = |n| {
                let mut question = json!({"stem": text(n), "choices": choices});
                question.as_object_mut().unwrap().extend(away());
                with(json!({"question": question}))
            };
            ("a.jsonl", lines([1, 2].map(row)))
        }
        4 => {
            let row = |n| json!({"row_idx": n, "row": with(json!({"question": text(n)}))});
            let rows = [1, 2].map(row);
            ("a.json", json!({ "rows": rows }).to_string().into())
        }
        5 => {
            let row = |n| with(json!({"messages": [{"role": "user", "content": text(n)}]}));
            ("a.jsonl", lines([1, 2].map(row)))
        }
        6 => {
            let row = |n| with(json!({"input": format!("{}\nOptions:\n(A) x\n(B) y", text(n))}));
            ("a.jsonl", lines([1, 2].map(row)))
        }
        _ => {
            let mut writer = csv::Writer::from_writer(Vec::new());
            let mut header = vec![
                "question".to_owned(),
                "metadata".into(),
                "A".into(),
                "B".into(),
            ];
            header.extend(hidden.iter().cloned());
            writer.write_record(&header).unwrap();
            for n in [1, 2] {
                let metadata = json!({"level": 1, "deep": [away()]}).to_string();
                let mut row = vec![text(n), metadata, "x".into(), "y".into()];
                row.resize(header.len(), MARK.into());
                writer.write_record(&row).unwrap();
            }
            ("a.csv", writer.into_inner().unwrap())
        }
    }
}

const N_SHAPES: usize = 8;

/// Every prompt of the data set under every built-in profile, as it is and printing everything.
fn prompts(dataset: &Dataset) -> Vec<String> {
    let mut prompts = Vec::new();
    for name in Profile::builtin_names() {
        let mut profile = Profile::builtin(name).unwrap();
        for print_all in [false, true] {
            if print_all {
                profile.template = ALL.to_owned();
            }
            for record in &dataset.records {
                if let Ok(prompt) = profile.render(record, Reasoning::Medium, None) {
                    prompts.push(harmony::to_text(&harmony::render(&prompt)));
                } else {
                    assert!(
                        !print_all,
                        "the template that prints everything fails on no record"
                    );
                }
            }
        }
    }
    prompts
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn what_gives_the_gold_away_reaches_no_prompt(
        shape in 0..N_SHAPES,
        names in prop::collection::hash_map(0..GOLD_ONLY.len(), 0..4_usize, 1..6),
    ) {
        let hidden: Vec<String> = names
            .iter()
            .map(|(&name, &way)| spelled(GOLD_ONLY[name], way))
            .collect();
        let (name, bytes) = file(shape, &hidden);
        let scratch = Scratch::new("leaks");
        let dataset = match dataset::read(&scratch.write(name, bytes)) {
            Ok(dataset) => dataset,
            Err(error) => panic!("{hidden:?}: {error}"),
        };
        let prompts = prompts(&dataset);
        prop_assert!(prompts.len() >= 2 * 2);
        for prompt in prompts {
            prop_assert!(prompt.contains("Which is number"), "{prompt}");
            prop_assert!(!prompt.contains(MARK), "{hidden:?}: {prompt}");
        }
    }
}

/// In every committed shape: a gold of its own text, where the question does not hold it anyway.
#[test]
fn no_gold_of_a_committed_shape_reaches_a_prompt() {
    let mut n_golds = 0;
    for entry in std::fs::read_dir(root().join("tests/datasets")).unwrap() {
        let path = entry.unwrap().path();
        let Ok(dataset) = dataset::read(&path) else {
            continue;
        };
        for prompt in prompts(&dataset) {
            for part in [
                "<<",
                "return 2",
                "Dogs bark",
                "The thumb is",
                "hidden",
                "distractor",
            ] {
                assert!(!prompt.contains(part), "{}: {prompt}", path.display());
            }
        }
        for record in &dataset.records {
            if let Some(field) = &dataset.mapping.gold {
                assert!(!record.fields.contains_key(field), "{}", path.display());
                n_golds += 1;
            }
        }
    }
    assert!(n_golds > 50);
}
