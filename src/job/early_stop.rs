//! Early stop of the vote: samples that can change neither its winner nor a tie are not run.
//!
//! The engine needs to know nothing of it. A row's samples are run in rounds, each as long as the
//! shortest that could decide the vote ([`n_until_decided`]), so no sample past the decision is
//! ever begun, and which ones run depends on the answers alone: not on the batch, the order in
//! which samples end, or a resume in between. A round waits for its slowest row, which costs some
//! occupancy at its end; about log2 k rounds are needed at most, and one where the first half and
//! one more agree.

use super::JobError;
use super::folder::RunFolder;
use super::record::blank_row;
use super::run::Run;
use crate::batch::Job;
use crate::score::Status;
use crate::score::vote::n_until_decided;
use crate::submission::{Results, vote};

impl Run<'_> {
    /// The samples that must run before any more votes can be decided. A row that cannot run
    /// needs all of its own: they are written with its error.
    pub(super) fn needed_next(&self, results: &Results) -> Vec<(usize, u32)> {
        let results = self.judged(results);
        let mut needed = Vec::new();
        for (row, (record, prepared)) in self.prepared.pairs().enumerate() {
            if !self.takes(row) {
                continue;
            }
            let samples = match prepared.error {
                Some(_) => 0..self.n_samples(),
                None => self.next_samples(&results, &record.key),
            };
            let is_missing = |sample: &u32| !results.is_finished(&record.key, *sample);
            needed.extend(samples.filter(is_missing).map(|sample| (row, sample)));
        }
        needed
    }

    /// The samples behind those that are finished without a gap; none when the vote is decided.
    fn next_samples(&self, results: &Results, key: &str) -> std::ops::Range<u32> {
        let scoring = &self.prepared.profile.scoring;
        let ballots: Vec<Option<String>> = (0..self.n_samples())
            .map_while(|sample| results.get(key, sample).filter(|row| row.is_finished()))
            .map(|row| vote::ballot(scoring, row))
            .collect();
        // At most `n_samples`, which is a u32.
        let n_run = ballots.len() as u32;
        n_run..n_run + n_until_decided(&ballots, self.n_samples() as usize) as u32
    }

    /// The next round's jobs. A sample that failed in this session waits for a resume.
    pub(super) fn next_round(&self, results: &Results) -> Vec<Job> {
        let mut jobs = self.jobs(results);
        jobs.retain(|job| {
            let record = self.prepared.dataset.records.get(job.row);
            let tried = record.and_then(|record| results.get(&record.key, job.sample));
            tried.is_none_or(|row| row.status == Status::NotRun)
        });
        jobs
    }

    /// Writes the samples that decided votes leave out as `not_run`, so that none is missing.
    pub(super) fn log_left_out(&self, folder: &mut RunFolder) -> Result<(), JobError> {
        if !self.settings.early_stop.value {
            return Ok(());
        }
        let judged = self.judged(&folder.results);
        for (row, (record, prepared)) in self.prepared.pairs().enumerate() {
            let next = self.next_samples(&judged, &record.key);
            if !self.takes(row) || prepared.error.is_some() || !next.is_empty() {
                continue;
            }
            for sample in next.end..self.n_samples() {
                if folder.results.get(&record.key, sample).is_none() {
                    let left_out = blank_row(record, sample, Status::NotRun);
                    folder.log.append(&left_out)?;
                    folder.results.insert(left_out);
                }
            }
        }
        Ok(())
    }
}
