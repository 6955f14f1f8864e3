//! `podium bench`: how fast the engine is on a fixed workload, beside what the memory could give.
//!
//! Random prompts that differ in every repeat, lengths that are given, no token ends a row. One
//! warm-up, then repeats, of which medians and spread are told. What the machine could give is
//! measured in the same process. Routing is looked at in the warm-up: where experts are hit less
//! than chance says, the run fails. What a step asks of a GPU besides its kernels is counted.

mod cost;
mod cpu;
mod gpu;
mod kernels;
mod measured;
mod report;
mod workload;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::JobError;
use super::device::{self, Engine};
use super::synthetic::{self, Synthetic};
use crate::cli::{BenchArgs, print};
use crate::engine::checkpoint::ClassBytes;
use crate::engine::cuda::counts::Counts;
use crate::engine::generate::{
    GenerateOptions, Generation, JobError as GenerateJobError, Observer, StepKind, StepReport,
    generate,
};
use crate::engine::{BackendMemory, SamplingParams};
use cost::Cost;
use measured::{Measured, Probed, Sums};
use report::{Limits, Report, Spread};
use workload::{WORKLOADS, Workload, YARDSTICK};

/// Share of the experts that chance would hit, below which routing is degenerate. What few rows hit
/// scatters more, for a row's experts are alike from step to step.
fn least_hits(n_slots: usize) -> f64 {
    const FEW_ROWS: usize = 32;
    if n_slots < FEW_ROWS { 0.9 } else { 0.95 }
}

/// Sums of one repeat.
#[derive(Default)]
struct Times {
    prefill_tokens: usize,
    prefill_seconds: f64,
    decode_tokens: usize,
    decode_seconds: f64,
    /// Row-steps while rows were waiting.
    live_row_steps: usize,
    padded_row_steps: usize,
    n_evicted: usize,
    n_failed: usize,
}

impl Observer for Times {
    fn finished(&mut self, _done: Generation) {}

    fn failed(&mut self, _row: usize, _sample: u32, _error: GenerateJobError) {
        self.n_failed += 1;
    }

    fn step(&mut self, report: &StepReport) {
        let (tokens, seconds) = match report.kind {
            StepKind::Prefill => (&mut self.prefill_tokens, &mut self.prefill_seconds),
            StepKind::Decode => (&mut self.decode_tokens, &mut self.decode_seconds),
        };
        *tokens += report.tokens;
        *seconds += report.seconds;
        self.n_evicted += report.n_evicted;
        if report.queue_len > 0 {
            self.live_row_steps += report.live_row_steps;
            self.padded_row_steps += report.padded_row_steps;
        }
    }
}

/// How rows are generated.
struct Settings {
    temperature: f32,
    steps_per_call: usize,
    repeats: usize,
    hide_lengths: bool,
}

/// What the repeats came to.
#[derive(Default)]
struct Measurement {
    prefill_tokens_per_s: Vec<f64>,
    decode_tokens_per_s: Vec<f64>,
    output_tokens_per_s: Vec<f64>,
    step_ms: Vec<f64>,
    /// While rows were waiting.
    live_share: Vec<f64>,
    prefill_flops_per_s: Vec<f64>,
    decode_flops_per_s: Vec<f64>,
    /// Of the last repeat.
    asked: Counts,
    n_evicted: usize,
    /// A step's mean.
    step_kv_bytes: f64,
    step_experts_by_chance: f64,
    /// Of the warm-up.
    experts_hit: f64,
    experts_by_chance: f64,
    n_steps: usize,
}

impl Measurement {
    fn add(&mut self, times: &Times, sums: &Sums, n_output: usize, seconds: f64) {
        self.prefill_tokens_per_s
            .push(times.prefill_tokens as f64 / times.prefill_seconds);
        self.decode_tokens_per_s
            .push(times.decode_tokens as f64 / times.decode_seconds);
        self.output_tokens_per_s.push(n_output as f64 / seconds);
        let n_steps = sums.n_steps as f64;
        self.step_ms.push(1000.0 * times.decode_seconds / n_steps);
        let row_steps = times.live_row_steps + times.padded_row_steps;
        if row_steps > 0 {
            self.live_share
                .push(times.live_row_steps as f64 / row_steps as f64);
        }
        self.prefill_flops_per_s
            .push(sums.prefill_flops / times.prefill_seconds);
        self.decode_flops_per_s
            .push(sums.step_flops / times.decode_seconds);
        self.asked = sums.asked;
        self.n_evicted = times.n_evicted;
        self.step_kv_bytes = sums.step_kv_bytes / n_steps;
        self.step_experts_by_chance = sums.experts_by_chance / n_steps;
        self.n_steps = sums.n_steps;
    }
}

/// Runs the command.
///
/// # Errors
/// No such device, model or workload, too little memory, or routing that is degenerate.
pub fn bench(args: &BenchArgs) -> Result<u8, JobError> {
    let model = Synthetic::named(&args.model)?;
    let format = synthetic::format(args.precision.as_deref())?;
    match device::choose(args.device, args.exact, &model.config, format)? {
        Engine::Cpu => cpu::bench(args, &model),
        Engine::Cuda(index) => gpu::bench(args, &model, index),
    }
}

/// The workloads that are asked for.
fn workloads(args: &BenchArgs, default: &str) -> Result<Vec<Workload>, JobError> {
    let names = args.workload.as_deref().unwrap_or(default).split(',');
    let found = |name: &str| {
        let known = Workload::named(name).or_else(|| Workload::of_shape(name));
        known.ok_or_else(|| JobError::Option {
            message: format!(
                "no workload `{name}`, expected {}, or ROWSxPROMPT/OUTPUT as 8x512/64",
                WORKLOADS.map(|workload| workload.name).join(", ")
            ),
        })
    };
    names.map(found).collect()
}

/// Runs workload after workload and prints what they come to.
fn run_all(
    args: &BenchArgs,
    workloads: &[Workload],
    mut run: impl FnMut(&Workload) -> Result<Report, JobError>,
) -> Result<u8, JobError> {
    let mut degenerate = None;
    let mut reports: Vec<Report> = Vec::new();
    for workload in workloads {
        let mut report = run(workload)?;
        let yardstick = reports.iter().find(|report| report.workload == YARDSTICK);
        report.set_beside(yardstick);
        if args.json {
            print::result(&serde_json::to_string(&report).unwrap_or_default());
        } else {
            print::result(&report.text());
        }
        if report.experts_hit < least_hits(report.slots) * report.experts_by_chance {
            degenerate = Some(&workload.name);
        }
        reports.push(report);
    }
    if !args.json {
        print::result(&report::table(&reports));
    }
    match degenerate {
        None => Ok(0),
        Some(name) => Err(JobError::Option {
            message: format!("routing is degenerate in `{name}`: too few experts were hit"),
        }),
    }
}

/// Where the workloads run.
struct Machine {
    device: String,
    numerics: String,
    limits: Limits,
    cost: Cost,
    weights: ClassBytes,
}

/// What a workload came to on a machine; what is particular to a GPU is left out.
fn report(
    args: &BenchArgs,
    machine: &Machine,
    workload: &Workload,
    measured: Measurement,
    memory: BackendMemory,
) -> Report {
    let (cost, weights) = (&machine.cost, &machine.weights);
    let is_uneven = measured.experts_hit / measured.experts_by_chance;
    let experts = cost.share_of_experts(measured.step_experts_by_chance * is_uneven);
    // Of the embedding a step reads its rows' vectors alone.
    let step_weight_bytes = (weights.total() - weights.embedding - weights.experts) as f64
        + weights.experts as f64 * experts;
    let step_bytes = step_weight_bytes + measured.step_kv_bytes;
    let step_ms = Spread::of(measured.step_ms);
    let share =
        step_ms.map(|step| step_bytes / (step.median / 1000.0) / machine.limits.bytes_per_s);
    Report {
        schema: "podium.bench/2",
        model: args.model.clone(),
        device: machine.device.clone(),
        numerics: machine.numerics.clone(),
        workload: workload.name.to_string(),
        rows: workload.n_rows,
        slots: workload.n_slots,
        shared_tokens: workload.shared,
        prompt_tokens: workload.prompt.to_string(),
        output_tokens: workload.output.to_string(),
        lengths_hidden: args.hide_lengths && workload.is_mixed(),
        repeats: args.repeats,
        prefill_tokens_per_s: Spread::of(measured.prefill_tokens_per_s),
        decode_tokens_per_s: Spread::of(measured.decode_tokens_per_s),
        output_tokens_per_s: Spread::of(measured.output_tokens_per_s),
        of_yardstick: None,
        live_share: Spread::of(measured.live_share),
        evicted_rows: measured.n_evicted,
        decode_step_ms: step_ms,
        step_weight_bytes,
        step_kv_bytes: measured.step_kv_bytes,
        share_of_bandwidth: share,
        limits: machine.limits,
        prefill_flops_per_s: Spread::of(measured.prefill_flops_per_s),
        decode_flops_per_s: Spread::of(measured.decode_flops_per_s),
        experts_hit: measured.experts_hit,
        experts_by_chance: measured.experts_by_chance,
        step_asked: None,
        memory,
        kernels: None,
    }
}

fn settings(args: &BenchArgs) -> Settings {
    Settings {
        temperature: args.temperature,
        steps_per_call: args.steps_per_call,
        repeats: args.repeats,
        hide_lengths: args.hide_lengths,
    }
}

/// Warm-up and repeats.
fn measure<B: Probed>(
    backend: &mut B,
    workload: &Workload,
    settings: &Settings,
    cost: &Cost,
) -> Result<Measurement, JobError> {
    let n_vocab = backend.info().n_vocab;
    let sampling = SamplingParams {
        temperature: settings.temperature,
        ..SamplingParams::default()
    };
    let mut options = GenerateOptions::new(sampling, Arc::new([]));
    options.steps_per_call = settings.steps_per_call;
    let n_output = workload.n_output();
    let mut measurement = Measurement::default();
    for repeat in 0..=u32::try_from(settings.repeats).unwrap_or(u32::MAX) {
        let mut jobs = workload.jobs(n_vocab, repeat);
        let mut hidden = None;
        if settings.hide_lengths {
            let lengths = jobs.iter().map(|job| (job.row_hash, job.max_new_tokens));
            hidden = Some(lengths.collect());
            for job in &mut jobs {
                job.max_new_tokens = workload.output.most();
            }
        }
        let is_warm_up = repeat == 0;
        let mut times = Times::default();
        let mut measured = Measured::new(backend, cost, workload.shared, is_warm_up, hidden);
        let begun = Instant::now();
        let stop = AtomicBool::new(false);
        generate(&mut measured, jobs, &options, &stop, &mut times)?;
        let seconds = begun.elapsed().as_secs_f64();
        let sums = measured.sums;
        // A row that is evicted makes some of its tokens twice.
        let is_short = times.decode_tokens < n_output;
        if times.n_failed > 0 || is_short {
            return Err(JobError::Option {
                message: format!(
                    "workload `{}` made {} of {n_output} tokens, {} rows failed",
                    workload.name, times.decode_tokens, times.n_failed
                ),
            });
        }
        if is_warm_up {
            let looks = sums.looks.max(1) as f64;
            measurement.experts_hit = sums.hit / looks;
            measurement.experts_by_chance = sums.hit_by_chance / looks;
        } else {
            measurement.add(&times, &sums, n_output, seconds);
        }
    }
    Ok(measurement)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::EngineError;
    use crate::engine::scripted::ScriptedBackend;
    use crate::engine::shapes;

    impl Probed for ScriptedBackend {
        fn counts(&self) -> Counts {
            Counts {
                launches: self.counts().decoded_tokens as u64,
                ..Counts::default()
            }
        }

        fn keep_routing(&mut self, _keep: bool) {}

        fn routed(&self, n_rows: usize) -> Result<Vec<Vec<u32>>, EngineError> {
            // Two layers: all others, and the same four for all.
            let n_entries = 4 * n_rows as u32;
            Ok(vec![
                (0..n_entries).collect(),
                (0..n_entries).map(|i| i % 4).collect(),
            ])
        }
    }

    fn measure_scripted(workload: &Workload, hide_lengths: bool) -> Measurement {
        let shape = workload.shape(8192);
        let answer = |_: &[u32], start: &crate::engine::SlotStart| {
            vec![start.row_hash as u32 % 100; start.max_new_tokens]
        };
        let mut backend = ScriptedBackend::from_fn(shape, 100, answer);
        let settings = Settings {
            temperature: 0.0,
            steps_per_call: 8,
            repeats: 1,
            hide_lengths,
        };
        let cost = Cost::new(&shapes::named("gpt-oss-20b").expect("a shape"));
        measure(&mut backend, workload, &settings, &cost).expect("it runs")
    }

    #[test]
    fn mixed_rows_keep_the_slots_busy() {
        // An eighth of the workload, with as many rows a slot.
        let mixed = Workload::named("mixed").expect("it is listed");
        let mixed = Workload {
            n_rows: mixed.n_rows / 8,
            n_slots: mixed.n_slots / 8,
            ..mixed
        };
        for hide_lengths in [false, true] {
            let measured = measure_scripted(&mixed, hide_lengths);
            let share = measured.live_share[0];
            assert!(share >= 0.92, "{share} of the row-steps were live");
            assert_eq!(measured.n_evicted, 0);
            assert_eq!(measured.asked.launches, mixed.n_output() as u64);
        }
    }

    #[test]
    fn experts_hit_are_those_of_all_layers() {
        let workload = Workload::named("b64").expect("it is listed");
        let measured = measure_scripted(&workload, false);
        // Of two layers one has an expert of its own for every entry, the other four for all.
        assert_eq!(measured.experts_hit, f64::midpoint(4.0 * 64.0, 4.0));
    }

    #[test]
    fn a_long_shared_beginning_is_prefilled_once() {
        let workload = Workload {
            n_rows: 32,
            n_slots: 32,
            ..Workload::named("prefix-long").expect("it is listed")
        };
        let jobs = workload.jobs(100, 0);
        let cost = Cost::new(&shapes::named("gpt-oss-20b").expect("a shape"));
        let mut backend = ScriptedBackend::from_fn(workload.shape(8192), 100, |_, start| {
            vec![1; start.max_new_tokens]
        });
        let mut measured = Measured::new(&mut backend, &cost, 8192, false, None);
        let options = GenerateOptions::new(SamplingParams::default(), Arc::new([]));
        let mut times = Times::default();
        let stop = AtomicBool::new(false);
        generate(&mut measured, jobs, &options, &stop, &mut times).expect("it runs");
        // The last token of a prompt is a decode row.
        assert_eq!(backend.counts().prefilled_tokens, 8192 + 32 * 63);
    }
}
