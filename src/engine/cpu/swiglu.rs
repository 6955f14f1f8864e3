//! SwiGLU with limits: `(up + 1) * gate * sigmoid(1.702 gate)`, the gate clamped from above only,
//! up on both sides (gpt_oss/torch/model.py, `swiglu`).
//!
//! It runs as the epilogue of the gate-up product: a weight tile has 16 gates in its lower lanes
//! and their 16 ups in its upper lanes.

#![allow(clippy::needless_range_loop, reason = "lanes in lockstep")]

use super::lanes::{LANES, both, each, exp_of};
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

on_each_path! {
    /// The same, rounded, as bf16: two to a lane, the first in the low half.
    pub fn swiglu_to_bf16(limit: f32, bias: &[f32; LANES], rows: &mut [[f32; LANES]]) = to_bf16
}

#[inline(always)]
fn to_values(limit: f32, exact: bool, bias: &[f32; LANES], rows: &mut [[f32; LANES]]) {
    let (together, rest) = rows.as_chunks_mut::<TOGETHER>();
    for rows in together {
        values_of::<_, TOGETHER_PAIRS>(limit, exact, bias, rows);
    }
    for row in rest {
        values_of::<_, PAIRS>(limit, exact, bias, std::array::from_mut(row));
    }
}

#[inline(always)]
fn to_bf16(limit: f32, bias: &[f32; LANES], rows: &mut [[f32; LANES]]) {
    let (together, rest) = rows.as_chunks_mut::<TOGETHER>();
    for rows in together {
        bf16_of::<_, TOGETHER_PAIRS>(limit, bias, rows);
    }
    for row in rest {
        bf16_of::<_, PAIRS>(limit, bias, std::array::from_mut(row));
    }
}

/// Rows whose values are computed together ([`exp_of`] says why), and their pairs.
const TOGETHER: usize = 4;
const TOGETHER_PAIRS: usize = TOGETHER * PAIRS;

/// `N`: pairs of `ROWS` rows.
#[inline(always)]
fn values_of<const ROWS: usize, const N: usize>(
    limit: f32,
    exact: bool,
    bias: &[f32; LANES],
    rows: &mut [[f32; LANES]; ROWS],
) {
    let values = joined::<ROWS, N>(limit, bias, rows);
    let values = each(
        values,
        |value| if exact { value } else { bf16::round(value) },
    );
    for row in 0..ROWS {
        let of_row: [f32; PAIRS] = part(&values, row);
        // As an array: `copy_from_slice` would be a call.
        let lower: &mut [f32; PAIRS] = rows[row].first_chunk_mut().expect("half of the lanes");
        *lower = of_row;
    }
}

#[inline(always)]
fn bf16_of<const ROWS: usize, const N: usize>(
    limit: f32,
    bias: &[f32; LANES],
    rows: &mut [[f32; LANES]; ROWS],
) {
    let values = joined::<ROWS, N>(limit, bias, rows);
    let values = each(values, bf16::from_f32);
    for row in 0..ROWS {
        let of_row: [u16; PAIRS] = part(&values, row);
        let lower: &mut [f32; PAIRS / 2] =
            rows[row].first_chunk_mut().expect("a quarter of the lanes");
        // SAFETY: both are 32 bytes, and any bits are a number.
        #[allow(unsafe_code, reason = "see above")]
        let lanes = unsafe { std::mem::transmute::<[u16; PAIRS], [f32; PAIRS / 2]>(of_row) };
        *lower = lanes;
    }
}

/// The values of a row.
#[inline(always)]
fn part<const N: usize, T: Copy + Default>(values: &[T; N], row: usize) -> [T; PAIRS] {
    let mut of_row = [T::default(); PAIRS];
    for pair in 0..PAIRS {
        of_row[pair] = values[row * PAIRS + pair];
    }
    of_row
}

/// Gates (from lane 0) or ups (from lane [`PAIRS`]) of rows, with their bias. One after the other: in one loop
/// the compiler would gather lanes of several rows.
#[inline(always)]
fn biased<const ROWS: usize, const N: usize>(
    bias: &[f32; LANES],
    rows: &[[f32; LANES]; ROWS],
    from: usize,
) -> [f32; N] {
    const { assert!(N == ROWS * PAIRS, "the pairs of all rows") };
    let mut values = [0.0; N];
    for row in 0..ROWS {
        for pair in 0..PAIRS {
            values[row * PAIRS + pair] = rows[row][from + pair] + bias[from + pair];
        }
    }
    values
}

#[inline(always)]
fn joined<const ROWS: usize, const N: usize>(
    limit: f32,
    bias: &[f32; LANES],
    rows: &[[f32; LANES]; ROWS],
) -> [f32; N] {
    let (gate, up) = (biased(bias, rows, 0), biased(bias, rows, PAIRS));
    // Comparisons that are false for NaN keep it.
    let gate = each(gate, |gate| if gate > limit { limit } else { gate });
    let up = each(up, |up| if up > limit { limit } else { up });
    let up = each(up, |up| if up < -limit { -limit } else { up });
    let exp = exp_of(each(gate, |gate| -ALPHA * gate));
    let gated = both(gate, exp, |gate, exp| gate / (1.0 + exp));
    both(up, gated, |up, gated| (up + 1.0) * gated)
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
