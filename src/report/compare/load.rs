//! A finished run as a comparison reads it, and why it cannot.

use std::path::{Path, PathBuf};

use super::RunDifference;
use crate::submission::Results;
use crate::submission::log::{self, LogError};
use crate::submission::manifest::{ManifestError, RunManifest};
use crate::submission::prompts::{PromptRow, PromptsError, read_prompts};
use crate::submission::write::WriteError;

/// A run's files, read whole.
pub struct LoadedRun {
    pub dir: PathBuf,
    /// The folder's name.
    pub name: String,
    pub manifest: RunManifest,
    /// Every row, in input order.
    pub prompts: Vec<PromptRow>,
    pub results: Results,
}

impl LoadedRun {
    /// Reads a run folder; nothing in it is touched, and a run in progress may be read.
    ///
    /// # Errors
    /// A manifest, prompts or log that cannot be read.
    pub fn read(dir: &Path) -> Result<Self, CompareError> {
        // `.` and `x/..` have a name, too.
        let whole = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
        Ok(Self {
            name: whole
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            manifest: RunManifest::read(dir)?,
            prompts: read_prompts(dir)?,
            results: Results::new(log::read(dir)?.rows),
            dir: dir.to_owned(),
        })
    }
}

/// Why runs cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error(transparent)]
    Prompts(#[from] PromptsError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("more than the precision differs from `{base}`: {}", spelled(.differences))]
    Differs {
        base: String,
        /// With the run's name.
        differences: Vec<(String, RunDifference)>,
    },
    #[error("`{path}` is a run's folder, the comparison would be written over it")]
    IntoARun { path: PathBuf },
}

/// `seed is 1 in x, there 0`, with hashes shortened.
fn spelled(differences: &[(String, RunDifference)]) -> String {
    let parts = differences.iter().map(|(name, difference)| {
        format!(
            "`{}` is {} in `{name}`, there {}",
            difference.key,
            short(&difference.other),
            short(&difference.base)
        )
    });
    parts.collect::<Vec<_>>().join("; ")
}

/// A value for reading: a hash by its first digits.
pub fn short(value: &str) -> String {
    let bare = value.trim_matches('"');
    if bare.len() == 64 && bare.chars().all(|c| c.is_ascii_hexdigit()) {
        return bare.chars().take(8).collect();
    }
    value.to_owned()
}

impl CompareError {
    pub fn hint(&self) -> String {
        match self {
            Self::Manifest(error) => error.hint(),
            Self::Prompts(error) => error.hint(),
            Self::Log(error) => error.hint(),
            Self::Write(error) => error.hint(),
            Self::Differs { differences, .. } => {
                let checkpoint = if differences.iter().any(|(_, d)| d.key == "model") {
                    "; another checkpoint may be the point, where it holds the precision"
                } else {
                    ""
                };
                format!(
                    "run one of them again with the other's settings, or give `--force`, which \
                     names the differences in the heading{checkpoint}"
                )
            }
            Self::IntoARun { .. } => "give another `--out`".to_owned(),
        }
    }
}
