//! Rows of several stages: where a job ends, the next one of its row and sample begins.
//!
//! The next stage's prompt begins with the whole prompt of the one before, which the batch
//! planned as a prefix ([`Job::may_go_on`]) and the prefix store holds until the next stage is
//! admitted. What it held there shows in no bit: a prefix that was dropped is computed again.

use super::admissible::{n_pages_of, nothing, refusal};
use super::{Generation, JobError, Run};
use crate::batch::{Job, PlannedJob};
use crate::engine::PAGE_POSITIONS;

impl Run<'_> {
    /// Reports a job that is done, or queues the stage that follows it.
    pub(super) fn end_stage(&mut self, job: usize, generation: Generation) {
        let may_go_on = self.batch.jobs[job].job.may_go_on;
        let next = may_go_on
            .then(|| self.observer.next_stage(&generation))
            .flatten();
        let is_queued = match next {
            Some(next) => self.go_on(job, next),
            None => {
                self.observer.finished(generation);
                false
            }
        };
        if may_go_on && !is_queued {
            self.expect_no_more(job);
        }
    }

    /// Reports a job that failed; no stage follows it.
    pub(super) fn fail(&mut self, job: usize, error: JobError) {
        let Job {
            row,
            sample,
            may_go_on,
            ..
        } = self.batch.jobs[job].job;
        self.observer.failed(row, sample, error);
        if may_go_on {
            self.expect_no_more(job);
        }
    }

    /// Puts the next stage at the head of the queue, before rows that would need a prefix of
    /// their own held; `false` where it cannot run, which is reported.
    fn go_on(&mut self, from: usize, mut job: Job) -> bool {
        if let Some(error) = refusal(&job, &self.shape) {
            self.observer.failed(job.row, job.sample, error);
            return false;
        }
        let room = self.shape.max_context - job.prompt.len();
        job.max_new_tokens = job.max_new_tokens.min(room);
        if job.max_new_tokens == 0 {
            self.observer.finished(nothing(&job));
            return false;
        }
        if n_pages_of(&job) > self.shape.n_pages {
            let error = JobError::TooLong {
                needed: job.prompt.len() + job.max_new_tokens,
                holds: self.shape.n_pages * PAGE_POSITIONS,
            };
            self.observer.failed(job.row, job.sample, error);
            return false;
        }
        let prefix = self.batch.jobs[from].prefix;
        assert!(
            job.prompt.starts_with(&self.batch.jobs[from].job.prompt),
            "a stage begins with the prompt of the one before"
        );
        assert!(!job.may_go_on, "a row has two stages");
        // The prefix expects this job since the batch was planned.
        self.queue.push_front(self.batch.jobs.len());
        self.batch.jobs.push(PlannedJob { job, prefix });
        self.n_failures.push(0);
        true
    }

    /// The stage that would have followed `job` does not come.
    fn expect_no_more(&mut self, job: usize) {
        self.prefixes.admit_job(&self.batch, job);
        self.drop_idle_prefixes();
    }
}
