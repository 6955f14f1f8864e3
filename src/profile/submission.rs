//! The columns of a submission, as a profile names them.

use serde::{Deserialize, Serialize};

/// What the submission holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Submission {
    /// In order.
    pub columns: Vec<Column>,
}

impl Default for Submission {
    fn default() -> Self {
        let columns = [
            Source::Id,
            Source::Answer,
            Source::Score,
            Source::Status,
            Source::Group,
        ];
        Self {
            columns: columns.map(Column::of).into(),
        }
    }
}

/// A column of the submission, in a profile `"answer"`, or `"answer as prediction"` where the
/// competition has its own name for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Column {
    pub name: String,
    pub source: Source,
}

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    Id,
    Answer,
    /// The whole final message.
    FinalText,
    /// Everything the model wrote.
    RawText,
    /// 1, 0 or empty.
    Score,
    Status,
    Group,
}

impl Source {
    const ALL: [Self; 7] = [
        Self::Id,
        Self::Answer,
        Self::FinalText,
        Self::RawText,
        Self::Score,
        Self::Status,
        Self::Group,
    ];

    /// Its name in profiles, and the column's where none is given.
    pub fn name(self) -> &'static str {
        match self {
            Self::Id => "id",
            Self::Answer => "answer",
            Self::FinalText => "final_text",
            Self::RawText => "raw_text",
            Self::Score => "score",
            Self::Status => "status",
            Self::Group => "group",
        }
    }
}

impl Column {
    pub(super) fn of(source: Source) -> Self {
        Self {
            name: source.name().to_owned(),
            source,
        }
    }
}

impl TryFrom<String> for Column {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (source, name) = match text.split_once(" as ") {
            Some((source, name)) => (source.trim(), name.trim()),
            None => (text.trim(), text.trim()),
        };
        match Source::ALL.into_iter().find(|it| it.name() == source) {
            Some(source) if !name.is_empty() => Ok(Self {
                name: name.to_owned(),
                source,
            }),
            _ => {
                let known: Vec<&str> = Source::ALL.into_iter().map(Source::name).collect();
                Err(format!(
                    "unknown column `{text}`, expected one of `{}`",
                    known.join("`, `")
                ))
            }
        }
    }
}

impl From<Column> for String {
    fn from(column: Column) -> Self {
        let source = column.source.name();
        if column.name == source {
            column.name
        } else {
            format!("{source} as {}", column.name)
        }
    }
}
