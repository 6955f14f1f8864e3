//! Profiles: what a competition's rows look like, how they are asked, read and scored, and the
//! columns its submission takes. Built-in profiles are files of the same format.
//!
//! A profile turns a record into a prompt; it never sees the record's gold.

use std::path::{Path, PathBuf};

use minijinja::{Environment, UndefinedBehavior, Value, context};
use serde::{Deserialize, Serialize};

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
    fn of(source: Source) -> Self {
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

/// Why a profile cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    #[error("there is no profile `{name}`")]
    Unknown { name: String },
    #[error("cannot read profile `{path}`: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("profile `{path}`, line {line}: {reason}")]
    Invalid {
        path: PathBuf,
        line: usize,
        reason: String,
    },
    #[error("the template of profile `{profile}` is not valid: {reason}")]
    Template { profile: String, reason: String },
    #[error("the template of profile `{profile}` fails on record `{key}`: {reason}")]
    Render {
        profile: String,
        key: String,
        reason: String,
    },
    #[error("the template of profile `{profile}` gives no text for record `{key}`")]
    EmptyPrompt { profile: String, key: String },
}

impl ProfileError {
    /// How to mend it.
    pub fn hint(&self) -> String {
        match self {
            Self::Unknown { .. } => format!(
                "name a TOML file, or one of the built-in profiles: {}",
                BUILTIN.map(|(name, _)| name).join(", ")
            ),
            Self::Read { .. } => "check the path and its permissions".into(),
            Self::Invalid { .. } => {
                "the built-in profiles under `datasets/profiles/` show every key".into()
            }
            Self::Template { .. } | Self::EmptyPrompt { .. } => {
                "correct `template`; it is a minijinja template".into()
            }
            Self::Render { .. } => {
                "a template sees `question`, `options` and the row's fields, but never the gold; \
                 write `row.FIELD | default(\"\")` for a field that some rows lack"
                    .into()
            }
        }
    }
}

const BUILTIN: [(&str, &str); 3] = [
    ("qa", include_str!("../datasets/profiles/qa.toml")),
    ("choice", include_str!("../datasets/profiles/choice.toml")),
    ("nano", include_str!("../datasets/profiles/nano.toml")),
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
        environment()
            .template_from_str(&profile.template)
            .map_err(|error| ProfileError::Template {
                profile: profile.name.clone(),
                reason: error.to_string(),
            })?;
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
                content: self.user_turn(record)?,
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

    fn user_turn(&self, record: &Record) -> Result<String, ProfileError> {
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
            .render_str(&self.template, context)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::{Gold, Location};
    use crate::prompt::harmony;

    fn record(options: &[&str]) -> Record {
        Record {
            key: "k".into(),
            id: None,
            location: Location {
                file: "a.jsonl".into(),
                line: 1,
            },
            question: "Which <b> & {{ one }}?".into(),
            messages: Vec::new(),
            options: options.iter().map(|it| (*it).to_owned()).collect(),
            gold: Some(Gold::Text("SENTINEL".into())),
            group: None,
            cluster: None,
            fields: serde_json::Map::new(),
            defect: None,
        }
    }

    fn user_text(profile: &Profile, record: &Record) -> Result<String, ProfileError> {
        let prompt = profile.render(record, Reasoning::Medium, None)?;
        Ok(prompt.turns.into_iter().map(|turn| turn.content).collect())
    }

    #[test]
    fn every_builtin_profile_is_valid() {
        for name in Profile::builtin_names() {
            let profile = Profile::builtin(name).expect(name);
            assert_eq!(profile.name, name);
            assert!(!profile.scoring.rules.is_empty());
        }
        let error = Profile::builtin("qwen").expect_err("there is none");
        assert!(error.hint().contains("qa, choice, nano"));
    }

    #[test]
    fn nano_asks_as_it_was_trained() {
        let profile = Profile::builtin("nano").expect("it is built in");
        let text = |options| user_text(&profile, &record(options)).expect("it renders");
        assert_eq!(text(&[]), "Which <b> & {{ one }}?");
        assert_eq!(text(&["x", "y"]), "Which <b> & {{ one }}?\nA. x\nB. y");
        assert_eq!(
            profile.instructions.as_deref(),
            Some("Think briefly, then give only the answer.")
        );
        assert_eq!(profile.defaults.max_new_tokens, Some(512));
    }

    #[test]
    fn an_unknown_key_is_named_with_file_and_line() {
        let good = include_str!("../datasets/profiles/qa.toml");
        for (text, part) in [
            (good.replace("[scoring]", "[scoring]\nscorre = 1"), "scorre"),
            (format!("temprature = 1\n{good}"), "temprature"),
            (format!("{good}\n[defaults]\nheat = 1"), "heat"),
            (format!("{good}\n[mapping]\nquestoin = \"q\""), "questoin"),
            (good.replace("\"auto\"", "\"magic\""), "magic"),
            (good.replace("\"hash\"", "\"hush\""), "hush"),
            (good.replace("\"status\"", "\"stats\""), "stats"),
            ("name = ".into(), "line 1"),
        ] {
            let error = Profile::from_toml(Path::new("p.toml"), &text).expect_err(part);
            let message = error.to_string();
            assert!(
                message.contains(part) && message.contains("p.toml"),
                "{message}"
            );
        }
        let broken = good.replace("{{ question }}", "{{ question");
        let error = Profile::from_toml(Path::new("p.toml"), &broken);
        assert!(matches!(error, Err(ProfileError::Template { .. })));
    }

    #[test]
    fn a_template_sees_fields_but_an_absent_one_is_an_error() {
        let mut profile = Profile::builtin("qa").expect("it is built in");
        profile.template = "{{ passage }} {{ row['Long Name'] }} {{ question }}".into();
        let mut record = record(&[]);
        record.fields.insert("passage".into(), "P".into());
        record.fields.insert("Long Name".into(), 7.into());
        record.fields.insert("question".into(), "other".into());
        let text = user_text(&profile, &record).expect("it renders");
        assert_eq!(text, "P 7 Which <b> & {{ one }}?");
        profile.template = "{{ answer }}".into();
        let error = user_text(&profile, &record).expect_err("no such field");
        assert!(error.to_string().contains("record `k`"), "{error}");
        profile.template = " ".into();
        let error = user_text(&profile, &record);
        assert!(matches!(error, Err(ProfileError::EmptyPrompt { .. })));
    }

    #[test]
    fn a_messages_row_passes_through_with_its_own_instructions() {
        let profile = Profile::builtin("qa").expect("it is built in");
        let mut record = record(&[]);
        let turn = |role: &str, content: &str| Message {
            role: role.into(),
            content: content.into(),
        };
        record.messages = vec![turn("user", "a"), turn("assistant", "b"), turn("user", "c")];
        let prompt = profile
            .render(&record, Reasoning::Low, None)
            .expect("it renders");
        assert_eq!(prompt.turns, record.messages);
        assert_eq!(prompt.instructions, profile.instructions);
        record.messages.insert(0, turn("system", "own"));
        let prompt = profile
            .render(&record, Reasoning::Low, None)
            .expect("it renders");
        assert_eq!(prompt.turns.len(), 3);
        assert_eq!(prompt.instructions.as_deref(), Some("own"));
    }

    #[test]
    fn columns_have_names_of_their_own() {
        let column = Column::try_from("answer as prediction".to_owned()).expect("it is valid");
        assert_eq!(
            (column.source, column.name.as_str()),
            (Source::Answer, "prediction")
        );
        assert_eq!(String::from(column), "answer as prediction");
        assert_eq!(String::from(Column::of(Source::Id)), "id");
    }

    /// Other golds in the same file give the same prompts, whatever the gold's shape.
    #[test]
    fn gold_never_reaches_a_prompt() {
        let folder = std::env::temp_dir().join(format!("podium-gold-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("the temporary folder is ours");
        let files = [
            (
                r#"{"id": 1, "question": "q", "answer": "GOLD", "solution": "GOLD", "rationale": "GOLD"}"#,
                ["11", "SENTINEL"],
            ),
            (
                r##"{"id": 1, "problem": "q", "solution": "work #### GOLD", "difficulty": 2}"##,
                ["11", "SENTINEL"],
            ),
            (
                r#"{"id": 1, "question": "q", "options": ["w", "x"], "answer": "GOLD"}"#,
                ["A", "B"],
            ),
            (
                r#"{"id": 1, "question": "q", "options": ["w", "x"], "answer": "GOLD"}"#,
                ["w", "x"],
            ),
            (
                r#"{"id": 1, "prompt": [{"role": "user", "content": "q"}], "target": "GOLD"}"#,
                ["11", "SENTINEL"],
            ),
        ];
        for (index, (row, golds)) in files.into_iter().enumerate() {
            let texts = golds.map(|gold| {
                let path = folder.join(format!("{index}-{gold}.jsonl"));
                std::fs::write(&path, row.replace("GOLD", gold)).expect("the folder is ours");
                let dataset = crate::dataset::read(&path).expect(row);
                let record = dataset.records.first().expect("there is a row");
                assert!(
                    record.gold.is_some() && record.defect.is_none(),
                    "{record:?}"
                );
                let mut texts = Vec::new();
                for name in Profile::builtin_names() {
                    let mut profile = Profile::builtin(name).expect("it is built in");
                    for all_fields in [false, true] {
                        if all_fields {
                            profile.template = "{{ question }} {{ row }} {{ options }}".into();
                        }
                        let prompt = profile
                            .render(record, Reasoning::Medium, None)
                            .expect("it renders");
                        texts.push(harmony::to_text(&harmony::render(&prompt)));
                    }
                }
                texts
            });
            assert_eq!(texts[0], texts[1], "{row}");
            assert!(!texts[1].concat().contains("SENTINEL"));
        }
        let _ = std::fs::remove_dir_all(folder);
    }
}
