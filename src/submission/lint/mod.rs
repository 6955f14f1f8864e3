//! A written submission read back as the competition would: its bytes, its columns, its rows, each
//! cell by the profile's rules. What is written is not taken on trust: nothing here shares code
//! with the writer but the format and the list of words that pandas reads as missing.
//!
//! A file goes from bytes to a `Table` (`csv`, `jsonl`), whose rows are held against the
//! format and the data set (`rows`); a ZIP is opened first (`package`).

mod csv;
mod jsonl;
mod package;
mod rows;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::format::SubmissionFormat;
use super::prompts::{PromptsError, read_prompts};
use super::write::{SUBMISSION_CSV_FILE, SUBMISSION_JSONL_FILE};

pub const LINT_SCHEMA: &str = "podium.lint/1";

/// What a reader of the submission finds.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Lint {
    pub schema: String,
    pub files: Vec<Checked>,
    pub findings: Vec<Finding>,
    /// What could not be checked for lack of the data set, a sentence each.
    pub unchecked: Vec<String>,
}

/// A file that was read.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Checked {
    pub file: String,
    pub n_rows: usize,
    /// Cells that hold a word which pandas would read as missing, with a full stop behind it.
    pub n_stopped_words: usize,
}

/// Something that is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Finding {
    pub kind: Kind,
    pub file: String,
    /// From 1, the header not counted.
    pub row: Option<usize>,
    /// Of the file, from 1.
    pub line: Option<u64>,
    pub column: Option<String>,
    pub message: String,
}

/// What kind of thing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    NotUtf8,
    ByteOrderMark,
    Nul,
    /// The columns are not the format's, in its order.
    Columns,
    /// A row has more or fewer cells than the header.
    CellCount,
    NotQuoted,
    Empty,
    NullWord,
    /// Neither an option's letter nor the sentinel.
    Choice,
    /// A cell or line that should be JSON of a certain shape.
    NotJson,
    IdDoubled,
    IdMissing,
    IdUnknown,
    /// All ids are there, in another order than the data set's.
    IdOrder,
    /// A member of the ZIP.
    Member,
    /// A field of the package's JSON object.
    Field,
}

/// A row that must be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedRow {
    pub id: String,
    /// Absent where they are not known.
    pub options: Option<Vec<String>>,
}

/// The rows that a submission must have, out of ids, keys and options. A row whose id came before
/// it is in error, and not handed in.
pub fn expected_rows(
    rows: impl IntoIterator<Item = (Option<Value>, String, Option<Vec<String>>)>,
) -> Vec<ExpectedRow> {
    let mut seen = HashSet::new();
    rows.into_iter()
        .map(|(id, key, options)| ExpectedRow {
            id: match id {
                None => key,
                Some(Value::String(text)) => text,
                Some(other) => other.to_string(),
            },
            options,
        })
        .filter(|row| seen.insert(row.id.clone()))
        .collect()
}

/// A file's cells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Table {
    columns: Vec<String>,
    rows: Vec<TableRow>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct TableRow {
    line: u64,
    /// JSON's null is an absent one.
    cells: Vec<Option<String>>,
}

/// Takes the findings of one file.
struct Notes<'a> {
    file: &'a str,
    findings: &'a mut Vec<Finding>,
}

impl Notes<'_> {
    /// About the file as a whole.
    fn file(&mut self, kind: Kind, message: String) {
        self.cell(kind, None, None, None, message);
    }

    fn cell(
        &mut self,
        kind: Kind,
        row: Option<usize>,
        line: Option<u64>,
        column: Option<&str>,
        message: String,
    ) {
        self.findings.push(Finding {
            kind,
            file: self.file.to_owned(),
            row,
            line,
            column: column.map(str::to_owned),
            message,
        });
    }
}

impl Finding {
    /// File, row and column, as far as it has them.
    pub fn place(&self) -> String {
        let mut place = self.file.clone();
        match (self.row, self.line) {
            (Some(row), Some(line)) => place += &format!(", row {row} (line {line})"),
            (Some(row), None) => place += &format!(", row {row}"),
            (None, Some(line)) => place += &format!(", line {line}"),
            (None, None) => {}
        }
        if let Some(column) = &self.column {
            place += &format!(", column `{column}`");
        }
        place
    }
}

/// Reads back what a run's folder hands in: CSV, JSONL and package.
///
/// # Errors
/// A file that is not there or cannot be read.
pub fn lint_run(run_dir: &Path, format: &SubmissionFormat) -> Result<Lint, LintError> {
    let prompts = read_prompts(run_dir)?.into_iter();
    let expected = expected_rows(prompts.map(|row| (row.id, row.key, row.options)));
    let csv = read(&run_dir.join(SUBMISSION_CSV_FILE))?;
    let jsonl = read(&run_dir.join(SUBMISSION_JSONL_FILE))?;
    let mut lint = Lint::begin(Some(&expected));
    lint.csv(SUBMISSION_CSV_FILE, &csv, format, Some(&expected));
    lint.jsonl(SUBMISSION_JSONL_FILE, &jsonl, format, Some(&expected));
    if let Some(package) = &format.package {
        let zip = read(&run_dir.join(&package.zip))?;
        // The same bytes need not be read twice.
        lint.zip(&package.zip, &zip, format, Some(&expected), Some(&csv));
    }
    Ok(lint)
}

/// Reads one file back: a `.zip` is a package, a `.jsonl` has a line a row, all else is CSV.
///
/// # Errors
/// It cannot be read.
pub fn lint_file(
    path: &Path,
    format: &SubmissionFormat,
    expected: Option<&[ExpectedRow]>,
) -> Result<Lint, LintError> {
    let bytes = read(path)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let mut lint = Lint::begin(expected);
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("zip") => lint.zip(&name, &bytes, format, expected, None),
        Some("jsonl") => lint.jsonl(&name, &bytes, format, expected),
        _ => lint.csv(&name, &bytes, format, expected),
    }
    Ok(lint)
}

fn read(path: &Path) -> Result<Vec<u8>, LintError> {
    std::fs::read(path).map_err(|source| LintError::Read {
        path: path.to_owned(),
        source,
    })
}

impl Lint {
    fn begin(expected: Option<&[ExpectedRow]>) -> Self {
        let unchecked = match expected {
            Some(_) => Vec::new(),
            None => vec![
                "whether every id of the data set is there, and its options' letters: name it \
                 with `--dataset FILE`"
                    .to_owned(),
            ],
        };
        Self {
            schema: LINT_SCHEMA.to_owned(),
            unchecked,
            ..Self::default()
        }
    }

    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }

    fn csv(
        &mut self,
        file: &str,
        bytes: &[u8],
        format: &SubmissionFormat,
        expected: Option<&[ExpectedRow]>,
    ) {
        let read = |notes: &mut Notes| csv::read(bytes, format.quote_all, notes);
        self.table(file, format, expected, read);
    }

    fn jsonl(
        &mut self,
        file: &str,
        bytes: &[u8],
        format: &SubmissionFormat,
        expected: Option<&[ExpectedRow]>,
    ) {
        let read = |notes: &mut Notes| jsonl::read(bytes, format, notes);
        self.table(file, format, expected, read);
    }

    fn table(
        &mut self,
        file: &str,
        format: &SubmissionFormat,
        expected: Option<&[ExpectedRow]>,
        read: impl FnOnce(&mut Notes) -> Table,
    ) {
        let mut notes = Notes {
            file,
            findings: &mut self.findings,
        };
        let table = read(&mut notes);
        let n_stopped_words = rows::check(&table, format, expected, &mut notes);
        self.files.push(Checked {
            file: file.to_owned(),
            n_rows: table.rows.len(),
            n_stopped_words,
        });
    }

    /// `known` is a CSV that was read already.
    fn zip(
        &mut self,
        file: &str,
        bytes: &[u8],
        format: &SubmissionFormat,
        expected: Option<&[ExpectedRow]>,
        known: Option<&[u8]>,
    ) {
        let mut notes = Notes {
            file,
            findings: &mut self.findings,
        };
        let Some(package) = &format.package else {
            notes.file(
                Kind::Member,
                "the profile has no package, so a ZIP is not what it hands in".to_owned(),
            );
            return;
        };
        let Some(csv) = package::check(bytes, package, &mut notes) else {
            return;
        };
        if known != Some(&csv) {
            let member = format!("{file}/{}", package.csv);
            self.csv(&member, &csv, format, expected);
        }
    }
}

/// Why a submission cannot be read back.
#[derive(Debug, thiserror::Error)]
pub enum LintError {
    #[error("cannot read `{path}`: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Prompts(#[from] PromptsError),
}

impl LintError {
    /// How to mend it.
    pub fn hint(&self) -> String {
        match self {
            Self::Read { .. } => {
                "name a .csv, .jsonl or .zip, or a run; `podium score RUN` writes a run's files anew"
                    .to_owned()
            }
            Self::Prompts(error) => error.hint(),
        }
    }
}
