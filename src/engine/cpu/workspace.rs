//! Activations and tables of all passes, allocated once from the engine's shape.

use super::amx::SLACK;
use super::buffer::Buffer;
use super::gemm::{Exec, Scratch};
use super::rope::RopeTable;
use super::topk_routing::Routing;
use crate::engine::config::ModelConfig;
use crate::engine::{EngineError, EngineShape, PAGE_POSITIONS};

/// No page is mapped.
pub const NO_PAGE: u32 = u32::MAX;

/// See the module; letters: R = the most rows of a pass, k = experts per token.
pub struct Workspace {
    /// Residual `[R, hidden]`.
    pub x: Buffer<f32>,
    /// Normed residual `[R, hidden]`, or in blocks.
    pub t: Buffer<f32>,
    /// `[R, (n_heads + 2 n_kv_heads) * head_dim]`.
    pub qkv: Buffer<f32>,
    /// `[R, n_heads * head_dim]`, or in blocks.
    pub attended: Buffer<f32>,
    /// `[R, n_experts]`.
    pub router_logits: Buffer<f32>,
    pub routing: Routing,
    /// Experts of each layer's entries in the latest pass, where they are kept: for statistics.
    pub routed: Option<Vec<Vec<u32>>>,
    /// `[R * k, intermediate]`, or in blocks.
    pub act: Buffer<f32>,
    /// `[R * k, hidden]`.
    pub y: Buffer<f32>,
    /// `[n_slots, n_vocab]`.
    pub logits: Buffer<f32>,
    pub rope: RopeTable,
    /// Pages of each sequence `[n_slots + n_forks, max_pages]`.
    pub page_table: Buffer<u32>,
    pub max_pages: usize,
}

/// Elements of each activation, in the order of [`Workspace`]'s fields.
struct Lengths {
    x: usize,
    t: usize,
    qkv: usize,
    attended: usize,
    router_logits: usize,
    act: usize,
    y: usize,
    logits: usize,
    page_table: usize,
    max_rows: usize,
    max_pages: usize,
}

impl Lengths {
    fn new(config: &ModelConfig, shape: &EngineShape) -> Self {
        let rows = max_rows(shape);
        let entries = rows.saturating_mul(config.n_experts_per_token);
        let max_pages = shape.max_context.div_ceil(PAGE_POSITIONS);
        Self {
            x: rows.saturating_mul(config.hidden),
            t: rows.saturating_mul(config.hidden).saturating_add(SLACK),
            qkv: rows.saturating_mul(config.qkv_width()),
            attended: rows.saturating_mul(config.q_width()).saturating_add(SLACK),
            router_logits: rows.saturating_mul(config.n_experts),
            act: entries
                .saturating_mul(config.intermediate)
                .saturating_add(SLACK),
            y: entries.saturating_mul(config.hidden),
            logits: shape.n_slots.saturating_mul(config.n_vocab),
            page_table: (shape.n_slots + shape.n_forks).saturating_mul(max_pages),
            max_rows: rows,
            max_pages,
        }
    }
}

/// The most rows of a pass.
pub fn max_rows(shape: &EngineShape) -> usize {
    shape.prefill_rows.max(shape.n_slots)
}

impl Workspace {
    /// # Errors
    /// Out of memory.
    pub fn new(config: &ModelConfig, shape: &EngineShape) -> Result<Self, EngineError> {
        let n = Lengths::new(config, shape);
        let activations = |len| Buffer::zeroed("activations", len);
        let mut page_table = Buffer::zeroed("page table", n.page_table)?;
        page_table.fill(NO_PAGE);
        Ok(Self {
            x: activations(n.x)?,
            t: activations(n.t)?,
            qkv: activations(n.qkv)?,
            attended: activations(n.attended)?,
            router_logits: activations(n.router_logits)?,
            routing: Routing::new(config.n_experts, config.n_experts_per_token, n.max_rows)?,
            routed: None,
            act: activations(n.act)?,
            y: activations(n.y)?,
            logits: Buffer::zeroed("logits", n.logits)?,
            rope: RopeTable::new(config, shape.max_context)?,
            page_table,
            max_pages: n.max_pages,
        })
    }

    fn activations(&mut self) -> [&mut Buffer<f32>; 8] {
        [
            &mut self.x,
            &mut self.t,
            &mut self.qkv,
            &mut self.attended,
            &mut self.router_logits,
            &mut self.act,
            &mut self.y,
            &mut self.logits,
        ]
    }

    /// Fills all activations with NaN: nothing in them outlives a pass.
    pub fn poison(&mut self) {
        self.activations().into_iter().for_each(Buffer::poison);
    }

    pub fn n_bytes(&mut self) -> u64 {
        let activations: u64 = self
            .activations()
            .iter()
            .map(|buffer| buffer.n_bytes())
            .sum();
        activations + self.routing.n_bytes() + self.rope.n_bytes() + self.page_table.n_bytes()
    }

    /// Values of the largest product's rows; those of experts may be joined one by one.
    pub fn most_inputs(config: &ModelConfig, shape: &EngineShape) -> usize {
        let n = Lengths::new(config, shape);
        n.x.max(n.attended).max(n.act).max(n.y)
    }

    /// Bytes of a workspace and of what `n_threads` threads work in, as planned.
    pub fn planned_bytes(config: &ModelConfig, shape: &EngineShape, n_threads: usize) -> u64 {
        let n = Lengths::new(config, shape);
        let activations = [
            n.x,
            n.t,
            n.qkv,
            n.attended,
            n.router_logits,
            n.act,
            n.y,
            n.logits,
            n.page_table,
        ];
        let activations = activations.iter().fold(0u64, |sum, &len| {
            sum.saturating_add((len as u64).saturating_mul(4))
        });
        let (n_experts, k) = (config.n_experts, config.n_experts_per_token);
        activations
            .saturating_add(Routing::planned_bytes(n_experts, k, n.max_rows))
            .saturating_add(RopeTable::planned_bytes(config, shape.max_context))
            .saturating_add(n_threads.max(1) as u64 * Scratch::planned_bytes(config.head_dim))
            .saturating_add(Exec::planned_input_bytes(Self::most_inputs(config, shape)))
    }
}
