//! What the kernels' tests share: numbers, comparisons and their tolerances, all paths in turn.

use podium::engine::config::ModelConfig;
use podium::engine::cpu::buffer::{Buffer, Plain};
use podium::engine::cpu::gemm::Exec;
use podium::engine::cpu::path::CpuPath;
use podium::engine::cpu::weights::Vector;
use podium::quant::bf16;

use crate::support::random::Random;

/// f32 chains of up to 416 products against f64: rounding grows with the square root of their
/// number, of terms of about 1.
pub const PRODUCT: f32 = 2e-5;
/// One operation or a short sum, and `exp` to 2 ulp.
pub const ELEMENT: f32 = 2e-6;
/// A result rounded to bf16 may fall to the other neighbour: 2^-8 of its size.
pub const BF16: f32 = 4e-3;

pub fn vector(random: &mut Random, n: usize) -> Vector {
    let mut values = buffer::<u16>(n);
    values
        .iter_mut()
        .for_each(|v| *v = bf16::from_f32(random.value()));
    Vector::Bf16(values)
}

pub fn buffer<T: Plain>(n: usize) -> Buffer<T> {
    Buffer::zeroed("a test", n).expect("memory")
}

pub fn exec(path: CpuPath, exact: bool, head_dim: usize) -> Exec {
    Exec::new(path, exact, 2, head_dim, 1 << 22).expect("memory")
}

/// Absolute below 1, relative above; NaN and infinity fail.
fn assert_close(got: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), expected.len());
    let mut worst = (0.0, 0);
    for (i, (a, b)) in got.iter().zip(expected).enumerate() {
        assert!(a.is_finite() && b.is_finite(), "{what}: {a} for {b} at {i}");
        let error = (a - b).abs() / b.abs().max(1.0);
        if error > worst.0 {
            worst = (error, i);
        }
    }
    let (error, i) = worst;
    assert!(
        error <= tolerance,
        "{what}: {} for {} at {i}, the largest error {error}",
        got[i],
        expected[i]
    );
}

pub fn assert_same_bits(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len());
    for (i, (a, b)) in got.iter().zip(expected).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}: {a} for {b} at {i}");
    }
}

/// Runs `kernel` on each path, compares with `expected`, and the paths with each other.
pub fn on_all_paths(
    expected: &[f32],
    tolerance: f32,
    what: &str,
    mut kernel: impl FnMut(CpuPath) -> Vec<f32>,
) {
    let mut first: Option<Vec<f32>> = None;
    for path in CpuPath::available() {
        let what = format!("{what} on {}", path.name());
        let got = kernel(path);
        assert_close(&got, expected, tolerance, &what);
        match &first {
            Some(first) => assert_same_bits(&got, first, &what),
            None => first = Some(got),
        }
    }
}

pub fn config(n_heads: usize, n_kv_heads: usize, head_dim: usize, window: usize) -> ModelConfig {
    let text = format!(
        r#"{{"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": {n_heads},
        "num_key_value_heads": {n_kv_heads}, "head_dim": {head_dim}, "num_local_experts": 4,
        "num_experts_per_tok": 2, "intermediate_size": 64, "vocab_size": 50,
        "sliding_window": {window}, "rope_theta": 10000, "max_position_embeddings": 4096,
        "rope_scaling": {{"rope_type": "yarn", "factor": 8.0,
        "original_max_position_embeddings": 64, "truncate": false}}}}"#
    );
    ModelConfig::parse(text.as_bytes(), std::path::Path::new("test")).expect("valid")
}
