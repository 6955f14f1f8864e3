// out = x W^T (+ bias) for the dense projections, with what follows them fused, for weights of any
// format (matmul_bf16.cu, matmul_mxint8.cu, matmul_mxfp4.cu).
//
//   x        bf16 [n_rows, n_k]
//   weights  tiles (gemm.cuh), n_tiles of them
//   qkv      rotates q and k, rounds q, k, v to bf16, writes them to `qkv` [n_rows, qkv_width]
//            and k, v to the cache
//   add      x_out[n_rows, n_out] f32 += product + bias
//   logits   out[n_rows, n_out] f32 = product
//
// Grid (tiles / (WM MT), rows / (WN NT 8)), or in one dimension where blocks come in pairs
// (gemm_cluster.cuh); block 32 WM WN; dynamic shared memory STAGES * STAGE_BYTES. Expected error: f32 sums of bf16 products, about 1e-6 relative.

struct MatmulArgs {
    const u8* weights;
    const vector_t* bias;
    const u16* x;
    float* out;
    u16* qkv;
    const Row* rows;
    // cos | sin of the pairs, f32 [max_context, HEAD_DIM].
    const float* rope;
    // Where the layer's keys and values go: pages or rings, NULL for nowhere.
    u16* cache;
    const u32* page_table;
    u32 n_rows;
    u32 n_out;
    u32 n_k;
    u32 n_tiles;
    u32 first_tile;
    u32 n_heads;
    u32 n_kv_heads;
    // Index of the layer among those of its kind, and how many there are.
    u32 layer;
    u32 n_layers;
    // Pages of a sequence's table; 0 when the cache is rings of `ring` positions.
    u32 max_pages;
    u32 ring;
    // Grid (row blocks, tile blocks) in place of (tile blocks, row blocks).
    u32 rows_first;
    // Whether the weights are brought to L2 at once.
    u32 prefetch;
};

// Where position `position` of a sequence's keys (then values) of a head lies.
__device__ __forceinline__ u16* cache_row(
    u16* cache, const u32* page_table, u32 max_pages, u32 ring, u32 layer, u32 n_layers,
    u32 n_kv_heads, u32 sequence, u32 head, u32 is_value, u32 position
) {
    u64 holder = max_pages != 0 ? page_table[(u64)sequence * max_pages + position / 256] : sequence;
    u32 n_positions = max_pages != 0 ? 256 : ring;
    u64 of_head = (holder * n_layers + layer) * n_kv_heads + head;
    return cache + ((of_head * 2 + is_value) * n_positions + position % n_positions) * HEAD_DIM;
}

// What becomes of a thread's sums: rows g and g + 8 of a tile, of any token.
struct Add {
    float low_bias, high_bias;
    float* out;
    u32 n_out;
    bool has_low, has_high;

    __device__ __forceinline__ Add(const MatmulArgs& args, u32 tile, int g) {
        u32 m = tile * TILE_M + g;
        n_out = args.n_out;
        has_low = m < n_out;
        has_high = m + 8 < n_out;
        low_bias = has_low ? vector_at(args.bias, m) : 0.0f;
        high_bias = has_high ? vector_at(args.bias, m + 8) : 0.0f;
        out = args.out + m;
    }
    // What is added to is read for all tokens at once, before the first is written.
    __device__ __forceinline__ void load(u32 row, float& low, float& high) const {
        const float* from = out + (u64)row * n_out;
        if (has_low) low = from[0] + (low + low_bias);
        if (has_high) high = from[8] + (high + high_bias);
    }
    __device__ __forceinline__ void store(const MatmulArgs& args, u32 row, Row at, float low, float high) const {
        float* to = out + (u64)row * n_out;
        if (has_low) to[0] = low;
        if (has_high) to[8] = high;
    }
    static constexpr bool ADDS = true;
    static constexpr bool AT_ROWS = false;
};

struct Logits {
    float* out;
    u32 n_out;
    bool has_low, has_high;

    __device__ __forceinline__ Logits(const MatmulArgs& args, u32 tile, int g) {
        u32 m = tile * TILE_M + g;
        n_out = args.n_out;
        has_low = m < n_out;
        has_high = m + 8 < n_out;
        out = args.out + m;
    }
    __device__ __forceinline__ void store(const MatmulArgs& args, u32 row, Row at, float low, float high) const {
        float* to = out + (u64)row * n_out;
        if (has_low) to[0] = low;
        if (has_high) to[8] = high;
    }
    __device__ __forceinline__ void load(u32 row, float& low, float& high) const {}
    static constexpr bool ADDS = false;
    static constexpr bool AT_ROWS = false;
};

// A tile holds dims p..p+8 of a head above dims p + HEAD_DIM/2..: a rotary pair is one thread's.
struct Qkv {
    float low_bias, high_bias;
    u32 head, dim;

    __device__ __forceinline__ Qkv(const MatmulArgs& args, u32 tile, int g) {
        constexpr u32 TILES_A_HEAD = HEAD_DIM / TILE_M;
        head = tile / TILES_A_HEAD;
        dim = tile % TILES_A_HEAD * 8 + g;
        low_bias = vector_at(args.bias, head * HEAD_DIM + dim);
        high_bias = vector_at(args.bias, head * HEAD_DIM + dim + HEAD_DIM / 2);
    }
    __device__ __forceinline__ void store(const MatmulArgs& args, u32 row, Row at, float low, float high) const {
        low += low_bias;
        high += high_bias;
        if (head < args.n_heads + args.n_kv_heads) {
            const float* turn = args.rope + (u64)at.position * HEAD_DIM + dim;
            float cos = turn[0], sin = turn[HEAD_DIM / 2];
            float first = low * cos - high * sin;
            high = high * cos + low * sin;
            low = first;
        }
        u16 low_bits = f32_to_bf16(low), high_bits = f32_to_bf16(high);
        u32 width = (args.n_heads + 2 * args.n_kv_heads) * HEAD_DIM;
        u16* out = args.qkv + (u64)row * width + head * HEAD_DIM + dim;
        out[0] = low_bits;
        out[HEAD_DIM / 2] = high_bits;
        if (args.cache != 0 && head >= args.n_heads && at.sequence != NONE) {
            u32 kv_head = head - args.n_heads;
            u32 is_value = kv_head >= args.n_kv_heads;
            if (is_value) kv_head -= args.n_kv_heads;
            u16* to = cache_row(args.cache, args.page_table, args.max_pages, args.ring, args.layer, args.n_layers,
                                args.n_kv_heads, at.sequence, kv_head, is_value, at.position);
            to[dim] = low_bits;
            to[dim + HEAD_DIM / 2] = high_bits;
        }
    }
    __device__ __forceinline__ void load(u32 row, float& low, float& high) const {}
    static constexpr bool ADDS = false;
    static constexpr bool AT_ROWS = true;
};

// What becomes of a thread's sums.
template <class G, class Store> struct DenseOutputs {
    const MatmulArgs& args;
    const Row* rows;
    u32 first_row;
    int first_tile, n_tiles;

    template <int M> __device__ __forceinline__ void operator()(float (&acc)[M][G::N_TILES][4]) const {
        int lane = threadIdx.x % 32;
        #pragma unroll
        for (int m = 0; m < M; m++) {
            int tile = first_tile + G::tile(m);
            if (tile >= n_tiles) continue;
            const Store to(args, tile, lane / 4);
            if (Store::ADDS) {
                #pragma unroll
                for (int n = 0; n < G::N_TILES; n++) {
                    u32 row = first_row + G::column(n) + lane % 4 * 2;
                    float* c = acc[m][n];
                    if (row < args.n_rows) to.load(row, c[0], c[2]);
                    if (row + 1 < args.n_rows) to.load(row + 1, c[1], c[3]);
                }
            }
            #pragma unroll
            for (int n = 0; n < G::N_TILES; n++) {
                u32 column = G::column(n) + lane % 4 * 2;
                u32 row = first_row + column;
                float* c = acc[m][n];
                if (row < args.n_rows) to.store(args, row, rows[Store::AT_ROWS ? column : 0], c[0], c[2]);
                if (row + 1 < args.n_rows) to.store(args, row + 1, rows[Store::AT_ROWS ? column + 1 : 0], c[1], c[3]);
            }
        }
    }
};

template <class G, class Store> __device__ __forceinline__ void matmul(const MatmulArgs& args) {
    extern __shared__ __align__(16) u8 shared[];
    __shared__ int columns[G::COLUMNS];
    __shared__ Row rows[Store::AT_ROWS ? G::COLUMNS : 1];
    // Few token tiles: they follow each other, so that a weight tile is read once from memory.
    u32 m_block = args.rows_first ? blockIdx.y : blockIdx.x, row_block = args.rows_first ? blockIdx.x : blockIdx.y;
    if constexpr (G::PAIRS) {
        u32 m_blocks = (args.n_tiles - args.first_tile + G::TILES - 1) / G::TILES;
        place_of_pair(m_blocks, (args.n_rows + 2 * G::COLUMNS - 1) / (2 * G::COLUMNS), m_block, row_block);
    }
    u32 first_row = row_block * G::COLUMNS;
    int first_tile = (int)(args.first_tile + m_block * G::TILES), n_tiles = (int)args.n_tiles;
    int n_groups = (int)(args.n_k + GROUP_K - 1) / GROUP_K;
    // Weights that fit in L2 are on their way there before the kernel that writes x is done.
    if (args.prefetch) G::prefetch(args.weights, first_tile, n_tiles, n_groups);
    auto prepare = [&] {
        follow_previous();
        for (u32 c = threadIdx.x; c < G::COLUMNS; c += G::THREADS) {
            bool has = first_row + c < args.n_rows;
            columns[c] = has ? (int)(first_row + c) : -1;
            if (Store::AT_ROWS && has) rows[c] = args.rows[first_row + c];
        }
    };
    const DenseOutputs<G, Store> outputs = {args, rows, first_row, first_tile, n_tiles};
    G::run(shared, args.weights, first_tile, n_tiles, n_groups, args.x, args.n_k, (int)args.n_k, columns, prepare, outputs);
}

// Variants by how many rows there are; src/engine/cuda/variants.rs has the same numbers.
#define VARIANT(NAME, STORE, THREADS, BLOCKS, ...) \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(const MatmulArgs args) { matmul<__VA_ARGS__, STORE>(args); }
#define PAIR_VARIANT(NAME, STORE, THREADS, ...) \
    extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1) NAME(const MatmulArgs args) { \
        matmul<__VA_ARGS__, STORE>(args); \
    }
#define SMALL_VARIANTS(FORMAT, NAME, STORE) \
    VARIANT(NAME##_8, STORE, 32, 1, Gemm<FORMAT, 1, 1, 1, 1, 16>) \
    VARIANT(NAME##_16, STORE, 64, 1, Gemm<FORMAT, 2, 1, 1, 2, 10>)
#ifdef WARPGROUPS
#define VARIANTS(FORMAT, NAME, STORE) SMALL_VARIANTS(FORMAT, NAME, STORE) \
    VARIANT(NAME##_w16, STORE, 128, 3, WarpgroupGemm<FORMAT, 1, 1, 2, 3>) \
    VARIANT(NAME##_w32, STORE, 128, 2, WarpgroupGemm<FORMAT, 1, 1, 4, 2>) \
    VARIANT(NAME##_w64, STORE, 128, 2, WarpgroupGemm<FORMAT, 1, 1, 8, 2>) \
    VARIANT(NAME##_w128x128, STORE, 256, 1, WarpgroupGemm<FORMAT, 2, 1, 16, 1>) \
    PAIR_VARIANT(NAME##_p256x128, STORE, 384, PairGemm<FORMAT, 2, 16>) \
    VARIANT(NAME##_w256x128, STORE, 256, 1, WarpgroupGemm<FORMAT, 2, 2, 16, 1>)
#else
#define VARIANTS(FORMAT, NAME, STORE) SMALL_VARIANTS(FORMAT, NAME, STORE) \
    VARIANT(NAME##_32, STORE, 64, 1, Gemm<FORMAT, 2, 1, 1, 4, 8>) \
    VARIANT(NAME##_64, STORE, 128, 1, Gemm<FORMAT, 4, 1, 1, 8, 4>) \
    VARIANT(NAME##_128, STORE, 256, 1, Gemm<FORMAT, 4, 2, 2, 8, BIG_STAGES>)
#endif

#define MATMULS(FORMAT) \
    VARIANTS(FORMAT, matmul_qkv, Qkv) \
    VARIANTS(FORMAT, matmul_add, Add) \
    VARIANTS(FORMAT, matmul_logits, Logits)

// Copies the newest keys and values of each segment to its sequence's ring, after the layer's
// attention has read the older ones. Grid (n_rows), block 128.
extern "C" __global__ void __launch_bounds__(128) ring_append(const MatmulArgs args) {
    follow_previous();
    u32 r = blockIdx.x;
    Row row = args.rows[r];
    if (row.sequence == NONE || row.segment_end - r > args.ring) return;
    u32 width = (args.n_heads + 2 * args.n_kv_heads) * HEAD_DIM;
    const u16* from = args.qkv + (u64)r * width + args.n_heads * HEAD_DIM;
    for (u32 i = threadIdx.x; i < 2 * args.n_kv_heads * HEAD_DIM; i += 128) {
        u32 head = i / HEAD_DIM;
        u32 is_value = head >= args.n_kv_heads;
        u16* to = cache_row(args.cache, 0, 0, args.ring, args.layer, args.n_layers, args.n_kv_heads,
                            row.sequence, is_value ? head - args.n_kv_heads : head, is_value, row.position);
        to[i % HEAD_DIM] = from[i];
    }
}
