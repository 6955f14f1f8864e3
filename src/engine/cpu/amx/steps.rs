//! Steps of weights on their way to the unit: pairs as they lie in memory, or unpacked while others are
//! multiplied.

use std::ops::Range;

use super::super::path::CpuPath;
use super::super::weights::{Tiles, prefetch, prefetch_near};
use super::STEP_WORDS;

/// Steps of a task's tiles as pairs, numbered through all of them. They are taken `N` at a time, and begin at
/// a multiple of it: where a tile's are an even number two, since what surrounds them is then paid once.
///
/// Counters wrap here and in all that a step does: with a check of each, moving them was a quarter of a
/// step's instructions.
pub trait Steps {
    /// Steps of K between which the sums of several blocks lie in tiles: as many as there is room for in the
    /// first-level cache, where they stay for all blocks. An even divisor of the 90 of 2880.
    const RUN: usize;

    /// Whether rows of several blocks pass through the first-level cache: they are too many to stay.
    const ROWS_PASS: bool = true;

    /// Has the first steps on their way, to be multiplied with so many blocks of rows.
    fn begin<const N: usize>(&mut self, n_blocks: usize);

    /// While steps are multiplied with a block, which is the first or the `ONLY` one or another: has a share
    /// of what comes a few steps later on its way.
    fn bring<const N: usize, const FIRST: bool, const ONLY: bool>(
        &mut self,
        step: usize,
        block: usize,
    );

    /// Steps that were brought.
    fn pairs<const N: usize>(&self, step: usize) -> &[[u32; STEP_WORDS]; N];
}

/// What a task unpacks, in order, and asks for some steps ahead.
struct Ahead<'a> {
    packed: &'a [u8],
    /// Bytes of a step.
    a_step: usize,
    /// Bytes from one line of the cache that a block asks for to the next.
    stride: usize,
}

impl<'a> Ahead<'a> {
    /// Steps by which it is ahead: 4 KiB of MXFP4.
    const STEPS: usize = 8;

    /// Bytes of a line of the cache.
    const LINE: usize = 64;

    #[inline(always)]
    fn new<W: Tiles>(weights: &'a W, steps: Range<usize>) -> Self {
        let (packed, a_step) = weights.packed_blocks();
        Self {
            packed: &packed[steps.start * a_step..steps.end * a_step],
            a_step,
            stride: Self::LINE,
        }
    }

    #[inline(always)]
    fn begin(&mut self, n_blocks: usize) {
        self.stride = n_blocks * Self::LINE;
        let n = Self::STEPS * self.a_step;
        prefetch(self.packed, 0, n.min(self.packed.len()));
    }

    /// Memory answers at a steady pace, and whatever waits for it keeps a place that rows of the
    /// second-level cache need as well. So what is asked of it is spread over all blocks. Of many blocks it
    /// goes to the second-level cache: the first holds what they are multiplied with.
    #[inline(always)]
    fn ask<const N: usize, const ONLY: bool>(&self, step: usize, block: usize) {
        let start = step.wrapping_add(Self::STEPS).wrapping_mul(self.a_step);
        if start >= self.packed.len() {
            return;
        }
        let of_steps = N.wrapping_mul(self.a_step);
        if ONLY {
            prefetch(self.packed, start, of_steps);
            return;
        }
        let mut at = block.wrapping_mul(Self::LINE);
        while at < of_steps {
            prefetch_near(self.packed, start.wrapping_add(at), Self::LINE);
            at = at.wrapping_add(self.stride);
        }
    }
}

/// Weights that are pairs as they lie. They are read in order, which the CPU sees by itself: asked for ahead they
/// came a tenth later for 8 and for 32 rows, 3 % sooner for one, and no sooner for 64 and 512.
pub struct Packed<'a>(&'a [[u32; STEP_WORDS]]);

impl<'a> Packed<'a> {
    #[inline(always)]
    pub fn new(words: &'a [u32]) -> Self {
        Self(words.as_chunks().0)
    }
}

impl Steps for Packed<'_> {
    const RUN: usize = 10;

    fn begin<const N: usize>(&mut self, _: usize) {}

    #[inline(always)]
    fn bring<const N: usize, const FIRST: bool, const ONLY: bool>(&mut self, _: usize, _: usize) {}

    #[inline(always)]
    fn pairs<const N: usize>(&self, step: usize) -> &[[u32; STEP_WORDS]; N] {
        self.0[step..].first_chunk().expect("whole tiles")
    }
}

/// Steps that [`Unpacked`] has room for.
const RING_STEPS: usize = 8;

/// Weights that are unpacked, where `HERE` by instructions that become part of the loop: in a caller that was
/// compiled for all of [`Kind::Amx`](super::super::path::Kind::Amx).
pub struct Unpacked<'a, W, const HERE: bool> {
    weights: &'a W,
    path: CpuPath,
    ring: &'a mut [[u32; STEP_WORDS]; RING_STEPS],
    /// The first, numbered through all of the weights' tiles.
    first: usize,
    /// Steps that were unpacked, of `n`.
    next: usize,
    n: usize,
    ahead: Ahead<'a>,
}

impl<'a, W: Tiles, const HERE: bool> Unpacked<'a, W, HERE> {
    /// Steps by which unpacking is ahead: what is unpacked during a step's products is out of the store
    /// buffer when it is loaded, and still in the cache.
    const AHEAD: usize = RING_STEPS - Self::RUN;

    /// Steps numbered through all of the weights' tiles.
    #[inline(always)]
    pub fn new(
        weights: &'a W,
        path: CpuPath,
        steps: Range<usize>,
        ring: &'a mut [[u32; STEP_WORDS]; RING_STEPS],
    ) -> Self {
        Self {
            weights,
            path,
            ring,
            first: steps.start,
            next: 0,
            n: steps.len(),
            ahead: Ahead::new(weights, steps),
        }
    }

    #[inline(always)]
    fn unpack_next<const N: usize>(&mut self) {
        const { assert!(RING_STEPS.is_multiple_of(N) && Self::AHEAD.is_multiple_of(N)) };
        if self.next >= self.n {
            return;
        }
        let to = &mut self.ring.as_chunks_mut::<N>().0[self.next / N % (RING_STEPS / N)];
        let block = self.first.wrapping_add(self.next);
        if HERE {
            // SAFETY: as `Product::multiply` asks.
            #[allow(unsafe_code, reason = "features were detected")]
            unsafe {
                self.weights.unpack_blocks_here(self.path, block, to);
            }
        } else {
            for (i, to) in to.iter_mut().enumerate() {
                self.weights.unpack_block(self.path, block + i, to);
            }
        }
        self.next = self.next.wrapping_add(N);
    }
}

impl<W: Tiles, const HERE: bool> Steps for Unpacked<'_, W, HERE> {
    const RUN: usize = 6;

    #[inline(always)]
    fn begin<const N: usize>(&mut self, n_blocks: usize) {
        self.ahead.begin(n_blocks);
        for _ in 0..Self::AHEAD / N {
            self.unpack_next::<N>();
        }
    }

    /// All is unpacked by the first block, since the others need it at once.
    #[inline(always)]
    fn bring<const N: usize, const FIRST: bool, const ONLY: bool>(
        &mut self,
        step: usize,
        block: usize,
    ) {
        self.ahead.ask::<N, ONLY>(step, block);
        if FIRST {
            self.unpack_next::<N>();
        }
    }

    #[inline(always)]
    fn pairs<const N: usize>(&self, step: usize) -> &[[u32; STEP_WORDS]; N] {
        &self.ring.as_chunks().0[step / N % (RING_STEPS / N)]
    }
}
