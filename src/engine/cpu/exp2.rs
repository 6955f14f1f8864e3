//! Powers of two by AVX-512, for what is rounded to bf16 afterwards.
//!
//! Half the operations of [`exp`](super::lanes::exp), whose bits are the same on all paths; this is for what only
//! the tile unit's path does.

#![allow(clippy::needless_range_loop, reason = "registers in lockstep")]

use std::arch::x86_64::*;

/// 2^x of what is below 127: within 3e-6, a thousandth of what rounding to bf16 changes. A NaN stays one; far
/// below 0 it is 2^-125.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
pub fn exp2(x: __m512) -> __m512 {
    /// Of the polynomial, from x^4 down to 1: minimax of the relative error within 1/2 of 0, and 1 there.
    const POLYNOMIAL: [f32; 5] = [0.009_582_853, 0.055_906_426, 0.240_240_99, 0.693_124_2, 1.0];
    /// Adding 1.5 x 2^23 leaves the nearest whole number in the low mantissa bits.
    const SHIFT: f32 = 12_582_912.0;
    let shift = _mm512_set1_ps(SHIFT);
    // Of a NaN the second is taken.
    let x = _mm512_max_ps(_mm512_set1_ps(-125.0), x);
    let shifted = _mm512_add_ps(x, shift);
    let rest = _mm512_sub_ps(x, _mm512_sub_ps(shifted, shift));
    let mut p = _mm512_set1_ps(POLYNOMIAL[0]);
    for i in 1..POLYNOMIAL.len() {
        p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(POLYNOMIAL[i]));
    }
    let power = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
    _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), power))
}

#[cfg(test)]
mod tests {
    #![allow(unsafe_code, reason = "SIMD loads and stores through pointers")]

    use super::super::lanes::REGISTER;
    use super::super::path::CpuPath;
    use super::*;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn exp2_all(values: &mut [f32]) {
        for lanes in values.as_chunks_mut::<REGISTER>().0 {
            // SAFETY: it is a register.
            unsafe {
                let y = exp2(_mm512_loadu_ps(lanes.as_ptr()));
                _mm512_storeu_ps(lanes.as_mut_ptr(), y);
            }
        }
    }

    #[test]
    fn exp2_is_as_near_as_it_says() {
        if !CpuPath::available().iter().any(|path| path.has_pairs()) {
            return;
        }
        let mut values: Vec<f32> = (0..320_000).map(|i| i as f32 / 1280.0 - 124.0).collect();
        values[..3].copy_from_slice(&[0.0, -0.0, 1e-6]);
        let mut got = values.clone();
        let far = [f32::NEG_INFINITY, -1e30, -126.0, f32::NAN];
        got.extend(far);
        got.resize(values.len() + REGISTER, 0.0);
        // SAFETY: the CPU has all that pairs ask for.
        unsafe {
            exp2_all(&mut got);
        }
        for (&x, &got) in values.iter().zip(&got) {
            let expected = f64::from(x).exp2();
            let error = (f64::from(got) / expected - 1.0).abs();
            assert!(error < 3e-6, "2^{x}: {got}");
        }
        assert_eq!(got[0], 1.0);
        let far = &got[values.len()..];
        assert!(
            far[..3].iter().all(|&y| y == 125.0f32.exp2().recip()),
            "{far:?}"
        );
        assert!(far[3].is_nan());
    }
}
