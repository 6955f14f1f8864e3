//! Rotary positions: pairs are halves of a head (`i` and `i + head_dim / 2`), cos and sin are f32
//! and carry YaRN's concentration; q, k and v are then rounded to bf16 unless exact.

use super::buffer::{Buffer, Disjoint};
use super::gemm::Exec;
use super::lanes::for_each;
use super::path::on_each_path;
use crate::engine::EngineError;
use crate::engine::config::ModelConfig;
use crate::quant::bf16;

/// cos and sin of all positions: `[max_context][cos of the pairs | sin of the pairs]`.
pub struct RopeTable {
    head_dim: usize,
    values: Buffer<f32>,
}

impl RopeTable {
    /// # Errors
    /// Out of memory.
    pub fn new(config: &ModelConfig, max_context: usize) -> Result<Self, EngineError> {
        let head_dim = config.head_dim;
        let mut values = Buffer::zeroed("rotary table", max_context * head_dim)?;
        let (frequencies, concentration) = config.rope_frequencies();
        for (position, row) in values.chunks_exact_mut(head_dim).enumerate() {
            let (cos, sin) = row.split_at_mut(head_dim / 2);
            for (pair, &frequency) in frequencies.iter().enumerate() {
                // The angle is an f32 product, as in transformers; its cos is not.
                let angle = f64::from(position as f32 * frequency);
                cos[pair] = (angle.cos() * f64::from(concentration)) as f32;
                sin[pair] = (angle.sin() * f64::from(concentration)) as f32;
            }
        }
        Ok(Self { head_dim, values })
    }

    pub fn n_bytes(&self) -> u64 {
        self.values.n_bytes()
    }

    /// Bytes of a table, as planned.
    pub fn planned_bytes(config: &ModelConfig, max_context: usize) -> u64 {
        (max_context * config.head_dim * size_of::<f32>()) as u64
    }

    fn row(&self, position: usize) -> (&[f32], &[f32]) {
        self.values[position * self.head_dim..][..self.head_dim].split_at(self.head_dim / 2)
    }
}

/// Turns heads `heads` of each row of `qkv` `[n_rows, row_len]`, and rounds from the first of
/// them to the row's end.
pub fn rope(
    exec: &Exec,
    table: &RopeTable,
    positions: &[u32],
    heads: std::ops::Range<usize>,
    row_len: usize,
    qkv: &mut [f32],
) {
    let first = heads.start * table.head_dim;
    let n_turned = heads.len() * table.head_dim;
    let qkv = Disjoint::new(qkv);
    for_each(positions.len(), 16, |row| {
        // SAFETY: one task a row.
        #[allow(unsafe_code, reason = "rows are disjoint")]
        let row_values = unsafe { qkv.slice_mut(row * row_len + first, row_len - first) };
        let (cos, sin) = table.row(positions[row] as usize);
        turn(exec.path, cos, sin, &mut row_values[..n_turned]);
        if !exec.exact {
            round_all(exec.path, row_values);
        }
    });
}

on_each_path! {
    fn turn(cos: &[f32], sin: &[f32], heads: &mut [f32]) = turn_body
}

#[inline(always)]
fn turn_body(cos: &[f32], sin: &[f32], heads: &mut [f32]) {
    let n_pairs = cos.len();
    let sin = &sin[..n_pairs];
    for head in heads.chunks_exact_mut(2 * n_pairs) {
        let (low, high) = head.split_at_mut(n_pairs);
        for pair in 0..n_pairs {
            let (a, b) = (low[pair], high[pair]);
            low[pair] = a.mul_add(cos[pair], -(b * sin[pair]));
            high[pair] = b.mul_add(cos[pair], a * sin[pair]);
        }
    }
}

on_each_path! {
    /// Rounds each value to bf16.
    pub fn round_all(values: &mut [f32]) = round_all_body
}

#[inline(always)]
fn round_all_body(values: &mut [f32]) {
    for value in values {
        *value = bf16::round(*value);
    }
}

/// As [`rope`], slow and obvious.
pub fn reference(
    exec: &Exec,
    table: &RopeTable,
    positions: &[u32],
    heads: std::ops::Range<usize>,
    row_len: usize,
    qkv: &mut [f32],
) {
    let half = table.head_dim / 2;
    for (row, &position) in positions.iter().enumerate() {
        let row_values = &mut qkv[row * row_len..][..row_len];
        let (cos, sin) = table.row(position as usize);
        for head in heads.clone() {
            let head_values = &mut row_values[head * table.head_dim..][..table.head_dim];
            for pair in 0..half {
                let (a, b) = (
                    f64::from(head_values[pair]),
                    f64::from(head_values[pair + half]),
                );
                let (cos, sin) = (f64::from(cos[pair]), f64::from(sin[pair]));
                head_values[pair] = (a * cos - b * sin) as f32;
                head_values[pair + half] = (b * cos + a * sin) as f32;
            }
        }
        if !exec.exact {
            for value in &mut row_values[heads.start * table.head_dim..] {
                *value = bf16::round(*value);
            }
        }
    }
}
