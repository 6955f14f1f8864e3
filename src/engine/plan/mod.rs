//! The memory plan: weights, KV and workspace against a budget, before anything is loaded.
//!
//! In come the ledger of weight bytes, the budget and what the run wants; out goes an
//! [`EngineShape`] with the bytes the backend will allocate for it. The bytes of a shape come
//! from the backend (a closure here), so plan and allocation cannot disagree. Pages hold what is
//! used: an arena smaller than slots times context is allowed as long as every slot can hold the
//! longest prompt and one page more, and one row its whole context.

mod available;
mod card;
mod fit;
mod grid;
mod table;
#[cfg(test)]
mod tests;

pub use available::available_memory;
pub use card::{CARDS, CONTEXT_BYTES, Card};
pub use fit::{FitCell, MAX_FIT_SLOTS, PrecisionFit, fit};
pub use grid::{GridCell, grid};
pub use table::{bytes_text, fit_table, grid_table, ledger_table};

use super::kv::pages_for;
use super::{BackendMemory, EngineShape, PAGE_POSITIONS};

/// Bytes of one class of tensors.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LedgerEntry {
    /// `experts`, `attention`, `embedding`, …
    pub class: String,
    /// The format they are held in: `mxfp4`, `mxint8`, `bf16`, `f32`, or several.
    pub scheme: String,
    pub stored_bytes: u64,
    pub loaded_bytes: u64,
    /// Whether the loaded values equal the stored ones; absent when not known before loading.
    pub lossless: Option<bool>,
    /// Root mean squared error over the root mean square of the stored values, measured while
    /// loading where the format changed to a narrower one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relative_error: Option<f64>,
}

/// Bytes the engine may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// For weights, KV and workspace together.
    pub total_bytes: u64,
    /// For KV and workspace when the slot count is chosen automatically.
    pub auto_batch_bytes: Option<u64>,
}

impl Budget {
    /// The CPU's default: all that is available, and for an automatic batch a quarter of it.
    pub fn of_available(available_bytes: u64) -> Self {
        Self {
            total_bytes: available_bytes,
            auto_batch_bytes: Some(available_bytes / 4),
        }
    }

    /// A budget given by the user: the batch may fill it.
    pub fn given(total_bytes: u64) -> Self {
        Self {
            total_bytes,
            auto_batch_bytes: None,
        }
    }
}

/// `--batch auto|N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BatchSize {
    Auto,
    Slots(usize),
}

/// What a run wants.
#[derive(Clone, Debug)]
pub struct PlanRequest {
    pub ledger: Vec<LedgerEntry>,
    pub budget: Budget,
    pub batch: BatchSize,
    /// Positions a row may reach.
    pub max_context: usize,
    /// Tokens of the longest prompt that fits the context.
    pub longest_prompt: usize,
    /// Samples to generate; slots beyond them would stay empty.
    pub n_jobs: usize,
    /// Samples among them that may have a second stage.
    pub n_two_stage: usize,
    pub prefix_reuse: bool,
    pub prefill_rows: usize,
    /// The format of keys and values in the cache.
    pub kv_scheme: &'static str,
    /// What a device's driver will keep for itself, by estimate.
    pub driver_bytes: u64,
}

/// Slots an automatic batch goes up to.
pub const MAX_AUTO_SLOTS: usize = 64;

/// Slot counts an automatic batch tries, besides its own upper end.
const AUTO_SLOTS: [usize; 11] = [48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1];

/// Levels of shared prefixes that are kept at a time: system, few-shot, a passage, the row's
/// prompt.
const PREFIX_LEVELS: usize = 4;

/// Fork sequences beyond the levels, so that the prompts of several rows with many samples are
/// prefilled in one pass.
const MAX_PREFIXES_A_REFILL: usize = 16;

/// What will be allocated, for `run.json` and for the user to read.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct MemoryPlan {
    pub shape: EngineShape,
    pub memory: BackendMemory,
    /// What a device's driver keeps for code, captured graphs and rounding: an estimate.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub driver_bytes: u64,
    pub total_bytes: u64,
    pub budget_bytes: u64,
    pub batch: BatchSize,
    /// The format of keys and values in the cache: `bf16`, or `f32` with exact arithmetic.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kv_scheme: String,
    /// Pages with which every slot could fill its context at once.
    pub full_pages: usize,
    pub ledger: Vec<LedgerEntry>,
}

/// Slots and context that would fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FittingSettings {
    pub n_slots: usize,
    pub max_context: usize,
    pub needed_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error(
        "the weights need {}, the budget is {}",
        bytes_text(*.weights_bytes),
        bytes_text(*.budget_bytes)
    )]
    WeightsDoNotFit {
        weights_bytes: u64,
        budget_bytes: u64,
    },
    #[error(
        "{n_slots} slot{} with a context of {max_context} need{} {}, the budget is {}",
        if *.n_slots == 1 { "" } else { "s" },
        if *.n_slots == 1 { "s" } else { "" },
        bytes_text(*.needed_bytes),
        bytes_text(*.budget_bytes)
    )]
    BatchDoesNotFit {
        n_slots: usize,
        max_context: usize,
        needed_bytes: u64,
        budget_bytes: u64,
        /// What fits instead, nearest first; may be empty.
        nearest: Vec<FittingSettings>,
    },
    #[error("a batch of {n_slots} slots with a context of {max_context} holds nothing")]
    Empty { n_slots: usize, max_context: usize },
}

impl PlanError {
    /// How to mend it, in a sentence.
    pub fn hint(&self) -> String {
        match self {
            Self::WeightsDoNotFit { .. } => {
                "raise the memory budget, or choose a `--precision` with fewer bits".to_owned()
            }
            Self::BatchDoesNotFit { nearest, .. } if nearest.is_empty() => {
                "no batch fits beside the weights: raise the memory budget, or choose a \
                 `--precision` with fewer bits"
                    .to_owned()
            }
            Self::BatchDoesNotFit { nearest, .. } => {
                let settings: Vec<String> = nearest
                    .iter()
                    .map(|fit| {
                        format!(
                            "`--batch {} --context {}` ({})",
                            fit.n_slots,
                            fit.max_context,
                            bytes_text(fit.needed_bytes)
                        )
                    })
                    .collect();
                format!("this fits: {}", settings.join(", or "))
            }
            Self::Empty { .. } => "`--batch` and `--context` are at least 1".to_owned(),
        }
    }
}

/// Chooses the shape of a run.
///
/// `memory` gives the bytes a backend allocates for a shape; more slots, pages, context or forks
/// may never take fewer bytes.
///
/// # Errors
/// [`PlanError`] when not even the smallest allowed arena fits the budget, with what would.
pub fn plan(
    request: &PlanRequest,
    memory: impl Fn(&EngineShape) -> BackendMemory,
) -> Result<MemoryPlan, PlanError> {
    let planner = Planner {
        request,
        memory: &memory,
    };
    let max_slots = request.n_jobs.max(1);
    let shape = match request.batch {
        BatchSize::Slots(n_slots) => {
            if n_slots == 0 || request.max_context == 0 {
                return Err(PlanError::Empty {
                    n_slots,
                    max_context: request.max_context,
                });
            }
            planner.fixed(n_slots.min(max_slots))?
        }
        BatchSize::Auto => planner.auto(max_slots.min(MAX_AUTO_SLOTS))?,
    };
    Ok(planner.of(shape))
}

/// The plan that would take the least memory for the slots asked for, or for one: what a refusal
/// shows.
pub fn smallest(
    request: &PlanRequest,
    memory: impl Fn(&EngineShape) -> BackendMemory,
) -> MemoryPlan {
    let planner = Planner {
        request,
        memory: &memory,
    };
    let n_slots = match request.batch {
        BatchSize::Slots(n_slots) => n_slots.clamp(1, request.n_jobs.max(1)),
        BatchSize::Auto => 1,
    };
    planner.of(planner.smallest(n_slots, request.max_context))
}

fn is_zero(bytes: &u64) -> bool {
    *bytes == 0
}

/// All classes together.
pub fn total(memory: &BackendMemory) -> u64 {
    memory
        .weights_bytes
        .saturating_add(memory.kv_bytes)
        .saturating_add(memory.workspace_bytes)
}

/// Every slot's whole context and each fork's tail.
fn full_pages(n_slots: usize, max_context: usize, n_forks: usize) -> usize {
    n_slots * pages_for(max_context) + n_forks
}

struct Planner<'a, F> {
    request: &'a PlanRequest,
    memory: &'a F,
}

impl<F: Fn(&EngineShape) -> BackendMemory> Planner<'_, F> {
    fn of(&self, shape: EngineShape) -> MemoryPlan {
        let request = self.request;
        MemoryPlan {
            shape,
            memory: (self.memory)(&shape),
            driver_bytes: request.driver_bytes,
            total_bytes: self.total(&shape),
            budget_bytes: request.budget.total_bytes,
            batch: request.batch,
            kv_scheme: request.kv_scheme.to_owned(),
            full_pages: full_pages(shape.n_slots, shape.max_context, shape.n_forks),
            ledger: request.ledger.clone(),
        }
    }

    fn total(&self, shape: &EngineShape) -> u64 {
        total(&(self.memory)(shape)).saturating_add(self.request.driver_bytes)
    }

    fn fixed(&self, n_slots: usize) -> Result<EngineShape, PlanError> {
        let request = self.request;
        let (budget, max_context) = (request.budget.total_bytes, request.max_context);
        self.fit(n_slots, max_context, budget)
            .ok_or_else(|| self.does_not_fit(n_slots))
    }

    fn auto(&self, max_slots: usize) -> Result<EngineShape, PlanError> {
        let request = self.request;
        let max_context = request.max_context;
        if max_context == 0 {
            return Err(PlanError::Empty {
                n_slots: max_slots,
                max_context,
            });
        }
        let budget = request.budget.total_bytes;
        let limit = match request.budget.auto_batch_bytes {
            Some(batch) => {
                let smallest = self.smallest(1, max_context);
                let weights = (self.memory)(&smallest).weights_bytes;
                budget.min(weights.saturating_add(batch))
            }
            None => budget,
        };
        let fewer = AUTO_SLOTS.into_iter().filter(|&n| n < max_slots);
        [max_slots]
            .into_iter()
            .chain(fewer)
            .find_map(|n_slots| self.fit(n_slots, max_context, limit))
            // A single row may take more than the automatic share rather than not run at all.
            .or_else(|| self.fit(1, max_context, budget))
            .ok_or_else(|| self.does_not_fit(1))
    }

    /// The shape with the fewest pages allowed.
    fn smallest(&self, n_slots: usize, max_context: usize) -> EngineShape {
        let request = self.request;
        let n_forks = if request.prefix_reuse {
            // A row in its first stage keeps its prompt for the second one.
            let prompts = n_slots.min(MAX_PREFIXES_A_REFILL) + n_slots.min(request.n_two_stage);
            // A tree over n jobs has fewer than n forks.
            let n_stages = request.n_jobs + request.n_two_stage;
            (PREFIX_LEVELS - 1 + prompts).min(n_stages.saturating_sub(1))
        } else {
            0
        };
        let in_use = (request.longest_prompt + PAGE_POSITIONS).min(max_context);
        let n_pages = (n_slots * pages_for(in_use)).max(pages_for(max_context)) + n_forks;
        EngineShape {
            n_slots,
            n_forks,
            n_pages,
            max_context,
            prefill_rows: request.prefill_rows,
        }
    }

    /// The shape with the most pages that fits `limit`, up to those that could all be used.
    fn fit(&self, n_slots: usize, max_context: usize, limit: u64) -> Option<EngineShape> {
        let smallest = self.smallest(n_slots, max_context);
        let with_pages = |n_pages: usize| EngineShape {
            n_pages,
            ..smallest
        };
        let fits = |n_pages: usize| self.total(&with_pages(n_pages)) <= limit;
        let mut fitting = smallest.n_pages;
        if !fits(fitting) {
            return None;
        }
        let mut too_many = full_pages(n_slots, max_context, smallest.n_forks).max(fitting) + 1;
        while too_many - fitting > 1 {
            let middle = fitting + (too_many - fitting) / 2;
            if fits(middle) {
                fitting = middle;
            } else {
                too_many = middle;
            }
        }
        Some(with_pages(fitting))
    }

    fn does_not_fit(&self, n_slots: usize) -> PlanError {
        let max_context = self.request.max_context;
        let budget_bytes = self.request.budget.total_bytes;
        let smallest = self.smallest(n_slots, max_context);
        let weights_bytes = (self.memory)(&smallest).weights_bytes;
        if weights_bytes > budget_bytes {
            return PlanError::WeightsDoNotFit {
                weights_bytes,
                budget_bytes,
            };
        }
        PlanError::BatchDoesNotFit {
            n_slots,
            max_context,
            needed_bytes: self.total(&smallest),
            budget_bytes,
            nearest: self.nearest(n_slots),
        }
    }

    /// Fewer slots at this context, a shorter context for these slots, or both.
    fn nearest(&self, n_slots: usize) -> Vec<FittingSettings> {
        let request = self.request;
        let needed = |n_slots: usize, max_context: usize| {
            let needed_bytes = self.total(&self.smallest(n_slots, max_context));
            (needed_bytes <= request.budget.total_bytes).then_some(FittingSettings {
                n_slots,
                max_context,
                needed_bytes,
            })
        };
        let longest_context = |n_slots: usize| {
            let least = pages_for(request.longest_prompt + 1).max(1);
            let most = pages_for(request.max_context);
            last_true(least, most, |n| {
                needed(n_slots, n * PAGE_POSITIONS).is_some()
            })
            .and_then(|n| needed(n_slots, (n * PAGE_POSITIONS).min(request.max_context)))
        };
        let fewer_slots = last_true(1, n_slots, |n| needed(n, request.max_context).is_some())
            .and_then(|n| needed(n, request.max_context));
        let mut nearest: Vec<FittingSettings> = fewer_slots
            .into_iter()
            .chain(longest_context(n_slots))
            .collect();
        if nearest.is_empty() {
            nearest.extend(longest_context(1));
        }
        nearest
    }
}

/// The last number of `first..=last` for which `holds`, if numbers after it never do.
fn last_true(first: usize, last: usize, holds: impl Fn(usize) -> bool) -> Option<usize> {
    if first > last || !holds(first) {
        return None;
    }
    let (mut good, mut bad) = (first, last + 1);
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        if holds(middle) {
            good = middle;
        } else {
            bad = middle;
        }
    }
    Some(good)
}
