//! What kernels are told: records of the layout of those in `kernels/`.

use super::tensor_map::TensorMap;

/// As `MatmulArgs` in kernels/matmul_outputs.cuh.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct MatmulArgs {
    /// Set by the launch of a variant that streams its tokens.
    pub x_map: TensorMap,
    pub weights: u64,
    pub bias: u64,
    pub x: u64,
    pub out: u64,
    pub qkv: u64,
    pub rows: u64,
    pub rope: u64,
    pub cache: u64,
    pub page_table: u64,
    pub maxima: u64,
    pub exchange: u64,
    pub n_rows: u32,
    pub n_out: u32,
    pub n_k: u32,
    pub n_tiles: u32,
    pub first_tile: u32,
    pub n_heads: u32,
    pub n_kv_heads: u32,
    pub layer: u32,
    pub n_layers: u32,
    pub max_pages: u32,
    pub ring: u32,
    pub rows_first: u32,
}

/// As `MoeArgs` in kernels/moe_matmul.cuh.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct MoeArgs {
    pub weights: u64,
    pub bias: u64,
    pub x: u64,
    pub act: u64,
    pub y: u64,
    pub offsets: u64,
    pub entries: u64,
    pub listed: u64,
    pub n_experts: u32,
    pub k: u32,
    pub n_k: u32,
    pub n_tiles: u32,
    pub n_out: u32,
    pub n_octets: u32,
    pub limit: f32,
}

/// As `GatherArgs` in kernels/topk_routing.cu.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct GatherArgs {
    pub experts: u64,
    pub offsets: u64,
    pub entries: u64,
    pub t: u64,
    pub places: u64,
    pub tiles: u64,
    pub listed: u64,
    pub n_entries: u32,
    pub n_experts: u32,
    pub k: u32,
    pub n_k: u32,
    pub n_octets: u32,
    pub tile_octets: u32,
    pub n_listed: u32,
}

/// What the experts' products take and leave beside weights, by address; lengths in
/// [`super::memory::Lengths`].
#[derive(Clone, Copy, Default)]
pub struct ExpertBuffers {
    /// Normed rows.
    pub t: u64,
    pub act: u64,
    pub y: u64,
    /// Of each entry, as `route` tells them.
    pub experts: u64,
    /// Entries in order of their experts.
    pub offsets: u64,
    pub entries: u64,
    /// For the variants that stream: entries in places, token tiles, and `t` and `act` as tiles.
    pub places: u64,
    pub listed: u64,
    pub t_tiles: u64,
    pub act_tiles: u64,
}

/// As `RouteArgs` in kernels/topk_routing.cu.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct RouteArgs {
    pub x: u64,
    pub norm: u64,
    pub t: u64,
    pub weights: u64,
    pub bias: u64,
    pub rows: u64,
    pub experts: u64,
    pub gates: u64,
    pub n_experts: u32,
    pub k: u32,
    pub n_rows: u32,
    pub eps: f32,
    /// Set by the launch: rows of a tile, and pieces of weights in shared memory.
    pub tile_rows: u32,
    pub n_slots: u32,
}

/// As `AttentionArgs` in kernels/attention.cuh.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct AttentionArgs {
    /// Of the pages, where rows share some.
    pub cache_map: TensorMap,
    pub qkv: u64,
    pub out: u64,
    pub rows: u64,
    pub blocks: u64,
    pub sinks: u64,
    pub cache: u64,
    pub page_table: u64,
    pub partial: u64,
    pub items: u64,
    pub n_items: u64,
    pub shared: u64,
    pub n_heads: u32,
    pub n_kv_heads: u32,
    pub layer: u32,
    pub n_layers: u32,
    pub max_pages: u32,
    pub ring: u32,
    pub window: u32,
    pub max_splits: u32,
    pub scale: f32,
}

/// As `SampleArgs` in kernels/sample.cu.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct SampleArgs {
    pub logits: u64,
    pub maxima: u64,
    pub slots: u64,
    pub rows: u64,
    pub events: u64,
    pub step: u64,
    pub partials: u64,
    /// Set by the launch.
    pub n_parts: u32,
    pub n_vocab: u32,
    pub max_context: u32,
    pub trace_hash: u32,
}

/// Which dense product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dense {
    Qkv,
    Add,
    Logits,
}
