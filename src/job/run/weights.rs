//! The model of a run: its weights, kept from one run to the next of a command, and the backend on
//! them, which must hold what was planned.

use std::path::Path;

use super::Run;
use crate::engine::checkpoint::{ByClass, Deviation, Precision};
use crate::engine::cuda::Staging;
use crate::engine::plan::{MemoryPlan, ledger_table};
use crate::job::JobError;
use crate::job::device::{AnyBackend, Engine, Held};
use crate::job::plan::measured;
use crate::submission::manifest::RunManifest;
use crate::telemetry::memory::{MemoryEvent, MemoryLog};

/// Weights kept between the runs of one command, so that each model is loaded once.
pub type Weights = Option<LoadedWeights>;

/// Weights, how they were asked for, and what that did to their values.
pub struct LoadedWeights {
    precision: Precision,
    engine: Engine,
    held: Held,
    deviation: ByClass<Deviation>,
}

impl Run<'_> {
    /// Loads the weights where they are not loaded yet and allocates the rest.
    pub(super) fn open(
        &self,
        plan: &MemoryPlan,
        weights: &mut Weights,
        manifest: &mut RunManifest,
        path: &Path,
        memory: &MemoryLog,
        quiet: bool,
    ) -> Result<AnyBackend, JobError> {
        let (model, deviation) = self.load(weights, plan)?;
        memory.event(MemoryEvent::Load, None);
        let mut ledger = plan.ledger.clone();
        measured(&mut ledger, &deviation);
        if ledger != plan.ledger && !quiet {
            let table = ledger_table(&ledger);
            crate::cli::print::tell(&format!("\nmeasured while loading\n{table}"));
        }
        manifest.ledger = serde_json::to_value(&ledger).unwrap_or_default();
        manifest.write(path)?;
        let mut backend = AnyBackend::new(model, plan.shape, self.options)?;
        let allocated = backend.get().memory();
        memory.event(MemoryEvent::Arena, Some(allocated));
        if allocated != plan.memory {
            return Err(JobError::Allocated {
                planned: plan.memory,
                allocated,
            });
        }
        Ok(backend)
    }

    fn load(
        &self,
        weights: &mut Weights,
        plan: &MemoryPlan,
    ) -> Result<(Held, ByClass<Deviation>), JobError> {
        let precision = self.model.effective_precision(self.precision.value);
        if let Some(loaded) = weights
            && loaded.precision == precision
            && loaded.engine == self.engine
        {
            return Ok((loaded.held.clone(), loaded.deviation));
        }
        // The other precision's weights go before these come.
        *weights = None;
        let checkpoint = &self.model.checkpoint;
        let host_memory = self.settings.host_memory.value;
        let staging = Staging::within(&plan.memory, host_memory, self.options.n_threads);
        let held = self.engine.load_within(checkpoint, precision, staging)?;
        let deviation = match &held {
            Held::Cpu(model) => model.deviation(),
            Held::Cuda(_) => checkpoint.deviation(checkpoint.weight_format(precision))?,
        };
        *weights = Some(LoadedWeights {
            precision,
            engine: self.engine,
            held: held.clone(),
            deviation,
        });
        Ok((held, deviation))
    }
}
