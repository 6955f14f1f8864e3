//! One run: a prepared data set through the engine, from the first missing row to the files.
//!
//! [`Run::execute`] takes the steps in order. The pieces: `identity`, hashes of what tokens and
//! verdicts depend on; `manifest`, what the run is; `weights`, the model loaded and placed;
//! `files`, what is made of the log.

mod files;
mod identity;
mod manifest;
mod weights;

pub use identity::{scoring_hash, second_row_hash};
pub use weights::{LoadedWeights, Weights};

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::JobError;
use super::device::Engine;
use super::fault::Faulty;
use super::folder::{Opening, RunFolder};
use super::model::OpenModel;
use super::plan::{Wanted, host_budget};
use super::prepare::Prepared;
use super::progress::Progress;
use super::record::{Recorder, blank_row};
use super::settings::{Effective, Settings};
use crate::batch::Job;
use crate::engine::checkpoint::Precision;
use crate::engine::cpu::CpuOptions;
use crate::engine::generate::{GenerateOptions, Outcome as Generated, generate};
use crate::engine::plan::{CONTEXT_BYTES, MemoryPlan};
use crate::profile::Profile;
use crate::score::{self, Status};
use crate::submission::Results;
use crate::submission::manifest::{Outcome, RunManifest, Session};
use crate::submission::prompts::write_prompts;
use crate::telemetry::device::DeviceLoad;
use crate::telemetry::memory::{MemoryLog, MemorySummary, SAMPLE_PERIOD};
use crate::telemetry::throughput::{ThroughputLog, ThroughputTotals};
use identity::row_hash;

/// What a run is made of.
pub struct Run<'a> {
    pub model: &'a OpenModel,
    pub model_word: &'a Effective<String>,
    pub precision: Effective<Precision>,
    pub profile_word: Option<String>,
    pub settings: Settings,
    pub prepared: Prepared,
    pub max_context: usize,
    pub options: CpuOptions,
    pub engine: Engine,
    /// What the first token's time counts from.
    pub begun: Instant,
    /// Calls of steps after which the device is lost, for tests.
    pub fault: Option<usize>,
    /// Whether the attempt before lost its device in this run: this one goes on with it, in the
    /// time that it left.
    pub goes_on: bool,
}

impl Run<'_> {
    pub(super) fn n_samples(&self) -> u32 {
        u32::try_from(self.settings.samples.value).unwrap_or(u32::MAX)
    }

    /// Longest reply of a second stage.
    pub fn second_budget(&self) -> usize {
        second_budget(&self.prepared.profile, &self.settings)
    }

    /// Whether `--limit` and `--shard` take the row with this index.
    pub(super) fn takes(&self, row: usize) -> bool {
        self.settings.limit.value.is_none_or(|limit| row < limit)
            && self
                .settings
                .shard
                .value
                .is_none_or(|shard| shard.takes(row))
    }

    /// The samples that no finished line of the log stands for; with early stop those of them
    /// that are needed next.
    pub fn missing(&self, results: &Results) -> Vec<(usize, u32)> {
        if self.settings.early_stop.value {
            return self.needed_next(results);
        }
        let records = &self.prepared.dataset.records;
        (0..records.len())
            .filter(|&row| self.takes(row))
            .flat_map(|row| (0..self.n_samples()).map(move |sample| (row, sample)))
            .filter(|&(row, sample)| !results.is_finished(&records[row].key, sample))
            .collect()
    }

    /// The memory plan for the samples to run.
    ///
    /// # Errors
    /// Nothing fits.
    pub fn plan(&self, n_jobs: usize) -> Result<MemoryPlan, JobError> {
        let has_next = |row: &&super::prepare::Row| row.next.is_some();
        let n_two_stage = self.prepared.rows.iter().filter(has_next).count();
        let wanted = Wanted {
            batch: self.settings.batch.value,
            max_context: self.max_context,
            longest_prompt: self.prepared.longest_prompt(),
            n_jobs,
            n_two_stage: n_jobs.min(n_two_stage * self.n_samples() as usize),
            prefix_reuse: self.settings.prefix_reuse.value,
            budget: host_budget(self.settings.host_memory.value),
        };
        self.engine.plan(
            &self.model.checkpoint,
            self.precision.value,
            &self.options,
            &wanted,
            self.settings.gpu_memory.value,
        )
    }

    /// Runs the missing samples and writes the files.
    ///
    /// # Errors
    /// The model cannot be held, the engine fails, or the log cannot be written; what was
    /// finished before is in the log.
    pub fn execute(
        &self,
        opening: &Opening,
        plan: &MemoryPlan,
        weights: &mut Weights,
        quiet: bool,
    ) -> Result<Finished, JobError> {
        let mut folder = opening.open()?;
        let path = folder.path.clone();
        write_prompts(&path, &self.prepared.prompts)?;
        let fresh = self.manifest(&path, opening.identity);
        let mut manifest = match folder.manifest.take() {
            // What the run is stays; how it goes on is this call's.
            Some(old) => RunManifest {
                sessions: old.sessions,
                totals: old.totals,
                ..fresh
            },
            None => fresh,
        };
        // Our own plain values always have a JSON form.
        manifest.ledger = serde_json::to_value(&plan.ledger).unwrap_or_default();
        manifest.memory_plan = serde_json::to_value(plan).unwrap_or_default();
        let spent = match manifest.sessions.last() {
            Some(before) if self.goes_on => before.throughput.wall_seconds,
            _ => 0.0,
        };
        let mut session = Session::start(
            &self.engine.name(),
            &opening.identity.numerics,
            plan.shape.n_slots,
        );
        session.shard = self.shard();
        let index = manifest.begin_session(&path, session);
        manifest.write(&path)?;

        let ran = self.generate(
            &mut folder,
            &mut manifest,
            index,
            plan,
            weights,
            opening,
            spent,
            quiet,
        );
        let (ran, error) = match ran {
            Ok((ran, error)) => (ran, error),
            Err(error) => (Ran::failed(), Some(error)),
        };
        let results = folder.results;
        let closed = folder.log.close();
        self.write_files(&path, &results, &mut manifest)?;
        manifest.end_session(ran.outcome, ran.totals, ran.memory, ran.kernel_calls);
        if let Some(session) = manifest.sessions.last_mut() {
            session.device_load = ran.device_load;
            session.first_token_seconds = ran.first_token_seconds;
            session.n_lost_devices =
                u32::from(error.as_ref().is_some_and(JobError::is_lost_device));
        }
        manifest.write(&path)?;
        match error {
            // The next process goes on from the log, so what is wrong with that comes first.
            Some(error) if error.is_lost_device() => {
                closed?;
                return Err(error);
            }
            Some(error) => return Err(error),
            None => closed?,
        }
        Ok(Finished {
            manifest,
            repaired_bytes: folder.repaired_bytes,
        })
    }

    #[allow(clippy::too_many_arguments, reason = "one caller, all of them its own")]
    fn generate(
        &self,
        folder: &mut RunFolder,
        manifest: &mut RunManifest,
        session: usize,
        plan: &MemoryPlan,
        weights: &mut Weights,
        opening: &Opening,
        spent: f64,
        quiet: bool,
    ) -> Result<(Ran, Option<JobError>), JobError> {
        let meter = self.engine.meter();
        let (path, planned, period) = (&folder.path, plan.memory, SAMPLE_PERIOD);
        let memory = match self.engine {
            Engine::Cpu => MemoryLog::start(path, session, period, Some(planned)),
            Engine::Cuda(_) => {
                // The budget is what the context leaves, so the plan does not count it.
                let driver = plan.driver_bytes + CONTEXT_BYTES;
                let meter = meter.clone();
                MemoryLog::start_on_device(path, session, period, planned, driver, meter)
            }
        };
        self.log_errors(folder)?;
        self.log_left_out(folder)?;
        let jobs = self.jobs(&folder.results);
        let n_jobs = jobs.len();
        if n_jobs == 0 {
            let (memory, _) = memory.finish();
            let ran = Ran {
                outcome: Outcome::Complete,
                memory: Some(memory),
                ..Ran::failed()
            };
            return Ok((ran, None));
        }

        let mut backend = self.open(plan, weights, manifest, &folder.path, &memory, quiet)?;

        let stop = AtomicBool::new(false);
        let n_done = folder.results.len();
        let progress = Progress::new(n_jobs, n_done, quiet);
        let mut throughput = ThroughputLog::open(&folder.path, session);
        throughput.watch(meter.clone());
        let options = GenerateOptions {
            refill: self.settings.refill.value,
            prefix_reuse: self.settings.prefix_reuse.value,
            answer_headroom: self.settings.answer_headroom.value,
            deadline: self.settings.time_limit.value.and_then(|limit| {
                let left = (limit.0 - spent).max(0.0);
                Instant::now().checked_add(Duration::try_from_secs_f64(left).ok()?)
            }),
            ..GenerateOptions::new(
                self.settings.sampling(),
                Arc::clone(&self.model.stop_tokens),
            )
        };
        let mut recorder = Recorder::new(
            &self.prepared,
            &self.model.tokenizer,
            &mut folder.log,
            &mut folder.results,
            &mut throughput,
            &memory,
            &progress,
            &stop,
            plan.shape.n_slots,
            n_jobs,
        );
        recorder.second_budget = self.second_budget();
        if opening.allow_mixed {
            recorder.numerics_id = Some(opening.identity.numerics.clone());
        }
        let mut faulty = Faulty::new(&mut backend, self.fault);
        let mut generated = generate(&mut faulty, jobs, &options, &stop, &mut recorder);
        while self.settings.early_stop.value && matches!(generated, Ok(Generated::Complete)) {
            let jobs = self.next_round(recorder.results);
            if jobs.is_empty() {
                break;
            }
            recorder.next_round(jobs.len());
            generated = generate(&mut faulty, jobs, &options, &stop, &mut recorder);
        }
        recorder.flush();
        let first_token = recorder.first_token;
        let failure = match recorder.failure.take() {
            Some(failure) => Some(failure.into()),
            None => self.log_left_out(folder).err(),
        };
        progress.clear();
        let (totals, throughput_written) = throughput.finish();
        let (memory, memory_written) = memory.finish();
        for warning in [throughput_written.err(), memory_written.err()]
            .into_iter()
            .flatten()
        {
            crate::cli::print::tell(&format!("warning: {warning}\nhint: {}", warning.hint()));
        }
        let (outcome, error) = match (failure, generated) {
            (Some(failure), _) => (Outcome::Failed, Some(failure)),
            (None, Err(error)) => (Outcome::Failed, Some(error.into())),
            (None, Ok(Generated::Complete)) => (Outcome::Complete, None),
            (None, Ok(Generated::Stopped)) => (Outcome::Stopped, None),
            (None, Ok(Generated::DeadlineReached)) => (Outcome::TimeLimit, None),
        };
        let ran = Ran {
            outcome,
            totals,
            memory: Some(memory),
            device_load: meter.and_then(|meter| meter.load()),
            kernel_calls: backend.kernel_calls(),
            first_token_seconds: first_token.map(|at| (at - self.begun).as_secs_f64()),
        };
        Ok((ran, error))
    }

    /// Rows that cannot run go into the log.
    fn log_errors(&self, folder: &mut RunFolder) -> Result<(), JobError> {
        for (row, sample) in self.missing(&folder.results) {
            let (record, prepared) = (&self.prepared.dataset.records, &self.prepared.rows);
            let (Some(record), Some(prepared)) = (record.get(row), prepared.get(row)) else {
                continue;
            };
            if let Some(error) = &prepared.error {
                let verdict = score::without_answer(record, Status::Error);
                let mut result = blank_row(record, sample, Status::Error);
                result.correct = verdict.correct;
                result.error = Some(error.clone());
                folder.log.append(&result)?;
                folder.results.insert(result);
            }
        }
        Ok(())
    }

    /// The samples that are missing and can run.
    pub(super) fn jobs(&self, results: &Results) -> Vec<Job> {
        let job = |(row, sample): (usize, u32)| {
            let record = self.prepared.dataset.records.get(row)?;
            let prepared = self.prepared.rows.get(row)?;
            prepared.error.is_none().then(|| Job {
                row,
                sample,
                prompt: Arc::clone(&prepared.tokens),
                max_new_tokens: self.settings.max_new_tokens.value,
                row_hash: row_hash(&record.key),
                may_go_on: prepared.next.is_some(),
            })
        };
        self.missing(results).into_iter().filter_map(job).collect()
    }
}

/// What the engine part of a run came to.
struct Ran {
    outcome: Outcome,
    totals: ThroughputTotals,
    memory: Option<MemorySummary>,
    device_load: Option<DeviceLoad>,
    kernel_calls: BTreeMap<String, u64>,
    first_token_seconds: Option<f64>,
}

impl Ran {
    /// Nothing was done.
    fn failed() -> Self {
        Self {
            outcome: Outcome::Failed,
            totals: ThroughputTotals::default(),
            memory: None,
            device_load: None,
            kernel_calls: BTreeMap::new(),
            first_token_seconds: None,
        }
    }
}

/// A run that has its files.
pub struct Finished {
    pub manifest: RunManifest,
    pub repaired_bytes: u64,
}

/// Longest reply of a second stage: the profile's, else that of the first.
pub fn second_budget(profile: &Profile, settings: &Settings) -> usize {
    let own = profile.second_stage.as_ref();
    own.and_then(|stage| stage.max_new_tokens)
        .map_or(settings.max_new_tokens.value, |n| n as usize)
}
