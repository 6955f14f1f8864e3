//! The forward pass: a list of (sequence, position) rows through all layers.
//!
//! Prefill and decode are this function with different row counts and give equal bits: no
//! operation's arithmetic for a row looks at another row of the pass.

use std::cmp::Reverse;
use std::ops::Range;

use super::attended::{Attended, attended_in_blocks};
use super::attention::{Queries, Row, attend};
use super::buffer::{Buffer, Disjoint, bits_of, bits_of_mut};
use super::embed::embed;
use super::gemm::{Exec, MAX_QUERIES, Rows};
use super::kv_append::kv_append;
use super::kv_cache::{KvCache, KvElement};
use super::lanes::{LANES, for_each, for_each_in_turn};
use super::matmul::{Epilogue, matmul};
use super::model::{CpuModel, LayerWeights};
use super::moe_combine::moe_combine;
use super::moe_matmul;
use super::rmsnorm::{rmsnorm, rmsnorm_to_blocks};
use super::rope::rope;
use super::topk_routing::route;
use super::weights::{Vector, prefetch};
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

/// The rows of a pass.
#[derive(Default)]
pub struct Batch {
    pub segments: Vec<Segment>,
    pub tokens: Vec<TokenId>,
    pub positions: Vec<u32>,
    rows: Vec<Row>,
    /// The rows once more, those that share pages next to each other.
    by_pages: Vec<Row>,
    /// Which of `by_pages` an attention task takes; the largest task first.
    blocks: Vec<Range<usize>>,
}

impl Batch {
    /// Room for `max_rows` rows, so that no pass allocates.
    pub fn with_capacity(max_rows: usize) -> Self {
        Self {
            segments: Vec::with_capacity(max_rows),
            tokens: Vec::with_capacity(max_rows),
            positions: Vec::with_capacity(max_rows),
            rows: Vec::with_capacity(max_rows),
            by_pages: Vec::with_capacity(max_rows),
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
        self.rows.clear();
        self.by_pages.clear();
        self.blocks.clear();
    }

    /// Adds consecutive tokens of a sequence that is not in the pass yet.
    pub fn push(&mut self, sequence: usize, first: usize, tokens: &[TokenId]) {
        let (row, n_rows) = (self.n_rows(), tokens.len());
        self.segments.push(Segment {
            sequence,
            first,
            row,
            n_rows,
        });
        self.tokens.extend_from_slice(tokens);
        let positions = first..first + n_rows;
        self.positions
            .extend(positions.clone().map(|position| position as u32));
        self.rows
            .extend(positions.enumerate().map(|(i, position)| Row {
                index: row + i,
                sequence,
                position,
            }));
    }

    /// Divides the rows into the blocks of full layers' attention: of rows that share their first
    /// page at least, about equal numbers, up to `most`. In the order of their pages those that
    /// share the most are neighbours, be it through a prefix or a prefix of that.
    pub fn divide(&mut self, page_table: &[u32], max_pages: usize, most: usize) {
        let pages = |row: &Row| {
            let table = &page_table[row.sequence * max_pages..][..max_pages];
            &table[..=row.position / PAGE_POSITIONS]
        };
        self.by_pages.clear();
        self.by_pages.extend_from_slice(&self.rows);
        self.by_pages.sort_unstable_by(|a, b| {
            let by_position = a.position.cmp(&b.position);
            pages(a).cmp(pages(b)).then(by_position)
        });
        self.blocks.clear();
        let mut first = 0;
        for rows in self.by_pages.chunk_by(|a, b| pages(a)[0] == pages(b)[0]) {
            let n = rows.len().div_ceil(rows.len().div_ceil(most));
            let end = first + rows.len();
            let blocks = (first..end).step_by(n);
            self.blocks
                .extend(blocks.map(|first| first..end.min(first + n)));
            first = end;
        }
        let by_pages = &self.by_pages;
        let n_keys = |rows: &[Row]| rows.iter().map(|row| row.position + 1).sum::<usize>();
        self.blocks
            .sort_unstable_by_key(|block| Reverse(n_keys(&by_pages[block.clone()])));
    }
}

/// Rows of which one attention task carries all query heads of a KV head.
fn rows_a_block(group: usize) -> usize {
    (MAX_QUERIES / group).max(1)
}

/// The same in a pass of `n_rows`: fewer where threads would go without a task. What a page is read
/// more often for it costs less than threads that wait.
pub fn rows_a_task(config: &ModelConfig, n_rows: usize, n_threads: usize) -> usize {
    /// A thread waits for the others' last task: about a fourth of its time at most.
    const TASKS_A_THREAD: usize = 4;
    let most = n_rows * config.n_kv_heads / (TASKS_A_THREAD * n_threads);
    most.clamp(1, rows_a_block(config.group()))
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
    if let Some(routed) = &mut work.routed {
        routed.clear();
    }
    for (i, layer) in model.layers.iter().enumerate() {
        let cached_only = until == Until::Cached && i + 1 == model.layers.len();
        let t = normed(
            exec,
            config,
            &layer.attention_norm,
            &work.x,
            n_rows,
            &mut work.t,
        );
        // Queries of a layer whose output nobody needs are left out.
        let first_head = if cached_only { config.n_heads } else { 0 };
        let first_tile = first_head * config.head_dim / LANES;
        matmul(
            exec,
            &layer.qkv,
            first_tile,
            t,
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
                append_full(exec, config, layer, kv, work, batch);
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
            match attended_in_blocks(exec, config) {
                true => Rows::Blocks(bits_of(&work.attended), n_rows),
                false => Rows::Values(&work.attended),
            },
            n_rows,
            Epilogue::Add,
            &mut work.x,
        );
        let t = normed(exec, config, &layer.mlp_norm, &work.x, n_rows, &mut work.t);
        matmul(
            exec,
            &layer.router,
            0,
            t,
            n_rows,
            Epilogue::Store,
            &mut work.router_logits,
        );
        route(exec.path, &work.router_logits, n_rows, &mut work.routing);
        if let Some(routed) = &mut work.routed {
            let n_entries = n_rows * config.n_experts_per_token;
            routed.push(work.routing.experts[..n_entries].to_vec());
        }
        let (experts, limit) = (&layer.experts, config.swiglu_limit);
        moe_matmul::gate_up(exec, experts, &work.routing, limit, t, &mut work.act);
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

/// The normed rows of `x`, in the form that products take.
fn normed<'a>(
    exec: &Exec,
    config: &ModelConfig,
    scale: &Vector,
    x: &[f32],
    n_rows: usize,
    t: &'a mut [f32],
) -> Rows<'a> {
    let eps = config.rms_norm_eps;
    if exec.in_blocks() {
        rmsnorm_to_blocks(exec, scale, eps, x, n_rows, bits_of_mut(t));
        Rows::Blocks(bits_of(t), n_rows)
    } else {
        rmsnorm(exec, scale, eps, x, n_rows, t);
        Rows::Values(t)
    }
}

/// Logits of residual rows `rows`, into the first rows of `work.logits`.
pub fn lm_head(exec: &Exec, model: &CpuModel, work: &mut Workspace, rows: std::ops::Range<usize>) {
    let config = &model.config;
    let n_rows = rows.len();
    let x = &work.x[rows.start * config.hidden..rows.end * config.hidden];
    let t = normed(exec, config, &model.final_norm, x, n_rows, &mut work.t);
    matmul(
        exec,
        &model.lm_head,
        0,
        t,
        n_rows,
        Epilogue::Store,
        &mut work.logits,
    );
}

/// Key and value of (row, KV head). Those of a later row are on their way: rows are pages apart, so no processor
/// foresees them.
fn key_value<'a>(config: &ModelConfig, qkv: &'a [f32], row: usize, head: usize) -> [&'a [f32]; 2] {
    /// Rows by which that one is ahead.
    const AHEAD: usize = 6;
    let n = config.head_dim;
    let starts = |row: usize| {
        let key = row * config.qkv_width() + config.q_width() + head * n;
        [key, key + config.n_kv_heads * n]
    };
    for start in starts(row + AHEAD) {
        prefetch(qkv, start, n);
    }
    starts(row).map(|start| &qkv[start..][..n])
}

/// The page of a sequence's tile.
fn page_of(table: &[u32], max_pages: usize, sequence: usize, tile: usize) -> usize {
    table[sequence * max_pages + tile * TILE_KEYS / PAGE_POSITIONS] as usize
}

fn append_full<E: KvElement>(
    exec: &Exec,
    config: &ModelConfig,
    layer: &LayerWeights,
    kv: &mut KvCache<E>,
    work: &Workspace,
    batch: &Batch,
) {
    /// Keys and values, of a row and a head each, that are not worth a task.
    const FEW: usize = 8;
    let geometry = kv.geometry;
    let pages = Disjoint::new(&mut kv.pages);
    let n_heads = geometry.n_kv_heads;
    let rows_a_segment = batch.n_rows() / batch.segments.len().max(1);
    let few = FEW.div_ceil(rows_a_segment.max(1));
    for_each(batch.segments.len() * n_heads, few, |task| {
        let (segment, head) = (batch.segments[task / n_heads], task % n_heads);
        for i in 0..segment.n_rows {
            let position = segment.first + i;
            let tile = position / TILE_KEYS;
            let page = page_of(&work.page_table, work.max_pages, segment.sequence, tile);
            let start = geometry.page_tile(page, layer.kind_index, head, tile);
            let [k, v] = key_value(config, &work.qkv, segment.row + i, head);
            // SAFETY: a task has its own head, and pages that are written to belong to one
            // sequence, which is in the pass once.
            #[allow(unsafe_code, reason = "heads and pages are disjoint")]
            let tile = unsafe { pages.slice_mut(start, geometry.tile_len()) };
            kv_append(exec.path, &geometry, tile, position % TILE_KEYS, k, v);
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
    let attended = Attended::new(exec, config, batch.n_rows(), &mut work.attended);
    let (qkv, table, max_pages) = (&work.qkv, &work.page_table, work.max_pages);
    for_each_in_turn(batch.blocks.len() * n_heads, |task| {
        let (block, head) = (&batch.blocks[task / n_heads], task % n_heads);
        let rows = &batch.by_pages[block.clone()];
        let queries = queries(exec, config, layer, qkv, rows, head);
        attended.prefetch(rows, head);
        let tile_of = |sequence: usize, tile: usize| {
            let page = page_of(table, max_pages, sequence, tile);
            let start = geometry.page_tile(page, layer.kind_index, head, tile);
            &kv.pages[start..][..geometry.tile_len()]
        };
        exec.with_scratch(|scratch| {
            attend(
                exec.path,
                &geometry,
                &mut scratch.attention,
                &queries,
                tile_of,
                attended.writer(head),
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
    let attended = Attended::new(exec, config, batch.n_rows(), &mut work.attended);
    let qkv: &Buffer<f32> = &work.qkv;
    let ring_len = geometry.ring_tiles * geometry.tile_len();
    for_each_in_turn(batch.segments.len() * n_heads, |task| {
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
                let [k, v] = key_value(config, qkv, segment.row + i, head);
                let tile = &mut ring[tile_start(position / TILE_KEYS)..][..geometry.tile_len()];
                kv_append(exec.path, &geometry, tile, position % TILE_KEYS, k, v);
            }
            if append_only {
                continue;
            }
            let ring = &*ring;
            for skip in (step..step_end).step_by(a_block) {
                let n_rows = a_block.min(step_end - skip);
                let rows = &batch.rows[segment.row + skip..][..n_rows];
                let queries = Queries {
                    window: Some(geometry.window),
                    ..queries(exec, config, layer, qkv, rows, head)
                };
                attended.prefetch(rows, head);
                let tile_of = |_, tile: usize| &ring[tile_start(tile)..][..geometry.tile_len()];
                exec.with_scratch(|scratch| {
                    attend(
                        exec.path,
                        &geometry,
                        &mut scratch.attention,
                        &queries,
                        tile_of,
                        attended.writer(head),
                    );
                });
            }
        }
    });
}

/// The queries of one KV head's group; on sliding layers the window is the caller's.
fn queries<'a>(
    exec: &Exec,
    config: &ModelConfig,
    layer: &'a LayerWeights,
    qkv: &'a [f32],
    rows: &'a [Row],
    head: usize,
) -> Queries<'a> {
    let group = config.group();
    Queries {
        rows,
        group,
        q: &qkv[head * group * config.head_dim..],
        q_stride: config.qkv_width(),
        window: None,
        sinks: &layer.sinks,
        first_sink: head * group,
        exact: exec.exact,
        by_tiles: exec.in_blocks(),
        to_pairs: attended_in_blocks(exec, config),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX_PAGES: usize = 5;

    /// The sequences of each block, in order, of a row a sequence at `positions`.
    fn divided(
        page_table: &[[u32; MAX_PAGES]],
        positions: &[usize],
        most: usize,
    ) -> Vec<Vec<usize>> {
        let mut batch = Batch::with_capacity(positions.len());
        for (sequence, &position) in positions.iter().enumerate() {
            batch.push(sequence, position, &[0]);
        }
        batch.divide(page_table.as_flattened(), MAX_PAGES, most);
        let sequences = |block: &Range<usize>| {
            let rows = batch.by_pages[block.clone()].iter();
            rows.map(|row| row.sequence).collect()
        };
        let blocks: Vec<Vec<usize>> = batch.blocks.iter().map(sequences).collect();
        let mut all = blocks.concat();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..positions.len()), "each row once");
        let n_keys =
            |block: &Vec<usize>| block.iter().map(|&row| positions[row] + 1).sum::<usize>();
        assert!(blocks.is_sorted_by_key(|block| Reverse(n_keys(block))));
        blocks
    }

    #[test]
    fn rows_of_a_shared_page_are_divided_evenly() {
        for (n_rows, expected) in [
            (1, &[1][..]),
            (2, &[2]),
            (8, &[8]),
            (9, &[5, 4]),
            (17, &[6, 6, 5]),
        ] {
            let table: Vec<_> = (0..n_rows).map(|row| [7, 100 + row, 0, 0, 0]).collect();
            let blocks = divided(&table, &vec![300; n_rows as usize], 8);
            let sizes: Vec<usize> = blocks.iter().map(Vec::len).collect();
            assert_eq!(sizes, expected);
        }
    }

    #[test]
    fn rows_of_their_own_are_blocks_of_their_own_the_longest_first() {
        let table = [[1, 0, 0, 0, 0], [2, 5, 0, 0, 0], [3, 5, 6, 0, 0]];
        let blocks = divided(&table, &[10, 300, 600], 8);
        assert_eq!(blocks, [[2], [1], [0]]);
    }

    #[test]
    fn those_that_share_most_are_neighbours() {
        let x = u32::MAX;
        let table = [
            [1, 2, 9, 4, x],
            [1, 3, 11, x, x],
            [1, 2, 9, 5, x],
            [1, x, x, x, x],
            [1, 3, 12, x, x],
            [8, 2, 9, 6, x],
        ];
        let positions = [900, 600, 901, 200, 700, 800];
        assert_eq!(
            divided(&table, &positions, 8),
            [vec![3, 0, 2, 1, 4], vec![5]]
        );
        // Pages that a row has and does not reach yet do not count.
        assert_eq!(
            divided(&table, &[300, 600, 400, 200, 700, 100], 3),
            [vec![1, 4], vec![3, 0, 2], vec![5]]
        );
    }

    #[test]
    fn no_thread_is_without_tasks_for_the_sake_of_sharing() {
        let config = crate::engine::shapes::named("gpt-oss-20b").expect("a shape");
        for (n_rows, n_threads, expected) in [
            (1, 2, 1),
            (4, 2, 4),
            (8, 2, 8),
            (8, 64, 1),
            (64, 64, 2),
            (512, 64, 8),
        ] {
            assert_eq!(rows_a_task(&config, n_rows, n_threads), expected);
        }
    }

    #[test]
    fn a_prompt_is_cut_into_blocks_in_order() {
        let mut batch = Batch::with_capacity(40);
        batch.push(0, 250, &[0; 40]);
        batch.divide(&[3, 1, 0, 0, 0], MAX_PAGES, 8);
        let firsts: Vec<usize> = batch.blocks.iter().map(|block| block.start).collect();
        assert_eq!(firsts, [32, 24, 16, 8, 0], "the last has the most keys");
        assert!(batch.by_pages.iter().map(|row| row.position).eq(250..290));
    }
}
