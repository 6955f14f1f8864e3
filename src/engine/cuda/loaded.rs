//! A GPU with what does not change while it is used: its kernels, compiled for the model and the device, and
//! the weights.

use std::sync::Arc;

use super::device::Device;
use super::error::CudaError;
use super::kernels::{self, Build};
use super::launch::{Dense, Kernels, MatmulArgs};
use super::load::Staging;
use super::model::CudaModel;
use super::nvrtc::Nvrtc;
use super::pack;
use super::repack::Repack;
use crate::engine::EngineError;
use crate::engine::checkpoint::{Checkpoint, Precision, WeightFormat};
use crate::engine::config::ModelConfig;

/// A GPU with compiled kernels and weights, for one backend or several in turn.
pub struct Loaded {
    pub device: Arc<Device>,
    pub kernels: Kernels,
    pub model: CudaModel,
    pub(super) numerics_id: String,
}

impl Loaded {
    /// Opens a GPU, loads a checkpoint's weights or makes them in place, and compiles the kernels
    /// for them.
    ///
    /// # Errors
    /// No driver, GPU or NVRTC; a shape the kernels do not take; out of memory; as
    /// [`CudaModel::load`].
    pub fn open(
        checkpoint: &Checkpoint,
        precision: Precision,
        index: u32,
    ) -> Result<Self, EngineError> {
        Self::open_within(checkpoint, precision, index, Staging::default())
    }

    /// As [`Loaded::open`], with what loading may take beside the weights.
    ///
    /// # Errors
    /// As [`Loaded::open`].
    pub fn open_within(
        checkpoint: &Checkpoint,
        precision: Precision,
        index: u32,
        staging: Staging,
    ) -> Result<Self, EngineError> {
        let format = checkpoint.weight_format(precision);
        if let Some(seed) = checkpoint.in_place() {
            return Self::synthetic(checkpoint.config(), format, seed, index);
        }
        let nvrtc = Nvrtc::load()?;
        let device = Device::open(index)?;
        let mut build = Build::new(checkpoint.config(), format)?;
        let (cubins, model) = std::thread::scope(|scope| {
            let compiling = scope.spawn(|| Kernels::compile(&device, &nvrtc, build));
            let model = Repack::load(&device, &nvrtc)
                .map_err(EngineError::from)
                .and_then(|repack| {
                    CudaModel::load(&device, &repack, checkpoint, precision, staging)
                });
            let cubins = compiling.join().expect("compiling does not panic");
            (cubins, model)
        });
        let (mut cubins, model) = (cubins?, model?);
        if model.wide_scales {
            build.wide_scales = true;
            cubins = Kernels::compile(&device, &nvrtc, build)?;
        }
        let kernels = Kernels::of_cubins(&device, &model.config, build, &cubins)?;
        Ok(Self {
            numerics_id: name_numerics(&device, &nvrtc, &build),
            device,
            kernels,
            model,
        })
    }

    /// A GPU with random weights of a shape.
    ///
    /// # Errors
    /// As [`Loaded::open`].
    pub fn synthetic(
        config: &ModelConfig,
        format: WeightFormat,
        seed: u64,
        index: u32,
    ) -> Result<Self, EngineError> {
        let nvrtc = Nvrtc::load()?;
        let device = Device::open(index)?;
        let build = Build::new(config, format)?;
        let kernels = Kernels::load(&device, &nvrtc, config, build)?;
        let model = CudaModel::synthetic(&device, &kernels, config, format, seed)?;
        Ok(Self {
            numerics_id: name_numerics(&device, &nvrtc, &build),
            device,
            kernels,
            model,
        })
    }

    /// Reads weights where there are none, so that the driver gives the device up: for tests of
    /// what is done then.
    ///
    /// # Errors
    /// The device is lost, as it should be.
    pub fn lose(&self) -> Result<(), CudaError> {
        let lm_head = &self.model.lm_head;
        let args = MatmulArgs {
            weights: NOWHERE,
            x: NOWHERE,
            out: NOWHERE,
            n_rows: 1,
            n_out: lm_head.n_out as u32,
            n_k: lm_head.n_k as u32,
            n_tiles: pack::n_tiles(lm_head.n_out) as u32,
            ..MatmulArgs::default()
        };
        self.kernels.matmul(Dense::Logits, &args)?;
        self.device.synchronize()
    }
}

/// An address that is nobody's.
const NOWHERE: u64 = 1 << 20;

/// `cuda/<architecture>/<kernel hash>/<NVRTC version>`.
fn name_numerics(device: &Device, nvrtc: &Nvrtc, build: &Build) -> String {
    let arch = kernels::architecture(device.major, device.minor);
    format!("cuda/{arch}/{}/{}", build.hash(), nvrtc.version)
}

/// What a run's bits would depend on beside the model, before anything is loaded.
///
/// # Errors
/// No driver, GPU or NVRTC, or a shape the kernels do not take.
pub fn numerics_id(
    config: &ModelConfig,
    format: WeightFormat,
    index: u32,
) -> Result<String, EngineError> {
    let nvrtc = Nvrtc::load()?;
    let device = Device::open(index)?;
    Ok(name_numerics(&device, &nvrtc, &Build::new(config, format)?))
}
