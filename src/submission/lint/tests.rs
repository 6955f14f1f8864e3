//! A broken file for each finding.

use std::io::{Cursor, Write};

use proptest::prelude::*;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use super::*;
use crate::submission::Results;
use crate::submission::format::{Column, ColumnValue};
use crate::submission::package::{Facts, PackageFormat, write_package};
use crate::submission::prompts::{self, PromptRow};
use crate::submission::test_rows::row;
use crate::submission::write::{first_sample, write_submission};
use crate::telemetry::test_dir::TestDir;

const GOOD: &str = r#""id","prediction","choice","reasoning"
"007","rest","A","[{""role"":""user"",""content"":""?""}]"
"b, c","=1+1","NOTAVALUE","NOTAVALUE"
"two
lines","None.","B","[]"
"#;

/// As the built-in curebench profile.
fn format() -> SubmissionFormat {
    let column = |name: &str, value| Column {
        never_null: true,
        ..Column::new(name, value)
    };
    let package: PackageFormat =
        serde_json::from_str(r#"{"fields": {"model_name": "{{ model }}", "track": "internal"}}"#)
            .expect("it is a package");
    SubmissionFormat {
        columns: vec![
            column("id", ColumnValue::Id),
            column("prediction", ColumnValue::Prediction),
            column("choice", ColumnValue::Choice),
            column("reasoning", ColumnValue::Reasoning),
        ],
        missing: "NOTAVALUE".to_owned(),
        quote_all: true,
        package: Some(package),
    }
}

fn expected() -> Vec<ExpectedRow> {
    let row = |id: &str, options: &[&str]| ExpectedRow {
        id: id.to_owned(),
        options: Some(options.iter().map(|it| (*it).to_owned()).collect()),
    };
    vec![
        row("007", &["x", "y"]),
        row("b, c", &[]),
        row("two\nlines", &["x", "y"]),
    ]
}

fn lint_csv(bytes: &[u8]) -> Lint {
    let mut lint = Lint::begin(Some(&expected()));
    lint.csv("s.csv", bytes, &format(), Some(&expected()));
    lint
}

fn lint_zip(bytes: &[u8]) -> Lint {
    let mut lint = Lint::begin(Some(&expected()));
    lint.zip("s.zip", bytes, &format(), Some(&expected()), None);
    lint
}

fn zip_of(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in members {
        zip.start_file(*name, SimpleFileOptions::default())
            .and_then(|()| Ok(zip.write_all(bytes)?))
            .expect("into memory");
    }
    zip.finish().expect("into memory").into_inner()
}

/// Kind, row, line and column of each finding.
type Places = Vec<(Kind, Option<usize>, Option<u64>, Option<String>)>;

fn places(lint: &Lint) -> Places {
    let place = |it: &Finding| (it.kind, it.row, it.line, it.column.clone());
    lint.findings.iter().map(place).collect()
}

#[test]
fn a_good_file_is_clean() {
    let lint = lint_csv(GOOD.as_bytes());
    assert_eq!(lint.findings, []);
    assert_eq!(lint.files[0].n_rows, 3);
    assert_eq!(lint.files[0].n_stopped_words, 1);
    let crlf = lint_csv(GOOD.replace("\"\n\"", "\"\r\n\"").as_bytes());
    assert_eq!(crlf.findings, []);
}

#[test]
fn each_thing_that_is_wrong_is_found_in_its_place() {
    let at = |kind, row: usize, line, column: &str| {
        let row = (row > 0).then_some(row);
        let column = (!column.is_empty()).then(|| column.to_owned());
        (kind, row, line, column)
    };
    for (from, to, found) in [
        (
            "\"rest\"",
            "rest",
            at(Kind::NotQuoted, 1, Some(2), "prediction"),
        ),
        ("\"id\"", "id", at(Kind::NotQuoted, 0, Some(1), "id")),
        (
            "\"rest\"",
            "\" \"",
            at(Kind::Empty, 1, Some(2), "prediction"),
        ),
        ("\"A\"", "\"\"", at(Kind::Empty, 1, Some(2), "choice")),
        (
            "\"None.\"",
            "\"None\"",
            at(Kind::NullWord, 3, Some(4), "prediction"),
        ),
        (
            "\"rest\"",
            "\"-1.#QNAN\"",
            at(Kind::NullWord, 1, Some(2), "prediction"),
        ),
        ("\"A\"", "\"C\"", at(Kind::Choice, 1, Some(2), "choice")),
        ("\"A\"", "\"a\"", at(Kind::Choice, 1, Some(2), "choice")),
        (
            "\"A\"",
            "\"the first\"",
            at(Kind::Choice, 1, Some(2), "choice"),
        ),
        (
            "\"NOTAVALUE\",",
            "\"A\",",
            at(Kind::Choice, 2, Some(3), "choice"),
        ),
        (
            "\"[]\"",
            "\"None given\"",
            at(Kind::NotJson, 3, Some(4), "reasoning"),
        ),
        (
            "\"[]\"",
            "\"{}\"",
            at(Kind::NotJson, 3, Some(4), "reasoning"),
        ),
        (
            "\"[]\"",
            "\"[1]\"",
            at(Kind::NotJson, 3, Some(4), "reasoning"),
        ),
        (",\"[]\"", "", at(Kind::CellCount, 3, Some(4), "")),
        (
            "\"[]\"",
            "\"[]\",\"more\"",
            at(Kind::CellCount, 3, Some(4), ""),
        ),
        ("rest", "re\0st", at(Kind::Nul, 0, Some(2), "")),
        (
            "\"id\",",
            "\u{feff}\"id\",",
            at(Kind::ByteOrderMark, 0, None, ""),
        ),
        ("\"reasoning\"", "\"trace\"", at(Kind::Columns, 0, None, "")),
    ] {
        let text = GOOD.replacen(from, to, 1);
        assert_ne!(text, GOOD, "{from}");
        let lint = lint_csv(text.as_bytes());
        assert_eq!(places(&lint), [found], "{to}");
    }
    let lint = lint_csv(
        &GOOD
            .replace("rest", "r?st")
            .bytes()
            .map(|b| if b == b'?' { 0xff } else { b })
            .collect::<Vec<_>>(),
    );
    assert_eq!(lint.findings[0].kind, Kind::NotUtf8);
    assert_eq!(lint.findings[0].line, Some(2));
    let lint = lint_csv(b"");
    assert_eq!(lint.findings[0].kind, Kind::Columns);
}

#[test]
fn every_id_is_there_once() {
    let kinds = |text: &str| -> Vec<Kind> {
        let lint = lint_csv(text.as_bytes());
        lint.findings.iter().map(|it| it.kind).collect()
    };
    let lines: Vec<&str> = GOOD.split_inclusive("\"\n").collect();
    let file = |order: &[usize]| -> String { order.iter().map(|&line| lines[line]).collect() };
    assert_eq!(file(&[0, 1, 2, 3]), GOOD);
    assert_eq!(kinds(&file(&[0, 1, 3])), [Kind::IdMissing]);
    assert_eq!(kinds(&file(&[0, 1, 2, 1, 3])), [Kind::IdDoubled]);
    assert_eq!(kinds(&file(&[0, 2, 1, 3])), [Kind::IdOrder]);
    let unknown = GOOD.to_owned() + "\"8\",\"x\",\"Z\",\"[]\"\n";
    assert_eq!(kinds(&unknown), [Kind::IdUnknown]);
    // As a spreadsheet saves it.
    let other = GOOD.replace("\"007\"", "\"7\"");
    assert_eq!(kinds(&other), [Kind::IdUnknown, Kind::IdMissing]);
    // Without the data set, ids can still be doubled and letters be no letters.
    let mut lint = Lint::begin(None);
    let text = file(&[0, 1, 2, 1, 3]).replace("\"B\"", "\"BB\"");
    lint.csv("s.csv", text.as_bytes(), &format(), None);
    let kinds: Vec<Kind> = lint.findings.iter().map(|it| it.kind).collect();
    assert_eq!(kinds, [Kind::Choice, Kind::IdDoubled]);
    assert_eq!(lint.unchecked.len(), 1);
}

#[test]
fn a_jsonl_is_held_to_the_same() {
    let good = r#"{"id":"007","prediction":"rest","choice":"A","reasoning":"[]"}
{"id":"b, c","prediction":"x","choice":"NOTAVALUE","reasoning":"[]"}
{"id":"two\nlines","prediction":"x","choice":"B","reasoning":"[]"}
"#;
    let kinds = |text: &[u8]| -> Vec<Kind> {
        let mut lint = Lint::begin(Some(&expected()));
        lint.jsonl("s.jsonl", text, &format(), Some(&expected()));
        lint.findings.iter().map(|it| it.kind).collect()
    };
    assert_eq!(kinds(good.as_bytes()), []);
    for (from, to, found) in [
        ("\"rest\"", "null", vec![Kind::Empty]),
        ("\"rest\"", "\"N/A\"", vec![Kind::NullWord]),
        ("\"A\"", "\"D\"", vec![Kind::Choice]),
        (
            "\"prediction\"",
            "\"answer\"",
            vec![Kind::Columns, Kind::Empty],
        ),
        (
            "{\"id\":\"007\",",
            "{",
            vec![Kind::Columns, Kind::Empty, Kind::IdMissing],
        ),
        (
            "\"id\":\"007\",\"prediction\":\"rest\"",
            "\"prediction\":\"rest\",\"id\":\"007\"",
            vec![Kind::Columns],
        ),
        ("}\n{", "}\n[1]\n{", vec![Kind::NotJson]),
        ("\"007\"", "7", vec![Kind::IdUnknown, Kind::IdMissing]),
    ] {
        let text = good.replacen(from, to, 1);
        assert_eq!(kinds(text.as_bytes()), found, "{to}");
    }
}

#[test]
fn a_package_has_its_members_and_fields() {
    let meta = br#"{"model_name": "m", "track": "t", "n": 3}"#;
    let csv = GOOD.as_bytes();
    let good = zip_of(&[("submission.csv", csv), ("meta_data.json", meta)]);
    let lint = lint_zip(&good);
    assert_eq!(lint.findings, []);
    assert_eq!(lint.files[0].file, "s.zip/submission.csv");
    for (members, found) in [
        (vec![("submission.csv", csv)], vec![Kind::Member]),
        (vec![("meta_data.json", &meta[..])], vec![Kind::Member]),
        (
            vec![("x/submission.csv", csv), ("meta_data.json", meta)],
            vec![Kind::Member, Kind::Member],
        ),
        (
            vec![
                ("submission.csv", csv),
                ("meta_data.json", meta),
                (".DS_Store", b""),
            ],
            vec![Kind::Member],
        ),
        (
            vec![("submission.csv", csv), ("meta_data.json", b"[]")],
            vec![Kind::Field],
        ),
        (
            vec![
                ("submission.csv", csv),
                ("meta_data.json", br#"{"meta_data": {"track": "t"}}"#),
            ],
            vec![Kind::Field, Kind::Field, Kind::Field],
        ),
        (
            vec![("submission.csv", b"\"id\"\n"), ("meta_data.json", meta)],
            vec![
                Kind::Columns,
                Kind::IdMissing,
                Kind::IdMissing,
                Kind::IdMissing,
            ],
        ),
    ] {
        let lint = lint_zip(&zip_of(&members));
        let kinds: Vec<Kind> = lint.findings.iter().map(|it| it.kind).collect();
        assert_eq!(kinds, found, "{members:?}");
    }
    for broken in [&b"PK"[..], &good[..good.len() / 2], GOOD.as_bytes()] {
        assert_eq!(lint_zip(broken).findings[0].kind, Kind::Member);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a model writes and a row is called, what was written reads back as it was, in all
    /// three files, and nothing is wrong with it.
    #[test]
    fn any_text_survives_csv_jsonl_and_zip(
        texts in proptest::collection::vec("([a-z\"',;=+@\\\\\n\r\té\u{1f600}-]|None|N/A){0,12}", 1..6),
        ids in proptest::collection::hash_set("[a-zA-Z0-9\"',;=+@\n\r é-]{1,8}z", 6),
    ) {
        let dir = TestDir::new("round-trip");
        let ids: Vec<String> = ids.into_iter().collect();
        let mut rows = Vec::new();
        let mut asked = Vec::new();
        for (id, text) in ids.iter().zip(&texts) {
            let mut row = row(id, 0);
            row.final_text = Some(text.clone());
            row.raw_text.clone_from(text);
            rows.push(row);
            let mut prompt = PromptRow::new(id, Some(id.as_str().into()), None, Some(("?", &[1])));
            prompt.options = Some(Vec::new());
            asked.push(prompt);
        }
        prompts::write_prompts(dir.path(), &asked).expect("the test folder is writable");
        let format = format();
        write_submission(dir.path(), &asked, &Results::new(rows), &format, &first_sample)
            .expect("the test folder is writable");
        let package = format.package.as_ref().expect("it has one");
        write_package(dir.path(), package, &Facts::default()).expect("the test folder is writable");
        let lint = lint_run(dir.path(), &format).expect("all files are there");
        prop_assert_eq!(&lint.findings, &[]);

        let bytes = std::fs::read(dir.path().join(SUBMISSION_CSV_FILE)).expect("it was written");
        let mut findings = Vec::new();
        let mut notes = Notes { file: "", findings: &mut findings };
        let table = csv::read(&bytes, true, &mut notes);
        let lines = std::fs::read(dir.path().join(SUBMISSION_JSONL_FILE)).expect("it was written");
        let by_line = jsonl::read(&lines, &format, &mut notes);
        for (place, (id, text)) in ids.iter().zip(&texts).enumerate() {
            let cells = &table.rows[place].cells;
            prop_assert_eq!(cells, &by_line.rows[place].cells);
            prop_assert_eq!(cells[0].as_ref(), Some(id));
            let changed = text.trim().is_empty() || crate::submission::null_words::is_null_word(text);
            if !changed {
                prop_assert_eq!(cells[1].as_ref(), Some(text));
            }
        }
    }
}
