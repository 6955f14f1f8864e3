//! SwiGLU by AVX-512 with AVX512-BF16, rounded: to the nearest or, of what is within some millionths of the middle of
//! two, to either.

#![allow(unsafe_code, reason = "SIMD loads and stores through pointers")]

use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;

use super::super::exp2::exp2;
use super::super::lanes::{LANES, REGISTER};
use super::ALPHA;

/// # Safety
/// The CPU has AVX-512F, BW, DQ, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub unsafe fn swiglu_to_bf16(limit: f32, bias: &[f32; LANES], rows: &mut [[f32; LANES]]) {
    let (one, two) = (_mm512_set1_ps(1.0), _mm512_set1_ps(2.0));
    let (most, least) = (_mm512_set1_ps(limit), _mm512_set1_ps(-limit));
    // SAFETY: rows and biases are two registers each.
    unsafe {
        let biases = bias.as_ptr();
        let of_gate = _mm512_loadu_ps(biases);
        let of_up = _mm512_loadu_ps(biases.wrapping_add(REGISTER));
        for row in rows {
            let lanes = row.as_mut_ptr();
            let gate = _mm512_add_ps(_mm512_loadu_ps(lanes), of_gate);
            let up = _mm512_add_ps(_mm512_loadu_ps(lanes.wrapping_add(REGISTER)), of_up);
            // Of a NaN the second is taken.
            let gate = _mm512_min_ps(most, gate);
            let up = _mm512_max_ps(least, _mm512_min_ps(most, up));
            let power = _mm512_mul_ps(gate, _mm512_set1_ps(-ALPHA * LOG2_E));
            let power = _mm512_min_ps(_mm512_set1_ps(126.0), power);
            let divisor = _mm512_add_ps(one, exp2(power));
            // Half of the bits, then almost all.
            let inverse = _mm512_rcp14_ps(divisor);
            let inverse = _mm512_mul_ps(inverse, _mm512_fnmadd_ps(divisor, inverse, two));
            let gated = _mm512_mul_ps(gate, inverse);
            let value = _mm512_fmadd_ps(up, gated, gated);
            let rounded = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(value));
            _mm256_storeu_si256(lanes.cast(), rounded);
        }
    }
}
