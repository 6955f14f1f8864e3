//! What keeps a profile from being used.

use std::path::PathBuf;

use super::BUILTIN;

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
