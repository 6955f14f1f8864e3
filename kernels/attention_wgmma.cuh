// Attention of a prefill pass, and of pages that rows of a step share, by the warpgroup instructions
// of sm_90a, for a head dim of 64: the arithmetic of attention.cu, query by query, so the same bits.
//
// A block has ATTENTION_WARPGROUPS x WARPGROUP_ROWS rows under one KV head: consecutive ones of one
// sequence, or those of a shared item. A warpgroup's 64 queries are the M of wgmma, and its warps hold
// scores and outputs as those of attention.cu do. Q and P are the A operand, in registers. A tile's
// 64 keys are B as they lie, 128 bytes of a key one swizzled row; its values lie alike and are B with
// dims, not keys, along the rows, which the instruction turns.
//
//   shared memory   stages [STAGES][K 64 | V 64][64], what is folded so far [warp][9][lane][4] f32
//
// All threads fill the stages by cp.async, a tile two ahead of its use, and zeros take the place of
// what no query sees. Of shared items every key is seen: tensor copies fill the stages, which one thread
// asks for, six tiles ahead. No barrier holds the block together: `full` of a stage is told by every
// warp that its own copies are there, or counts the tensor copies' bytes, `empty` that a warp has left
// the stage behind, so one warpgroup is at its exponentials while the other multiplies, and so are the
// two blocks of a multiprocessor:
//
//   scores of tile n | tell of n + 1, ask for n + AHEAD | wait | exponentials | outputs of tile n | ...
//
// The outputs of a tile and the scores of the next are multiplied in one go. A warpgroup takes part
// in the filling of tiles that only the other's queries see, and goes through no others.
//
// Grid (blocks of rows, n_kv_heads), the last rows, which see most, first; two blocks of 256 threads
// a multiprocessor. Of a step: (n_kv_heads, any), a block goes through every so many items. The scheme
// is FlashAttention-3's (arXiv 2407.08608) with blocks in place of turns.

#if defined(WARPGROUPS) && HEAD_DIM == 64 && GROUP <= 64
#define ATTENTION_WARPGROUPS 2
#define WARPGROUP_ROWS (64 / GROUP)
// Of a warp: outputs [8][lane][4] f32, two states a lane.
#define FOLDED_BYTES (9 * 32 * 16)

// c += a b, or c = a b where not `adds`; rows of b are of the 16 that are summed over.
__device__ __forceinline__ void wgmma_bf16_turned(float (&c)[8][4], const u32 (&a)[4], u64 b, u32 adds) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" R32 "}, {" R4(32, 33, 34, 35) "}, %36, p, 1, 1, 1;}"
                 : C8(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));
}

// Sums may be read from here on, not before.
__device__ __forceinline__ void settle(float (&c)[8][4]) {
    #pragma unroll
    for (int n = 0; n < 8; n++)
        #pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+f"(c[n][i]) :: "memory");
}

// x / d, rounded as division rounds: its own steps behind a reciprocal that is made once. They are
// exact (Markstein 1990) where no remainder falls out of f32's range.
__device__ __forceinline__ void divide(float (&x)[16], float d) {
    float least = __int_as_float(0x7F800000), most = 0.0f;
    #pragma unroll
    for (int i = 0; i < 16; i++) {
        least = fminf(fabsf(x[i]), least);
        most = fmaxf(fabsf(x[i]), most);
    }
    if (least >= 0x1p-80f && most <= 0x1p80f && d >= 0x1p-20f && d <= 0x1p40f) {
        float reciprocal = 1.0f / d;
        #pragma unroll
        for (int i = 0; i < 16; i++) {
            float quotient = x[i] * reciprocal;
            quotient = __fmaf_rn(__fmaf_rn(-d, quotient, x[i]), reciprocal, quotient);
            x[i] = __fmaf_rn(__fmaf_rn(-d, quotient, x[i]), reciprocal, quotient);
        }
    } else {
        #pragma unroll
        for (int i = 0; i < 16; i++) x[i] = x[i] / d;
    }
}

// A block's keys and values on their way through shared memory; tiles are counted from the block's
// first, or the item's.
template <Mode MODE> struct TileStages {
    static constexpr bool SLIDING = MODE == WINDOW;
    static constexpr int THREADS = 128 * ATTENTION_WARPGROUPS, WARPS = THREADS / 32;
    static constexpr int STAGES = MODE == SHARED ? 8 : 4, AHEAD = STAGES - 2;
    static constexpr int MATRIX_BYTES = TILE * 128, STAGE_BYTES = 2 * MATRIX_BYTES;
    static constexpr int BYTES = STAGES * STAGE_BYTES;
    // A thread copies the same 16-byte chunk of keys so far apart.
    static constexpr int APART = THREADS / 8;

    u32 stages, full, empty;
    u32 is_first_lane;
    // Tiles of the items before.
    u32 before;
    // Of the block: its first tile and how many there are, the positions that some query sees.
    int first_tile, n_tiles, lowest, last;
    // The thread's first key of a tile, where its chunk goes in a stage, and where it comes from in
    // the ring or the first page.
    int key;
    u32 to;
    const u8* cached;
    // Full layers: the sequence's pages, bytes of a page.
    const u32* pages;
    u32 page_bytes;
    // Shared items: the cache, heads of all layers of a page, and which this is.
    const TensorMap* map;
    u32 page_heads, head;
    // Sliding layers: the chunk in the keys of this pass, bytes from key to key and from key to value.
    const u8* of_pass;
    u32 row_bytes, to_value_of_pass, ring;
    int segment_position;

    // How many tiles the stages had before tile n.
    __device__ __forceinline__ u32 count(int n) const { return MODE == SHARED ? before + (u32)n : (u32)n; }
    __device__ __forceinline__ u32 stage(int n) const { return count(n) % STAGES; }

    // Asks for a tile, if there is such.
    __device__ __forceinline__ void ask(int n) const {
        if (MODE == SHARED) {
            if (threadIdx.x == 0 && n < n_tiles) ask_by_map(n);
            __syncwarp();
            return;
        }
        if (n < n_tiles) {
            u32 tile = first_tile + n;
            // The tile before it there has been left behind.
            if (n >= STAGES) barrier_wait(empty + 8 * stage(n), (count(n) / STAGES + 1) & 1);
            u32 at = to + stage(n) * STAGE_BYTES;
            // A tile lies in one page, and in one run of a ring.
            const u8* from = cached;
            if (SLIDING) from += tile * TILE % ring * 128;
            else from += (u64)pages[tile / SPLIT_TILES] * page_bytes + tile % SPLIT_TILES * (TILE * 128);
            #pragma unroll
            for (int i = 0; i < TILE / APART; i++) {
                int position = (int)tile * TILE + key + i * APART;
                // What no query of the block sees is zeros, whatever the cache holds there.
                bool seen = position <= last && (!SLIDING || position >= lowest);
                const u8* from_key = from + i * APART * 128;
                u32 to_value = (SLIDING ? ring : 256) * 128;
                if (SLIDING && position >= segment_position) {
                    from_key = of_pass + (u64)(u32)(position - segment_position) * row_bytes;
                    to_value = to_value_of_pass;
                }
                copy_async16(at + i * APART * 128, from_key, seen);
                copy_async16(at + i * APART * 128 + MATRIX_BYTES, from_key + to_value, seen);
            }
        }
        copy_async_commit();
    }

    __device__ __forceinline__ void ask_by_map(int n) const {
        u32 tile = first_tile + n, barrier = full + 8 * stage(n), to = stages + stage(n) * STAGE_BYTES;
        if (count(n) >= STAGES) barrier_wait(empty + 8 * stage(n), (count(n) / STAGES + 1) & 1);
        // 256 keys of a page, then as many values.
        u32 row = (pages[tile / SPLIT_TILES] * page_heads + head) * (2 * 256) + tile % SPLIT_TILES * TILE;
        barrier_expect(barrier, STAGE_BYTES);
        copy_tensor(to, map, 0, (int)row, barrier);
        copy_tensor(to + MATRIX_BYTES, map, 0, (int)row + 256, barrier);
    }

    // Waits until at most `PENDING` tiles are under way, and tells that the warp's copies of tile n,
    // the latest other one, are there.
    template <int PENDING> __device__ __forceinline__ void tell(int n) const {
        if (MODE == SHARED) return;
        copy_async_wait<PENDING>();
        fence_matrix_units();
        __syncwarp();
        barrier_arrive_if(full + 8 * stage(n), is_first_lane && n < n_tiles);
    }

    __device__ __forceinline__ void wait(int n) const { barrier_wait(full + 8 * stage(n), count(n) / STAGES & 1); }

    // Tells that the warp has left a tile behind.
    __device__ __forceinline__ void leave(int n) const {
        barrier_arrive_if(empty + 8 * stage(n), is_first_lane && n >= 0);
    }

    // A tile that no query of the warpgroup sees.
    __device__ __forceinline__ void pass(int n) const {
        if (MODE == SHARED) wait(n);
        tell<0>(n + 1);
        ask(n + AHEAD);
        leave(n - 1);
    }

    // Address and strides for the matrix units: rows of 128 bytes, swizzled, eight of them 1024
    // bytes. Steps of 16 dims of the keys are 32 bytes apart, of 16 values 16 rows.
    __device__ __forceinline__ u64 keys(int n) const {
        return (u64)(stages + stage(n) * STAGE_BYTES >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62;
    }
    __device__ __forceinline__ u64 values(int n) const { return keys(n) + MATRIX_BYTES / 16; }
};

// FULL and WINDOW: all keys of a block of rows. SHARED: an item, behind others of so many tiles.
template <Mode MODE>
__device__ __forceinline__ void attend_by_warpgroups(const AttentionArgs& args, const SharedItem* item, u32 before) {
    typedef TileStages<MODE> Tiles;
    constexpr bool SLIDING = MODE == WINDOW;
    constexpr int STAGES = Tiles::STAGES;
    extern __shared__ __align__(16) u16 shared[];
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    uint2 block = make_uint2(0, 0);
    if (MODE != SHARED) block = args.blocks[gridDim.x - 1 - blockIdx.x];
    u32 row0 = MODE == SHARED ? item->rows[0] : block.x;
    int n_rows = (int)(MODE == SHARED ? item->n_rows : block.y);
    Row first = args.rows[row0];
    if (MODE == SHARED) first.sequence = item->sequence;
    if (first.sequence == NONE) return;
    int thread = (int)threadIdx.x;
    int lane = thread % 32, warp = __shfl_sync(NONE, thread / 32, 0);
    int g = lane / 4, t = lane % 4;
    u32 kv_head = MODE == SHARED ? blockIdx.x : blockIdx.y;
    u32 width = (args.n_heads + 2 * args.n_kv_heads) * HEAD_DIM;
    int position0 = (int)first.position;

    u8* stages = (u8*)shared + (0 - shared_address(shared) & 1023);
    Tiles tiles;
    tiles.stages = shared_address(stages);
    tiles.full = shared_address(barriers);
    tiles.empty = tiles.full + 8 * STAGES;
    tiles.is_first_lane = lane == 0;
    tiles.before = before;
    tiles.last = position0 + n_rows - 1;
    auto lowest_of = [&](int position) { return SLIDING && position - (int)args.window + 1 > 0 ? position - (int)args.window + 1 : 0; };
    tiles.lowest = lowest_of(position0);
    tiles.first_tile = tiles.lowest / TILE;
    tiles.n_tiles = tiles.last / TILE + 1 - tiles.first_tile;
    if (MODE == SHARED) {
        tiles.first_tile = (int)item->first_split * SPLIT_TILES;
        tiles.n_tiles = (int)item->n_splits * SPLIT_TILES;
    }
    tiles.key = thread / 8;
    u32 chunk = (u32)thread % 8;
    tiles.to = tiles.stages + tiles.key * 128 + ((chunk ^ tiles.key) & 7) * 16;
    u32 head_bytes = 2 * (SLIDING ? args.ring : 256) * 128;
    tiles.page_bytes = args.n_layers * args.n_kv_heads * head_bytes;
    tiles.cached = (const u8*)args.cache + (u64)(args.layer * args.n_kv_heads + kv_head) * head_bytes + tiles.key * 128 + chunk * 16;
    if (SLIDING) tiles.cached += (u64)first.sequence * tiles.page_bytes;
    // A sum that is kept, not made again for every tile.
    asm("" : "+l"(tiles.cached));
    tiles.pages = args.page_table + (u64)first.sequence * args.max_pages;
    tiles.map = &args.cache_map;
    tiles.page_heads = args.n_layers * args.n_kv_heads;
    tiles.head = args.layer * args.n_kv_heads + kv_head;
    tiles.ring = args.ring;
    // From the segment's first row on keys are in qkv, too.
    tiles.segment_position = position0 - (int)(row0 - first.segment_row);
    tiles.row_bytes = width * 2;
    tiles.of_pass = (const u8*)(args.qkv + (u64)first.segment_row * width + (args.n_heads + kv_head) * HEAD_DIM) + chunk * 16;
    tiles.to_value_of_pass = args.n_kv_heads * 128;
    if (thread == 0 && before == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(tiles.full + 8 * stage, MODE == SHARED ? 1 : Tiles::WARPS);
            barrier_init(tiles.empty + 8 * stage, Tiles::WARPS);
        }
        fence_matrix_units();
    }
    #pragma unroll
    for (int n = 0; n < Tiles::AHEAD; n++) tiles.ask(n);

    // The warpgroup's rows, and the tiles that they see.
    int warpgroup_row = warp / 4 * WARPGROUP_ROWS;
    row0 += warpgroup_row;
    position0 += warpgroup_row;
    n_rows -= warpgroup_row;
    n_rows = n_rows < WARPGROUP_ROWS ? n_rows : WARPGROUP_ROWS;
    int begin = tiles.n_tiles, end = tiles.n_tiles;
    if (n_rows > 0) {
        begin = MODE == SHARED ? 0 : lowest_of(position0) / TILE - tiles.first_tile;
        if (MODE != SHARED) end = (position0 + n_rows - 1) / TILE + 1 - tiles.first_tile;
    }
    auto row_of = [&](int row) { return MODE == SHARED ? item->rows[warpgroup_row + row] : row0 + row; };
    // The warp's first query; the lane's two.
    int query0 = warp % 4 * 16;
    int high[2];
    u32 q[HEAD_DIM / 16][4];
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        int query = query0 + g + 8 * i;
        int row = query / GROUP;
        high[i] = position0 + row;
        // Those that are none take the first row's.
        const u16* from = args.qkv + (u64)(row < n_rows ? row_of(row) : MODE == SHARED ? item->rows[0] : block.x) * width + (kv_head * GROUP + query % GROUP) * HEAD_DIM;
        #pragma unroll
        for (int step = 0; step < HEAD_DIM / 16; step++) {
            q[step][i] = *(const u32*)(from + step * 16 + 2 * t);
            q[step][i + 2] = *(const u32*)(from + step * 16 + 8 + 2 * t);
        }
    }
    // The least position of the warp's queries, and the greatest first key that one sees.
    int warp_end = (query0 + 15) / GROUP;
    int warp_position = position0 + query0 / GROUP;
    int warp_low = lowest_of(position0 + (warp_end < n_rows ? warp_end : n_rows - 1));

    float scale = args.scale * LOG2_E;
    // No launch has so many layers; the compiler does not know.
    u32 zero = args.n_layers >> 31;
    float o[HEAD_DIM / 8][4];
    // What the splits so far are folded to: outputs, and the states of the lane's queries. The
    // warp's own; in the end its outputs lie there in rows.
    u8* of_warp = stages + Tiles::BYTES + warp * FOLDED_BYTES;
    float4* o_folded = (float4*)of_warp + lane;
    __syncthreads();
    tiles.template tell<1>(0);
    int n = 0;
    #pragma unroll 1
    for (; n < begin; n++) tiles.pass(n);
    while (n < end) {
        // A split.
        State state[2] = {{NEG_INFINITY, 0.0f}, {NEG_INFINITY, 0.0f}};
        bool is_first = n == begin;
        int split_end = SLIDING || end - n < SPLIT_TILES ? end : n + SPLIT_TILES;
        u32 goes_on = 0;
        for (; n < split_end; n++) {
            tiles.wait(n);
            float s[TILE / 8][4];
            wgmma_fence();
            #pragma unroll
            for (int step = 0; step < HEAD_DIM / 16; step++) wgmma_bf16(s, q[step], tiles.keys(n) + step * 2, step > 0);
            wgmma_commit();
            tiles.template tell<0>(n + 1);
            tiles.ask(n + Tiles::AHEAD);
            wgmma_wait<0>();
            settle(s);
            settle(o);
            tiles.leave(n - 1);
            // Every query of the warp sees every key of the tile.
            int position = (tiles.first_tile + n) * TILE;
            bool all_seen = MODE == SHARED || position + TILE - 1 <= warp_position && (!SLIDING || position >= warp_low);
            if (!all_seen) {
                int low[2] = {lowest_of(high[0]), lowest_of(high[1])};
                hide(s, position + 2 * t, low, high);
            }
            float decay[2];
            #pragma unroll
            for (int i = 0; i < 2; i++) decay[i] = soften(s, i, state[i], scale);
            u32 p[TILE / 16][4];
            #pragma unroll
            for (int step = 0; step < TILE / 16; step++) pack_exponentials(p[step], s, step);
            if (goes_on) {
                #pragma unroll
                for (int m = 0; m < HEAD_DIM / 8; m++)
                    #pragma unroll
                    for (int i = 0; i < 4; i++) o[m][i] *= decay[i / 2];
            }
            wgmma_fence();
            #pragma unroll
            for (int step = 0; step < TILE / 16; step++) {
                wgmma_bf16_turned(o, p[step], tiles.values(n) + step * (16 * 128 / 16), step > 0 ? 1 : goes_on);
            }
            wgmma_commit();
            if (SLIDING) wgmma_wait<0>();
            goes_on = 1;
            // Nothing, but NVRTC 13.0 would give P the registers of queries that it sees read alone.
            #pragma unroll
            for (int step = 0; step < HEAD_DIM / 16; step++)
                #pragma unroll
                for (int i = 0; i < 4; i++) q[step][i] ^= zero;
        }
        wgmma_wait<0>();
        settle(o);
        State folded[2] = {{NEG_INFINITY, 0.0f}, {NEG_INFINITY, 0.0f}};
        if (!is_first) {
            float4 states = o_folded[HEAD_DIM / 8 * 32];
            folded[0].max = states.x, folded[0].sum = states.y;
            folded[1].max = states.z, folded[1].sum = states.w;
        }
        float2 factors[2];
        #pragma unroll
        for (int i = 0; i < 2; i++) factors[i] = fold(folded[i], state[i]);
        o_folded[HEAD_DIM / 8 * 32] = make_float4(folded[0].max, folded[0].sum, folded[1].max, folded[1].sum);
        #pragma unroll
        for (int m = 0; m < HEAD_DIM / 8; m++) {
            float4 so_far = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (!is_first) so_far = o_folded[m * 32];
            o[m][0] = fold_output(so_far.x, o[m][0], factors[0]);
            o[m][1] = fold_output(so_far.y, o[m][1], factors[0]);
            o[m][2] = fold_output(so_far.z, o[m][2], factors[1]);
            o[m][3] = fold_output(so_far.w, o[m][3], factors[1]);
            if (n < end) o_folded[m * 32] = make_float4(o[m][0], o[m][1], o[m][2], o[m][3]);
        }
    }
    #pragma unroll 1
    for (; n < tiles.n_tiles; n++) tiles.pass(n);
    if (MODE == SHARED) tiles.leave(n - 1);
    if (end == begin) return;
    float4 states = o_folded[HEAD_DIM / 8 * 32];
    State folded[2] = {{states.x, states.y}, {states.z, states.w}};
    if (MODE == SHARED) {
        // In the place of the item's last split.
        u32 split = item->first_split + item->n_splits - 1;
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            int query = query0 + g + 8 * i;
            if (query / GROUP >= n_rows) continue;
            u32 row = row_of(query / GROUP);
            if (args.rows[row].sequence == NONE) continue;
            float* to = args.partial + (((u64)row * args.n_heads + kv_head * GROUP + query % GROUP) * args.max_splits + split) * (HEAD_DIM + 2);
            #pragma unroll
            for (int m = 0; m < HEAD_DIM / 8; m++) *(float2*)(to + m * 8 + 2 * t) = make_float2(o[m][2 * i], o[m][2 * i + 1]);
            if (t == 0) *(float2*)(to + HEAD_DIM) = make_float2(folded[i].max, folded[i].sum);
        }
        return;
    }

    // Rows of 64 outputs with their chunks of 16 bytes swizzled, then 16 bytes a lane. The block is read
    // again: registers are few in the loops above.
    block = args.blocks[gridDim.x - 1 - blockIdx.x];
    row0 = block.x + warp / 4 * WARPGROUP_ROWS;
    n_rows = (int)block.y - warp / 4 * WARPGROUP_ROWS;
    __syncwarp();
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        int query = g + 8 * i;
        float factor = finish_factor(folded[i], vector_at(args.sinks, kv_head * GROUP + (query0 + query) % GROUP));
        float outputs[16];
        #pragma unroll
        for (int m = 0; m < 16; m++) outputs[m] = o[m / 2][2 * i + m % 2] * factor;
        divide(outputs, folded[i].sum);
        #pragma unroll
        for (int m = 0; m < 8; m++) {
            *(u32*)(of_warp + query * 128 + (m ^ g) * 16 + t * 4) = f32x2_to_bf16x2(outputs[2 * m], outputs[2 * m + 1]);
        }
    }
    __syncwarp();
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        int query = i * 4 + lane / 8;
        int row = (query0 + query) / GROUP;
        u16* out = args.out + ((u64)(row0 + row) * args.n_heads + kv_head * GROUP + (query0 + query) % GROUP) * HEAD_DIM;
        uint4 outputs = *(const uint4*)(of_warp + query * 128 + ((lane ^ query) & 7) * 16);
        if (row < n_rows && row < WARPGROUP_ROWS) *(uint4*)(out + lane % 8 * 8) = outputs;
    }
}
#endif
