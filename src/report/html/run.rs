//! `report.html`: everything a run's folder holds, as one page.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::page::{Kind, document};
use super::{PageError, rows, series, verdicts};
use crate::report::summary::Summary;
use crate::score::Status;
use crate::submission::manifest::RunManifest;
use crate::submission::prompts::{PromptRow, read_prompts};
use crate::submission::write::replace;
use crate::submission::{RESULT_SCHEMA, ResultRow, Results, log};

pub const REPORT_FILE: &str = "report.html";

/// Makes a run's page anew from its files. `judged` are the rows by the newest verdicts, where the
/// caller has them; else they are the log's with the verdicts of `scores.csv`.
///
/// # Errors
/// The folder holds no run, or cannot be written to.
pub fn write_run_page(run_dir: &Path, judged: Option<&Results>) -> Result<PathBuf, PageError> {
    let manifest = RunManifest::read(run_dir)?;
    let prompts = read_prompts(run_dir)?;
    let (samples, is_newest) = match judged {
        Some(results) => (samples(&prompts, results), true),
        None => {
            let results = Results::new(log::read(run_dir)?.rows);
            newest(run_dir, &prompts, &results)
        }
    };
    // Where the folder lies is nobody's business who reads the page.
    let summary = Summary::new(&manifest, Path::new(&manifest.name), Vec::new(), Vec::new());
    let data = json!({
        "manifest": manifest,
        "summary": summary,
        "memory": series::memory(run_dir),
        "speed": series::speed(run_dir),
        "verdicts_are_the_logs": !is_newest,
    });
    let table = rows::table(&prompts, &samples);
    let blocks = [
        ("data", data.to_string()),
        (
            "rows",
            serde_json::to_string(&table).expect("columns have only text keys"),
        ),
    ];
    let html = document(Kind::Run, &manifest.name, &blocks);
    let path = run_dir.join(REPORT_FILE);
    replace(&path, |out| out.write_all(html.as_bytes()))?;
    Ok(path)
}

/// A run's samples in the order of `scores.csv`, by the verdicts in force: that file's, else the
/// log's.
pub fn current_rows(run_dir: &Path, prompts: &[PromptRow], logged: &Results) -> Vec<ResultRow> {
    let (rows, _) = newest(run_dir, prompts, logged);
    rows.into_iter().map(|(_, row)| row).collect()
}

fn newest(
    run_dir: &Path,
    prompts: &[PromptRow],
    logged: &Results,
) -> (Vec<(usize, ResultRow)>, bool) {
    let (places, mut rows): (Vec<usize>, Vec<ResultRow>) =
        samples(prompts, logged).into_iter().unzip();
    let is_newest = verdicts::apply(run_dir, &mut rows);
    (places.into_iter().zip(rows).collect(), is_newest)
}

/// Every sample with its prompt's place, in the order of `scores.csv`. A prompt without a result
/// has a sample that says so.
fn samples(prompts: &[PromptRow], results: &Results) -> Vec<(usize, ResultRow)> {
    let mut found = Vec::with_capacity(results.len());
    for (place, prompt) in prompts.iter().enumerate() {
        let before = found.len();
        found.extend(results.samples(&prompt.key).map(|row| (place, row.clone())));
        if found.len() == before {
            found.push((place, not_run(prompt)));
        }
    }
    found
}

fn not_run(prompt: &PromptRow) -> ResultRow {
    ResultRow {
        schema: RESULT_SCHEMA.to_owned(),
        key: prompt.key.clone(),
        id: prompt.id.clone(),
        sample: 0,
        status: Status::NotRun,
        correct: None,
        gold: None,
        answer: None,
        lenient: None,
        raw_text: String::new(),
        final_text: None,
        output_ids: Vec::new(),
        logprob_sum: None,
        logprob_sum_bits: None,
        prompt_tokens: prompt.n_tokens.unwrap_or(0) as u32,
        reused_tokens: 0,
        analysis_tokens: 0,
        final_tokens: 0,
        stop_reason: None,
        group: prompt.group.clone(),
        cluster: None,
        seconds: None,
        format_issues: Vec::new(),
        error: None,
        trace_hash: None,
        numerics_id: None,
        forced: None,
        second: None,
    }
}
