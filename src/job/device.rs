//! `--device`: which engine runs, its plan, its weights and its backend.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::JobError;
use super::plan::{Place, Planned, Wanted};
use crate::cli::values::Device;
use crate::engine::checkpoint::{Checkpoint, Precision, WeightFormat};
use crate::engine::config::ModelConfig;
use crate::engine::cpu::model::CpuModel;
use crate::engine::cpu::path::CpuPath;
use crate::engine::cpu::{CpuBackend, CpuOptions};
use crate::engine::cuda::kernels::Build;
use crate::engine::cuda::nvml::Nvml;
use crate::engine::cuda::nvrtc::Nvrtc;
use crate::engine::cuda::{self, CudaBackend, CudaError, CudaOptions, Loaded, Staging};
use crate::engine::plan::{Budget, MemoryPlan};
use crate::engine::{Backend, EngineError, EngineShape};
use crate::submission::environment::Environment;
use crate::telemetry::device::DeviceMeter;

/// What runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Engine {
    Cpu,
    /// The GPU of this index.
    Cuda(u32),
}

/// Weights on one of them.
#[derive(Clone)]
pub enum Held {
    Cpu(Arc<CpuModel>),
    Cuda(Arc<Loaded>),
}

impl Held {
    pub fn config(&self) -> &ModelConfig {
        match self {
            Self::Cpu(model) => &model.config,
            Self::Cuda(loaded) => &loaded.model.config,
        }
    }
}

/// The engine that a word means. `auto` is the first GPU where driver, GPU and NVRTC are usable
/// and the run is one that CUDA can do, else the CPU.
///
/// # Errors
/// CUDA was asked for and cannot be used.
pub fn choose(
    asked: Device,
    exact: bool,
    config: &ModelConfig,
    format: WeightFormat,
) -> Result<Engine, JobError> {
    match asked {
        Device::Cpu => Ok(Engine::Cpu),
        Device::Cuda(_) if exact => Err(EngineError::from(CudaError::Exact).into()),
        Device::Cuda(_) => {
            let index = cuda_index(asked)?;
            Build::new(config, format).map_err(EngineError::from)?;
            Ok(Engine::Cuda(index))
        }
        Device::Auto => {
            let usable = !exact
                && cuda::device::count().is_ok_and(|n| n > 0)
                && Nvrtc::load().is_ok()
                && cuda::device::Device::open(0).is_ok()
                && Build::new(config, format).is_ok();
            Ok(if usable { Engine::Cuda(0) } else { Engine::Cpu })
        }
    }
}

/// The GPU of a command that runs on nothing else; `auto` is the first.
///
/// # Errors
/// The CPU was asked for, or CUDA cannot be used.
pub fn cuda_index(asked: Device) -> Result<u32, JobError> {
    let index = match asked {
        Device::Cpu => {
            return Err(JobError::Option {
                message: "this runs on CUDA alone".to_owned(),
            });
        }
        Device::Auto => 0,
        Device::Cuda(index) => index.unwrap_or(0),
    };
    cuda::device::Device::open(index).map_err(EngineError::from)?;
    Nvrtc::load().map_err(EngineError::from)?;
    Ok(index)
}

impl Engine {
    /// `cpu` or `cuda:N`, for manifests.
    pub fn name(self) -> String {
        match self {
            Self::Cpu => "cpu".to_owned(),
            Self::Cuda(index) => format!("cuda:{index}"),
        }
    }

    /// The GPU's meter; nothing on a CPU, or where the driver's library of figures is missing.
    pub fn meter(self) -> Option<DeviceMeter> {
        let Self::Cuda(index) = self else {
            return None;
        };
        let device = cuda::device::Device::open(index).ok()?;
        Some(DeviceMeter::new(Nvml::of(&device)?))
    }

    /// Adds what a manifest says of a GPU.
    pub fn describe(self, environment: &mut Environment) {
        let Self::Cuda(index) = self else {
            return;
        };
        environment.nvrtc = Nvrtc::load().ok().map(|nvrtc| nvrtc.version);
        if let Ok(device) = cuda::device::Device::open(index) {
            environment.gpu = Some(device.name.clone());
            environment.driver = Nvml::of(&device).and_then(|nvml| nvml.driver.clone());
        }
    }

    /// What a run's bits depend on beside the model.
    ///
    /// # Errors
    /// `PODIUM_CPU` names a path that this machine does not have, or CUDA cannot be used.
    pub fn numerics_id(
        self,
        config: &ModelConfig,
        format: WeightFormat,
        exact: bool,
    ) -> Result<String, JobError> {
        Ok(match self {
            Self::Cpu => CpuBackend::numerics_id(CpuPath::choose()?, exact),
            Self::Cuda(index) => cuda::numerics_id(config, format, index)?,
        })
    }

    /// Loads a checkpoint's weights.
    ///
    /// # Errors
    /// Weights that cannot be held.
    pub fn load(
        self,
        checkpoint: &Checkpoint,
        precision: Precision,
        n_threads: usize,
    ) -> Result<Held, JobError> {
        let staging = Staging {
            n_threads,
            ..Staging::default()
        };
        self.load_within(checkpoint, precision, staging)
    }

    /// As [`Engine::load`], with what loading may take beside the weights of a GPU.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn load_within(
        self,
        checkpoint: &Checkpoint,
        precision: Precision,
        staging: Staging,
    ) -> Result<Held, JobError> {
        Ok(match self {
            Self::Cpu => Held::Cpu(Arc::new(CpuBackend::load(
                checkpoint,
                precision,
                staging.n_threads,
            )?)),
            Self::Cuda(index) => Held::Cuda(Arc::new(Loaded::open_within(
                checkpoint, precision, index, staging,
            )?)),
        })
    }

    /// Chooses slots and pages of a run.
    ///
    /// # Errors
    /// Nothing fits.
    pub fn plan(
        self,
        checkpoint: &Checkpoint,
        precision: Precision,
        options: &CpuOptions,
        wanted: &Wanted,
        gpu_memory: Option<u64>,
    ) -> Result<MemoryPlan, JobError> {
        match self {
            Self::Cpu => Planned::of(checkpoint, Place::Cpu(options))?.plan(precision, wanted),
            Self::Cuda(index) => {
                let budget = match gpu_memory {
                    Some(bytes) => bytes,
                    None => free_memory(index)?,
                };
                let wanted = Wanted {
                    budget: Budget::given(budget),
                    ..*wanted
                };
                Planned::of(checkpoint, Place::Gpu)?.plan(precision, &wanted)
            }
        }
    }
}

/// What an open GPU leaves to a program.
fn free_memory(index: u32) -> Result<u64, JobError> {
    let device = cuda::device::Device::open(index).map_err(EngineError::from)?;
    let (free, _) = device.memory().map_err(EngineError::from)?;
    Ok(free)
}

/// A backend of either kind.
pub enum AnyBackend {
    Cpu(Box<CpuBackend>),
    Cuda(Box<CudaBackend>),
}

impl AnyBackend {
    /// Allocates what a run needs beside its weights.
    ///
    /// # Errors
    /// Out of memory, or an impossible shape.
    pub fn new(held: Held, shape: EngineShape, options: CpuOptions) -> Result<Self, JobError> {
        Self::on_path(CpuPath::choose()?, held, shape, options)
    }

    /// As [`AnyBackend::new`], on a given SIMD path where it is the CPU's.
    ///
    /// # Errors
    /// As [`AnyBackend::new`].
    pub fn on_path(
        path: CpuPath,
        held: Held,
        shape: EngineShape,
        options: CpuOptions,
    ) -> Result<Self, JobError> {
        Ok(match held {
            Held::Cpu(model) => Self::Cpu(Box::new(CpuBackend::with_model(
                path, model, shape, options,
            )?)),
            Held::Cuda(loaded) => {
                let options = CudaOptions {
                    trace_hash: options.trace_hash,
                    poison: options.poison,
                };
                Self::Cuda(Box::new(CudaBackend::new(loaded, shape, options)?))
            }
        })
    }

    pub fn get(&mut self) -> &mut dyn Backend {
        match self {
            Self::Cpu(backend) => &mut **backend,
            Self::Cuda(backend) => &mut **backend,
        }
    }

    /// Calls of each kernel, where they are counted.
    pub fn kernel_calls(&self) -> BTreeMap<String, u64> {
        match self {
            Self::Cpu(backend) => backend.kernel_calls(),
            Self::Cuda(backend) => backend.kernel_calls(),
        }
    }
}
