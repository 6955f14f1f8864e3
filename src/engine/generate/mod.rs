//! The loop: prefill once, decode until every row has stopped; the same for all backends.
//!
//! Jobs come in, each one's [`Generation`] goes to the [`Observer`] as soon as it is done, with
//! counts and times of every pass. The loop owns slots, pages and the queue; what a row's tokens
//! are depends on none of them: rows may be refilled, evicted and redone, or retried, in any
//! order. Starting rows (shared prefixes, prefill) is in `refill.rs`, giving them up in `redo.rs`,
//! going on after the end of a stage in `stages.rs`, at the answer headroom in `headroom.rs`;
//! which jobs can run at all is found in `admissible.rs`.

mod admissible;
mod forced;
mod headroom;
mod redo;
mod refill;
mod stages;
#[cfg(test)]
mod tests;

pub use forced::{ForcedError, forced_logprobs, score_tokens};

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::kv::KvArena;
use super::sample::trace_hash;
use super::{
    Backend, EngineError, EngineShape, SamplingParams, SequenceId, StopReason, TokenEvent, TokenId,
};
use crate::batch::{self, Batch, BatchOptions, Job};
use admissible::admissible;
use refill::PrefixStore;

/// How to generate; the same for all jobs of a run.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    pub sampling: SamplingParams,
    /// Ids that end a row.
    pub stop_tokens: Arc<[TokenId]>,
    /// Give a stopped row's slot to the next job; off, a batch waits for all its rows.
    pub refill: bool,
    /// Compute shared prefixes once.
    pub prefix_reuse: bool,
    /// Decode steps enqueued at a time: the stop flag is looked at and slots are refilled
    /// between them.
    pub steps_per_call: usize,
    /// Generation ends here, with what is done.
    pub deadline: Option<Instant>,
    /// Tokens of each job's budget that are kept for its answer: with so many left, the observer
    /// is asked what to write into the row. 0 is off.
    pub answer_headroom: usize,
}

impl GenerateOptions {
    /// Refill and reuse on, four steps a call, no deadline.
    pub fn new(sampling: SamplingParams, stop_tokens: Arc<[TokenId]>) -> Self {
        Self {
            sampling,
            stop_tokens,
            refill: true,
            prefix_reuse: true,
            steps_per_call: 4,
            deadline: None,
            answer_headroom: 0,
        }
    }
}

/// A finished sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    pub row: usize,
    pub sample: u32,
    /// The stop token, if one came, is the last.
    pub output_ids: Vec<TokenId>,
    /// Those of `output_ids` that were written at the answer headroom, not drawn.
    pub forced: Option<Range<usize>>,
    /// Sum of the tokens' log-probabilities, forced ones included, added in order in f32.
    pub logprob_sum: f32,
    pub stop: StopReason,
    pub prompt_tokens: usize,
    /// Prompt tokens taken over from a shared prefix; those that were computed for this row
    /// first are not among them.
    pub reused_tokens: usize,
    /// Hash of all the row's logits, when the backend gives them.
    pub trace_hash: Option<u64>,
    /// From the prefill of its batch to its last token.
    pub seconds: f64,
}

/// Why one job has no generation; the others go on.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error("prompt and one new token need {needed} positions, the context holds {holds}")]
    TooLong { needed: usize, holds: usize },
    #[error("prompt has no tokens")]
    EmptyPrompt,
    #[error(transparent)]
    Engine(EngineError),
}

/// What a pass did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StepKind {
    Prefill,
    Decode,
}

/// Counts and times of one refill (all its prefill passes) or one call of decode steps.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct StepReport {
    pub kind: StepKind,
    /// Prompt (or forced) tokens run through the model, or tokens produced.
    pub tokens: usize,
    pub seconds: f64,
    /// Decode: steps times slots that had a row to run, and those that had none.
    pub live_row_steps: usize,
    pub padded_row_steps: usize,
    /// Prompt tokens that started rows took over from shared prefixes computed before.
    pub reused_tokens: usize,
    /// Rows live after the pass.
    pub n_live: usize,
    /// Jobs not started yet.
    pub queue_len: usize,
    /// Rows given up for lack of pages before the pass, to be redone.
    pub n_evicted: usize,
}

/// Takes what the loop produces, when it produces it.
pub trait Observer {
    fn finished(&mut self, generation: Generation);
    fn failed(&mut self, row: usize, sample: u32, error: JobError);
    fn step(&mut self, report: &StepReport);

    /// Asked when a job that may go on is done: the next stage of its row and sample. With one
    /// the generation is the observer's to keep, and `finished` or `failed` is called for the
    /// stage that comes last. Its `row_hash` must be another than the stage's before: their
    /// positions overlap, and equal keys would draw equal numbers.
    fn next_stage(&mut self, _generation: &Generation) -> Option<Job> {
        None
    }

    /// Asked when a row has only its answer headroom left: the tokens that close its analysis
    /// and open its final message; none where it is in its final message already.
    fn at_headroom(&mut self, _row: usize, _output_ids: &[TokenId]) -> Vec<TokenId> {
        Vec::new()
    }
}

/// How a run ended. Rows in flight at a stop are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Complete,
    Stopped,
    DeadlineReached,
}

/// What ends a run.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The memory plan gives every row room, so this is a hand-made shape.
    #[error("row {row} needs {needed} KV pages, the arena has {n_pages}")]
    ArenaTooSmall {
        row: usize,
        needed: usize,
        n_pages: usize,
    },
}

/// Runs all jobs. `stop` ends the run early, looked at between passes.
///
/// A job whose prompt leaves no room for a token in the context is reported failed before the
/// run. A row whose logits are not finite is redone once on fresh state, with all rows then
/// live, and reported failed when it happens again. When it keeps happening and no row finishes
/// in between, all rows then live are reported failed and the run goes on with the next.
///
/// # Errors
/// [`GenerateError`] when the backend fails otherwise or a job alone exceeds the arena.
pub fn generate(
    backend: &mut dyn Backend,
    jobs: Vec<Job>,
    options: &GenerateOptions,
    stop: &AtomicBool,
    observer: &mut dyn Observer,
) -> Result<Outcome, GenerateError> {
    let shape = backend.info().shape;
    let jobs = admissible(jobs, &shape, observer)?;
    let max_depth = if options.prefix_reuse {
        shape.n_forks
    } else {
        0
    };
    let batch = batch::plan(jobs, &BatchOptions::new(max_depth));
    let n_sequences = shape.n_slots + shape.n_forks;
    let mut run = Run {
        backend,
        options,
        stop,
        observer,
        shape,
        arena: KvArena::new(shape.n_pages, n_sequences),
        queue: (0..batch.jobs.len()).collect(),
        prefixes: PrefixStore::new(&batch, &shape),
        n_failures: vec![0; batch.jobs.len()],
        batch,
        slots: (0..shape.n_slots).map(|_| None).collect(),
        n_started: 0,
        n_evicted: 0,
        failures_in_a_row: 0,
        events: Vec::new(),
    };
    let outcome = run.run();
    // Whatever happened, the next caller finds an empty backend.
    let all: Vec<SequenceId> = (0..n_sequences as u32).map(SequenceId).collect();
    run.backend.clear(&all);
    outcome
}

/// The row in a slot.
struct LiveRow {
    /// Index into the batch's jobs.
    job: usize,
    /// Counts up over the run: the greatest is the youngest row.
    age: u64,
    started: Instant,
    reused_tokens: usize,
    output_ids: Vec<TokenId>,
    /// Tokens at which its slot stops: the job's budget, or less by the answer headroom.
    limit: usize,
    /// Its slot has stopped at `limit`, with budget left.
    paused: bool,
    forced: Option<Range<usize>>,
    logprob_sum: f32,
    trace_hash: Option<u64>,
}

struct Run<'a> {
    backend: &'a mut dyn Backend,
    options: &'a GenerateOptions,
    stop: &'a AtomicBool,
    observer: &'a mut dyn Observer,
    shape: EngineShape,
    arena: KvArena,
    batch: Batch,
    /// Jobs not started, or to be redone.
    queue: VecDeque<usize>,
    slots: Vec<Option<LiveRow>>,
    prefixes: PrefixStore,
    /// Of each job: how often its own logits were not finite.
    n_failures: Vec<u8>,
    n_started: u64,
    n_evicted: usize,
    failures_in_a_row: usize,
    events: Vec<TokenEvent>,
}

impl Run<'_> {
    fn run(&mut self) -> Result<Outcome, GenerateError> {
        loop {
            if let Some(outcome) = self.interrupted() {
                return Ok(outcome);
            }
            if self.slots.iter().flatten().any(|row| row.paused) {
                self.resume_paused()?;
                continue;
            }
            if self.refill_is_due() {
                // Starts at least one row, so this cannot go round without progress.
                self.refill()?;
                continue;
            }
            if self.n_live() == 0 {
                return Ok(Outcome::Complete);
            }
            let n_steps = self.assign_pages()?;
            match self.decode(n_steps) {
                Err(EngineError::NotFinite { slot, position }) => self.recover(slot, position)?,
                other => other?,
            }
        }
    }

    fn interrupted(&self) -> Option<Outcome> {
        if self.stop.load(Ordering::Relaxed) {
            Some(Outcome::Stopped)
        } else if self.options.deadline.is_some_and(|at| Instant::now() >= at) {
            Some(Outcome::DeadlineReached)
        } else {
            None
        }
    }

    fn n_live(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    fn live(&self) -> impl Iterator<Item = (SequenceId, &LiveRow)> {
        (0u32..)
            .zip(&self.slots)
            .filter_map(|(slot, row)| Some((SequenceId(slot), row.as_ref()?)))
    }

    /// Makes room for the next steps of all live rows, with fewer steps or fewer rows where
    /// pages are short. Returns the number of steps.
    fn assign_pages(&mut self) -> Result<usize, GenerateError> {
        let mut n_steps = self.options.steps_per_call.max(1);
        loop {
            let wanted: Vec<(SequenceId, usize)> = self
                .live()
                .map(|(slot, row)| {
                    let remaining = row.limit - row.output_ids.len();
                    (slot, self.arena.length(slot) + n_steps.min(remaining))
                })
                .collect();
            let n_missing: usize = wanted
                .iter()
                .map(|&(slot, n)| self.arena.n_missing(slot, n))
                .sum();
            if n_missing <= self.arena.n_free() {
                for (slot, n_positions) in wanted {
                    self.assign(slot, n_positions);
                }
                break;
            }
            if n_steps > 1 {
                n_steps /= 2;
            } else {
                self.free_pages(n_missing)?;
            }
        }
        let longest = self
            .live()
            .map(|(_, row)| row.limit - row.output_ids.len())
            .max();
        Ok(n_steps.min(longest.unwrap_or(1)))
    }

    /// Gives up the youngest row, or, where one alone is live, the shared prefixes.
    fn free_pages(&mut self, needed: usize) -> Result<(), GenerateError> {
        if self.n_live() > 1 {
            self.evict_youngest();
        } else if self.prefixes.is_empty() {
            let row = self.live().map(|(_, row)| self.job(row).row).next();
            return Err(GenerateError::ArenaTooSmall {
                row: row.unwrap_or_default(),
                needed,
                n_pages: self.shape.n_pages,
            });
        } else {
            self.drop_all_prefixes();
        }
        Ok(())
    }

    /// Assigns pages that were counted to be free and tells the backend.
    fn assign(&mut self, sequence: SequenceId, n_positions: usize) {
        let new = self.arena.assign(sequence, n_positions);
        for index in new.expect("the pages were counted before") {
            let page = self.arena.pages(sequence)[index];
            self.backend.map_page(sequence, index, page);
        }
    }

    fn decode(&mut self, n_steps: usize) -> Result<(), EngineError> {
        let begun = Instant::now();
        let mut events = std::mem::take(&mut self.events);
        let result = self.backend.decode(n_steps).and_then(|()| {
            loop {
                let n_before = events.len();
                if self.backend.poll(&mut events)? {
                    return Ok(());
                }
                if events.len() == n_before {
                    std::thread::yield_now();
                }
            }
        });
        if result.is_err() {
            // Tokens from before the failure: rows that they end are done.
            while let Ok(false) = self.backend.poll(&mut events) {}
        }
        let seconds = begun.elapsed().as_secs_f64();
        let n_tokens = events.len();
        for event in events.drain(..) {
            self.take(event);
        }
        self.events = events;
        self.observer.step(&StepReport {
            kind: StepKind::Decode,
            tokens: n_tokens,
            seconds,
            live_row_steps: n_tokens,
            padded_row_steps: (n_steps * self.shape.n_slots).saturating_sub(n_tokens),
            reused_tokens: 0,
            n_live: self.n_live(),
            queue_len: self.queue.len(),
            n_evicted: std::mem::take(&mut self.n_evicted),
        });
        result
    }

    /// Books a token that has arrived.
    fn take(&mut self, event: TokenEvent) {
        let slot = event.slot;
        let Some(row) = self.slots.get_mut(slot.0 as usize).and_then(Option::as_mut) else {
            unreachable!("slot {} has no row and produced a token", slot.0);
        };
        self.arena.advance(slot, 1);
        assert_eq!(event.position, self.arena.length(slot));
        row.output_ids.push(event.token);
        row.logprob_sum += event.logprob;
        row.trace_hash = match (row.trace_hash, event.logits_hash) {
            (Some(so_far), Some(hash)) => Some(trace_hash(so_far, hash)),
            _ => None,
        };
        let Some(stop) = event.stop else {
            return;
        };
        // A backend may end a row for its length before that.
        let is_at_headroom = row.output_ids.len() == row.limit
            && row.limit < self.batch.jobs[row.job].job.max_new_tokens;
        if stop == StopReason::Length && is_at_headroom {
            row.paused = true;
        } else {
            self.finish(slot, stop);
        }
    }

    fn finish(&mut self, slot: SequenceId, stop: StopReason) {
        let Some(row) = self.vacate(slot) else {
            return;
        };
        self.failures_in_a_row = 0;
        let job = self.job(&row);
        let generation = Generation {
            row: job.row,
            sample: job.sample,
            prompt_tokens: job.prompt.len(),
            output_ids: row.output_ids,
            forced: row.forced,
            logprob_sum: row.logprob_sum,
            stop,
            reused_tokens: row.reused_tokens,
            trace_hash: row.trace_hash,
            seconds: row.started.elapsed().as_secs_f64(),
        };
        self.end_stage(row.job, generation);
    }

    /// Empties a slot and gives its pages back.
    fn vacate(&mut self, slot: SequenceId) -> Option<LiveRow> {
        let row = self.slots.get_mut(slot.0 as usize)?.take()?;
        self.backend.clear(&[slot]);
        self.arena.release(slot);
        Some(row)
    }

    fn job(&self, row: &LiveRow) -> &Job {
        &self.batch.jobs[row.job].job
    }
}
