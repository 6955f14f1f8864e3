// Grouped-query attention with sinks and a sliding window, prefill and decode alike.
//
//   qkv       bf16 [n_rows, (n_heads + 2 n_kv_heads) HEAD_DIM], q and k rotated
//   cache     pages [page][layer][kv head][K 256 | V 256][HEAD_DIM] of the full layers, or
//             rings [sequence][layer][kv head][K ring | V ring][HEAD_DIM] of the sliding ones
//   out       bf16 [n_rows, n_heads HEAD_DIM]
//   partial   f32 [n_rows, n_heads, max_splits, HEAD_DIM + 2]: O, maximum, denominator
//
// A query's arithmetic depends on absolute positions alone: tiles of 64 keys in order with online
// softmax; on full layers a split of 256 keys begins from zero and splits are folded in position
// order; the sink joins last. So a decode step over many blocks (attention_full_decode, then
// attention_merge), one of few rows (attention_row.cuh) and a prefill pass (attention_full) give the same
// bits.
//
// A block has queries of consecutive rows of one sequence under one KV head: query i is row
// i / GROUP, head i % GROUP; a warp has 16 of them as the M of mma.m16n8k16, 64 keys as its N.
// A query that sees no key of a tile goes through it unchanged, bit for bit.
//
// Pages that several rows of a step share are read once for all of them: attention_shared_decode
// goes through a work list that the host makes where a page table changes.
//
// Full layers read the cache alone. Sliding layers read positions of the running pass from qkv
// (same bits) and older ones from the ring, which is written afterwards.
//
// Grid (blocks of rows, n_kv_heads[, splits]), block 32 WARPS, dynamic shared memory
// 4 * 64 * (HEAD_DIM + 8) * 2. Expected error: P rounded to bf16, about 2e-3 of the largest V.
// The scheme is FlashAttention-2's (arXiv 2307.08691) with FlashDecoding's splits.
//
// Where the GPU has warpgroups, and HEAD_DIM is 64, a prefill pass and shared pages are
// attention_wgmma.cuh's.

// 16 bytes more than a row holds, so that eight rows lie in different banks.
#define STRIDE (HEAD_DIM + 8)
#define DECODE_WARPS ((GROUP + 15) / 16)
// Most rows of a shared item, and the warps for their queries.
#define SHARED_ROWS (GROUP > 64 ? 1 : GROUP > 8 ? 128 / GROUP : 16)
#define SHARED_WARPS ((SHARED_ROWS * GROUP + 15) / 16)
#define PREFILL_WARPS (DECODE_WARPS > 4 ? DECODE_WARPS : 4)

template <Mode MODE, int WARPS>
__device__ __forceinline__ void attend(const AttentionArgs& args, const SharedItem* item) {
    constexpr bool SLIDING = MODE == WINDOW;
    extern __shared__ __align__(16) u16 shared[];
    u32 row0 = MODE == SHARED ? item->rows[0] : args.blocks != 0 ? args.blocks[blockIdx.x].x : blockIdx.x;
    int n_rows = MODE == SHARED ? (int)item->n_rows : args.blocks != 0 ? (int)args.blocks[blockIdx.x].y : 1;
    Row first = args.rows[row0];
    if (MODE == SHARED) first.sequence = item->sequence;
    if (first.sequence == NONE) return;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int g = lane / 4, t = lane % 4;
    u32 kv_head = MODE == SHARED ? blockIdx.x : blockIdx.y;
    u32 width = (args.n_heads + 2 * args.n_kv_heads) * HEAD_DIM;
    int position0 = (int)first.position;
    // Position of the segment's first row: from there on keys are in qkv, too.
    int segment_position = position0 - (int)(row0 - first.segment_row);
    int last = position0 + n_rows - 1;
    int lowest = 0;
    if (SLIDING) lowest = position0 - (int)args.window + 1 > 0 ? position0 - (int)args.window + 1 : 0;
    int n_tiles = last / TILE + 1;
    if (MODE == SHARED) {
        n_tiles = (int)(item->first_split + item->n_splits) * SPLIT_TILES;
        last = n_tiles * TILE - 1;
    }

    // The lane's two queries.
    int low[2], high[2];
    u64 q_at[2];
    u32 row_of[2];
    bool is_query[2];
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        int query = warp * 16 + g + 8 * i;
        int row = query / GROUP;
        is_query[i] = row < n_rows;
        row_of[i] = !is_query[i] ? row0 : MODE == SHARED ? item->rows[row] : row0 + row;
        if (MODE == SHARED && is_query[i]) is_query[i] = args.rows[row_of[i]].sequence != NONE;
        int position = position0 + row;
        high[i] = is_query[i] ? position : -1;
        low[i] = SLIDING && position - (int)args.window + 1 > 0 ? position - (int)args.window + 1 : 0;
        q_at[i] = (u64)row_of[i] * width + (kv_head * GROUP + query % GROUP) * HEAD_DIM;
    }
    u32 q[HEAD_DIM / 16][4];
    #pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; step++) {
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            q[step][i] = *(const u32*)(args.qkv + q_at[i % 2] + step * 16 + i / 2 * 8 + 2 * t);
        }
    }

    // Keys and values of this pass: those of the segment's first row.
    const u16* of_pass = args.qkv + (u64)first.segment_row * width + (args.n_heads + kv_head) * HEAD_DIM;
    auto load = [&](int tile, int stage) {
        constexpr int CHUNKS = HEAD_DIM / 8;
        u16* keys = shared + stage * 2 * TILE * STRIDE;
        // A tile lies in one page, and in one run of a ring.
        u32 n_positions = SLIDING ? args.ring : 256;
        u64 holder = SLIDING ? first.sequence : args.page_table[(u64)first.sequence * args.max_pages + tile / SPLIT_TILES];
        u64 of_head = (holder * args.n_layers + args.layer) * args.n_kv_heads + kv_head;
        const u16* cached = args.cache + (of_head * 2 * n_positions + (u32)(tile * TILE) % n_positions) * HEAD_DIM;
        u32 value_offset = n_positions * HEAD_DIM;
        #pragma unroll 4
        for (int i = threadIdx.x; i < TILE * CHUNKS; i += 32 * WARPS) {
            int key = i / CHUNKS, chunk = i % CHUNKS * 8;
            int position = tile * TILE + key;
            // What no query of the block sees is zeros, whatever the cache holds there.
            bool seen = position >= lowest && position <= last;
            u32 from_key = (u32)key * HEAD_DIM + chunk;
            const u16* from = cached + from_key;
            u32 to_value = value_offset;
            if (SLIDING && position >= segment_position) {
                from = of_pass + (u64)(u32)(position - segment_position) * width + chunk;
                to_value = args.n_kv_heads * HEAD_DIM;
            }
            u32 to = shared_address(keys + key * STRIDE + chunk);
            copy_async16(to, from, seen);
            copy_async16(to + TILE * STRIDE * 2, from + to_value, seen);
        }
    };

    State folded[2] = {{NEG_INFINITY, 0.0f}, {NEG_INFINITY, 0.0f}};
    float o_folded[HEAD_DIM / 8][4];
    #pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++)
        #pragma unroll
        for (int i = 0; i < 4; i++) o_folded[n][i] = 0.0f;

    float scale = args.scale * LOG2_E;
    // The warp's queries: their least position, and the greatest first key that one sees.
    int warp_row = warp * 16 / GROUP, warp_end = (warp * 16 + 15) / GROUP;
    int warp_last = position0 + (warp_end < n_rows ? warp_end : n_rows - 1);
    int warp_position = position0 + warp_row, warp_low = 0;
    if (SLIDING) warp_low = warp_last - (int)args.window + 1;

    // The tile behind `tile` that this block goes on with.
    int skipped = MODE == SPLITS ? ((int)gridDim.z - 1) * SPLIT_TILES : 0;
    auto following = [&](int tile) { return MODE == SPLITS && tile % SPLIT_TILES == SPLIT_TILES - 1 ? tile + 1 + skipped : tile + 1; };
    bool folds = MODE == FULL || MODE == WINDOW || (MODE == SHARED && item->folded != 0);

    State state[2] = {{NEG_INFINITY, 0.0f}, {NEG_INFINITY, 0.0f}};
    float o[HEAD_DIM / 8][4];
    #pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++)
        #pragma unroll
        for (int i = 0; i < 4; i++) o[n][i] = 0.0f;
    int stage = 0;
    int tile = SLIDING ? lowest / TILE : 0;
    if (MODE == SPLITS) tile = (int)((args.shared != 0 ? args.shared[row0].x : 0) + blockIdx.z) * SPLIT_TILES;
    if (MODE == SHARED) tile = (int)item->first_split * SPLIT_TILES;
    if (tile < n_tiles) load(tile, 0);
    copy_async_commit();
    for (int next; tile < n_tiles; tile = next, stage ^= 1) {
        next = following(tile);
        copy_async_wait<0>();
        // The tile is there, and all have left the other stage behind.
        __syncthreads();
        if (next < n_tiles) load(next, stage ^ 1);
        copy_async_commit();
        const u16* keys = shared + stage * 2 * TILE * STRIDE;
        const u16* values = keys + TILE * STRIDE;
        float s[TILE / 8][4];
        #pragma unroll
        for (int n = 0; n < TILE / 8; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++) s[n][i] = 0.0f;
        #pragma unroll
        for (int step = 0; step < HEAD_DIM / 16; step++) {
            #pragma unroll
            for (int n = 0; n < TILE / 8; n += 2) {
                u32 k[4];
                load_matrix_x4(k, shared_address(keys + ((n + lane / 16) * 8 + lane % 8) * STRIDE + step * 16 + lane / 8 % 2 * 8));
                mma_bf16(s[n], q[step], k[0], k[1]);
                mma_bf16(s[n + 1], q[step], k[2], k[3]);
            }
        }
        // Every query of the warp sees every key of the tile.
        bool all_seen = MODE == SHARED || tile * TILE + TILE - 1 <= warp_position && (!SLIDING || tile * TILE >= warp_low);
        if (!all_seen) hide(s, tile * TILE + 2 * t, low, high);
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            float decay = soften(s, i, state[i], scale);
            // A factor of 1 changes no bit.
            if (__any_sync(NONE, decay != 1.0f)) {
                #pragma unroll
                for (int n = 0; n < HEAD_DIM / 8; n++) {
                    o[n][2 * i] *= decay;
                    o[n][2 * i + 1] *= decay;
                }
            }
        }
        #pragma unroll
        for (int step = 0; step < TILE / 16; step++) {
            u32 p[4];
            pack_exponentials(p, s, step);
            #pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; n += 2) {
                u32 v[4];
                load_matrix_x4_transposed(v, shared_address(values + (step * 16 + lane / 8 % 2 * 8 + lane % 8) * STRIDE + (n + lane / 16) * 8));
                mma_bf16(o[n], p, v[0], v[1]);
                mma_bf16(o[n + 1], p, v[2], v[3]);
            }
        }
        // A split ends.
        bool ends = SLIDING ? next >= n_tiles : tile % SPLIT_TILES == SPLIT_TILES - 1 || tile + 1 == n_tiles;
        if (!ends) continue;
        if (folds) {
            #pragma unroll
            for (int i = 0; i < 2; i++) {
                float2 factors = fold(folded[i], state[i]);
                #pragma unroll
                for (int n = 0; n < HEAD_DIM / 8; n++) {
                    o_folded[n][2 * i] = fold_output(o_folded[n][2 * i], o[n][2 * i], factors);
                    o_folded[n][2 * i + 1] = fold_output(o_folded[n][2 * i + 1], o[n][2 * i + 1], factors);
                }
            }
        }
        if ((MODE == SPLITS || MODE == SHARED) && (!folds || tile + 1 == n_tiles)) {
            #pragma unroll
            for (int i = 0; i < 2; i++) {
                if (!is_query[i]) continue;
                u64 head = kv_head * GROUP + (warp * 16 + g + 8 * i) % GROUP;
                float* to = args.partial + (((u64)row_of[i] * args.n_heads + head) * args.max_splits + tile / SPLIT_TILES) * (HEAD_DIM + 2);
                #pragma unroll
                for (int n = 0; n < HEAD_DIM / 8; n++) {
                    float low_o = folds ? o_folded[n][2 * i] : o[n][2 * i];
                    float high_o = folds ? o_folded[n][2 * i + 1] : o[n][2 * i + 1];
                    *(float2*)(to + n * 8 + 2 * t) = make_float2(low_o, high_o);
                }
                float max = folds ? folded[i].max : state[i].max, sum = folds ? folded[i].sum : state[i].sum;
                if (t == 0) *(float2*)(to + HEAD_DIM) = make_float2(max, sum);
            }
        }
        #pragma unroll
        for (int i = 0; i < 2; i++) state[i] = {NEG_INFINITY, 0.0f};
        #pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++) o[n][i] = 0.0f;
    }
    copy_async_wait<0>();
    if (MODE == SPLITS || MODE == SHARED) return;
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        if (!is_query[i]) continue;
        int query = warp * 16 + g + 8 * i;
        u32 head = kv_head * GROUP + query % GROUP;
        float factor = finish_factor(folded[i], vector_at(args.sinks, head));
        u16* out = args.out + ((u64)(row0 + query / GROUP) * args.n_heads + head) * HEAD_DIM;
        #pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) {
            *(u32*)(out + n * 8 + 2 * t) = f32x2_to_bf16x2(
                o_folded[n][2 * i] * factor / folded[i].sum, o_folded[n][2 * i + 1] * factor / folded[i].sum);
        }
    }
}

#ifdef ATTENTION_WARPGROUPS
extern "C" __global__ void __launch_bounds__(128 * ATTENTION_WARPGROUPS, 2) attention_full(const AttentionArgs args) {
    follow_previous();
    attend_by_warpgroups<FULL>(args, 0, 0);
}

extern "C" __global__ void __launch_bounds__(128 * ATTENTION_WARPGROUPS, 2) attention_sliding(const AttentionArgs args) {
    follow_previous();
    attend_by_warpgroups<WINDOW>(args, 0, 0);
}

extern "C" __global__ void __launch_bounds__(128 * ATTENTION_WARPGROUPS, 1)
attention_shared_decode(const __grid_constant__ AttentionArgs args) {
    if (threadIdx.x == 0) prefetch_map(&args.cache_map);
    follow_between();
    u32 n_items = *args.n_items, before = 0;
    for (u32 i = blockIdx.y; i < n_items; i += gridDim.y) {
        attend_by_warpgroups<SHARED>(args, args.items + i, before);
        before += args.items[i].n_splits * SPLIT_TILES;
    }
}
#else
extern "C" __global__ void __launch_bounds__(32 * PREFILL_WARPS) attention_full(const AttentionArgs args) {
    follow_previous();
    attend<FULL, PREFILL_WARPS>(args, 0);
}

extern "C" __global__ void __launch_bounds__(32 * PREFILL_WARPS) attention_sliding(const AttentionArgs args) {
    follow_previous();
    attend<WINDOW, PREFILL_WARPS>(args, 0);
}

// Grid (n_kv_heads, any): a block goes through every so many items.
extern "C" __global__ void __launch_bounds__(32 * SHARED_WARPS, 1) attention_shared_decode(const AttentionArgs args) {
    follow_between();
    u32 n_items = *args.n_items;
    for (u32 i = blockIdx.y; i < n_items; i += gridDim.y) {
        attend<SHARED, SHARED_WARPS>(args, args.items + i);
        // Shared memory is filled anew.
        __syncthreads();
    }
}
#endif

extern "C" __global__ void __launch_bounds__(32 * DECODE_WARPS, 1) attention_full_decode(const AttentionArgs args) {
    follow_between();
    attend<SPLITS, DECODE_WARPS>(args, 0);
}

extern "C" __global__ void __launch_bounds__(32 * DECODE_WARPS, 1) attention_sliding_decode(const AttentionArgs args) {
    follow_between();
    attend<WINDOW, DECODE_WARPS>(args, 0);
}

// The same for few rows. Grid and block as attention_row.cuh tells.
#if GROUP <= 16
extern "C" __global__ void __launch_bounds__(32 * ROW_WARPS, 3) attention_full_row(const AttentionArgs args) {
    attend_row<SPLITS>(args);
}

extern "C" __global__ void __launch_bounds__(32 * ROW_WARPS, 4) attention_sliding_row(const AttentionArgs args) {
    attend_row<WINDOW>(args);
}
#endif

// Folds a row's splits in position order and adds the sink. Grid (n_rows, n_heads HEAD_DIM / 1024 rounded
// up), block 256: a thread four outputs of a head.
extern "C" __global__ void __launch_bounds__(256) attention_merge(const AttentionArgs args) {
    follow_between();
    u32 r = blockIdx.x;
    u32 i = (blockIdx.y * 256 + threadIdx.x) * 4;
    Row row = args.rows[r];
    u32 split = args.shared != 0 ? args.shared[r].y : 0;
    if (row.sequence == NONE || i >= args.n_heads * HEAD_DIM) return;
    u32 head = i / HEAD_DIM, dim = i % HEAD_DIM;
    const float* from = args.partial + (((u64)r * args.n_heads + head) * args.max_splits + split) * (HEAD_DIM + 2);
    struct Split {
        float2 state, low, high;
        __device__ __forceinline__ void load(const float* from, u32 dim) {
            low = *(const float2*)(from + dim);
            high = *(const float2*)(from + dim + 2);
            state = *(const float2*)(from + HEAD_DIM);
        }
    };
    u32 n_splits = row.position / (TILE * SPLIT_TILES) + 1;
    State folded = {NEG_INFINITY, 0.0f};
    float o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    Split next;
    if (split < n_splits) next.load(from, dim);
    while (split < n_splits) {
        const Split now = next;
        from += HEAD_DIM + 2;
        // While this one is folded.
        if (++split < n_splits) next.load(from, dim);
        float2 factors = fold(folded, {now.state.x, now.state.y});
        o[0] = fold_output(o[0], now.low.x, factors);
        o[1] = fold_output(o[1], now.low.y, factors);
        o[2] = fold_output(o[2], now.high.x, factors);
        o[3] = fold_output(o[3], now.high.y, factors);
    }
    float factor = finish_factor(folded, vector_at(args.sinks, head));
    #pragma unroll
    for (int n = 0; n < 4; n++) o[n] = o[n] * factor / folded.sum;
    uint2 out = {f32x2_to_bf16x2(o[0], o[1]), f32x2_to_bf16x2(o[2], o[3])};
    *(uint2*)(args.out + ((u64)r * args.n_heads + head) * HEAD_DIM + dim) = out;
}
