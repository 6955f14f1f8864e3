//! The CUDA backend: the whole model on one GPU, kernels compiled at run time for the device found.
//!
//! Driver and NVRTC are loaded when a GPU is asked for, so the binary starts where neither is.
//! [`loaded`] is a GPU with kernels and weights, which [`load`] brings; [`backend`] owns memory and sequences, [`forward`] puts the
//! operations in order, [`launch`] is the only place that launches (for loading: [`repack`]),
//! `kernels/` at the root holds the texts. A row's bits depend on the
//! row alone: each output is one accumulator chain along ascending k, whatever variant computes it.

pub mod arguments;
pub mod backend;
pub mod buffer;
pub mod counts;
mod decode;
pub mod device;
pub mod error;
pub mod forward;
pub mod graph;
pub mod kernels;
pub mod launch;
pub mod load;
pub mod loaded;
pub mod memory;
pub mod model;
pub mod nvml;
pub mod nvrtc;
pub mod pack;
pub mod pieces;
pub mod places;
pub mod repack;
pub mod sharing;
pub mod stream;
pub mod tensor_map;
mod timing;
pub mod variants;
mod workspace;

pub use backend::{CudaBackend, CudaOptions};
pub use decode::{Event, Slot};
pub use error::CudaError;
pub use load::Staging;
pub use loaded::{Loaded, numerics_id};
