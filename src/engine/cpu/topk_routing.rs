//! Which experts a row goes to: the top k of the raw router logits, ties to the lower expert,
//! then a softmax over those k alone; and the same choice grouped by expert.

use super::buffer::Buffer;
use super::lanes::{exp, larger};
use super::path::on_each_path;
use crate::engine::EngineError;

/// The routing of a pass, for up to `max_rows` rows. An *entry* is (row, rank): `row * k + rank`.
pub struct Routing {
    pub n_experts: usize,
    pub n_experts_per_token: usize,
    pub n_rows: usize,
    /// Expert of each entry.
    pub experts: Buffer<u32>,
    /// Weight of each entry; a row's weights sum to 1.
    pub weights: Buffer<f32>,
    /// `[n_experts + 1]`: where each expert's entries begin in `entries`.
    offsets: Buffer<u32>,
    /// Entries grouped by expert, ascending within one.
    entries: Buffer<u32>,
}

impl Routing {
    /// # Errors
    /// Out of memory.
    pub fn new(n_experts: usize, k: usize, max_rows: usize) -> Result<Self, EngineError> {
        let what = "routing";
        Ok(Self {
            n_experts,
            n_experts_per_token: k,
            n_rows: 0,
            experts: Buffer::zeroed(what, max_rows * k)?,
            weights: Buffer::zeroed(what, max_rows * k)?,
            offsets: Buffer::zeroed(what, n_experts + 1)?,
            entries: Buffer::zeroed(what, max_rows * k)?,
        })
    }

    pub fn n_bytes(&self) -> u64 {
        self.experts.n_bytes()
            + self.weights.n_bytes()
            + self.offsets.n_bytes()
            + self.entries.n_bytes()
    }

    /// Bytes of a routing, as planned.
    pub fn planned_bytes(n_experts: usize, k: usize, max_rows: usize) -> u64 {
        ((max_rows * k * 3 + n_experts + 1) * size_of::<u32>()) as u64
    }

    /// The entries of an expert.
    pub fn of_expert(&self, expert: usize) -> &[u32] {
        &self.entries[self.offsets[expert] as usize..self.offsets[expert + 1] as usize]
    }

    /// All entries, those of the first expert first.
    pub fn entries(&self) -> &[u32] {
        &self.entries[..self.n_rows * self.n_experts_per_token]
    }

    /// The number of entries before each expert's, and of all.
    pub fn offsets(&self) -> &[u32] {
        &self.offsets
    }

    /// Groups the entries of `n_rows` rows by expert.
    fn group(&mut self, n_rows: usize) {
        self.n_rows = n_rows;
        let n_entries = n_rows * self.n_experts_per_token;
        let experts = &self.experts[..n_entries];
        self.offsets.fill(0);
        for &expert in experts {
            self.offsets[expert as usize + 1] += 1;
        }
        for expert in 0..self.n_experts {
            self.offsets[expert + 1] += self.offsets[expert];
        }
        // Each begin serves as its expert's cursor and ends as the next one's begin.
        for (entry, &expert) in experts.iter().enumerate() {
            let cursor = &mut self.offsets[expert as usize];
            self.entries[*cursor as usize] = entry as u32;
            *cursor += 1;
        }
        for expert in (0..self.n_experts).rev() {
            self.offsets[expert + 1] = self.offsets[expert];
        }
        self.offsets[0] = 0;
    }
}

/// Routes `n_rows` rows of `logits` `[n_rows, n_experts]`.
pub fn route(path: super::path::CpuPath, logits: &[f32], n_rows: usize, routing: &mut Routing) {
    let (n_experts, k) = (routing.n_experts, routing.n_experts_per_token);
    for row in 0..n_rows {
        let experts = &mut routing.experts[row * k..][..k];
        let weights = &mut routing.weights[row * k..][..k];
        choose(
            path,
            &logits[row * n_experts..][..n_experts],
            experts,
            weights,
        );
    }
    routing.group(n_rows);
}

on_each_path! {
    fn choose(logits: &[f32], experts: &mut [u32], weights: &mut [f32]) = choose_body
}

#[inline(always)]
fn choose_body(logits: &[f32], experts: &mut [u32], weights: &mut [f32]) {
    let k = experts.len();
    // Insertion into the k best so far; only a larger logit passes one that came before.
    let mut n = 0;
    for (expert, &logit) in logits.iter().enumerate() {
        let mut rank = n;
        while rank > 0 && logit > weights[rank - 1] {
            rank -= 1;
        }
        if rank == k {
            continue;
        }
        n = (n + 1).min(k);
        experts.copy_within(rank..n - 1, rank + 1);
        weights.copy_within(rank..n - 1, rank + 1);
        experts[rank] = expert as u32;
        weights[rank] = logit;
    }
    let largest = weights.iter().fold(f32::NEG_INFINITY, |a, &b| larger(a, b));
    let mut sum = 0.0;
    for weight in weights.iter_mut() {
        *weight = exp(*weight - largest);
        sum += *weight;
    }
    for weight in weights {
        *weight /= sum;
    }
}

/// As [`route`], slow and obvious.
pub fn reference(_: super::path::CpuPath, logits: &[f32], n_rows: usize, routing: &mut Routing) {
    let (n_experts, k) = (routing.n_experts, routing.n_experts_per_token);
    for row in 0..n_rows {
        let logits = &logits[row * n_experts..][..n_experts];
        let mut order: Vec<usize> = (0..n_experts).collect();
        // A stable sort keeps the lower expert first among equals.
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        let of = |rank: usize| (f64::from(logits[order[rank]]) - f64::from(logits[order[0]])).exp();
        let sum: f64 = (0..k).map(of).sum();
        for (rank, &expert) in order[..k].iter().enumerate() {
            routing.experts[row * k + rank] = expert as u32;
            routing.weights[row * k + rank] = (of(rank) / sum) as f32;
        }
    }
    routing.group(n_rows);
}
