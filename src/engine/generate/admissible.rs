//! Jobs that can run at all in this context and arena, sorted from those that cannot.

use super::{GenerateError, Generation, JobError, Observer};
use crate::batch::Job;
use crate::engine::kv::pages_for;
use crate::engine::{EngineShape, StopReason};

/// The jobs that fit, their budgets capped at the context's end; reports the others.
pub(super) fn admissible(
    jobs: Vec<Job>,
    shape: &EngineShape,
    observer: &mut dyn Observer,
) -> Result<Vec<Job>, GenerateError> {
    let holds = shape.max_context;
    let mut fitting = Vec::with_capacity(jobs.len());
    for mut job in jobs {
        if let Some(error) = refusal(&job, shape) {
            observer.failed(job.row, job.sample, error);
        } else if job.max_new_tokens == 0 {
            observer.finished(nothing(&job));
        } else {
            job.max_new_tokens = job.max_new_tokens.min(holds - job.prompt.len());
            let needed = n_pages_of(&job);
            if needed > shape.n_pages || shape.n_slots == 0 {
                return Err(GenerateError::ArenaTooSmall {
                    row: job.row,
                    needed,
                    n_pages: shape.n_pages,
                });
            }
            fitting.push(job);
        }
    }
    Ok(fitting)
}

/// Why a prompt cannot be run in this context.
pub(super) fn refusal(job: &Job, shape: &EngineShape) -> Option<JobError> {
    let (n_prompt, holds) = (job.prompt.len(), shape.max_context);
    if n_prompt == 0 {
        Some(JobError::EmptyPrompt)
    } else if n_prompt >= holds {
        let needed = n_prompt + 1;
        Some(JobError::TooLong { needed, holds })
    } else {
        None
    }
}

/// Pages of a job's last position: the last token produced is never run through the model.
pub(super) fn n_pages_of(job: &Job) -> usize {
    pages_for(job.prompt.len() + job.max_new_tokens - 1)
}

/// The generation of a job without a budget.
pub(super) fn nothing(job: &Job) -> Generation {
    Generation {
        row: job.row,
        sample: job.sample,
        output_ids: Vec::new(),
        forced: None,
        logprob_sum: 0.0,
        stop: StopReason::Length,
        prompt_tokens: job.prompt.len(),
        reused_tokens: 0,
        trace_hash: None,
        seconds: 0.0,
    }
}
