//! Keys and values of all sequences: pages for full-attention layers, rings for sliding ones.
//!
//! Both are made of *tiles* of 64 positions of one KV head: K transposed, so that keys are the
//! lanes of a score's chain, then V, so that value dims are the lanes of an output's chain.
//!
//! ```text
//! tile   { K [head_dim][64 keys] | V [64 keys][padded head_dim] }
//! pages  [page][full layer][kv head][4 tiles]
//! rings  [sequence][sliding layer][kv head][ring tiles], position mod ring
//! ```

use super::buffer::{Buffer, Plain};
use super::gemm::padded_head_dim;
use crate::engine::config::{LayerKind, ModelConfig};
use crate::engine::{EngineError, EngineShape, PAGE_POSITIONS, TILE_KEYS};
use crate::quant::bf16;

/// Tiles of a page, which is also an attention split.
pub const PAGE_TILES: usize = PAGE_POSITIONS / TILE_KEYS;

/// What the cache holds: bf16, or f32 when exact.
pub trait KvElement: Plain {
    fn from_f32(x: f32) -> Self;

    /// `source` as f32, unpacked into `scratch` where it is not f32 already.
    fn as_f32<'a>(source: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32];

    /// `source`, where it is bf16.
    fn as_bf16(source: &[Self]) -> Option<&[u16]>;
}

impl KvElement for f32 {
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn as_f32<'a>(source: &'a [Self], _scratch: &'a mut [f32]) -> &'a [f32] {
        source
    }

    #[inline(always)]
    fn as_bf16(_source: &[Self]) -> Option<&[u16]> {
        None
    }
}

impl KvElement for u16 {
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }

    #[inline(always)]
    fn as_f32<'a>(source: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        let scratch = &mut scratch[..source.len()];
        for (out, &bits) in scratch.iter_mut().zip(source) {
            *out = bf16::to_f32(bits);
        }
        scratch
    }

    #[inline(always)]
    fn as_bf16(source: &[Self]) -> Option<&[u16]> {
        Some(source)
    }
}

/// Sizes of the cache, in elements.
#[derive(Clone, Copy, Debug)]
pub struct KvGeometry {
    pub n_kv_heads: usize,
    pub head_dim: usize,
    pub padded_head_dim: usize,
    pub n_full_layers: usize,
    pub n_sliding_layers: usize,
    pub window: usize,
    pub ring_tiles: usize,
    pub n_pages: usize,
    pub n_sequences: usize,
}

impl KvGeometry {
    pub fn new(config: &ModelConfig, shape: &EngineShape) -> Self {
        Self {
            n_kv_heads: config.n_kv_heads,
            head_dim: config.head_dim,
            padded_head_dim: padded_head_dim(config.head_dim),
            n_full_layers: config.n_layers_of(LayerKind::Full),
            n_sliding_layers: config.n_layers_of(LayerKind::Sliding),
            window: config.sliding_window,
            // W keys that begin anywhere in a tile, while up to 64 new ones are written.
            ring_tiles: (config.sliding_window + TILE_KEYS - 1).div_ceil(TILE_KEYS),
            n_pages: shape.n_pages,
            n_sequences: shape.n_slots + shape.n_forks,
        }
    }

    pub fn tile_len(&self) -> usize {
        TILE_KEYS * (self.head_dim + self.padded_head_dim)
    }

    pub fn page_len(&self) -> usize {
        self.n_full_layers * self.n_kv_heads * PAGE_TILES * self.tile_len()
    }

    /// One sequence's rings of all sliding layers.
    pub fn ring_len(&self) -> usize {
        self.n_sliding_layers * self.n_kv_heads * self.ring_tiles * self.tile_len()
    }

    /// Where a tile of a page begins.
    pub fn page_tile(&self, page: usize, layer: usize, head: usize, tile: usize) -> usize {
        let of_head = (layer * self.n_kv_heads + head) * PAGE_TILES + tile % PAGE_TILES;
        page * self.page_len() + of_head * self.tile_len()
    }

    /// Where the ring of (sequence, sliding layer, KV head) begins.
    pub fn ring(&self, sequence: usize, layer: usize, head: usize) -> usize {
        let of_head = (layer * self.n_kv_heads + head) * self.ring_tiles;
        sequence * self.ring_len() + of_head * self.tile_len()
    }

    /// Elements of all pages and rings; saturates, so that an absurd shape is out of memory.
    pub fn total_len(&self) -> usize {
        let pages = self.n_pages.saturating_mul(self.page_len());
        pages.saturating_add(self.n_sequences.saturating_mul(self.ring_len()))
    }
}

/// The arena.
pub struct KvCache<E> {
    pub geometry: KvGeometry,
    pub pages: Buffer<E>,
    pub rings: Buffer<E>,
}

impl<E: KvElement> KvCache<E> {
    /// # Errors
    /// Out of memory.
    pub fn new(geometry: KvGeometry) -> Result<Self, EngineError> {
        let pages = geometry.n_pages.saturating_mul(geometry.page_len());
        let rings = geometry.n_sequences.saturating_mul(geometry.ring_len());
        Ok(Self {
            geometry,
            pages: Buffer::zeroed("KV pages", pages)?,
            rings: Buffer::zeroed("KV rings", rings)?,
        })
    }

    pub fn n_bytes(&self) -> u64 {
        self.pages.n_bytes() + self.rings.n_bytes()
    }

    /// Copies a sequence's rings to another.
    pub fn copy_ring(&mut self, from: usize, to: usize) {
        let n = self.geometry.ring_len();
        self.rings.copy_within(from * n..(from + 1) * n, to * n);
    }

    pub fn copy_page(&mut self, from: usize, to: usize) {
        let n = self.geometry.page_len();
        self.pages.copy_within(from * n..(from + 1) * n, to * n);
    }

    /// Fills a sequence's rings with NaN.
    pub fn poison_ring(&mut self, sequence: usize) {
        let n = self.geometry.ring_len();
        self.rings[sequence * n..][..n].fill(E::POISON);
    }

    pub fn poison_page(&mut self, page: usize) {
        let n = self.geometry.page_len();
        self.pages[page * n..][..n].fill(E::POISON);
    }

    pub fn poison_all(&mut self) {
        self.pages.poison();
        self.rings.poison();
    }
}
