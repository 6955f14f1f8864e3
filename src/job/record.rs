//! What comes out of the engine becomes lines of the log, timings and progress.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::prepare::Prepared;
use super::progress::Progress;
use super::signal;
use crate::dataset::Record;
use crate::engine::generate::{
    Generation, JobError as GenerateJobError, Observer, StepKind, StepReport,
};
use crate::prompt::harmony;
use crate::score::{self, Status};
use crate::submission::log::{LogError, ResultLog};
use crate::submission::{RESULT_SCHEMA, ResultRow, Results, RowError};
use crate::telemetry::memory::{MemoryEvent, MemoryLog};
use crate::telemetry::throughput::{BatchTiming, ThroughputLog};
use crate::tokenizer::Tokenizer;

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
    /// Why the log could not be written.
    pub failure: Option<LogError>,
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
            failure: None,
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
        let verdict = score::judge(
            record,
            &self.prepared.profile.scoring,
            &reply,
            generation.stop,
        );
        let mut row = blank_row(record, generation.sample, verdict.status);
        row.correct = verdict.correct;
        row.answer = verdict.answer;
        row.raw_text = self.tokenizer.decode(&generation.output_ids);
        row.final_text = reply.final_text;
        row.output_ids = generation.output_ids;
        row.logprob_sum = Some(generation.logprob_sum);
        row.logprob_sum_bits = Some(format!("{:08x}", generation.logprob_sum.to_bits()));
        row.prompt_tokens = generation.prompt_tokens as u32;
        row.reused_tokens = generation.reused_tokens as u32;
        row.analysis_tokens = reply.analysis_tokens;
        row.final_tokens = reply.final_tokens;
        row.stop_reason = Some(generation.stop);
        row.seconds = Some(generation.seconds);
        row.format_issues = reply.issues;
        row.trace_hash = generation.trace_hash.map(|hash| format!("{hash:016x}"));
        row.numerics_id = self.numerics_id.clone();
        self.append(row);
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
        let mut row = blank_row(record, sample, Status::Error);
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
    }
}
