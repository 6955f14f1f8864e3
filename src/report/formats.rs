//! Holds what the code writes against the schemas in `docs/formats/`.
//!
//! The validator knows the few keywords that those files use, and refuses any other, so that a
//! schema cannot ask for something that is not checked.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::inspection::{INSPECT_SCHEMA, Inspection, Lengths, Reason};
use super::rescore::{RESCORE_SCHEMA, Rescore, Verdict};
use super::summary::{Summary, tests::finished};
use crate::dataset::{Format, GoldKind, Mapping, OptionsSource};
use crate::engine::BackendMemory;
use crate::score::Status;
use crate::submission::lint::{Checked, Finding, Kind, LINT_SCHEMA, Lint};
use crate::submission::manifest::{Accuracy, LenientAccuracy};
use crate::submission::prompts::PromptRow;
use crate::submission::test_rows::{cut_off, row, two_stages, unanswered};
use crate::submission::{ResultRow, RowError};
use crate::telemetry::memory::{MEMORY_FILE, MemoryEvent, MemoryLog};
use crate::telemetry::test_dir::TestDir;
use crate::telemetry::throughput::{BatchTiming, THROUGHPUT_FILE, ThroughputLog};

/// What is wrong with `value`, by path; empty when it fits. Objects with
/// `additionalProperties: true` are checked as closed ones: the code that is tested here and the
/// schema are of one version.
fn problems(schema: &Value, value: &Value, at: &str, found: &mut Vec<String>) {
    let Some(keywords) = schema.as_object() else {
        found.push(format!("{at}: the schema is no object"));
        return;
    };
    for (keyword, wanted) in keywords {
        match keyword.as_str() {
            "$schema" | "$id" | "title" | "description" => {}
            "type" => {
                let names: Vec<&str> = match wanted {
                    Value::Array(names) => names.iter().filter_map(Value::as_str).collect(),
                    name => name.as_str().into_iter().collect(),
                };
                if !names.iter().any(|name| is_type(value, name)) {
                    found.push(format!("{at}: {value} is not of type {wanted}"));
                }
            }
            "const" if value != wanted => found.push(format!("{at}: {value} is not {wanted}")),
            "enum" if !wanted.as_array().is_some_and(|all| all.contains(value)) => {
                found.push(format!("{at}: {value} is none of {wanted}"));
            }
            "minimum" if value.as_f64() < wanted.as_f64() && !value.is_null() => {
                found.push(format!("{at}: {value} is below {wanted}"));
            }
            "const" | "enum" | "minimum" => {}
            "required" => {
                for name in wanted.as_array().into_iter().flatten() {
                    let name = name.as_str().unwrap_or_default();
                    if value.is_object() && value.get(name).is_none() {
                        found.push(format!("{at}: `{name}` is missing"));
                    }
                }
            }
            "items" => {
                for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                    problems(wanted, item, &format!("{at}/{index}"), found);
                }
            }
            "properties" => {
                for (name, property) in wanted.as_object().into_iter().flatten() {
                    if let Some(member) = value.get(name) {
                        problems(property, member, &format!("{at}/{name}"), found);
                    }
                }
            }
            "additionalProperties" => {
                for (name, member) in value.as_object().into_iter().flatten() {
                    if schema
                        .pointer("/properties")
                        .and_then(|all| all.get(name))
                        .is_some()
                    {
                        continue;
                    }
                    match wanted {
                        Value::Bool(_) => {
                            found.push(format!("{at}: `{name}` is not in the schema"))
                        }
                        wanted => problems(wanted, member, &format!("{at}/{name}"), found),
                    }
                }
            }
            other => found.push(format!("{at}: keyword `{other}` is not checked")),
        }
    }
}

fn is_type(value: &Value, name: &str) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    }
}

fn schema(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("docs/formats")
        .join(format!("{name}.schema.json"));
    let text = std::fs::read_to_string(&path).expect("the schema is in the repository");
    serde_json::from_str(&text).expect("the schema is JSON")
}

fn check(name: &str, text: &str) {
    let schema = schema(name);
    let value = serde_json::from_str(text).expect("our own output is JSON");
    let mut found = Vec::new();
    problems(&schema, &value, "", &mut found);
    assert!(
        found.is_empty(),
        "podium.{name}/1: {}\n{text}",
        found.join("\n")
    );
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("it is JSON")
}

#[test]
fn results_fit() {
    check("result", &json(&row("q-1", 0)));
    let everything = ResultRow {
        format_issues: vec!["a second start".to_owned()],
        error: Some(RowError {
            message: "no question".to_owned(),
            hint: "name the field".to_owned(),
            file: "a.jsonl".to_owned(),
            line: 3,
            field: Some("question".to_owned()),
            transient: false,
        }),
        trace_hash: Some("ab".to_owned()),
        numerics_id: Some("cpu/avx2".to_owned()),
        id: Some(Value::from(12)),
        gold: Some(crate::dataset::Gold::Option(2)),
        forced: Some([5, 9]),
        ..row("q-1", 0)
    };
    check("result", &json(&everything));
    check("result", &json(&cut_off("q-1", 0)));
    let mut nameless = cut_off("q-1", 0);
    if let Some(answer) = nameless
        .lenient
        .iter_mut()
        .find_map(|it| it.answer.as_mut())
    {
        answer.channel = None;
    }
    check("result", &json(&nameless));
    let mut second = two_stages("q-1", 0);
    check("result", &json(&second));
    if let Some(second) = &mut second.second {
        second.format_issues = vec!["a second start".to_owned()];
        second.trace_hash = Some("ab".to_owned());
        second.forced = Some([1, 2]);
    }
    check("result", &json(&second));
    for status in [
        Status::Answered,
        Status::TruncatedAnalysis,
        Status::TruncatedFinal,
        Status::NoFinal,
        Status::ToolCall,
        Status::Malformed,
        Status::NoAnswer,
        Status::NotAnOption,
        Status::Error,
        Status::NotRun,
    ] {
        let bare = ResultRow {
            id: None,
            gold: None,
            correct: None,
            logprob_sum: None,
            logprob_sum_bits: None,
            stop_reason: None,
            group: None,
            seconds: None,
            ..unanswered("q-1", 1, status)
        };
        check("result", &json(&bare));
    }
}

#[test]
fn prompts_fit() {
    let ids: &[u32] = &[1, 2];
    let full = PromptRow::new(
        "q",
        Some("q".into()),
        Some("sums".into()),
        Some(("2+2", ids)),
    );
    check("prompt", &json(&full));
    let two_stages = PromptRow {
        next_turn: Some("Which?".to_owned()),
        ..full.clone()
    };
    check("prompt", &json(&two_stages));
    check("prompt", &json(&PromptRow::new("q", None, None, None)));
    let told = PromptRow {
        options: Some(vec!["x".to_owned()]),
        option_order: Some(vec![1, 0]),
        messages: full.asked(),
        ..full
    };
    check("prompt", &json(&told));
}

#[test]
fn telemetry_fits() {
    let dir = TestDir::new("formats");
    let memory = BackendMemory::default();
    let log = MemoryLog::start(dir.path(), 0, Duration::from_secs(1), Some(memory));
    log.event(MemoryEvent::Load, None);
    log.event(MemoryEvent::Arena, Some(memory));
    log.event(MemoryEvent::FirstBatch, None);
    log.finish().1.expect("the test folder is writable");
    let mut log = ThroughputLog::open(dir.path(), 0);
    log.record(&BatchTiming::default());
    log.record(&BatchTiming {
        prefill_tokens: 5,
        prefill_seconds: 0.5,
        live_row_steps: 5,
        decode_seconds: 0.5,
        bytes_moved: Some(7),
        ..BatchTiming::default()
    });
    log.finish().1.expect("the test folder is writable");
    for (name, file, n_lines) in [
        ("memory", MEMORY_FILE, 5),
        ("throughput", THROUGHPUT_FILE, 2),
    ] {
        let text = std::fs::read_to_string(dir.path().join(file)).expect("it was written");
        assert_eq!(text.lines().count(), n_lines, "{file}");
        text.lines().for_each(|line| check(name, line));
    }
}

#[test]
fn manifests_and_summaries_fit() {
    let finished = finished();
    let fresh = crate::submission::manifest::tests::manifest();
    let sampled = super::over_samples::tests::sampled();
    for manifest in [&finished, &fresh, &sampled] {
        check("run", &json(manifest));
        let summary = Summary::new(manifest, Path::new("x"), vec!["a".into()], vec!["b".into()]);
        check("summary", &summary.to_json());
        check("summary", &summary.with_lint(Some(&lint())).to_json());
    }
}

fn lint() -> Lint {
    let finding = Finding {
        kind: Kind::Choice,
        file: "submission.csv".to_owned(),
        row: Some(1),
        line: Some(2),
        column: Some("choice".to_owned()),
        message: "no letter".to_owned(),
    };
    let whole_file = Finding {
        row: None,
        line: None,
        column: None,
        ..finding.clone()
    };
    Lint {
        schema: LINT_SCHEMA.to_owned(),
        files: vec![Checked {
            file: "submission.csv".to_owned(),
            n_rows: 3,
            n_stopped_words: 0,
        }],
        findings: vec![finding, whole_file],
        unchecked: vec!["ids".to_owned()],
    }
}

#[test]
fn lints_fit() {
    check("lint", &super::lint::to_json(&lint()));
}

#[test]
fn a_package_fits() {
    let mut manifest = finished();
    let profile = crate::profile::Profile::builtin("curebench").expect("it is built in");
    manifest.submission_format = crate::job::submit::submission_format(&profile);
    check("run", &json(&manifest));
}

#[test]
fn comparisons_fit() {
    check("comparison", &json(&super::compare::tests::three()));
}

#[test]
fn inspections_fit() {
    let full = Inspection {
        schema: INSPECT_SCHEMA,
        dataset: "a.jsonl".into(),
        format: Format::Jsonl,
        content_hash: "00".into(),
        mapping: Mapping {
            question: Some("question".into()),
            options: Some(OptionsSource::Columns(vec!["A".into(), "B".into()])),
            gold_kind: Some(GoldKind::IndexFrom0),
            ..Mapping::default()
        },
        profile: "choice".into(),
        n_rows: 2,
        n_defects: 1,
        defects: vec![Reason {
            message: "the question is empty".into(),
            hint: "fill `question`".into(),
            field: Some("question".into()),
            n_rows: 1,
            first_key: "a".into(),
            first_line: 2,
        }],
        n_gold: 1,
        golds: vec![("A".into(), 1)],
        majority_baseline: Some(1.0),
        random_baseline: Some(0.5),
        groups: [("sums".into(), 2)].into(),
        n_options: [(2, 1)].into(),
        tokenizer: "nano".into(),
        prompt_tokens: Lengths::new(vec![7]),
        context: 8192,
        n_too_long: 0,
        first_prompt: Some("<|start|>".into()),
    };
    check("inspect", &json(&full));
    let empty = Inspection {
        mapping: Mapping::default(),
        defects: Vec::new(),
        majority_baseline: None,
        random_baseline: None,
        prompt_tokens: None,
        first_prompt: None,
        ..full
    };
    check("inspect", &json(&empty));
}

#[test]
fn rescores_fit() {
    let pairs = [(row("a", 0), unanswered("a", 0, Status::NoAnswer))];
    let changed = Rescore {
        schema: RESCORE_SCHEMA.to_owned(),
        accuracy_before: Some(Accuracy::default()),
        lenient_before: Some(LenientAccuracy::default()),
        lenient: Some(LenientAccuracy::default()),
        ..Rescore::default()
    }
    .with_changes(
        pairs
            .iter()
            .map(|(old, new)| (old, Verdict::of(old), Verdict::of(new))),
    );
    check("rescore", &changed.to_json());
    check(
        "rescore",
        &Rescore {
            lenient_before: None,
            ..changed
        }
        .to_json(),
    );
}

#[test]
fn the_validator_finds_what_does_not_fit() {
    let broken = |change: fn(&mut serde_json::Map<String, Value>)| {
        let mut value = serde_json::to_value(row("q", 0)).expect("it is JSON");
        change(value.as_object_mut().expect("a row is an object"));
        let mut found = Vec::new();
        problems(&schema("result"), &value, "", &mut found);
        found.join("; ")
    };
    let missing = broken(|row| drop(row.remove("key")));
    assert_eq!(missing, ": `key` is missing");
    let unknown = broken(|row| drop(row.insert("extra".into(), Value::Null)));
    assert_eq!(unknown, ": `extra` is not in the schema");
    let kind = broken(|row| drop(row.insert("sample".into(), "0".into())));
    assert!(
        kind.contains("/sample: \"0\" is not of type \"integer\""),
        "{kind}"
    );
    let status = broken(|row| drop(row.insert("status".into(), "fine".into())));
    assert!(
        status.starts_with("/status: \"fine\" is none of"),
        "{status}"
    );
    let newer = broken(|row| drop(row.insert("schema".into(), "podium.result/2".into())));
    assert!(newer.starts_with("/schema"), "{newer}");
    let nested = broken(|row| {
        drop(
            row["answer"]
                .as_object_mut()
                .expect("it has one")
                .remove("rule"),
        )
    });
    assert_eq!(nested, "/answer: `rule` is missing");
}
