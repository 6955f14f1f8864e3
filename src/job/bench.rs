//! `podium bench`: how fast the engine is on a fixed workload, beside what the memory could give.
//!
//! Equal lengths, random prompts that differ in every repeat, no token ends a row. One warm-up,
//! then repeats, of which medians and spread are told. The copy bandwidth is measured in the same
//! process. Routing is looked at: where experts are hit less than chance says, the run fails.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::JobError;
use super::synthetic;
use crate::batch::Job;
use crate::cli::{BenchArgs, print};
use crate::engine::cuda::device::{self, Device};
use crate::engine::cuda::{CudaBackend, CudaOptions, Loaded};
use crate::engine::generate::{
    GenerateOptions, Generation, JobError as GenerateJobError, Observer, StepKind, StepReport,
    generate,
};
use crate::engine::kv::pages_for;
use crate::engine::{
    Backend, EngineShape, PageId, SamplingParams, SequenceId, SlotStart, Span, TokenId,
};

/// Equal rows: a shared beginning, an own rest, a reply.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    pub name: &'static str,
    pub n_rows: usize,
    /// Rows at once.
    pub n_slots: usize,
    pub shared: usize,
    pub prompt: usize,
    pub output: usize,
}

const fn workload(
    name: &'static str,
    n_rows: usize,
    n_slots: usize,
    shared: usize,
    prompt: usize,
    output: usize,
) -> Workload {
    Workload {
        name,
        n_rows,
        n_slots,
        shared,
        prompt,
        output,
    }
}

/// All workloads by name.
pub const WORKLOADS: [Workload; 7] = [
    workload("smoke", 4, 4, 0, 64, 16),
    workload("single", 1, 1, 0, 128, 256),
    workload("b64", 64, 64, 0, 512, 512),
    workload("b256", 256, 256, 0, 512, 512),
    workload("prefill", 64, 64, 0, 2048, 1),
    workload("prefix", 512, 256, 1024, 64, 128),
    workload("prefix-long", 256, 256, 8192, 64, 128),
];

/// Share of the experts that chance would hit, below which routing is degenerate.
const LEAST_HITS: f64 = 0.95;

/// Sums of one repeat.
#[derive(Default)]
struct Times {
    prefill_tokens: usize,
    prefill_seconds: f64,
    decode_tokens: usize,
    decode_seconds: f64,
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
    }
}

/// A number over the repeats.
#[derive(Clone, Copy, Debug, serde::Serialize)]
struct Spread {
    median: f64,
    least: f64,
    most: f64,
}

impl Spread {
    /// Nothing for no numbers.
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.retain(|value| value.is_finite());
        values.sort_by(f64::total_cmp);
        Some(Self {
            median: *values.get(values.len() / 2)?,
            least: *values.first()?,
            most: *values.last()?,
        })
    }
}

/// Runs the command.
///
/// # Errors
/// No GPU, no such model or workload, too little memory, or routing that is degenerate.
pub fn bench(args: &BenchArgs) -> Result<u8, JobError> {
    let (config, seed) = synthetic::parse(&args.model)?;
    let mut workloads = Vec::new();
    for name in args.workload.split(',') {
        let found = WORKLOADS.iter().find(|workload| workload.name == name);
        workloads.push(*found.ok_or_else(|| JobError::Option {
            message: format!(
                "no workload `{name}`, expected {}",
                WORKLOADS.map(|workload| workload.name).join(", ")
            ),
        })?);
    }
    let index = super::device::cuda_index(args.device)?;
    let device = Device::open(index).map_err(crate::engine::EngineError::from)?;
    let bandwidth = device::copy_bandwidth(&device).map_err(crate::engine::EngineError::from)?;
    let begun = Instant::now();
    let format = synthetic::format(args.precision.as_deref())?;
    let loaded = Arc::new(Loaded::synthetic(&config, format, seed, index)?);
    let load_seconds = begun.elapsed().as_secs_f64();
    print::tell(&format!(
        "{} on {}: loaded in {load_seconds:.1} s, {} kernel files compiled, copy {:.0} GB/s",
        args.model,
        device.name,
        loaded.kernels.n_compiled,
        bandwidth / 1e9
    ));
    if !args.variants.is_empty() {
        super::variants::time_variants(&loaded, &args.variants)?;
        return Ok(0);
    }
    let mut degenerate = None;
    for workload in &workloads {
        let report = run(args, &loaded, workload, bandwidth)?;
        if args.json {
            print::result(&report.to_string());
        }
        let of = |key: &str| report[key].as_f64().unwrap_or_default();
        if of("experts_hit") < LEAST_HITS * of("experts_by_chance") {
            degenerate = Some(workload.name);
        }
    }
    let total = loaded.model.loaded_bytes().total();
    print::tell(&format!("weights on the device: {total} bytes"));
    match degenerate {
        None => Ok(0),
        Some(name) => Err(JobError::Option {
            message: format!("routing is degenerate in `{name}`: too few experts were hit"),
        }),
    }
}

fn shape_of(workload: &Workload, prefill_rows: usize) -> EngineShape {
    let longest = workload.shared + workload.prompt + workload.output;
    let own = pages_for(longest) - workload.shared / crate::engine::PAGE_POSITIONS;
    // A refill keeps a quarter as many pages free as there are rows.
    let n_pages = workload.n_slots * own + pages_for(workload.shared) + workload.n_slots / 4 + 8;
    EngineShape {
        n_slots: workload.n_slots,
        n_forks: if workload.shared > 0 { 4 } else { 0 },
        n_pages,
        max_context: longest,
        prefill_rows,
    }
}

fn prompts(workload: &Workload, n_vocab: usize, repeat: u32) -> Vec<Arc<[TokenId]>> {
    let token = |row: usize, i: usize| {
        let [word, ..] =
            crate::engine::sample::philox4x32([row as u32, i as u32, repeat, 0], [0x70D1, 0xBE7C]);
        ((u64::from(word) * n_vocab as u64) >> 32) as TokenId
    };
    (0..workload.n_rows)
        .map(|row| {
            let shared = (0..workload.shared).map(|i| token(usize::MAX, i));
            let own = (0..workload.prompt).map(|i| token(row, workload.shared + i));
            shared.chain(own).collect()
        })
        .collect()
}

fn run(
    args: &BenchArgs,
    loaded: &Arc<Loaded>,
    workload: &Workload,
    bandwidth: f64,
) -> Result<serde_json::Value, JobError> {
    let shape = shape_of(workload, args.prefill_rows);
    let mut backend = CudaBackend::new(Arc::clone(loaded), shape, CudaOptions::default())?;
    let n_vocab = backend.info().n_vocab;
    let sampling = SamplingParams {
        temperature: args.temperature,
        ..SamplingParams::default()
    };
    let mut options = GenerateOptions::new(sampling, Arc::new([]));
    options.steps_per_call = args.steps_per_call;
    let (mut prefill, mut decode, mut whole, mut step_ms) = (vec![], vec![], vec![], vec![]);
    for repeat in 0..=args.repeats as u32 {
        let jobs = prompts(workload, n_vocab, repeat)
            .into_iter()
            .enumerate()
            .map(|(row, prompt)| Job {
                row,
                sample: 0,
                prompt,
                max_new_tokens: workload.output,
                row_hash: row as u64,
            })
            .collect();
        let mut times = Times::default();
        let begun = Instant::now();
        let stop = AtomicBool::new(false);
        generate(&mut backend, jobs, &options, &stop, &mut times)?;
        let seconds = begun.elapsed().as_secs_f64();
        let n_output = workload.n_rows * workload.output;
        if times.n_failed > 0 || times.decode_tokens != n_output {
            return Err(JobError::Option {
                message: format!(
                    "workload `{}` made {} of {n_output} tokens, {} rows failed",
                    workload.name, times.decode_tokens, times.n_failed
                ),
            });
        }
        // The first is the warm-up.
        if repeat > 0 {
            prefill.push(times.prefill_tokens as f64 / times.prefill_seconds);
            decode.push(times.decode_tokens as f64 / times.decode_seconds);
            whole.push(n_output as f64 / seconds);
            let n_steps = times.decode_tokens as f64 / workload.n_slots as f64;
            step_ms.push(1000.0 * times.decode_seconds / n_steps);
        }
    }
    let hits = experts_hit(&backend, workload)?;
    let weights = loaded.model.loaded_bytes();
    // Of the embedding a step reads its rows' vectors alone.
    let expert_share = hits.0 / loaded.model.config.n_experts as f64;
    let weight_bytes = (weights.total() - weights.embedding - weights.experts) as f64
        + weights.experts as f64 * expert_share;
    let context = (workload.shared + workload.prompt + workload.output / 2) as f64;
    let kv_bytes = workload.n_slots as f64 * kv_bytes_of(loaded, context);
    let step_bytes = weight_bytes + kv_bytes;
    let step = Spread::of(step_ms);
    let share = step.map(|step| step_bytes / (step.median / 1000.0) / bandwidth);
    let kernels = if args.kernels {
        Some(kernel_times(loaded, workload, args.prefill_rows)?)
    } else {
        None
    };
    let report = serde_json::json!({
        "schema": "podium.bench/1",
        "model": args.model,
        "device": loaded.device.name,
        "numerics": backend.info().numerics_id,
        "workload": workload.name,
        "rows": workload.n_rows,
        "slots": workload.n_slots,
        "shared_tokens": workload.shared,
        "prompt_tokens": workload.prompt,
        "output_tokens": workload.output,
        "repeats": args.repeats,
        "prefill_tokens_per_s": Spread::of(prefill),
        "decode_tokens_per_s": Spread::of(decode),
        "output_tokens_per_s": Spread::of(whole),
        "decode_step_ms": step,
        "step_weight_bytes": weight_bytes,
        "step_kv_bytes": kv_bytes,
        "share_of_copy_bandwidth": share,
        "copy_bytes_per_s": bandwidth,
        "experts_hit": hits.0,
        "experts_by_chance": hits.1,
        "memory": backend.memory(),
        "kernels": kernels,
    });
    if !args.json {
        let of = |key: &str| report[key]["median"].as_f64().unwrap_or(f64::NAN);
        let spread = |key: &str| {
            let (least, most) = (&report[key]["least"], &report[key]["most"]);
            let (least, most) = (least.as_f64().unwrap_or(0.0), most.as_f64().unwrap_or(0.0));
            format!("{:.0} ({least:.0} to {most:.0})", of(key))
        };
        print::result(&format!(
            "{}: {} x {}+{}/{}, {} slots\n  prefill {} tok/s, decode {} tok/s, whole {} output \
             tok/s\n  step {:.3} ms, {:.2} GB a step, {:.0} % of the copy bandwidth; {:.1} of {:.1} \
             experts hit",
            workload.name,
            workload.n_rows,
            workload.shared,
            workload.prompt,
            workload.output,
            workload.n_slots,
            spread("prefill_tokens_per_s"),
            spread("decode_tokens_per_s"),
            spread("output_tokens_per_s"),
            of("decode_step_ms"),
            step_bytes / 1e9,
            100.0 * share.unwrap_or(f64::NAN),
            hits.0,
            hits.1,
        ));
        for (phase, times) in kernels.iter().flat_map(|k| k.as_object()).flatten() {
            print::result(&format!("  {phase}"));
            for time in times.as_array().into_iter().flatten() {
                print::result(&format!(
                    "    {:<28} {:>5} launches {:>9.3} ms",
                    time[0].as_str().unwrap_or_default(),
                    time[1],
                    time[2].as_f64().unwrap_or_default()
                ));
            }
        }
    }
    Ok(report)
}

/// Bytes of KV that a step reads for a row of `context` positions.
fn kv_bytes_of(loaded: &Loaded, context: f64) -> f64 {
    let config = &loaded.model.config;
    let window = (config.sliding_window as f64).min(context);
    let a_position = (4 * config.n_kv_heads * config.head_dim) as f64;
    let n_layers = |kind| config.n_layers_of(kind) as f64;
    a_position
        * (n_layers(crate::engine::config::LayerKind::Full) * context
            + n_layers(crate::engine::config::LayerKind::Sliding) * window)
}

/// Distinct experts in the last layer of the latest step, and how many chance would give.
fn experts_hit(backend: &CudaBackend, workload: &Workload) -> Result<(f64, f64), JobError> {
    let config = &backend.loaded().model.config;
    let n_rows = workload.n_slots.min(workload.n_rows);
    let mut experts = backend.routed(n_rows)?;
    experts.retain(|&expert| expert != u32::MAX);
    let n_live = experts.len() / config.n_experts_per_token;
    experts.sort_unstable();
    experts.dedup();
    let n = config.n_experts as f64;
    let missed = 1.0 - config.n_experts_per_token as f64 / n;
    Ok((experts.len() as f64, n * (1.0 - missed.powi(n_live as i32))))
}

/// Times of each kernel in a prefill pass and in a step right after the prompts.
fn kernel_times(
    loaded: &Arc<Loaded>,
    workload: &Workload,
    prefill_rows: usize,
) -> Result<serde_json::Value, JobError> {
    let plain = Workload {
        shared: 0,
        prompt: workload.shared + workload.prompt,
        n_rows: workload.n_slots,
        ..*workload
    };
    let shape = shape_of(&plain, prefill_rows);
    let mut backend = CudaBackend::new(Arc::clone(loaded), shape, CudaOptions::default())?;
    let pages = pages_for(shape.max_context);
    let mut spans = Vec::new();
    let prompts = prompts(&plain, backend.info().n_vocab, 99);
    for (slot, prompt) in prompts.iter().enumerate() {
        for index in 0..pages {
            let page = PageId((slot * pages + index) as u32);
            backend.map_page(SequenceId(slot as u32), index, page);
        }
        spans.push(Span {
            sequence: SequenceId(slot as u32),
            start: 0,
            tokens: prompt[..prompt.len() - 1].into(),
        });
    }
    // The first pass warms up, the second is timed.
    let n_first = (prefill_rows / (plain.prompt - 1)).clamp(1, spans.len());
    let rest = spans.split_off(n_first.min(spans.len() / 2));
    backend.prefill(&spans)?;
    let timed_rows = rest.iter().take(n_first).cloned().collect::<Vec<_>>();
    let prefill = loaded.kernels.timed(|| backend.prefill(&timed_rows))?;
    for span in rest.iter().skip(n_first) {
        backend.prefill(std::slice::from_ref(span))?;
    }
    for (slot, prompt) in prompts.iter().enumerate() {
        backend.start(&SlotStart {
            slot: SequenceId(slot as u32),
            token: prompt[prompt.len() - 1],
            position: prompt.len() - 1,
            sampling: SamplingParams::default(),
            row_hash: slot as u64,
            sample: 0,
            stop_tokens: Arc::new([]),
            max_new_tokens: plain.output,
        })?;
    }
    if plain.output < 4 {
        return Ok(serde_json::json!({ "prefill pass": prefill }));
    }
    backend.time_step()?;
    let step = backend.time_step()?;
    Ok(serde_json::json!({ "prefill pass": prefill, "decode step": step }))
}
