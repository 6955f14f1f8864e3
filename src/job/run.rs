//! One run: a prepared data set through the engine, from the first missing row to the files.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::JobError;
use super::device::{AnyBackend, Engine, Held};
use super::fault::Faulty;
use super::folder::{Opening, RunFolder};
use super::model::OpenModel;
use super::plan::{Wanted, host_budget, measured};
use super::prepare::Prepared;
use super::progress::Progress;
use super::record::{Recorder, blank_row};
use super::settings::{Effective, Settings};
use super::submit::{package_after, submission_format};
use super::verdict::judge_again;
use crate::batch::Job;
use crate::engine::checkpoint::{ByClass, Deviation, Precision};
use crate::engine::cpu::CpuOptions;
use crate::engine::cpu::path::CpuPath;
use crate::engine::cuda::Staging;
use crate::engine::generate::{GenerateOptions, Outcome as Generated, generate};
use crate::engine::plan::{CONTEXT_BYTES, MemoryPlan, ledger_table};
use crate::profile::Profile;
use crate::report::over_samples::over_samples;
use crate::report::tally::tally;
use crate::score::{self, Status};
use crate::submission::environment::{Environment, redact};
use crate::submission::identity::{GenerationIdentity, sha256_hex};
use crate::submission::manifest::{
    Origin, Outcome, RUN_SCHEMA, RunManifest, Session, Setting, Shard, Tally,
};
use crate::submission::prompts::{prompts_hash, write_prompts};
use crate::submission::questions::write_questions;
use crate::submission::write::{chosen_sample, write_submission};
use crate::submission::{ResultRow, Results, vote};
use crate::telemetry::device::DeviceLoad;
use crate::telemetry::memory::{MemoryEvent, MemoryLog, MemorySummary, SAMPLE_PERIOD};
use crate::telemetry::throughput::{ThroughputLog, ThroughputTotals};

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

/// Weights kept between the runs of one command, so that each model is loaded once.
pub type Weights = Option<LoadedWeights>;

/// Weights, how they were asked for, and what that did to their values.
pub struct LoadedWeights {
    precision: Precision,
    engine: Engine,
    held: Held,
    deviation: ByClass<Deviation>,
}

impl Run<'_> {
    pub(super) fn n_samples(&self) -> u32 {
        u32::try_from(self.settings.samples.value).unwrap_or(u32::MAX)
    }

    /// Longest reply of a second stage.
    pub fn second_budget(&self) -> usize {
        second_budget(&self.prepared.profile, &self.settings)
    }

    /// What the tokens depend on.
    ///
    /// # Errors
    /// `PODIUM_CPU` names a path that this machine does not have.
    pub fn identity(&self) -> Result<GenerationIdentity, JobError> {
        let settings = &self.settings;
        let budget = settings.max_new_tokens.value;
        // `--context` is part of the identity only where it takes a row's tokens away.
        let longest = self
            .prepared
            .longest_row(usize::MAX, budget, self.second_budget());
        let whole = self.model.checkpoint.config().max_context.min(longest);
        let mut identity = GenerationIdentity {
            dataset: self.prepared.dataset.content_hash.clone(),
            prompts: prompts_hash(&self.prepared.prompts),
            model: self.model.hash.clone(),
            tokenizer: self.model.tokenizer_hash.clone(),
            precision: self
                .model
                .effective_precision(self.precision.value)
                .name()
                .to_owned(),
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            seed: 0,
            max_new_tokens: budget,
            context: (self.max_context < whole).then_some(self.max_context),
            samples: self.n_samples(),
            answer_headroom: settings.answer_headroom.value,
            numerics: self.engine.numerics_id(
                self.model.checkpoint.config(),
                self.model.checkpoint.weight_format(self.precision.value),
                self.options.exact,
            )?,
            second_max_new_tokens: self
                .prepared
                .profile
                .second_stage
                .as_ref()
                .map(|_| self.second_budget()),
        };
        identity.set_sampling(&settings.sampling());
        Ok(identity)
    }

    /// Hash over what turns replies into verdicts and columns.
    pub fn scoring_hash(&self) -> String {
        scoring_hash(&self.prepared.profile)
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

    /// A new run's manifest.
    fn manifest(&self, path: &Path, identity: &GenerationIdentity) -> RunManifest {
        let mut environment = Environment::read(std::env::args());
        environment.cpu_path = CpuPath::choose().ok().map(|path| path.name().to_owned());
        environment.n_threads = Some(self.options.n_threads);
        self.engine.describe(&mut environment);
        let dataset_path = self.prepared.dataset.path.to_string_lossy();
        RunManifest {
            schema: RUN_SCHEMA.to_owned(),
            name: path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            generation_hash: identity.hash(),
            scoring_hash: self.scoring_hash(),
            scoring: Some(self.prepared.profile.scoring.clone()),
            generation: identity.clone(),
            dataset_path: redact(&dataset_path),
            model_path: redact(&self.model.name),
            profile: self.prepared.profile.name.clone(),
            config: self.config(),
            submission_format: submission_format(&self.prepared.profile),
            shard: self.shard(),
            n_rows: self.prepared.rows.len(),
            ledger: serde_json::Value::Null,
            memory_plan: serde_json::Value::Null,
            environment,
            sessions: Vec::new(),
            totals: ThroughputTotals::default(),
            tally: None,
        }
    }

    fn config(&self) -> BTreeMap<String, Setting> {
        let mut config = self.settings.config();
        let mut add = |name: &str, value: serde_json::Value, origin| {
            config.insert(name.to_owned(), Setting { value, origin });
        };
        add(
            "model",
            redact(&self.model_word.value).into(),
            self.model_word.origin,
        );
        let precision = self.precision.value;
        let origin = match precision {
            Precision::Stored => Origin::Model,
            _ => self.precision.origin,
        };
        add(
            "precision",
            self.model.effective_precision(precision).name().into(),
            origin,
        );
        let profile = match &self.profile_word {
            Some(word) => (redact(word), Origin::Flag),
            None => (self.prepared.profile.name.clone(), Origin::Default),
        };
        add("profile", profile.0.into(), profile.1);
        config
    }

    fn shard(&self) -> Option<Shard> {
        let shard = self.settings.shard.value?;
        Some(Shard {
            index: shard.index,
            count: shard.count,
        })
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

    /// Loads the weights where they are not loaded yet and allocates the rest.
    fn open(
        &self,
        plan: &MemoryPlan,
        weights: &mut Weights,
        manifest: &mut RunManifest,
        path: &Path,
        memory: &MemoryLog,
        quiet: bool,
    ) -> Result<AnyBackend, JobError> {
        let (model, deviation) = self.load(weights, plan)?;
        memory.event(MemoryEvent::Load, None);
        let mut ledger = plan.ledger.clone();
        measured(&mut ledger, &deviation);
        if ledger != plan.ledger && !quiet {
            let table = ledger_table(&ledger);
            crate::cli::print::tell(&format!("\nmeasured while loading\n{table}"));
        }
        manifest.ledger = serde_json::to_value(&ledger).unwrap_or_default();
        manifest.write(path)?;
        let mut backend = AnyBackend::new(model, plan.shape, self.options)?;
        let allocated = backend.get().memory();
        memory.event(MemoryEvent::Arena, Some(allocated));
        if allocated != plan.memory {
            return Err(JobError::Allocated {
                planned: plan.memory,
                allocated,
            });
        }
        Ok(backend)
    }

    fn load(
        &self,
        weights: &mut Weights,
        plan: &MemoryPlan,
    ) -> Result<(Held, ByClass<Deviation>), JobError> {
        let precision = self.model.effective_precision(self.precision.value);
        if let Some(loaded) = weights
            && loaded.precision == precision
            && loaded.engine == self.engine
        {
            return Ok((loaded.held.clone(), loaded.deviation));
        }
        // The other precision's weights go before these come.
        *weights = None;
        let checkpoint = &self.model.checkpoint;
        let host_memory = self.settings.host_memory.value;
        let staging = Staging::within(&plan.memory, host_memory, self.options.n_threads);
        let held = self.engine.load_within(checkpoint, precision, staging)?;
        let deviation = match &held {
            Held::Cpu(model) => model.deviation(),
            Held::Cuda(_) => checkpoint.deviation(checkpoint.weight_format(precision))?,
        };
        *weights = Some(LoadedWeights {
            precision,
            engine: self.engine,
            held: held.clone(),
            deviation,
        });
        Ok((held, deviation))
    }

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
    pub(super) fn judged(&self, results: &Results) -> Results {
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

/// Keys the generator: the first 8 bytes of the key's SHA-256.
fn row_hash(key: &str) -> u64 {
    first_8_bytes(key.as_bytes())
}

/// The same for a row's second stage, which would draw the first one's numbers again at the
/// positions that both have. 0xFF is in no key: keys are UTF-8.
pub fn second_row_hash(key: &str) -> u64 {
    first_8_bytes(&[key.as_bytes(), b"\xFFstage 2"].concat())
}

fn first_8_bytes(bytes: &[u8]) -> u64 {
    let hex = sha256_hex(bytes);
    hex.get(..16)
        .and_then(|hex| u64::from_str_radix(hex, 16).ok())
        .unwrap_or_default()
}

/// Hash over what turns replies into verdicts and columns.
pub fn scoring_hash(profile: &Profile) -> String {
    let parts = match profile.second_stage {
        None => serde_json::json!([profile.scoring, profile.submission]),
        Some(_) => {
            serde_json::json!([
                profile.scoring,
                profile.submission,
                profile.second_scoring()
            ])
        }
    };
    sha256_hex(parts.to_string().as_bytes())
}
