//! `--device`: which engine runs.

use super::JobError;
use crate::cli::values::Device;
use crate::engine::EngineError;
use crate::engine::cuda::device;
use crate::engine::cuda::nvrtc::Nvrtc;

/// The GPU that a word means, or nothing for the CPU. `auto` is the first GPU where driver, GPU
/// and NVRTC are usable, else the CPU.
///
/// # Errors
/// CUDA was asked for and cannot be used.
pub fn choose(asked: Device) -> Result<Option<u32>, JobError> {
    match asked {
        Device::Cpu => Ok(None),
        Device::Cuda(_) => Ok(Some(cuda_index(asked)?)),
        Device::Auto => {
            let usable = device::count().is_ok_and(|n| n > 0) && Nvrtc::load().is_ok();
            Ok(usable
                .then_some(0)
                .filter(|&index| device::Device::open(index).is_ok()))
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
    device::Device::open(index).map_err(EngineError::from)?;
    Nvrtc::load().map_err(EngineError::from)?;
    Ok(index)
}
