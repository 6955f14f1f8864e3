//! Profiles: what a competition's rows look like, how they are asked, read and scored, and the
//! columns its submission takes. Built-in profiles are files of the same format.
//!
//! A profile turns a record into a prompt; it never sees the record's gold.

mod error;
mod stage;
mod submission;
#[cfg(test)]
mod tests;

use std::path::Path;

use minijinja::{Environment, UndefinedBehavior, Value, context};
use serde::{Deserialize, Serialize};

pub use error::ProfileError;
pub use stage::SecondStage;
pub use submission::{Column, Source, Submission};

use crate::dataset::{Dataset, Message, Pins, Record};
use crate::prompt::{Prompt, Reasoning};
use crate::score::{Scoring, option_letter};

/// A profile, read and checked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    pub name: String,
    /// The developer message. A messages row with one of its own keeps that.
    #[serde(default)]
    pub instructions: Option<String>,
    /// The user's turn (minijinja). It sees `question`, `options` (each with `letter` and
    /// `text`), `row` (all fields that give no gold away) and each field by its name.
    pub template: String,
    /// Parts of the mapping that need no guess.
    #[serde(default)]
    pub mapping: Pins,
    pub scoring: Scoring,
    #[serde(default)]
    pub second_stage: Option<SecondStage>,
    #[serde(default)]
    pub defaults: Defaults,
    #[serde(default)]
    pub submission: Submission,
}

/// What the profile asks for where no flag says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Defaults {
    #[serde(default)]
    pub max_new_tokens: Option<u32>,
    #[serde(default)]
    pub temperature: Option<f32>,
    #[serde(default)]
    pub top_p: Option<f32>,
    #[serde(default)]
    pub top_k: Option<u32>,
    #[serde(default)]
    pub reasoning: Option<Reasoning>,
}

const BUILTIN: [(&str, &str); 4] = [
    ("qa", include_str!("../../datasets/profiles/qa.toml")),
    (
        "choice",
        include_str!("../../datasets/profiles/choice.toml"),
    ),
    ("nano", include_str!("../../datasets/profiles/nano.toml")),
    (
        "curebench",
        include_str!("../../datasets/profiles/curebench.toml"),
    ),
];

impl Profile {
    /// The names of the built-in profiles.
    pub fn builtin_names() -> impl Iterator<Item = &'static str> {
        BUILTIN.into_iter().map(|(name, _)| name)
    }

    /// A built-in profile.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn builtin(name: &str) -> Result<Self, ProfileError> {
        let (name, text) = BUILTIN
            .into_iter()
            .find(|(builtin, _)| *builtin == name)
            .ok_or_else(|| ProfileError::Unknown {
                name: name.to_owned(),
            })?;
        Self::from_toml(Path::new(name), text)
    }

    /// A profile out of a file.
    ///
    /// # Errors
    /// When the file cannot be read or is not a profile; an unknown key is named.
    pub fn read(path: &Path) -> Result<Self, ProfileError> {
        let text = std::fs::read_to_string(path).map_err(|source| ProfileError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::from_toml(path, &text)
    }

    /// What `--profile` names: a file, else a built-in profile.
    ///
    /// # Errors
    /// As [`Profile::read`] and [`Profile::builtin`].
    pub fn find(name: &str) -> Result<Self, ProfileError> {
        let path = Path::new(name);
        if path.exists() || name.ends_with(".toml") {
            Self::read(path)
        } else {
            Self::builtin(name)
        }
    }

    /// The profile of a data set for which none is named: `nano` for the model of that name, else
    /// `choice` where every row has options, else `qa`.
    ///
    /// # Errors
    /// When a built-in profile is broken, which a test excludes.
    pub fn for_dataset(dataset: &Dataset, is_nano: bool) -> Result<Self, ProfileError> {
        let mut usable = dataset
            .records
            .iter()
            .filter(|record| record.defect.is_none())
            .peekable();
        let has_rows = usable.peek().is_some();
        let name = if is_nano {
            "nano"
        } else if has_rows && usable.all(|record| !record.options.is_empty()) {
            "choice"
        } else {
            "qa"
        };
        Self::builtin(name)
    }

    /// The profile with its scorer settled for these rows (see [`Scoring::resolve`]).
    #[must_use]
    pub fn resolved(mut self, records: &[Record]) -> Self {
        self.scoring = self.scoring.resolve(records);
        self
    }

    fn from_toml(path: &Path, text: &str) -> Result<Self, ProfileError> {
        let profile: Self = toml::from_str(text).map_err(|error| {
            let before = error.span().and_then(|span| text.get(..span.start));
            ProfileError::Invalid {
                path: path.to_owned(),
                line: before.unwrap_or_default().matches('\n').count() + 1,
                reason: error.message().to_owned(),
            }
        })?;
        let second = profile.second_stage.as_ref().map(|stage| &stage.template);
        for template in [&profile.template].into_iter().chain(second) {
            environment()
                .template_from_str(template)
                .map_err(|error| ProfileError::Template {
                    profile: profile.name.clone(),
                    reason: error.to_string(),
                })?;
        }
        Ok(profile)
    }

    /// The prompt of a record. A messages row passes through; its system and developer turns
    /// take the instructions' place.
    ///
    /// # Errors
    /// When the template names a field that the row does not have, or gives no text.
    pub fn render(
        &self,
        record: &Record,
        reasoning: Reasoning,
        date: Option<&str>,
    ) -> Result<Prompt, ProfileError> {
        let mut instructions = self.instructions.clone();
        let turns = if record.messages.is_empty() {
            vec![Message {
                role: "user".into(),
                content: self.user_turn(&self.template, record)?,
            }]
        } else {
            let is_instruction =
                |turn: &&Message| matches!(turn.role.as_str(), "system" | "developer");
            let (own, turns): (Vec<&Message>, Vec<&Message>) =
                record.messages.iter().partition(is_instruction);
            if !own.is_empty() {
                let texts: Vec<&str> = own.iter().map(|turn| turn.content.as_str()).collect();
                instructions = Some(texts.join("\n\n"));
            }
            turns.into_iter().cloned().collect()
        };
        Ok(Prompt {
            reasoning,
            date: date.map(str::to_owned),
            instructions: instructions.filter(|text| !text.is_empty()),
            turns,
        })
    }

    fn user_turn(&self, template: &str, record: &Record) -> Result<String, ProfileError> {
        let options: Vec<Value> = record
            .options
            .iter()
            .enumerate()
            .map(|(index, text)| context! { letter => option_letter(index), text => text })
            .collect();
        let row = Value::from_serialize(&record.fields);
        // The first of two wins: a field named `options` does not hide the options.
        let context = context! {
            question => record.question,
            options => options,
            row => row,
            ..row.clone()
        };
        let text = environment()
            .render_str(template, context)
            .map_err(|error| ProfileError::Render {
                profile: self.name.clone(),
                key: record.key.clone(),
                reason: error.to_string(),
            })?;
        if text.trim().is_empty() {
            return Err(ProfileError::EmptyPrompt {
                profile: self.name.clone(),
                key: record.key.clone(),
            });
        }
        Ok(text)
    }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment
}
