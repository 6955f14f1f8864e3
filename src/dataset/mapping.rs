//! Which field of the file is what, and the parts of that which a profile may pin.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The source field of each part of a record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Mapping {
    pub id: Option<String>,
    pub question: Option<String>,
    pub messages: Option<String>,
    pub options: Option<OptionsSource>,
    pub gold: Option<String>,
    /// How the gold is to be read; absent without gold.
    pub gold_kind: Option<GoldKind>,
    pub group: Option<String>,
    pub cluster: Option<String>,
}

/// Where a row's options stand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OptionsSource {
    /// In one field, as a list or an object; in the question's own field, as lettered lines at
    /// its end.
    Field(String),
    /// In a column each.
    Columns(Vec<String>),
}

/// How the gold of a row with options is spelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GoldKind {
    /// The label that the row itself gives the option.
    Label,
    /// A letter: `A` is the first option.
    Letter,
    /// The option's text.
    OptionText,
    /// A number: 0 is the first option.
    IndexFrom0,
    /// A number: 1 is the first option.
    IndexFrom1,
    /// No row has options: the gold is a text of its own.
    Text,
}

/// Parts of the mapping that a profile gives. An empty name says that there is no such field.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pins {
    /// The field of a JSON file's object that holds the rows.
    pub rows: Option<String>,
    /// Whether a CSV file's first row names its columns; without, they are numbered from 1.
    pub header: Option<bool>,
    pub id: Option<String>,
    pub question: Option<String>,
    pub messages: Option<String>,
    pub options: Option<OptionsSource>,
    pub gold: Option<String>,
    pub gold_kind: Option<GoldKind>,
    pub group: Option<String>,
    pub cluster: Option<String>,
}

impl Mapping {
    /// Whether a field is the source of some part.
    pub fn uses(&self, field: &str) -> bool {
        let single = [
            &self.id,
            &self.question,
            &self.messages,
            &self.gold,
            &self.group,
            &self.cluster,
        ];
        single.iter().any(|it| it.as_deref() == Some(field))
            || self.options.as_ref().is_some_and(|it| it.names(field))
    }

    /// Whether the options are lettered lines at the end of the question's text.
    pub fn has_inline_options(&self) -> bool {
        match (&self.question, &self.options) {
            (Some(question), Some(OptionsSource::Field(options))) => question == options,
            _ => false,
        }
    }
}

impl GoldKind {
    /// Its name in a profile.
    pub fn key(self) -> &'static str {
        match self {
            Self::Label => "label",
            Self::Letter => "letter",
            Self::OptionText => "option_text",
            Self::IndexFrom0 => "index_from0",
            Self::IndexFrom1 => "index_from1",
            Self::Text => "text",
        }
    }
}

impl Pins {
    /// Whether a pin names this field.
    pub fn names(&self, field: &str) -> bool {
        let single = [
            &self.id,
            &self.question,
            &self.messages,
            &self.gold,
            &self.group,
            &self.cluster,
        ];
        single.iter().any(|pin| pin.as_deref() == Some(field))
            || self.options.as_ref().is_some_and(|it| it.names(field))
    }
}

impl OptionsSource {
    /// Whether the options stand in this field.
    pub fn names(&self, field: &str) -> bool {
        match self {
            Self::Field(name) => name == field,
            Self::Columns(names) => names.iter().any(|name| name == field),
        }
    }
}

impl fmt::Display for OptionsSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Field(name) => formatter.write_str(name),
            Self::Columns(names) => formatter.write_str(&names.join(", ")),
        }
    }
}

impl fmt::Display for GoldKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Label => "the option's label",
            Self::Letter => "a letter",
            Self::OptionText => "the option's text",
            Self::IndexFrom0 => "a number counted from 0",
            Self::IndexFrom1 => "a number counted from 1",
            Self::Text => "text",
        })
    }
}

/// A line for each part that was found: `question <- problem`.
impl fmt::Display for Mapping {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = vec![match &self.id {
            Some(field) => format!("id <- {field}"),
            None => "id <- a hash of the row".to_owned(),
        }];
        let mut add = |part: &str, field: &Option<String>| {
            if let Some(field) = field {
                lines.push(format!("{part} <- {field}"));
            }
        };
        add("question", &self.question);
        add("messages", &self.messages);
        let options = match &self.options {
            Some(source) if self.has_inline_options() => {
                Some(format!("{source} (the lettered lines at its end)"))
            }
            source => source.as_ref().map(ToString::to_string),
        };
        add("options", &options);
        let gold = match (&self.gold, self.gold_kind) {
            (Some(field), Some(kind)) => Some(format!("{field} ({kind})")),
            (field, _) => field.clone(),
        };
        add("gold", &gold);
        add("group", &self.group);
        add("cluster", &self.cluster);
        formatter.write_str(&lines.join("\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kinds_key_is_what_a_profile_takes() {
        for kind in [
            GoldKind::Label,
            GoldKind::Letter,
            GoldKind::OptionText,
            GoldKind::IndexFrom0,
            GoldKind::IndexFrom1,
            GoldKind::Text,
        ] {
            let pins: Pins = toml::from_str(&format!("gold_kind = \"{}\"", kind.key()))
                .expect("the key is known");
            assert_eq!(pins.gold_kind, Some(kind));
        }
    }
}
