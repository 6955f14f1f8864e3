//! The submission as a profile describes it: columns, what stands for a missing answer, quoting,
//! and the package that is handed in.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::submission::null_words::is_null_word;
use crate::submission::package::PackageFormat;

/// What the submission holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Written")]
pub struct Submission {
    /// In order.
    pub columns: Vec<Column>,
    pub quote: Quote,
    pub package: Option<PackageFormat>,
}

/// Which cells of the CSV stand in quotes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quote {
    All,
    /// Those that could not be read back without.
    #[default]
    Needed,
}

impl Submission {
    /// Whether a column tells the conversation, so that a run must keep it.
    pub fn tells_conversation(&self) -> bool {
        let tells = |column: &Column| column.source == Source::Reasoning;
        self.columns.iter().any(tells)
    }
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
            quote: Quote::Needed,
            package: None,
        }
    }
}

/// A column of the submission, in a profile `"answer"`, `"answer as prediction"` where the
/// competition has its own name for it, or `{ name = "track", constant = "2" }`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Column {
    pub name: String,
    pub source: Source,
    /// Written for what is not there.
    pub missing: Option<String>,
    /// Never empty, and never a word that pandas reads as missing.
    pub never_null: bool,
}

/// What a column holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    Id,
    Answer,
    /// The letter of the option chosen.
    Choice,
    /// The answer in words.
    Prediction,
    /// The conversation as JSON.
    Reasoning,
    /// The whole final message.
    FinalText,
    /// Everything the model wrote.
    RawText,
    /// 1, 0 or empty.
    Score,
    Status,
    Group,
    /// The same text in every row.
    Constant(String),
}

impl Source {
    /// Those that a column names.
    const NAMED: [(&str, Self); 10] = [
        ("id", Self::Id),
        ("answer", Self::Answer),
        ("choice", Self::Choice),
        ("prediction", Self::Prediction),
        ("reasoning", Self::Reasoning),
        ("final_text", Self::FinalText),
        ("raw_text", Self::RawText),
        ("score", Self::Score),
        ("status", Self::Status),
        ("group", Self::Group),
    ];
}

impl Column {
    /// A column of the source's own name, without rules.
    pub(super) fn of(source: Source) -> Self {
        let name = Source::NAMED
            .iter()
            .find_map(|(name, known)| (*known == source).then_some(*name));
        Self::named(name.unwrap_or_default(), source)
    }

    fn named(name: &str, source: Source) -> Self {
        Self {
            name: name.to_owned(),
            source,
            missing: None,
            never_null: false,
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
        let known = Source::NAMED
            .into_iter()
            .find(|(known, _)| *known == source);
        match known {
            Some((_, source)) if !name.is_empty() => Ok(Self::named(name, source)),
            _ => {
                let known: Vec<&str> = Source::NAMED.iter().map(|(name, _)| *name).collect();
                Err(format!(
                    "unknown column `{text}`, expected one of `{}`",
                    known.join("`, `")
                ))
            }
        }
    }
}

/// By hand, so that a message says what is wrong with a text and not that no shape fits it.
impl<'de> Deserialize<'de> for Column {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Shapes;

        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Constant {
            name: String,
            constant: String,
        }

        impl<'de> Visitor<'de> for Shapes {
            type Value = Column;

            fn expecting(&self, out: &mut fmt::Formatter) -> fmt::Result {
                out.write_str("a column's name, or `{ name = …, constant = … }`")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Column, E> {
                Column::try_from(text.to_owned()).map_err(E::custom)
            }

            fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<Column, M::Error> {
                let Constant { name, constant } =
                    Constant::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Column::named(&name, Source::Constant(constant)))
            }
        }

        deserializer.deserialize_any(Shapes)
    }
}

/// The section as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    columns: Vec<Column>,
    #[serde(default)]
    missing: Missing,
    #[serde(default)]
    never_null: NeverNull,
    #[serde(default)]
    quote: Quote,
    #[serde(default)]
    package: Option<PackageFormat>,
}

/// One sentinel for all columns, or one a column.
#[derive(Deserialize)]
#[serde(untagged)]
enum Missing {
    All(String),
    Columns(BTreeMap<String, String>),
}

impl Default for Missing {
    fn default() -> Self {
        Self::Columns(BTreeMap::new())
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum NeverNull {
    All(bool),
    Columns(Vec<String>),
}

impl Default for NeverNull {
    fn default() -> Self {
        Self::All(false)
    }
}

impl TryFrom<Written> for Submission {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let mut columns = written.columns;
        if columns.is_empty() {
            return Err("the submission has no columns".to_owned());
        }
        if !columns.iter().any(|column| column.source == Source::Id) {
            return Err("the submission has no column `id`, so no row can be told".to_owned());
        }
        let mut names: Vec<&str> = columns.iter().map(|column| column.name.as_str()).collect();
        names.sort_unstable();
        if let Some([name, _]) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("two columns of the submission are called `{name}`"));
        }
        let place = |columns: &[Column], name: &str, key: &str| {
            columns
                .iter()
                .position(|column| column.name == name)
                .ok_or_else(|| format!("`{key}` names `{name}`, which is no column"))
        };
        match written.missing {
            Missing::All(sentinel) => {
                for column in &mut columns {
                    column.missing = Some(sentinel.clone());
                }
            }
            Missing::Columns(sentinels) => {
                for (name, sentinel) in sentinels {
                    let place = place(&columns, &name, "missing")?;
                    columns[place].missing = Some(sentinel);
                }
            }
        }
        match written.never_null {
            NeverNull::All(never_null) => {
                for column in &mut columns {
                    column.never_null = never_null;
                }
            }
            NeverNull::Columns(names) => {
                for name in names {
                    let place = place(&columns, &name, "never_null")?;
                    columns[place].never_null = true;
                }
            }
        }
        for column in columns.iter().filter(|column| column.never_null) {
            let name = &column.name;
            match column.missing.as_deref().unwrap_or_default().trim() {
                "" if column.source == Source::Id => {}
                "" => {
                    return Err(format!(
                        "column `{name}` is never null, but `missing` gives no word for it"
                    ));
                }
                word if is_null_word(word) => {
                    return Err(format!(
                        "`missing` of column `{name}` is `{word}`, which pandas reads as null"
                    ));
                }
                _ => {}
            }
        }
        if let Some(package) = &written.package {
            package.check()?;
        }
        Ok(Self {
            columns,
            quote: written.quote,
            package: written.package,
        })
    }
}
