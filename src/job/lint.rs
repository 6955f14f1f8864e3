//! `podium lint`: a written submission read back as the competition would.

use std::path::{Path, PathBuf};

use super::JobError;
use super::eval::read_dataset;
use super::folder::SUBMISSIONS;
use super::submit::submission_format;
use crate::cli::LintArgs;
use crate::cli::print;
use crate::profile::Profile;
use crate::report::lint::{render, to_json};
use crate::submission::find::find_run;
use crate::submission::lint::{ExpectedRow, Lint, LintError, expected_rows, lint_file, lint_run};
use crate::submission::manifest::{RUN_FILE, RunManifest};
use crate::submission::prompts::read_prompts;

/// Runs the command: exit code 1 where something is wrong.
///
/// # Errors
/// A submission, profile or data set that cannot be read.
pub fn lint_command(args: &LintArgs) -> Result<u8, JobError> {
    let path = Path::new(&args.submission);
    let ending = path.extension().and_then(|ending| ending.to_str());
    let lint = if path.is_file() || matches!(ending, Some("csv" | "jsonl" | "zip")) {
        lint_one(path, args)?
    } else {
        let run = find_run(Path::new(SUBMISSIONS), &args.submission)?;
        let format = match &args.profile {
            Some(word) => submission_format(&Profile::find(word)?),
            None => RunManifest::read(&run)?.submission_format,
        };
        lint_run(&run, &format)?
    };
    if args.json {
        print::result(&to_json(&lint));
    } else {
        print::result(&render(&lint));
    }
    Ok(u8::from(!lint.is_clean()))
}

/// A single file. One that lies in a run's folder is held against that run, unless flags say
/// otherwise.
fn lint_one(path: &Path, args: &LintArgs) -> Result<Lint, JobError> {
    std::fs::metadata(path).map_err(|source| LintError::Read {
        path: path.to_owned(),
        source,
    })?;
    let run = path
        .parent()
        .map(|folder| match folder.as_os_str().is_empty() {
            true => PathBuf::from("."),
            false => folder.to_owned(),
        })
        .filter(|folder| folder.join(RUN_FILE).is_file());
    let format = match (&args.profile, &run) {
        (Some(word), _) => submission_format(&Profile::find(word)?),
        (None, Some(run)) => RunManifest::read(run)?.submission_format,
        (None, None) => {
            return Err(JobError::NoFormat {
                path: path.to_owned(),
            });
        }
    };
    let expected: Option<Vec<ExpectedRow>> = match (&args.dataset, &run) {
        (Some(dataset), _) => {
            let (dataset, _) = read_dataset(dataset, args.profile.as_deref(), false)?;
            let records = dataset.records.into_iter();
            let rows = records.map(|record| (record.id, record.key, Some(record.options)));
            Some(expected_rows(rows))
        }
        (None, Some(run)) => {
            let prompts = read_prompts(run)?.into_iter();
            let rows = prompts.map(|prompt| (prompt.id, prompt.key, prompt.options));
            Some(expected_rows(rows))
        }
        (None, None) => None,
    };
    Ok(lint_file(path, &format, expected.as_deref())?)
}
