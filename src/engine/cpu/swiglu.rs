//! SwiGLU with limits: `(up + 1) * gate * sigmoid(1.702 gate)`, the gate clamped from above only,
//! up on both sides (gpt_oss/torch/model.py, `swiglu`).
//!
//! It runs as the epilogue of the gate-up product: a weight tile has 16 gates in its lower lanes
//! and their 16 ups in its upper lanes.

use super::lanes::{LANES, exp};
use super::path::{CpuPath, on_each_path};
use crate::quant::bf16;

/// Pairs of a tile.
pub const PAIRS: usize = LANES / 2;

/// Steepness of the sigmoid.
const ALPHA: f32 = 1.702;

on_each_path! {
    /// Adds `bias` to each row of a tile and joins its pairs into the lower lanes; rounds to bf16
    /// unless `exact`, and then takes two to a word `in_words`.
    pub fn swiglu(
        limit: f32,
        exact: bool,
        in_words: bool,
        bias: &[f32; LANES],
        rows: &mut [[f32; LANES]],
    ) = body
}

#[inline(always)]
fn body(limit: f32, exact: bool, in_words: bool, bias: &[f32; LANES], rows: &mut [[f32; LANES]]) {
    for row in rows {
        let mut joined = [0.0; PAIRS];
        for pair in 0..PAIRS {
            // Comparisons that are false for NaN keep it.
            let gate = row[pair] + bias[pair];
            let gate = if gate > limit { limit } else { gate };
            let up = row[PAIRS + pair] + bias[PAIRS + pair];
            let up = if up > limit { limit } else { up };
            let up = if up < -limit { -limit } else { up };
            let gated = gate / (1.0 + exp(-ALPHA * gate));
            let value = (up + 1.0) * gated;
            joined[pair] = if exact { value } else { bf16::round(value) };
        }
        if in_words {
            for word in 0..PAIRS / 2 {
                let [even, odd] = [joined[2 * word], joined[2 * word + 1]].map(f32::to_bits);
                row[word] = f32::from_bits(even >> 16 | odd & 0xFFFF_0000);
            }
            continue;
        }
        // As an array: `copy_from_slice` would be a call.
        let lower: &mut [f32; PAIRS] = row.first_chunk_mut().expect("half of the lanes");
        *lower = joined;
    }
}

/// As [`swiglu`], slow and obvious.
pub fn reference(
    _path: CpuPath,
    limit: f32,
    exact: bool,
    bias: &[f32; LANES],
    rows: &mut [[f32; LANES]],
) {
    let limit = f64::from(limit);
    for row in rows {
        for pair in 0..PAIRS {
            let gate = (f64::from(row[pair]) + f64::from(bias[pair])).min(limit);
            let up = f64::from(row[PAIRS + pair]) + f64::from(bias[PAIRS + pair]);
            let sigmoid = 1.0 / (1.0 + (-f64::from(ALPHA) * gate).exp());
            let value = ((up.clamp(-limit, limit) + 1.0) * gate * sigmoid) as f32;
            row[pair] = if exact { value } else { bf16::round(value) };
        }
    }
}
