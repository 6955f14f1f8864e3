//! The workloads on the CPU, beside what memory and multipliers give in the same process.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use rayon::ThreadPool;
use rayon::prelude::*;

use super::cost::Cost;
use super::report::{Limits, Report};
use super::workload::Workload;
use super::{Machine, measure, report, run_all, settings, workloads};
use crate::cli::{BenchArgs, print};
use crate::engine::cpu::amx;
use crate::engine::cpu::buffer::Buffer;
use crate::engine::cpu::gemm::Products;
use crate::engine::cpu::lanes::{LANES, fma_chain_in_pairs};
use crate::engine::cpu::model::CpuModel;
use crate::engine::cpu::numa;
use crate::engine::cpu::pairs::pair_chain;
use crate::engine::cpu::path::{CpuPath, on_each_path};
use crate::engine::cpu::weights::prefetch;
use crate::engine::cpu::{CpuBackend, CpuOptions, thread_pool};
use crate::engine::plan;
use crate::engine::{Backend, EngineError, EngineShape};
use crate::job::synthetic::{self, Synthetic};
use crate::job::{JobError, precision};
use crate::report::table::bytes;
use crate::submission::environment::Environment;

const WORKLOADS: &str = "prefill-512,decode-1,decode-8,decode-32,decode-64";
const PREFILL_ROWS: usize = 512;

/// Measured so often; the median is told.
const REPEATS: usize = 5;

/// Runs the command.
///
/// # Errors
/// Options that are of a GPU, too little memory, or routing that is degenerate.
pub fn bench(args: &BenchArgs, model: &Synthetic) -> Result<u8, JobError> {
    if args.kernels || !args.variants.is_empty() {
        return Err(JobError::Option {
            message: "`--kernels` and `--variants` are of a GPU".to_owned(),
        });
    }
    let workloads = workloads(args, WORKLOADS)?;
    let path = CpuPath::choose().map_err(EngineError::from)?;
    let options = CpuOptions {
        n_threads: args.threads.unwrap_or_else(n_cores),
        exact: args.exact,
        trace_hash: false,
        poison: false,
    };
    let format = synthetic::format(args.precision.as_deref())?;
    for workload in &workloads {
        let shape = shape(args, workload);
        let memory = CpuBackend::planned_memory(&model.config, format, &shape, &options);
        check_room(workload, plan::total(&memory), plan::available_memory())?;
    }
    let pool = thread_pool(options.n_threads)?;
    let limits = Limits {
        bytes_per_s: read_bandwidth(&pool, path)?,
        bytes_are: "read",
        flops_per_s: Some(multiply_rate(&pool, path, options.exact)),
        flops_are: "measured",
    };
    let precision = precision(args.precision.as_deref())?;
    let begun = Instant::now();
    let checkpoint = model.checkpoint()?;
    let loaded = CpuBackend::load(&checkpoint, precision, options.n_threads)?;
    drop(checkpoint);
    let device = Environment::read([]).cpu_model;
    let device = device.unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    print::tell(&format!(
        "{} on {device}, {} threads{}: {} made in {:.1} s; reads {:.1} GB/s, {} multiplies {:.0} \
         GFLOP/s",
        args.model,
        options.n_threads,
        match numa::n_nodes() {
            1 => String::new(),
            n => format!(", memory spread over {n} nodes"),
        },
        bytes(loaded.loaded_bytes().total()),
        begun.elapsed().as_secs_f64(),
        limits.bytes_per_s / 1e9,
        path.name(),
        limits.flops_per_s.unwrap_or_default() / 1e9,
    ));
    let machine = Machine {
        device,
        numerics: CpuBackend::numerics_id(path, options.exact),
        limits,
        cost: Cost::new(&loaded.config),
        weights: loaded.loaded_bytes(),
    };
    let loaded = Arc::new(loaded);
    run_all(args, &workloads, |workload| {
        run(args, &machine, path, &loaded, options, workload)
    })
}

fn run(
    args: &BenchArgs,
    machine: &Machine,
    path: CpuPath,
    loaded: &Arc<CpuModel>,
    options: CpuOptions,
    workload: &Workload,
) -> Result<Report, JobError> {
    let shape = shape(args, workload);
    let mut backend = CpuBackend::with_model(path, Arc::clone(loaded), shape, options)?;
    let measured = measure(&mut backend, workload, &settings(args), &machine.cost)?;
    Ok(report(args, machine, workload, measured, backend.memory()))
}

/// What the engine holds for a workload.
fn shape(args: &BenchArgs, workload: &Workload) -> EngineShape {
    workload.shape(args.prefill_rows.unwrap_or(PREFILL_ROWS))
}

/// Whether there is room for a workload, before time goes into weights and the system kills what takes too much;
/// 0 available bytes are those of a system that does not say.
fn check_room(workload: &Workload, needed: u64, available: u64) -> Result<(), JobError> {
    if available > 0 && needed > available {
        return Err(JobError::NoRoom {
            workload: workload.name.to_string(),
            needed,
            available,
        });
    }
    Ok(())
}

fn n_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Bytes a second that all threads together read from memory, in huge pages where there are such: by
/// the faster way, since which lines a CPU asks for by itself differs.
fn read_bandwidth(pool: &ThreadPool, path: CpuPath) -> Result<f64, EngineError> {
    const WORDS: usize = 1 << 28;
    let words: Buffer<u32> = Buffer::zeroed("memory to read", WORDS)?;
    let a_thread = WORDS.div_ceil(pool.current_num_threads());
    let rate = |ahead: usize| {
        let rates = (0..REPEATS).map(|_| {
            let begun = Instant::now();
            let parts = words.par_chunks(a_thread);
            let sum: u32 = pool.install(|| parts.map(|part| sum_of(path, part, ahead)).sum());
            black_box(sum);
            words.n_bytes() as f64 / begun.elapsed().as_secs_f64()
        });
        median(rates.collect())
    };
    Ok(rate(0).max(rate(2048)))
}

on_each_path! {
    /// Several sums side by side, so that memory is waited for and not the additions; lines are asked for
    /// so many words ahead, if any.
    fn sum_of(words: &[u32], ahead: usize) -> u32 = sum_of_body
}

#[inline(always)]
fn sum_of_body(words: &[u32], ahead: usize) -> u32 {
    let mut sums = [0u32; 64];
    for (i, step) in words.as_chunks::<64>().0.iter().enumerate() {
        if ahead > 0 {
            prefetch(words, i * 64 + ahead, 64);
        }
        for i in 0..sums.len() {
            sums[i] = sums[i].wrapping_add(step[i]);
        }
    }
    sums.iter().fold(0, |sum, &one| sum.wrapping_add(one))
}

/// Additions and multiplications a second of the path's products, from the first-level cache.
fn multiply_rate(pool: &ThreadPool, path: CpuPath, exact: bool) -> f64 {
    let products: fn(CpuPath) -> usize = match Products::of(path, exact) {
        Products::Values => multiply_values,
        Products::Pairs => multiply_pairs,
        Products::Tiles => |_| amx::multiply_from_cache(ROUNDS),
    };
    let rates = (0..REPEATS).map(|_| {
        let begun = Instant::now();
        let products: usize = pool.broadcast(|_| products(path)).into_iter().sum();
        2.0 * products as f64 / begun.elapsed().as_secs_f64()
    });
    median(rates.collect())
}

/// Rows, and k, of one product of [`multiply_rate`]; it is done so often.
const N_ROWS: usize = 12;
const N_K: usize = 256;
const ROUNDS: usize = 5000;

/// Gives the number of products.
fn multiply_values(path: CpuPath) -> usize {
    let (weights, rows) = ([0.5; N_K * LANES], [0.25; N_ROWS * N_K]);
    let starts: [usize; N_ROWS] = std::array::from_fn(|row| row * N_K);
    let mut sums = [[0.0; LANES]; N_ROWS];
    for _ in 0..ROUNDS {
        let weights = black_box(&weights);
        fma_chain_in_pairs(path, &mut sums, weights, &rows, &starts, N_K);
    }
    black_box(sums);
    ROUNDS * N_ROWS * LANES * N_K
}

/// As [`multiply_values`].
fn multiply_pairs(path: CpuPath) -> usize {
    const N_PAIRS: usize = N_K / 2;
    // Pairs of 0.5 in bf16.
    let (weights, rows) = (
        [0x3F00_3F00; N_PAIRS * LANES],
        [0x3F00_3F00; N_ROWS * N_PAIRS],
    );
    let starts: [usize; N_ROWS] = std::array::from_fn(|row| row * N_PAIRS);
    let mut sums = [[0.0; LANES]; N_ROWS];
    for _ in 0..ROUNDS {
        let weights = black_box(&weights);
        pair_chain(path, &mut sums, weights, 0, &rows, &starts, N_PAIRS);
    }
    black_box(sums);
    ROUNDS * N_ROWS * LANES * N_K
}
