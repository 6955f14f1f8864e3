//! The workloads on a GPU: weights made in place, steps as captured graphs.

use std::sync::Arc;
use std::time::Instant;

use super::cost::Cost;
use super::report::{Asked, Limits, Report};
use super::workload::Workload;
use super::{Machine, kernels, measure, report, run_all, settings, workloads};
use crate::cli::{BenchArgs, print};
use crate::engine::cuda::device::{self, Device};
use crate::engine::cuda::{CudaBackend, CudaOptions, Loaded};
use crate::engine::{Backend, EngineError};
use crate::job::JobError;
use crate::job::synthetic::{self, Synthetic};
use crate::job::variants::time_variants;

const WORKLOAD: &str = "b64";
const PREFILL_ROWS: usize = 16_384;

/// Runs the command on GPU `index`.
///
/// # Errors
/// A GPU that cannot be used, too little memory, or routing that is degenerate.
pub fn bench(args: &BenchArgs, model: &Synthetic, index: u32) -> Result<u8, JobError> {
    model.check_in_place()?;
    let workloads = workloads(args, WORKLOAD)?;
    let device = Device::open(index).map_err(EngineError::from)?;
    let bandwidth = device::copy_bandwidth(&device).map_err(EngineError::from)?;
    let begun = Instant::now();
    let format = synthetic::format(args.precision.as_deref())?;
    let loaded = Loaded::synthetic(&model.config, format, model.seed, index)?;
    let loaded = Arc::new(loaded);
    let load_seconds = begun.elapsed().as_secs_f64();
    print::tell(&format!(
        "{} on {}: loaded in {load_seconds:.1} s, {} kernel files compiled, copy {:.0} GB/s",
        args.model,
        device.name,
        loaded.kernels.n_compiled,
        bandwidth / 1e9
    ));
    if !args.variants.is_empty() {
        time_variants(&loaded, &args.variants)?;
        return Ok(0);
    }
    let weights = loaded.model.loaded_bytes();
    let limits = Limits {
        bytes_per_s: bandwidth,
        bytes_are: "copied",
        flops_per_s: loaded.device.nominal_matrix_flops(),
        flops_are: "nominal",
    };
    let code = run_all(args, &workloads, |workload| {
        run(args, &loaded, workload, limits)
    })?;
    let total = weights.total();
    print::tell(&format!("weights on the device: {total} bytes"));
    Ok(code)
}

fn run(
    args: &BenchArgs,
    loaded: &Arc<Loaded>,
    workload: &Workload,
    limits: Limits,
) -> Result<Report, JobError> {
    let shape = workload.shape(args.prefill_rows.unwrap_or(PREFILL_ROWS));
    let mut backend = CudaBackend::new(Arc::clone(loaded), shape, CudaOptions::default())?;
    let machine = Machine {
        device: loaded.device.name.clone(),
        numerics: backend.info().numerics_id.clone(),
        limits,
        cost: Cost::new(&loaded.model.config),
        weights: loaded.model.loaded_bytes(),
    };
    let measured = measure(&mut backend, workload, &settings(args), &machine.cost)?;
    let kernels = if args.kernels {
        Some(kernels::times(&mut backend, workload)?)
    } else {
        None
    };
    let n_steps = measured.n_steps.max(1) as f64;
    let (asked, a_step) = (measured.asked, |n: u64| n as f64 / n_steps);
    Ok(Report {
        step_asked: Some(Asked {
            launches: a_step(asked.launches + asked.graph_launches),
            allocations: a_step(asked.allocations),
            waits: a_step(asked.waits),
            bytes_to_host: a_step(asked.bytes_to_host),
            bytes_to_device: a_step(asked.bytes_to_device),
        }),
        kernels,
        ..report(args, &machine, workload, measured, backend.memory())
    })
}
