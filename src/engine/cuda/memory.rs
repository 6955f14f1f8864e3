//! How many bytes of device memory a backend takes: pure functions of model and shape. What is
//! allocated is allocated by these lengths.

use super::decode::{Event, MAX_STEPS, Slot};
use super::model::CudaModel;
use super::places;
use super::sharing::SharedItem;
use super::variants;
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

/// Most parts that a row of logits is gone through by, and 64-bit words of what one comes to:
/// `Partial` in kernels/sample.cu.
pub const MAX_SAMPLE_PARTS: usize = 64;
const SAMPLE_PARTIAL_LEN: usize = 4;

/// 64-bit words of all parts of `n_rows` rows of logits.
pub fn sample_partials_len(n_rows: usize) -> usize {
    n_rows * MAX_SAMPLE_PARTS * SAMPLE_PARTIAL_LEN
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
    /// bf16 `[R * k, intermediate]`, or of the entries' places as tiles (kernels/common.cuh).
    pub act: usize,
    /// Places of entries, and words of the list of token tiles.
    pub places: usize,
    pub listed: usize,
    /// bf16 `[R * k, hidden]`; before, `t` of the entries' places as tiles.
    pub y: usize,
    /// f32 sums that blocks of a cluster leave for each other (kernels/gemm_stream.cuh).
    pub exchange: usize,
    /// f32 `[step_rows, n_vocab]`.
    pub logits: usize,
    /// u64 `[step_rows, parts, words]`.
    pub sample_partials: usize,
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
        let n_octets = places::n_octets(entries, config.n_experts);
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
            act: places::tiles_len(n_octets, config.intermediate),
            places: n_octets * places::OCTET,
            // Each octet may be a tile of its own.
            listed: n_octets * places::LISTED_WORDS,
            y: places::tiles_len(n_octets, config.hidden),
            exchange: variants::exchange_len(config.hidden, max_rows),
            logits: step_rows.saturating_mul(config.n_vocab),
            sample_partials: sample_partials_len(step_rows),
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
            self.places,
            self.listed,
            self.exchange,
            self.logits,
            2 * self.sample_partials,
            self.rope,
            self.page_table,
            self.partial,
            // Rows (4 words), tokens, blocks (2 words).
            self.max_rows.saturating_mul(7),
            // The slots' map, greatest logits, the number of shared items, what rows share (2 words), the
            // step counter.
            4 * self.step_rows + 2,
        ];
        let two = [self.t, self.qkv, self.attended, self.act, self.y];
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

/// Device memory of a captured launch, by estimate; a device test holds it against what the driver
/// takes.
const LAUNCH_BYTES: u64 = 8 << 10;

/// Launches of a step in a layer, and beside the layers, at most.
const LAYER_LAUNCHES: u64 = 16;
const OTHER_LAUNCHES: u64 = 8;

/// Code of the kernels, their local memory and the driver's own tables, by estimate.
const CODE_BYTES: u64 = 96 << 20;

/// The driver hands out large buffers in units of 2 MiB: half of one is lost a buffer. A layer has
/// four such buffers, embedding, lm head and workspace together so many.
const LOST_BYTES: u64 = 1 << 20;
const OTHER_BUFFERS: u64 = 16;

/// Device memory of the captured steps of all row counts up to the slots, by estimate.
pub fn graph_bytes(config: &ModelConfig, n_slots: usize) -> u64 {
    let most = bucket(n_slots.max(1));
    let n_buckets = BUCKETS.into_iter().filter(|&rows| rows < most).count() as u64 + 1;
    let n_launches = config.n_layers() as u64 * LAYER_LAUNCHES + OTHER_LAUNCHES;
    // Of rows that share pages and of rows that do not.
    2 * n_buckets * n_launches * LAUNCH_BYTES
}

/// What the driver keeps beside what is allocated, by estimate: code, graphs and rounding.
pub fn driver_bytes(config: &ModelConfig, format: WeightFormat, n_slots: usize) -> u64 {
    let n_buffers = 4 * config.n_layers() as u64 + OTHER_BUFFERS;
    let weights = CudaModel::planned_bytes(config, format).total();
    // Small models have small buffers, which share a unit.
    let lost = (n_buffers * LOST_BYTES).min(weights / 32);
    CODE_BYTES + graph_bytes(config, n_slots) + lost
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::checkpoint::{MatrixFormat, Precision, VectorFormat};

    #[test]
    fn the_driver_takes_a_small_part_of_a_large_model() {
        let config = crate::engine::shapes::named("gpt-oss-20b").expect("a shape");
        let format = Precision::Stored.formats(MatrixFormat::Mxfp4, VectorFormat::Bf16);
        let weights = planned(&config, format, &shape(256)).weights_bytes;
        assert!(driver_bytes(&config, format, 256) < weights / 40);
        // For 1, 2, 4 and 8 rows.
        assert_eq!(graph_bytes(&config, 5), 4 * graph_bytes(&config, 1));
    }

    fn shape(n_slots: usize) -> EngineShape {
        EngineShape {
            n_slots,
            n_forks: 0,
            n_pages: n_slots,
            max_context: PAGE_POSITIONS,
            prefill_rows: 512,
        }
    }

    #[test]
    fn steps_go_into_the_next_bucket() {
        assert_eq!(bucket(1), 1);
        assert_eq!(bucket(3), 4);
        assert_eq!(bucket(65), 96);
        assert_eq!(bucket(1025), 1280);
    }
}
