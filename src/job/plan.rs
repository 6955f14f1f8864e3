//! The ledger and memory plan of a model: for `podium plan`, and (`planned`) for a run before it
//! loads.

mod planned;

pub use planned::{PREFILL_ROWS, Place, Planned, Wanted, host_budget};

use super::JobError;
use super::model::{self, Description, OpenModel};
use super::precision;
use crate::cli::eval::PlanArgs;
use crate::cli::print;
use crate::cli::values::Bytes;
use crate::engine::checkpoint::{ByClass, Deviation, MatrixFormat, Precision};
use crate::engine::cpu::CpuOptions;
use crate::engine::plan::{
    self, Budget, Card, LedgerEntry, bytes_text, fit_table, grid, grid_table,
};
use crate::engine::shapes;
use planned::{MAX_GPU_AUTO_SLOTS, TABLE_GPU_PREFILL_ROWS};

/// Slots of the tables.
const TABLE_SLOTS: [usize; 5] = [1, 8, 32, 64, 128];

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
    let options = CpuOptions {
        n_threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
        exact: args.exact,
        trace_hash: false,
        poison: false,
    };
    let place = match args.card {
        Some(_) => Place::Gpu,
        None => Place::Cpu(&options),
    };
    match &args.shape {
        Some(name) => {
            let config =
                shapes::named(name).ok_or_else(|| JobError::Shape { word: name.clone() })?;
            answer(
                args,
                name,
                &Planned::of_shape(&config, MatrixFormat::Mxfp4, place),
                precision,
            )
        }
        None => {
            let word = args.model.as_deref().unwrap_or(super::nano::NANO);
            if model::needs_download(word) {
                let model = Description::read(word, args.json)?;
                let planned = Planned::of_shape(&model.config, model.experts, place);
                return answer(args, &model.name, &planned, precision);
            }
            let model = OpenModel::open(word, args.json)?;
            let planned = Planned::of(&model.checkpoint, place)?;
            answer(args, &model.name, &planned, precision)
        }
    }
}

fn answer(args: &PlanArgs, name: &str, model: &Planned, asked: Precision) -> Result<u8, JobError> {
    match args.card.as_deref() {
        Some(word) => on_card(args, name, model, asked, word),
        None => on_host(args, name, model, asked),
    }
}

/// What the flags ask of the plan.
fn wanted(args: &PlanArgs, model: &Planned, budget: Budget, most_slots: usize) -> Wanted {
    let most = model.config.max_context;
    let max_context = args.context.exactly().unwrap_or(most).min(most);
    Wanted {
        batch: args.batch,
        max_context,
        longest_prompt: max_context - 1,
        n_jobs: args.batch.exactly().unwrap_or(most_slots),
        n_two_stage: 0,
        prefix_reuse: true,
        budget,
    }
}

fn on_host(args: &PlanArgs, name: &str, model: &Planned, asked: Precision) -> Result<u8, JobError> {
    let budget = host_budget(args.host_memory.map(|bytes| bytes.0));
    let wanted = wanted(args, model, budget, plan::MAX_AUTO_SLOTS);
    let plan = model.plan(asked, &wanted)?;
    let cells = grid(&TABLE_SLOTS, &model.contexts(), PREFILL_ROWS, |shape| {
        model.memory(asked, shape)
    });
    let fits = model.fits(plan.budget_bytes, PREFILL_ROWS);
    let precision = model.effective(asked);
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

/// A plan for a card that need not be here, by the sizes of the engine that would run on it.
fn on_card(
    args: &PlanArgs,
    name: &str,
    model: &Planned,
    asked: Precision,
    word: &str,
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
    let fits = model.fits(budget_bytes, TABLE_GPU_PREFILL_ROWS);
    // The whole plan of one precision where one was asked for: it may not fit, and then says so.
    let plan = match args.precision {
        Some(_) => {
            let budget = Budget::given(budget_bytes);
            Some(model.plan(asked, &wanted(args, model, budget, MAX_GPU_AUTO_SLOTS))?)
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
            "precision": plan.as_ref().map(|_| model.effective(asked)),
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
        "slots that fit, each at its full context, beside weights and passes of {TABLE_GPU_PREFILL_ROWS} tokens\n\n{}",
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
        text += &format!("\n{} in {}\n\n{plan}", name, model.effective(asked));
    }
    print::result(&text);
    Ok(0)
}
