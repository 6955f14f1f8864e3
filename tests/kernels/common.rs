//! What the kernels' tests share: numbers, comparisons and their tolerances, all paths in turn.

use podium::engine::config::ModelConfig;
use podium::engine::cpu::buffer::{Buffer, Plain};
use podium::engine::cpu::gemm::Exec;
use podium::engine::cpu::path::CpuPath;
use podium::engine::cpu::weights::Vector;
use podium::quant::bf16;

/// f32 chains of up to 416 products against f64: rounding grows with the square root of their
/// number, of terms of about 1.
pub const PRODUCT: f32 = 2e-5;
/// One operation or a short sum, and `exp` to 2 ulp.
pub const ELEMENT: f32 = 2e-6;
/// A result rounded to bf16 may fall to the other neighbour: 2^-8 of its size.
pub const BF16: f32 = 4e-3;

/// SplitMix64: values that differ by position.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Between -1 and 1.
    pub fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }

    pub fn vector(&mut self, n: usize) -> Vector {
        let mut values = buffer::<u16>(n);
        values
            .iter_mut()
            .for_each(|v| *v = bf16::from_f32(self.value()));
        Vector::Bf16(values)
    }
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
