//! The ledger and memory plan of a model: for `podium plan`, and for a run before it loads.

use super::JobError;
use super::model::OpenModel;
use super::precision;
use crate::cli::eval::PlanArgs;
use crate::cli::print;
use crate::cli::values::{AutoOr, Bytes};
use crate::engine::checkpoint::{
    ByClass, Checkpoint, ClassBytes, Deviation, MatrixFormat, Precision, VectorFormat, WeightFormat,
};
use crate::engine::config::ModelConfig;
use crate::engine::cpu::model::CpuModel;
use crate::engine::cpu::{CpuBackend, CpuOptions};
use crate::engine::plan::{
    self, BatchSize, Budget, Card, LedgerEntry, MemoryPlan, PlanRequest, PrecisionFit,
    available_memory, bytes_text, fit, fit_table, grid, grid_table,
};
use crate::engine::shapes;

/// Rows of one prefill pass on the CPU: enough to reuse each unpacked weight tile well, small
/// enough that the workspace stays a few megabytes a layer.
pub const PREFILL_ROWS: usize = 512;

/// Rows of one prefill pass on a card, which needs more of them to be busy.
const CARD_PREFILL_ROWS: usize = 2048;

/// Slots and contexts of the tables.
const TABLE_SLOTS: [usize; 5] = [1, 8, 32, 64, 128];
const TABLE_CONTEXTS: [usize; 5] = [1024, 4096, 16_384, 65_536, 131_072];

/// What a run asks of the plan.
pub struct Wanted {
    pub batch: AutoOr,
    pub max_context: usize,
    pub longest_prompt: usize,
    pub n_jobs: usize,
    pub prefix_reuse: bool,
    pub budget: Budget,
    pub prefill_rows: usize,
}

/// The budget of a run on the CPU.
pub fn host_budget(host_memory: Option<u64>) -> Budget {
    match host_memory {
        Some(bytes) => Budget::given(bytes),
        None => Budget::of_available(available_memory()),
    }
}

/// What a plan needs to know of a model: its shape, and how its weights are stored.
pub struct Planned<'a> {
    pub config: &'a ModelConfig,
    stored: ClassBytes,
    experts: MatrixFormat,
    vectors: VectorFormat,
}

impl<'a> Planned<'a> {
    /// A checkpoint.
    ///
    /// # Errors
    /// A tensor that is not there.
    pub fn of(checkpoint: &'a Checkpoint) -> Result<Self, JobError> {
        Ok(Self {
            config: checkpoint.config(),
            stored: checkpoint.stored_bytes()?,
            experts: checkpoint.expert_format(),
            vectors: checkpoint.weight_format(Precision::Stored).vectors,
        })
    }

    /// A published shape, stored as it was released: MXFP4 experts, bf16 for the rest.
    fn of_shape(config: &'a ModelConfig) -> Self {
        let (experts, vectors) = (MatrixFormat::Mxfp4, VectorFormat::Bf16);
        let released = Precision::Stored.formats(experts, vectors);
        Self {
            config,
            stored: CpuModel::planned_bytes(config, released),
            experts,
            vectors,
        }
    }

    fn format(&self, precision: Precision) -> WeightFormat {
        precision.formats(self.experts, self.vectors)
    }

    /// Bytes of each class of tensors as stored and as held at `precision`.
    fn ledger(&self, precision: Precision) -> Vec<LedgerEntry> {
        let format = self.format(precision);
        let loaded = CpuModel::planned_bytes(self.config, format);
        let entries = self.stored.classes().into_iter().zip(loaded.classes());
        entries
            .map(|((class, stored_bytes), (_, loaded_bytes))| {
                let held = format.of_class(class);
                let stored = match class {
                    "experts" => self.experts,
                    // Vectors stored in f32 stay in f32; matrices are bf16.
                    _ => MatrixFormat::Bf16,
                };
                LedgerEntry {
                    class: class.to_owned(),
                    scheme: held.name().to_owned(),
                    stored_bytes,
                    loaded_bytes,
                    lossless: held.holds(stored).then_some(true),
                    relative_error: None,
                }
            })
            .collect()
    }

    /// Chooses slots and pages.
    ///
    /// # Errors
    /// Nothing fits.
    pub fn plan(
        &self,
        precision: Precision,
        options: &CpuOptions,
        wanted: &Wanted,
    ) -> Result<MemoryPlan, JobError> {
        let request = PlanRequest {
            ledger: self.ledger(precision),
            budget: wanted.budget,
            batch: match wanted.batch {
                AutoOr::Auto => BatchSize::Auto,
                AutoOr::Exactly(n_slots) => BatchSize::Slots(n_slots),
            },
            max_context: wanted.max_context,
            longest_prompt: wanted.longest_prompt,
            n_jobs: wanted.n_jobs,
            prefix_reuse: wanted.prefix_reuse,
            prefill_rows: wanted.prefill_rows,
            kv_scheme: if options.exact { "f32" } else { "bf16" },
        };
        let format = self.format(precision);
        Ok(plan::plan(&request, |shape| {
            CpuBackend::planned_memory(self.config, format, shape, options)
        })?)
    }

    /// What each precision leaves room for.
    fn fits(
        &self,
        budget_bytes: u64,
        prefill_rows: usize,
        options: &CpuOptions,
    ) -> Vec<PrecisionFit> {
        let contexts = self.contexts();
        Precision::POLICIES
            .into_iter()
            .map(|precision| {
                let format = self.format(precision);
                fit(
                    precision.name(),
                    &contexts,
                    prefill_rows,
                    budget_bytes,
                    |shape| CpuBackend::planned_memory(self.config, format, shape, options),
                )
            })
            .collect()
    }

    /// The tables' contexts, up to the model's own.
    fn contexts(&self) -> Vec<usize> {
        let most = self.config.max_context;
        TABLE_CONTEXTS
            .into_iter()
            .filter(|&context| context < most)
            .chain([most])
            .collect()
    }
}

/// What loading did to the values, entered into a plan's ledger.
pub fn measured(ledger: &mut [LedgerEntry], deviation: &ByClass<Deviation>) {
    for (class, deviation) in deviation.classes() {
        let entry = ledger.iter_mut().find(|entry| entry.class == class);
        // A class whose change is exact by its formats was not measured and need not be.
        if let Some(entry) = entry.filter(|entry| entry.lossless != Some(true)) {
            entry.lossless = Some(deviation.error == 0.0);
            entry.relative_error = Some(deviation.relative());
        }
    }
}

/// `podium plan`.
///
/// # Errors
/// No such model, shape, card or precision, or nothing fits.
pub fn plan_command(args: &PlanArgs) -> Result<u8, JobError> {
    let precision = precision(args.precision.as_deref())?;
    match &args.shape {
        Some(name) => {
            let config =
                shapes::named(name).ok_or_else(|| JobError::Shape { word: name.clone() })?;
            answer(args, name, &Planned::of_shape(&config), precision)
        }
        None => {
            let word = args.model.as_deref().unwrap_or(super::nano::NANO);
            let model = OpenModel::open(word)?;
            let planned = Planned::of(&model.checkpoint)?;
            answer(args, &model.name, &planned, precision)
        }
    }
}

fn answer(args: &PlanArgs, name: &str, model: &Planned, asked: Precision) -> Result<u8, JobError> {
    let options = CpuOptions {
        n_threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
        exact: args.exact,
        trace_hash: false,
        poison: false,
    };
    match args.card.as_deref() {
        Some(word) => on_card(args, name, model, asked, word, &options),
        None => on_host(args, name, model, asked, &options),
    }
}

/// What the flags ask of the plan.
fn wanted(args: &PlanArgs, model: &Planned, budget: Budget, prefill_rows: usize) -> Wanted {
    let most = model.config.max_context;
    let max_context = args.context.exactly().unwrap_or(most).min(most);
    Wanted {
        batch: args.batch,
        max_context,
        longest_prompt: max_context - 1,
        n_jobs: args.batch.exactly().unwrap_or(plan::MAX_AUTO_SLOTS),
        prefix_reuse: true,
        budget,
        prefill_rows,
    }
}

/// The name of what `asked` comes to.
fn effective(model: &Planned, asked: Precision) -> &'static str {
    match (asked, model.experts) {
        (Precision::Stored, MatrixFormat::Mxfp4) => Precision::Bits4.name(),
        (Precision::Stored, _) => Precision::Bits16.name(),
        (asked, _) => asked.name(),
    }
}

fn on_host(
    args: &PlanArgs,
    name: &str,
    model: &Planned,
    asked: Precision,
    options: &CpuOptions,
) -> Result<u8, JobError> {
    let budget = host_budget(args.host_memory.map(|bytes| bytes.0));
    let wanted = wanted(args, model, budget, PREFILL_ROWS);
    let plan = model.plan(asked, options, &wanted)?;
    let format = model.format(asked);
    let cells = grid(&TABLE_SLOTS, &model.contexts(), PREFILL_ROWS, |shape| {
        CpuBackend::planned_memory(model.config, format, shape, options)
    });
    let fits = model.fits(plan.budget_bytes, PREFILL_ROWS, options);
    let precision = effective(model, asked);
    if args.json {
        let document = serde_json::json!({
            "schema": "podium.plan/1",
            "model": name,
            "precision": precision,
            "plan": plan,
            "grid": cells,
            "precisions": fits,
        });
        print::result(&document.to_string());
    } else {
        print::result(&format!(
            "{name} in {precision}\n\n{plan}\nbytes of slots x context (* does not fit {})\n\n{}\n\
             slots that fit, by precision\n\n{}",
            bytes_text(plan.budget_bytes),
            grid_table(&cells, plan.budget_bytes),
            fit_table(&fits),
        ));
    }
    Ok(0)
}

/// A plan for a card that need not be here.
fn on_card(
    args: &PlanArgs,
    name: &str,
    model: &Planned,
    asked: Precision,
    word: &str,
    options: &CpuOptions,
) -> Result<u8, JobError> {
    let card = Card::named(word);
    let budget_bytes = match (card, word.parse::<Bytes>()) {
        (Some(card), _) => card.usable_bytes(),
        (None, Ok(bytes)) => bytes.0,
        (None, Err(_)) => {
            return Err(JobError::Card {
                word: word.to_owned(),
            });
        }
    };
    // The scratch of host threads has no place on a card.
    let options = &CpuOptions {
        n_threads: 1,
        ..*options
    };
    let fits = model.fits(budget_bytes, CARD_PREFILL_ROWS, options);
    // The whole plan of one precision where one was asked for: it may not fit, and then says so.
    let plan = match args.precision {
        Some(_) => {
            let wanted = wanted(args, model, Budget::given(budget_bytes), CARD_PREFILL_ROWS);
            Some(model.plan(asked, options, &wanted)?)
        }
        None => None,
    };
    let unsupported = card.filter(|card| !card.is_supported());
    if args.json {
        let document = serde_json::json!({
            "schema": "podium.plan/1",
            "model": name,
            "card": card,
            "budget_bytes": budget_bytes,
            "precision": plan.as_ref().map(|_| effective(model, asked)),
            "plan": plan,
            "precisions": fits,
        });
        print::result(&document.to_string());
        return Ok(0);
    }
    let mut text = match card {
        Some(card) => format!(
            "{name} on {}: {} of memory, {} left beside the CUDA context\n",
            card.name,
            bytes_text(card.total_bytes),
            bytes_text(budget_bytes),
        ),
        None => format!("{name} in {} of device memory\n", bytes_text(budget_bytes)),
    };
    text += &format!(
        "slots that fit, each at its full context, beside weights and passes of {CARD_PREFILL_ROWS} tokens\n\n{}",
        fit_table(&fits)
    );
    for fit in fits.iter().filter(|fit| !fit.fits) {
        text += &format!(
            "\n{} does not fit: it needs {} with one slot, {} of them weights",
            fit.precision,
            bytes_text(fit.least_bytes),
            bytes_text(fit.weights_bytes),
        );
    }
    if let Some(card) = unsupported {
        text += &format!(
            "\nnote: {} has compute capability {}.{}; the CUDA kernels need 8.0 or newer",
            card.name,
            card.capability / 10,
            card.capability % 10,
        );
    }
    if let Some(plan) = plan {
        text += &format!("\n{} in {}\n\n{plan}", name, effective(model, asked));
    }
    print::result(&text);
    Ok(0)
}
