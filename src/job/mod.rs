//! The job: the order of the stages, what one failed record does to a run, resume. The only
//! part that sees every stage.
//!
//! `eval` runs prompt files: [`prepare`] reads and renders, [`folder`] takes the run's folder,
//! [`run`] drives the engine and [`record`] logs what comes out; [`attempt`] begins the command anew
//! when the device is lost. The other commands stand beside it, a file each.

pub mod attempt;
pub mod bench;
pub mod compare;
pub mod datasets;
pub mod device;
pub mod divergence;
mod early_stop;
pub mod eval;
pub mod fault;
pub mod folder;
pub mod inspect;
pub mod lint;
pub mod logits;
pub mod merge;
pub mod model;
pub mod nano;
pub mod plan;
pub mod prepare;
pub mod progress;
pub mod quantize;
pub mod record;
pub mod report;
pub mod run;
pub mod score;
pub mod selfcheck;
pub mod settings;
pub mod signal;
pub mod submit;
pub mod synth;
pub mod synthetic;
mod variants;
pub mod verdict;

use std::path::PathBuf;

use crate::dataset::DatasetError;
use crate::engine::checkpoint::{CheckpointError, Precision};
use crate::engine::config::ConfigError;
use crate::engine::generate::{ForcedError, GenerateError};
use crate::engine::plan::{CARDS, MemoryPlan, PlanError, bytes_text};
use crate::engine::shapes;
use crate::engine::{BackendMemory, EngineError};
use crate::profile::ProfileError;
use crate::report::compare::load::CompareError;
use crate::report::html::PageError;
use crate::submission::find::FindError as FindRunError;
use crate::submission::lint::LintError;
use crate::submission::lock::LockError;
use crate::submission::log::LogError;
use crate::submission::manifest::ManifestError;
use crate::submission::merge::MergeError;
use crate::submission::prompts::PromptsError;
use crate::submission::write::WriteError;
use crate::tokenizer::TokenizerError;

/// Why a job could not be done.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error(transparent)]
    Datasets(#[from] datasets::FindError),
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    #[error(transparent)]
    Profile(#[from] ProfileError),
    #[error(transparent)]
    Model(#[from] model::ModelError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Generate(#[from] GenerateError),
    #[error(transparent)]
    Forced(#[from] ForcedError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Prompts(#[from] PromptsError),
    #[error(transparent)]
    Merge(#[from] MergeError),
    #[error(transparent)]
    Compare(#[from] CompareError),
    #[error(transparent)]
    FindRun(#[from] FindRunError),
    #[error(transparent)]
    Page(#[from] PageError),
    #[error(transparent)]
    Score(#[from] score::ScoreError),
    #[error(transparent)]
    Lint(#[from] LintError),
    #[error("{message}")]
    Option { message: String },
    #[error("unknown precision `{word}`")]
    Precision { word: String },
    #[error("precision `{precision}` has no file layout")]
    NoFileLayout { precision: &'static str },
    #[error("`{path}` is not empty")]
    NotEmpty { path: PathBuf },
    #[error("the backend holds {allocated:?}, planned were {planned:?}")]
    Allocated {
        planned: BackendMemory,
        allocated: BackendMemory,
    },
    #[error("{error}\n\n{}", plan.to_string().trim_end())]
    DoesNotFit {
        error: PlanError,
        /// The least that would be needed.
        plan: Box<MemoryPlan>,
    },
    #[error(
        "workload `{workload}` needs {}, {} are available",
        bytes_text(*.needed),
        bytes_text(*.available)
    )]
    NoRoom {
        workload: String,
        needed: u64,
        available: u64,
    },
    #[error("unknown shape `{word}`")]
    Shape { word: String },
    #[error("unknown card `{word}`")]
    Card { word: String },
    #[error("`--out` names one folder, but {n_runs} runs were asked for")]
    OneFolder { n_runs: usize },
    #[error("`{path}` lies in no run's folder, so what it should hold is not known")]
    NoFormat { path: PathBuf },
    #[error("`{path}` holds files that are not a run's")]
    NotARun { path: PathBuf },
    #[error("record `{key}`: {message}\n  in {file}, line {line}{}", in_field(.field))]
    BadRow {
        key: String,
        message: String,
        file: String,
        line: usize,
        field: Option<String>,
        hint: String,
    },
    #[error("the {what} of `{run}` is not what it was when the run was made")]
    Changed { what: &'static str, run: PathBuf },
    #[error("cannot rename `{path}`: {source}")]
    Rename {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot read `{path}`: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("`{path}`, line {line}: {reason}")]
    Input {
        path: PathBuf,
        line: usize,
        reason: String,
    },
}

fn in_field(field: &Option<String>) -> String {
    field
        .as_ref()
        .map_or(String::new(), |field| format!(", field `{field}`"))
}

impl From<CheckpointError> for JobError {
    fn from(error: CheckpointError) -> Self {
        EngineError::from(error).into()
    }
}

impl From<ConfigError> for JobError {
    fn from(error: ConfigError) -> Self {
        EngineError::from(error).into()
    }
}

impl JobError {
    /// Whether everything on the device is gone: a new process may have it again.
    pub fn is_lost_device(&self) -> bool {
        match self {
            Self::Engine(error) | Self::Generate(GenerateError::Engine(error)) => {
                error.is_lost_device()
            }
            _ => false,
        }
    }

    /// How to mend it.
    pub fn hint(&self) -> String {
        match self {
            Self::Datasets(error) => error.hint(),
            Self::Dataset(error) => error.hint().to_string(),
            Self::Profile(error) => error.hint(),
            Self::Model(error) => error.hint(),
            Self::Tokenizer(error) => error.hint().to_owned(),
            Self::Engine(error) | Self::Generate(GenerateError::Engine(error)) => error.hint(),
            Self::Generate(GenerateError::ArenaTooSmall { .. }) => {
                "raise `--host-memory`, or lower `--context`".to_owned()
            }
            Self::Forced(_) => "raise `--host-memory`, or lower `--context`".to_owned(),
            Self::Lock(error) => error.hint(),
            Self::Log(error) => error.hint(),
            Self::Manifest(error) => error.hint(),
            Self::Write(error) => error.hint(),
            Self::Prompts(error) => error.hint(),
            Self::Merge(error) => error.hint(),
            Self::Compare(error) => error.hint(),
            Self::FindRun(error) => error.hint(),
            Self::Page(error) => error.hint(),
            Self::Score(error) => error.hint(),
            Self::Lint(error) => error.hint(),
            Self::Option { .. } => "`podium help COMMAND` has every option of a command".to_owned(),
            Self::Precision { .. } => {
                let names = Precision::POLICIES.map(Precision::name).join(", ");
                format!("expected one of {names}, or several with commas between")
            }
            Self::NoFileLayout { .. } => {
                "choose 4bit or 16bit; `eval --precision` makes the others while loading".to_owned()
            }
            Self::NotEmpty { .. } => "give a folder that does not exist yet".to_owned(),
            Self::Allocated { .. } => "this is a mistake in podium; please report it".to_owned(),
            Self::DoesNotFit { error, .. } => error.hint(),
            Self::NoRoom { .. } => {
                "choose fewer layers (`--model synthetic:SHAPE:layers=N`), or fewer and shorter rows \
                 (`--workload ROWSxPROMPT/OUTPUT`)"
                    .to_owned()
            }
            Self::Shape { .. } => format!(
                "expected one of {}, or for `synth` a config.json of the shape",
                shapes::NAMES.join(", ")
            ),
            Self::Card { .. } => {
                let names = CARDS.map(|card| card.name).join(", ");
                format!("expected one of {names}, or the bytes that the card leaves, such as 22GiB")
            }
            Self::OneFolder { .. } => {
                "leave `--out` out, or run one data set in one precision".to_owned()
            }
            Self::NoFormat { .. } => {
                "name the competition with `--profile NAME|FILE`, and its rows with `--dataset FILE`"
                    .to_owned()
            }
            Self::NotARun { .. } => {
                "give another `--out`, or `--fresh` to rename the folder aside".to_owned()
            }
            Self::BadRow { hint, .. } => format!("{hint}; without `--strict` the run goes on"),
            Self::Changed { .. } => {
                "put the files back that its run.json names, or leave `--divergence` out".to_owned()
            }
            Self::Rename { .. } | Self::Read { .. } => {
                "check the path and its permissions".to_owned()
            }
            Self::Input { .. } => {
                "each line is {\"prompt\": NAME, \"tokens\": [...], \"n_greedy\": N}".to_owned()
            }
        }
    }
}

/// `--precision`: one word, or several with commas.
///
/// # Errors
/// A word that is no precision.
pub fn precisions(text: &str) -> Result<Vec<Precision>, JobError> {
    text.split(',')
        .map(|word| {
            Precision::ALL
                .into_iter()
                .find(|precision| precision.name() == word.trim())
                .ok_or_else(|| JobError::Precision {
                    word: word.trim().to_owned(),
                })
        })
        .collect()
}

/// One precision.
///
/// # Errors
/// No precision, or several.
pub fn precision(text: Option<&str>) -> Result<Precision, JobError> {
    let text = text.unwrap_or(Precision::Stored.name());
    match precisions(text)?.as_slice() {
        [one] => Ok(*one),
        _ => Err(JobError::Precision {
            word: text.to_owned(),
        }),
    }
}
