//! The files beside a run's log: submission, questions and tally, made anew of the log's rows.

use std::path::Path;

use super::Run;
use crate::job::JobError;
use crate::job::submit::package_after;
use crate::job::verdict::judge_again;
use crate::report::over_samples::over_samples;
use crate::report::tally::tally;
use crate::score;
use crate::submission::manifest::{RunManifest, Tally};
use crate::submission::questions::write_questions;
use crate::submission::write::{chosen_sample, write_submission};
use crate::submission::{ResultRow, Results, vote};

impl Run<'_> {
    /// Rebuilds submission and scores from the log's rows, and counts them.
    pub fn write_files(
        &self,
        path: &Path,
        results: &Results,
        manifest: &mut RunManifest,
    ) -> Result<(), JobError> {
        let results = self.judged(results);
        let keys = || {
            self.prepared
                .dataset
                .records
                .iter()
                .map(|record| record.key.as_str())
        };
        let scoring = &self.prepared.profile.scoring;
        let pick = vote::pick(scoring);
        let questions: Vec<&ResultRow> = keys()
            .filter_map(|key| chosen_sample(&results, key, &pick))
            .collect();
        let samples: Vec<&ResultRow> = results.in_order(keys()).collect();
        let random = score::baseline::random(&self.prepared.dataset.records);
        manifest.tally = Some(Tally {
            over_samples: over_samples(manifest, &samples),
            ..tally(&questions, &samples, random)
        });
        write_submission(
            path,
            &self.prepared.prompts,
            &results,
            &manifest.submission_format,
            &pick,
        )?;
        if self.n_samples() > 1 {
            write_questions(path, &self.prepared.prompts, &results, scoring)?;
        }
        package_after(path, manifest, &self.prepared.prompts, &results)
    }

    /// The rows with their verdicts by this run's scoring: replies are read again, never made
    /// again, so that a changed profile or data set gold takes effect on finished rows too.
    pub(in crate::job) fn judged(&self, results: &Results) -> Results {
        let mut judged = Vec::with_capacity(results.len());
        for record in &self.prepared.dataset.records {
            for row in results.samples(&record.key) {
                let mut row = row.clone();
                let (profile, tokenizer) = (&self.prepared.profile, &self.model.tokenizer);
                judge_again(&mut row, record, profile, tokenizer);
                judged.push(row);
            }
        }
        Results::new(judged)
    }
}
