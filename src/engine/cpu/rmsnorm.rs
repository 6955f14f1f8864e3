//! RMSNorm: `out = x / sqrt(mean(x^2) + eps) * scale`, the sum and the product with the scale in
//! f32, then rounded to bf16 unless exact (gpt_oss/torch/model.py, `RMSNorm`).

use super::amx::Place;
use super::buffer::Disjoint;
use super::gemm::Exec;
use super::lanes::{LANES, for_each, sum_lanes};
use super::path::on_each_path;
use super::weights::Vector;
use crate::quant::bf16;

/// Normalizes `x` `[n_rows, hidden]` into `out`; `hidden` is a multiple of 32.
pub fn rmsnorm(exec: &Exec, scale: &Vector, eps: f32, x: &[f32], n_rows: usize, out: &mut [f32]) {
    let hidden = scale.len();
    let out = Disjoint::new(out);
    for_each(n_rows, 16, |row| {
        // SAFETY: one task a row.
        #[allow(unsafe_code, reason = "rows are disjoint")]
        let out = unsafe { out.slice_mut(row * hidden, hidden) };
        norm_row(
            exec.path,
            scale,
            eps,
            exec.exact,
            &x[row * hidden..][..hidden],
            out,
        );
    });
}

/// As [`rmsnorm`], rounded, into blocks of a set ([`amx::join`](super::amx::join)).
pub fn rmsnorm_to_blocks(
    exec: &Exec,
    scale: &Vector,
    eps: f32,
    x: &[f32],
    n_rows: usize,
    blocks: &mut [u32],
) {
    let hidden = scale.len();
    let blocks = Disjoint::new(blocks);
    for_each(n_rows, 16, |row| {
        let place = Place::of(row, n_rows, hidden);
        let x = &x[row * hidden..][..hidden];
        norm_row_to_blocks(exec.path, scale, eps, x, place, &blocks);
    });
}

on_each_path! {
    fn norm_row_to_blocks(
        scale: &Vector,
        eps: f32,
        x: &[f32],
        place: Place,
        blocks: &Disjoint<u32>,
    ) = norm_row_to_blocks_body
}

#[inline(always)]
fn norm_row_to_blocks_body(
    scale: &Vector,
    eps: f32,
    x: &[f32],
    place: Place,
    blocks: &Disjoint<u32>,
) {
    let inverse = inverse_of(eps, x);
    let (x, _) = x.as_chunks::<LANES>();
    for (step, x) in x.iter().enumerate() {
        let scale = scale.lanes::<LANES>(step * LANES);
        let mut values = [0; LANES];
        for lane in 0..LANES {
            values[lane] = bf16::from_f32(x[lane] * inverse * scale[lane]);
        }
        // SAFETY: both are 64 bytes, and any bits are a number; each row is written by one task.
        #[allow(unsafe_code, reason = "rows are disjoint")]
        unsafe {
            let pairs = std::mem::transmute::<[u16; LANES], [u32; LANES / 2]>(values);
            let out = blocks.slice_mut(place.start + step * place.a_step, pairs.len());
            *out.first_chunk_mut().expect("as many") = pairs;
        }
    }
}

on_each_path! {
    fn norm_row(scale: &Vector, eps: f32, exact: bool, x: &[f32], out: &mut [f32]) = norm_row_body
}

#[inline(always)]
fn norm_row_body(scale: &Vector, eps: f32, exact: bool, x: &[f32], out: &mut [f32]) {
    let inverse = inverse_of(eps, x);
    let chunks = x
        .as_chunks::<LANES>()
        .0
        .iter()
        .zip(out.as_chunks_mut::<LANES>().0);
    for (i, (x, out)) in chunks.enumerate() {
        let scale = scale.lanes::<LANES>(i * LANES);
        for lane in 0..LANES {
            let value = x[lane] * inverse * scale[lane];
            out[lane] = if exact { value } else { bf16::round(value) };
        }
    }
}

/// One over the root of the mean square.
#[inline(always)]
fn inverse_of(eps: f32, x: &[f32]) -> f32 {
    let mut squares = [0.0f32; LANES];
    for x in x.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            squares[lane] = x[lane].mul_add(x[lane], squares[lane]);
        }
    }
    let mean = sum_lanes(squares) / x.len() as f32;
    1.0 / (mean + eps).sqrt()
}

/// As [`rmsnorm`], slow and obvious.
pub fn reference(exec: &Exec, scale: &Vector, eps: f32, x: &[f32], n_rows: usize, out: &mut [f32]) {
    let hidden = scale.len();
    for row in 0..n_rows {
        let x = &x[row * hidden..][..hidden];
        let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let root = (squares / hidden as f64 + f64::from(eps)).sqrt();
        for i in 0..hidden {
            let value = (f64::from(x[i]) / root * f64::from(scale.get(i))) as f32;
            out[row * hidden + i] = if exec.exact {
                value
            } else {
                bf16::round(value)
            };
        }
    }
}
