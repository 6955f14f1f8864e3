//! Token ids to residual rows: `x[row] = embedding[token[row]]`, bf16 to f32, exact.

use super::buffer::{Buffer, Disjoint};
use super::lanes::for_each;
use crate::engine::TokenId;
use crate::quant::bf16;

/// Fills `out` `[n_rows, hidden]` from `table` `[n_vocab, hidden]`.
///
/// # Panics
/// When an id is not below `n_vocab`; the caller checks what came from outside.
pub fn embed(table: &Buffer<u16>, hidden: usize, tokens: &[TokenId], out: &mut [f32]) {
    let out = Disjoint::new(out);
    for_each(tokens.len(), 64, |row| {
        // SAFETY: one task a row.
        #[allow(unsafe_code, reason = "rows are disjoint")]
        let out = unsafe { out.slice_mut(row * hidden, hidden) };
        let source = &table[tokens[row] as usize * hidden..][..hidden];
        for (out, &bits) in out.iter_mut().zip(source) {
            *out = bf16::to_f32(bits);
        }
    });
}

/// As [`embed`], slow and obvious.
pub fn reference(table: &Buffer<u16>, hidden: usize, tokens: &[TokenId], out: &mut [f32]) {
    for (row, &token) in tokens.iter().enumerate() {
        for i in 0..hidden {
            out[row * hidden + i] = bf16::to_f32(table[token as usize * hidden + i]);
        }
    }
}
