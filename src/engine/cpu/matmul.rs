//! Dense projections: q, k, v, attention out, router, lm head, on weights of any format.
//!
//! `out[row][o] = sum over k of w[o][k] x[row][k] + bias[o]`, one chain over ascending `k`, the
//! bias added after it. What happens to a finished value is the caller's [`Epilogue`].

use std::ops::Range;

use super::amx;
use super::buffer::Disjoint;
use super::calls::Op;
use super::gemm::{Exec, Inputs, Output, RowSets, Rows, multiply, tiles_a_task};
use super::lanes::{LANES, for_each_in_turn};
use super::weights::{Matrix, Tiles, Vector};

/// A projection: packed weights of `n_out` rows (the last tile is padded) and their bias.
pub struct Projection {
    pub n_out: usize,
    pub tiles: Matrix,
    pub bias: Option<Vector>,
}

impl Projection {
    pub fn n_bytes(&self) -> u64 {
        self.tiles.n_bytes() + self.bias.as_ref().map_or(0, Vector::n_bytes)
    }
}

/// What becomes of a finished value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Epilogue {
    /// `out = value`.
    Store,
    /// `out = out + value`: the residual.
    Add,
}

#[inline(always)]
fn add(out: &mut [f32], values: &[f32]) {
    for i in 0..out.len() {
        out[i] += values[i];
    }
}

/// Sums on their way into columns of `out` `[n_rows, n_out]`, of the rows from `first` on.
struct Columns<'a> {
    weights: &'a Projection,
    first: usize,
    into: Epilogue,
    out: &'a Disjoint<'a, f32>,
}

impl Output for Columns<'_> {
    #[inline(always)]
    fn prefetch(&self, tile: usize, rows: Range<usize>) {
        for row in rows {
            let start = (self.first + row) * self.weights.n_out + tile * LANES;
            self.out.prefetch(start, LANES);
        }
    }

    #[inline(always)]
    fn take(&mut self, tile: usize, first: usize, sums: &mut [[f32; LANES]]) {
        let n_out = self.weights.n_out;
        let start = tile * LANES;
        let n = LANES.min(n_out - start);
        // No `map_or`, which would be a call.
        let bias = match &self.weights.bias {
            Some(bias) => bias.lanes::<LANES>(start),
            None => [0.0; LANES],
        };
        for (i, lanes) in sums.iter_mut().enumerate() {
            for lane in 0..LANES {
                lanes[lane] += bias[lane];
            }
            let row = self.first + first + i;
            // SAFETY: each (row, tile) is taken once, by one task.
            #[allow(unsafe_code, reason = "tiles are disjoint columns")]
            let out = unsafe { self.out.slice_mut(row * n_out + start, n) };
            match (self.into, out.first_chunk_mut::<LANES>()) {
                (Epilogue::Store, Some(out)) => *out = *lanes,
                (Epilogue::Store, None) => out.copy_from_slice(&lanes[..n]),
                (Epilogue::Add, Some(out)) => add(out, lanes),
                (Epilogue::Add, None) => add(out, &lanes[..n]),
            }
        }
    }
}

/// Outputs `first_tile * 32 ..` of `x` `[n_rows, n_k]` into `out` `[n_rows, n_out]`.
pub fn matmul(
    exec: &Exec,
    weights: &Projection,
    first_tile: usize,
    x: Rows,
    n_rows: usize,
    into: Epilogue,
    out: &mut [f32],
) {
    /// Tasks of a thread, all alike.
    const A_THREAD: usize = 8;
    let (n_k, n_out) = (weights.tiles.n_k(), weights.n_out);
    let n_tiles = weights.tiles.n_tiles() - first_tile;
    assert!(out.len() >= n_rows * n_out, "output too short");
    exec.calls.count(Op::Matmul, weights.tiles.format());
    let out = Disjoint::new(out);
    let a_group = match exec.in_blocks() {
        true => amx::group_rows(n_rows, n_k).min(n_rows),
        false => n_rows,
    };
    let n_groups = n_rows.div_ceil(a_group.max(1));
    let a_task = tiles_a_task(exec, &weights.tiles, n_tiles, n_groups, a_group, A_THREAD);
    let n_parts = n_tiles.div_ceil(a_task);
    let start = |row: usize| row * n_k;
    let product = |x: Inputs| {
        for_each_in_turn(n_groups * n_parts, |task| {
            let first = task / n_parts * a_group;
            let rows = RowSets {
                n_k,
                offsets: &[first, n_rows.min(first + a_group)].map(|row| row as u32),
                start: &start,
            };
            let output = Columns {
                weights,
                first,
                into,
                out: &out,
            };
            let first = first_tile + task % n_parts * a_task;
            let tiles = first..(first + a_task).min(first_tile + n_tiles);
            multiply(exec, &weights.tiles, tiles, x, &rows, 0, output);
        });
    };
    match x {
        Rows::Values(x) => {
            let rows = RowSets {
                n_k,
                offsets: &[0, n_rows as u32],
                start: &start,
            };
            exec.with_inputs(Rows::Values(&x[..n_rows * n_k]), &rows, product);
        }
        Rows::Blocks(x, n) => {
            assert_eq!(n, n_rows, "the rows of the blocks");
            product(Inputs::Blocks(x));
        }
    }
}

/// As [`matmul`], slow and obvious.
pub fn reference(
    _exec: &Exec,
    weights: &Projection,
    first_tile: usize,
    x: &[f32],
    n_rows: usize,
    into: Epilogue,
    out: &mut [f32],
) {
    let (n_k, n_out) = (weights.tiles.n_k(), weights.n_out);
    for row in 0..n_rows {
        for o in first_tile * LANES..n_out {
            let mut sum = 0.0f64;
            for k in 0..n_k {
                let w = weights.tiles.get(o / LANES, o % LANES, k);
                sum += f64::from(w) * f64::from(x[row * n_k + k]);
            }
            sum += weights
                .bias
                .as_ref()
                .map_or(0.0, |bias| f64::from(bias.get(o)));
            let out = &mut out[row * n_out + o];
            *out = match into {
                Epilogue::Store => sum as f32,
                Epilogue::Add => (f64::from(*out) + sum) as f32,
            };
        }
    }
}
