//! Products of bf16 pairs, where the CPU has an instruction for them: the same chains as
//! [`fma_chain_in_pairs`](super::lanes::fma_chain_in_pairs), half as many instructions.

use std::ops::Range;

use super::gemm::{Exec, GROUP_ROWS, Output};
use super::lanes::{LANES, most_rows};
use super::path::{CpuPath, on_each_path};
use super::weights::{CHUNK_K, FUSED_ROWS, Tiles};

/// Rows whose chains lie in registers at once.
const FEW_ROWS: usize = 12;

/// Multiplies tiles with rows of pairs; as [`multiply`](super::gemm::multiply), the row at index `i`
/// being the words of `x` from `row_start(i)` on.
pub fn multiply<W: Tiles>(
    exec: &Exec,
    weights: &W,
    tiles: Range<usize>,
    x: &[u32],
    n_rows: usize,
    row_start: impl Fn(usize) -> usize,
    mut output: impl Output,
) {
    let n_k = weights.n_k();
    exec.with_scratch(|scratch| {
        let mut acc = [[0.0; LANES]; GROUP_ROWS];
        let mut starts = [0; GROUP_ROWS];
        for group in (0..n_rows).step_by(GROUP_ROWS) {
            let n = GROUP_ROWS.min(n_rows - group);
            let starts = &mut starts[..n];
            for (i, start) in starts.iter_mut().enumerate() {
                *start = row_start(group + i);
            }
            if n <= FUSED_ROWS
                && fused(
                    exec,
                    weights,
                    tiles.clone(),
                    &mut acc[..n],
                    x,
                    starts,
                    |tile, acc| {
                        output.take(tile, group, acc);
                    },
                )
            {
                continue;
            }
            let joint = joint_tiles(n);
            for first in tiles.clone().step_by(joint) {
                let n_tiles = joint.min(tiles.end - first);
                for tile in first..first + n_tiles {
                    output.prefetch(tile, group..group + n);
                }
                let acc = &mut acc[..n_tiles * n];
                acc.fill([0.0; LANES]);
                let packed = weights.packed_pairs(first);
                // Few rows take packed pairs straight from memory.
                let a_chunk = match packed {
                    Some(_) if n <= FEW_ROWS => n_k,
                    _ => CHUNK_K,
                };
                for k in (0..n_k).step_by(a_chunk) {
                    let n_k = a_chunk.min(n_k - k);
                    let (w, w_tile) = match packed {
                        Some((w, w_tile)) => (&w[k / 2 * LANES..], w_tile),
                        None => {
                            let w_tile = n_k / 2 * LANES;
                            let w = &mut scratch.pairs[..n_tiles * w_tile];
                            for (i, w) in w.chunks_exact_mut(w_tile).enumerate() {
                                weights.unpack_pairs(exec.path, first + i, k, n_k, w);
                            }
                            (&*w, w_tile)
                        }
                    };
                    pair_chain(exec.path, acc, w, w_tile, &x[k / 2..], starts, n_k / 2);
                }
                for (i, acc) in acc.chunks_exact_mut(n).enumerate() {
                    output.take(first + i, group, acc);
                }
            }
        }
    });
}

/// Few rows of a format that is unpacked in registers; `false` for one that is not.
fn fused<W: Tiles>(
    exec: &Exec,
    weights: &W,
    tiles: Range<usize>,
    acc: &mut [[f32; LANES]],
    x: &[u32],
    starts: &[usize],
    mut finish: impl FnMut(usize, &mut [[f32; LANES]]),
) -> bool {
    for tile in tiles {
        acc.fill([0.0; LANES]);
        if !weights.fused_chain(exec.path, tile, acc, x, starts) {
            return false;
        }
        finish(tile, acc);
    }
    true
}

/// Tiles that [`pair_chain`] takes together for so many rows: with few rows a chain waits for its
/// own sums, and more tiles are more chains.
pub const fn joint_tiles(n_rows: usize) -> usize {
    match n_rows {
        1 => MOST_JOINT,
        2 | 3 => 2,
        _ => 1,
    }
}

/// The most of them.
pub const MOST_JOINT: usize = 4;

/// Continues chains over `n_pairs` pairs of bf16, for as many tiles as `acc` has for each row, one
/// behind the other: `w[tile * w_tile + pair * LANES + lane]` and `x[x_starts[t] + pair]` hold the
/// even k in their low halves, the odd one in the high halves. The bits of [`fma_chain_in_pairs`](super::lanes::fma_chain_in_pairs) on
/// the same values, but where subnormal numbers are.
///
/// # Panics
/// When a slice is too short, there are more tiles than [`joint_tiles`], or the path has no
/// instruction for it.
pub fn pair_chain(
    path: CpuPath,
    acc: &mut [[f32; LANES]],
    w: &[u32],
    w_tile: usize,
    x: &[u32],
    x_starts: &[usize],
    n_pairs: usize,
) {
    let n_rows = x_starts.len();
    let n_tiles = acc.len() / n_rows.max(1);
    if n_tiles == 0 || n_pairs == 0 {
        return;
    }
    assert_eq!(acc.len(), n_rows * n_tiles, "one chain a row and tile");
    assert!(n_tiles <= joint_tiles(n_rows), "too many tiles");
    let end = (n_tiles - 1) * w_tile + n_pairs * LANES;
    assert!(end <= w.len(), "weights too short");
    let furthest = x_starts.iter().copied().max().unwrap_or(0);
    assert!(furthest + n_pairs <= x.len(), "rows too short");
    assert!(path.has_pairs(), "products of bf16 pairs");
    macro_rules! block {
        ($n:literal, $tiles:literal, $acc:expr, $starts:expr) => {
            pair_block::<$n, $tiles>($acc, w, w_tile, x, $starts, n_pairs)
        };
    }
    match (n_rows, n_tiles) {
        (1, 2) => return block!(1, 2, acc, x_starts),
        (1, 3) => return block!(1, 3, acc, x_starts),
        (1, 4) => return block!(1, 4, acc, x_starts),
        (2, 2) => return block!(2, 2, acc, x_starts),
        (3, 2) => return block!(3, 2, acc, x_starts),
        _ => {}
    }
    let n_blocks = n_rows.div_ceil(most_rows(path));
    let n = n_rows.div_ceil(n_blocks);
    for (acc, x_starts) in acc.chunks_mut(n).zip(x_starts.chunks(n)) {
        macro_rules! rows {
            ($($n:literal)*) => {
                match acc.len() {
                    $($n => block!($n, 1, acc, x_starts),)*
                    n => unreachable!("a block of {n} rows"),
                }
            };
        }
        rows!(1 2 3 4 5 6 7 8 9 10 11 12);
    }
}

/// `T` rows and `N` tiles; the caller has checked bounds and path.
#[inline(always)]
fn pair_block<const T: usize, const N: usize>(
    acc: &mut [[f32; LANES]],
    w: &[u32],
    w_tile: usize,
    x: &[u32],
    x_starts: &[usize],
    n_pairs: usize,
) {
    let (tiles, _) = acc.as_chunks_mut::<T>();
    let acc: &mut [[[f32; LANES]; T]; N] = tiles.try_into().expect("as many tiles");
    let x_starts: &[usize; T] = x_starts.try_into().expect("the caller checked the length");
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code, reason = "features were detected, bounds checked")]
    // SAFETY: such a path exists only where the CPU has AVX512-BF16; bounds were checked.
    unsafe {
        x86::pair_block(acc, w, w_tile, x, x_starts, n_pairs);
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("{n_pairs} pairs, {acc:?}, {w_tile} of {w:?}, {x:?}, {x_starts:?}: no such path");
}

on_each_path! {
    /// Values that are bf16 already, two a word, the first in the low half.
    pub fn to_pairs(values: &[f32], pairs: &mut [u32]) = to_pairs_body
}

#[inline(always)]
fn to_pairs_body(values: &[f32], pairs: &mut [u32]) {
    // Looked at once, behind the loop: a look at each would stand between the loop and its lanes.
    let mut any = 0;
    for (&[even, odd], pair) in values.as_chunks::<2>().0.iter().zip(pairs) {
        let (even, odd) = (even.to_bits(), odd.to_bits());
        any |= even | odd;
        *pair = even >> 16 | odd & 0xFFFF_0000;
    }
    debug_assert_eq!(any & 0xFFFF, 0, "bf16 values");
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "SIMD loads through pointers")]
#[allow(clippy::needless_range_loop, reason = "registers in lockstep")]
mod x86 {
    use super::LANES;
    use std::arch::x86_64::*;

    /// # Safety
    /// The CPU has AVX512-BF16; `w` holds `n_pairs` steps of each tile and `x` holds `n_pairs` factors
    /// of each row.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn pair_block<const T: usize, const N: usize>(
        acc: &mut [[[f32; LANES]; T]; N],
        w: &[u32],
        w_tile: usize,
        x: &[u32],
        x_starts: &[usize; T],
        n_pairs: usize,
    ) {
        let mut low = [[_mm512_setzero_ps(); T]; N];
        let mut high = [[_mm512_setzero_ps(); T]; N];
        let mut rows = [x.as_ptr(); T];
        for t in 0..T {
            rows[t] = x.as_ptr().wrapping_add(x_starts[t]);
            for tile in 0..N {
                let acc = acc[tile][t].as_ptr();
                // SAFETY: 32 lanes a row.
                unsafe {
                    low[tile][t] = _mm512_loadu_ps(acc);
                    high[tile][t] = _mm512_loadu_ps(acc.wrapping_add(16));
                }
            }
        }
        let mut step = w.as_ptr().cast::<i32>();
        for pair in 0..n_pairs {
            // SAFETY: the caller has checked that the pair lies inside `w` and `x`; a register of
            // words is one of bf16 pairs.
            unsafe {
                let bf16 = |words: __m512i| std::mem::transmute::<__m512i, __m512bh>(words);
                for tile in 0..N {
                    let step = step.wrapping_add(tile * w_tile);
                    let w_low = bf16(_mm512_loadu_epi32(step));
                    let w_high = bf16(_mm512_loadu_epi32(step.wrapping_add(16)));
                    for t in 0..T {
                        let factor = rows[t].wrapping_add(pair).read_unaligned();
                        let factor = bf16(_mm512_set1_epi32(factor.cast_signed()));
                        low[tile][t] = _mm512_dpbf16_ps(low[tile][t], w_low, factor);
                        high[tile][t] = _mm512_dpbf16_ps(high[tile][t], w_high, factor);
                    }
                }
            }
            step = step.wrapping_add(LANES);
        }
        for tile in 0..N {
            for t in 0..T {
                let acc = acc[tile][t].as_mut_ptr();
                // SAFETY: 32 lanes a row.
                unsafe {
                    _mm512_storeu_ps(acc, low[tile][t]);
                    _mm512_storeu_ps(acc.wrapping_add(16), high[tile][t]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lanes::fma_chain_in_pairs;
    use super::*;

    #[test]
    fn chains_in_pairs_are_equal_on_all_paths() {
        // bf16 of all signs and 40 powers of two, and zeros.
        let value = |i: usize| {
            let word = (i as u32).wrapping_mul(2_654_435_761);
            let (sign, exponent, mantissa) = (word & 1, 107 + word % 41, word >> 25);
            let bits = sign << 31 | exponent << 23 | mantissa << 16;
            if word.is_multiple_of(13) {
                0.0
            } else {
                f32::from_bits(bits)
            }
        };
        for n_k in [2, 32, 96] {
            for n_rows in [1usize, 2, 3, 12, 13, 29] {
                let w: Vec<f32> = (0..n_k * LANES).map(value).collect();
                let x: Vec<f32> = (0..n_rows * n_k).map(|i| value(i + 77)).collect();
                let starts: Vec<usize> = (0..n_rows).rev().map(|t| t * n_k).collect();
                let mut expected = vec![[0.5f32; LANES]; n_rows];
                for (acc, start) in expected.iter_mut().zip(&starts) {
                    for k in (0..n_k).step_by(2).flat_map(|k| [k + 1, k]) {
                        for lane in 0..LANES {
                            acc[lane] = w[k * LANES + lane].mul_add(x[start + k], acc[lane]);
                        }
                    }
                }
                for path in CpuPath::available() {
                    let mut acc = vec![[0.5f32; LANES]; n_rows];
                    fma_chain_in_pairs(path, &mut acc, &w, &x, &starts, n_k);
                    assert_eq!(acc, expected, "{path:?}");
                    if !path.has_pairs() {
                        continue;
                    }
                    let bits = |x: f32| x.to_bits() >> 16;
                    let w: Vec<u32> = (0..n_k / 2 * LANES)
                        .map(|i| i / LANES * 2 * LANES + i % LANES)
                        .map(|at| bits(w[at]) | bits(w[at + LANES]) << 16)
                        .collect();
                    let mut pairs = vec![0; x.len() / 2];
                    to_pairs(path, &x, &mut pairs);
                    let starts: Vec<usize> = starts.iter().map(|start| start / 2).collect();
                    let mut acc = vec![[0.5f32; LANES]; n_rows];
                    pair_chain(path, &mut acc, &w, 0, &pairs, &starts, n_k / 2);
                    assert_eq!(acc, expected, "{path:?} by its instruction");
                    for n_tiles in 2..=joint_tiles(n_rows) {
                        let mut acc = vec![[0.5f32; LANES]; n_tiles * n_rows];
                        let w_tile = w.len();
                        let w = w.repeat(n_tiles);
                        pair_chain(path, &mut acc, &w, w_tile, &pairs, &starts, n_k / 2);
                        assert_eq!(acc, expected.repeat(n_tiles), "{n_tiles} tiles");
                    }
                }
            }
        }
    }
}
