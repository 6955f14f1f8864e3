//! Where attention's outputs go: rows of values or, where the product behind it is of tiles, that product's
//! blocks.

use super::amx::Place;
use super::attention::Row;
use super::buffer::Disjoint;
use super::gemm::Exec;
use super::lanes::LANES;
use crate::engine::config::ModelConfig;

/// Whether attention writes its outputs in the blocks that the next product takes: heads are whole steps.
pub fn attended_in_blocks(exec: &Exec, config: &ModelConfig) -> bool {
    exec.in_blocks() && config.head_dim.is_multiple_of(LANES)
}

/// Where attention's outputs go.
pub struct Attended<'a> {
    out: Disjoint<'a, f32>,
    n_rows: usize,
    /// Values of a row.
    width: usize,
    group: usize,
    head_dim: usize,
    in_blocks: bool,
}

impl<'a> Attended<'a> {
    pub fn new(exec: &Exec, config: &ModelConfig, n_rows: usize, out: &'a mut [f32]) -> Self {
        Self {
            out: Disjoint::new(out),
            n_rows,
            width: config.q_width(),
            group: config.group(),
            head_dim: config.head_dim,
            in_blocks: attended_in_blocks(exec, config),
        }
    }

    fn place(&self, row: usize) -> Place {
        Place::of(row, self.n_rows, self.width)
    }

    /// Brings what the outputs of rows under a KV head will be written to.
    pub fn prefetch(&self, rows: &[Row], head: usize) {
        let n = self.group * self.head_dim;
        for row in rows {
            if self.in_blocks {
                let place = self.place(row.index);
                for step in head * n / LANES..(head + 1) * n / LANES {
                    let start = place.start + step * place.a_step;
                    self.out.prefetch(start, LANES / 2);
                }
            } else {
                self.out.prefetch(row.index * self.width + head * n, n);
            }
        }
    }

    /// Writes what [`attend`](super::attention::attend) gives of a KV head: 32 dimensions of (row, query head of its group).
    pub fn writer(&self, head: usize) -> impl FnMut(usize, usize, usize, &[f32; LANES]) {
        let mut of_row = None;
        move |row, g, block, lanes| {
            let at = (head * self.group + g) * self.head_dim + block * LANES;
            // SAFETY: each (row, query head) is written by one task, once.
            #[allow(unsafe_code, reason = "rows and heads are disjoint")]
            let out = |start, n| unsafe { self.out.slice_mut(start, n) };
            // As arrays: slices would be copied by a call.
            if self.in_blocks {
                let place = match of_row {
                    Some((of, place)) if of == row => place,
                    _ => self.place(row),
                };
                of_row = Some((row, place));
                let out = out(place.start + at / LANES * place.a_step, LANES / 2);
                let out: &mut [f32; LANES / 2] = out.first_chunk_mut().expect("as many");
                *out = *lanes.first_chunk().expect("half of the lanes");
                return;
            }
            let n = LANES.min(self.head_dim - block * LANES);
            let out = out(row * self.width + at, n);
            match out.first_chunk_mut::<LANES>() {
                Some(out) => *out = *lanes,
                None => out.copy_from_slice(&lanes[..n]),
            }
        }
    }
}
