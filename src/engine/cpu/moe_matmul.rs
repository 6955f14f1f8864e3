//! Expert products on packed weights, unpacked in registers, grouped by expert.
//!
//! One body serves every weight format ([`Tiles`] says how a tile is unpacked), so MXFP4 experts
//! and their MXINT8 and bf16 copies give equal bits. Tasks are (expert, some tiles); an expert without rows
//! costs nothing, and a tile is unpacked once for a whole group of its rows.
//!
//! ```text
//! gate_up  act[entry] = swiglu(W_gu[expert] x[row] + b_gu[expert])    [n_entries, intermediate], or blocks
//! down     y[entry]   = W_d[expert] act[entry] + b_d[expert]          [n_entries, hidden]
//! ```
//!
//! Where products are of tiles, `act` is written as the blocks that the second half takes: in half as many
//! bytes, one behind the other, and joined by nothing between.

use std::ops::Range;

use super::amx;
use super::buffer::{Disjoint, bits_of};
use super::calls::Op;
use super::gemm::{Exec, Inputs, Output, RowSets, Rows, multiply, tiles_a_task};
use super::lanes::{LANES, for_each_in_turn};
use super::swiglu::{self, PAIRS};
use super::topk_routing::Routing;
use super::weights::{Matrix, Tiles, Vector};

/// The experts of a layer. Tiles of expert `e` begin at `e * n_tiles / n_experts`.
pub struct Experts {
    pub n_experts: usize,
    /// Tile `t` of an expert: lanes 0..16 gates, lanes 16..32 ups of pairs `16 t ..`.
    pub gate_up: Matrix,
    /// `[n_experts, 2 * intermediate]` in the order of the tiles' lanes.
    pub gate_up_bias: Vector,
    pub down: Matrix,
    /// `[n_experts, hidden]`.
    pub down_bias: Vector,
}

impl Experts {
    fn hidden(&self) -> usize {
        self.gate_up.n_k()
    }

    fn intermediate(&self) -> usize {
        self.down.n_k()
    }
}

/// The first half of the experts, from `x` `[n_rows, hidden]` to `act`
/// `[n_rows * k, intermediate]`, or in blocks of each expert's entries ([`Exec::in_blocks`]).
pub fn gate_up(
    exec: &Exec,
    experts: &Experts,
    routing: &Routing,
    limit: f32,
    x: Rows,
    act: &mut [f32],
) {
    let hidden = experts.hidden();
    let k = routing.n_experts_per_token;
    let act = Disjoint::new(act);
    let rows = RowSets {
        n_k: hidden,
        offsets: routing.offsets(),
        start: &|i| routing.entries()[i] as usize / k * hidden,
    };
    let output = |of| GateUp {
        exec,
        experts,
        limit,
        in_blocks: exec.in_blocks(),
        of,
        act: &act,
    };
    let x = match x {
        Rows::Values(x) => Rows::Values(&x[..routing.n_rows * hidden]),
        blocks => blocks,
    };
    exec.with_inputs(x, &rows, |x| {
        grouped(exec, &experts.gate_up, routing, &rows, x, output);
    });
}

/// The second half, from `act`, in blocks with [`amx::SLACK`] words behind them, to `y` `[n_rows * k, hidden]`.
pub fn down(exec: &Exec, experts: &Experts, routing: &Routing, act: &[f32], y: &mut [f32]) {
    let intermediate = experts.intermediate();
    let y = Disjoint::new(y);
    let n_entries = routing.n_rows * routing.n_experts_per_token;
    let rows = RowSets {
        n_k: intermediate,
        offsets: routing.offsets(),
        start: &|i| routing.entries()[i] as usize * intermediate,
    };
    let output = |of| Down { experts, of, y: &y };
    let product = |x: Inputs| grouped(exec, &experts.down, routing, &rows, x, output);
    if exec.in_blocks() {
        product(Inputs::Blocks(bits_of(act)));
    } else {
        let act = Rows::Values(&act[..n_entries * intermediate]);
        exec.with_inputs(act, &rows, product);
    }
}

/// An expert and the entries that meet it.
struct OfExpert<'a> {
    /// The first of its tiles.
    base: usize,
    /// Entries of the experts before it.
    n_before: usize,
    entries: &'a [u32],
}

/// Sums on their way through SwiGLU into `act`.
struct GateUp<'a> {
    exec: &'a Exec,
    experts: &'a Experts,
    limit: f32,
    in_blocks: bool,
    of: OfExpert<'a>,
    act: &'a Disjoint<'a, f32>,
}

impl GateUp<'_> {
    /// The first of a tile's values.
    #[inline(always)]
    fn column(&self, tile: usize) -> usize {
        (tile - self.of.base) * PAIRS
    }

    /// Where a tile's values of a block's first row go.
    #[inline(always)]
    fn start_of(&self, tile: usize, rows: &Range<usize>) -> usize {
        let first = self.of.n_before + rows.start;
        let intermediate = self.experts.intermediate();
        amx::start_of(first, rows.len(), intermediate, self.column(tile))
    }

    /// Where those of a row by itself go.
    #[inline(always)]
    fn start_of_row(&self, tile: usize, row: usize) -> usize {
        let entry = self.of.entries[row] as usize;
        entry * self.experts.intermediate() + self.column(tile)
    }
}

impl Output for GateUp<'_> {
    #[inline(always)]
    fn prefetch(&self, tile: usize, rows: Range<usize>) {
        if self.in_blocks {
            // Of two tiles that share lines the first brings them.
            if (tile - self.of.base).is_multiple_of(2) {
                let start = self.start_of(tile, &rows);
                for row in 0..rows.len() {
                    self.act.prefetch(start + row * amx::STEP_PAIRS, PAIRS / 2);
                }
            }
        } else {
            for row in rows {
                self.act.prefetch(self.start_of_row(tile, row), PAIRS);
            }
        }
    }

    // With arrays, and without closures: they, and slices' copies, would be calls.
    #[inline(always)]
    fn take(&mut self, tile: usize, first: usize, sums: &mut [[f32; LANES]]) {
        let bias = self.experts.gate_up_bias.lanes::<LANES>(tile * LANES);
        let (path, limit) = (self.exec.path, self.limit);
        if self.in_blocks {
            swiglu::swiglu_to_bf16(path, limit, &bias, sums);
            let start = self.start_of(tile, &(first..first + sums.len()));
            for (row, lanes) in sums.iter().enumerate() {
                let start = start + row * amx::STEP_PAIRS;
                // SAFETY: each (entry, tile) is taken once, by one task.
                #[allow(unsafe_code, reason = "entries and tiles are disjoint")]
                let out = unsafe { self.act.slice_mut(start, PAIRS / 2) };
                let out: &mut [f32; PAIRS / 2] = out.first_chunk_mut().expect("as many");
                *out = *lanes.first_chunk().expect("a quarter of the lanes");
            }
        } else {
            swiglu::swiglu(path, limit, self.exec.exact, &bias, sums);
            for (row, lanes) in sums.iter().enumerate() {
                let start = self.start_of_row(tile, first + row);
                // SAFETY: each (entry, tile) is taken once, by one task.
                #[allow(unsafe_code, reason = "entries and tiles are disjoint")]
                let out = unsafe { self.act.slice_mut(start, PAIRS) };
                let out: &mut [f32; PAIRS] = out.first_chunk_mut().expect("as many");
                *out = *lanes.first_chunk().expect("half of the lanes");
            }
        }
    }
}

/// Sums on their way into `y` `[n_entries, hidden]`.
struct Down<'a> {
    experts: &'a Experts,
    of: OfExpert<'a>,
    y: &'a Disjoint<'a, f32>,
}

impl Down<'_> {
    #[inline(always)]
    fn start(&self, entry: u32, tile: usize) -> usize {
        entry as usize * self.experts.hidden() + (tile - self.of.base) * LANES
    }
}

impl Output for Down<'_> {
    #[inline(always)]
    fn prefetch(&self, tile: usize, rows: Range<usize>) {
        for &entry in &self.of.entries[rows] {
            self.y.prefetch(self.start(entry, tile), LANES);
        }
    }

    #[inline(always)]
    fn take(&mut self, tile: usize, first: usize, sums: &mut [[f32; LANES]]) {
        let bias = self.experts.down_bias.lanes::<LANES>(tile * LANES);
        let entries = &self.of.entries[first..first + sums.len()];
        for (row, lanes) in sums.iter().enumerate() {
            // SAFETY: each (entry, tile) is taken once, by one task.
            #[allow(unsafe_code, reason = "entries and tiles are disjoint")]
            let out = unsafe { self.y.slice_mut(self.start(entries[row], tile), LANES) };
            let out: &mut [f32; LANES] = out.first_chunk_mut().expect("as many");
            for lane in 0..LANES {
                out[lane] = lanes[lane] + bias[lane];
            }
        }
    }
}

/// All experts' tiles times their entries, into the output of each expert.
fn grouped<'a, O: Output>(
    exec: &Exec,
    weights: &Matrix,
    routing: &'a Routing,
    rows: &RowSets,
    x: Inputs,
    output: impl Fn(OfExpert<'a>) -> O + Sync + Send,
) {
    /// Tasks of a thread: many, since experts have unequal numbers of rows.
    const A_THREAD: usize = 32;
    exec.calls.count(Op::MoeMatmul, weights.format());
    let n_tiles = weights.n_tiles() / routing.n_experts;
    let n_entries = routing.n_rows * routing.n_experts_per_token;
    let n_hit = (0..routing.n_experts)
        .filter(|&expert| !routing.of_expert(expert).is_empty())
        .count();
    let mean_rows = n_entries.div_ceil(routing.n_experts);
    let a_task = tiles_a_task(exec, weights, n_tiles, n_hit, mean_rows, A_THREAD);
    let n_tasks = n_tiles.div_ceil(a_task);
    for_each_in_turn(routing.n_experts * n_tasks, |task| {
        let (expert, part) = (task / n_tasks, task % n_tasks);
        let entries = routing.of_expert(expert);
        if entries.is_empty() {
            return;
        }
        let base = expert * n_tiles;
        let first = base + part * a_task;
        let tiles = first..(first + a_task).min(base + n_tiles);
        let output = output(OfExpert {
            base,
            n_before: rows.of_set(expert).start,
            entries,
        });
        multiply(exec, weights, tiles, x, rows, expert, output);
    });
}

/// As [`gate_up`], slow and obvious.
pub fn gate_up_reference(
    exec: &Exec,
    experts: &Experts,
    routing: &Routing,
    limit: f32,
    x: &[f32],
    act: &mut [f32],
) {
    let (hidden, intermediate) = (experts.hidden(), experts.intermediate());
    let k = routing.n_experts_per_token;
    let n_tiles = experts.gate_up.n_tiles() / experts.n_experts;
    for entry in 0..routing.n_rows * k {
        let expert = routing.experts[entry] as usize;
        let x = &x[entry / k * hidden..][..hidden];
        for tile in 0..n_tiles {
            let start = expert * 2 * intermediate + tile * LANES;
            let bias = experts.gate_up_bias.lanes::<LANES>(start);
            let mut lanes = [0.0; LANES];
            for (lane, value) in lanes.iter_mut().enumerate() {
                let w = |i: usize| experts.gate_up.get(expert * n_tiles + tile, lane, i);
                let sum: f64 = (0..hidden).map(|i| f64::from(w(i)) * f64::from(x[i])).sum();
                *value = sum as f32;
            }
            let rows = &mut [lanes];
            swiglu::reference(exec.path, limit, exec.exact, &bias, rows);
            act[entry * intermediate + tile * PAIRS..][..PAIRS].copy_from_slice(&rows[0][..PAIRS]);
        }
    }
}

/// As [`down`], slow and obvious.
pub fn down_reference(
    _exec: &Exec,
    experts: &Experts,
    routing: &Routing,
    act: &[f32],
    y: &mut [f32],
) {
    let (hidden, intermediate) = (experts.hidden(), experts.intermediate());
    let n_tiles = experts.down.n_tiles() / experts.n_experts;
    for entry in 0..routing.n_rows * routing.n_experts_per_token {
        let expert = routing.experts[entry] as usize;
        let act = &act[entry * intermediate..][..intermediate];
        for o in 0..hidden {
            let w = |i: usize| experts.down.get(expert * n_tiles + o / LANES, o % LANES, i);
            let sum: f64 = (0..intermediate)
                .map(|i| f64::from(w(i)) * f64::from(act[i]))
                .sum();
            let bias = experts.down_bias.get(expert * hidden + o);
            y[entry * hidden + o] = (sum + f64::from(bias)) as f32;
        }
    }
}
