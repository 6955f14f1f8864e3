//! `podium score`: saved replies judged again, without the model. The log stays as it is; what is
//! made from it is made anew.

use std::path::{Path, PathBuf};

use super::JobError;
use super::eval::read_dataset;
use super::folder::SUBMISSIONS;
use super::nano::NANO;
use super::report::page_after;
use super::run::scoring_hash;
use super::submit::{lint_after, package_after, submission_format, with_meta};
use super::verdict::judge_text_again;
use crate::cli::ScoreArgs;
use crate::cli::eval::unredacted;
use crate::cli::print;
use crate::dataset::Record;
use crate::profile::Profile;
use crate::report::html::current_rows;
use crate::report::lint::LintBrief;
use crate::report::over_samples::over_samples;
use crate::report::rescore::{RESCORE_SCHEMA, Rescore, Verdict};
use crate::report::table::color_wanted;
use crate::report::tally::tally;
use crate::score;
use crate::submission::find::find_run;
use crate::submission::lock::RunLock;
use crate::submission::manifest::{Origin, RunManifest};
use crate::submission::prompts::read_prompts;
use crate::submission::questions::write_questions;
use crate::submission::write::{chosen_sample, write_submission};
use crate::submission::{ResultRow, Results, log, vote};

/// Why a run cannot be scored again.
#[derive(Debug, thiserror::Error)]
pub enum ScoreError {
    #[error("the run's data set `{path}` is not there")]
    NoDataset { path: PathBuf },
    #[error(
        "`{path}` is not the data set of this run: its content hash is {found}, the run's {expected}"
    )]
    OtherDataset {
        path: PathBuf,
        found: String,
        expected: String,
    },
    #[error(
        "profile `{profile}` reads other rows than the run's: row {row} is `{found}`, there `{expected}`"
    )]
    OtherRows {
        profile: String,
        row: usize,
        found: String,
        expected: String,
    },
    #[error(
        "profile `{profile}` shows the options of row `{key}` in another order than the run did"
    )]
    OtherOrder { profile: String, key: String },
}

impl ScoreError {
    /// How to mend it.
    pub fn hint(&self) -> String {
        match self {
            Self::NoDataset { .. } => "say where it is with `--dataset FILE`".to_owned(),
            Self::OtherDataset { .. } => {
                "give the file as it was with `--dataset FILE`, or run it anew with `podium eval`"
                    .to_owned()
            }
            Self::OtherRows { .. } => {
                "give a profile with the same id and question fields".to_owned()
            }
            Self::OtherOrder { .. } => {
                "give a profile with the run's `shuffle_options` and `seed`".to_owned()
            }
        }
    }
}

/// Runs the command.
///
/// # Errors
/// The data set is not there or not the run's, or a file cannot be written.
pub fn score_command(args: &ScoreArgs) -> Result<u8, JobError> {
    let path = find_run(Path::new(SUBMISSIONS), &args.run)?;
    let _lock = RunLock::acquire(&path)?;
    let mut manifest = RunManifest::read(&path)?;
    let mut prompts = read_prompts(&path)?;
    let (records, profile) = read_records(args, &manifest)?;
    let keys = || records.iter().map(|record| record.key.as_str());
    if let Some((row, (found, prompt))) = keys()
        .zip(&prompts)
        .enumerate()
        .find(|(_, (key, prompt))| *key != prompt.key)
    {
        return Err(ScoreError::OtherRows {
            profile: profile.name,
            row: row + 1,
            found: found.to_owned(),
            expected: prompt.key.clone(),
        }
        .into());
    }
    if let Some((record, _)) = records
        .iter()
        .zip(&prompts)
        .find(|(record, prompt)| profile.option_order(record) != prompt.option_order)
    {
        return Err(ScoreError::OtherOrder {
            profile: profile.name,
            key: record.key.clone(),
        }
        .into());
    }

    // A run of an older version has not kept the options; the columns need them.
    for (prompt, record) in prompts.iter_mut().zip(&records) {
        prompt.options.get_or_insert_with(|| record.options.clone());
    }
    let logged = Results::new(log::read(&path)?.rows);
    let before = current_rows(&path, &prompts, &logged);
    let judged: Vec<ResultRow> = records
        .iter()
        .flat_map(|record| logged.samples(&record.key).map(move |row| (record, row)))
        .map(|(record, row)| judge_text_again(record, &profile, row))
        .collect();
    let judged = Results::new(judged);
    let pick = vote::pick(&profile.scoring);
    let questions: Vec<&ResultRow> = keys()
        .filter_map(|key| chosen_sample(&judged, key, &pick))
        .collect();
    let samples: Vec<&ResultRow> = judged.in_order(keys()).collect();
    let mut tally = tally(&questions, &samples, score::baseline::random(&records));
    manifest.scoring = Some(profile.scoring.clone());
    tally.over_samples = over_samples(&manifest, &samples);
    let rescore = Rescore {
        schema: RESCORE_SCHEMA.to_owned(),
        run: manifest.name.clone(),
        profile: profile.name.clone(),
        scoring_hash_before: manifest.scoring_hash.clone(),
        scoring_hash: scoring_hash(&profile),
        accuracy_before: manifest.tally.as_ref().map(|tally| tally.accuracy.clone()),
        accuracy: tally.accuracy.clone(),
        lenient_before: manifest
            .tally
            .as_ref()
            .and_then(|tally| tally.lenient.clone()),
        lenient: tally.lenient.clone(),
        n_samples: samples.len() as u64,
        ..Rescore::default()
    }
    .with_changes(before.iter().filter_map(|old| {
        let new = judged.get(&old.key, old.sample)?;
        Some((old, Verdict::of(old), Verdict::of(new)))
    }));

    manifest.scoring_hash = rescore.scoring_hash.clone();
    manifest.tally = Some(tally);
    let package_before = manifest.submission_format.package.take();
    manifest.submission_format = submission_format(&profile);
    write_submission(&path, &prompts, &judged, &manifest.submission_format, &pick)?;
    if manifest.generation.samples > 1 {
        write_questions(&path, &prompts, &judged, &profile.scoring)?;
    }
    package_after(&path, &manifest, &prompts, &judged)?;
    if let Some(stale) = package_before
        && manifest
            .submission_format
            .package
            .as_ref()
            .is_none_or(|package| package.zip != stale.zip)
    {
        // Made of the submission that is no more: nobody should hand it in.
        std::fs::remove_file(path.join(stale.zip)).ok();
    }
    manifest.write(&path)?;
    page_after(&path, Some(&judged));
    let rescore = Rescore {
        lint: lint_after(&path, &manifest).as_ref().map(LintBrief::of),
        ..rescore
    };
    if args.json {
        print::result(&rescore.to_json());
    } else {
        print::result(&rescore.render(color_wanted()));
    }
    Ok(0)
}

/// The run's data set as the profile reads it.
fn read_records(
    args: &ScoreArgs,
    manifest: &RunManifest,
) -> Result<(Vec<Record>, Profile), JobError> {
    let path = match &args.dataset {
        Some(path) => path.clone(),
        None => unredacted(&manifest.dataset_path),
    };
    if !path.is_file() {
        return Err(ScoreError::NoDataset { path }.into());
    }
    // The profile that made the run, where none is given; one that podium chose by itself is
    // chosen again.
    let own = manifest
        .config
        .get("profile")
        .filter(|setting| setting.origin != Origin::Default)
        .and_then(|setting| setting.value.as_str())
        .map(|word| unredacted(word).to_string_lossy().into_owned());
    let word = args.profile.clone().or(own);
    let is_nano = manifest.model_path == NANO;
    let (dataset, mut profile) = read_dataset(&path, word.as_deref(), is_nano)?;
    if profile.submission.package.is_some() {
        let own: Option<Vec<String>> = manifest
            .config
            .get("meta")
            .and_then(|setting| serde_json::from_value(setting.value.clone()).ok());
        with_meta(&mut profile, &own.unwrap_or_default())?;
    }
    with_meta(&mut profile, &args.meta)?;
    if dataset.content_hash != manifest.generation.dataset {
        return Err(ScoreError::OtherDataset {
            path,
            found: dataset.content_hash,
            expected: manifest.generation.dataset.clone(),
        }
        .into());
    }
    Ok((dataset.records, profile))
}
