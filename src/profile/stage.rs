//! A second stage: a turn of the user after the reply to the first one, for rows that a profile
//! asks twice (answer openly, then choose).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::template::{self, Template};
use super::{Profile, ProfileError};
use crate::dataset::Record;
use crate::score::Scoring;

/// The key `[second_stage]` of a profile.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecondStage {
    /// The rows that have it: fields of the row and the values they must have, all of them.
    /// Without any, every row has it.
    #[serde(default)]
    pub when: BTreeMap<String, OneOf>,
    /// The user's second turn, a template that sees what the first one sees.
    pub template: String,
    /// Longest second reply; the first one's where it is absent.
    #[serde(default)]
    pub max_new_tokens: Option<u32>,
    /// How the second reply is read; as a reply of a row of one stage where it is absent.
    #[serde(default)]
    pub scoring: Option<Scoring>,
}

/// A value, or several of which one must be there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOf {
    One(String),
    Many(Vec<String>),
}

impl OneOf {
    fn holds(&self, value: &serde_json::Value) -> bool {
        let text = match value {
            serde_json::Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        match self {
            Self::One(wanted) => *wanted == text,
            Self::Many(wanted) => wanted.contains(&text),
        }
    }
}

impl Profile {
    /// The second stage of a row, if it has one.
    pub fn second_stage_of(&self, record: &Record) -> Option<&SecondStage> {
        self.second_stage.as_ref().filter(|stage| {
            stage.when.iter().all(|(field, wanted)| {
                let value = record.fields.get(field);
                value.is_some_and(|value| wanted.holds(value))
            })
        })
    }

    /// The user's second turn for a row that has one.
    ///
    /// # Errors
    /// As [`Profile::render`].
    pub fn next_turn(&self, record: &Record) -> Result<Option<String>, ProfileError> {
        self.second_stage_of(record)
            .map(|stage| {
                let template = Template::new("second_stage.template", &stage.template);
                template::render(&self.name, template, record, None)
            })
            .transpose()
    }

    /// How a second reply is read.
    pub fn second_scoring(&self) -> &Scoring {
        let own = self.second_stage.as_ref();
        own.and_then(|stage| stage.scoring.as_ref())
            .unwrap_or(&self.scoring)
    }
}
