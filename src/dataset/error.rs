//! What keeps a prompt file as a whole from being read.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Why a prompt file cannot be read. A single bad row is a [`super::Defect`], not this.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    #[error("cannot read `{path}`: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("`{path}` is a folder")]
    Folder { path: PathBuf },
    #[error("`{path}` does not decompress: {source}")]
    Decompress {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("`{path}` decompresses to more than {limit} bytes")]
    TooLarge { path: PathBuf, limit: u64 },
    #[error("`{path}` is empty")]
    Empty { path: PathBuf },
    #[error("`{path}` has no rows")]
    NoRows { path: PathBuf },
    #[error("`{path}` is {what}, which is not read")]
    Unsupported { path: PathBuf, what: &'static str },
    #[error("`{path}` is not a prompt file: it is neither JSON, JSON lines nor CSV with a header")]
    UnknownFormat { path: PathBuf },
    #[error("none of the {n_rows} rows of `{path}` is a JSON object: {first}")]
    NoObjects {
        path: PathBuf,
        n_rows: usize,
        /// What is wrong with the first row.
        first: String,
    },
    #[error("`{path}` has no field that holds a question; it has {}", list(.fields))]
    NoQuestion { path: PathBuf, fields: Vec<String> },
    #[error(
        "`{path}` holds replies (`{field}`) and no questions, so it is no prompt file; it has {}",
        list(.fields)
    )]
    Replies {
        path: PathBuf,
        /// The field that holds what a model wrote.
        field: String,
        fields: Vec<String>,
    },
    #[error("`{path}` is a `{schema}` file of a run, no prompt file")]
    OfARun { path: PathBuf, schema: String },
    #[error(
        "`{path}` has no header, and its rows do not tell which column is the {role}: {}",
        .candidates.join(" or ")
    )]
    NoHeader {
        path: PathBuf,
        /// What is open: `question`, `gold answer`.
        role: &'static str,
        /// The columns' numbers, and how each begins.
        candidates: Vec<String>,
    },
    #[error("`{path}` cannot be read as Parquet: {reason}")]
    Parquet { path: PathBuf, reason: String },
    #[error("the header of `{path}` names `{name}` twice")]
    DoubledHeader { path: PathBuf, name: String },
    #[error("`{path}` can be read in {} ways: the {role} is {}", .candidates.len(), either(.candidates))]
    Ambiguous {
        path: PathBuf,
        /// What has several readings: `question`, `gold`, `options`, …
        role: &'static str,
        /// The fields, or the readings of one field.
        candidates: Vec<String>,
        /// For each candidate the key under `[mapping]` that decides for it, and its value.
        mends: Vec<(&'static str, String)>,
    },
    #[error("`{path}` has no field `{field}`, which `{key}` of the profile's mapping names; it has {}", list(.fields))]
    PinnedField {
        path: PathBuf,
        key: &'static str,
        field: String,
        fields: Vec<String>,
    },
}

impl DatasetError {
    /// The file the error is about.
    pub fn path(&self) -> &Path {
        match self {
            Self::Read { path, .. }
            | Self::Folder { path }
            | Self::Decompress { path, .. }
            | Self::TooLarge { path, .. }
            | Self::Empty { path }
            | Self::NoRows { path }
            | Self::Unsupported { path, .. }
            | Self::UnknownFormat { path }
            | Self::NoObjects { path, .. }
            | Self::NoQuestion { path, .. }
            | Self::Replies { path, .. }
            | Self::OfARun { path, .. }
            | Self::NoHeader { path, .. }
            | Self::Parquet { path, .. }
            | Self::DoubledHeader { path, .. }
            | Self::Ambiguous { path, .. }
            | Self::PinnedField { path, .. } => path,
        }
    }

    /// How to mend it.
    pub fn hint(&self) -> String {
        match self {
            Self::Read { .. } => "check the path and its permissions".into(),
            Self::Folder { .. } => "name a file in it".into(),
            Self::Decompress { .. } => "the download may be cut off: fetch the file again".into(),
            Self::TooLarge { .. } => "split the file".into(),
            Self::Empty { .. } | Self::NoRows { .. } => {
                "a prompt file needs at least one row with a question".into()
            }
            Self::Unsupported { what, .. } => {
                format!("convert it from {what} to `.jsonl` or `.csv` in UTF-8 (also `.gz`) first")
            }
            Self::UnknownFormat { .. } => {
                "write one JSON object a line, a JSON array of objects, CSV whose first row names \
                 the columns, or Parquet"
                    .into()
            }
            Self::NoObjects { .. } => {
                "each line must be an object like {\"id\": 1, \"question\": \"…\"}".into()
            }
            Self::NoQuestion { .. } => {
                "name the field in a profile (`[mapping]`, `question = \"FIELD\"`; for CSV without \
                 a header also `header = false`) and pass it with `--profile FILE`"
                    .into()
            }
            Self::Replies { .. } => {
                "pass the file that holds the prompts; `podium score RUN` judges replies that a run \
                 has saved"
                    .into()
            }
            Self::OfARun { .. } => "pass the file that the run was made from".into(),
            Self::NoHeader { .. } => {
                "put a first row that names the columns before it, such as `id,question,answer`; \
                 or number them in a profile (`[mapping]`, `header = false`, `question = \"1\"`, \
                 `gold = \"2\"`, for choices also `options = [\"2\", \"3\"]`) and pass it with \
                 `--profile FILE`"
                    .into()
            }
            Self::Parquet { .. } => "the download may be cut off: fetch the file again".into(),
            Self::DoubledHeader { .. } => "give each column its own name".into(),
            Self::Ambiguous { mends, .. } => {
                let lines: Vec<String> = mends
                    .iter()
                    .map(|(key, value)| format!("`{key} = \"{value}\"`"))
                    .collect();
                format!(
                    "decide in a profile (`[mapping]`, {}) and pass it with `--profile FILE`",
                    lines.join(" or ")
                )
            }
            Self::PinnedField { key, .. } => {
                format!("correct `{key}` under `[mapping]` in the profile")
            }
        }
    }
}

fn list(names: &[String]) -> String {
    const SHOWN: usize = 12;
    let mut text = String::new();
    for (index, name) in names.iter().take(SHOWN).enumerate() {
        let comma = if index > 0 { ", " } else { "" };
        let short: String = name.chars().take(40).collect();
        let dots = if short.len() < name.len() { "…" } else { "" };
        let _ = write!(text, "{comma}`{short}{dots}`");
    }
    if names.len() > SHOWN {
        let _ = write!(text, " and {} more", names.len() - SHOWN);
    }
    if names.is_empty() {
        text.push_str("no fields");
    }
    text
}

fn either(candidates: &[String]) -> String {
    let quoted: Vec<String> = candidates.iter().map(|it| format!("`{it}`")).collect();
    quoted.join(" or ")
}
