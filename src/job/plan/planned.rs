//! A model's bytes on the engine that will hold it: the ledger of its weights, the memory of a
//! shape, and the plan of a run. Neither weights nor a device are needed.

use crate::cli::values::AutoOr;
use crate::engine::checkpoint::{
    Checkpoint, ClassBytes, MatrixFormat, Precision, VectorFormat, WeightFormat,
};
use crate::engine::config::ModelConfig;
use crate::engine::cpu::model::CpuModel;
use crate::engine::cpu::{CpuBackend, CpuOptions};
use crate::engine::cuda;
use crate::engine::cuda::model::CudaModel;
use crate::engine::plan::{
    self, BatchSize, Budget, LedgerEntry, MemoryPlan, PlanRequest, PrecisionFit, available_memory,
    fit,
};
use crate::engine::{BackendMemory, EngineShape};
use crate::job::JobError;

/// Rows of one prefill pass on the CPU: enough to reuse each unpacked weight tile well, small
/// enough that the workspace stays a few megabytes a layer.
pub const PREFILL_ROWS: usize = 512;

/// Rows of one prefill pass on a GPU, most first: the first that fits is taken.
const GPU_PREFILL_ROWS: [usize; 4] = [16384, 8192, 2048, 512];

/// Rows of one prefill pass in the tables of a GPU.
pub const TABLE_GPU_PREFILL_ROWS: usize = 2048;

/// Most slots of an automatic batch on a GPU.
pub const MAX_GPU_AUTO_SLOTS: usize = 256;

/// What a run asks of the plan.
pub struct Wanted {
    pub batch: AutoOr,
    pub max_context: usize,
    pub longest_prompt: usize,
    pub n_jobs: usize,
    /// Of these, how many may have a second stage.
    pub n_two_stage: usize,
    pub prefix_reuse: bool,
    pub budget: Budget,
}

/// The budget of a run on the CPU.
pub fn host_budget(host_memory: Option<u64>) -> Budget {
    match host_memory {
        Some(bytes) => Budget::given(bytes),
        None => Budget::of_available(available_memory()),
    }
}

/// Where a model is to run.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    Cpu(&'a CpuOptions),
    /// On a GPU, which need not be here.
    Gpu,
}

/// What a plan needs to know of a model: its shape, and how its weights are stored.
pub struct Planned<'a> {
    pub config: &'a ModelConfig,
    place: Place<'a>,
    stored: ClassBytes,
    pub experts: MatrixFormat,
    vectors: VectorFormat,
}

impl<'a> Planned<'a> {
    /// A checkpoint.
    ///
    /// # Errors
    /// A tensor that is not there.
    pub fn of(checkpoint: &'a Checkpoint, place: Place<'a>) -> Result<Self, JobError> {
        Ok(Self {
            config: checkpoint.config(),
            place,
            stored: checkpoint.stored_bytes()?,
            experts: checkpoint.expert_format(),
            vectors: checkpoint.weight_format(Precision::Stored).vectors,
        })
    }

    /// A shape without its weights: experts as told, bf16 for the rest, as in what was released.
    pub fn of_shape(config: &'a ModelConfig, experts: MatrixFormat, place: Place<'a>) -> Self {
        let vectors = VectorFormat::Bf16;
        let released = Precision::Stored.formats(experts, vectors);
        Self {
            config,
            place,
            stored: CpuModel::planned_bytes(config, released),
            experts,
            vectors,
        }
    }

    fn format(&self, precision: Precision) -> WeightFormat {
        precision.formats(self.experts, self.vectors)
    }

    /// Bytes of each class as held.
    fn loaded(&self, precision: Precision) -> ClassBytes {
        let format = self.format(precision);
        match self.place {
            Place::Cpu(_) => CpuModel::planned_bytes(self.config, format),
            Place::Gpu => CudaModel::planned_bytes(self.config, format),
        }
    }

    /// The bytes that a shape takes.
    pub fn memory(&self, precision: Precision, shape: &EngineShape) -> BackendMemory {
        let format = self.format(precision);
        match self.place {
            Place::Cpu(options) => CpuBackend::planned_memory(self.config, format, shape, options),
            Place::Gpu => cuda::memory::planned(self.config, format, shape),
        }
    }

    /// What a GPU's driver keeps besides.
    fn driver_bytes(&self, precision: Precision, n_slots: usize) -> u64 {
        match self.place {
            Place::Cpu(_) => 0,
            Place::Gpu => cuda::memory::driver_bytes(self.config, self.format(precision), n_slots),
        }
    }

    /// Bytes of each class of tensors as stored and as held at `precision`.
    fn ledger(&self, precision: Precision) -> Vec<LedgerEntry> {
        let format = self.format(precision);
        let loaded = self.loaded(precision);
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

    /// Chooses slots, pages and, on a GPU, the rows of a prefill pass.
    ///
    /// # Errors
    /// Nothing fits: what would be needed, and what does fit.
    pub fn plan(&self, precision: Precision, wanted: &Wanted) -> Result<MemoryPlan, JobError> {
        let ledger = self.ledger(precision);
        let request = |batch: BatchSize, prefill_rows: usize| PlanRequest {
            ledger: ledger.clone(),
            budget: wanted.budget,
            batch,
            max_context: wanted.max_context,
            longest_prompt: wanted.longest_prompt,
            n_jobs: wanted.n_jobs,
            n_two_stage: wanted.n_two_stage,
            prefix_reuse: wanted.prefix_reuse,
            prefill_rows,
            kv_scheme: match self.place {
                Place::Cpu(options) if options.exact => "f32",
                _ => "bf16",
            },
            driver_bytes: match batch {
                BatchSize::Slots(n_slots) => self.driver_bytes(precision, n_slots),
                BatchSize::Auto => 0,
            },
        };
        let memory = |shape: &EngineShape| self.memory(precision, shape);
        // Slots that were tried one after the other are still an automatic batch.
        let told = |plan: MemoryPlan| MemoryPlan {
            batch: match wanted.batch {
                AutoOr::Auto => BatchSize::Auto,
                AutoOr::Exactly(_) => plan.batch,
            },
            ..plan
        };
        let (batches, passes) = self.choices(wanted);
        let mut refused = None;
        for &batch in &batches {
            for &prefill_rows in &passes {
                let request = request(batch, prefill_rows);
                match plan::plan(&request, memory) {
                    Ok(plan) => return Ok(told(plan)),
                    Err(error) => refused = Some((error, request)),
                }
            }
        }
        let (error, request) = refused.expect("there is a batch and a pass to try");
        Err(JobError::DoesNotFit {
            error,
            plan: Box::new(told(plan::smallest(&request, memory))),
        })
    }

    /// Batches and passes to try, the best first.
    fn choices(&self, wanted: &Wanted) -> (Vec<BatchSize>, Vec<usize>) {
        let Place::Gpu = self.place else {
            let batch = match wanted.batch {
                AutoOr::Auto => BatchSize::Auto,
                AutoOr::Exactly(n_slots) => BatchSize::Slots(n_slots),
            };
            return (vec![batch], vec![PREFILL_ROWS]);
        };
        let batches = match wanted.batch {
            AutoOr::Exactly(n_slots) => vec![n_slots],
            AutoOr::Auto => {
                let most = wanted.n_jobs.clamp(1, MAX_GPU_AUTO_SLOTS);
                let smaller = cuda::memory::BUCKETS.into_iter().rev();
                [most]
                    .into_iter()
                    .chain(smaller.filter(|&bucket| bucket < most))
                    .collect()
            }
        };
        // Passes larger than all prompts together would only take memory.
        let most_tokens = wanted.longest_prompt.saturating_mul(wanted.n_jobs.max(1));
        let [.., least] = GPU_PREFILL_ROWS;
        let passes = GPU_PREFILL_ROWS
            .into_iter()
            .filter(|&rows| rows == least || rows < 4 * most_tokens.max(1));
        let batches = batches.into_iter().map(BatchSize::Slots);
        (batches.collect(), passes.collect())
    }

    /// What each precision leaves room for.
    pub fn fits(&self, budget_bytes: u64, prefill_rows: usize) -> Vec<PrecisionFit> {
        let contexts = self.contexts();
        Precision::POLICIES
            .into_iter()
            .map(|precision| {
                fit(
                    precision.name(),
                    &contexts,
                    prefill_rows,
                    budget_bytes,
                    |shape| {
                        let mut memory = self.memory(precision, shape);
                        memory.workspace_bytes += self.driver_bytes(precision, shape.n_slots);
                        memory
                    },
                )
            })
            .collect()
    }

    /// The tables' contexts, up to the model's own.
    pub fn contexts(&self) -> Vec<usize> {
        let most = self.config.max_context;
        TABLE_CONTEXTS
            .into_iter()
            .filter(|&context| context < most)
            .chain([most])
            .collect()
    }

    /// The name of what `asked` comes to.
    pub fn effective(&self, asked: Precision) -> &'static str {
        match (asked, self.experts) {
            (Precision::Stored, MatrixFormat::Mxfp4) => Precision::Bits4.name(),
            (Precision::Stored, _) => Precision::Bits16.name(),
            (asked, _) => asked.name(),
        }
    }
}

/// Contexts of the tables.
const TABLE_CONTEXTS: [usize; 5] = [1024, 4096, 16_384, 65_536, 131_072];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::plan::{Card, PlanError};
    use crate::engine::shapes;

    fn wanted(budget_bytes: u64) -> Wanted {
        Wanted {
            batch: AutoOr::Auto,
            max_context: 4096,
            longest_prompt: 1024,
            n_jobs: 1000,
            n_two_stage: 0,
            prefix_reuse: true,
            budget: Budget::given(budget_bytes),
        }
    }

    #[test]
    fn a_gpus_plan_has_the_bytes_of_its_own_engine() {
        let config = shapes::named("gpt-oss-20b").expect("a shape");
        let planned = Planned::of_shape(&config, MatrixFormat::Mxfp4, Place::Gpu);
        let card = Card::named("h100-80").expect("a card").usable_bytes();
        let plan = planned
            .plan(Precision::Bits4, &wanted(card))
            .expect("it fits");
        assert_eq!(plan.shape.n_slots, MAX_GPU_AUTO_SLOTS);
        assert_eq!(plan.shape.prefill_rows, 16384);
        assert_eq!(plan.shape.n_pages, plan.full_pages);
        let format = planned.format(Precision::Bits4);
        let of_engine = cuda::memory::planned(&config, format, &plan.shape);
        assert_eq!(plan.memory, of_engine);
        let held: u64 = plan.ledger.iter().map(|entry| entry.loaded_bytes).sum();
        assert_eq!(held, of_engine.weights_bytes);
        let counted = of_engine.weights_bytes + of_engine.kv_bytes + of_engine.workspace_bytes;
        assert_eq!(plan.total_bytes, counted + plan.driver_bytes);
        assert!(plan.driver_bytes > 0 && plan.total_bytes <= card);
    }

    #[test]
    fn a_budget_below_the_experts_is_refused_with_the_plan() {
        let config = shapes::named("gpt-oss-20b").expect("a shape");
        let planned = Planned::of_shape(&config, MatrixFormat::Mxfp4, Place::Gpu);
        let refused = planned.plan(Precision::Bits4, &wanted(4 << 30));
        let Err(JobError::DoesNotFit { error, plan }) = refused else {
            panic!("4 GiB do not hold 12.8");
        };
        assert!(matches!(error, PlanError::WeightsDoNotFit { .. }));
        assert!(plan.total_bytes > plan.memory.weights_bytes);
        assert_eq!(plan.budget_bytes, 4 << 30);
    }

    #[test]
    fn less_memory_means_smaller_passes_before_fewer_slots() {
        let config = shapes::named("gpt-oss-20b").expect("a shape");
        let planned = Planned::of_shape(&config, MatrixFormat::Mxfp4, Place::Gpu);
        let mut before = (usize::MAX, usize::MAX);
        for gib in [60, 24, 18, 16, 15, 14] {
            let plan = planned.plan(Precision::Bits4, &wanted(gib << 30));
            let shape = plan.expect("it fits").shape;
            let now = (shape.n_slots, shape.prefill_rows);
            assert!(now <= before, "{gib} GiB: {now:?} after {before:?}");
            before = now;
        }
        assert!(before.0 < MAX_GPU_AUTO_SLOTS);
    }
}
