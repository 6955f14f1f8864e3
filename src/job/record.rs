//! What comes out of the engine becomes lines of the log, timings and progress.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::prepare::Prepared;
use super::progress::Progress;
use super::run::second_row_hash;
use super::{signal, verdict};
use crate::batch::Job;
use crate::dataset::Record;
use crate::engine::TokenId;
use crate::engine::generate::{
    Generation, JobError as GenerateJobError, Observer, StepKind, StepReport,
};
use crate::prompt::harmony::{self, Reply};
use crate::score::{Ended, Status};
use crate::submission::log::{LogError, ResultLog};
use crate::submission::{RESULT_SCHEMA, ResultRow, Results, RowError, SecondStage};
use crate::telemetry::memory::{MemoryEvent, MemoryLog};
use crate::telemetry::throughput::{BatchTiming, ThroughputLog};
use crate::tokenizer::Tokenizer;

/// What a row's first stage came to.
struct FirstStage {
    row: ResultRow,
    reply: Reply,
}

/// Takes finished samples: parses, judges and logs each at once.
pub struct Recorder<'a> {
    pub prepared: &'a Prepared,
    pub tokenizer: &'a Tokenizer,
    pub log: &'a mut ResultLog,
    pub results: &'a mut Results,
    pub throughput: &'a mut ThroughputLog,
    pub memory: &'a MemoryLog,
    pub progress: &'a Progress,
    /// Ends the generation: set on a signal, or when the log cannot be written.
    pub stop: &'a AtomicBool,
    /// Named in each row of a run of mixed numerics.
    pub numerics_id: Option<String>,
    pub n_slots: usize,
    /// Budget of second stages.
    pub second_budget: usize,
    /// Why the log could not be written.
    pub failure: Option<LogError>,
    /// First stages by row and sample whose second stage is not done: a row is logged when both
    /// are.
    first_stages: HashMap<(usize, u32), FirstStage>,
    batch: BatchTiming,
    last_queue: Option<usize>,
    n_jobs: usize,
    /// When the first tokens were there.
    pub first_token: Option<Instant>,
}

impl<'a> Recorder<'a> {
    #[allow(
        clippy::too_many_arguments,
        reason = "the one place where all side products meet"
    )]
    pub fn new(
        prepared: &'a Prepared,
        tokenizer: &'a Tokenizer,
        log: &'a mut ResultLog,
        results: &'a mut Results,
        throughput: &'a mut ThroughputLog,
        memory: &'a MemoryLog,
        progress: &'a Progress,
        stop: &'a AtomicBool,
        n_slots: usize,
        n_jobs: usize,
    ) -> Self {
        Self {
            prepared,
            tokenizer,
            log,
            results,
            throughput,
            memory,
            progress,
            stop,
            numerics_id: None,
            n_slots,
            second_budget: 0,
            failure: None,
            first_stages: HashMap::new(),
            batch: BatchTiming::default(),
            last_queue: None,
            n_jobs,
            first_token: None,
        }
    }

    /// Another generation of so many jobs begins.
    pub fn next_round(&mut self, n_jobs: usize) {
        self.flush();
        self.last_queue = None;
        self.n_jobs = n_jobs;
        self.progress.more(n_jobs);
    }

    /// Writes what the last batch did; call once after the generation.
    pub fn flush(&mut self) {
        if self.batch != BatchTiming::default() {
            self.throughput.record(&self.batch);
            self.batch = BatchTiming::default();
        }
    }

    /// The row of a reply, without a verdict.
    fn stage_row(&self, record: &Record, generation: &Generation, reply: &Reply) -> ResultRow {
        ResultRow {
            raw_text: self.tokenizer.decode(&generation.output_ids),
            final_text: reply.final_text.clone(),
            output_ids: generation.output_ids.clone(),
            logprob_sum: Some(generation.logprob_sum),
            logprob_sum_bits: Some(format!("{:08x}", generation.logprob_sum.to_bits())),
            prompt_tokens: generation.prompt_tokens as u32,
            reused_tokens: generation.reused_tokens as u32,
            analysis_tokens: reply.analysis_tokens,
            final_tokens: reply.final_tokens,
            stop_reason: Some(generation.stop),
            seconds: Some(generation.seconds),
            format_issues: reply.issues.clone(),
            trace_hash: generation.trace_hash.map(|hash| format!("{hash:016x}")),
            numerics_id: self.numerics_id.clone(),
            forced: forced(generation),
            ..blank_row(record, generation.sample, Status::NotRun)
        }
    }

    fn second_stage(&self, generation: &Generation, reply: &Reply) -> Option<SecondStage> {
        let next = self.prepared.rows.get(generation.row)?.next.as_ref()?;
        Some(SecondStage {
            user_turn: next.text.clone(),
            raw_text: self.tokenizer.decode(&generation.output_ids),
            final_text: reply.final_text.clone(),
            output_ids: generation.output_ids.clone(),
            logprob_sum: generation.logprob_sum,
            logprob_sum_bits: format!("{:08x}", generation.logprob_sum.to_bits()),
            prompt_tokens: generation.prompt_tokens as u32,
            reused_tokens: generation.reused_tokens as u32,
            analysis_tokens: reply.analysis_tokens,
            final_tokens: reply.final_tokens,
            stop_reason: generation.stop,
            seconds: generation.seconds,
            format_issues: reply.issues.clone(),
            trace_hash: generation.trace_hash.map(|hash| format!("{hash:016x}")),
            forced: forced(generation),
        })
    }

    fn append(&mut self, row: ResultRow) {
        if self.failure.is_some() {
            return;
        }
        if let Err(error) = self.log.append(&row) {
            self.failure = Some(error);
            self.stop.store(true, Ordering::SeqCst);
            return;
        }
        self.progress.finished(&row);
        self.results.insert(row);
    }
}

impl Observer for Recorder<'_> {
    fn finished(&mut self, generation: Generation) {
        self.batch.rows_finished += 1;
        let Some(record) = self.prepared.dataset.records.get(generation.row) else {
            return;
        };
        let reply = harmony::parse(&generation.output_ids, self.tokenizer);
        let of_row = (generation.row, generation.sample);
        let profile = &self.prepared.profile;
        let ended = Ended {
            reply: &reply,
            stop: generation.stop,
            is_closed: generation.forced.is_some(),
        };
        let (mut row, verdict) = match self.first_stages.remove(&of_row) {
            None => {
                let verdict = verdict::judge(record, profile, ended, None);
                (self.stage_row(record, &generation, &reply), verdict)
            }
            Some(FirstStage {
                mut row,
                reply: first,
            }) => {
                let first = Ended {
                    reply: &first,
                    stop: row.stop_reason.unwrap_or(generation.stop),
                    is_closed: row.forced.is_some(),
                };
                let verdict = verdict::judge(record, profile, first, Some(ended));
                row.second = self.second_stage(&generation, &reply);
                (row, verdict)
            }
        };
        verdict::put(&mut row, verdict);
        self.append(row);
    }

    /// A row of two stages goes on when its first reply has a final message, finished or not.
    fn next_stage(&mut self, generation: &Generation) -> Option<Job> {
        let Generation { row, sample, .. } = *generation;
        let record = self.prepared.dataset.records.get(row)?;
        let reply = harmony::parse(&generation.output_ids, self.tokenizer);
        let final_text = reply.final_text.as_deref()?;
        let prompt = self
            .prepared
            .second_prompt(row, final_text, self.tokenizer)?;
        let first = self.stage_row(record, generation, &reply);
        self.first_stages
            .insert((row, sample), FirstStage { row: first, reply });
        Some(Job {
            row,
            sample,
            prompt,
            max_new_tokens: self.second_budget,
            row_hash: second_row_hash(&record.key),
            may_go_on: false,
        })
    }

    fn at_headroom(&mut self, _row: usize, output_ids: &[TokenId]) -> Vec<TokenId> {
        let reply = harmony::parse(output_ids, self.tokenizer);
        // A vocabulary without these tokens has no analysis to close.
        self.tokenizer
            .encode(&harmony::closing(&reply))
            .unwrap_or_default()
    }

    fn failed(&mut self, row: usize, sample: u32, error: GenerateJobError) {
        self.batch.rows_finished += 1;
        let Some(record) = self.prepared.dataset.records.get(row) else {
            return;
        };
        let transient = matches!(error, GenerateJobError::Engine(_));
        let hint = if transient {
            "the same command tries this row again"
        } else {
            "raise `--context`, or shorten the row"
        };
        // A second stage that cannot run leaves the open answer of the first.
        let mut row = match self.first_stages.remove(&(row, sample)) {
            Some(first) => first.row,
            None => blank_row(record, sample, Status::Error),
        };
        row.status = Status::Error;
        row.correct = record.gold.as_ref().map(|_| false);
        row.error = Some(RowError {
            message: error.to_string(),
            hint: hint.to_owned(),
            file: super::prepare::shown_path(&record.location.file),
            line: record.location.line,
            field: None,
            transient,
        });
        row.numerics_id = self.numerics_id.clone();
        self.append(row);
    }

    fn step(&mut self, report: &StepReport) {
        if signal::received().is_some() {
            self.stop.store(true, Ordering::SeqCst);
        }
        match report.kind {
            StepKind::Prefill => {
                // A refill begins a new line of the throughput log.
                self.flush();
                let waiting = self.last_queue.unwrap_or(self.n_jobs) + report.n_evicted;
                self.batch.rows_started = waiting.saturating_sub(report.queue_len) as u64;
                self.batch.prefill_tokens += report.tokens as u64;
                self.batch.prefill_seconds += report.seconds;
                self.batch.reused_prefix_tokens += report.reused_tokens as u64;
            }
            StepKind::Decode => {
                let row_steps = report.live_row_steps + report.padded_row_steps;
                self.batch.decode_steps += (row_steps / self.n_slots.max(1)) as u64;
                self.batch.live_row_steps += report.live_row_steps as u64;
                self.batch.padded_row_steps += report.padded_row_steps as u64;
                self.batch.decode_seconds += report.seconds;
                if self.first_token.is_none() {
                    self.first_token = Some(Instant::now());
                    self.memory.event(MemoryEvent::FirstBatch, None);
                }
            }
        }
        self.last_queue = Some(report.queue_len);
        self.progress.step(report);
    }
}

/// As a row keeps it.
fn forced(generation: &Generation) -> Option<[u32; 2]> {
    let forced = generation.forced.as_ref()?;
    Some([forced.start as u32, forced.end as u32])
}

/// A log line of a record, with nothing in it but what the record says.
pub fn blank_row(record: &Record, sample: u32, status: Status) -> ResultRow {
    ResultRow {
        schema: RESULT_SCHEMA.to_owned(),
        key: record.key.clone(),
        id: record.id.clone(),
        sample,
        status,
        correct: None,
        gold: record.gold.clone(),
        answer: None,
        lenient: None,
        raw_text: String::new(),
        final_text: None,
        output_ids: Vec::new(),
        logprob_sum: None,
        logprob_sum_bits: None,
        prompt_tokens: 0,
        reused_tokens: 0,
        analysis_tokens: 0,
        final_tokens: 0,
        stop_reason: None,
        group: record.group.clone(),
        cluster: record.cluster.clone(),
        seconds: None,
        format_issues: Vec::new(),
        error: None,
        trace_hash: None,
        numerics_id: None,
        forced: None,
        second: None,
    }
}
