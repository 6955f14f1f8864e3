//! SwiGLU with limits: `(up + 1) * gate * sigmoid(1.702 gate)`, the gate clamped from above only,
//! up on both sides (gpt_oss/torch/model.py, `swiglu`).
//!
//! It runs as the epilogue of the gate-up product: a weight tile has 16 gates in its lower lanes
//! and their 16 ups in its upper lanes.

#[cfg(target_arch = "x86_64")]
mod x86;

use super::lanes::{LANES, exp};
use super::path::{CpuPath, on_each_path};
use crate::quant::bf16;

/// Pairs of a tile.
pub const PAIRS: usize = LANES / 2;

/// Steepness of the sigmoid.
const ALPHA: f32 = 1.702;

on_each_path! {
    /// Adds `bias` to each row of a tile and joins its pairs into the lower lanes; rounds to bf16
    /// unless `exact`.
    pub fn swiglu(limit: f32, exact: bool, bias: &[f32; LANES], rows: &mut [[f32; LANES]])
        = to_values
}

/// The same, rounded, as bf16: two to a lane, the first in the low half. Where there are instructions for pairs it
/// takes half as many operations, and what is almost in the middle of two may be rounded the other way.
#[inline(always)]
pub fn swiglu_to_bf16(path: CpuPath, limit: f32, bias: &[f32; LANES], rows: &mut [[f32; LANES]]) {
    #[cfg(target_arch = "x86_64")]
    if path.has_pairs() {
        // SAFETY: a path of this kind exists only where the CPU has its features.
        #[allow(unsafe_code, reason = "features were detected")]
        return unsafe { x86::swiglu_to_bf16(limit, bias, rows) };
    }
    swiglu_on_each(path, limit, bias, rows);
}

on_each_path! {
    fn swiglu_on_each(limit: f32, bias: &[f32; LANES], rows: &mut [[f32; LANES]]) = to_bf16
}

#[inline(always)]
fn to_values(limit: f32, exact: bool, bias: &[f32; LANES], rows: &mut [[f32; LANES]]) {
    for row in rows {
        let rounded = |value| if exact { value } else { bf16::round(value) };
        let joined = joined(limit, bias, row, rounded);
        // As an array: `copy_from_slice` would be a call.
        let lower: &mut [f32; PAIRS] = row.first_chunk_mut().expect("half of the lanes");
        *lower = joined;
    }
}

#[inline(always)]
fn to_bf16(limit: f32, bias: &[f32; LANES], rows: &mut [[f32; LANES]]) {
    for row in rows {
        let joined = joined(limit, bias, row, bf16::from_f32);
        let lower: &mut [f32; PAIRS / 2] = row.first_chunk_mut().expect("a quarter of the lanes");
        // SAFETY: both are 32 bytes, and any bits are a number.
        #[allow(unsafe_code, reason = "see above")]
        let lanes = unsafe { std::mem::transmute::<[u16; PAIRS], [f32; PAIRS / 2]>(joined) };
        *lower = lanes;
    }
}

/// A row's values, each `rounded` in the loop of its arithmetic: in a loop of its own the compiler would gather
/// lanes of many rows.
#[inline(always)]
fn joined<T: Copy + Default>(
    limit: f32,
    bias: &[f32; LANES],
    row: &[f32; LANES],
    rounded: impl Fn(f32) -> T,
) -> [T; PAIRS] {
    let mut joined = [T::default(); PAIRS];
    for pair in 0..PAIRS {
        let (gate, up) = (
            row[pair] + bias[pair],
            row[PAIRS + pair] + bias[PAIRS + pair],
        );
        joined[pair] = rounded(of_pair(limit, gate, up));
    }
    joined
}

#[inline(always)]
fn of_pair(limit: f32, gate: f32, up: f32) -> f32 {
    // Comparisons that are false for NaN keep it.
    let gate = if gate > limit { limit } else { gate };
    let up = if up > limit { limit } else { up };
    let up = if up < -limit { -limit } else { up };
    let gated = gate / (1.0 + exp(-ALPHA * gate));
    (up + 1.0) * gated
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
