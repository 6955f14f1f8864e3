//! The tile unit's arithmetic in plain Rust, after the pseudo code of `TDPBF16PS` (Intel, Software
//! Developer's Manual, volume 2): two chains of fma for the even and the odd k of a step, rounded to
//! nearest, their sum, and that added to C; subnormal numbers are 0 going in and coming out.

use super::unit::{Operands, TileUnit};
use super::{LANES, STEP_PAIRS};
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

/// The unit, of rows as it was set.
pub struct Emulated {
    path: CpuPath,
    n_rows: [usize; 2],
}

impl Emulated {
    /// One block of rows by a whole tile.
    ///
    /// # Safety
    /// As [`TileUnit::one`].
    #[allow(unsafe_code, reason = "operands are pointers")]
    unsafe fn block(&self, of: &Operands, n_rows: usize) {
        for half in 0..2 {
            let mut c = Sums::default();
            for (row, c) in c[..n_rows].iter_mut().enumerate() {
                let at = of.sums.wrapping_add(row * LANES + half * C_LANES);
                // SAFETY: the caller's.
                *c = unsafe { at.cast::<[f32; C_LANES]>().read() };
            }
            for step in 0..of.n_steps {
                let mut a = Pairs::default();
                let mut b = Pairs::default();
                for (row, a) in a[..n_rows].iter_mut().enumerate() {
                    let at = of.rows.wrapping_add(step * of.a_step + row * STEP_PAIRS);
                    // SAFETY: the caller's.
                    *a = unsafe { at.cast::<[u32; STEP_PAIRS]>().read() };
                }
                for (pair, b) in b.iter_mut().enumerate() {
                    let pair = step * STEP_PAIRS + pair;
                    let at = of.w.wrapping_add(pair * LANES + half * C_LANES);
                    // SAFETY: the caller's.
                    *b = unsafe { at.cast::<[u32; C_LANES]>().read() };
                }
                dot(self.path, &mut c, &a, &b, n_rows);
            }
            for (row, c) in c[..n_rows].iter().enumerate() {
                let at = of.sums.wrapping_add(row * LANES + half * C_LANES);
                // SAFETY: the caller's.
                unsafe { at.cast::<[f32; C_LANES]>().write(*c) };
            }
        }
    }
}

#[allow(unsafe_code, reason = "the trait's")]
impl TileUnit for Emulated {
    fn set(n_rows: [usize; 2]) -> Self {
        assert!(n_rows.iter().all(|n| (1..=16).contains(n)), "{n_rows:?}");
        let path = CpuPath::available().pop().unwrap_or(CpuPath::PORTABLE);
        Self { path, n_rows }
    }

    unsafe fn two_blocks(&self, of: &Operands) {
        assert_eq!(self.n_rows[0], 16, "a full block comes first");
        let second = Operands {
            sums: of.sums.wrapping_add(16 * LANES),
            rows: of.rows.wrapping_add(16 * STEP_PAIRS),
            ..*of
        };
        // SAFETY: the caller's.
        unsafe {
            self.block(of, self.n_rows[0]);
            self.block(&second, self.n_rows[1]);
        }
    }

    unsafe fn two_tiles(&self, low: &Operands, high: &Operands) {
        assert_eq!(self.n_rows[0], self.n_rows[1], "C of the same rows");
        assert_eq!(low.rows, high.rows, "one block of rows");
        // SAFETY: the caller's.
        unsafe {
            self.block(low, self.n_rows[0]);
            self.block(high, self.n_rows[0]);
        }
    }

    unsafe fn one(&self, of: &Operands) {
        // SAFETY: the caller's.
        unsafe { self.block(of, self.n_rows[0]) };
    }
}
