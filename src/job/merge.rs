//! `podium merge`: the shards of a run become one.

use std::path::{Path, PathBuf};

use super::JobError;
use super::folder::SUBMISSIONS;
use super::submit::{lint_after, package_after};
use crate::cli::MergeArgs;
use crate::cli::print;
use crate::report::over_samples::over_samples;
use crate::report::summary::Summary;
use crate::report::table::color_wanted;
use crate::report::tally::tally;
use crate::submission::find::find_run;
use crate::submission::manifest::{RunManifest, Tally};
use crate::submission::merge::{MergeOptions, merge};
use crate::submission::prompts::read_prompts;
use crate::submission::questions::write_questions;
use crate::submission::write::{PickSample, first_sample};
use crate::submission::{Results, log, vote};

/// Runs the command.
///
/// # Errors
/// Runs that are not the shards of one run, or not all of them.
pub fn merge_command(args: &MergeArgs) -> Result<u8, JobError> {
    let root = Path::new(SUBMISSIONS);
    let runs = args
        .runs
        .iter()
        .map(|name| find_run(root, name))
        .collect::<Result<Vec<PathBuf>, _>>()?;
    let out = match &args.out {
        Some(out) => out.clone(),
        None => {
            let first = runs
                .first()
                .and_then(|run| run.file_name())
                .unwrap_or_default();
            root.join(format!("{}-merged", first.to_string_lossy()))
        }
    };
    // All of one scoring, or the merge is refused.
    let first = runs.first().map(|run| RunManifest::read(run)).transpose()?;
    let scoring = first.as_ref().and_then(|run| run.scoring.as_ref());
    let by_vote = scoring.map(vote::pick);
    let pick: &PickSample = match &by_vote {
        Some(pick) => pick,
        None => &first_sample,
    };
    let options = MergeOptions {
        allow_mixed: args.allow_mixed,
        pick,
        tally: &|questions, samples| Tally {
            over_samples: first.as_ref().and_then(|run| over_samples(run, samples)),
            ..tally(questions, samples, None)
        },
    };
    let manifest = merge(&runs, &out, &options)?;
    let results = Results::new(log::read(&out)?.rows);
    let prompts = read_prompts(&out)?;
    if let Some(scoring) = scoring.filter(|_| manifest.generation.samples > 1) {
        write_questions(&out, &prompts, &results, scoring)?;
    }
    package_after(&out, &manifest, &prompts, &results)?;
    let files = [
        "submission.csv",
        "submission.jsonl",
        "scores.csv",
        "results.jsonl",
        "run.json",
    ];
    let notes = vec![format!("{} runs were joined", runs.len())];
    let package = manifest.submission_format.package.as_ref();
    let files = package
        .map(|package| package.zip.clone())
        .into_iter()
        .chain(files.map(str::to_owned));
    let summary = Summary::new(&manifest, &out, files.collect(), notes)
        .with_lint(lint_after(&out, &manifest).as_ref());
    if args.json {
        print::result(&summary.to_json());
    } else {
        print::result(&summary.render(color_wanted()));
    }
    let statuses = manifest
        .tally
        .map(|tally| tally.statuses)
        .unwrap_or_default();
    Ok(u8::from(statuses.get("error").is_some_and(|&n| n > 0)))
}
