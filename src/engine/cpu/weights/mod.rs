//! Weights as the kernels read them: tiles of 32 output rows, all of K, one after the other.
//!
//! A tile's lanes are 32 outputs, so a product is 32 chains side by side (see
//! [`super::lanes::fma_chain`]). Weights stay in their format and are unpacked into a scratch of
//! [`CHUNK_K`] steps that stays in the first-level cache for all rows of a group. A file a
//! format; [`Matrix`] is any of them.

mod bf16;
mod mxfp4;
mod mxint8;
mod vector;

pub use bf16::{Bf16Tiles, pack_bf16, pack_bf16_lanes, pack_bf16_run};
pub use mxfp4::{Mxfp4Tiles, pack_mxfp4_block, pack_mxfp4_lanes};
pub use mxint8::{Mxint8Tiles, pack_mxint8_block};
pub use vector::Vector;

use std::ops::Range;

use super::lanes::LANES;
use super::path::CpuPath;
use crate::engine::checkpoint::MatrixFormat;

/// Steps along K that are unpacked together.
pub const CHUNK_K: usize = 128;

/// Weights in tiles of [`LANES`] outputs.
pub trait Tiles: Sync {
    /// Length of the reduction, a multiple of 32.
    fn n_k(&self) -> usize;

    fn n_tiles(&self) -> usize;

    /// Writes `n_k` steps from `k` (a multiple of 32) of a tile's 32 lanes each to `out`.
    fn unpack(&self, path: CpuPath, tile: usize, k: usize, n_k: usize, out: &mut [f32]);

    /// The same as pairs of bf16: 32 lanes a pair of k, the even one in the low half. Where a value
    /// is subnormal it may be 0.
    fn unpack_pairs(&self, path: CpuPath, tile: usize, k: usize, n_k: usize, out: &mut [u32]) {
        /// Blocks to ask for memory ahead: 4 KiB of MXFP4.
        const AHEAD: usize = 8;
        let (packed, a_block) = self.packed_blocks();
        let first = (tile * self.n_k() + k) / BLOCK;
        let (blocks, _) = out[..n_k / 2 * LANES].as_chunks_mut();
        for (i, out) in blocks.iter_mut().enumerate() {
            prefetch(packed, (first + i + AHEAD) * a_block, a_block);
            self.unpack_block(path, first + i, out);
        }
    }

    /// The same of a block of 32 k, numbered through all tiles.
    fn unpack_block(&self, path: CpuPath, block: usize, out: &mut PairedBlock) {
        unpack_block_by_values(self, path, block, out);
    }

    /// As [`Tiles::unpack_block`], as part of a caller that was compiled for all of
    /// [`Kind::Avx512Bf16`](super::path::Kind::Avx512Bf16): after each of [`PARTS`] parts, about equal where the
    /// format's loop can be taken apart, `between` is run with their number, from 0 on.
    ///
    /// # Safety
    /// The CPU has all of it.
    #[allow(unsafe_code, reason = "features were detected")]
    #[inline(always)]
    unsafe fn unpack_block_here(
        &self,
        path: CpuPath,
        block: usize,
        out: &mut PairedBlock,
        mut between: impl FnMut(usize),
    ) {
        self.unpack_block(path, block, out);
        in_parts!(part => between(part));
    }

    /// All blocks as [`Tiles::unpack_block`] reads them, one behind the other, and the bytes of one: to ask
    /// for them ahead. Nothing, where they lie otherwise.
    fn packed_blocks(&self) -> (&[u8], usize) {
        (&[], 0)
    }

    /// The pairs of a tile and of those behind it, and how many words a tile has, where they are packed
    /// as [`Tiles::unpack_pairs`] gives them.
    fn packed_pairs(&self, _tile: usize) -> Option<(&[u32], usize)> {
        None
    }

    /// Continues the chains of up to [`FUSED_ROWS`] rows over all of a tile's K (see
    /// [`pair_chain`](super::pairs::pair_chain)), unpacking in registers; `false`, and nothing done, for
    /// a format that is not unpacked there.
    fn fused_chain(
        &self,
        _path: CpuPath,
        _tile: usize,
        _acc: &mut [[f32; LANES]],
        _x: &[u32],
        _x_starts: &[usize],
    ) -> bool {
        false
    }

    /// Continues the chains of up to [`FUSED_VALUE_ROWS`] rows over some blocks of 32 of a tile's K, as
    /// [`fma_chain_in_pairs`](super::lanes::fma_chain_in_pairs) does on what [`Tiles::unpack`] gives,
    /// unpacking in registers; `false`, and nothing done, for a format or a path that has no such way.
    /// Rows are those of K's begin.
    fn fused_values(
        &self,
        _path: CpuPath,
        _tile: usize,
        _blocks: Range<usize>,
        _acc: &mut [[f32; LANES]],
        _x: &[f32],
        _x_starts: &[usize],
    ) -> bool {
        false
    }

    /// One weight, for the reference kernels.
    fn get(&self, tile: usize, lane: usize, k: usize) -> f32;
}

/// [`Tiles::unpack_block`] on any path.
fn unpack_block_by_values<W: Tiles + ?Sized>(
    weights: &W,
    path: CpuPath,
    block: usize,
    out: &mut PairedBlock,
) {
    let a_tile = weights.n_k() / BLOCK;
    let mut values = [0.0; BLOCK * LANES];
    let (tile, k) = (block / a_tile, block % a_tile * BLOCK);
    weights.unpack(path, tile, k, BLOCK, &mut values);
    let rows = values.as_chunks::<LANES>().0.as_chunks::<2>().0;
    for (pairs, [even, odd]) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(rows) {
        for lane in 0..LANES {
            let (even, odd) = (even[lane].to_bits(), odd[lane].to_bits());
            pairs[lane] = even >> 16 | odd & 0xFFFF_0000;
        }
    }
}

/// Asks for `n` values ahead of their use, to the first-level cache; they need not exist.
#[inline(always)]
pub fn prefetch<T>(values: &[T], start: usize, n: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::_MM_HINT_T0;
        ask::<_MM_HINT_T0, T>(values, start, n);
    }
}

/// As [`prefetch`], to the second-level cache.
#[inline(always)]
pub fn prefetch_near<T>(values: &[T], start: usize, n: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::_MM_HINT_T1;
        ask::<_MM_HINT_T1, T>(values, start, n);
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn ask<const HINT: i32, T>(values: &[T], start: usize, n: usize) {
    const LINE: usize = 64;
    let at = values.as_ptr().wrapping_add(start).cast::<i8>();
    for line in (0..n * size_of::<T>()).step_by(LINE) {
        // SAFETY: a hint, which touches no memory and faults at no address.
        #[allow(unsafe_code, reason = "see above")]
        unsafe {
            std::arch::x86_64::_mm_prefetch::<HINT>(at.wrapping_add(line));
        }
    }
}

/// A block of packed weights.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn block_of<const BYTES: usize>(packed: &[u8], block: usize) -> &[u8; BYTES] {
    let start = block.wrapping_mul(BYTES);
    packed[start..].first_chunk().expect("whole blocks")
}

/// Parts of a step's work, between which other work is done.
pub const PARTS: usize = 8;

/// Runs `$body` for each part, with its number as a constant. No loop, which might not be unrolled, and no
/// closure: one that uses instructions its function was not compiled for is not made part of it.
macro_rules! in_parts {
    ($part:ident => $body:expr) => {
        in_parts!(@ $part, $body; 0 1 2 3 4 5 6 7)
    };
    (@ $part:ident, $body:expr; $($number:literal)*) => {{
        const { assert!([$($number),*].len() == $crate::engine::cpu::weights::PARTS, "all parts") };
        $({
            let $part: usize = $number;
            $body;
        })*
    }};
}
pub(super) use in_parts;

/// Pairs of 32 k of a tile.
pub type PairedBlock = [u32; BLOCK / 2 * LANES];

/// The most rows of a fused chain: those whose sums lie in registers beside what is unpacked.
pub const FUSED_ROWS: usize = 12;

/// The same of f32 values, in 16 registers of 8 lanes; more rows are taken so many at a time.
pub const FUSED_VALUE_ROWS: usize = 3;

/// Runs `$fused::<T>` with T rows, `$acc` and `$starts` as arrays of as many.
#[cfg(target_arch = "x86_64")]
macro_rules! fused_values {
    ($fused:path, $weights:expr, $blocks:expr, $acc:expr, $x:expr, $starts:expr) => {{
        let (blocks, acc, x, starts) = ($blocks, $acc, $x, $starts);
        assert_eq!(acc.len(), starts.len(), "one chain a row");
        let furthest = starts.iter().copied().max().unwrap_or(0);
        assert!(
            furthest + blocks.end * super::BLOCK <= x.len(),
            "rows too short"
        );
        let x = &x[blocks.start * super::BLOCK..];
        let weights = &$weights[blocks];
        // SAFETY: the caller's path has AVX2 and FMA; bounds were checked.
        #[allow(unsafe_code, reason = "features were detected, bounds checked")]
        unsafe {
            match (acc, starts) {
                ([a], [s]) => $fused(weights, [a], x, [*s]),
                ([a, b], [s, t]) => $fused(weights, [a, b], x, [*s, *t]),
                ([a, b, c], [s, t, u]) => $fused(weights, [a, b, c], x, [*s, *t, *u]),
                (acc, _) => unreachable!("a fused chain of {} rows", acc.len()),
            }
        }
    }};
}
#[cfg(target_arch = "x86_64")]
use fused_values;

/// K is a multiple of this.
const BLOCK: usize = 32;

/// A packed matrix in one of the formats. All are unpacked to the same lanes and multiplied by
/// the path's one chain, so equal values give equal bits in any of them.
pub enum Matrix {
    Mxfp4(Mxfp4Tiles),
    Mxint8(Mxint8Tiles),
    Bf16(Bf16Tiles),
}

/// Runs `$body` with `$tiles` bound to the matrix's tiles, whichever its format.
macro_rules! with_tiles {
    ($matrix:expr, $tiles:ident => $body:expr) => {
        match $matrix {
            Matrix::Mxfp4($tiles) => $body,
            Matrix::Mxint8($tiles) => $body,
            Matrix::Bf16($tiles) => $body,
        }
    };
}

pub(super) use with_tiles;

impl Matrix {
    /// Bytes of one tile of a format.
    pub const fn tile_bytes(format: MatrixFormat, n_k: usize) -> usize {
        match format {
            MatrixFormat::Mxfp4 => Mxfp4Tiles::tile_bytes(n_k),
            MatrixFormat::Mxint8 => Mxint8Tiles::tile_bytes(n_k),
            MatrixFormat::Bf16 => Bf16Tiles::tile_bytes(n_k),
        }
    }

    pub fn format(&self) -> MatrixFormat {
        match self {
            Self::Mxfp4(_) => MatrixFormat::Mxfp4,
            Self::Mxint8(_) => MatrixFormat::Mxint8,
            Self::Bf16(_) => MatrixFormat::Bf16,
        }
    }

    pub fn n_bytes(&self) -> u64 {
        with_tiles!(self, tiles => tiles.n_bytes())
    }
}

impl Tiles for Matrix {
    fn n_k(&self) -> usize {
        with_tiles!(self, tiles => tiles.n_k())
    }

    fn n_tiles(&self) -> usize {
        with_tiles!(self, tiles => tiles.n_tiles())
    }

    fn unpack(&self, path: CpuPath, tile: usize, k: usize, n_k: usize, out: &mut [f32]) {
        with_tiles!(self, tiles => tiles.unpack(path, tile, k, n_k, out));
    }

    fn unpack_pairs(&self, path: CpuPath, tile: usize, k: usize, n_k: usize, out: &mut [u32]) {
        with_tiles!(self, tiles => tiles.unpack_pairs(path, tile, k, n_k, out));
    }

    fn unpack_block(&self, path: CpuPath, block: usize, out: &mut PairedBlock) {
        with_tiles!(self, tiles => tiles.unpack_block(path, block, out));
    }

    fn packed_blocks(&self) -> (&[u8], usize) {
        with_tiles!(self, tiles => tiles.packed_blocks())
    }

    fn packed_pairs(&self, tile: usize) -> Option<(&[u32], usize)> {
        with_tiles!(self, tiles => tiles.packed_pairs(tile))
    }

    fn fused_chain(
        &self,
        path: CpuPath,
        tile: usize,
        acc: &mut [[f32; LANES]],
        x: &[u32],
        x_starts: &[usize],
    ) -> bool {
        with_tiles!(self, tiles => tiles.fused_chain(path, tile, acc, x, x_starts))
    }

    fn fused_values(
        &self,
        path: CpuPath,
        tile: usize,
        blocks: Range<usize>,
        acc: &mut [[f32; LANES]],
        x: &[f32],
        x_starts: &[usize],
    ) -> bool {
        with_tiles!(self, tiles => tiles.fused_values(path, tile, blocks, acc, x, x_starts))
    }

    fn get(&self, tile: usize, lane: usize, k: usize) -> f32 {
        with_tiles!(self, tiles => tiles.get(tile, lane, k))
    }
}

#[cfg(test)]
pub(in crate::engine::cpu) mod tests {
    use super::super::lanes::fma_chain_in_pairs;
    use super::*;
    use crate::quant;

    /// SplitMix64.
    pub struct Random(pub u64);

    impl Random {
        pub fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        }

        /// Between -1 and 1.
        pub fn value(&mut self) -> f32 {
            (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
        }
    }

    /// Blocks of codes and scales `[tile][lane][block]` as tiles of MXFP4, and of the same values in the
    /// other formats.
    fn packed(
        n_tiles: usize,
        n_k: usize,
        mut block: impl FnMut() -> (u8, [u8; 16]),
    ) -> [Matrix; 3] {
        let mut four = Mxfp4Tiles::zeroed("a test", n_tiles, n_k).expect("memory");
        let mut eight = Mxint8Tiles::zeroed("a test", n_tiles, n_k).expect("memory");
        let mut wide = Bf16Tiles::zeroed("a test", n_tiles, n_k).expect("memory");
        let words = wide.tile_words();
        let fours = four
            .bytes_mut()
            .chunks_exact_mut(Mxfp4Tiles::tile_bytes(n_k));
        let eights = eight
            .bytes_mut()
            .chunks_exact_mut(Mxint8Tiles::tile_bytes(n_k));
        let wides = wide.words_mut().chunks_exact_mut(words);
        for ((four, eight), wide) in fours.zip(eights).zip(wides) {
            for lane in 0..LANES {
                for at in 0..n_k / BLOCK {
                    let (scale, codes) = block();
                    pack_mxfp4_block(four, lane, at, scale, &codes);
                    let (scale_8, codes_8) = quant::mxint8::from_mxfp4(scale, &codes);
                    pack_mxint8_block(eight, lane, at, scale_8, &codes_8);
                    let values = quant::mxfp4::unpack(scale, &codes);
                    for (i, value) in values.into_iter().enumerate() {
                        let bits = quant::bf16::from_f32(value);
                        pack_bf16(wide, lane, at * BLOCK + i, bits);
                    }
                }
            }
        }
        [
            Matrix::Mxfp4(four),
            Matrix::Mxint8(eight),
            Matrix::Bf16(wide),
        ]
    }

    /// The same random weights in all formats, MXFP4 first.
    pub fn formats(random: &mut Random, n_tiles: usize, n_k: usize) -> [Matrix; 3] {
        packed(n_tiles, n_k, || {
            let scale = 122 + (random.next() % 4) as u8;
            (scale, std::array::from_fn(|_| random.next() as u8))
        })
    }

    /// A matrix that is unpacked to values alone.
    pub struct ByValues<'a>(pub &'a Matrix);

    impl Tiles for ByValues<'_> {
        fn n_k(&self) -> usize {
            self.0.n_k()
        }

        fn n_tiles(&self) -> usize {
            self.0.n_tiles()
        }

        fn unpack(&self, path: CpuPath, tile: usize, k: usize, n_k: usize, out: &mut [f32]) {
            self.0.unpack(path, tile, k, n_k, out);
        }

        fn get(&self, tile: usize, lane: usize, k: usize) -> f32 {
            self.0.get(tile, lane, k)
        }
    }

    #[test]
    fn fused_chains_are_those_of_unpacked_values() {
        let mut random = Random(32);
        for (n_tiles, n_k) in [(1, 32), (3, 96), (2, 2880)] {
            let matrices = formats(&mut random, n_tiles, n_k);
            for n_rows in 1..=FUSED_VALUE_ROWS {
                let x: Vec<f32> = (0..n_rows * n_k + 5).map(|_| random.value()).collect();
                let starts: Vec<usize> = (0..n_rows).rev().map(|t| t * n_k + 5).collect();
                let begun = vec![std::array::from_fn(|_| random.value()); n_rows];
                for tile in 0..n_tiles {
                    for path in CpuPath::available() {
                        for matrix in &matrices {
                            let mut got = begun.clone();
                            let (middle, end) = (n_k / BLOCK / 2, n_k / BLOCK);
                            let mut go_on = |blocks| {
                                matrix.fused_values(path, tile, blocks, &mut got, &x, &starts)
                            };
                            let is_fused = go_on(0..middle) && go_on(middle..end);
                            let name = matrix.format().name();
                            let has_way =
                                path.has_avx2() && matrix.format() != MatrixFormat::Mxint8;
                            assert_eq!(is_fused, has_way, "{name}, {path:?}");
                            if !is_fused {
                                continue;
                            }
                            let mut w = vec![0.0; n_k * LANES];
                            matrix.unpack(path, tile, 0, n_k, &mut w);
                            let mut expected: Vec<[f32; LANES]> = begun.clone();
                            fma_chain_in_pairs(path, &mut expected, &w, &x, &starts, n_k);
                            assert_eq!(got, expected, "{name}, {n_rows} rows, {path:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn pairs_are_those_of_the_values_for_all_scales_and_codes() {
        let (n_tiles, n_k) = (9, 96);
        let mut random = Random(31);
        let mut n = 0u32;
        // Every scale byte but NaN, with all codes or, where the loader wants it, with zeros alone.
        let matrices = packed(n_tiles, n_k, || {
            let scale = (n % 255) as u8;
            n += 1;
            let some = (quant::mxfp4::SCALE_MIN..=quant::mxfp4::SCALE_MAX).contains(&scale);
            let codes = std::array::from_fn(|_| if some { random.next() as u8 } else { 0x80 });
            (scale, codes)
        });
        for path in CpuPath::available() {
            if !path.has_pairs() {
                continue;
            }
            for matrix in &matrices[..2] {
                for tile in 0..n_tiles {
                    let mut got = vec![0; n_k / 2 * LANES];
                    let mut expected = got.clone();
                    matrix.unpack_pairs(path, tile, 0, n_k, &mut got);
                    ByValues(matrix).unpack_pairs(path, tile, 0, n_k, &mut expected);
                    // MXFP4's pairs have one zero.
                    let half = |bits: u32| if bits == 0x8000 { 0 } else { bits };
                    let halves = |pair: u32| (half(pair & 0xFFFF), half(pair >> 16));
                    for (i, (&got, &expected)) in got.iter().zip(&expected).enumerate() {
                        let name = matrix.format().name();
                        assert_eq!(halves(got), halves(expected), "{name}, {tile} at {i}");
                    }
                }
            }
        }
    }
}
