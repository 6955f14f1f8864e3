//! `podium report`: the page of a finished, stopped or running run.

use std::path::{Path, PathBuf};

use super::JobError;
use super::folder::SUBMISSIONS;
use crate::cli::ReportArgs;
use crate::cli::print;
use crate::report::html::{PageError, write_run_page};
use crate::submission::Results;
use crate::submission::find::find_run;

/// Runs the command.
///
/// # Errors
/// The run cannot be found or read, or its folder not written to.
pub fn report_command(args: &ReportArgs) -> Result<u8, JobError> {
    let run = find_run(Path::new(SUBMISSIONS), &args.run)?;
    let path = write_run_page(&run, None)?;
    print::result(&path.to_string_lossy());
    Ok(0)
}

/// The page at the end of another command. The command's own work is done by then, so a page that
/// cannot be made is a warning. Gives its path.
pub fn page_after(run_dir: &Path, judged: Option<&Results>) -> Option<PathBuf> {
    match write_run_page(run_dir, judged) {
        Ok(path) => Some(path),
        Err(error) => {
            print::tell(&warning(&error));
            None
        }
    }
}

fn warning(error: &PageError) -> String {
    format!(
        "warning: no page was written: {error}\nhint: {}",
        error.hint()
    )
}
