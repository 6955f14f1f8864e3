//! The tile unit's arithmetic in plain Rust, after the pseudo code of `TDPBF16PS` (Intel, Software
//! Developer's Manual, volume 2): two chains of fma for the even and the odd k of a step, rounded to
//! nearest, their sum, and that added to C; subnormal numbers are 0 going in and coming out.

use std::cell::{Cell, RefCell};

use super::unit::TileUnit;
use super::{LANES, STEP_PAIRS, STEP_WORDS};
use crate::engine::cpu::path::{CpuPath, on_each_path};

/// Lanes of a C.
const C_LANES: usize = 16;

pub type Sums = [[f32; C_LANES]; 16];
pub type Pairs = [[u32; STEP_PAIRS]; 16];

/// Zero of the same sign for what is below the smallest normal number.
#[inline(always)]
fn flush(x: f32) -> f32 {
    const EXPONENT: u32 = 0x7F80_0000;
    const SIGN: u32 = 0x8000_0000;
    let bits = x.to_bits();
    f32::from_bits(if bits & EXPONENT == 0 {
        bits & SIGN
    } else {
        bits
    })
}

#[inline(always)]
fn even(pair: u32) -> f32 {
    flush(f32::from_bits(pair << 16))
}

#[inline(always)]
fn odd(pair: u32) -> f32 {
    flush(f32::from_bits(pair & 0xFFFF_0000))
}

on_each_path! {
    /// `c[..n_rows] += a b`, as the instruction does.
    pub fn dot(c: &mut Sums, a: &Pairs, b: &Pairs, n_rows: usize) = dot_body
}

#[inline(always)]
fn dot_body(c: &mut Sums, a: &Pairs, b: &Pairs, n_rows: usize) {
    for (c, a) in c[..n_rows].iter_mut().zip(a) {
        let mut evens = [0.0; C_LANES];
        let mut odds = [0.0; C_LANES];
        for (&a, b) in a.iter().zip(b) {
            for lane in 0..C_LANES {
                evens[lane] = flush(even(a).mul_add(even(b[lane]), evens[lane]));
                odds[lane] = flush(odd(a).mul_add(odd(b[lane]), odds[lane]));
            }
        }
        for lane in 0..C_LANES {
            let sum = flush(evens[lane] + odds[lane]);
            c[lane] = flush(flush(c[lane]) + sum);
        }
    }
}

thread_local! {
    /// Whether the thread's unit is set, and how often it was.
    static IS_SET: Cell<bool> = const { Cell::new(false) };
    static N_SET: Cell<usize> = const { Cell::new(0) };
}

/// How often this thread's unit was set.
pub fn n_set() -> usize {
    N_SET.get()
}

/// The unit, of rows as it was set, what it took, and the sums of a tile's halves. A thread has one: a second
/// would take the first one's shapes, and the end of either both.
pub struct Emulated {
    path: CpuPath,
    n_rows: usize,
    rows: RefCell<Pairs>,
    pairs: RefCell<Pairs>,
    sums: RefCell<[Sums; 2]>,
}

impl TileUnit for Emulated {
    fn set(n_rows: usize) -> Self {
        assert!((1..=16).contains(&n_rows), "{n_rows}");
        assert!(!IS_SET.replace(true), "the thread's unit is set");
        N_SET.set(N_SET.get() + 1);
        Self {
            path: CpuPath::available().pop().unwrap_or(CpuPath::PORTABLE),
            n_rows,
            rows: RefCell::default(),
            pairs: RefCell::default(),
            // To be cleared or loaded.
            sums: RefCell::new([[[f32::NAN; C_LANES]; 16]; 2]),
        }
    }

    fn clear(&self) {
        *self.sums.borrow_mut() = Default::default();
    }

    fn load(&self, sums: &[[f32; LANES]]) {
        let [low, high] = &mut *self.sums.borrow_mut();
        for (row, sums) in sums[..self.n_rows].iter().enumerate() {
            low[row].copy_from_slice(&sums[..C_LANES]);
            high[row].copy_from_slice(&sums[C_LANES..]);
        }
    }

    fn take_rows<const PASSING: bool>(&self, rows: &[u32]) {
        let rows = &rows[..self.n_rows * STEP_PAIRS];
        let mut a = self.rows.borrow_mut();
        for (a, row) in a.iter_mut().zip(rows.chunks_exact(STEP_PAIRS)) {
            a.copy_from_slice(row);
        }
    }

    fn take_pairs<const HALF: usize>(&self, pairs: &[u32; STEP_WORDS]) {
        let mut b = self.pairs.borrow_mut();
        for (b, lanes) in b.iter_mut().zip(pairs.chunks_exact(LANES)) {
            b.copy_from_slice(&lanes[HALF * C_LANES..][..C_LANES]);
        }
    }

    fn multiply<const HALF: usize>(&self) {
        let c = &mut self.sums.borrow_mut()[HALF];
        let (mut a, mut b) = (self.rows.borrow_mut(), self.pairs.borrow_mut());
        dot(self.path, c, &a, &b, self.n_rows);
        // As the CPU's own, which clears what it is done with.
        *b = Pairs::default();
        if HALF == 1 {
            *a = Pairs::default();
        }
    }

    fn store(&self, sums: &mut [[f32; LANES]]) {
        let [low, high] = &*self.sums.borrow();
        for (row, sums) in sums[..self.n_rows].iter_mut().enumerate() {
            sums[..C_LANES].copy_from_slice(&low[row]);
            sums[C_LANES..].copy_from_slice(&high[row]);
        }
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        IS_SET.set(false);
    }
}
