//! `podium compare`: runs of the same questions side by side.

use std::path::{Path, PathBuf};

use super::JobError;
use super::divergence::measure;
use super::folder::SUBMISSIONS;
use crate::cli::CompareArgs;
use crate::cli::print;
use crate::report::compare::load::{CompareError, LoadedRun};
use crate::report::compare::{check, compare, write};
use crate::report::html::{COMPARISON_PAGE_FILE, write_comparison_page};
use crate::report::table::color_wanted;
use crate::submission::find::find_run;

/// Runs the command.
///
/// # Errors
/// Runs that cannot be read, or that differ in more than the precision without `--force`.
pub fn compare_command(args: &CompareArgs) -> Result<u8, JobError> {
    let root = Path::new(SUBMISSIONS);
    let folders = args
        .runs
        .iter()
        .map(|name| find_run(root, name))
        .collect::<Result<Vec<PathBuf>, _>>()?;
    let runs = folders
        .iter()
        .map(|folder| LoadedRun::read(folder))
        .collect::<Result<Vec<LoadedRun>, CompareError>>()?;
    if !args.force {
        check::check(&runs)?;
    }
    let mut comparison = compare(&runs, args.seed);
    if args.divergence
        && let Some((base, others)) = folders.split_first()
    {
        for (pair, other) in comparison.pairs.iter_mut().zip(others) {
            pair.divergence = Some(measure(base, other)?);
        }
    }
    let out = match &args.out {
        Some(out) => out.clone(),
        None => root.join(write::folder_name(&runs)),
    };
    let mut files = write::write(&comparison, &out)?;
    write_comparison_page(&out, &comparison)?;
    files.push(COMPARISON_PAGE_FILE.to_owned());
    if args.json {
        let json = serde_json::to_string(&comparison).expect("a comparison has only text keys");
        print::result(&json);
    } else {
        let written = format!("written to {}\n{}\n", out.display(), files.join(" "));
        print::result(&comparison.render(color_wanted(), Some(&written)));
    }
    Ok(0)
}
