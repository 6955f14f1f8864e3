//! The variants of the products: block shapes that all give the same bits, and which one serves
//! how many rows. The numbers are those of `kernels/matmul.cuh` and `kernels/moe_matmul.cuh`.

use super::arguments::Dense;
use super::pack;
use crate::engine::checkpoint::MatrixFormat;

/// Shared memory of an sm_90 multiprocessor, and what is left out of a block's share: static
/// arrays, alignment, the driver's own.
const SHARED_BYTES: usize = 228 << 10;
const RESERVED_BYTES: usize = 5 << 10;
const MOST_STAGES: usize = 9;

/// Bytes of a token's 64 k in shared memory, for warps (padded) and for warpgroups (swizzled).
const PADDED_BYTES: usize = 144;
const SWIZZLED_BYTES: usize = 128;
/// Bytes behind all of a token's k, so that eight tokens lie in different banks.
const ROW_PADDING: usize = 16;
/// Room for the arrays of fixed size.
const STATIC_BYTES: usize = 2 << 10;
/// Sums of a tile and an octet.
const TILE_SUMS_BYTES: usize = 512;
/// Room to align swizzled tokens.
const ALIGNMENT: usize = 1 << 10;

/// Which instruction multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    /// `mma.sync` by `m` x `n` warps, with so many stages.
    Warps { m: usize, n: usize, stages: usize },
    /// `wgmma` by `m` warpgroups whose tokens come as tiles, in so many blocks a multiprocessor,
    /// with so many warps that ask for the stages.
    Streams {
        m: usize,
        blocks: usize,
        fillers: usize,
    },
    /// `mma.sync` by so many warps that take their weights straight from memory, with all of K of
    /// the tokens in shared memory.
    Direct { warps: usize },
}

/// A block shape of a product.
#[derive(Clone, Copy, Debug)]
pub struct Variant {
    /// End of the kernel's name.
    pub name: &'static str,
    unit: Unit,
    /// Tiles of 16 features of a warp, or blocks of 64 of a warpgroup.
    tiles: usize,
    /// Octets of tokens of a warp or warpgroup.
    pub octets: usize,
    /// Warps of a block, or blocks of a cluster along the grid's z, that have a run of k each.
    splits: usize,
}

/// Runs of k whose sums a dense product adds: `ADD_SPLITS` in kernels/matmul.cuh.
pub const fn dense_splits(which: Dense) -> usize {
    match which {
        Dense::Add => 4,
        Dense::Qkv | Dense::Logits => 1,
    }
}

/// Rows up to which blocks of a cluster have runs of k.
const EXCHANGE_ROWS: usize = 256;

/// f32 values that blocks of clusters leave for each other, in products of `n_out` outputs with `n_rows`
/// rows at most.
pub fn exchange_len(n_out: usize, n_rows: usize) -> usize {
    let n_tiles = pack::n_tiles(n_out);
    let room = Room {
        warpgroups: true,
        ..Room::default()
    };
    let variants = dense(Dense::Add, room);
    let clusters = variants.iter().filter(|variant| variant.k_blocks() > 1);
    let lens = clusters.map(|variant| {
        let rows = variant.row_blocks(n_rows.min(EXCHANGE_ROWS)) * variant.columns();
        let tiles = n_tiles.next_multiple_of(variant.block_tiles());
        rows * tiles * pack::TILE_M * variant.splits
    });
    lens.max().unwrap_or(0)
}

/// First of `n_groups` groups of 64 k that belongs to run `split`.
pub const fn first_group(splits: usize, split: usize, n_groups: usize) -> usize {
    n_groups * split / splits
}

impl Variant {
    const fn warps(name: &'static str, shape: [usize; 5]) -> Self {
        let [m, n, tiles, octets, stages] = shape;
        let unit = Unit::Warps { m, n, stages };
        Self {
            name,
            unit,
            tiles,
            octets,
            splits: 1,
        }
    }

    const fn streams(name: &'static str, shape: [usize; 5]) -> Self {
        let [m, tiles, octets, blocks, fillers] = shape;
        let unit = Unit::Streams { m, blocks, fillers };
        Self {
            name,
            unit,
            tiles,
            octets,
            splits: 1,
        }
    }

    const fn direct(name: &'static str, warps: usize, octets: usize) -> Self {
        Self {
            name,
            unit: Unit::Direct { warps },
            tiles: 1,
            octets,
            splits: 1,
        }
    }

    const fn split(self, splits: usize) -> Self {
        Self { splits, ..self }
    }

    pub fn threads(&self) -> usize {
        match self.unit {
            Unit::Direct { warps } => 32 * warps * self.splits,
            Unit::Warps { m, n, .. } => 32 * m * n,
            Unit::Streams { m, fillers, .. } => 128 * m + 32 * fillers,
        }
    }

    /// Tiles of 16 features of a block.
    pub fn block_tiles(&self) -> usize {
        match self.unit {
            Unit::Warps { m, .. } | Unit::Direct { warps: m } => m * self.tiles,
            Unit::Streams { m, .. } => m * self.tiles * pack::BLOCK_TILES,
        }
    }

    /// Tokens of a block.
    pub fn columns(&self) -> usize {
        match self.unit {
            Unit::Warps { n, .. } => n * self.octets * 8,
            _ => self.octets * 8,
        }
    }

    /// Bytes that a block takes in for 64 k.
    fn stage_bytes(&self, tile_bytes: usize) -> usize {
        let token = match self.unit {
            Unit::Warps { .. } => PADDED_BYTES,
            _ => SWIZZLED_BYTES,
        };
        self.block_tiles() * tile_bytes + self.columns() * token
    }

    /// Dynamic shared memory for tokens of `n_groups` groups of 64 k, when a block may have at
    /// most `n_rows` of them.
    pub fn shared_bytes(&self, tile_bytes: usize, n_groups: usize, n_rows: usize) -> usize {
        let stage = self.stage_bytes(tile_bytes);
        match self.unit {
            Unit::Direct { .. } => {
                let sums = (self.splits - 1) * self.block_tiles() * self.octets * TILE_SUMS_BYTES;
                let tokens = self.columns().min(n_rows) * (n_groups * SWIZZLED_BYTES + ROW_PADDING);
                tokens.max(sums)
            }
            Unit::Warps { stages, .. } => stages * stage,
            Unit::Streams { blocks, .. } => {
                self.streamed_stages(tile_bytes, blocks) * stage + ALIGNMENT
            }
        }
    }

    /// Stages of a block whose tokens stream, of so many a multiprocessor.
    fn streamed_stages(&self, tile_bytes: usize, blocks: usize) -> usize {
        let room = SHARED_BYTES / blocks - RESERVED_BYTES;
        (room / self.stage_bytes(tile_bytes)).min(MOST_STAGES)
    }

    /// Whether tokens come as tiles (kernels/gemm_stream.cuh).
    pub fn is_streaming(&self) -> bool {
        matches!(self.unit, Unit::Streams { .. })
    }

    /// Blocks along k.
    pub fn k_blocks(&self) -> usize {
        if self.is_streaming() { self.splits } else { 1 }
    }

    /// Blocks for so many tiles of outputs of a variant that streams: where a block takes several, not
    /// more than run at once.
    pub fn streaming_blocks(&self, room: Room, n_items: usize, takes_many: bool) -> usize {
        match self.unit {
            Unit::Streams { blocks, .. } if takes_many => {
                n_items.min(blocks * room.n_multiprocessors)
            }
            _ => n_items,
        }
    }

    /// Blocks along the rows.
    pub fn row_blocks(&self, n_rows: usize) -> usize {
        n_rows.div_ceil(self.columns())
    }

    /// What the kernel may be given of dynamic shared memory: the variant with all of K in it
    /// takes as much as the product needs.
    pub fn most_shared_bytes(&self, tile_bytes: usize, room: Room) -> usize {
        match self.unit {
            Unit::Direct { .. } => room.shared_bytes - STATIC_BYTES,
            _ => self.shared_bytes(tile_bytes, 0, 0),
        }
    }

    /// Shared memory for `shared` of a launch of so many blocks: small blocks of which each
    /// multiprocessor gets few take so much that none gets more than its share. Otherwise those
    /// that start while the kernel before still runs would crowd where it has left.
    pub fn spread(&self, room: Room, shared: usize, n_blocks: usize) -> usize {
        const MOST_SHARE: usize = 8;
        let share = n_blocks.div_ceil(room.n_multiprocessors);
        if !matches!(self.unit, Unit::Direct { .. }) || self.octets > 1 || share > MOST_SHARE {
            return shared;
        }
        let most = room.shared_bytes - STATIC_BYTES;
        shared.max((room.shared_bytes / share - STATIC_BYTES).min(most))
    }

    /// Whether the GPU's blocks have the shared memory, and those of a cluster the memory for what they
    /// leave each other.
    pub fn fits(&self, room: Room, n_groups: usize, n_rows: usize) -> bool {
        if self.k_blocks() > 1 && n_rows > EXCHANGE_ROWS {
            return false;
        }
        !matches!(self.unit, Unit::Direct { .. })
            || self.shared_bytes(0, n_groups, n_rows) <= room.shared_bytes - STATIC_BYTES
    }

    /// Blocks of a product with `n_rows` rows.
    pub fn n_blocks(&self, n_tiles: usize, n_rows: usize) -> usize {
        n_tiles.div_ceil(self.block_tiles()) * self.row_blocks(n_rows) * self.k_blocks()
    }
}

/// What the GPU has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Room {
    /// Warpgroup instructions are compiled.
    pub warpgroups: bool,
    /// A block has less than 130 KB of shared memory.
    pub small_shared: bool,
    /// Most shared memory of a block.
    pub shared_bytes: usize,
    pub n_multiprocessors: usize,
}

impl Room {
    /// Stages of the variants whose stage is large: `BIG_STAGES` in kernels/gemm.cuh.
    fn big_stages(self) -> usize {
        if self.small_shared { 2 } else { 3 }
    }
}

/// Variants of a dense product.
pub fn dense(which: Dense, room: Room) -> Vec<Variant> {
    let splits = dense_splits(which);
    let warps = if splits > 1 { 2 } else { 6 };
    // The vocabulary has warps enough for blocks of several, in which a narrow one is slower.
    let mut variants = match which {
        Dense::Logits => Vec::new(),
        _ => vec![Variant::direct("d8", 1, 1).split(splits)],
    };
    variants.push(Variant::direct("d16", warps, 2).split(splits));
    if room.warpgroups {
        variants.extend([
            Variant::streams("s32", [1, 1, 4, 2, 1]).split(splits),
            Variant::streams("s64", [1, 1, 8, 2, 1]).split(splits),
            Variant::streams("s128x128", [2, 1, 16, 1, 1]).split(splits),
        ]);
        if which != Dense::Add {
            variants.extend([
                Variant::streams("s16", [1, 1, 2, 3, 1]),
                Variant::streams("s256x128", [2, 2, 16, 1, 4]),
            ]);
        }
        match which {
            Dense::Qkv => variants.extend([Variant::streams("s128x88", [2, 1, 11, 1, 1])]),
            Dense::Add => variants.extend([
                Variant::streams("s192x128", [3, 1, 16, 1, 1]).split(splits),
                Variant::streams("w128x128", [2, 1, 16, 1, 4]),
            ]),
            Dense::Logits => {}
        }
    } else {
        variants.extend([
            Variant::warps("16", [2, 1, 1, 2, 10]),
            Variant::warps("32", [2, 1, 1, 4, 8]),
            Variant::warps("64", [4, 1, 1, 8, 4]),
            Variant::warps("128", [4, 2, 2, 8, room.big_stages()]),
        ]);
    }
    variants
}

/// Variants of the experts' products.
pub fn moe(format: MatrixFormat, room: Room) -> Vec<Variant> {
    let narrow = format != MatrixFormat::Bf16;
    let direct = Variant::direct("d8", 4, 1);
    if room.warpgroups {
        let many = if narrow { 3 } else { 2 };
        // Of the narrowest format a stage of twice the features has room, in two blocks' registers.
        let (tiles, blocks) = match format {
            MatrixFormat::Mxfp4 => (2, 2),
            _ => (1, many),
        };
        return vec![
            direct,
            Variant::streams("s16", [2, tiles, 2, blocks, 1]),
            Variant::streams("s48", [1, 2, 6, many, 1]),
            Variant::streams("s128", [2, 2, 16, 1, 4]),
        ];
    }
    let (small, big) = if narrow {
        (8, 3)
    } else {
        (4, room.big_stages())
    };
    vec![
        direct,
        Variant::warps("16", [4, 1, 1, 2, small]),
        Variant::warps("32", [4, 1, 3, 4, 3]),
        Variant::warps("48", [4, 1, 3, 6, big]),
        Variant::warps("64", [4, 1, 3, 8, big]),
        Variant::warps("128", [4, 2, 2, 8, big]),
    ]
}

/// Tokens of an expert for which the variant of a pass is chosen: half as many again as the mean, so
/// that most experts need one tile of tokens.
pub fn expected_tokens(n_rows: usize, k: usize, n_experts: usize) -> usize {
    (n_rows * k * 3).div_ceil(n_experts * 2).min(n_rows)
}

/// Index of the variant for experts that have about `tokens` tokens.
pub fn choose_moe(variants: &[Variant], room: Room, n_groups: usize, tokens: usize) -> usize {
    let found = variants
        .iter()
        .position(|variant| variant.columns() >= tokens && variant.fits(room, n_groups, tokens));
    found.unwrap_or(variants.len() - 1)
}

impl Variant {
    /// About how long a dense product takes, in ns: the longest of what its blocks take one behind
    /// the other, what L2 gives all of them, what memory gives, what the matrix units do.
    fn dense_ns(
        &self,
        room: Room,
        tile: usize,
        (n_tiles, n_groups, n_rows): (usize, usize, usize),
    ) -> f64 {
        // Measured on an H100 (kernels/NOTES.md). A stage of a block: so many ns, and bytes a ns;
        // ns from asking for a stage to its being there, which those under way share; bytes a ns of
        // L2 and memory; FLOP a ns of a multiprocessor. Elsewhere they are other numbers in about
        // the same ratios.
        const LATENCY: f64 = 1600.0;
        const INTAKE: f64 = 100.0;
        const MEMORY: f64 = 3000.0;
        // ns for a cluster's blocks to leave each other their sums.
        const EXCHANGE: f64 = 2000.0;
        let flops = if self.is_streaming() { 4500.0 } else { 2600.0 };
        if !self.fits(room, n_groups, n_rows) {
            return f64::INFINITY;
        }
        // The narrowest takes the few rows of one of its blocks: it has nothing to share.
        if self.octets == 1 && n_rows > self.columns() {
            return f64::INFINITY;
        }
        let (stage_ns, l2) = match self.unit {
            Unit::Direct { .. } if self.octets > 1 => (160.0, 6000.0),
            Unit::Direct { .. } => (120.0, 6000.0),
            Unit::Streams { blocks, .. } => {
                (LATENCY / self.streamed_stages(tile, blocks) as f64, 7500.0)
            }
            _ => (320.0, 7500.0),
        };
        let stage = self.stage_bytes(tile) as f64;
        let all_groups = n_groups as f64;
        let n_blocks = self.n_blocks(n_tiles, n_rows);
        let shared = self.shared_bytes(tile, n_groups, n_rows);
        let resident = (SHARED_BYTES / shared).clamp(1, 16);
        let waves = n_blocks.div_ceil(room.n_multiprocessors * resident) as f64;
        let rounds = n_blocks.div_ceil(room.n_multiprocessors) as f64;
        let block_flops =
            (2 * self.block_tiles() * pack::TILE_M * self.columns() * n_groups * pack::GROUP_K)
                as f64
                / self.k_blocks() as f64;
        let n_groups = n_groups.div_ceil(self.splits) as f64;
        let times = [
            waves * n_groups * (stage_ns + stage / INTAKE),
            rounds * block_flops / flops,
            n_blocks as f64 * n_groups * stage / l2,
            n_tiles as f64 * all_groups * tile as f64 / MEMORY,
        ];
        let exchange = if self.k_blocks() > 1 { EXCHANGE } else { 0.0 };
        exchange * waves + times.into_iter().fold(0.0, f64::max)
    }
}

/// Index of the variant for a dense product on tiles of so many bytes.
pub fn choose_dense(
    variants: &[Variant],
    room: Room,
    tile_bytes: usize,
    shape: (usize, usize, usize),
) -> usize {
    let time = |variant: &Variant| variant.dense_ns(room, tile_bytes, shape);
    let best = variants
        .iter()
        .enumerate()
        .min_by(|a, b| time(a.1).total_cmp(&time(b.1)));
    best.map_or(0, |(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_leave_each_other_all_sums_of_so_many_rows() {
        // Features up to the next 128.
        assert_eq!(exchange_len(2880, 256), 4 * 2944 * 256);
        assert_eq!(
            exchange_len(2880, 16_384),
            exchange_len(2880, EXCHANGE_ROWS)
        );
        // Of the largest tile.
        assert_eq!(exchange_len(64, 1), 4 * 192 * 128);
    }

    /// The fastest in a step, or those at most a tenth slower by themselves, as measured
    /// (kernels/NOTES.md).
    #[test]
    fn dense_products_take_what_was_measured_fast() {
        let room = Room {
            warpgroups: true,
            small_shared: false,
            shared_bytes: 227 << 10,
            n_multiprocessors: 132,
        };
        let (qkv, add, logits) = (
            (Dense::Qkv, 5120, 2880),
            (Dense::Add, 2880, 4096),
            (Dense::Logits, 201_088, 2880),
        );
        for ((which, n_out, n_k), n_rows, fast) in [
            (qkv, 1, vec!["d8"]),
            (add, 1, vec!["d8"]),
            (qkv, 64, vec!["s32"]),
            (add, 64, vec!["s64"]),
            (logits, 1, vec!["d16", "s16"]),
            (logits, 8, vec!["d16", "s16"]),
            (logits, 64, vec!["s32", "s64", "s128x128", "s256x128"]),
            (qkv, 256, vec!["s128x88"]),
            (add, 16, vec!["d16", "s32"]),
            (add, 128, vec!["s128x128"]),
            (add, 256, vec!["s192x128"]),
            (add, 512, vec!["w128x128"]),
            (qkv, 512, vec!["s256x128"]),
            (logits, 256, vec!["s128x128", "s256x128"]),
            (qkv, 8192, vec!["s256x128"]),
            (add, 8192, vec!["w128x128"]),
        ] {
            let shape = (pack::n_tiles(n_out), pack::n_groups(n_k), n_rows);
            let tile = pack::tile_bytes(MatrixFormat::Bf16);
            let variants = dense(which, room);
            let chosen = variants[choose_dense(&variants, room, tile, shape)].name;
            assert!(fast.contains(&chosen), "{which:?}, {n_rows} rows: {chosen}");
        }
    }
}
