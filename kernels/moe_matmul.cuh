// The experts' products, for weights of any format (moe_matmul_mxfp4.cu, moe_matmul_mxint8.cu,
// moe_matmul_bf16.cu).
//
//   gate_up  act[entry, f] = bf16(swiglu(gate f, up f)) of x[entry / k]; a tile holds the gates of
//            8 features above their ups, so both are one thread's
//   down     y[entry, m] = bf16(product + bias), of act[entry]
//
//   weights  tiles (gemm.cuh), an expert's behind the other's
//   offsets  u32 [n_experts + 1], entries u32: the entries (row * k + rank) of expert e are
//            entries[offsets[e]..offsets[e + 1]]
//
// Grid (tiles of an expert / (WM MT), most token tiles), block 32 WM WN: token tile y belongs to
// the expert that a scan of the counts finds; tiles past the last do nothing. Entries of one
// expert are read together once for every COLUMNS of them.
//
// Where tokens stream (gemm_stream.cuh), `gather` (topk_routing.cu) has given every entry a place
// and brought its token there, and has listed the token tiles:
//
//   x, act   tiles (common.cuh) of n_octets octets of places
//   entries  u32 [n_octets * 8]: the entry of each place, NONE where it has none
//   listed   the token tiles
//
// There the grid is (feature blocks of a token tile, then of the next).
//
// So gate_up stores act as down reads it. What a place without an entry holds comes to nothing: a
// token's sums are of its own values alone. `down` knows its token tile from `gather`, not from
// gate_up, so its weights are under way while gate_up still runs.

struct MoeArgs {
    const u8* weights;
    const vector_t* bias;
    const u16* x;
    u16* act;
    u16* y;
    // NULL where every entry is its own list: one row, `entries` the experts of its ranks.
    const u32* offsets;
    const u32* entries;
    const TokenTile* listed;
    u32 n_experts;
    u32 k;
    u32 n_k;
    // Tiles of an expert.
    u32 n_tiles;
    // Outputs of an expert: features of gate_up, or rows of down.
    u32 n_out;
    u32 n_octets;
    float limit;
};

// gate * sigmoid(1.702 gate) * (up + 1), the gate clamped from above, up on both sides
// (gpt_oss/torch/model.py, swiglu).
__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
    gate = min_or_nan(gate, limit);
    up = max_or_nan(min_or_nan(up, limit), -limit);
    float gated = __fdividef(gate, 1.0f + exp_fast(-1.702f * gate));
    return (up + 1.0f) * gated;
}

// What becomes of a thread's sums: rows g and g + 8 of a tile, of any entry.
struct GateUp {
    float gate, up, limit;
    u16* out;
    u32 n_out;

    __device__ __forceinline__ GateUp(const MoeArgs& args, u32 expert, u32 tile, int g) {
        u32 f = tile * 8 + g;
        u64 at = (u64)expert * 2 * args.n_out + 2 * f;
        gate = vector_at(args.bias, at);
        up = vector_at(args.bias, at + 1);
        limit = args.limit;
        out = args.act + f;
        n_out = args.n_out;
    }
    __device__ __forceinline__ float value(float low, float high) const { return swiglu(low + gate, high + up, limit); }
    __device__ __forceinline__ void store(u32 entry, float low, float high) const {
        out[(u64)entry * n_out] = f32_to_bf16(value(low, high));
    }
    static constexpr bool OF_ROWS = true;
};

struct Down {
    float low_bias, high_bias;
    u16* out;
    u32 n_out;

    __device__ __forceinline__ Down(const MoeArgs& args, u32 expert, u32 tile, int g) {
        u32 m = tile * TILE_M + g;
        u64 at = (u64)expert * args.n_out + m;
        low_bias = vector_at(args.bias, at);
        high_bias = vector_at(args.bias, at + 8);
        out = args.y + m;
        n_out = args.n_out;
    }
    __device__ __forceinline__ void store(u32 entry, float low, float high) const {
        u16* y = out + (u64)entry * n_out;
        y[0] = f32_to_bf16(low + low_bias);
        y[8] = f32_to_bf16(high + high_bias);
    }
    static constexpr bool OF_ROWS = false;
};

// What becomes of a thread's sums.
template <class G, class Store> struct ExpertOutputs {
    const MoeArgs& args;
    const u32* entries;
    u32 expert;
    int first_tile, n_tiles;

    template <int M> __device__ __forceinline__ void operator()(float (&acc)[M][G::N_TILES][4]) const {
        int lane = threadIdx.x % 32;
        #pragma unroll
        for (int m = 0; m < M; m++) {
            int tile = first_tile + G::tile(m);
            if (tile >= n_tiles) continue;
            store(Store(args, expert, tile, lane / 4), acc[m]);
        }
    }
    __device__ __forceinline__ void store(const Store& to, const float (&acc)[G::N_TILES][4]) const {
        #pragma unroll
        for (int n = 0; n < G::N_TILES; n++) {
            const u32* entry = entries + G::column(n) + threadIdx.x % 4 * 2;
            const float* c = acc[n];
            if (entry[0] != NONE) to.store(entry[0], c[0], c[2]);
            if (entry[1] != NONE) to.store(entry[1], c[1], c[3]);
        }
    }

    // The same in three, for a warp of few tokens (gemm_direct.cuh).
    struct Places {};
    __device__ __forceinline__ Places find() const { return {}; }
    // Behind the tiles, the last.
    __device__ __forceinline__ Store join(const Places& places) const {
        int tile = first_tile + G::tile(0) < n_tiles ? first_tile + G::tile(0) : n_tiles - 1;
        return Store(args, expert, tile, threadIdx.x % 32 / 4);
    }
    __device__ __forceinline__ void finish(float (&acc)[1][G::N_TILES][4], const Places& places, const Store& to) const {
        if (first_tile + G::tile(0) < n_tiles) store(to, acc[0]);
    }
};

// Whether a block knows its expert before gate_up is done: `down` of one row, from the router.
template <class Store> __device__ __forceinline__ bool starts_early(const MoeArgs& args) {
    return !Store::OF_ROWS && args.offsets == 0;
}

// Sums of tokens first..end of an expert, and what becomes of them.
template <class G, class Store> __device__ __forceinline__ void expert_tile(
    const MoeArgs& args, u8* shared, u32* entries, int* columns, u32 expert, u32 first, u32 end
) {
    int first_tile = (int)blockIdx.x * G::TILES, n_tiles = (int)args.n_tiles;
    int n_groups = (int)(args.n_k + GROUP_K - 1) / GROUP_K;
    u64 blocks = (args.n_tiles + BLOCK_TILES - 1) / BLOCK_TILES;
    const u8* weights = args.weights + expert * blocks * n_groups * BLOCK_TILES * G::TILE_BYTES;
    auto list_tokens = [&] {
        for (int c = threadIdx.x; c < G::COLUMNS; c += G::THREADS) {
            u32 entry = first + c >= end ? NONE : args.offsets == 0 ? first + c : args.entries[first + c];
            entries[c] = entry;
            columns[c] = entry == NONE ? -1 : (int)(Store::OF_ROWS ? entry / args.k : entry);
        }
    };
    auto prepare = [&] {
        if (starts_early<Store>(args)) follow_previous();
        if constexpr (G::DIRECT) {
            int left = (int)(end - first);
            DirectTokens tokens = {args.x, args.n_k, (int)args.n_k, left < G::COLUMNS ? left : G::COLUMNS, 0, columns};
            if (args.offsets == 0) {
                // One row, or the expert's: known without a look at shared memory.
                if (threadIdx.x < G::COLUMNS) entries[threadIdx.x] = threadIdx.x == 0 ? first : NONE;
                tokens.first = Store::OF_ROWS ? 0 : (int)first;
                tokens.listed = 0;
                return tokens;
            }
            list_tokens();
            __syncthreads();
            return tokens;
        } else {
            list_tokens();
        }
    };
    const ExpertOutputs<G, Store> outputs = {args, entries, expert, first_tile, n_tiles};
    if constexpr (G::DIRECT) G::run(shared, weights, first_tile, n_tiles, n_groups, prepare, outputs);
    else G::run(shared, weights, first_tile, n_tiles, n_groups, args.x, args.n_k, (int)args.n_k, columns, prepare, outputs);
}

// By blocks of G.
template <class G, class Store> __device__ __forceinline__ void moe_matmul(const MoeArgs& args) {
    extern __shared__ __align__(16) u8 shared[];
    // Of each token: its entry, and its row of x.
    __shared__ u32 entries[G::COLUMNS];
    __shared__ int columns[G::COLUMNS];
    __shared__ u32 found[3];
    if (!starts_early<Store>(args)) follow_previous();
    bool is_listed = args.offsets != 0;
    u32 expert, first = blockIdx.y, end = first + 1;
    if (!is_listed) expert = load_l2(args.entries + first);
    if (is_listed && threadIdx.x < 32) {
        // The expert and the first of its entries, by one warp.
        if (threadIdx.x == 0) found[0] = NONE;
        __syncwarp();
        u32 before = 0;
        for (u32 of = 0; of < args.n_experts; of += 32) {
            u32 of_lane = of + threadIdx.x;
            u32 start = 0, behind = 0;
            if (of_lane < args.n_experts) {
                start = args.offsets[of_lane];
                behind = args.offsets[of_lane + 1];
            }
            u32 n_tiles = (behind - start + G::COLUMNS - 1) / G::COLUMNS;
            u32 sum = n_tiles;
            for (int step = 1; step < 32; step *= 2) {
                u32 other = __shfl_up_sync(NONE, sum, step);
                if ((int)threadIdx.x >= step) sum += other;
            }
            u32 first_tile = before + sum - n_tiles;
            if (blockIdx.y >= first_tile && blockIdx.y < first_tile + n_tiles) {
                found[0] = of_lane;
                found[1] = start + (blockIdx.y - first_tile) * G::COLUMNS;
                found[2] = behind;
            }
            before += __shfl_sync(NONE, sum, 31);
            if (before > blockIdx.y) break;
        }
    }
    if (is_listed) {
        __syncthreads();
        expert = found[0];
        first = found[1];
        end = found[2];
    }
    if (expert == NONE) return;
    expert_tile<G, Store>(args, shared, entries, columns, expert, first, end);
}

#ifdef WARPGROUPS
// Tokens of a token tile, 64 k after 64 k: as many octets as it has. Others of the stage hold what
// they held.
struct TileTokens {
    const u8* first;
    u64 group_bytes;
    u32 n_octets;

    __device__ __forceinline__ u32 n_bytes() const { return n_octets * OCTET_BYTES; }
    __device__ __forceinline__ void fill(u32 shared, int group, u32 barrier) const {
        copy_bulk(shared, first + group * group_bytes, n_bytes(), barrier);
    }
};

// What becomes of a thread's sums where tokens stream. It has two tokens of each of its rows; once
// the matrix of eight rows and an octet is turned, it has two rows of a token, lane / 4 of the octet.
struct GateUpTiles : GateUp {
    // Behind the last feature are zeros: down multiplies them as it does weights of nothing.
    bool is_feature;
    u8* to;

    // A tile's features are one chunk, the tiles of a group of 64 features follow each other.
    __device__ static __forceinline__ u32 end_tile(const MoeArgs& args) { return (args.n_tiles + 7) / 8 * 8; }
    __device__ __forceinline__ GateUpTiles(const MoeArgs& args, const TokenTile& token_tile, u32 tile, int lane)
        : GateUp(args, token_tile.expert, tile < args.n_tiles ? tile : args.n_tiles - 1, lane / 4) {
        is_feature = tile < args.n_tiles;
        to = (u8*)args.act + chunk_at((u64)(tile / 8) * args.n_octets + token_tile.first, lane / 4, tile % 8) + lane % 4 * 4;
    }
    __device__ __forceinline__ void store(int octet, u32 entry, const float (&c)[4]) const {
        u32 of_row = is_feature ? f32x2_to_bf16x2(value(c[0], c[2]), value(c[1], c[3])) : 0;
        *(u32*)(to + octet * OCTET_BYTES) = turn_matrix(of_row);
    }
    static constexpr bool OF_ACT = false;
};

struct DownRows : Down {
    __device__ static __forceinline__ u32 end_tile(const MoeArgs& args) { return args.n_tiles; }
    __device__ __forceinline__ DownRows(const MoeArgs& args, const TokenTile& token_tile, u32 tile, int lane)
        : Down(args, token_tile.expert, tile, lane / 4) {
        out = args.y + tile * TILE_M + lane % 4 * 2;
    }
    // `entry` is that of token lane / 4.
    __device__ __forceinline__ void store(int octet, u32 entry, const float (&c)[4]) const {
        u32 low = turn_matrix(f32x2_to_bf16x2(c[0] + low_bias, c[1] + low_bias));
        u32 high = turn_matrix(f32x2_to_bf16x2(c[2] + high_bias, c[3] + high_bias));
        if (entry != NONE) {
            u16* y = out + (u64)entry * n_out;
            *(u32*)y = low;
            *(u32*)(y + 8) = high;
        }
    }
    static constexpr bool OF_ACT = true;
};

// The items of a product whose tokens stream: feature blocks of a listed token tile, then of the next.
template <class G, class Store> struct ExpertWork {
    struct Item : StreamItem<TileTokens> { TokenTile token_tile; };
    // Entries of the tokens lane / 4 of octets lane % 4, lane % 4 + 4, ..
    struct Prepared { u32 entries[(G::N_TILES + 3) / 4]; };

    const MoeArgs& args;
    u32 n_feature_blocks;
    u64 expert_bytes;

    __device__ __forceinline__ ExpertWork(const MoeArgs& args, int n_groups) : args(args) {
        n_feature_blocks = (args.n_tiles + G::TILES - 1) / G::TILES;
        expert_bytes = (u64)((args.n_tiles + BLOCK_TILES - 1) / BLOCK_TILES) * n_groups * BLOCK_TILES * G::TILE_BYTES;
    }

    __device__ __forceinline__ Item find(u32 i) const {
        const TokenTile token_tile = load_token_tile(args.listed + i / n_feature_blocks);
        Item item;
        u32 left = token_tile.end - token_tile.first;
        item.token_tile = token_tile;
        item.exists = token_tile.expert != NONE;
        item.first_tile = (int)(i % n_feature_blocks * G::TILES);
        item.weights = args.weights + token_tile.expert * expert_bytes;
        item.tokens = {
            (const u8*)args.x + (u64)token_tile.first * OCTET_BYTES, (u64)args.n_octets * OCTET_BYTES,
            left < G::N_TILES ? left : G::N_TILES
        };
        return item;
    }
    // gate_up has waited for all before, to find its item.
    __device__ __forceinline__ void begin() const {
        if (Store::OF_ACT) follow_previous();
    }
    __device__ __forceinline__ Prepared prepare(const Item& item) const {
        Prepared prepared = {};
        if constexpr (Store::OF_ACT) {
            u32 lane = threadIdx.x % 32;
            #pragma unroll
            for (int n = 0; n < G::N_TILES; n += 4) {
                u32 octet = n + lane % 4, place = (item.token_tile.first + octet) * 8 + lane / 4;
                prepared.entries[n / 4] = octet < item.tokens.n_octets ? load_l2(args.entries + place) : NONE;
            }
        }
        return prepared;
    }
    template <int M, int N> __device__ __forceinline__ void store(
        const Item& item, const Prepared& prepared, u8* shared, float (&acc)[M][N][4]
    ) const {
        #pragma unroll
        for (int m = 0; m < M; m++) {
            u32 tile = item.first_tile + G::tile(m);
            if (tile >= Store::end_tile(args)) continue;
            u32 lane = threadIdx.x % 32;
            const Store to(args, item.token_tile, tile, lane);
            #pragma unroll
            for (int n = 0; n < N; n++) {
                u32 entry = Store::OF_ACT ? __shfl_sync(NONE, prepared.entries[n / 4], lane / 4 * 4 + n % 4) : NONE;
                if (n < item.tokens.n_octets) to.store(n, entry, acc[m][n]);
            }
        }
    }
};

// By blocks of G, whose tokens stream.
template <class G, class Store> __device__ __forceinline__ void moe_stream(const MoeArgs& args) {
    static_assert(G::TILES % 8 == 0, "a block has whole groups of 64 features of act");
    extern __shared__ __align__(16) u8 shared[];
    if (!Store::OF_ACT) follow_previous();
    int n_groups = (int)(args.n_k + GROUP_K - 1) / GROUP_K;
    G::run(shared, (int)args.n_tiles, n_groups, ExpertWork<G, Store>(args, n_groups));
}
#endif

// Variants by how many tokens an expert has; src/engine/cuda/variants.rs has the same numbers.
// 192 rows divide 2880 and 5760.
#define VARIANT(NAME, STORE, THREADS, BLOCKS, ...) \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(const MoeArgs args) { moe_matmul<__VA_ARGS__, STORE>(args); }
#ifdef WARPGROUPS
// FEW and MANY: blocks a multiprocessor of the larger and of the smaller token tiles; TILES: blocks of
// 64 features of a warpgroup with few tokens; for two of them three blocks have too few registers.
#define STREAM(NAME, STORE, BLOCKS, ...) \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__::THREADS, BLOCKS) NAME(const MoeArgs args) { moe_stream<__VA_ARGS__, STORE>(args); }
#define VARIANTS(FORMAT, NAME, STORE, STORES, SMALL, BIG, FEW, MANY, TILES, DEPTH) \
    VARIANT(NAME##_d8, STORE, 128, 1, DirectGemm<FORMAT, 4, 1, DEPTH>) \
    STREAM(NAME##_s16, STORES, TILES == 2 ? 2 : MANY, StreamGemm<FORMAT, 2, TILES, 2, TILES == 2 ? 2 : MANY, 1>) \
    STREAM(NAME##_s48, STORES, MANY, StreamGemm<FORMAT, 1, 2, 6, MANY, 1, 4>) \
    STREAM(NAME##_s128, STORES, 1, StreamGemm<FORMAT, 2, 2, 16, 1, 4, 8>)
#else
#define VARIANTS(FORMAT, NAME, STORE, STORES, SMALL, BIG, FEW, MANY, TILES, DEPTH) \
    VARIANT(NAME##_d8, STORE, 128, 1, DirectGemm<FORMAT, 4, 1, DEPTH>) \
    VARIANT(NAME##_16, STORE, 128, 1, Gemm<FORMAT, 4, 1, 1, 2, SMALL>) \
    VARIANT(NAME##_32, STORE, 128, 1, Gemm<FORMAT, 4, 1, 3, 4, 3>) \
    VARIANT(NAME##_48, STORE, 128, 1, Gemm<FORMAT, 4, 1, 3, 6, BIG>) \
    VARIANT(NAME##_64, STORE, 128, 1, Gemm<FORMAT, 4, 1, 3, 8, BIG>) \
    VARIANT(NAME##_128, STORE, 256, 1, Gemm<FORMAT, 4, 2, 2, 8, BIG>)
#endif
