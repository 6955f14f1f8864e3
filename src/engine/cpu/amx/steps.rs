//! Steps of weights on their way to the unit: pairs as they lie in memory, or unpacked while others are
//! multiplied.

use std::ops::Range;

use super::super::path::CpuPath;
use super::super::weights::{PARTS, Tiles, in_parts, prefetch_near};
use super::STEP_WORDS;

/// Steps of a task's tiles as pairs, numbered through all of them.
///
/// Counters wrap here and in all that a step does: with a check of each, moving them was a quarter of a
/// step's instructions.
pub trait Steps {
    /// Steps of K between which the sums of several blocks lie in tiles: as many as there is room for in the
    /// first-level cache, where they stay for all blocks. A divisor of the 90 of 2880.
    const RUN: usize;

    /// Whether rows of several blocks pass through the first-level cache: they are too many to stay.
    const ROWS_PASS: bool = true;

    /// Has the first steps on their way, to be multiplied with so many blocks of rows.
    fn begin(&mut self, n_blocks: usize);

    /// Runs `product` with a step's pairs and 0 to [`PARTS`] in turn; the block they are multiplied with is the
    /// first or the `ONLY` one or another, by its turn. Between has a part of what comes a few steps later on its
    /// way.
    ///
    /// A core whose other thread is busy has half of its queues, in which little of what follows is seen. So
    /// what the unit, the registers and memory do side by side has to be mixed here: one after the other they
    /// took a fifth longer.
    fn step<const FIRST: bool, const ONLY: bool>(
        &mut self,
        step: usize,
        turn: usize,
        product: impl FnMut(&[u32; STEP_WORDS], usize),
    );
}

/// What a task reads, in order, and asks for some steps ahead.
///
/// It goes to the second-level cache: places where the first waits for memory are few, and rows and steps of
/// the second-level cache need them as well.
struct Ahead<'a, T> {
    packed: &'a [T],
    /// Values of a step.
    a_step: usize,
}

impl<T> Ahead<'_, T> {
    /// Steps by which it is ahead: 8 KiB of MXFP4, 32 of bf16.
    const STEPS: usize = 16;

    /// Values of a line of the cache.
    const LINE: usize = 64 / size_of::<T>();

    /// Asks for a line of a later step.
    #[inline(always)]
    fn ask_line(&self, step: usize, line: usize) {
        let step = step.wrapping_add(Self::STEPS).wrapping_mul(self.a_step);
        let at = step.wrapping_add(line.wrapping_mul(Self::LINE));
        prefetch_near(self.packed, at, Self::LINE);
    }

    /// Asks for one of the parts of a later step's `n_lines`.
    #[inline(always)]
    fn ask_part(&self, step: usize, part: usize, n_lines: usize) {
        for line in n_lines * part / PARTS..n_lines * (part + 1) / PARTS {
            self.ask_line(step, line);
        }
    }

    /// Asks for a block's share of them, `a_turn`: one behind the other's, so that memory answers at a steady pace.
    /// A core has few places where it waits for memory, and those who need them wait as well.
    #[inline(always)]
    fn ask_turn(&self, step: usize, turn: usize, a_turn: usize, n_lines: usize) {
        let from = turn.wrapping_mul(a_turn);
        for line in from..n_lines.min(from.wrapping_add(a_turn)) {
            self.ask_line(step, line);
        }
    }
}

/// Weights that are pairs as they lie.
pub struct Packed<'a> {
    steps: &'a [[u32; STEP_WORDS]],
    ahead: Ahead<'a, u32>,
    /// Lines of a step that each block asks for.
    a_turn: usize,
}

impl<'a> Packed<'a> {
    /// Lines of a step.
    const LINES: usize = STEP_WORDS / Ahead::<u32>::LINE;

    #[inline(always)]
    pub fn new(words: &'a [u32]) -> Self {
        Self {
            steps: words.as_chunks().0,
            ahead: Ahead {
                packed: words,
                a_step: STEP_WORDS,
            },
            a_turn: 0,
        }
    }
}

impl Steps for Packed<'_> {
    const RUN: usize = 10;

    fn begin(&mut self, n_blocks: usize) {
        self.a_turn = Self::LINES.div_ceil(n_blocks);
    }

    #[inline(always)]
    fn step<const FIRST: bool, const ONLY: bool>(
        &mut self,
        step: usize,
        turn: usize,
        mut product: impl FnMut(&[u32; STEP_WORDS], usize),
    ) {
        let pairs = &self.steps[step];
        if !ONLY {
            self.ahead.ask_turn(step, turn, self.a_turn, Self::LINES);
        }
        product(pairs, 0);
        in_parts!(part => {
            if ONLY {
                self.ahead.ask_part(step, part, Self::LINES);
            }
            product(pairs, part + 1);
        });
    }
}

/// Steps that [`Unpacked`] has room for: where there is one block of rows half of them, which take less of the
/// first-level cache.
const RING_STEPS: usize = 8;

/// Words of a line of the cache. Slots are a line apart: two steps at a time, at multiples of 4 KiB, took 36 ns
/// each where they took 30 so; one at a time it made hardly any difference.
pub const LINE_WORDS: usize = 16;

/// A step's pairs, and what keeps them from the next's.
pub type Slot = [u32; STEP_WORDS + LINE_WORDS];

/// Weights that are unpacked, where `HERE` by instructions that become part of the loop: in a caller that was
/// compiled for all of [`Kind::Avx512Bf16`](super::super::path::Kind::Avx512Bf16).
pub struct Unpacked<'a, W, const HERE: bool> {
    weights: &'a W,
    path: CpuPath,
    ring: &'a mut [Slot; RING_STEPS],
    /// Numbered through all of the weights' tiles.
    steps: Range<usize>,
    ahead: Ahead<'a, u8>,
    /// Lines of a step that each block asks for.
    a_turn: usize,
}

impl<'a, W: Tiles, const HERE: bool> Unpacked<'a, W, HERE> {
    /// Steps by which unpacking is ahead: what is unpacked during a step's products is out of the store
    /// buffer when it is loaded, and still in the cache.
    const AHEAD: usize = RING_STEPS - Self::RUN;

    #[inline(always)]
    pub fn new(
        weights: &'a W,
        path: CpuPath,
        steps: Range<usize>,
        ring: &'a mut [Slot; RING_STEPS],
    ) -> Self {
        let (packed, a_step) = weights.packed_blocks();
        let packed = &packed[steps.start * a_step..steps.end * a_step];
        Self {
            weights,
            path,
            ring,
            steps,
            ahead: Ahead { packed, a_step },
            a_turn: 0,
        }
    }

    /// Lines of a step.
    #[inline(always)]
    fn n_lines(&self) -> usize {
        self.ahead.a_step.div_ceil(Ahead::<u8>::LINE)
    }

    #[inline(always)]
    fn slot<const ONLY: bool>(step: usize) -> usize {
        step % if ONLY { RING_STEPS / 2 } else { RING_STEPS }
    }
}

fn pairs(slot: &Slot) -> &[u32; STEP_WORDS] {
    slot.first_chunk().expect("a slot is longer")
}

fn pairs_mut(slot: &mut Slot) -> &mut [u32; STEP_WORDS] {
    slot.first_chunk_mut().expect("a slot is longer")
}

impl<W: Tiles, const HERE: bool> Steps for Unpacked<'_, W, HERE> {
    const RUN: usize = 6;

    #[inline(always)]
    fn begin(&mut self, n_blocks: usize) {
        self.a_turn = self.n_lines().div_ceil(n_blocks);
        let n = self.ahead.a_step * Ahead::<u8>::STEPS;
        prefetch_near(self.ahead.packed, 0, n.min(self.ahead.packed.len()));
        for (step, slot) in (0..Self::AHEAD.min(self.steps.len())).zip(self.ring.iter_mut()) {
            self.weights
                .unpack_block(self.path, self.steps.start + step, pairs_mut(slot));
        }
    }

    /// All is unpacked beside the first block, since the others need it at once.
    #[inline(always)]
    fn step<const FIRST: bool, const ONLY: bool>(
        &mut self,
        step: usize,
        turn: usize,
        mut product: impl FnMut(&[u32; STEP_WORDS], usize),
    ) {
        const {
            assert!(
                Self::AHEAD < RING_STEPS / 2,
                "room where there is one block"
            );
        }
        let next = step.wrapping_add(Self::AHEAD);
        let slots = [Self::slot::<ONLY>(step), Self::slot::<ONLY>(next)];
        let n_lines = self.n_lines();
        if !ONLY {
            self.ahead.ask_turn(step, turn, self.a_turn, n_lines);
        }
        if !FIRST || next >= self.steps.len() {
            let pairs = pairs(&self.ring[slots[0]]);
            product(pairs, 0);
            in_parts!(part => product(pairs, part + 1));
            return;
        }
        let [from, to] = self.ring.get_disjoint_mut(slots).expect("two slots");
        let (pairs, to) = (pairs(from), pairs_mut(to));
        let block = self.steps.start.wrapping_add(next);
        product(pairs, 0);
        let mut between = |part| {
            if ONLY {
                self.ahead.ask_part(step, part, n_lines);
            }
            product(pairs, part + 1);
        };
        if HERE {
            // SAFETY: as `Product::multiply` asks.
            #[allow(unsafe_code, reason = "features were detected")]
            unsafe {
                self.weights
                    .unpack_block_here(self.path, block, to, between);
            }
        } else {
            self.weights.unpack_block(self.path, block, to);
            in_parts!(part => between(part));
        }
    }
}
