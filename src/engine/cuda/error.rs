//! What can go wrong between podium and a GPU.

use std::path::PathBuf;

/// A failure of driver, compiler or device, with what was tried.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    #[error("no CUDA driver: `libcuda.so.1` cannot be loaded")]
    NoDriver,
    #[error("the CUDA driver finds no GPU: {reason}")]
    NoDevices { reason: String },
    #[error("there is no GPU {index}, the driver has {count}")]
    NoSuchDevice { index: u32, count: u32 },
    #[error("`{name}` has compute capability {major}.{minor}, expected 8.0 or newer")]
    TooOld {
        name: String,
        major: u32,
        minor: u32,
    },
    #[error("no NVRTC, the CUDA run-time compiler: {tried}")]
    NoNvrtc { tried: String },
    #[error("NVRTC at `{path}` lacks `{symbol}`")]
    NvrtcSymbol { path: PathBuf, symbol: &'static str },
    #[error("NVRTC {version} cannot compile `{kernel}` for {arch}:\n{log}")]
    Compile {
        kernel: String,
        arch: String,
        version: String,
        log: String,
    },
    #[error("the driver refuses {what}: {reason}")]
    Driver { what: String, reason: String },
    #[error("the GPU was lost at {what}: {reason}")]
    Lost { what: String, reason: String },
    #[error("{what} needs {needed} bytes of device memory, {free} are free")]
    OutOfMemory {
        what: String,
        needed: u64,
        free: u64,
    },
    #[error("`{key}` is {found}, the CUDA kernels take {expected}")]
    Shape {
        key: &'static str,
        found: usize,
        expected: &'static str,
    },
    #[error("`--exact` is not available on CUDA")]
    Exact,
    #[error("{found} stop ids were given, a slot holds {most}")]
    StopTokens { found: usize, most: usize },
}

impl CudaError {
    /// How to mend it.
    pub fn hint(&self) -> String {
        match self {
            Self::NoDriver => "install the NVIDIA driver, or give `--device cpu`",
            Self::NoDevices { .. } | Self::NoSuchDevice { .. } => {
                "check `nvidia-smi` and CUDA_VISIBLE_DEVICES, or give `--device cpu`"
            }
            Self::TooOld { .. } => "give another `--device cuda:N`, or `--device cpu`",
            Self::NoNvrtc { .. } => {
                "install the CUDA toolkit or the Python package nvidia-cuda-nvrtc and let \
                 PODIUM_NVRTC name its libnvrtc.so"
            }
            Self::NvrtcSymbol { .. } => "PODIUM_NVRTC must name a libnvrtc.so of CUDA 12 or newer",
            Self::Compile { .. } => "use an NVRTC that is as new as the GPU",
            Self::Driver { .. } => "the GPU's state may be bad: check `nvidia-smi` and run again",
            Self::Lost { .. } => {
                "check `nvidia-smi` and the system's log for `Xid`, then run the same command: what is \
                 done stays"
            }
            Self::OutOfMemory { .. } => "lower `--batch` or `--context`, or free the GPU",
            Self::Shape { .. } => "give `--device cpu`",
            Self::Exact => "leave `--exact` out, or give `--device cpu`",
            Self::StopTokens { .. } => "list fewer ids in generation_config.json",
        }
        .to_owned()
    }
}
