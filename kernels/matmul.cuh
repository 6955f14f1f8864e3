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
// `add` is split along k (gemm.cuh): its few outputs would not keep all multiprocessors busy.
//
// Grid (tiles / (WM MT), rows / (WN NT 8)), or where tokens stream (items, 1[, splits]); block 32 WM WN;
// dynamic shared memory STAGES * STAGE_BYTES, or for few rows all of K of the tokens (gemm_direct.cuh).
// Expected error: f32 sums of bf16 products, about 1e-6 relative. Behind matmul_outputs.cuh.

// src/engine/cuda/variants.rs has the same numbers.
#define ADD_SPLITS 4

#ifdef WARPGROUPS
// The items of a product whose tokens stream.
template <class G, template <int> class Store> struct DenseWork {
    typedef StreamItem<RowTokens<G::N_TILES>> Item;
    struct Prepared {};
    // Outputs that go by way of the stages leave none to be filled meanwhile.
    static constexpr bool MANY = Store<1>::UNIT == 0;
    struct Told { int first_tile, first_row; };

    const MatmulArgs& args;
    Row* rows;
    u32* maxima;
    Told* items;

    __device__ __forceinline__ Item find(u32 i) const {
        u32 n_feature_blocks = (args.n_tiles - args.first_tile + G::TILES - 1) / G::TILES;
        u32 n_row_blocks = (args.n_rows + G::COLUMNS - 1) / G::COLUMNS;
        u32 feature_block = args.rows_first ? i / n_row_blocks : i % n_feature_blocks;
        u32 row_block = args.rows_first ? i % n_row_blocks : i / n_feature_blocks;
        bool exists = i < n_feature_blocks * n_row_blocks;
        return {
            args.weights, (int)(args.first_tile + feature_block * G::TILES), {&args.x_map, (int)(row_block * G::COLUMNS)}, exists
        };
    }
    __device__ __forceinline__ void tell(u32 n, const Item& item) const {
        items[n % TOLD_ITEMS] = {item.exists ? item.first_tile : -1, item.tokens.first};
    }
    __device__ __forceinline__ Item told(u32 n) const {
        const Told& item = items[n % TOLD_ITEMS];
        return {args.weights, item.first_tile, {&args.x_map, item.first_row}, item.first_tile >= 0};
    }
    __device__ __forceinline__ void wait_for_tokens() const { wait_for_previous(); }
    __device__ __forceinline__ void begin() const { follow_previous(); }
    __device__ __forceinline__ Prepared prepare(const Item& item) const {
        if (!Store<1>::AT_ROWS && !Store<1>::HAS_MAXIMA) return {};
        // Those of the item before are no longer read.
        if (MANY) G::sync_workers();
        for (u32 c = threadIdx.x; c < G::COLUMNS; c += G::WORKERS) {
            u32 row = item.tokens.first + c;
            if (Store<1>::AT_ROWS && row < args.n_rows) rows[c] = args.rows[row];
            if (Store<1>::HAS_MAXIMA) maxima[c] = 0;
        }
        return {};
    }
    template <int M, int N> __device__ __forceinline__ void store(
        const Item& item, const Prepared& prepared, u8* shared, float (&acc)[M][N][4]
    ) const {
        if (Store<1>::AT_ROWS || Store<1>::HAS_MAXIMA) G::sync_workers();
        const DenseOutputs<G, Store> outputs = {
            args, rows, (u32)item.tokens.first, item.first_tile, (int)args.n_tiles, shared, maxima
        };
        outputs(acc);
    }
};
#endif

template <class G, template <int> class Store> __device__ __forceinline__ void matmul(const MatmulArgs& args) {
    extern __shared__ __align__(16) u8 shared[];
    __shared__ Row rows[Store<1>::AT_ROWS ? G::COLUMNS : 1];
    __shared__ u32 maxima[Store<1>::HAS_MAXIMA ? G::COLUMNS : 1];
    int n_groups = (int)(args.n_k + GROUP_K - 1) / GROUP_K;
#ifdef WARPGROUPS
    if constexpr (G::STREAMS) {
        typedef DenseWork<G, Store> Work;
        __shared__ typename Work::Told items[Work::MANY ? TOLD_ITEMS : 1];
        if (threadIdx.x == G::WORKERS) prefetch_map(&args.x_map);
        const Work work = {args, rows, maxima, items};
        if constexpr (Work::MANY) G::run_all(shared, (int)args.n_tiles, n_groups, work);
        else G::run(shared, (int)args.n_tiles, n_groups, work);
    }
#endif
    if constexpr (!G::STREAMS) {
        // Few token tiles: they follow each other, so that a weight tile is read once from memory.
        u32 m_block = args.rows_first ? blockIdx.y : blockIdx.x, row_block = args.rows_first ? blockIdx.x : blockIdx.y;
        u32 first_row = row_block * G::COLUMNS;
        int first_tile = (int)(args.first_tile + m_block * G::TILES), n_tiles = (int)args.n_tiles;
        const DenseOutputs<G, Store> outputs = {args, rows, first_row, first_tile, n_tiles, shared, maxima};
        if constexpr (G::DIRECT) {
            auto prepare = [&] {
                if (Store<1>::HAS_MAXIMA) {
                    for (u32 c = threadIdx.x; c < G::COLUMNS; c += G::THREADS) maxima[c] = 0;
                }
                // What follows the out projection are few blocks, which bring much before they wait.
                if (Store<1>::JOINS) follow_between();
                else follow_previous();
                u32 left = args.n_rows - first_row;
                return DirectTokens{args.x, args.n_k, (int)args.n_k, left < G::COLUMNS ? (int)left : G::COLUMNS, (int)first_row, 0};
            };
            G::run(shared, args.weights, first_tile, n_tiles, n_groups, prepare, outputs);
        } else {
            __shared__ int columns[G::COLUMNS];
            auto prepare = [&] {
                follow_previous();
                for (u32 c = threadIdx.x; c < G::COLUMNS; c += G::THREADS) {
                    bool has = first_row + c < args.n_rows;
                    columns[c] = has ? (int)(first_row + c) : -1;
                    if (Store<1>::AT_ROWS && has) rows[c] = args.rows[first_row + c];
                    if (Store<1>::HAS_MAXIMA) maxima[c] = 0;
                }
            };
            G::run(shared, args.weights, first_tile, n_tiles, n_groups, args.x, args.n_k, (int)args.n_k, columns, prepare, outputs);
        }
    }
}

// Variants by how many rows there are; src/engine/cuda/variants.rs has the same numbers. Those named w
// have all runs of k in a block; CLUSTER tells of the blocks of the other streamed ones.
#define VARIANT(NAME, STORE, CLUSTER, THREADS, BLOCKS, ...) \
    extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, BLOCKS) NAME(const __grid_constant__ MatmulArgs args) { matmul<__VA_ARGS__, STORE>(args); }
// WARPS a block with few rows.
#define NARROW_VARIANT(FORMAT, NAME, STORE, SPLITS) \
    VARIANT(NAME##_d8, STORE, , 32 * SPLITS, 1, DirectGemm<FORMAT, 1, 1, 12, SPLITS>)
#define SMALL_VARIANTS(FORMAT, NAME, STORE, SPLITS, WARPS) \
    VARIANT(NAME##_d16, STORE, , 32 * WARPS * SPLITS, 1, DirectGemm<FORMAT, WARPS, 2, 8, SPLITS>)
#ifdef WARPGROUPS
#define VARIANTS(FORMAT, NAME, STORE, SPLITS, WARPS, CLUSTER) SMALL_VARIANTS(FORMAT, NAME, STORE, SPLITS, WARPS) \
    VARIANT(NAME##_s32, STORE, CLUSTER, 160, 2, StreamGemm<FORMAT, 1, 1, 4, 2, 1, 4, SPLITS>) \
    VARIANT(NAME##_s64, STORE, CLUSTER, 160, 2, StreamGemm<FORMAT, 1, 1, 8, 2, 1, 8, SPLITS>) \
    VARIANT(NAME##_s128x128, STORE, CLUSTER, 288, 1, StreamGemm<FORMAT, 2, 1, 16, 1, 1, 16, SPLITS>)
#define QKV_VARIANTS(FORMAT, NAME, STORE) VARIANTS(FORMAT, NAME, STORE, 1, 6, ) UNSPLIT_VARIANTS(FORMAT, NAME, STORE) \
    VARIANT(NAME##_s128x88, STORE, , 288, 1, StreamGemm<FORMAT, 2, 1, 11, 1, 1>)
#define UNSPLIT_VARIANTS(FORMAT, NAME, STORE) \
    VARIANT(NAME##_s16, STORE, , 160, 3, StreamGemm<FORMAT, 1, 1, 2, 3, 1>) \
    VARIANT(NAME##_s256x128, STORE, , 384, 1, StreamGemm<FORMAT, 2, 2, 16, 1, 4>)
#define ADD_VARIANTS(FORMAT, NAME, STORE) VARIANTS(FORMAT, NAME, STORE, ADD_SPLITS, 2, __cluster_dims__(1, 1, ADD_SPLITS)) \
    VARIANT(NAME##_s192x128, STORE, __cluster_dims__(1, 1, ADD_SPLITS), 416, 1, StreamGemm<FORMAT, 3, 1, 16, 1, 1, 16, ADD_SPLITS>) \
    VARIANT(NAME##_w128x128, STORE, , 384, 1, StreamGemm<FORMAT, 2, 1, 16, 1, 4, 16, ADD_SPLITS, false>)
#define LOGITS_VARIANTS(FORMAT, NAME, STORE) VARIANTS(FORMAT, NAME, STORE, 1, 6, ) UNSPLIT_VARIANTS(FORMAT, NAME, STORE)
#else
#define VARIANTS(FORMAT, NAME, STORE, SPLITS, WARPS) SMALL_VARIANTS(FORMAT, NAME, STORE, SPLITS, WARPS) \
    VARIANT(NAME##_16, STORE, , 64, 1, Gemm<FORMAT, 2, 1, 1, 2, 10, SPLITS>) \
    VARIANT(NAME##_32, STORE, , 64, 1, Gemm<FORMAT, 2, 1, 1, 4, 8, SPLITS>) \
    VARIANT(NAME##_64, STORE, , 128, 1, Gemm<FORMAT, 4, 1, 1, 8, 4, SPLITS>) \
    VARIANT(NAME##_128, STORE, , 256, 1, Gemm<FORMAT, 4, 2, 2, 8, BIG_STAGES, SPLITS>)
#define QKV_VARIANTS(FORMAT, NAME, STORE) VARIANTS(FORMAT, NAME, STORE, 1, 6)
#define ADD_VARIANTS(FORMAT, NAME, STORE) VARIANTS(FORMAT, NAME, STORE, ADD_SPLITS, 2)
#define LOGITS_VARIANTS(FORMAT, NAME, STORE) VARIANTS(FORMAT, NAME, STORE, 1, 6)
#endif

#define MATMULS(FORMAT) \
    NARROW_VARIANT(FORMAT, matmul_qkv, Qkv, 1) QKV_VARIANTS(FORMAT, matmul_qkv, Qkv) \
    NARROW_VARIANT(FORMAT, matmul_add, Add, ADD_SPLITS) ADD_VARIANTS(FORMAT, matmul_add, Add) \
    LOGITS_VARIANTS(FORMAT, matmul_logits, Logits)

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
