//! Softmax of a tile by AVX-512 with AVX512-BF16, from scores to pairs, for 16 queries at a time.
//!
//! What a query needs one value of, its maximum or its sum, is found for all of them together: registers of two
//! queries are halved into one, and so on until each lane is a query's. Every query meets the same operations in
//! the same order wherever it is among the 16, so its company changes no bit.

#![allow(unsafe_code, reason = "SIMD loads and stores through pointers")]
#![allow(clippy::needless_range_loop, reason = "registers in lockstep")]

use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;

use super::super::super::exp2::exp2;
use super::super::super::lanes::{LANES, REGISTER};
use crate::engine::TILE_KEYS;

/// Registers of a tile's scores.
const PARTS: usize = TILE_KEYS / REGISTER;

/// Words of a row's pairs of 32 keys.
const ROW_WORDS: usize = LANES / 2;

/// Queries of a tile.
pub struct Tile<'a> {
    /// Of the lower and the upper keys.
    pub scores: [&'a [[f32; LANES]]; 2],
    /// The keys that each query sees, a bit each.
    pub seen: &'a [u64],
    pub scale: f32,
    pub maxima: &'a mut [f32],
    pub denominators: &'a mut [f32],
    pub decay: &'a mut [f32],
    /// `[2][queries][16]`.
    pub pairs: &'a mut [u32],
}

impl Tile<'_> {
    /// `ALL`: each query sees all keys.
    ///
    /// # Safety
    /// The CPU has AVX-512F, BW, DQ, VL and BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub unsafe fn softmax<const ALL: bool>(&mut self) {
        let n = self.seen.len();
        let of_each = [
            self.scores[0].len(),
            self.scores[1].len(),
            self.maxima.len(),
            self.denominators.len(),
            self.decay.len(),
        ];
        assert!(of_each.iter().all(|&len| len == n), "as many of each");
        assert_eq!(self.pairs.len(), 2 * n * ROW_WORDS, "a row of each query");
        let mut first = 0;
        while first < n {
            // SAFETY: as the caller says.
            unsafe { self.softmax_of_register::<ALL>(first) }
            first += REGISTER;
        }
    }

    /// The queries `first..first + 16`; behind the last one, it is done again for those that are not there.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn softmax_of_register<const ALL: bool>(&mut self, first: usize) {
        let n = self.seen.len();
        let last = n - 1;
        let there = u16::MAX >> (first + REGISTER).saturating_sub(n);
        // SAFETY: the slices hold the queries `..n`, and lanes behind them are masked.
        unsafe {
            let mut halves = [_mm512_setzero_ps(); REGISTER / 2];
            for i in 0..REGISTER / 2 {
                let (a, b) = (last.min(first + 2 * i), last.min(first + 2 * i + 1));
                let (of_a, of_b) = (self.largest::<ALL>(a), self.largest::<ALL>(b));
                halves[i] = halved::<LARGER>(of_a, of_b);
            }
            let largest = _mm512_mul_ps(merged::<LARGER>(halves), _mm512_set1_ps(self.scale));
            let maxima = self.maxima.as_mut_ptr().wrapping_add(first);
            let old = _mm512_maskz_loadu_ps(there, maxima);
            let max = _mm512_max_ps(old, largest);
            _mm512_mask_storeu_ps(maxima, there, max);
            let shrunk = _mm512_mul_ps(_mm512_sub_ps(old, max), _mm512_set1_ps(LOG2_E));
            let shrunk = exp2(shrunk);
            let decay = self.decay.as_mut_ptr().wrapping_add(first);
            _mm512_mask_storeu_ps(decay, there, shrunk);

            let mut below = [0.0f32; REGISTER];
            let of_max = _mm512_mul_ps(max, _mm512_set1_ps(-LOG2_E));
            _mm512_storeu_ps(below.as_mut_ptr(), of_max);
            for i in 0..REGISTER / 2 {
                let (a, b) = (last.min(first + 2 * i), last.min(first + 2 * i + 1));
                let of_a = self.probabilities::<ALL>(a, below[a - first]);
                let of_b = self.probabilities::<ALL>(b, below[b - first]);
                halves[i] = halved::<SUM>(of_a, of_b);
            }
            let sum = merged::<SUM>(halves);
            let denominators = self.denominators.as_mut_ptr().wrapping_add(first);
            let before = _mm512_maskz_loadu_ps(there, denominators);
            let sum = _mm512_fmadd_ps(before, shrunk, sum);
            _mm512_mask_storeu_ps(denominators, there, sum);
        }
    }

    /// A register of scores.
    #[inline]
    fn part(&self, query: usize, part: usize) -> *const f32 {
        let lanes = &self.scores[part / 2][query];
        lanes.as_ptr().wrapping_add(part % 2 * REGISTER)
    }

    /// The keys of it that are seen.
    #[inline]
    fn seen(&self, query: usize, part: usize) -> u16 {
        (self.seen[query] >> (part * REGISTER)) as u16
    }

    /// The largest of a query's scores, before they are scaled, in four parts of a register.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn largest<const ALL: bool>(&self, query: usize) -> __m512 {
        let mut parts = [_mm512_set1_ps(f32::NEG_INFINITY); PARTS];
        for part in 0..PARTS {
            let scores = self.part(query, part);
            // SAFETY: a part is a register.
            parts[part] = unsafe {
                match ALL {
                    true => _mm512_loadu_ps(scores),
                    false => _mm512_mask_loadu_ps(parts[part], self.seen(query, part), scores),
                }
            };
        }
        _mm512_max_ps(
            _mm512_max_ps(parts[0], parts[1]),
            _mm512_max_ps(parts[2], parts[3]),
        )
    }

    /// Writes a query's probabilities, and gives their sums in a register. `below`: what is taken off the scaled
    /// scores, as a power of two.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn probabilities<const ALL: bool>(&mut self, query: usize, below: f32) -> __m512 {
        let scale = _mm512_set1_ps(self.scale * LOG2_E);
        let below = _mm512_set1_ps(below);
        let mut p = [_mm512_setzero_ps(); PARTS];
        for part in 0..PARTS {
            // SAFETY: a part is a register.
            let scores = unsafe { _mm512_loadu_ps(self.part(query, part)) };
            let all = exp2(_mm512_fmadd_ps(scores, scale, below));
            p[part] = match ALL {
                true => all,
                false => _mm512_maskz_mov_ps(self.seen(query, part), all),
            };
        }
        let n = self.seen.len();
        for step in 0..2 {
            let pairs = _mm512_cvtne2ps_pbh(p[2 * step + 1], p[2 * step]);
            let row = &mut self.pairs[(step * n + query) * ROW_WORDS..][..ROW_WORDS];
            // SAFETY: a row is 64 bytes.
            unsafe {
                let pairs = std::mem::transmute::<__m512bh, __m512i>(pairs);
                _mm512_storeu_si512(row.as_mut_ptr().cast(), pairs);
            }
        }
        _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]))
    }
}

/// What two lanes become.
const LARGER: bool = true;
const SUM: bool = false;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn joined<const ONTO: bool>(a: __m512, b: __m512) -> __m512 {
    match ONTO {
        LARGER => _mm512_max_ps(a, b),
        SUM => _mm512_add_ps(a, b),
    }
}

/// Quarters of two registers onto the ones beside them: those of `a` in the lower half, those of `b` above.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn halved<const ONTO: bool>(a: __m512, b: __m512) -> __m512 {
    joined::<ONTO>(
        _mm512_shuffle_f32x4::<0x88>(a, b),
        _mm512_shuffle_f32x4::<0xDD>(a, b),
    )
}

/// Of registers of two queries each, a lane for each query.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn merged<const ONTO: bool>(halves: [__m512; REGISTER / 2]) -> __m512 {
    let mut quarters = [_mm512_setzero_ps(); 4];
    for i in 0..4 {
        quarters[i] = halved::<ONTO>(halves[2 * i], halves[2 * i + 1]);
    }
    // Each quarter is a query's from here on.
    let mut pairs = [_mm512_setzero_ps(); 2];
    for i in 0..2 {
        let (a, b) = (quarters[2 * i], quarters[2 * i + 1]);
        pairs[i] = joined::<ONTO>(
            _mm512_shuffle_ps::<0x44>(a, b),
            _mm512_shuffle_ps::<0xEE>(a, b),
        );
    }
    let [a, b] = pairs;
    let lanes = joined::<ONTO>(
        _mm512_shuffle_ps::<0x88>(a, b),
        _mm512_shuffle_ps::<0xDD>(a, b),
    );
    // Lane `4 i + j` is of query `4 j + i`.
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_permutexvar_ps(order, lanes)
}
