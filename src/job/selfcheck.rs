//! `podium selfcheck`: the promises about bits, proved on the user's own machine.
//!
//! Rows of very different lengths that share beginnings run through the model in many ways;
//! tokens, log-probability bits and the hash of every step's logits must be equal. The SIMD paths
//! that the processor has must give the same bits, too, all but `amx`, which has its own, and
//! teacher-forced log-probabilities must equal those of the generation.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::JobError;
use super::device::{self, AnyBackend, Engine, Held};
use super::model::OpenModel;
use super::plan::PREFILL_ROWS;
use super::precision;
use crate::batch::Job;
use crate::cli::SelfcheckArgs;
use crate::cli::print;
use crate::dataset::Message;
use crate::engine::cpu::CpuOptions;
use crate::engine::cpu::path::CpuPath;
use crate::engine::generate::{
    GenerateOptions, Generation, JobError as GenerateJobError, Observer, StepReport,
    forced_logprobs, generate,
};
use crate::engine::kv::pages_for;
use crate::engine::{EngineShape, SamplingParams, TokenId};
use crate::prompt::{Prompt, Reasoning, harmony};

/// Tokens a row may produce.
const MAX_NEW_TOKENS: usize = 96;

/// One way of running the rows.
struct Way {
    name: String,
    path: CpuPath,
    n_threads: usize,
    n_slots: usize,
    n_forks: usize,
    prefill_rows: usize,
    refill: bool,
    poison: bool,
    reversed: bool,
    /// Rows it runs: the first of all.
    n_rows: usize,
}

/// Rows for another instruction set: the portable one takes a hundred times as long.
const N_PATH_ROWS: usize = 4;

/// Runs the command; exit code 0 when everything is equal, 1 when something is not.
///
/// # Errors
/// The model cannot be opened or held.
pub fn selfcheck(args: &SelfcheckArgs) -> Result<u8, JobError> {
    let model = OpenModel::open(&args.model, false)?;
    let precision = precision(args.numerics.precision.as_deref())?;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let n_threads = args.numerics.threads.unwrap_or(cores);
    let exact = args.numerics.exact;
    let config = model.checkpoint.config();
    let format = model.checkpoint.weight_format(precision);
    let engine = device::choose(args.numerics.device, exact, config, format)?;
    let weights = engine.load(&model.checkpoint, precision, n_threads)?;
    let prompts = prompts(&model, args.rows)?;
    let native = CpuPath::choose()?;
    let base = |name: &str| Way {
        name: name.to_owned(),
        path: native,
        n_threads,
        n_slots: 8,
        n_forks: 4,
        prefill_rows: PREFILL_ROWS,
        refill: true,
        poison: false,
        reversed: false,
        n_rows: args.rows,
    };
    let mut ways = vec![
        Way {
            n_slots: args.rows,
            ..base("all rows at once")
        },
        Way {
            n_slots: 3,
            ..base("3 slots, refilled")
        },
        Way {
            refill: false,
            ..base("8 slots, not refilled")
        },
        Way {
            n_forks: 0,
            ..base("no shared prefixes")
        },
        Way {
            prefill_rows: 7,
            ..base("prefill 7 tokens at a time")
        },
        Way {
            n_threads: 1,
            ..base("1 thread")
        },
        Way {
            n_threads: n_threads + 1,
            ..base(&format!("{} threads", n_threads + 1))
        },
        Way {
            reversed: true,
            ..base("rows in reverse")
        },
        Way {
            poison: true,
            ..base("unused memory filled with NaN")
        },
    ];
    if engine != Engine::Cpu {
        // Neither threads nor instruction sets matter there.
        ways.retain(|way| way.n_threads == n_threads);
    }
    // Paths of common bits are held against the native one, or against the fastest of them.
    let has_common_bits = |path: &CpuPath| path.gives_common_bits(exact);
    let mut paths = CpuPath::available();
    paths.retain(|path| *path != native && engine == Engine::Cpu && has_common_bits(path));
    let common = match has_common_bits(&native) {
        true => Some(native),
        false => paths.pop(),
    };
    let of_path = |path: CpuPath, name: String| Way {
        path,
        n_rows: N_PATH_ROWS.min(args.rows),
        ..base(&name)
    };
    let path_ways: Vec<Way> = paths
        .into_iter()
        .map(|path| of_path(path, format!("instruction set {}", path.name())))
        .collect();
    let numerics = match engine {
        Engine::Cpu => {
            let mode = if exact { "exact" } else { "bf16" };
            format!("cpu/{}/{mode}", native.name())
        }
        Engine::Cuda(_) => engine.numerics_id(config, format, exact)?,
    };
    print::result(&format!(
        "{} rows of {} on {numerics}, each way against one row at a time",
        args.rows, model.name,
    ));
    let mut n_failed = 0;
    for (sampling, name) in [
        (SamplingParams::default(), "greedy"),
        (
            SamplingParams {
                temperature: 1.0,
                top_p: 0.95,
                ..Default::default()
            },
            "temperature 1",
        ),
    ] {
        let alone = Way {
            n_slots: 1,
            n_forks: 0,
            ..base("one row at a time")
        };
        let expected = run(&alone, &model, &weights, &prompts, sampling, exact)?;
        let mut hold = |ways: &[Way], expected: &BTreeMap<usize, Bits>| -> Result<(), JobError> {
            for way in ways {
                let found = run(way, &model, &weights, &prompts, sampling, exact)?;
                let n_same = expected
                    .iter()
                    .take(way.n_rows)
                    .filter(|(row, bits)| found.get(row) == Some(bits))
                    .count();
                n_failed += verdict(name, &way.name, n_same, way.n_rows);
            }
            Ok(())
        };
        hold(&ways, &expected)?;
        match common {
            Some(common) if common != native && !path_ways.is_empty() => {
                let way = of_path(common, "the instruction sets' base".to_owned());
                let expected = run(&way, &model, &weights, &prompts, sampling, exact)?;
                hold(&path_ways, &expected)?;
            }
            _ => hold(&path_ways, &expected)?,
        }
        let n_same = forced(&alone, &weights, &prompts, &expected, exact)?;
        n_failed += verdict(name, "teacher forcing", n_same, expected.len());
    }
    print::result(if n_failed == 0 {
        "every row has the same tokens, log-probabilities and logits in every way"
    } else {
        "some rows depend on how they were run: please report this with the lines above"
    });
    Ok(u8::from(n_failed > 0))
}

fn verdict(sampling: &str, way: &str, n_same: usize, n_rows: usize) -> usize {
    let ok = n_same == n_rows;
    let word = if ok { "equal" } else { "NOT EQUAL" };
    print::result(&format!(
        "  {sampling:<14} {way:<32} {word:<9} {n_same}/{n_rows} rows"
    ));
    usize::from(!ok)
}

/// What must be equal: output ids, the bits of their log-probability sum, the logits' hash.
type Bits = (Vec<TokenId>, u32, Option<u64>);

#[derive(Default)]
struct Collect {
    rows: BTreeMap<usize, Bits>,
}

impl Observer for Collect {
    fn finished(&mut self, done: Generation) {
        self.rows.insert(
            done.row,
            (done.output_ids, done.logprob_sum.to_bits(), done.trace_hash),
        );
    }

    fn failed(&mut self, _row: usize, _sample: u32, _error: GenerateJobError) {}

    fn step(&mut self, _report: &StepReport) {}
}

fn open(
    way: &Way,
    weights: &Held,
    prompts: &[Arc<[TokenId]>],
    exact: bool,
) -> Result<AnyBackend, JobError> {
    let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(1);
    let max_context = (longest + MAX_NEW_TOKENS).min(weights.config().max_context);
    let shape = EngineShape {
        n_slots: way.n_slots,
        n_forks: way.n_forks,
        n_pages: way.n_slots * pages_for(max_context) + 2 * way.n_forks,
        max_context,
        prefill_rows: way.prefill_rows,
    };
    let options = CpuOptions {
        n_threads: way.n_threads,
        exact,
        trace_hash: true,
        poison: way.poison,
    };
    AnyBackend::on_path(way.path, weights.clone(), shape, options)
}

fn run(
    way: &Way,
    model: &OpenModel,
    weights: &Held,
    prompts: &[Arc<[TokenId]>],
    sampling: SamplingParams,
    exact: bool,
) -> Result<BTreeMap<usize, Bits>, JobError> {
    let mut backend = open(way, weights, prompts, exact)?;
    let mut jobs: Vec<Job> = prompts
        .iter()
        .take(way.n_rows)
        .enumerate()
        .map(|(row, prompt)| Job {
            row,
            sample: 0,
            prompt: Arc::clone(prompt),
            max_new_tokens: MAX_NEW_TOKENS,
            row_hash: row as u64,
            may_go_on: false,
        })
        .collect();
    if way.reversed {
        jobs.reverse();
    }
    let options = GenerateOptions {
        refill: way.refill,
        prefix_reuse: way.n_forks > 0,
        ..GenerateOptions::new(sampling, Arc::clone(&model.stop_tokens))
    };
    let mut collect = Collect::default();
    generate(
        backend.get(),
        jobs,
        &options,
        &AtomicBool::new(false),
        &mut collect,
    )?;
    Ok(collect.rows)
}

/// Rows whose teacher-forced log-probabilities add up to the same bits.
fn forced(
    way: &Way,
    weights: &Held,
    prompts: &[Arc<[TokenId]>],
    expected: &BTreeMap<usize, Bits>,
    exact: bool,
) -> Result<usize, JobError> {
    let mut backend = open(way, weights, prompts, exact)?;
    let mut n_same = 0;
    for (&row, (output, sum_bits, _)) in expected {
        let Some(prompt) = prompts.get(row) else {
            continue;
        };
        let logprobs = forced_logprobs(backend.get(), prompt, output)?;
        let sum = logprobs.iter().fold(0.0f32, |sum, logprob| sum + logprob);
        n_same += usize::from(sum.to_bits() == *sum_bits);
    }
    Ok(n_same)
}

/// Prompts of different lengths; some share more than a page of context.
fn prompts(model: &OpenModel, n_rows: usize) -> Result<Vec<Arc<[TokenId]>>, JobError> {
    let context = "The numbers 3 14 15 92 65 35 are on the list. ".repeat(16);
    (0..n_rows)
        .map(|i| {
            let shared = match i % 4 {
                0 => context.as_str(),
                1 => &context[..context.len() / 2],
                _ => "",
            };
            let question = format!("{shared}{} + {} - {} = ?", 13 * i + 5, i * i + 1, 7 * i);
            let prompt = Prompt {
                reasoning: [Reasoning::Low, Reasoning::Medium, Reasoning::High][i % 3],
                date: None,
                instructions: Some("Think briefly, then give only the answer.".to_owned()),
                turns: vec![Message {
                    role: "user".to_owned(),
                    content: question,
                }],
            };
            let mut ids = model.tokenizer.encode(&harmony::render(&prompt))?;
            // A model of short context still has its check, on shorter rows.
            let most = model
                .checkpoint
                .config()
                .max_context
                .saturating_sub(MAX_NEW_TOKENS)
                .max(1);
            if ids.len() > most {
                ids.drain(..ids.len() - most);
            }
            Ok(ids.into())
        })
        .collect()
}
