//! Profiles: what a competition's rows look like, how they are asked, read and scored, and the
//! columns its submission takes. Built-in profiles are files of the same format.
//!
//! A profile turns a record into a prompt; it never sees the record's gold. Only the answers of
//! few-shot rows are shown (`few_shot`), which are other rows.

mod builtin;
mod draws;
mod error;
mod few_shot;
mod place;
mod shuffle;
mod stage;
mod submission;
mod template;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use builtin::BUILTIN;
pub use error::ProfileError;
pub use few_shot::FewShot;
use few_shot::Shots;
pub use stage::SecondStage;
pub use submission::{Column, Quote, Source, Submission};

use crate::dataset::{Dataset, Message, Pins, Record};
use crate::prompt::{Prompt, Reasoning};
use crate::score::{Scorer, Scoring};
use crate::submission::identity::MAX_SAMPLES;
use template::Template;

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
    /// Of the few-shot choice and the options' order, each with the row's key; `--seed` is the
    /// run's and changes neither.
    #[serde(default)]
    pub seed: u64,
    /// Show each row's options in an order of its own.
    #[serde(default)]
    pub shuffle_options: bool,
    /// Parts of the mapping that need no guess.
    #[serde(default)]
    pub mapping: Pins,
    #[serde(default)]
    pub few_shot: Option<FewShot>,
    pub scoring: Scoring,
    #[serde(default)]
    pub second_stage: Option<SecondStage>,
    #[serde(default)]
    pub defaults: Defaults,
    #[serde(default)]
    pub submission: Submission,
    /// Where its own paths start.
    #[serde(skip)]
    folder: PathBuf,
    #[serde(skip)]
    shots: Arc<Shots>,
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
    /// Samples a row.
    #[serde(default)]
    pub samples: Option<usize>,
    /// Leave out samples that cannot change the vote.
    #[serde(default)]
    pub early_stop: Option<bool>,
}

impl Profile {
    /// The names of the built-in profiles.
    pub fn builtin_names() -> impl Iterator<Item = &'static str> {
        BUILTIN.iter().map(|(name, _)| *name)
    }

    /// A built-in profile.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn builtin(name: &str) -> Result<Self, ProfileError> {
        let (name, text) = BUILTIN
            .iter()
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

    /// The profile with what depends on the data set settled: the options' order, which the
    /// records have from here on, the scorer (see [`Scoring::resolve`]) and the few-shot rows.
    ///
    /// # Errors
    /// Few-shot rows that are not there or cannot be rendered.
    pub fn resolved(mut self, records: &mut [Record]) -> Result<Self, ProfileError> {
        if self.shuffle_options {
            for record in records.iter_mut() {
                shuffle::shuffle(record, self.seed);
            }
        }
        self.scoring = self.scoring.resolve(records);
        self.shots = Arc::new(Shots::collect(&self, records)?);
        Ok(self)
    }

    /// The file's index of the option shown at each place; absent where they are shown as they
    /// stand in the file.
    pub fn option_order(&self, record: &Record) -> Option<Vec<usize>> {
        let n_options = record.options.len();
        (self.shuffle_options && n_options > 0)
            .then(|| shuffle::order(self.seed, &record.key, n_options))
    }

    fn from_toml(path: &Path, text: &str) -> Result<Self, ProfileError> {
        let invalid = |line: usize, reason: &str| ProfileError::Invalid {
            path: path.to_owned(),
            line,
            reason: reason.to_owned(),
        };
        let mut profile: Self = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            invalid(place::line_at(text, at), error.message())
        })?;
        profile.folder = path.parent().unwrap_or(Path::new("")).to_owned();
        profile.check_templates(path, text)?;
        if let Some((key, expected)) = profile.out_of_range() {
            let name = key.rsplit('.').next().unwrap_or(key);
            let reason = format!("`{name}` must be {expected}");
            return Err(invalid(place::line_of(text, key), &reason));
        }
        let few_shot = profile.few_shot.as_ref();
        if let Some((key, reason)) = few_shot.and_then(FewShot::problem) {
            return Err(invalid(place::line_of(text, key), reason));
        }
        if profile.shuffle_options
            && !matches!(profile.scoring.scorer, Scorer::Auto | Scorer::Choice)
        {
            let line = place::line_of(text, "shuffle_options");
            let reason = "`shuffle_options` needs the scorer `choice` or `auto`: only a letter can \
                          be given back in the file's order";
            return Err(invalid(line, reason));
        }
        Ok(profile)
    }

    /// The key of a number that is out of its range, and the range.
    fn out_of_range(&self) -> Option<(&'static str, &'static str)> {
        let Defaults {
            max_new_tokens,
            temperature,
            top_p,
            samples,
            ..
        } = self.defaults;
        let second = self.second_stage.as_ref();
        let second_scoring = second.and_then(|stage| stage.scoring.as_ref());
        let is_tolerance = |scoring: &Scoring| (0.0..=1.0).contains(&scoring.tolerance);
        [
            (
                max_new_tokens != Some(0),
                "defaults.max_new_tokens",
                "at least 1",
            ),
            (
                temperature.is_none_or(|t| (0.0..=100.0).contains(&t)),
                "defaults.temperature",
                "between 0 and 100",
            ),
            (
                top_p.is_none_or(|p| p > 0.0 && p <= 1.0),
                "defaults.top_p",
                "above 0 and at most 1",
            ),
            (
                samples.is_none_or(|n| (1..=MAX_SAMPLES as usize).contains(&n)),
                "defaults.samples",
                "between 1 and 1000000",
            ),
            (
                is_tolerance(&self.scoring),
                "scoring.tolerance",
                "between 0 and 1",
            ),
            (
                second.is_none_or(|stage| stage.max_new_tokens != Some(0)),
                "second_stage.max_new_tokens",
                "at least 1",
            ),
            (
                second_scoring.is_none_or(is_tolerance),
                "second_stage.scoring.tolerance",
                "between 0 and 1",
            ),
        ]
        .into_iter()
        .find_map(|(is_in, key, range)| (!is_in).then_some((key, range)))
    }

    fn check_templates(&self, path: &Path, text: &str) -> Result<(), ProfileError> {
        let few_shot = self.few_shot.as_ref();
        let shot = few_shot.and_then(|it| it.template.as_ref());
        let second = self.second_stage.as_ref();
        for (key, template) in [
            ("template", Some(&self.template)),
            ("second_stage.template", second.map(|it| &it.template)),
            ("few_shot.template", shot),
            ("few_shot.answer", few_shot.map(|it| &it.answer)),
        ] {
            let Some(Err(broken)) = template.map(|it| template::check(it)) else {
                continue;
            };
            return Err(ProfileError::Template {
                path: path.to_owned(),
                line: place::line_in(text, key, broken.line),
                key,
                reason: broken.reason,
            });
        }
        Ok(())
    }

    fn few_shot_problem(&self, reason: String) -> ProfileError {
        ProfileError::FewShot {
            profile: self.name.clone(),
            reason,
        }
    }

    /// The prompt of a record. A messages row passes through, without few-shot rows; its system
    /// and developer turns take the instructions' place.
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
            let template = Template::new("template", &self.template);
            let own = template::render(&self.name, template, record, None)?;
            self.shots.turns(self, record, own)
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
}
