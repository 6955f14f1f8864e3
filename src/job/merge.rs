//! `podium merge`: the shards of a run become one.

use std::path::{Path, PathBuf};

use super::JobError;
use super::folder::SUBMISSIONS;
use super::submit::{lint_after, package_after};
use crate::cli::MergeArgs;
use crate::cli::print;
use crate::report::summary::Summary;
use crate::report::table::color_wanted;
use crate::report::tally::tally;
use crate::submission::find::find_run;
use crate::submission::merge::{MergeOptions, merge};
use crate::submission::prompts::read_prompts;
use crate::submission::write::first_sample;
use crate::submission::{Results, log};

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
    let options = MergeOptions {
        allow_mixed: args.allow_mixed,
        pick: &first_sample,
        tally: &|questions, samples| tally(questions, samples, None),
    };
    let manifest = merge(&runs, &out, &options)?;
    let results = Results::new(log::read(&out)?.rows);
    package_after(&out, &manifest, &read_prompts(&out)?, &results)?;
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
