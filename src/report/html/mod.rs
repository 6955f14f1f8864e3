//! The pages a person looks at: `report.html` of a run and `comparison.html` of several.
//!
//! A page is one file that needs no network: style, scripts and the charts' library are embedded,
//! and a content security policy allows these alone, by their hashes. The figures go in as JSON
//! ([`page`]) and reach the page as text only, so that nothing a model wrote can become markup.
//! Reads finished files; the job says when.

mod comparison;
pub mod page;
mod rows;
mod run;
mod series;
mod verdicts;

use std::path::PathBuf;

use crate::submission::log::LogError;
use crate::submission::manifest::ManifestError;
use crate::submission::prompts::PromptsError;
use crate::submission::write::WriteError;

pub use comparison::{COMPARISON_PAGE_FILE, comparison_page, write_comparison_page};
pub use run::{REPORT_FILE, current_rows, write_run_page};

/// Why a page cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Prompts(#[from] PromptsError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("cannot read `{path}`: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
}

impl PageError {
    /// How to mend it.
    pub fn hint(&self) -> String {
        match self {
            Self::Manifest(error) => error.hint(),
            Self::Log(error) => error.hint(),
            Self::Prompts(error) => error.hint(),
            Self::Write(error) => error.hint(),
            Self::Read { .. } => "check the path and its permissions".to_owned(),
        }
    }
}
