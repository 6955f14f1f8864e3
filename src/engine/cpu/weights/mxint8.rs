//! MXINT8 weights in tiles, 8 bits and a quarter each.
//!
//! ```text
//! [tile][k / 32] { 32 scale bytes | [32 k][32 lanes] codes }
//! ```

use super::Tiles;
#[cfg(target_arch = "x86_64")]
use super::{PARTS, PairedBlock, block_of, in_parts, unpack_block_by_values};
use crate::engine::EngineError;
use crate::engine::cpu::buffer::Buffer;
use crate::engine::cpu::lanes::LANES;
use crate::engine::cpu::path::{CpuPath, Kind};
use crate::quant::mxint8;

/// Bytes of 32 k of a tile: scales, then codes.
const BLOCK_BYTES: usize = LANES + mxint8::BLOCK * LANES;

/// Packed MXINT8 weights.
pub struct Mxint8Tiles {
    n_k: usize,
    bytes: Buffer<u8>,
}

impl Mxint8Tiles {
    /// Bytes of one tile.
    pub const fn tile_bytes(n_k: usize) -> usize {
        n_k / mxint8::BLOCK * BLOCK_BYTES
    }

    pub fn zeroed(what: &str, n_tiles: usize, n_k: usize) -> Result<Self, EngineError> {
        assert_eq!(n_k % mxint8::BLOCK, 0, "the config was checked");
        let bytes = Buffer::to_fill(what, n_tiles * Self::tile_bytes(n_k))?;
        Ok(Self { n_k, bytes })
    }

    pub fn n_bytes(&self) -> u64 {
        self.bytes.n_bytes()
    }

    /// The bytes of all tiles, to be filled by [`pack_mxint8_block`].
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

/// Puts one block of 32 k of one output into its tile's bytes.
#[inline]
pub fn pack_mxint8_block(
    tile: &mut [u8],
    lane: usize,
    block: usize,
    scale: u8,
    codes: &[i8; mxint8::BLOCK],
) {
    let bytes = &mut tile[block * BLOCK_BYTES..][..BLOCK_BYTES];
    bytes[lane] = scale;
    for (k, &code) in codes.iter().enumerate() {
        bytes[LANES + k * LANES + lane] = code.cast_unsigned();
    }
}

impl Tiles for Mxint8Tiles {
    fn n_k(&self) -> usize {
        self.n_k
    }

    fn n_tiles(&self) -> usize {
        self.bytes.len() / Self::tile_bytes(self.n_k)
    }

    #[inline]
    fn unpack(&self, path: CpuPath, tile: usize, k: usize, n_k: usize, out: &mut [f32]) {
        let start = tile * Self::tile_bytes(self.n_k) + k / mxint8::BLOCK * BLOCK_BYTES;
        let bytes = &self.bytes[start..][..n_k / mxint8::BLOCK * BLOCK_BYTES];
        let out = &mut out[..n_k * LANES];
        for (bytes, out) in bytes
            .chunks_exact(BLOCK_BYTES)
            .zip(out.chunks_exact_mut(mxint8::BLOCK * LANES))
        {
            let bytes = bytes.try_into().expect("chunks are of this size");
            let out = out.try_into().expect("chunks are of this size");
            unpack_block(path, bytes, out);
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    fn unpack_block(&self, path: CpuPath, block: usize, out: &mut PairedBlock) {
        if !path.has_pairs() {
            return unpack_block_by_values(self, path, block, out);
        }
        let block = block_of(&self.bytes, block);
        // SAFETY: a path of this kind exists only where the CPU has its features.
        #[allow(unsafe_code, reason = "features were detected")]
        unsafe {
            x86::unpack_pairs(block, out);
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code, reason = "features were detected")]
    #[inline(always)]
    unsafe fn unpack_block_here(
        &self,
        _: CpuPath,
        block: usize,
        out: &mut PairedBlock,
        between: impl FnMut(usize),
    ) {
        // SAFETY: as the caller says.
        unsafe { x86::unpack_pairs_here(block_of(&self.bytes, block), out, between) };
    }

    #[inline(always)]
    fn packed_blocks(&self) -> (&[u8], usize) {
        (&self.bytes, BLOCK_BYTES)
    }

    fn get(&self, tile: usize, lane: usize, k: usize) -> f32 {
        let start = tile * Self::tile_bytes(self.n_k) + k / mxint8::BLOCK * BLOCK_BYTES;
        let bytes = &self.bytes[start..][..BLOCK_BYTES];
        let code = bytes[LANES + k % mxint8::BLOCK * LANES + lane].cast_signed();
        f32::from(code) * mxint8::step(bytes[lane])
    }
}

type PackedBlock = [u8; BLOCK_BYTES];
type UnpackedBlock = [f32; mxint8::BLOCK * LANES];

fn unpack_block(path: CpuPath, bytes: &PackedBlock, out: &mut UnpackedBlock) {
    match path.kind() {
        Kind::Portable => unpack_portable(bytes, out),
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code, reason = "features were detected")]
        // SAFETY: a path of this kind exists only where the CPU has its features.
        Kind::Avx2 => unsafe { x86::unpack_avx2(bytes, out) },
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code, reason = "features were detected")]
        // SAFETY: as above.
        Kind::Avx512 | Kind::Avx512Bf16 => unsafe { x86::unpack_avx512(bytes, out) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => unpack_portable(bytes, out),
    }
}

/// The step of every lane.
#[inline(always)]
fn steps(bytes: &PackedBlock) -> [f32; LANES] {
    let mut steps = [0.0; LANES];
    for lane in 0..LANES {
        steps[lane] = mxint8::step(bytes[lane]);
    }
    steps
}

fn unpack_portable(bytes: &PackedBlock, out: &mut UnpackedBlock) {
    let steps = steps(bytes);
    let codes = bytes[LANES..].chunks_exact(LANES);
    for (codes, out) in codes.zip(out.chunks_exact_mut(LANES)) {
        for lane in 0..LANES {
            out[lane] = f32::from(codes[lane].cast_signed()) * steps[lane];
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "SIMD loads through pointers")]
#[allow(clippy::needless_range_loop, reason = "registers in lockstep")]
mod x86 {
    use super::{LANES, PARTS, PackedBlock, PairedBlock, UnpackedBlock, in_parts, steps};
    use crate::quant::mxint8;
    use std::arch::x86_64::*;

    /// # Safety
    /// The CPU has AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn unpack_avx512(bytes: &PackedBlock, out: &mut UnpackedBlock) {
        let steps = steps(bytes);
        let (from, to) = (bytes.as_ptr().wrapping_add(LANES), out.as_mut_ptr());
        // SAFETY: 32 steps; `bytes` holds 32 x 32 codes behind its scales, `out` as many values.
        unsafe {
            let steps = [
                _mm512_loadu_ps(steps.as_ptr()),
                _mm512_loadu_ps(steps.as_ptr().wrapping_add(16)),
            ];
            for k in 0..mxint8::BLOCK {
                for (half, &step) in steps.iter().enumerate() {
                    let at = k * LANES + 16 * half;
                    let codes = _mm_loadu_si128(from.wrapping_add(at).cast());
                    let values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
                    _mm512_storeu_ps(to.wrapping_add(at), _mm512_mul_ps(values, step));
                }
            }
        }
    }

    /// Unpacks blocks to pairs of bf16, 16 lanes a register. Registers are read and written as arrays, as those
    /// of MXFP4.
    struct Unpacker<'a> {
        /// As `mxint8::step`, of the lower and the upper lanes.
        steps: [__m512; 2],
        codes: &'a [[u8; 16]],
    }

    impl<'a> Unpacker<'a> {
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw")]
        fn new(bytes: &'a PackedBlock) -> Self {
            let (scales, codes) = bytes.split_at(LANES);
            let scales = scales.as_chunks::<16>().0;
            Self {
                steps: [Self::steps(scales[0]), Self::steps(scales[1])],
                codes: codes.as_chunks().0,
            }
        }

        #[inline]
        #[target_feature(enable = "avx512f,avx512bw")]
        fn steps(scales: [u8; 16]) -> __m512 {
            // SAFETY: any bytes are a register.
            let scales = unsafe { std::mem::transmute::<[u8; 16], __m128i>(scales) };
            let scales = _mm512_slli_epi32::<23>(_mm512_cvtepu8_epi32(scales));
            _mm512_mul_ps(_mm512_castsi512_ps(scales), _mm512_set1_ps(1.0 / 64.0))
        }

        /// Values of a k. Each has at most 8 significant bits, so its lower half is 0.
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw")]
        fn values(&self, k: usize, half: usize) -> __m512i {
            // SAFETY: any bytes are a register.
            let codes =
                unsafe { std::mem::transmute::<[u8; 16], __m128i>(self.codes[2 * k + half]) };
            let codes = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
            _mm512_castps_si512(_mm512_mul_ps(codes, self.steps[half]))
        }

        /// The block's pairs of k 2 pair, 2 pair + 1, of the lower or the upper lanes.
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw")]
        fn pair(&self, pair: usize, half: usize) -> __m512i {
            /// The words of a register that hold the odd k of their pair.
            const ODD: u32 = 0xAAAA_AAAA;
            let even = _mm512_srli_epi32::<16>(self.values(2 * pair, half));
            _mm512_mask_mov_epi16(even, ODD, self.values(2 * pair + 1, half))
        }
    }

    /// # Safety
    /// The CPU has AVX-512F and BW.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub unsafe fn unpack_pairs(bytes: &PackedBlock, out: &mut PairedBlock) {
        // SAFETY: as above.
        unsafe { unpack_pairs_here(bytes, out, |_| {}) }
    }

    /// As part of its caller, which was compiled for the features; runs `between` after each part
    /// (see [`Tiles::unpack_block_here`](super::Tiles::unpack_block_here)).
    ///
    /// # Safety
    /// As above.
    #[inline(always)]
    pub unsafe fn unpack_pairs_here(
        bytes: &PackedBlock,
        out: &mut PairedBlock,
        mut between: impl FnMut(usize),
    ) {
        const A_PART: usize = mxint8::BLOCK / 2 / PARTS;
        // SAFETY: as above.
        let block = unsafe { Unpacker::new(bytes) };
        let out = out.as_chunks_mut::<16>().0.as_chunks_mut::<2>().0;
        in_parts!(part => {
            for pair in part * A_PART..(part + 1) * A_PART {
                for half in 0..2 {
                    // SAFETY: as above; a register is 16 words.
                    out[pair][half] = unsafe {
                        std::mem::transmute::<__m512i, [u32; 16]>(block.pair(pair, half))
                    };
                }
            }
            between(part);
        });
    }

    /// # Safety
    /// The CPU has AVX2.
    #[target_feature(enable = "avx2")]
    pub unsafe fn unpack_avx2(bytes: &PackedBlock, out: &mut UnpackedBlock) {
        let steps = steps(bytes);
        let (from, to) = (bytes.as_ptr().wrapping_add(LANES), out.as_mut_ptr());
        // SAFETY: as above.
        unsafe {
            let step = |i: usize| _mm256_loadu_ps(steps.as_ptr().wrapping_add(8 * i));
            let steps: [__m256; 4] = [step(0), step(1), step(2), step(3)];
            for k in 0..mxint8::BLOCK {
                for (part, &step) in steps.iter().enumerate() {
                    let at = k * LANES + 8 * part;
                    let codes = _mm_loadl_epi64(from.wrapping_add(at).cast());
                    let values = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
                    _mm256_storeu_ps(to.wrapping_add(at), _mm256_mul_ps(values, step));
                }
            }
        }
    }
}
