//! The committed data sets through reader, profile and scorer: a reply that is the gold is right,
//! another row's gold is wrong, and every row renders. Every shape of a prompt file under
//! `tests/datasets` is read as its table says, or refused with its reason.

mod support;

use std::path::{Path, PathBuf};

use podium::dataset::{self, Gold, Pins, Record};
use podium::profile::Profile;
use podium::prompt::Reasoning;
use podium::score::{self, Status};
use support::{Scratch, run, snapshot};

#[test]
fn the_gold_as_a_reply_is_right_and_a_wrong_one_is_not() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/nano");
    let mut n_files = 0;
    for entry in std::fs::read_dir(folder).expect("the folder is checked in") {
        let path = entry.expect("the folder is readable").path();
        let mut dataset = dataset::read(&path).expect("a committed file is good");
        assert!(dataset.records.len() >= 300);
        for is_nano in [true, false] {
            let profile = Profile::for_dataset(&dataset, is_nano)
                .expect("built in")
                .resolved(&mut dataset.records)
                .expect("it has no few-shot rows");
            for record in &dataset.records {
                assert_eq!(record.defect, None);
                profile
                    .render(record, Reasoning::Medium, None)
                    .expect("it renders");
                let gold = match record.gold.as_ref().expect("every row has gold") {
                    Gold::Option(index) => score::option_letter(*index),
                    Gold::Text(text) => text.clone(),
                };
                for reply in [gold.clone(), format!("Answer: {gold}")] {
                    let verdict = score::judge_text(record, &profile.scoring, &reply);
                    assert_eq!(verdict.status, Status::Answered, "{reply}");
                    assert_eq!(verdict.correct, Some(true), "{reply}");
                }
                let verdict = score::judge_text(record, &profile.scoring, "Answer: 123456789");
                assert_eq!(verdict.correct, Some(false), "{record:?}");
            }
        }
        n_files += 1;
    }
    assert!(n_files >= 8);
}

/// The split of `models/nano/data.py`: a question is a test question iff the first byte of its
/// text's SHA-256 is below 26, and only such questions stand in `datasets/nano`.
#[test]
fn every_question_of_nano_is_on_the_test_side() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets/nano");
    let profile = podium::profile::Profile::builtin("nano").expect("it is built in");
    let mut n_rows = 0;
    for entry in std::fs::read_dir(folder).expect("the folder is there") {
        let path = entry.expect("it can be read").path();
        for record in podium::dataset::read(&path)
            .expect("it is a data set")
            .records
        {
            let prompt = profile
                .render(&record, podium::prompt::Reasoning::Medium, None)
                .expect("it renders");
            let text = &prompt.turns.last().expect("there is a question").content;
            let digest = podium::submission::identity::sha256_hex(text.as_bytes());
            let first = u8::from_str_radix(&digest[..2], 16).expect("it is hex");
            assert!(first < 26, "{}: {text}", path.display());
            n_rows += 1;
        }
    }
    assert!(n_rows > 2000, "{n_rows} rows");
}

/// What `tests/datasets/expected.txt` says of a file.
struct Expected {
    file: String,
    mapping: String,
    /// Id, gold and options of each row, as the table spells them.
    rows: Vec<String>,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/datasets")
}

fn table() -> Vec<Expected> {
    let text = std::fs::read_to_string(fixtures().join("expected.txt")).expect("it is checked in");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let blocks = lines.collect::<Vec<_>>();
    blocks
        .split(|line| line.is_empty())
        .filter_map(|block| {
            let (first, rows) = block.split_first()?;
            let (file, mapping) = first
                .split_once(" | ")
                .expect("a block begins with its file");
            Some(Expected {
                file: file.to_owned(),
                mapping: mapping.to_owned(),
                rows: rows.iter().map(|row| (*row).to_owned()).collect(),
            })
        })
        .collect()
}

/// A record as the table spells it.
fn spelled(record: &Record) -> String {
    let id = match &record.id {
        Some(serde_json::Value::String(id)) => id.clone(),
        Some(id) => id.to_string(),
        None => "-".to_owned(),
    };
    let gold = match &record.gold {
        Some(Gold::Option(index)) => format!("[{}]", score::option_letter(*index)),
        Some(Gold::Text(text)) => text.clone(),
        None => "-".to_owned(),
    };
    let options = match record.options.as_slice() {
        [] => "-".to_owned(),
        options => options.join(" / "),
    };
    format!("{id} | {gold} | {options}")
}

#[test]
fn every_shape_is_read_as_the_table_says() {
    let table = table();
    let mut files: Vec<String> = std::fs::read_dir(fixtures())
        .expect("it is checked in")
        .map(|entry| entry.expect("it can be read"))
        .filter(|entry| entry.path().is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.ends_with(".py") && name != "expected.txt")
        .collect();
    files.sort();
    let mut named: Vec<&String> = table.iter().map(|it| &it.file).collect();
    named.sort();
    assert_eq!(
        named,
        files.iter().collect::<Vec<_>>(),
        "a line for each file"
    );
    for expected in table {
        let dataset = match dataset::read(&fixtures().join(&expected.file)) {
            Ok(dataset) => dataset,
            Err(error) => panic!("{}: {error}", expected.file),
        };
        let mapping = dataset.mapping.to_string().replace('\n', "; ");
        assert_eq!(mapping, expected.mapping, "{}", expected.file);
        let rows: Vec<String> = dataset.records.iter().map(spelled).collect();
        assert_eq!(rows, expected.rows, "{}", expected.file);
        for record in &dataset.records {
            assert_eq!(record.defect, None, "{}", expected.file);
            assert!(!record.question.contains("Options:"), "{}", expected.file);
        }
    }
}

/// Files that have no reading, or more than one: what is said of each.
#[test]
fn refusals_say_what_and_how_to_mend_it() {
    let folder = fixtures().join("refused");
    let mut n_files = 0;
    for entry in std::fs::read_dir(&folder).expect("it is checked in") {
        let name = entry.expect("it can be read").file_name();
        let name = name.to_string_lossy();
        let output = run(&folder, &["inspect", &name]);
        let (stem, _) = name.split_once('.').expect("a file has an ending");
        let snapshot = format!("refused-{}", stem.replace('_', "-"));
        snapshot::check_output(&snapshot, &folder, &["inspect", &name], &output);
        assert_eq!(output.status.code(), Some(2), "{name}");
        n_files += 1;
    }
    assert!(n_files >= 12);
}

/// The mend that a refusal names does mend it.
#[test]
fn pins_settle_what_a_file_leaves_open() {
    let cases = [
        (
            "index_open.jsonl",
            "gold_kind = \"index_from0\"",
            "1 | [B] | a hill / an ant / a bus / a ship",
        ),
        (
            "index_open.jsonl",
            "gold_kind = \"index_from1\"",
            "1 | [A] | a hill / an ant / a bus / a ship",
        ),
        ("two_golds.jsonl", "gold = \"target\"", "1 | 3 miles | -"),
        (
            "two_options.jsonl",
            "options = \"choices\"",
            "1 | [A] | y / x",
        ),
        ("splits.json", "rows = \"test\"", "- | no | -"),
        (
            "headless_open.csv",
            "header = false\nid = \"1\"\nquestion = \"2\"\ngold = \"4\"",
            "12 | 9 | -",
        ),
        (
            "headless_subject.csv",
            "group = \"1\"\nquestion = \"2\"\noptions = [\"3\", \"4\"]\ngold = \"5\"",
            "- | [A] | bread / glass",
        ),
        ("one_column.csv", "header = false", "- | - | -"),
    ];
    for (file, pins, row) in cases {
        let pins: Pins = toml::from_str(pins).expect("the case is valid");
        match dataset::read_with(&fixtures().join("refused").join(file), &pins) {
            Ok(dataset) => assert_eq!(spelled(&dataset.records[0]), row, "{file}"),
            Err(error) => panic!("{file}: {error}"),
        }
    }
}

/// A damaged Parquet file is an error, never a panic.
#[test]
fn damaged_parquet_is_refused_or_read() {
    let scratch = Scratch::new("parquet");
    for name in [
        "lists.parquet",
        "structs_zstd.parquet",
        "plain_gzip.parquet",
    ] {
        let bytes = std::fs::read(fixtures().join(name)).expect("it is checked in");
        for at in 0..bytes.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] ^= flip;
                let path = scratch.write("a.parquet", damaged);
                let _ = dataset::read(&path);
            }
            let path = scratch.write("a.parquet", &bytes[..at]);
            assert!(dataset::read(&path).is_err(), "{name}, {at} bytes");
        }
    }
}
