//! What the kernels' tests share: the device, kernels of a small model, numbers, comparisons.

use std::path::Path;
use std::sync::Arc;

use podium::engine::checkpoint::{MatrixFormat, Precision, VectorFormat};
use podium::engine::config::ModelConfig;
use podium::engine::cuda::buffer::{DeviceBuffer, Plain};
use podium::engine::cuda::device::Device;
use podium::engine::cuda::kernels::Build;
use podium::engine::cuda::launch::Kernels;
use podium::engine::cuda::nvrtc::Nvrtc;

/// Sums of bf16 products in f32, in another order than the reference's.
pub const PRODUCT: f32 = 1e-4;

pub fn device() -> Arc<Device> {
    Device::open(0).expect("a GPU with a driver")
}

pub fn upload<T: Plain>(device: &Arc<Device>, values: &[T]) -> DeviceBuffer<T> {
    let buffer = device.alloc("a test's values", values.len()).unwrap();
    buffer.upload(0, values).unwrap();
    buffer
}

pub fn download<T: Plain>(buffer: &DeviceBuffer<T>) -> Vec<T> {
    let mut values = vec![T::default(); buffer.len()];
    buffer.download(0, &mut values).unwrap();
    values
}

pub fn assert_close(got: &[f32], expected: &[f64], tolerance: f32, what: &str) {
    assert_eq!(got.len(), expected.len());
    let scale = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
    for (i, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(got) - expected).abs();
        assert!(
            error <= f64::from(tolerance) * scale.max(1.0),
            "{what}, element {i}: {got} for {expected}"
        );
    }
}

pub fn same_bits(a: &[f32], b: &[f32], what: &str) {
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}, element {i}: {a} and {b}");
    }
}

/// A number as `order_key` of kernels/common.cuh has it.
pub fn order_key(x: f32) -> u32 {
    let bits = (x + 0.0).to_bits();
    if bits & 0x8000_0000 != 0 {
        !bits
    } else {
        bits | 0x8000_0000
    }
}

pub fn small_config(n_experts: usize) -> ModelConfig {
    routing_config(n_experts, 96, 2)
}

pub fn routing_config(n_experts: usize, hidden: usize, k: usize) -> ModelConfig {
    let text = format!(
        r#"{{"num_hidden_layers": 2, "hidden_size": {hidden}, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "num_local_experts": {n_experts},
        "num_experts_per_tok": {k}, "intermediate_size": 64, "vocab_size": 500,
        "sliding_window": 32, "rope_theta": 10000, "max_position_embeddings": 4096}}"#
    );
    ModelConfig::parse(text.as_bytes(), Path::new("test")).unwrap()
}

pub fn kernels(
    device: &Arc<Device>,
    format: MatrixFormat,
    n_experts: usize,
    wide: bool,
) -> Kernels {
    let [kernels, _] = both_kernels(device, format, n_experts, wide);
    kernels
}

/// The kernels for this GPU, and those of a GPU without warpgroup instructions.
pub fn both_kernels(
    device: &Arc<Device>,
    format: MatrixFormat,
    n_experts: usize,
    wide: bool,
) -> [Kernels; 2] {
    let config = small_config(n_experts);
    let mut build = Build::new(
        &config,
        Precision::Stored.formats(format, VectorFormat::Bf16),
    )
    .unwrap();
    build.wide_scales = wide;
    let nvrtc = Nvrtc::load().expect("NVRTC");
    [true, false].map(|warpgroups| {
        build.warpgroups = warpgroups;
        Kernels::load(device, &nvrtc, &config, build).unwrap()
    })
}
