//! Arithmetic that every kernel shares: the fma chain of all products, `exp`, and sums over
//! lanes in one fixed order.
//!
//! [`fma_chain`] is the matrix product of attention: `acc[t][lane] = fma(w[k][lane], x[t][k],
//! acc[t][lane])` for ascending `k`. [`fma_chain_in_pairs`] is that of weights: it takes the `k` in
//! pairs, the odd one first, as the instruction for bf16 pairs does ([`super::pairs`]); tiles of such
//! pairs have an order of their own ([`super::amx`]). Lanes are output rows, keys, or value dims, never
//! parts of a sum, so an output is one chain whatever the path and however many `t` run together.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::path::{CpuPath, Kind, on_each_path};

/// Lanes of a weight tile.
pub const LANES: usize = 32;

/// Continues the chains `acc[t]` over `n_k` steps.
///
/// `w` holds the lanes of step `k` at `k * w_stride`; `x[x_starts[t] + k]` is the factor of `t`.
///
/// # Panics
/// When a slice is too short.
#[inline]
pub fn fma_chain(
    path: CpuPath,
    acc: &mut [[f32; LANES]],
    w: &[f32],
    w_stride: usize,
    x: &[f32],
    x_starts: &[usize],
    n_k: usize,
) {
    fma_chain_by::<false>(path, most_rows(path), acc, w, w_stride, x, x_starts, n_k);
}

/// As [`fma_chain`], for an even `n_k` that it takes in the order 1, 0, 3, 2, …
#[inline]
pub fn fma_chain_in_pairs(
    path: CpuPath,
    acc: &mut [[f32; LANES]],
    w: &[f32],
    x: &[f32],
    x_starts: &[usize],
    n_k: usize,
) {
    assert!(n_k.is_multiple_of(2), "pairs of k");
    fma_chain_by::<true>(path, most_rows(path), acc, w, LANES, x, x_starts, n_k);
}

/// Rows whose sums lie in registers together.
pub(super) fn most_rows(path: CpuPath) -> usize {
    match path.kind() {
        Kind::Portable => 4,
        // 6 rows x 2 registers of 8 lanes, of 16 registers; half the lanes at a time.
        Kind::Avx2 => 6,
        // 12 rows x 2 registers of 16 lanes, of 32 registers.
        Kind::Avx512 | Kind::Avx512Bf16 => 12,
    }
}

/// As [`fma_chain`], with at most `most` rows in registers: the choice does not change a bit.
#[allow(
    clippy::too_many_arguments,
    reason = "a kernel takes its shapes one by one"
)]
pub fn fma_chain_by<const PAIRS: bool>(
    path: CpuPath,
    most: usize,
    acc: &mut [[f32; LANES]],
    w: &[f32],
    w_stride: usize,
    x: &[f32],
    x_starts: &[usize],
    n_k: usize,
) {
    if n_k == 0 {
        return;
    }
    assert_eq!(acc.len(), x_starts.len(), "one chain a row");
    assert!((n_k - 1) * w_stride + LANES <= w.len(), "weights too short");
    let furthest = x_starts.iter().copied().max().unwrap_or(0);
    assert!(
        furthest + n_k <= x.len() || acc.is_empty(),
        "rows too short"
    );
    // Blocks of about equal size: a small last one would leave the multipliers waiting.
    let n_blocks = acc.len().div_ceil(most.clamp(1, 12));
    let n = acc.len().div_ceil(n_blocks.max(1)).max(1);
    for (acc, x_starts) in acc.chunks_mut(n).zip(x_starts.chunks(n)) {
        macro_rules! rows {
            ($($n:literal)*) => {
                match acc.len() {
                    $($n => block::<$n, PAIRS>(path, acc, w, w_stride, x, x_starts, n_k),)*
                    n => unreachable!("a block of {n} rows"),
                }
            };
        }
        rows!(1 2 3 4 5 6 7 8 9 10 11 12);
    }
}

/// `T` rows; the caller has checked the bounds.
#[inline(always)]
fn block<const T: usize, const PAIRS: bool>(
    path: CpuPath,
    acc: &mut [[f32; LANES]],
    w: &[f32],
    w_stride: usize,
    x: &[f32],
    x_starts: &[usize],
    n_k: usize,
) {
    let acc: &mut [[f32; LANES]; T] = acc.try_into().expect("the caller matched the length");
    let x_starts: &[usize; T] = x_starts.try_into().expect("the caller checked the length");
    match path.kind() {
        Kind::Portable => block_portable::<T, PAIRS>(acc, w, w_stride, x, x_starts, n_k),
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code, reason = "features were detected, bounds checked")]
        // SAFETY: the path's features exist; `fma_chain_by` has checked the bounds.
        Kind::Avx2 => unsafe {
            x86::block_avx2::<T, PAIRS>(acc, w, w_stride, x, x_starts, n_k);
        },
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code, reason = "features were detected, bounds checked")]
        // SAFETY: as above.
        Kind::Avx512 | Kind::Avx512Bf16 => unsafe {
            x86::block_avx512::<T, PAIRS>(acc, w, w_stride, x, x_starts, n_k);
        },
        #[cfg(not(target_arch = "x86_64"))]
        _ => block_portable::<T, PAIRS>(acc, w, w_stride, x, x_starts, n_k),
    }
}

/// The k of a chain's `i`-th step.
#[inline(always)]
const fn step_k<const PAIRS: bool>(i: usize) -> usize {
    if PAIRS { i ^ 1 } else { i }
}

fn block_portable<const T: usize, const PAIRS: bool>(
    acc: &mut [[f32; LANES]; T],
    w: &[f32],
    w_stride: usize,
    x: &[f32],
    x_starts: &[usize; T],
    n_k: usize,
) {
    for i in 0..n_k {
        let k = step_k::<PAIRS>(i);
        let w = &w[k * w_stride..][..LANES];
        for (acc, start) in acc.iter_mut().zip(x_starts) {
            let x = x[start + k];
            for (acc, &w) in acc.iter_mut().zip(w) {
                *acc = w.mul_add(x, *acc);
            }
        }
    }
}

/// The inner loops advance pointers with `wrapping_add` and read them unaligned: the crate keeps
/// its debug checks, and those of `add` and `*` would stand between the products.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "SIMD loads through pointers")]
#[allow(clippy::needless_range_loop, reason = "registers in lockstep")]
mod x86 {
    use super::{LANES, step_k};
    use std::arch::x86_64::*;

    /// # Safety
    /// The CPU has AVX-512F; `w` holds `n_k` steps and `x` holds `n_k` factors of each row.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn block_avx512<const T: usize, const PAIRS: bool>(
        acc: &mut [[f32; LANES]; T],
        w: &[f32],
        w_stride: usize,
        x: &[f32],
        x_starts: &[usize; T],
        n_k: usize,
    ) {
        let mut low = [_mm512_setzero_ps(); T];
        let mut high = [_mm512_setzero_ps(); T];
        let mut rows = [x.as_ptr(); T];
        for t in 0..T {
            let acc = acc[t].as_ptr();
            rows[t] = x.as_ptr().wrapping_add(x_starts[t]);
            // SAFETY: 32 lanes a row.
            unsafe {
                low[t] = _mm512_loadu_ps(acc);
                high[t] = _mm512_loadu_ps(acc.wrapping_add(16));
            }
        }
        for i in 0..n_k {
            let k = step_k::<PAIRS>(i);
            let step = w.as_ptr().wrapping_add(k * w_stride);
            // SAFETY: the caller has checked that step `k` lies inside `w` and `x`.
            unsafe {
                let w_low = _mm512_loadu_ps(step);
                let w_high = _mm512_loadu_ps(step.wrapping_add(16));
                for t in 0..T {
                    let factor = _mm512_set1_ps(rows[t].wrapping_add(k).read_unaligned());
                    low[t] = _mm512_fmadd_ps(w_low, factor, low[t]);
                    high[t] = _mm512_fmadd_ps(w_high, factor, high[t]);
                }
            }
        }
        for t in 0..T {
            let acc = acc[t].as_mut_ptr();
            // SAFETY: 32 lanes a row.
            unsafe {
                _mm512_storeu_ps(acc, low[t]);
                _mm512_storeu_ps(acc.wrapping_add(16), high[t]);
            }
        }
    }

    /// # Safety
    /// The CPU has AVX2 and FMA; `w` holds `n_k` steps and `x` holds `n_k` factors of each row.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn block_avx2<const T: usize, const PAIRS: bool>(
        acc: &mut [[f32; LANES]; T],
        w: &[f32],
        w_stride: usize,
        x: &[f32],
        x_starts: &[usize; T],
        n_k: usize,
    ) {
        let mut rows = [x.as_ptr(); T];
        for t in 0..T {
            rows[t] = x.as_ptr().wrapping_add(x_starts[t]);
        }
        for half in [0, 16] {
            let mut low = [_mm256_setzero_ps(); T];
            let mut high = [_mm256_setzero_ps(); T];
            for t in 0..T {
                let acc = acc[t].as_ptr().wrapping_add(half);
                // SAFETY: 32 lanes a row.
                unsafe {
                    low[t] = _mm256_loadu_ps(acc);
                    high[t] = _mm256_loadu_ps(acc.wrapping_add(8));
                }
            }
            for i in 0..n_k {
                let k = step_k::<PAIRS>(i);
                let step = w.as_ptr().wrapping_add(k * w_stride + half);
                // SAFETY: the caller has checked that step `k` lies inside `w` and `x`.
                unsafe {
                    let w_low = _mm256_loadu_ps(step);
                    let w_high = _mm256_loadu_ps(step.wrapping_add(8));
                    for t in 0..T {
                        let factor = _mm256_set1_ps(rows[t].wrapping_add(k).read_unaligned());
                        low[t] = _mm256_fmadd_ps(w_low, factor, low[t]);
                        high[t] = _mm256_fmadd_ps(w_high, factor, high[t]);
                    }
                }
            }
            for t in 0..T {
                let acc = acc[t].as_mut_ptr().wrapping_add(half);
                // SAFETY: 32 lanes a row.
                unsafe {
                    _mm256_storeu_ps(acc, low[t]);
                    _mm256_storeu_ps(acc.wrapping_add(8), high[t]);
                }
            }
        }
    }
}

/// Below this `exp` is flushed to its value here (1.2e-38), the smallest normal number's
/// neighbourhood; a caller that needs zero selects it.
const EXP_MIN: f32 = -87.3;
/// Above this `exp` stays at its value here (2.2e38).
const EXP_MAX: f32 = 88.3;

/// e^x to about 1 ulp in -87.3..88.3, clamped outside, NaN for NaN, exactly 1 at 0.
/// Coefficients of the Cephes library's `expf`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Comparisons that are false for NaN keep it.
    let x = if x < EXP_MIN { EXP_MIN } else { x };
    let x = if x > EXP_MAX { EXP_MAX } else { x };
    // Adding 1.5 x 2^23 leaves the nearest whole number in the low mantissa bits.
    const SHIFT: f32 = 12_582_912.0;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    // ln 2 in two parts, so that n ln 2 is taken off almost exactly.
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    let y = p.mul_add(r * r, r) + 1.0;
    let power = shifted
        .to_bits()
        .wrapping_sub(SHIFT.to_bits())
        .wrapping_add(127)
        << 23;
    y * f32::from_bits(power)
}

/// Lanes of a register, at most.
pub const REGISTER: usize = 16;

/// Halves onto halves, down to a register.
#[inline(always)]
pub fn halved<const N: usize>(
    mut lanes: [f32; N],
    onto: impl Fn(f32, f32) -> f32,
) -> [f32; REGISTER] {
    const { assert!(N.is_power_of_two() && N >= REGISTER) };
    let mut n = N;
    while n > REGISTER {
        n /= 2;
        for i in 0..n {
            lanes[i] = onto(lanes[i], lanes[i + n]);
        }
    }
    let mut register = [0.0; REGISTER];
    // A loop: what the library would do it by is not compiled for the path's instructions.
    for (i, lane) in register.iter_mut().enumerate() {
        *lane = lanes[i];
    }
    register
}

/// The sum of all lanes, halves added to halves: one order on every path.
#[inline(always)]
pub fn sum_lanes<const N: usize>(lanes: [f32; N]) -> f32 {
    // Else the compiler takes registers apart from the first addition on, since one lane is asked for.
    sum_register(&black_box(halved(lanes, |a, b| a + b)))
}

/// The same of what [`halved`] leaves.
#[inline(always)]
pub fn sum_register(lanes: &[f32; REGISTER]) -> f32 {
    let mut lanes = *lanes;
    let mut n = REGISTER;
    while n > 1 {
        n /= 2;
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
    }
    lanes[0]
}

/// The largest lane, in all lanes of a register, where it is found and used without leaving it; a NaN may
/// be passed over, its `exp` is not.
#[inline(always)]
pub fn max_lanes<const N: usize>(lanes: [f32; N]) -> [f32; REGISTER] {
    let mut lanes = halved(lanes, larger);
    let mut n = REGISTER;
    while n > 1 {
        n /= 2;
        let others = lanes;
        for i in 0..REGISTER {
            lanes[i] = larger(lanes[i], others[(i + n) % REGISTER]);
        }
    }
    lanes
}

/// Called where a loop over rows goes on to its next row: keeps the compiler from taking a lane of many rows at
/// once, which it does where a row's lanes are few and costs it a gather for each.
#[inline(always)]
pub fn next_row() {
    black_box(());
}

#[inline(always)]
pub fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Runs `task` on `0..n`, in parallel with at least `min` tasks a piece; on the calling thread
/// when there are no more than that.
pub fn for_each(n: usize, min: usize, task: impl Fn(usize) + Send + Sync) {
    use rayon::prelude::*;
    if n <= min {
        (0..n).for_each(task);
    } else {
        (0..n)
            .into_par_iter()
            .with_min_len(min.max(1))
            .for_each(task);
    }
}

/// Runs `task` on `0..n` in parallel: a thread that is free takes the next one. For large tasks, which
/// [`for_each`] would share out many at a time, and so unevenly where they or the threads' speeds are unequal;
/// of unequal ones the largest come first.
pub fn for_each_in_turn(n: usize, task: impl Fn(usize) + Send + Sync) {
    use rayon::prelude::*;
    let next = AtomicUsize::new(0);
    let n_threads = rayon::current_num_threads().min(n);
    if n_threads <= 1 {
        return (0..n).for_each(task);
    }
    (0..n_threads)
        .into_par_iter()
        .with_max_len(1)
        .for_each(|_| {
            loop {
                let turn = next.fetch_add(1, Ordering::Relaxed);
                if turn >= n {
                    break;
                }
                task(turn);
            }
        });
}

on_each_path! {
    /// `exp` of each value, in place.
    pub fn exp_all(values: &mut [f32]) = exp_all_body
}

#[inline(always)]
fn exp_all_body(values: &mut [f32]) {
    for value in values {
        *value = exp(*value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_and_equal_on_all_paths() {
        let mut values: Vec<f32> = (0..200_000).map(|i| -87.0 + i as f32 * 8.75e-4).collect();
        values.extend([0.0, -0.0, 1e-30, -1e-30, -300.0, 300.0, f32::NEG_INFINITY]);
        let mut of_paths = Vec::new();
        for path in CpuPath::available() {
            let mut got = values.clone();
            exp_all(path, &mut got);
            of_paths.push(got.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
        }
        for bits in &of_paths {
            assert_eq!(*bits, of_paths[0]);
        }
        for (&x, &bits) in values.iter().zip(&of_paths[0]) {
            let expected = f64::from(x)
                .clamp(f64::from(EXP_MIN), f64::from(EXP_MAX))
                .exp();
            let got = f64::from(f32::from_bits(bits));
            // 2 ulp: 1 of the polynomial, 1 of the last addition.
            assert!((got / expected - 1.0).abs() < 2.4e-7, "exp({x}) = {got}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn every_turn_is_taken_once() {
        for n_threads in [1, 3] {
            let pool = crate::engine::cpu::thread_pool(n_threads).expect("threads");
            for n in [0, 1, 2, 100] {
                let turns: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
                let take = |turn: usize| {
                    turns[turn].fetch_add(1, Ordering::Relaxed);
                };
                pool.install(|| for_each_in_turn(n, take));
                assert!(turns.iter().all(|turn| turn.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn chains_are_equal_on_all_paths_and_in_all_blocks() {
        let value = |i: usize| ((i * 2_654_435_761) % 1_000_003) as f32 * 1e-5 - 5.0;
        for n_k in [1, 31, 32, 97] {
            for n_rows in [1usize, 2, 12, 13, 29] {
                let w: Vec<f32> = (0..n_k * 48).map(value).collect();
                let x: Vec<f32> = (0..n_rows * (n_k + 3)).map(|i| value(i + 77)).collect();
                let starts: Vec<usize> = (0..n_rows).rev().map(|t| t * (n_k + 3)).collect();
                let mut expected = vec![[0.5f32; LANES]; n_rows];
                for (acc, start) in expected.iter_mut().zip(&starts) {
                    for k in 0..n_k {
                        for lane in 0..LANES {
                            acc[lane] = w[k * 48 + lane].mul_add(x[start + k], acc[lane]);
                        }
                    }
                }
                for path in CpuPath::available() {
                    for most in [1, 2, 3, 5, 8, 12] {
                        let mut acc = vec![[0.5f32; LANES]; n_rows];
                        fma_chain_by::<false>(path, most, &mut acc, &w, 48, &x, &starts, n_k);
                        assert_eq!(acc, expected, "{path:?} by {most}");
                    }
                }
            }
        }
    }
}
