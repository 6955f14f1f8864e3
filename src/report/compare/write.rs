//! The comparison's files: `comparison.json`, `.md` and `.csv`, each replaced whole.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::load::{CompareError, LoadedRun};
use super::{Comparison, Question};
use crate::submission::identity::sha256_hex;
use crate::submission::manifest::RUN_FILE;
use crate::submission::write::{replace, status_name, write_json_line};

pub const JSON_FILE: &str = "comparison.json";
pub const MARKDOWN_FILE: &str = "comparison.md";
pub const CSV_FILE: &str = "comparison.csv";

/// File systems take names of 255 bytes; the temporary file beside ours needs none of it.
const MAX_NAME_BYTES: usize = 200;

/// `compare-<A>-vs-<B>`, under the folder of runs. Where many runs make it too long, a hash of
/// the names stands for the rest.
pub fn folder_name(runs: &[LoadedRun]) -> String {
    let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
    let whole = format!("compare-{}", names.join("-vs-"));
    if whole.len() <= MAX_NAME_BYTES {
        return whole;
    }
    let hash = sha256_hex(whole.as_bytes());
    let head: String = whole.chars().take(MAX_NAME_BYTES / 4).collect();
    format!(
        "{head}-{}-runs-{}",
        runs.len(),
        hash.get(..8).unwrap_or(&hash)
    )
}

/// Writes the three files and gives their names.
///
/// # Errors
/// A folder that holds a run, or that takes no files.
pub fn write(comparison: &Comparison, folder: &Path) -> Result<Vec<String>, CompareError> {
    if folder.join(RUN_FILE).exists() {
        return Err(CompareError::IntoARun {
            path: folder.to_owned(),
        });
    }
    // A failure shows at the first file, with its path.
    std::fs::create_dir_all(folder).ok();
    let path = |name: &str| -> PathBuf { folder.join(name) };
    replace(&path(JSON_FILE), |out| write_json_line(out, comparison))?;
    replace(&path(MARKDOWN_FILE), |out| {
        out.write_all(comparison.to_markdown().as_bytes())
    })?;
    replace(&path(CSV_FILE), |out| write_csv(out, comparison))?;
    Ok([MARKDOWN_FILE, CSV_FILE, JSON_FILE]
        .map(str::to_owned)
        .to_vec())
}

/// A line a question: key, group, then status, right share and answer of each run, then
/// direction and cause of each other run's change.
fn write_csv(out: &mut dyn Write, comparison: &Comparison) -> io::Result<()> {
    let mut csv = csv::Writer::from_writer(out);
    let mut header = vec!["key".to_owned(), "group".to_owned()];
    let label = |run: usize| comparison.label(run).to_lowercase();
    for run in 0..comparison.runs.len() {
        for column in ["status", "correct", "answer"] {
            header.push(format!("{}_{column}", label(run)));
        }
    }
    for pair in &comparison.pairs {
        for column in ["change", "cause"] {
            header.push(format!("{}_{column}", label(pair.run)));
        }
    }
    csv.write_record(&header)?;
    for question in &comparison.questions {
        csv.write_record(csv_line(question))?;
    }
    csv.flush()
}

fn csv_line(question: &Question) -> Vec<String> {
    let text = |text: &Option<String>| text.as_deref().map_or_else(String::new, no_formula);
    let mut cells = vec![no_formula(&question.key), text(&question.group)];
    for side in &question.sides {
        match side {
            None => cells.extend(vec![String::new(); 3]),
            Some(side) => cells.extend([
                status_name(side.status).to_owned(),
                side.correct
                    .map_or_else(String::new, |share| share.to_string()),
                text(&side.answer),
            ]),
        }
    }
    for change in &question.changes {
        match change {
            None => cells.extend(vec![String::new(); 2]),
            Some(change) => cells.extend([
                change.direction.name().to_owned(),
                change.cause.name().to_owned(),
            ]),
        }
    }
    cells
}

/// A spreadsheet takes a text that begins so for a formula, and would run it.
fn no_formula(text: &str) -> String {
    if text.starts_with(['=', '+', '-', '@', '\t', '\r']) {
        format!("'{text}")
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::compare::{Cause, Direction, QuestionChange, QuestionSide};
    use crate::score::Status;

    #[test]
    fn formulas_are_escaped_in_text_columns_only() {
        let side = |answer: &str, correct| {
            Some(QuestionSide {
                status: Status::Answered,
                correct,
                answer: Some(answer.to_owned()),
            })
        };
        let question = Question {
            key: "@q".to_owned(),
            id: None,
            group: Some("-sums".to_owned()),
            cluster: None,
            sides: vec![side("=1+1", Some(0.25)), side("-5", Some(1.0)), None],
            changes: vec![
                Some(QuestionChange {
                    cause: Cause::AnswerChanged,
                    direction: Direction::Gained,
                }),
                None,
            ],
        };
        let expected = [
            "'@q",
            "'-sums",
            "answered",
            "0.25",
            "'=1+1",
            "answered",
            "1",
            "'-5",
            "",
            "",
            "",
            "gained",
            "answer_changed",
            "",
            "",
        ];
        assert_eq!(csv_line(&question), expected);
    }
}
