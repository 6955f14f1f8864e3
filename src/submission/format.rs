//! What a competition takes, as the manifest keeps it: columns, sentinels, quoting, package.

use super::package::PackageFormat;

/// What a column of a submission holds.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ColumnValue {
    /// The row's id; its key when the file has no ids.
    Id,
    Answer,
    /// The letter of the option chosen.
    Choice,
    /// What is submitted as the answer in words: an open answer, else the option's text, else the
    /// final message.
    Prediction,
    /// The conversation's messages as JSON: `[{"role": …, "content": …}, …]`.
    Reasoning,
    /// 1 or 0; empty without gold.
    Score,
    Status,
    Group,
    /// The text of the final message.
    FinalText,
    /// Everything the model wrote.
    RawText,
    /// The same text in every row.
    Constant(String),
}

#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Column {
    pub name: String,
    pub value: ColumnValue,
    /// Written here for what is not there; the format's `missing` where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing: Option<String>,
    /// Never empty, and never a word that pandas reads as missing: see [`super::null_words`].
    #[serde(default)]
    pub never_null: bool,
}

impl Column {
    /// A column without rules of its own.
    pub fn new(name: &str, value: ColumnValue) -> Self {
        Self {
            name: name.to_owned(),
            value,
            missing: None,
            never_null: false,
        }
    }
}

/// What a competition takes.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SubmissionFormat {
    pub columns: Vec<Column>,
    /// Written for an answer or text that is not there, such as `NOTAVALUE`. In JSONL an empty
    /// one is `null`.
    #[serde(default)]
    pub missing: String,
    /// Every cell of the CSV in quotes, not only those that need them.
    #[serde(default)]
    pub quote_all: bool,
    /// The ZIP that is handed in, where it is not the CSV itself.
    #[serde(default)]
    pub package: Option<PackageFormat>,
}

impl SubmissionFormat {
    /// The sentinel of a column; empty where it has none.
    pub fn missing_in<'a>(&'a self, column: &'a Column) -> &'a str {
        column.missing.as_deref().unwrap_or(&self.missing)
    }
}

impl Default for SubmissionFormat {
    /// The generic one: id, answer, score, status, group.
    fn default() -> Self {
        Self {
            columns: vec![
                Column::new("id", ColumnValue::Id),
                Column::new("answer", ColumnValue::Answer),
                Column::new("score", ColumnValue::Score),
                Column::new("status", ColumnValue::Status),
                Column::new("group", ColumnValue::Group),
            ],
            missing: String::new(),
            quote_all: false,
            package: None,
        }
    }
}
