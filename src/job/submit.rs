//! What is handed in: the profile's columns as the writer takes them, the package, and the look at
//! both as the competition would have it.

use std::path::Path;

use super::JobError;
use crate::cli::print;
use crate::profile::{Profile, Quote, Source};
use crate::submission::Results;
use crate::submission::lint::{Lint, lint_run};
use crate::submission::manifest::RunManifest;
use crate::submission::package::{Facts, write_package};
use crate::submission::prompts::PromptRow;
use crate::submission::write::{Column, ColumnValue, SubmissionFormat};

/// The profile's columns as the writer takes them.
pub fn submission_format(profile: &Profile) -> SubmissionFormat {
    let columns = profile.submission.columns.iter().map(|column| Column {
        name: column.name.clone(),
        value: match &column.source {
            Source::Id => ColumnValue::Id,
            Source::Answer => ColumnValue::Answer,
            Source::Choice => ColumnValue::Choice,
            Source::Prediction => ColumnValue::Prediction,
            Source::Reasoning => ColumnValue::Reasoning,
            Source::FinalText => ColumnValue::FinalText,
            Source::RawText => ColumnValue::RawText,
            Source::Score => ColumnValue::Score,
            Source::Status => ColumnValue::Status,
            Source::Group => ColumnValue::Group,
            Source::Constant(text) => ColumnValue::Constant(text.clone()),
        },
        missing: column.missing.clone(),
        never_null: column.never_null,
    });
    SubmissionFormat {
        columns: columns.collect(),
        missing: String::new(),
        quote_all: profile.submission.quote == Quote::All,
        package: profile.submission.package.clone(),
    }
}

/// Lays `--meta KEY=VALUE` over the fields of the profile's package.
///
/// # Errors
/// The profile has no package, or a word has no `=`.
pub fn with_meta(profile: &mut Profile, meta: &[String]) -> Result<(), JobError> {
    for word in meta {
        let Some((key, value)) = word.split_once('=').filter(|(key, _)| !key.is_empty()) else {
            return Err(JobError::Option {
                message: format!("`--meta {word}` is not KEY=VALUE"),
            });
        };
        let Some(package) = &mut profile.submission.package else {
            return Err(JobError::Option {
                message: format!(
                    "`--meta {word}`: profile `{}` has no package to put it in",
                    profile.name
                ),
            });
        };
        package.given.insert(key.to_owned(), value.to_owned());
    }
    Ok(())
}

/// Writes the package beside the submission that was just written, where the format has one.
///
/// # Errors
/// It cannot be written.
pub fn package_after(
    run_dir: &Path,
    manifest: &RunManifest,
    prompts: &[PromptRow],
    results: &Results,
) -> Result<(), JobError> {
    if let Some(package) = &manifest.submission_format.package {
        write_package(run_dir, package, &facts(manifest, prompts, results))?;
    }
    Ok(())
}

fn facts(manifest: &RunManifest, prompts: &[PromptRow], results: &Results) -> Facts {
    let written = |prompt: &PromptRow| {
        let samples = results.samples(&prompt.key);
        samples.map(|row| row.n_output_tokens()).sum::<usize>()
    };
    let tokens: Vec<usize> = prompts.iter().map(written).filter(|&n| n > 0).collect();
    let n_tokens: usize = tokens.iter().sum();
    let average_tokens = match tokens.len() {
        0 => String::new(),
        n => format!("{:.1}", n_tokens as f64 / n as f64),
    };
    let setting = |key: &str| {
        let setting = manifest.config.get(key)?;
        setting.value.as_str().map(str::to_owned)
    };
    Facts {
        model: model_name(&manifest.model_path).to_owned(),
        precision: manifest.generation.precision.clone(),
        dataset: dataset_name(&manifest.dataset_path).to_owned(),
        profile: manifest.profile.clone(),
        reasoning: setting("reasoning").unwrap_or_default(),
        n_rows: prompts.len(),
        average_tokens,
    }
}

/// A folder's last part; a hub id or a built-in name as it is.
fn model_name(path: &str) -> &str {
    if path.starts_with(['/', '.', '~']) {
        file_name(path)
    } else {
        path
    }
}

fn dataset_name(path: &str) -> &str {
    let mut name = file_name(path);
    for extension in [".gz", ".jsonl", ".json", ".csv", ".parquet"] {
        name = name
            .strip_suffix(extension)
            .filter(|short| !short.is_empty())
            .unwrap_or(name);
    }
    name
}

fn file_name(path: &str) -> &str {
    let path = path.trim_end_matches('/');
    path.rsplit('/').next().unwrap_or(path)
}

/// Reads the run's submission back at the end of another command. That command's own work is done
/// by then, so files that cannot be read are a warning.
pub fn lint_after(run_dir: &Path, manifest: &RunManifest) -> Option<Lint> {
    match lint_run(run_dir, &manifest.submission_format) {
        Ok(lint) => Some(lint),
        Err(error) => {
            print::tell(&format!(
                "warning: the submission was not read back: {error}\nhint: {}",
                error.hint()
            ));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_and_data_sets_go_by_their_names() {
        for (path, name) in [
            ("~/models/gpt-oss-20b/", "gpt-oss-20b"),
            ("./a", "a"),
            ("openai/gpt-oss-20b", "openai/gpt-oss-20b"),
            ("synthetic:gpt-oss-20b:7", "synthetic:gpt-oss-20b:7"),
        ] {
            assert_eq!(model_name(path), name);
        }
        assert_eq!(dataset_name("~/d/v1.2.jsonl.gz"), "v1.2");
        assert_eq!(dataset_name("rows"), "rows");
    }

    #[test]
    fn a_field_needs_a_package() {
        let mut profile = Profile::builtin("curebench").expect("it is built in");
        with_meta(&mut profile, &["track=a=b".to_owned()]).expect("it has a package");
        let package = profile
            .submission
            .package
            .as_ref()
            .expect("it has a package");
        assert_eq!(package.given["track"], "a=b");
        assert!(with_meta(&mut profile, &["track".to_owned()]).is_err());
        let mut profile = Profile::builtin("qa").expect("it is built in");
        assert!(with_meta(&mut profile, &["a=b".to_owned()]).is_err());
        assert!(with_meta(&mut profile, &[]).is_ok());
    }
}
