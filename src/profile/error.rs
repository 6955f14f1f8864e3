//! What keeps a profile from being used.

use std::path::PathBuf;

use super::Profile;

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
    #[error("profile `{path}`, line {line}: `{key}` is no valid template: {reason}")]
    Template {
        path: PathBuf,
        line: usize,
        key: &'static str,
        reason: String,
    },
    #[error("`{template}` of profile `{profile}` fails on record `{key}`: {reason}")]
    Render {
        profile: String,
        template: &'static str,
        key: String,
        reason: String,
    },
    #[error("`{template}` of profile `{profile}` gives no text for record `{key}`")]
    EmptyPrompt {
        profile: String,
        template: &'static str,
        key: String,
    },
    #[error("profile `{profile}`: {reason}")]
    FewShot { profile: String, reason: String },
}

impl ProfileError {
    /// How to mend it.
    pub fn hint(&self) -> String {
        match self {
            Self::Unknown { .. } => format!(
                "name a TOML file, or one of the built-in profiles: {}",
                Profile::builtin_names().collect::<Vec<_>>().join(", ")
            ),
            Self::Read { .. } => "check the path and its permissions".into(),
            Self::Invalid { .. } => {
                "the built-in profiles under `datasets/profiles/` show every key".into()
            }
            Self::Template { key, .. } | Self::EmptyPrompt { template: key, .. } => {
                format!("correct `{key}`; it is a minijinja template")
            }
            Self::FewShot { .. } => {
                "correct `[few_shot]`; its rows need a question and a gold of their own".into()
            }
            Self::Render { .. } => {
                "a template sees `question`, `options` and the row's fields, but never the gold; \
                 write `row.FIELD | default(\"\")` for a field that some rows lack"
                    .into()
            }
        }
    }
}
