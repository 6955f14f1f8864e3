//! How many bytes of device memory a backend takes: pure functions of model and shape. What is
//! allocated is allocated by these lengths.

use super::decode::{Event, MAX_STEPS, Slot};
use super::model::CudaModel;
use super::sharing::SharedItem;
use crate::engine::checkpoint::WeightFormat;
use crate::engine::config::{LayerKind, ModelConfig};
use crate::engine::{BackendMemory, EngineShape, PAGE_POSITIONS, TILE_KEYS};

/// Row counts for which decode steps are captured.
pub const BUCKETS: [usize; 15] = [
    1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024,
];

/// Rows of the step that holds `n_rows` live ones.
pub fn bucket(n_rows: usize) -> usize {
    let found = BUCKETS.into_iter().find(|&bucket| bucket >= n_rows);
    found.unwrap_or_else(|| n_rows.next_multiple_of(256))
}

/// Sizes of the KV arena, in bf16 elements.
///
/// ```text
/// pages  [page][full layer][kv head][K 256 | V 256][head_dim]
/// rings  [sequence][sliding layer][kv head][K ring | V ring][head_dim], position mod ring
/// ```
#[derive(Clone, Copy, Debug)]
pub struct KvGeometry {
    pub n_full_layers: usize,
    pub n_sliding_layers: usize,
    /// Positions of a ring: a window that begins anywhere in a tile of 64.
    pub ring: usize,
    pub page_len: usize,
    pub ring_len: usize,
}

impl KvGeometry {
    pub fn new(config: &ModelConfig) -> Self {
        let ring = (config.sliding_window + TILE_KEYS - 1).next_multiple_of(TILE_KEYS);
        let n_full_layers = config.n_layers_of(LayerKind::Full);
        let n_sliding_layers = config.n_layers_of(LayerKind::Sliding);
        let a_position = 2 * config.n_kv_heads * config.head_dim;
        Self {
            n_full_layers,
            n_sliding_layers,
            ring,
            page_len: n_full_layers * a_position * PAGE_POSITIONS,
            ring_len: n_sliding_layers * a_position * ring,
        }
    }

    fn n_bytes(&self, shape: &EngineShape) -> u64 {
        let pages = (shape.n_pages as u64).saturating_mul(self.page_len as u64);
        let n_sequences = (shape.n_slots + shape.n_forks) as u64;
        pages
            .saturating_add(n_sequences.saturating_mul(self.ring_len as u64))
            .saturating_mul(2)
    }
}

/// Elements of each buffer of the workspace; R = the most rows of a pass, k = experts per token.
#[derive(Clone, Copy, Debug)]
pub struct Lengths {
    pub max_rows: usize,
    /// Rows of the largest decode step.
    pub step_rows: usize,
    pub max_pages: usize,
    pub max_splits: usize,
    /// Residual, f32 `[R, hidden]`.
    pub x: usize,
    /// Normed residual, bf16 `[R, hidden]`.
    pub t: usize,
    /// bf16 `[R, qkv_width]`.
    pub qkv: usize,
    /// bf16 `[R, q_width]`.
    pub attended: usize,
    /// Experts, gates and entries, `[R * k]` each.
    pub entries: usize,
    pub offsets: usize,
    /// bf16 `[R * k, intermediate]`.
    pub act: usize,
    /// f32 `[R * k, hidden]`.
    pub y: usize,
    /// f32 `[step_rows, n_vocab]`.
    pub logits: usize,
    /// f32 `[max_context, head_dim]`.
    pub rope: usize,
    pub page_table: usize,
    /// f32 `[step_rows, n_heads, max_splits, head_dim + 2]`.
    pub partial: usize,
    /// Work items of shared pages.
    pub items: usize,
    pub events: usize,
}

impl Lengths {
    pub fn new(config: &ModelConfig, shape: &EngineShape) -> Self {
        let step_rows = bucket(shape.n_slots);
        let max_rows = shape.prefill_rows.max(step_rows);
        let entries = max_rows.saturating_mul(config.n_experts_per_token);
        let max_pages = shape.max_context.div_ceil(PAGE_POSITIONS);
        let max_splits = max_pages;
        Self {
            max_rows,
            step_rows,
            max_pages,
            max_splits,
            x: max_rows.saturating_mul(config.hidden),
            t: max_rows.saturating_mul(config.hidden),
            qkv: max_rows.saturating_mul(config.qkv_width()),
            attended: max_rows.saturating_mul(config.q_width()),
            entries,
            offsets: config.n_experts + 1,
            act: entries.saturating_mul(config.intermediate),
            y: entries.saturating_mul(config.hidden),
            logits: step_rows.saturating_mul(config.n_vocab),
            rope: shape.max_context.saturating_mul(config.head_dim),
            page_table: (shape.n_slots + shape.n_forks).saturating_mul(max_pages),
            partial: (step_rows * config.n_heads)
                .saturating_mul(max_splits)
                .saturating_mul(config.head_dim + 2),
            items: shape.n_slots + 16 * max_splits,
            events: step_rows * MAX_STEPS,
        }
    }

    /// Bytes of them all, and of the small tables of rows and slots.
    pub fn n_bytes(&self, n_slots: usize) -> u64 {
        let four = [
            self.x,
            3usize.saturating_mul(self.entries),
            self.offsets,
            self.y,
            self.logits,
            self.rope,
            self.page_table,
            self.partial,
            // Rows (4 words), tokens, blocks (2 words).
            self.max_rows.saturating_mul(7),
            // The slots' map, the number of shared items, what rows share (2 words), the step counter.
            3 * self.step_rows + 2,
        ];
        let two = [self.t, self.qkv, self.attended, self.act];
        let words = |lens: &[usize], width: u64| {
            lens.iter().fold(0u64, |sum, &len| {
                sum.saturating_add((len as u64).saturating_mul(width))
            })
        };
        words(&four, 4)
            .saturating_add(words(&two, 2))
            .saturating_add((n_slots * size_of::<Slot>()) as u64)
            .saturating_add((self.items * size_of::<SharedItem>()) as u64)
            .saturating_add((self.events * size_of::<Event>()) as u64)
    }
}

/// The bytes that a backend of this shape will allocate on the device, by class.
pub fn planned(config: &ModelConfig, format: WeightFormat, shape: &EngineShape) -> BackendMemory {
    BackendMemory {
        weights_bytes: CudaModel::planned_bytes(config, format).total(),
        kv_bytes: KvGeometry::new(config).n_bytes(shape),
        workspace_bytes: Lengths::new(config, shape).n_bytes(shape.n_slots),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_go_into_the_next_bucket() {
        assert_eq!(bucket(1), 1);
        assert_eq!(bucket(3), 4);
        assert_eq!(bucket(65), 96);
        assert_eq!(bucket(1025), 1280);
    }
}
