//! The forward pass on the device: the same operations in the same order as `cpu/forward.rs`.
//!
//! Nothing here waits or copies; a decode step is captured as a graph by running this once.

use super::launch::{AttentionArgs, Dense, ExpertBuffers, Kernels, MatmulArgs, MoeArgs, RouteArgs};
use super::memory::KvGeometry;
use super::model::{CudaModel, Experts, LayerWeights, Projection};
use super::pack;
use super::tensor_map::TensorMap;
use super::workspace::Workspace;
use crate::engine::EngineError;
use crate::engine::config::LayerKind;

/// How far a pass goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Until {
    /// The last layer's keys and values are written; its outputs are not needed.
    Cached,
    /// `t` is the residual after the last layer, normed for the lm head.
    Normed,
}

/// Which rows a pass has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rows {
    /// Rows of sequences' consecutive positions, in this many attention blocks; tokens, rows and
    /// blocks are uploaded.
    Prefill { n_rows: usize, n_blocks: usize },
    /// One row a slot, taken from the slots on the device; some share pages or none does.
    Step { n_rows: usize, shares: bool },
}

impl Rows {
    pub fn n_rows(self) -> usize {
        match self {
            Self::Prefill { n_rows, .. } | Self::Step { n_rows, .. } => n_rows,
        }
    }
}

/// What a pass works on.
pub struct Pass<'a> {
    pub kernels: &'a Kernels,
    pub model: &'a CudaModel,
    pub work: &'a Workspace,
    pub geometry: KvGeometry,
}

impl Pass<'_> {
    /// Enqueues the pass.
    ///
    /// # Errors
    /// The driver refuses a launch.
    pub fn forward(&self, rows: Rows, until: Until) -> Result<(), EngineError> {
        let (kernels, model, work) = (self.kernels, self.model, self.work);
        let config = &model.config;
        let n_rows = rows.n_rows();
        let hidden = config.hidden as u32;
        let embedding = model.embedding.at(0);
        match rows {
            Rows::Prefill { .. } => {
                kernels.embed(embedding, work.tokens.at(0), work.x.at(0), hidden, n_rows)?;
            }
            Rows::Step { .. } => kernels.embed_step(
                embedding,
                work.slots.at(0),
                work.slot_of.at(0),
                work.rows.at(0),
                work.step.at(0),
                work.x.at(0),
                hidden,
                n_rows,
            )?,
        }
        for (i, layer) in model.layers.iter().enumerate() {
            let norm = layer.attention_norm.at(0);
            if i == 0 {
                let (x, t) = (work.x.at(0), work.t.at(0));
                kernels.rmsnorm(x, norm, t, config.rms_norm_eps, n_rows)?;
            } else {
                self.combine(norm, n_rows)?;
            }
            let last = until == Until::Cached && i + 1 == model.layers.len();
            self.attention(layer, rows, last)?;
            if last {
                return Ok(());
            }
            self.mlp(layer, n_rows)?;
        }
        self.combine(model.final_norm.at(0), n_rows)
    }

    /// Adds the experts' outputs to the residual and norms it.
    fn combine(&self, norm: u64, n_rows: usize) -> Result<(), EngineError> {
        let (config, work) = (&self.model.config, self.work);
        Ok(self.kernels.moe_combine(
            work.x.at(0),
            work.y.at(0),
            work.gates.at(0),
            norm,
            work.t.at(0),
            config.rms_norm_eps,
            n_rows,
        )?)
    }

    fn attention(
        &self,
        layer: &LayerWeights,
        rows: Rows,
        cached_only: bool,
    ) -> Result<(), EngineError> {
        let (kernels, work, geometry) = (self.kernels, self.work, self.geometry);
        let config = &self.model.config;
        let n_rows = rows.n_rows();
        let sliding = layer.kind == LayerKind::Sliding;
        let is_step = matches!(rows, Rows::Step { .. });
        let (cache, n_layers, max_pages) = if sliding {
            (work.rings.at(0), geometry.n_sliding_layers, 0)
        } else {
            (
                work.pages.at(0),
                geometry.n_full_layers,
                work.lengths.max_pages,
            )
        };
        // Queries of a layer whose output nobody needs are left out, by whole blocks.
        let first_tile = if cached_only {
            config.q_width() / pack::TILE_M / pack::BLOCK_TILES * pack::BLOCK_TILES
        } else {
            0
        };
        let mut qkv = MatmulArgs {
            qkv: work.qkv.at(0),
            rows: work.rows.at(0),
            rope: work.rope.at(0),
            cache,
            page_table: work.page_table.at(0),
            first_tile: first_tile as u32,
            n_heads: config.n_heads as u32,
            n_kv_heads: config.n_kv_heads as u32,
            layer: layer.kind_index as u32,
            n_layers: n_layers as u32,
            max_pages: max_pages as u32,
            ring: geometry.ring as u32,
            ..dense(&layer.qkv, work.t.at(0), n_rows)
        };
        // A ring's old positions may still be read in a pass of more than one row.
        let append_later = sliding && !is_step;
        if append_later {
            qkv.cache = 0;
        }
        kernels.matmul(Dense::Qkv, &qkv)?;
        if !cached_only {
            let mut args = AttentionArgs {
                cache_map: TensorMap::default(),
                qkv: work.qkv.at(0),
                out: work.attended.at(0),
                rows: work.rows.at(0),
                blocks: 0,
                sinks: layer.sinks.at(0),
                cache,
                page_table: work.page_table.at(0),
                partial: work.partial.at(0),
                items: 0,
                n_items: 0,
                shared: 0,
                n_heads: config.n_heads as u32,
                n_kv_heads: config.n_kv_heads as u32,
                layer: layer.kind_index as u32,
                n_layers: n_layers as u32,
                max_pages: max_pages as u32,
                ring: geometry.ring as u32,
                window: config.sliding_window as u32,
                max_splits: work.lengths.max_splits as u32,
                scale: 1.0 / (config.head_dim as f32).sqrt(),
            };
            match rows {
                Rows::Step { n_rows, shares } => {
                    if shares {
                        args.cache_map = kernels.cache_map(&work.pages)?;
                        args.items = work.items.at(0);
                        args.n_items = work.n_items.at(0);
                        args.shared = work.shared.at(0);
                    }
                    kernels.attention_decode(sliding, &args, n_rows)?;
                }
                Rows::Prefill { n_blocks, .. } => {
                    args.blocks = work.blocks.at(0);
                    kernels.attention(sliding, &args, n_blocks)?;
                }
            }
        }
        if append_later {
            qkv.cache = cache;
            kernels.ring_append(&qkv)?;
        }
        if cached_only {
            return Ok(());
        }
        let out = MatmulArgs {
            out: work.x.at(0),
            exchange: work.exchange.at(0),
            ..dense(&layer.out, work.attended.at(0), n_rows)
        };
        Ok(kernels.matmul(Dense::Add, &out)?)
    }

    fn mlp(&self, layer: &LayerWeights, n_rows: usize) -> Result<(), EngineError> {
        let (kernels, work) = (self.kernels, self.work);
        let config = &self.model.config;
        let k = config.n_experts_per_token;
        let route = RouteArgs {
            x: work.x.at(0),
            norm: layer.mlp_norm.at(0),
            t: work.t.at(0),
            weights: layer.router.at(0),
            bias: layer.router_bias.at(0),
            rows: work.rows.at(0),
            experts: work.experts.at(0),
            gates: work.gates.at(0),
            n_experts: config.n_experts as u32,
            k: k as u32,
            n_rows: n_rows as u32,
            eps: config.rms_norm_eps,
            ..RouteArgs::default()
        };
        kernels.route(&route)?;
        let buffers = ExpertBuffers {
            t: work.t.at(0),
            act: work.act.at(0),
            y: work.y.at(0),
            experts: work.experts.at(0),
            offsets: work.offsets.at(0),
            entries: work.entries.at(0),
            places: work.places.at(0),
            listed: work.listed.at(0),
            // `down` leaves y when gate_up has read its tokens; act is one or the other.
            t_tiles: work.y.at(0),
            act_tiles: work.act.at(0),
        };
        let gate_up = MoeArgs {
            n_out: config.intermediate as u32,
            limit: config.swiglu_limit,
            ..self.expert_args(&layer.gate_up)
        };
        let down = self.expert_args(&layer.down);
        Ok(kernels.experts(&buffers, &gate_up, &down, n_rows)?)
    }

    fn expert_args(&self, experts: &Experts) -> MoeArgs {
        MoeArgs {
            weights: experts.tiles.at(0),
            bias: experts.bias.at(0),
            k: self.model.config.n_experts_per_token as u32,
            n_k: experts.n_k as u32,
            n_tiles: pack::n_tiles(experts.n_out) as u32,
            n_out: experts.n_out as u32,
            ..MoeArgs::default()
        }
    }

    /// Logits of rows `first..first + n_rows` of `t`, into the first rows of `logits`; they raise the
    /// keys of the rows' greatest at `maxima`, if that is not 0.
    ///
    /// # Errors
    /// The driver refuses the launch.
    pub fn lm_head(&self, first: usize, n_rows: usize, maxima: u64) -> Result<(), EngineError> {
        let t = self.work.t.at(first * self.model.config.hidden);
        let args = MatmulArgs {
            out: self.work.logits.at(0),
            maxima,
            ..dense(&self.model.lm_head, t, n_rows)
        };
        Ok(self.kernels.matmul(Dense::Logits, &args)?)
    }
}

fn dense(projection: &Projection, x: u64, n_rows: usize) -> MatmulArgs {
    MatmulArgs {
        weights: projection.tiles.at(0),
        bias: projection.bias.as_ref().map_or(0, |bias| bias.at(0)),
        x,
        n_rows: n_rows as u32,
        n_out: projection.n_out as u32,
        n_k: projection.n_k as u32,
        n_tiles: pack::n_tiles(projection.n_out) as u32,
        ..MatmulArgs::default()
    }
}
