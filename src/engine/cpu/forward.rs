//! The forward pass: a list of (sequence, position) rows through all layers.
//!
//! Prefill and decode are this function with different row counts and give equal bits: no
//! operation's arithmetic for a row looks at another row of the pass.

use super::attention::{Rows, attend};
use super::buffer::{Buffer, Disjoint};
use super::embed::embed;
use super::gemm::{Exec, MAX_QUERIES};
use super::kv_append::kv_append;
use super::kv_cache::{KvCache, KvElement};
use super::lanes::for_each;
use super::matmul::{Epilogue, matmul};
use super::model::{CpuModel, LayerWeights};
use super::moe_combine::moe_combine;
use super::moe_matmul;
use super::rmsnorm::rmsnorm;
use super::rope::rope;
use super::topk_routing::route;
use super::workspace::Workspace;
use crate::engine::config::{LayerKind, ModelConfig};
use crate::engine::{PAGE_POSITIONS, TILE_KEYS, TokenId};

/// Consecutive positions of one sequence in a pass.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    pub sequence: usize,
    /// Position of its first row.
    pub first: usize,
    /// Index of its first row in the pass.
    pub row: usize,
    pub n_rows: usize,
}

/// Rows of a segment that one attention task takes.
#[derive(Clone, Copy, Debug)]
struct Block {
    segment: Segment,
    /// Rows of the segment before the block.
    skip: usize,
    n_rows: usize,
}

/// The rows of a pass.
#[derive(Default)]
pub struct Batch {
    pub segments: Vec<Segment>,
    pub tokens: Vec<TokenId>,
    pub positions: Vec<u32>,
    blocks: Vec<Block>,
}

impl Batch {
    /// Room for `max_rows` rows, so that no pass allocates.
    pub fn with_capacity(max_rows: usize) -> Self {
        Self {
            segments: Vec::with_capacity(max_rows),
            tokens: Vec::with_capacity(max_rows),
            positions: Vec::with_capacity(max_rows),
            blocks: Vec::with_capacity(max_rows),
        }
    }

    pub fn n_rows(&self) -> usize {
        self.tokens.len()
    }

    pub fn clear(&mut self) {
        self.segments.clear();
        self.tokens.clear();
        self.positions.clear();
        self.blocks.clear();
    }

    /// Adds consecutive tokens of a sequence that is not in the pass yet.
    pub fn push(&mut self, group: usize, sequence: usize, first: usize, tokens: &[TokenId]) {
        let n_rows = tokens.len();
        let segment = Segment {
            sequence,
            first,
            row: self.n_rows(),
            n_rows,
        };
        self.segments.push(segment);
        self.tokens.extend_from_slice(tokens);
        self.positions
            .extend((first..first + n_rows).map(|position| position as u32));
        let a_block = rows_a_block(group);
        self.blocks
            .extend((0..n_rows).step_by(a_block).map(|skip| Block {
                segment,
                skip,
                n_rows: a_block.min(n_rows - skip),
            }));
    }
}

/// Rows of which one attention task carries all query heads of a KV head.
fn rows_a_block(group: usize) -> usize {
    (MAX_QUERIES / group).max(1)
}

/// How far a pass goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Until {
    /// The last layer's keys and values are written; its outputs are not needed.
    Cached,
    /// The residual after the last layer.
    Residual,
}

/// Runs the rows of `batch`; their keys and values go to `kv`, their residuals to `work.x`.
pub fn forward<E: KvElement>(
    exec: &Exec,
    model: &CpuModel,
    kv: &mut KvCache<E>,
    work: &mut Workspace,
    batch: &Batch,
    until: Until,
) {
    let config = &model.config;
    let n_rows = batch.n_rows();
    embed(&model.embedding, config.hidden, &batch.tokens, &mut work.x);
    for (i, layer) in model.layers.iter().enumerate() {
        let cached_only = until == Until::Cached && i + 1 == model.layers.len();
        rmsnorm(
            exec,
            &layer.attention_norm,
            config.rms_norm_eps,
            &work.x,
            n_rows,
            &mut work.t,
        );
        // Queries of a layer whose output nobody needs are left out.
        let first_head = if cached_only { config.n_heads } else { 0 };
        let first_tile = first_head * config.head_dim / super::lanes::LANES;
        matmul(
            exec,
            &layer.qkv,
            first_tile,
            &work.t,
            n_rows,
            Epilogue::Store,
            &mut work.qkv,
        );
        let heads = first_head..config.n_heads + config.n_kv_heads;
        rope(
            exec,
            &work.rope,
            &batch.positions,
            heads,
            config.qkv_width(),
            &mut work.qkv,
        );
        match layer.kind {
            LayerKind::Full => {
                append_full(config, layer, kv, work, batch);
                if !cached_only {
                    attend_full(exec, config, layer, kv, work, batch);
                }
            }
            LayerKind::Sliding => attend_sliding(exec, config, layer, kv, work, batch, cached_only),
        }
        if cached_only {
            return;
        }
        matmul(
            exec,
            &layer.out,
            0,
            &work.attended,
            n_rows,
            Epilogue::Add,
            &mut work.x,
        );
        rmsnorm(
            exec,
            &layer.mlp_norm,
            config.rms_norm_eps,
            &work.x,
            n_rows,
            &mut work.t,
        );
        matmul(
            exec,
            &layer.router,
            0,
            &work.t,
            n_rows,
            Epilogue::Store,
            &mut work.router_logits,
        );
        route(exec.path, &work.router_logits, n_rows, &mut work.routing);
        let (experts, limit) = (&layer.experts, config.swiglu_limit);
        moe_matmul::gate_up(exec, experts, &work.routing, limit, &work.t, &mut work.act);
        moe_matmul::down(exec, experts, &work.routing, &work.act, &mut work.y);
        moe_combine(
            exec.path,
            &work.routing,
            config.hidden,
            &work.y,
            &mut work.x,
        );
    }
}

/// Logits of residual rows `rows`, into the first rows of `work.logits`.
pub fn lm_head(exec: &Exec, model: &CpuModel, work: &mut Workspace, rows: std::ops::Range<usize>) {
    let config = &model.config;
    let n_rows = rows.len();
    let x = &work.x[rows.start * config.hidden..rows.end * config.hidden];
    rmsnorm(
        exec,
        &model.final_norm,
        config.rms_norm_eps,
        x,
        n_rows,
        &mut work.t,
    );
    matmul(
        exec,
        &model.lm_head,
        0,
        &work.t,
        n_rows,
        Epilogue::Store,
        &mut work.logits,
    );
}

/// Key and value of (row, KV head).
fn key_value<'a>(
    config: &ModelConfig,
    qkv: &'a [f32],
    row: usize,
    head: usize,
) -> (&'a [f32], &'a [f32]) {
    let row = &qkv[row * config.qkv_width()..][..config.qkv_width()];
    let k = config.q_width() + head * config.head_dim;
    let v = k + config.n_kv_heads * config.head_dim;
    (&row[k..k + config.head_dim], &row[v..v + config.head_dim])
}

/// The page of a sequence's tile.
fn page_of(table: &[u32], max_pages: usize, sequence: usize, tile: usize) -> usize {
    table[sequence * max_pages + tile * TILE_KEYS / PAGE_POSITIONS] as usize
}

fn append_full<E: KvElement>(
    config: &ModelConfig,
    layer: &LayerWeights,
    kv: &mut KvCache<E>,
    work: &Workspace,
    batch: &Batch,
) {
    let geometry = kv.geometry;
    let pages = Disjoint::new(&mut kv.pages);
    let n_heads = geometry.n_kv_heads;
    for_each(batch.segments.len() * n_heads, 8, |task| {
        let (segment, head) = (batch.segments[task / n_heads], task % n_heads);
        for i in 0..segment.n_rows {
            let position = segment.first + i;
            let tile = position / TILE_KEYS;
            let page = page_of(&work.page_table, work.max_pages, segment.sequence, tile);
            let start = geometry.page_tile(page, layer.kind_index, head, tile);
            let (k, v) = key_value(config, &work.qkv, segment.row + i, head);
            // SAFETY: a task has its own head, and pages that are written to belong to one
            // sequence, which is in the pass once.
            #[allow(unsafe_code, reason = "heads and pages are disjoint")]
            let tile = unsafe { pages.slice_mut(start, geometry.tile_len()) };
            kv_append(&geometry, tile, position % TILE_KEYS, k, v);
        }
    });
}

fn attend_full<E: KvElement>(
    exec: &Exec,
    config: &ModelConfig,
    layer: &LayerWeights,
    kv: &KvCache<E>,
    work: &mut Workspace,
    batch: &Batch,
) {
    let geometry = kv.geometry;
    let n_heads = geometry.n_kv_heads;
    let attended = Disjoint::new(&mut work.attended);
    let (qkv, table, max_pages) = (&work.qkv, &work.page_table, work.max_pages);
    for_each(batch.blocks.len() * n_heads, 1, |task| {
        let (block, head) = (batch.blocks[task / n_heads], task % n_heads);
        let segment = block.segment;
        let row = segment.row + block.skip;
        let rows = Rows {
            first: segment.first + block.skip,
            n_rows: block.n_rows,
            window: None,
            ..queries(exec, config, layer, qkv, row, head)
        };
        let tile_of = |tile: usize| {
            let page = page_of(table, max_pages, segment.sequence, tile);
            let start = geometry.page_tile(page, layer.kind_index, head, tile);
            &kv.pages[start..][..geometry.tile_len()]
        };
        exec.with_scratch(|scratch| {
            let write = |i, g| output(config, &attended, row + i, head, g);
            attend(
                exec.path,
                &geometry,
                &mut scratch.attention,
                &rows,
                tile_of,
                write,
            );
        });
    });
}

/// Appends and attends: a ring holds the window and 64 more positions, so a segment goes on in
/// steps of 64 rows, each written before it is attended and before the next overwrites it.
fn attend_sliding<E: KvElement>(
    exec: &Exec,
    config: &ModelConfig,
    layer: &LayerWeights,
    kv: &mut KvCache<E>,
    work: &mut Workspace,
    batch: &Batch,
    append_only: bool,
) {
    let geometry = kv.geometry;
    let n_heads = geometry.n_kv_heads;
    let rings = Disjoint::new(&mut kv.rings);
    let attended = Disjoint::new(&mut work.attended);
    let qkv: &Buffer<f32> = &work.qkv;
    let ring_len = geometry.ring_tiles * geometry.tile_len();
    for_each(batch.segments.len() * n_heads, 1, |task| {
        let (segment, head) = (batch.segments[task / n_heads], task % n_heads);
        let start = geometry.ring(segment.sequence, layer.kind_index, head);
        // SAFETY: a task has its own (sequence, head); a sequence is in the pass once.
        #[allow(unsafe_code, reason = "rings are disjoint")]
        let ring = unsafe { rings.slice_mut(start, ring_len) };
        let tile_start = |tile: usize| tile % geometry.ring_tiles * geometry.tile_len();
        let a_block = rows_a_block(config.group()).min(TILE_KEYS);
        for step in (0..segment.n_rows).step_by(TILE_KEYS) {
            let step_end = (step + TILE_KEYS).min(segment.n_rows);
            for i in step..step_end {
                let position = segment.first + i;
                let (k, v) = key_value(config, qkv, segment.row + i, head);
                let tile = &mut ring[tile_start(position / TILE_KEYS)..][..geometry.tile_len()];
                kv_append(&geometry, tile, position % TILE_KEYS, k, v);
            }
            if append_only {
                continue;
            }
            let ring = &*ring;
            for skip in (step..step_end).step_by(a_block) {
                let row = segment.row + skip;
                let rows = Rows {
                    first: segment.first + skip,
                    n_rows: a_block.min(step_end - skip),
                    window: Some(geometry.window),
                    ..queries(exec, config, layer, qkv, row, head)
                };
                let tile_of = |tile: usize| &ring[tile_start(tile)..][..geometry.tile_len()];
                exec.with_scratch(|scratch| {
                    let write = |i, g| output(config, &attended, row + i, head, g);
                    attend(
                        exec.path,
                        &geometry,
                        &mut scratch.attention,
                        &rows,
                        tile_of,
                        write,
                    );
                });
            }
        }
    });
}

/// The queries of one KV head's group from row `row` of the pass on; first position and window
/// are the caller's.
fn queries<'a>(
    exec: &Exec,
    config: &ModelConfig,
    layer: &'a LayerWeights,
    qkv: &'a [f32],
    row: usize,
    head: usize,
) -> Rows<'a> {
    let group = config.group();
    Rows {
        first: 0,
        n_rows: 0,
        group,
        q: &qkv[row * config.qkv_width() + head * group * config.head_dim..],
        q_stride: config.qkv_width(),
        window: None,
        sinks: &layer.sinks,
        first_sink: head * group,
        exact: exec.exact,
    }
}

/// Where the attention output of (row, KV head, query head of its group) goes.
#[allow(clippy::mut_from_ref, reason = "as `Disjoint::slice_mut`")]
fn output<'a>(
    config: &ModelConfig,
    attended: &'a Disjoint<f32>,
    row: usize,
    head: usize,
    g: usize,
) -> &'a mut [f32] {
    let start = row * config.q_width() + (head * config.group() + g) * config.head_dim;
    // SAFETY: each (row, query head) is written by one task, once.
    #[allow(unsafe_code, reason = "rows and heads are disjoint")]
    unsafe {
        attended.slice_mut(start, config.head_dim)
    }
}
