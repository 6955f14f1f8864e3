//! Back to the residual: `x = x + (((w0 y0 + w1 y1) + w2 y2) + w3 y3)` in rank order.

use super::buffer::Disjoint;
use super::lanes::{for_each, next_row};
use super::path::{CpuPath, on_each_path};
use super::topk_routing::Routing;

/// Adds the experts' outputs `y` `[n_rows * k, hidden]` to `x` `[n_rows, hidden]`.
pub fn moe_combine(path: CpuPath, routing: &Routing, hidden: usize, y: &[f32], x: &mut [f32]) {
    let k = routing.n_experts_per_token;
    let x = Disjoint::new(x);
    for_each(routing.n_rows, 16, |row| {
        // SAFETY: one task a row.
        #[allow(unsafe_code, reason = "rows are disjoint")]
        let x = unsafe { x.slice_mut(row * hidden, hidden) };
        let weights = &routing.weights[row * k..][..k];
        combine_row(path, weights, &y[row * k * hidden..][..k * hidden], x);
    });
}

on_each_path! {
    fn combine_row(weights: &[f32], y: &[f32], x: &mut [f32]) = combine_row_body
}

#[inline(always)]
fn combine_row_body(weights: &[f32], y: &[f32], x: &mut [f32]) {
    const WIDTH: usize = 32;
    let hidden = x.len();
    for (chunk, x) in x.as_chunks_mut::<WIDTH>().0.iter_mut().enumerate() {
        next_row();
        let mut sum = [0.0f32; WIDTH];
        for (rank, &weight) in weights.iter().enumerate() {
            let y: &[f32; WIDTH] = y[rank * hidden + chunk * WIDTH..]
                .first_chunk()
                .expect("as wide as x");
            for lane in 0..WIDTH {
                sum[lane] = weight.mul_add(y[lane], sum[lane]);
            }
        }
        for lane in 0..WIDTH {
            x[lane] += sum[lane];
        }
    }
}

/// As [`moe_combine`], slow and obvious.
pub fn reference(_: CpuPath, routing: &Routing, hidden: usize, y: &[f32], x: &mut [f32]) {
    let k = routing.n_experts_per_token;
    for row in 0..routing.n_rows {
        for i in 0..hidden {
            let mut sum = 0.0f64;
            for rank in 0..k {
                let entry = row * k + rank;
                sum += f64::from(routing.weights[entry]) * f64::from(y[entry * hidden + i]);
            }
            let x = &mut x[row * hidden + i];
            *x = (f64::from(*x) + sum) as f32;
        }
    }
}
