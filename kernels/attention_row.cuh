// A decode step's attention of one row under one KV head, for groups of up to 16 heads: the bits of
// `attend` in attention.cu, by four warps that share each tile. Behind `attention.cuh`.
//
//   scores   warp w has keys 16 w .. 16 w + 15 of every tile, all queries
//   softmax  warp w has tile w of a batch: a lane finds scores where the same lane of the others left them
//   outputs  warp w has dims 16 w .. 16 w + 15 of every 64
//
// Tiles come in batches, a split at a time where they fit. Those of the first batch are asked for before
// the kernel that writes the query is done: only the row's own key and value are that kernel's. It lets
// this one start when it has itself waited (follow_previous), so rows, page table and older positions
// are there by then.

#define ROW_WARPS 4
// Tiles of a batch: src/engine/cuda/launch/attention.rs has the same numbers.
// Not more than warps, and a split is whole batches.
#define FULL_BATCH (HEAD_DIM > 64 ? 2 : SPLIT_TILES)
#define WINDOW_BATCH (HEAD_DIM > 64 ? 2 : 3)
// Of a tile's keys, whose place its scores take: 8 octets of keys, two queries a lane at most.
#define KEY_SPACE (TILE * (HEAD_DIM + 8) > 2048 ? TILE * (HEAD_DIM + 8) : 2048)
#define VALUE_SPACE (TILE * (HEAD_DIM + 8))

template <Mode MODE> __device__ __forceinline__ void attend_row(const AttentionArgs& args) {
    constexpr bool SLIDING = MODE == WINDOW;
    constexpr int BATCH = SLIDING ? WINDOW_BATCH : FULL_BATCH;
    constexpr int STRIDE_OF_ROW = HEAD_DIM + 8, CHUNKS = HEAD_DIM / 8, THREADS = 32 * ROW_WARPS;
    // A lane's queries g and g + 8, of which a small group has the first alone.
    constexpr int QUERIES = GROUP > 8 ? 2 : 1;
    constexpr int PAIRS = (HEAD_DIM / 16 + ROW_WARPS - 1) / ROW_WARPS;
    extern __shared__ __align__(16) u16 shared[];
    // Of each tile of a batch and query.
    __shared__ float greatest[BATCH][16], sums[BATCH][16];
    let_next_start();
    u32 row = blockIdx.x, kv_head = blockIdx.y;
    // Before the wait by way of L2 alone: no kernel that may still run writes these, but the multiprocessor's
    // own cache may hold what they were in an earlier step.
    const Row place = load_row(args.rows + row);
    u32 sequence = place.sequence;
    int own = (int)place.position;
    int n_tiles = own / TILE + 1;
    int lowest = SLIDING && own - (int)args.window + 1 > 0 ? own - (int)args.window + 1 : 0;
    int first = SLIDING ? lowest / TILE : 0;
    if (!SLIDING) {
        u32 n_shared = args.shared != 0 ? load_l2(&args.shared[row].x) : 0;
        first = (int)(n_shared + blockIdx.z) * SPLIT_TILES;
    }
    if (sequence == NONE || first >= n_tiles) {
        // The next kernel relies on this one's end for that of those before.
        wait_for_previous();
        return;
    }
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int g = lane / 4, t = lane % 4;
    u32 width = (args.n_heads + 2 * args.n_kv_heads) * HEAD_DIM;
    u32 n_positions = SLIDING ? args.ring : 256;
    auto keys_of = [&](int stage) { return shared + stage * (KEY_SPACE + VALUE_SPACE); };

    // Keys and values before the row's own; zeros where it sees none.
    auto load_older = [&](int tile, int stage) {
        // A tile lies in one page, and in one run of a ring.
        u64 holder = SLIDING ? sequence : load_l2(args.page_table + (u64)sequence * args.max_pages + tile / SPLIT_TILES);
        u64 of_head = (holder * args.n_layers + args.layer) * args.n_kv_heads + kv_head;
        const u16* cached = args.cache + (of_head * 2 * n_positions + (u32)(tile * TILE) % n_positions) * HEAD_DIM;
        u32 keys = shared_address(keys_of(stage));
        #pragma unroll
        for (int i = 0; i < TILE * CHUNKS / THREADS; i++) {
            int at = i * THREADS + (int)threadIdx.x;
            int key = at / CHUNKS, chunk = at % CHUNKS * 8;
            int position = tile * TILE + key;
            if (position == own) continue;
            bool seen = position >= lowest && position < own;
            const u16* from = cached + key * HEAD_DIM + chunk;
            u32 to = keys + (key * STRIDE_OF_ROW + chunk) * 2;
            copy_async16(to, from, seen);
            copy_async16(to + KEY_SPACE * 2, from + n_positions * HEAD_DIM, seen);
        }
    };
    // Of the row's own, which the kernel before writes, each of 2 CHUNKS threads brings 16 bytes; where from.
    bool is_value = threadIdx.x >= CHUNKS;
    const u16* own_chunk = args.qkv + (u64)row * width + (args.n_heads + (is_value ? args.n_kv_heads : 0) + kv_head) * HEAD_DIM;
    if (!SLIDING) {
        u64 holder = load_l2(args.page_table + (u64)sequence * args.max_pages + (n_tiles - 1) / SPLIT_TILES);
        u64 of_head = (holder * args.n_layers + args.layer) * args.n_kv_heads + kv_head;
        own_chunk = args.cache + ((of_head * 2 + (is_value ? 1 : 0)) * n_positions + (u32)own % n_positions) * HEAD_DIM;
    }
    own_chunk += threadIdx.x % CHUNKS * 8;
    auto load_own = [&](int stage) {
        if (threadIdx.x >= 2 * CHUNKS) return;
        u32 at = own % TILE * STRIDE_OF_ROW + threadIdx.x % CHUNKS * 8 + (is_value ? KEY_SPACE : 0);
        copy_async16(shared_address(keys_of(stage)) + at * 2, own_chunk, true);
    };

    int low[2] = {lowest, lowest}, high[2] = {own, own};
    u32 q[HEAD_DIM / 16][4];
    float scale = args.scale * LOG2_E;
    State state[QUERIES], folded[QUERIES];
    float o[PAIRS][2][4], o_folded[PAIRS][2][4];
    auto start_over = [&](State (&state)[QUERIES], float (&o)[PAIRS][2][4]) {
        #pragma unroll
        for (int i = 0; i < QUERIES; i++) state[i] = {NEG_INFINITY, 0.0f};
        #pragma unroll
        for (int p = 0; p < PAIRS; p++)
            #pragma unroll
            for (int i = 0; i < 8; i++) o[p][i / 4][i % 4] = 0.0f;
    };
    start_over(state, o);
    start_over(folded, o_folded);

    bool has_waited = false;
    for (int begin = first; begin < n_tiles;) {
        int first_of_batch = begin;
        int n = n_tiles - begin < BATCH ? n_tiles - begin : BATCH;
        #pragma unroll 1
        for (int j = 0; j < n; j++) load_older(first_of_batch + j, j);
        begin += BATCH;
        // The next split is so many further on.
        if (!SLIDING && begin % SPLIT_TILES == 0) begin += ((int)gridDim.z - 1) * SPLIT_TILES;
        if (!has_waited) wait_for_previous();
        if (first_of_batch + n == n_tiles) load_own(n - 1);
        if (!has_waited) {
            has_waited = true;
            // Query i is head i of the group.
            #pragma unroll
            for (int step = 0; step < HEAD_DIM / 16; step++) {
                #pragma unroll
                for (int i = 0; i < 4; i++) {
                    int query = g + 8 * (i % 2);
                    const u16* from = args.qkv + (u64)row * width + (kv_head * GROUP + query % GROUP) * HEAD_DIM;
                    q[step][i] = i % 2 < QUERIES ? *(const u32*)(from + step * 16 + i / 2 * 8 + 2 * t) : 0;
                }
            }
        }
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();

        float own_scores[BATCH][2][4];
        #pragma unroll
        for (int j = 0; j < BATCH; j++) {
            if (j >= n) break;
            #pragma unroll
            for (int i = 0; i < 8; i++) own_scores[j][i / 4][i % 4] = 0.0f;
            #pragma unroll
            for (int step = 0; step < HEAD_DIM / 16; step++) {
                u32 k[4];
                const u16* from = keys_of(j) + (warp * 16 + lane / 16 * 8 + lane % 8) * STRIDE_OF_ROW + step * 16 + lane / 8 % 2 * 8;
                load_matrix_x4(k, shared_address(from));
                mma_bf16(own_scores[j][0], q[step], k[0], k[1]);
                mma_bf16(own_scores[j][1], q[step], k[2], k[3]);
            }
        }
        // All have read the keys: [query of the lane][octet of keys][lane] take their place.
        __syncthreads();
        #pragma unroll
        for (int j = 0; j < BATCH; j++) {
            if (j >= n) break;
            float2* scores = (float2*)keys_of(j) + lane;
            #pragma unroll
            for (int i = 0; i < QUERIES; i++) {
                #pragma unroll
                for (int e = 0; e < 2; e++) {
                    scores[(i * 8 + warp * 2 + e) * 32] = make_float2(own_scores[j][e][2 * i], own_scores[j][e][2 * i + 1]);
                }
            }
        }
        __syncthreads();

        // Warp j has the softmax of tile j: its greatest scores for all, then, from those of the tiles
        // before, its exponentials, in the place of its scores, and their sums.
        float scores[TILE / 8][4];
        float2* own_place = (float2*)keys_of(warp < n ? warp : 0) + lane;
        if (warp < n) {
            #pragma unroll
            for (int e = 0; e < TILE / 8; e++) {
                #pragma unroll
                for (int i = 0; i < 2; i++) {
                    float2 two = i < QUERIES ? own_place[(i * 8 + e) * 32] : make_float2(0.0f, 0.0f);
                    scores[e][2 * i] = two.x;
                    scores[e][2 * i + 1] = two.y;
                }
            }
            int tile = first_of_batch + warp;
            bool all_seen = tile * TILE >= lowest && tile * TILE + TILE - 1 <= own;
            if (!all_seen) hide(scores, tile * TILE + 2 * t, low, high);
            #pragma unroll
            for (int i = 0; i < QUERIES; i++) greatest[warp][g + 8 * i] = greatest_score(scores, i) * scale;
        }
        __syncthreads();
        if (warp < n) {
            #pragma unroll
            for (int i = 0; i < QUERIES; i++) {
                float max = state[i].max;
                #pragma unroll
                for (int j = 0; j < BATCH; j++) max = j <= warp ? fmaxf(max, greatest[j][g + 8 * i]) : max;
                sums[warp][g + 8 * i] = exponentials(scores, i, exponent_base(max), scale);
            }
            #pragma unroll
            for (int step = 0; step < TILE / 16; step++) {
                u32 packed[4];
                pack_exponentials(packed, scores, step);
                #pragma unroll
                for (int i = 0; i < QUERIES; i++) {
                    *(uint2*)&own_place[(i * 4 + step) * 32] = make_uint2(packed[i], packed[i + 2]);
                }
            }
        }
        __syncthreads();

        #pragma unroll 1
        for (int j = 0; j < n; j++) {
            int tile = first_of_batch + j;
            const u16* values = keys_of(j) + KEY_SPACE;
            const uint2* packed = (const uint2*)keys_of(j) + lane;
            #pragma unroll
            for (int i = 0; i < QUERIES; i++) {
                float max = fmaxf(state[i].max, greatest[j][g + 8 * i]);
                float decay = decay_to(state[i].max, max);
                state[i].sum = __fmaf_rn(state[i].sum, decay, sums[j][g + 8 * i]);
                state[i].max = max;
                // A factor of 1 changes no bit.
                if (__any_sync(NONE, decay != 1.0f)) {
                    #pragma unroll
                    for (int p = 0; p < PAIRS; p++) {
                        #pragma unroll
                        for (int e = 0; e < 2; e++) {
                            o[p][e][2 * i] *= decay;
                            o[p][e][2 * i + 1] *= decay;
                        }
                    }
                }
            }
            #pragma unroll
            for (int step = 0; step < TILE / 16; step++) {
                u32 exponentials[4] = {0, 0, 0, 0};
                #pragma unroll
                for (int i = 0; i < QUERIES; i++) {
                    uint2 two = packed[(i * 4 + step) * 32];
                    exponentials[i] = two.x;
                    exponentials[i + 2] = two.y;
                }
                #pragma unroll
                for (int p = 0; p < PAIRS; p++) {
                    int pair = p * ROW_WARPS + warp;
                    if (pair * 16 >= HEAD_DIM) continue;
                    u32 v[4];
                    const u16* from = values + (step * 16 + lane / 8 % 2 * 8 + lane % 8) * STRIDE_OF_ROW + pair * 16 + lane / 16 * 8;
                    load_matrix_x4_transposed(v, shared_address(from));
                    mma_bf16(o[p][0], exponentials, v[0], v[1]);
                    mma_bf16(o[p][1], exponentials, v[2], v[3]);
                }
            }
            // A split ends.
            bool ends = tile + 1 == n_tiles || (!SLIDING && tile % SPLIT_TILES == SPLIT_TILES - 1);
            if (!ends) continue;
            #pragma unroll
            for (int i = 0; i < QUERIES; i++) {
                u32 query = g + 8 * i;
                if (SLIDING) {
                    float2 factors = fold(folded[i], state[i]);
                    #pragma unroll
                    for (int p = 0; p < PAIRS; p++) {
                        #pragma unroll
                        for (int e = 0; e < 4; e++) {
                            int at = 2 * i + e % 2;
                            o_folded[p][e / 2][at] = fold_output(o_folded[p][e / 2][at], o[p][e / 2][at], factors);
                        }
                    }
                } else if (query < GROUP) {
                    u64 head = kv_head * GROUP + query;
                    float* to = args.partial + (((u64)row * args.n_heads + head) * args.max_splits + tile / SPLIT_TILES) * (HEAD_DIM + 2);
                    #pragma unroll
                    for (int p = 0; p < PAIRS; p++) {
                        int pair = p * ROW_WARPS + warp;
                        if (pair * 16 >= HEAD_DIM) continue;
                        #pragma unroll
                        for (int e = 0; e < 2; e++) {
                            *(float2*)(to + pair * 16 + e * 8 + 2 * t) = make_float2(o[p][e][2 * i], o[p][e][2 * i + 1]);
                        }
                    }
                    if (warp == 0 && t == 0) *(float2*)(to + HEAD_DIM) = make_float2(state[i].max, state[i].sum);
                }
            }
            if (!SLIDING) start_over(state, o);
        }
        // The batch is read.
        if (begin < n_tiles) __syncthreads();
    }
    if constexpr (SLIDING) {
        #pragma unroll
        for (int i = 0; i < QUERIES; i++) {
            u32 query = g + 8 * i;
            if (query >= GROUP) continue;
            u32 head = kv_head * GROUP + query;
            float factor = finish_factor(folded[i], vector_at(args.sinks, head));
            u16* out = args.out + ((u64)row * args.n_heads + head) * HEAD_DIM;
            #pragma unroll
            for (int p = 0; p < PAIRS; p++) {
                int pair = p * ROW_WARPS + warp;
                if (pair * 16 >= HEAD_DIM) continue;
                #pragma unroll
                for (int e = 0; e < 2; e++) {
                    *(u32*)(out + pair * 16 + e * 8 + 2 * t) = f32x2_to_bf16x2(
                        o_folded[p][e][2 * i] * factor / folded[i].sum, o_folded[p][e][2 * i + 1] * factor / folded[i].sum);
                }
            }
        }
    }
}
