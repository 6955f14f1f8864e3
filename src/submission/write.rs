//! The files rebuilt from the log: `scores.csv`, `submission.csv`, `submission.jsonl`.
//!
//! Rows come in input order whatever the order they ran in, and no file holds a time, so a run
//! that was interrupted and resumed has the same bytes as one that was not. Every file is
//! replaced whole: written beside the old one, synced, renamed. Cells are written as they are but
//! for what the profile's rules change ([`super::cells`]); escaping for spreadsheets is the
//! reader's business.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::cells::cell;
pub use super::format::{Column, ColumnValue, SubmissionFormat};
use super::prompts::PromptRow;
use super::{ResultRow, Results};
use crate::score::Status;

pub const SCORES_FILE: &str = "scores.csv";
const SCORES_HEADER: [&str; 9] = [
    "id",
    "sample",
    "answer",
    "correct",
    "status",
    "group",
    "lenient_answer",
    "lenient_correct",
    "channel",
];
pub const SUBMISSION_CSV_FILE: &str = "submission.csv";
pub const SUBMISSION_JSONL_FILE: &str = "submission.jsonl";

/// Chooses which of a row's samples speaks for it, by its place in the slice: the vote of maj@k.
/// Called with at least one sample, in sample order.
pub type PickSample<'a> = dyn Fn(&[&ResultRow]) -> usize + 'a;

/// For runs of one sample a row.
pub fn first_sample(_samples: &[&ResultRow]) -> usize {
    0
}

/// Writes `scores.csv` (a line a sample) and both submission files (a line an id) into a run
/// folder. A row without a result is there with status `not_run`; a row whose id came before is
/// in error and only in `scores.csv`. Returns the paths written.
pub fn write_submission(
    run_dir: &Path,
    prompts: &[PromptRow],
    results: &Results,
    format: &SubmissionFormat,
    pick: &PickSample,
) -> Result<Vec<PathBuf>, WriteError> {
    let scores = run_dir.join(SCORES_FILE);
    let csv = run_dir.join(SUBMISSION_CSV_FILE);
    let jsonl = run_dir.join(SUBMISSION_JSONL_FILE);
    let mut seen = HashSet::new();
    let chosen: Vec<(&PromptRow, Option<&ResultRow>)> = prompts
        .iter()
        .filter(|prompt| seen.insert(id_text(prompt)))
        .map(|prompt| (prompt, chosen_sample(results, &prompt.key, pick)))
        .collect();
    replace(&scores, |out| write_scores(out, prompts, results))?;
    replace(&csv, |out| write_submission_csv(out, &chosen, format))?;
    replace(&jsonl, |out| write_submission_jsonl(out, &chosen, format))?;
    Ok(vec![scores, csv, jsonl])
}

/// The sample that speaks for a row.
pub fn chosen_sample<'a>(
    results: &'a Results,
    key: &str,
    pick: &PickSample,
) -> Option<&'a ResultRow> {
    let samples: Vec<&ResultRow> = results.samples(key).collect();
    if samples.is_empty() {
        return None;
    }
    samples.get(pick(&samples)).or(samples.first()).copied()
}

/// Replaces a file whole: readers see the old one or the new one, never a part, even after a
/// power cut.
pub fn replace(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), WriteError> {
    let failed = |source| WriteError::Write {
        path: path.to_owned(),
        source,
    };
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = folder.join(format!(".{name}.tmp"));
    let replaced = (|| {
        let mut out = BufWriter::new(File::create(&temporary)?);
        write(&mut out)?;
        out.into_inner()
            .map_err(io::IntoInnerError::into_error)?
            .sync_all()?;
        std::fs::rename(&temporary, path)?;
        File::open(folder)?.sync_all()
    })();
    if replaced.is_err() {
        std::fs::remove_file(&temporary).ok();
    }
    replaced.map_err(failed)
}

fn write_scores(out: &mut dyn Write, prompts: &[PromptRow], results: &Results) -> io::Result<()> {
    let mut csv = csv::Writer::from_writer(out);
    csv.write_record(SCORES_HEADER)?;
    for prompt in prompts {
        let id = id_text(prompt);
        let group = prompt.group.as_deref().unwrap_or_default();
        let mut any = false;
        for row in results.samples(&prompt.key) {
            any = true;
            let answer = row.answer.as_ref().map_or("", |answer| &answer.text);
            let sample = row.sample.to_string();
            let [lenient_answer, lenient_correct, channel] = lenient_cells(row);
            csv.write_record([
                &id,
                &sample,
                answer,
                truth(row.correct),
                status_name(row.status),
                group,
                lenient_answer,
                lenient_correct,
                channel,
            ])?;
        }
        if !any {
            let status = status_name(Status::NotRun);
            csv.write_record([&id, "0", "", "", status, group, "", "", ""])?;
        }
    }
    csv.flush()
}

/// The lenient answer, whether it is right, and its channel: of every row, so that a column can be
/// summed up. Empty where the log is of a version that looked for none.
fn lenient_cells(row: &ResultRow) -> [&str; 3] {
    if !row.has_lenient() {
        return [""; 3];
    }
    let answer = row.lenient_answer();
    [
        answer.map_or("", |answer| &answer.text),
        truth(row.lenient_correct()),
        answer.and_then(|it| it.channel.as_deref()).unwrap_or(""),
    ]
}

fn truth(value: Option<bool>) -> &'static str {
    match value {
        Some(true) => "true",
        Some(false) => "false",
        None => "",
    }
}

fn write_submission_csv(
    out: &mut dyn Write,
    rows: &[(&PromptRow, Option<&ResultRow>)],
    format: &SubmissionFormat,
) -> io::Result<()> {
    let mut csv = csv::WriterBuilder::new()
        .quote_style(if format.quote_all {
            csv::QuoteStyle::Always
        } else {
            csv::QuoteStyle::Necessary
        })
        .from_writer(out);
    csv.write_record(format.columns.iter().map(|column| &column.name))?;
    for (prompt, row) in rows {
        csv.write_record(format.columns.iter().map(|column| {
            match cell(column, prompt, *row, format) {
                Value::Null => String::new(),
                Value::String(text) => text,
                other => other.to_string(),
            }
        }))?;
    }
    csv.flush()
}

fn write_submission_jsonl(
    out: &mut dyn Write,
    rows: &[(&PromptRow, Option<&ResultRow>)],
    format: &SubmissionFormat,
) -> io::Result<()> {
    for (prompt, row) in rows {
        let object: serde_json::Map<String, Value> = format
            .columns
            .iter()
            .map(|column| {
                let value = cell(column, prompt, *row, format);
                (column.name.clone(), value)
            })
            .collect();
        write_json_line(out, &object)?;
    }
    Ok(())
}

/// A row's id as the CSV spells it.
pub(crate) fn id_text(prompt: &PromptRow) -> String {
    match &prompt.id {
        None => prompt.key.clone(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

pub(crate) fn write_json_line(
    out: &mut dyn Write,
    value: &impl serde::Serialize,
) -> io::Result<()> {
    serde_json::to_writer(&mut *out, value)?;
    out.write_all(b"\n")
}

/// A status as files and tables spell it.
pub fn status_name(status: Status) -> &'static str {
    match status {
        Status::Answered => "answered",
        Status::TruncatedAnalysis => "truncated_analysis",
        Status::TruncatedFinal => "truncated_final",
        Status::NoFinal => "no_final",
        Status::ToolCall => "tool_call",
        Status::Malformed => "malformed",
        Status::NoAnswer => "no_answer",
        Status::NotAnOption => "not_an_option",
        Status::Error => "error",
        Status::NotRun => "not_run",
    }
}

/// What can go wrong with a run's rebuilt files.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error("cannot write `{path}`: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("field `{field}` of the submission's package cannot be filled in: {reason}")]
    Field { field: String, reason: String },
}

impl WriteError {
    pub fn hint(&self) -> String {
        match self {
            Self::Write { .. } => {
                "the log is kept; make the folder writable or make room, and give the same \
                 command again"
                    .to_owned()
            }
            Self::Field { field, .. } => {
                format!("give it with `--meta {field}=VALUE`, or correct the profile")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::submission::test_rows::{cut_off, row, unanswered, wrong};
    use crate::telemetry::test_dir::TestDir;

    fn prompts() -> Vec<PromptRow> {
        let ids = [
            Value::from("007"),
            Value::from(12),
            Value::from("a,\"b\"\nü"),
        ];
        let mut prompts: Vec<PromptRow> = ids
            .into_iter()
            .map(|id| {
                let key = id.as_str().map_or_else(|| id.to_string(), str::to_owned);
                let rendered: (&str, &[u32]) = ("2+2?", &[1, 2]);
                PromptRow::new(&key, Some(id), Some("sums".to_owned()), Some(rendered))
            })
            .collect();
        prompts.push(PromptRow::new("f00d-1", None, None, None));
        prompts
    }

    fn text(dir: &TestDir, file: &str) -> String {
        std::fs::read_to_string(dir.path().join(file)).expect("it was just written")
    }

    #[test]
    fn files_are_in_input_order_and_keep_the_ids_type_and_spelling() {
        let dir = TestDir::new("write");
        // As the rows finished, not as they stand in the file.
        let results = Results::new(vec![
            unanswered("a,\"b\"\nü", 0, Status::NoAnswer),
            wrong("12", 0, "5, or \"6\""),
            row("007", 0),
        ]);
        let format = SubmissionFormat::default();
        let paths = write_submission(dir.path(), &prompts(), &results, &format, &first_sample)
            .expect("the test folder is writable");
        assert_eq!(paths.len(), 3);
        assert_eq!(
            text(&dir, SCORES_FILE),
            "id,sample,answer,correct,status,group,lenient_answer,lenient_correct,channel\n\
             007,0,4200,true,answered,sums,4200,true,final\n\
             12,0,\"5, or \"\"6\"\"\",false,answered,sums,\"5, or \"\"6\"\"\",false,final\n\
             \"a,\"\"b\"\"\nü\",0,,false,no_answer,sums,,false,\n\
             f00d-1,0,,,not_run,,,,\n"
        );
        assert_eq!(
            text(&dir, SUBMISSION_JSONL_FILE),
            "{\"id\":\"007\",\"answer\":\"4200\",\"score\":1,\"status\":\"answered\",\"group\":\"sums\"}\n\
             {\"id\":12,\"answer\":\"5, or \\\"6\\\"\",\"score\":0,\"status\":\"answered\",\"group\":\"sums\"}\n\
             {\"id\":\"a,\\\"b\\\"\\nü\",\"answer\":null,\"score\":0,\"status\":\"no_answer\",\"group\":\"sums\"}\n\
             {\"id\":\"f00d-1\",\"answer\":null,\"score\":null,\"status\":\"not_run\",\"group\":null}\n"
        );
        assert!(
            text(&dir, SUBMISSION_CSV_FILE)
                .starts_with("id,answer,score,status,group\n007,4200,1,")
        );
        let n_files = std::fs::read_dir(dir.path()).expect("it exists").count();
        assert_eq!(n_files, 3, "no temporary file is left");
    }

    #[test]
    fn a_profile_names_columns_quotes_and_the_missing_answer() {
        let dir = TestDir::new("profile");
        let format = SubmissionFormat {
            columns: vec![
                Column::new("id", ColumnValue::Id),
                Column::new("prediction", ColumnValue::Answer),
                Column::new("track", ColumnValue::Constant("2".to_owned())),
            ],
            missing: "NOTAVALUE".to_owned(),
            quote_all: true,
            package: None,
        };
        let results = Results::new(vec![row("007", 0), row("007", 1), wrong("007", 2, "9")]);
        let last = |samples: &[&ResultRow]| samples.len() - 1;
        write_submission(dir.path(), &prompts()[..2], &results, &format, &last)
            .expect("the test folder is writable");
        assert_eq!(
            text(&dir, SUBMISSION_CSV_FILE),
            "\"id\",\"prediction\",\"track\"\n\"007\",\"9\",\"2\"\n\"12\",\"NOTAVALUE\",\"2\"\n"
        );
        assert_eq!(text(&dir, SCORES_FILE).lines().count(), 5);
    }

    #[test]
    fn a_lenient_answer_stands_beside_the_strict_one_and_is_not_submitted() {
        let dir = TestDir::new("lenient");
        let older = ResultRow {
            lenient: None,
            ..unanswered("12", 0, Status::NoFinal)
        };
        let results = Results::new(vec![cut_off("007", 0), older]);
        let format = SubmissionFormat::default();
        write_submission(
            dir.path(),
            &prompts()[..2],
            &results,
            &format,
            &first_sample,
        )
        .expect("the test folder is writable");
        assert_eq!(
            text(&dir, SCORES_FILE),
            "id,sample,answer,correct,status,group,lenient_answer,lenient_correct,channel\n\
             007,0,,false,truncated_analysis,sums,4200,true,analysis\n\
             12,0,,false,no_final,sums,,,\n"
        );
        assert_eq!(
            text(&dir, SUBMISSION_CSV_FILE),
            "id,answer,score,status,group\n\
             007,,0,truncated_analysis,sums\n\
             12,,0,no_final,sums\n"
        );
    }

    #[test]
    fn a_failed_replace_leaves_the_old_file() {
        let dir = TestDir::new("replace");
        let path = dir.path().join("run.json");
        replace(&path, |out| out.write_all(b"old")).expect("the test folder is writable");
        let error = replace(&path, |out| {
            out.write_all(b"half")?;
            Err(io::Error::from_raw_os_error(libc::ENOSPC))
        });
        assert!(error.is_err());
        assert_eq!(text(&dir, "run.json"), "old");
        assert_eq!(std::fs::read_dir(dir.path()).expect("it exists").count(), 1);
    }
}
