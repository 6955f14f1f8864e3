//! The ledger and memory plan of a model: for `podium plan`, and for a run before it loads.

use super::JobError;
use super::model::OpenModel;
use super::precision;
use crate::cli::eval::PlanArgs;
use crate::cli::print;
use crate::cli::values::AutoOr;
use crate::engine::checkpoint::{ExpertFormat, Precision, WeightFormat};
use crate::engine::cpu::model::CpuModel;
use crate::engine::cpu::{CpuBackend, CpuOptions};
use crate::engine::plan::{
    self, BatchSize, Budget, LedgerEntry, MemoryPlan, PlanRequest, available_memory, grid,
    grid_table,
};

/// Rows of one prefill pass: enough to reuse each unpacked weight tile well, small enough that
/// the workspace stays a few megabytes a layer.
pub const PREFILL_ROWS: usize = 512;

/// What a run asks of the plan.
pub struct Wanted {
    pub batch: AutoOr,
    pub max_context: usize,
    pub longest_prompt: usize,
    pub n_jobs: usize,
    pub prefix_reuse: bool,
    pub host_memory: Option<u64>,
}

/// Bytes of each class of tensors as stored and as held at `precision`.
///
/// # Errors
/// A precision that this version does not have.
pub fn ledger(model: &OpenModel, precision: Precision) -> Result<Vec<LedgerEntry>, JobError> {
    let checkpoint = &model.checkpoint;
    let format: WeightFormat = checkpoint.weight_format(precision)?;
    let stored = checkpoint.stored_bytes()?;
    let loaded = CpuModel::planned_bytes(checkpoint.config(), format);
    let stored_experts = checkpoint.expert_format();
    let entries = stored.classes().into_iter().zip(loaded.classes());
    Ok(entries
        .map(|((class, stored_bytes), (_, loaded_bytes))| {
            let (scheme, lossless) = match (class, stored_experts, format.experts) {
                ("experts", ExpertFormat::Bf16, ExpertFormat::Mxfp4) => ("mxfp4", Some(false)),
                ("experts", _, ExpertFormat::Mxfp4) => ("mxfp4", Some(true)),
                // Vectors stored in f32 stay in f32; matrices are bf16.
                _ => ("bf16", Some(true)),
            };
            LedgerEntry {
                class: class.to_owned(),
                scheme: scheme.to_owned(),
                stored_bytes,
                loaded_bytes,
                lossless,
            }
        })
        .collect())
}

/// Chooses slots and pages for a run.
///
/// # Errors
/// Nothing fits, or a precision that this version does not have.
pub fn plan_run(
    model: &OpenModel,
    precision: Precision,
    options: &CpuOptions,
    wanted: &Wanted,
) -> Result<MemoryPlan, JobError> {
    let format = model.checkpoint.weight_format(precision)?;
    let request = PlanRequest {
        ledger: ledger(model, precision)?,
        budget: match wanted.host_memory {
            Some(bytes) => Budget::given(bytes),
            None => Budget::of_available(available_memory()),
        },
        batch: match wanted.batch {
            AutoOr::Auto => BatchSize::Auto,
            AutoOr::Exactly(n_slots) => BatchSize::Slots(n_slots),
        },
        max_context: wanted.max_context,
        longest_prompt: wanted.longest_prompt,
        n_jobs: wanted.n_jobs,
        prefix_reuse: wanted.prefix_reuse,
        prefill_rows: PREFILL_ROWS,
    };
    let config = model.checkpoint.config();
    Ok(plan::plan(&request, |shape| {
        CpuBackend::planned_memory(config, format, shape, options)
    })?)
}

/// `podium plan`.
///
/// # Errors
/// No such model, or nothing fits.
pub fn plan_command(args: &PlanArgs) -> Result<u8, JobError> {
    let model = OpenModel::open(&args.model)?;
    let precision = precision(args.precision.as_deref())?;
    let options = CpuOptions {
        n_threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
        exact: args.exact,
        trace_hash: false,
        poison: false,
    };
    let config = model.checkpoint.config();
    let max_context = args
        .context
        .exactly()
        .unwrap_or(config.max_context)
        .min(config.max_context);
    let wanted = Wanted {
        batch: args.batch,
        max_context,
        longest_prompt: max_context - 1,
        n_jobs: args.batch.exactly().unwrap_or(plan::MAX_AUTO_SLOTS),
        prefix_reuse: true,
        host_memory: args.host_memory.map(|bytes| bytes.0),
    };
    let plan = plan_run(&model, precision, &options, &wanted)?;
    let format = model.checkpoint.weight_format(precision)?;
    let slots = [1, 8, 32, 64, 128];
    let contexts: Vec<usize> = [1024, 4096, 16_384, 65_536, 131_072]
        .into_iter()
        .filter(|&context| context < config.max_context)
        .chain([config.max_context])
        .collect();
    let cells = grid(&slots, &contexts, PREFILL_ROWS, |shape| {
        CpuBackend::planned_memory(config, format, shape, &options)
    });
    if args.json {
        let document = serde_json::json!({
            "schema": "podium.plan/1",
            "model": model.name,
            "precision": model.effective_precision(precision).name(),
            "plan": plan,
            "grid": cells,
        });
        print::result(&document.to_string());
    } else {
        let name = model.effective_precision(precision).name();
        print::result(&format!(
            "{} in {name}\n\n{plan}\nbytes of slots x context (* does not fit {})\n\n{}",
            model.name,
            plan::bytes_text(plan.budget_bytes),
            grid_table(&cells, plan.budget_bytes)
        ));
    }
    Ok(0)
}
