//! Expert products on packed weights, unpacked in registers, grouped by expert.
//!
//! One body serves every weight format ([`Tiles`] says how a tile is unpacked), so MXFP4 experts
//! and their MXINT8 and bf16 copies give equal bits. Tasks are (expert, some tiles); an expert without rows
//! costs nothing, and a tile is unpacked once for a whole group of its rows.
//!
//! ```text
//! gate_up  act[entry] = swiglu(W_gu[expert] x[row] + b_gu[expert])    [n_entries, intermediate]
//! down     y[entry]   = W_d[expert] act[entry] + b_d[expert]          [n_entries, hidden]
//! ```

use super::buffer::Disjoint;
use super::calls::Op;
use super::gemm::{Exec, Inputs, RowSets, multiply, tiles_a_task};
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
/// `[n_rows * k, intermediate]`.
pub fn gate_up(
    exec: &Exec,
    experts: &Experts,
    routing: &Routing,
    limit: f32,
    x: &[f32],
    act: &mut [f32],
) {
    let (hidden, intermediate) = (experts.hidden(), experts.intermediate());
    let k = routing.n_experts_per_token;
    let act = Disjoint::new(act);
    let row_start = |entry: u32| entry as usize / k * hidden;
    grouped(
        exec,
        &experts.gate_up,
        routing,
        &x[..routing.n_rows * hidden],
        row_start,
        |expert, tile, entries, rows| {
            let start = expert * 2 * intermediate + tile * LANES;
            let bias = experts.gate_up_bias.lanes::<LANES>(start);
            swiglu::swiglu(exec.path, limit, exec.exact, &bias, rows);
            for (&entry, lanes) in entries.iter().zip(rows) {
                // SAFETY: each (entry, tile) is finished once, by one task.
                #[allow(unsafe_code, reason = "entries and tiles are disjoint")]
                let out =
                    unsafe { act.slice_mut(entry as usize * intermediate + tile * PAIRS, PAIRS) };
                let out: &mut [f32; PAIRS] = out.first_chunk_mut().expect("as many");
                *out = *lanes.first_chunk().expect("half of the lanes");
            }
        },
    );
}

/// The second half, from `act` to `y` `[n_rows * k, hidden]`.
pub fn down(exec: &Exec, experts: &Experts, routing: &Routing, act: &[f32], y: &mut [f32]) {
    let (hidden, intermediate) = (experts.hidden(), experts.intermediate());
    let y = Disjoint::new(y);
    let row_start = |entry: u32| entry as usize * intermediate;
    grouped(
        exec,
        &experts.down,
        routing,
        &act[..routing.n_rows * routing.n_experts_per_token * intermediate],
        row_start,
        |expert, tile, entries, rows| {
            let bias = experts
                .down_bias
                .lanes::<LANES>(expert * hidden + tile * LANES);
            for (&entry, lanes) in entries.iter().zip(rows) {
                // SAFETY: each (entry, tile) is finished once, by one task.
                #[allow(unsafe_code, reason = "entries and tiles are disjoint")]
                let out = unsafe { y.slice_mut(entry as usize * hidden + tile * LANES, LANES) };
                let out: &mut [f32; LANES] = out.first_chunk_mut().expect("as many");
                for lane in 0..LANES {
                    out[lane] = lanes[lane] + bias[lane];
                }
            }
        },
    );
}

/// All experts' tiles times their entries; `finish(expert, tile of the expert, entries, rows)`.
fn grouped(
    exec: &Exec,
    weights: &Matrix,
    routing: &Routing,
    x: &[f32],
    row_start: impl Fn(u32) -> usize + Sync + Send,
    finish: impl Fn(usize, usize, &[u32], &mut [[f32; LANES]]) + Sync + Send,
) {
    exec.calls.count(Op::MoeMatmul, weights.format());
    let n_tiles = weights.n_tiles() / routing.n_experts;
    let n_entries = routing.n_rows * routing.n_experts_per_token;
    let n_hit = (0..routing.n_experts)
        .filter(|&expert| !routing.of_expert(expert).is_empty())
        .count();
    let mean_rows = n_entries.div_ceil(routing.n_experts);
    let a_task = tiles_a_task(exec, weights, n_tiles, n_hit, mean_rows);
    let n_tasks = n_tiles.div_ceil(a_task);
    let rows = RowSets {
        n_k: weights.n_k(),
        offsets: routing.offsets(),
        start: &|i| row_start(routing.entries()[i]),
    };
    let product = |x: Inputs| {
        for_each_in_turn(routing.n_experts * n_tasks, |task| {
            let (expert, part) = (task / n_tasks, task % n_tasks);
            let entries = routing.of_expert(expert);
            if entries.is_empty() {
                return;
            }
            let base = expert * n_tiles;
            let first = base + part * a_task;
            let tiles = first..(first + a_task).min(base + n_tiles);
            let finish = |tile: usize, first: usize, rows: &mut [[f32; LANES]]| {
                finish(
                    expert,
                    tile - base,
                    &entries[first..first + rows.len()],
                    rows,
                );
            };
            multiply(exec, weights, tiles, x, &rows, expert, finish);
        });
    };
    exec.with_inputs(x, &rows, product);
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
