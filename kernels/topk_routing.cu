// route: t = rmsnorm(x); logits = t W^T + bias in f32; the k greatest logits in order, ties to
// the lower expert; softmax over those k.
// group: entries (row * k + rank) sorted by expert, in order.
// gather: the same for products that stream their tokens: every expert's entries have places from
// an octet's first on, and each place its token, in tiles (common.cuh); the list of token tiles.
//
//   x        f32 [n_rows, hidden];  t bf16 [n_rows, hidden], written
//   weights  bf16 [n_experts, hidden], bias [n_experts]
//   experts  u32 [n_rows * k], NONE for padding rows;  gates f32 [n_rows * k]
//   offsets  u32 [n_experts + 1];  entries u32 [n_rows * k]
//   places   u32 [n_octets * 8], the entry of each place, NONE where it has none; behind the last
//            expert's octets nothing is written, nor the tokens of places without an entry
//   listed   token tiles [n_listed], those behind the last of no expert
//
// route, route_16: block 512; grid any: a block takes every gridDim.x-th tile of up to 8 or 16
// rows. Shared: n_slots * 32 KB of weights, 2 KB a row of sums, and with more than 32 experts a
// key for each of them a row.
// group: grid (n_experts), block 256.
// gather: grid (n_octets + 1, groups of 64 k / 16), block 256; shared: a count of each expert. A
// block brings 16 groups of an octet, and the last ones, which have none, list the tiles.
// Where entries are few each sorts as much as it needs for itself, for all have the time; many are
// sorted by `group` before.
//
// mma.sync with 32 experts as its rows and tokens as its columns. k is cut into pieces of 32, piece
// i to warp i % 16; of a piece, lane 4 g + t has k = 8 t..8 t + 7 of expert or token g: 16 bytes
// of a weight row, and 8 values of x that are normed in the registers they are multiplied from.
//
//   piece    k  0 .. 7 | 8 .. 15 | 16 .. 23 | 24 .. 31
//   lane t      0      | 1       | 2        | 3          (4 to one mma, 4 to the next)
//
// One order of the sums whatever the batch. Of squares: a lane's first fours and its second fours,
// pieces ascending; both; lanes t by butterfly; warps by halves (i and i + 8, then + 4, 2, 1). Of
// products: a warp's first mma's and its second ones, pieces ascending; both; warps by halves.

struct RouteArgs {
    const float* x;
    const vector_t* norm;
    u16* t;
    const u16* weights;
    const vector_t* bias;
    const Row* rows;
    u32* experts;
    float* gates;
    u32 n_experts;
    u32 k;
    u32 n_rows;
    float eps;
    // Rows of a tile.
    u32 tile_rows;
    // A warp's pieces of 32 experts' weights in shared memory: all there are, where they stay, or
    // AHEAD, or as many as there are if fewer, each of which is filled again when it has been read.
    u32 n_slots;
};

constexpr int WARPS = 16;
constexpr int N_PIECES = HIDDEN / 32;
// Of a warp.
constexpr int PIECES = (N_PIECES + WARPS - 1) / WARPS;
// From one of them to the next.
constexpr int STEP = WARPS * 32;

// src/engine/cuda/launch.rs has the same numbers.
#ifdef SMALL_SHARED
constexpr int AHEAD = 2;
#else
constexpr int AHEAD = 3;
#endif

struct __align__(16) Scales {
    vector_t v[8];
};

// Sum of 16 values: one order.
__device__ __forceinline__ float sum_of_warps(float (&v)[WARPS]) {
    #pragma unroll
    for (int i = 0; i < 8; i++) v[i] += v[i + 8];
    #pragma unroll
    for (int i = 0; i < 4; i++) v[i] += v[i + 4];
    return (v[0] + v[2]) + (v[1] + v[3]);
}

// A logit as an integer of the same order, above 0; 0 for NaN.
__device__ __forceinline__ u32 key_of(float logit) {
    if (logit != logit) return 0;
    // -0 becomes 0, its equal.
    u32 bits = (u32)__float_as_int(logit + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float logit_of(u32 key) {
    return __int_as_float((int)(key >> 31 ? key & 0x7FFFFFFFu : ~key));
}

// The greatest key among a lane's experts lane, lane + 32..; the lowest such expert.
struct Best {
    u32 key = 0, expert = NONE;
    __device__ __forceinline__ void offer(u32 of, u32 key_of_it) {
        if (key_of_it > key) {
            key = key_of_it;
            expert = of;
        }
    }
};

// The k greatest (32 at most) of a row's logits and their softmax, by one warp; `keys` are used up. With
// SHORT up to 32 experts have a way of their own.
template <bool SHORT> __device__ __forceinline__ void choose_experts(const RouteArgs& args, u64 row, bool padding, Best best, u32* keys) {
    u32 lane = threadIdx.x % 32;
    float greatest = 0.0f, gate_sum = 0.0f, own = 0.0f;
    u32 own_expert = 0;
    auto take = [&](u32 rank, u32 at, u32 key) {
        float logit = key == 0 ? __int_as_float(0x7FC00000) : logit_of(key);
        if (rank == 0) greatest = logit;
        float gate = exp_fast(logit - greatest);
        gate_sum += gate;
        if (lane == rank) {
            own = gate;
            own_expert = at;
        }
    };
    bool has_one = SHORT && args.n_experts <= 32;
    if (has_one) {
        #pragma unroll
        for (u32 rank = 0; rank < TOP_K; rank++) {
            u32 key = __reduce_max_sync(NONE, best.key);
            u32 at = __ffs(__ballot_sync(NONE, best.key == key)) - 1;
            if (lane == at) best.key = 0;
            // All are NaN: as below.
            take(rank, key == 0 ? rank : at, key);
        }
    }
    for (u32 rank = 0; !has_one && rank < args.k; rank++) {
        u32 key = __reduce_max_sync(NONE, best.key);
        u32 at = __reduce_min_sync(NONE, best.key == key ? best.expert : NONE);
        if (at == NONE) {
            // All are NaN: any expert; the row's logits will not be finite.
            at = rank;
        } else if (at == best.expert) {
            keys[at] = 0;
            best = Best();
            for (u32 expert = lane; expert < args.n_experts; expert += 32) best.offer(expert, keys[expert]);
        }
        take(rank, at, key);
    }
    if (lane < args.k) {
        args.experts[row * args.k + lane] = padding ? NONE : own_expert;
        args.gates[row * args.k + lane] = __fdividef(own, gate_sum);
    }
}

template <int OCTETS> __device__ __forceinline__ void route_rows(const RouteArgs& args) {
    constexpr int ROWS = OCTETS * 8;
    // A long row is read again from memory: x to norm it, t to multiply it.
    constexpr bool KEPT = OCTETS * PIECES <= 12;
    constexpr int N_KEPT = KEPT ? PIECES : 1, UNROLL = KEPT ? PIECES : 2;
    extern __shared__ __align__(16) u8 shared[];
    __shared__ __align__(16) float squares[ROWS][WARPS];
    __shared__ u32 sequences[WARPS];
    u32 thread, lane, warp, g, t, first_k;
    // Reads them anew, so that addresses are made where they are used: kept, they would take the
    // registers of values.
    auto forget = [&] {
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
        lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
        // A lane's first k of a row; its pieces are STEP apart.
        first_k = warp * 32 + t * 8;
    };
    forget();
    u32 n_experts = args.n_experts, n_slots = args.n_slots;
    uint4* held = (uint4*)shared;
    float* sums = (float*)(shared + n_slots * 4 * 512 * 16);
    auto has = [&](int i) { return N_PIECES % WARPS == 0 || i + 1 < PIECES || i * WARPS + (int)warp < N_PIECES; };
    // A set is 32 experts; the pieces of all sets go through the slots in order.
    u32 total = (n_experts + 31) / 32 * PIECES;
    // A lane reads just what it has copied, so nobody waits for others.
    auto copy_piece = [&](u32 at, u32 slot) {
        u32 expert = at / PIECES * 32 + g, i = at % PIECES;
        if (!has((int)i)) return;
        const u16* from = args.weights + (u64)expert * HIDDEN + first_k + i * STEP;
        #pragma unroll
        for (int e = 0; e < 4; e++) {
            copy_async16(shared_address(held + (slot * 4 + e) * 512 + thread), from + e * 8 * HIDDEN, expert + e * 8 < n_experts);
        }
    };
    for (u32 at = 0; at < n_slots || at < AHEAD; at++) {
        if (at < n_slots) copy_piece(at, at);
        copy_async_commit();
    }
    // One block brings the others to L2 while the kernel before runs.
    if (blockIdx.x == 0 && n_slots < total) {
        for (u32 i = thread; i < n_experts * HIDDEN / 64; i += 512) prefetch_l2(args.weights + i * 64);
    }
    auto scales_of = [&](int i) { return *(const Scales*)(args.norm + first_k + i * STEP); };
    constexpr bool SCALES_KEPT = OCTETS == 1 && PIECES <= 6 && sizeof(vector_t) == 2;
    Scales scales[SCALES_KEPT ? PIECES : 1];
    if constexpr (SCALES_KEPT) {
        #pragma unroll
        for (int i = 0; i < PIECES; i++) {
            if (has(i)) scales[i] = scales_of(i);
        }
    }
    follow_between();

    float4 x[OCTETS][N_KEPT][2];
    u32 tile_rows = OCTETS == 1 ? args.tile_rows : ROWS;
    u32 step = gridDim.x * tile_rows;
    auto has_row = [&](u32 tile, u32 row) { return row < tile_rows && tile + row < args.n_rows; };
    // Where the lane's values of an octet begin; past the last row they are the last one's.
    auto values_of = [&](u32 tile, u32 row) {
        u32 r = tile + (row < tile_rows ? row : tile_rows - 1);
        return (u64)(r < args.n_rows ? r : args.n_rows - 1) * HIDDEN + first_k;
    };
    auto load_piece = [&](const float* from, int i, float4 (&v)[2]) {
        const float4* piece = (const float4*)(from + i * STEP);
        const float4 zero = {0.0f, 0.0f, 0.0f, 0.0f};
        v[0] = has(i) ? piece[0] : zero;
        v[1] = has(i) ? piece[1] : zero;
    };
    auto load = [&](u32 tile) {
        if constexpr (KEPT) {
            #pragma unroll
            for (int o = 0; o < OCTETS; o++) {
                const float* from = args.x + values_of(tile, o * 8 + g);
                #pragma unroll
                for (int i = 0; i < PIECES; i++) load_piece(from, i, x[o][i]);
            }
        }
    };
    // A tile by its first row.
    u32 tile = blockIdx.x * tile_rows;
    load(tile);
    for (; tile < args.n_rows; tile += step) {
        forget();
        u32 sequence = has_row(tile, warp) ? args.rows[tile + warp].sequence : NONE;
        #pragma unroll
        for (int o = 0; o < OCTETS; o++) {
            float sum[2] = {0.0f, 0.0f};
            #pragma unroll UNROLL
            for (int i = 0; i < PIECES; i++) {
                if constexpr (!KEPT) load_piece(args.x + values_of(tile, o * 8 + g), i, x[o][0]);
                #pragma unroll
                for (int half = 0; half < 2; half++) {
                    float4 v = x[o][KEPT ? i : 0][half];
                    sum[half] = __fmaf_rn(v.x, v.x, sum[half]);
                    sum[half] = __fmaf_rn(v.y, v.y, sum[half]);
                    sum[half] = __fmaf_rn(v.z, v.z, sum[half]);
                    sum[half] = __fmaf_rn(v.w, v.w, sum[half]);
                }
            }
            float of_warp = sum[0] + sum[1];
            of_warp += __shfl_xor_sync(NONE, of_warp, 1);
            of_warp += __shfl_xor_sync(NONE, of_warp, 2);
            if (t == 0) squares[o * 8 + g][warp] = of_warp;
        }
        if (lane == 0) sequences[warp] = sequence;
        __syncthreads();
        // The next tile's rows are on their way to L2 while this one is multiplied.
        if (OCTETS > 1 && lane == 0 && has_row(tile + step, warp)) {
            prefetch_l2(args.x + (u64)(tile + step + warp) * HIDDEN, HIDDEN * 4);
        }
        float factor[OCTETS];
        #pragma unroll
        for (int o = 0; o < OCTETS; o++) {
            float4 four = *(const float4*)&squares[o * 8 + g][t * 4];
            float sum = (four.x + four.y) + (four.z + four.w);
            sum += __shfl_xor_sync(NONE, sum, 1);
            sum += __shfl_xor_sync(NONE, sum, 2);
            factor[o] = rsqrt_approx(sum * (1.0f / HIDDEN) + args.eps);
        }
        u16* to = args.t + (u64)(tile + g) * HIDDEN + first_k;
        uint4 b[OCTETS][N_KEPT];
        #pragma unroll UNROLL
        for (int i = 0; i < PIECES; i++) {
            if (!has(i)) continue;
            Scales s = SCALES_KEPT ? scales[SCALES_KEPT ? i : 0] : scales_of(i);
            #pragma unroll
            for (int o = 0; o < OCTETS; o++) {
                if constexpr (!KEPT) load_piece(args.x + values_of(tile, o * 8 + g), i, x[o][0]);
                const float4 (&v)[2] = x[o][KEPT ? i : 0];
                auto pair = [&](float low, float high, int at) {
                    return f32x2_to_bf16x2(low * factor[o] * vector_at(s.v, at), high * factor[o] * vector_at(s.v, at + 1));
                };
                uint4 eight = {pair(v[0].x, v[0].y, 0), pair(v[0].z, v[0].w, 2), pair(v[1].x, v[1].y, 4), pair(v[1].z, v[1].w, 6)};
                if (has_row(tile, o * 8 + g)) *(uint4*)(to + o * 8 * HIDDEN + i * STEP) = eight;
                b[o][KEPT ? i : 0] = eight;
            }
        }
        // One warp's sums of a row are used up when its keys are made.
        u32* keys = (u32*)(n_experts <= 32 ? sums + warp * 32 : sums + WARPS * ROWS * 32 + warp * n_experts);
        // Of the tile's first piece: those of earlier tiles went through them.
        u32 slot = OCTETS == 1 ? 0 : tile / step * total % n_slots;
        Best best;
        for (u32 first = 0; first < n_experts; first += 32) {
            // The sums of those before are read.
            if (first > 0) __syncthreads();
            u32 expert = first + lane;
            float bias = expert < n_experts ? vector_at(args.bias, expert) : 0.0f;
            // Of each tile of 16 experts and octet of tokens, by which four of a lane's eights.
            float c[2][OCTETS][2][4] = {};
            #pragma unroll UNROLL
            for (int i = 0; i < PIECES; i++) {
                copy_async_wait<AHEAD - 1>();
                if (has(i)) {
                    uint4 a[4];
                    #pragma unroll
                    for (int e = 0; e < 4; e++) a[e] = held[(slot * 4 + e) * 512 + thread];
                    #pragma unroll
                    for (int o = 0; o < OCTETS; o++) {
                        uint4 eight = b[o][KEPT ? i : 0];
                        // What this lane has written, or, past the last row, what does not count.
                        if constexpr (!KEPT) eight = *(const uint4*)(args.t + values_of(tile, o * 8 + g) + i * STEP);
                        #pragma unroll
                        for (int m = 0; m < 2; m++) {
                            const u32 low[4] = {a[2 * m].x, a[2 * m + 1].x, a[2 * m].y, a[2 * m + 1].y};
                            const u32 high[4] = {a[2 * m].z, a[2 * m + 1].z, a[2 * m].w, a[2 * m + 1].w};
                            mma_bf16(c[m][o][0], low, eight.x, eight.y);
                            mma_bf16(c[m][o][1], high, eight.z, eight.w);
                        }
                    }
                }
                if (n_slots < total) {
                    // Behind a tile's last piece comes the next tile's first.
                    u32 next = first / 32 * PIECES + i + n_slots;
                    if (OCTETS > 1 && next >= total) next -= total;
                    if (next < total) copy_piece(next, slot);
                }
                copy_async_commit();
                slot = slot + 1 == n_slots ? 0 : slot + 1;
            }
            forget();
            // sums [warp][row][expert], experts turned by the row so that lanes meet no bank twice.
            #pragma unroll
            for (int m = 0; m < 2; m++) {
                #pragma unroll
                for (int o = 0; o < OCTETS; o++) {
                    #pragma unroll
                    for (int j = 0; j < 4; j++) {
                        u32 row = o * 8 + t * 2 + j % 2, of = m * 16 + g + j / 2 * 8;
                        sums[(warp * ROWS + row) * 32 + (of ^ t * 8)] = c[m][o][0][j] + c[m][o][1][j];
                    }
                }
            }
            __syncthreads();
            // A warp a row.
            if (has_row(tile, warp)) {
                float of_warps[WARPS];
                #pragma unroll
                for (int i = 0; i < WARPS; i++) of_warps[i] = sums[(i * ROWS + warp) * 32 + (lane ^ warp / 2 % 4 * 8)];
                u32 key = expert < n_experts ? key_of(sum_of_warps(of_warps) + bias) : 0;
                __syncwarp();
                if (expert < n_experts) keys[expert] = key;
                best.offer(expert, key);
            }
        }
        // Behind the last tile nobody looks at them.
        if constexpr (OCTETS > 1) load(tile + step);
        if (has_row(tile, warp)) choose_experts<OCTETS == 1>(args, tile + warp, sequences[warp] == NONE, best, keys);
        // A block of few rows has but one tile.
        if constexpr (OCTETS == 1) return;
    }
    copy_async_wait<0>();
}

// The bound, more than the 512 threads there are, leaves registers to the blocks of the kernel before.
extern "C" __global__ void __launch_bounds__(544, 1) route(const RouteArgs args) { route_rows<1>(args); }

// Many rows: the weights are read once for sixteen of them.
extern "C" __global__ void __launch_bounds__(512, 1) route_16(const RouteArgs args) { route_rows<2>(args); }

// Four experts from the i-th on; what is behind the last entry is no expert.
__device__ __forceinline__ uint4 four_experts(const u32* experts, u32 n_entries, u32 i) {
    if (i + 4 <= n_entries) return *(const uint4*)(experts + i);
    uint4 four = {experts[i], NONE, NONE, NONE};
    if (i + 1 < n_entries) four.y = experts[i + 1];
    if (i + 2 < n_entries) four.z = experts[i + 2];
    return four;
}

// Sum over the lanes up to this one.
__device__ __forceinline__ u32 sum_of_lanes_to(u32 x) {
    for (int step = 1; step < 32; step *= 2) {
        u32 other = __shfl_up_sync(NONE, x, step);
        if ((int)(threadIdx.x % 32) >= step) x += other;
    }
    return x;
}

extern "C" __global__ void __launch_bounds__(256) group(
    const u32* experts, u32 n_entries, u32 n_experts, u32* offsets, u32* entries
) {
    __shared__ u32 sums[2][8];
    follow_between();
    u32 expert = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // A thread has consecutive entries, so that their order is kept; fours of them.
    u32 share = (n_entries + 1023) / 1024 * 4;
    u32 first = threadIdx.x * share;
    u32 end = first + share < n_entries ? first + share : n_entries;
    u32 less = 0, equal = 0;
    #pragma unroll 4
    for (u32 i = first; i < end; i += 4) {
        uint4 e = four_experts(experts, n_entries, i);
        less += (e.x < expert) + (e.y < expert) + (e.z < expert) + (e.w < expert);
        equal += (e.x == expert) + (e.y == expert) + (e.z == expert) + (e.w == expert);
    }
    u32 equal_before = sum_of_lanes_to(equal);
    for (int mask = 16; mask > 0; mask >>= 1) less += __shfl_xor_sync(NONE, less, mask);
    if (lane == 31) {
        sums[0][warp] = less;
        sums[1][warp] = equal_before;
    }
    __syncthreads();
    u32 start = 0, n_equal = 0, at = equal_before - equal;
    for (u32 w = 0; w < 8; w++) {
        start += sums[0][w];
        n_equal += sums[1][w];
        if (w < warp) at += sums[1][w];
    }
    at += start;
    #pragma unroll 4
    for (u32 i = first; i < end; i += 4) {
        uint4 e = four_experts(experts, n_entries, i);
        if (e.x == expert) entries[at++] = i;
        if (e.y == expert) entries[at++] = i + 1;
        if (e.z == expert) entries[at++] = i + 2;
        if (e.w == expert) entries[at++] = i + 3;
    }
    if (threadIdx.x == 0) {
        offsets[expert] = start;
        if (expert + 1 == n_experts) offsets[n_experts] = start + n_equal;
    }
}

struct GatherArgs {
    const u32* experts;
    // What `group` has made of many entries, NULL for few: a block sorts those for itself.
    const u32* offsets;
    const u32* entries;
    const u16* t;
    u32* places;
    u8* tiles;
    TokenTile* listed;
    u32 n_entries;
    u32 n_experts;
    u32 k;
    // Elements of a row of t.
    u32 n_k;
    u32 n_octets;
    // Octets of a token tile.
    u32 tile_octets;
    u32 n_listed;
};

// Groups of 64 k of an octet that a block brings; src/engine/cuda/places.rs has the same number.
constexpr u32 GATHERED_GROUPS = 16;

__device__ __forceinline__ u32 octets_of(u32 n_entries) { return (n_entries + 7) / 8; }

// All token tiles, by one warp.
__device__ __forceinline__ void list_token_tiles(const GatherArgs& args, const u32* counts) {
    u32 lane = threadIdx.x, first = 0, listed = 0;
    for (u32 of = 0; of < args.n_experts; of += 32) {
        u32 octets = of + lane < args.n_experts ? octets_of(counts[of + lane]) : 0;
        u32 n_tiles = (octets + args.tile_octets - 1) / args.tile_octets;
        u32 end = first + sum_of_lanes_to(octets), end_listed = listed + sum_of_lanes_to(n_tiles);
        for (u32 i = 0; i < n_tiles; i++) {
            args.listed[end_listed - n_tiles + i] = {of + lane, end - octets + i * args.tile_octets, end, 0};
        }
        first = __shfl_sync(NONE, end, 31);
        listed = __shfl_sync(NONE, end_listed, 31);
    }
    for (u32 i = listed + lane; i < args.n_listed; i += 32) args.listed[i] = {NONE, 0, 0, 0};
}

extern "C" __global__ void __launch_bounds__(256) gather(const GatherArgs args) {
    extern __shared__ u32 counts[];
    __shared__ u32 sums[8];
    __shared__ u32 entries[8];
    u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    for (u32 expert = thread; expert < args.n_experts; expert += 256) counts[expert] = 0;
    if (thread < 8) entries[thread] = NONE;
    follow_between();
    __syncthreads();
    bool sorted = args.offsets != 0;
    if (sorted) {
        for (u32 expert = thread; expert < args.n_experts; expert += 256) {
            counts[expert] = args.offsets[expert + 1] - args.offsets[expert];
        }
    }
    // A thread has consecutive entries, as in `group`; up to 1024 entries it has but one four.
    u32 share = (args.n_entries + 1023) / 1024 * 4;
    u32 first = thread * share;
    u32 end = sorted ? 0 : first + share < args.n_entries ? first + share : args.n_entries;
    auto count = [&](u32 expert) {
        if (expert != NONE) atomicAdd(counts + expert, 1);
    };
    for (u32 i = first; i < end; i += 4) {
        uint4 e = four_experts(args.experts, args.n_entries, i);
        count(e.x);
        count(e.y);
        count(e.z);
        count(e.w);
    }
    __syncthreads();
    u32 octet = blockIdx.x;
    if (octet == args.n_octets) {
        if (blockIdx.y == 0 && warp == 0) list_token_tiles(args, counts);
        return;
    }
    // Whose octet it is, and which of its octets; every warp finds it.
    u32 expert = NONE, of_expert = 0, before = 0;
    for (u32 of = 0; of < args.n_experts; of += 32) {
        u32 octets = of + lane < args.n_experts ? octets_of(counts[of + lane]) : 0;
        u32 end_octet = before + sum_of_lanes_to(octets);
        u32 ends_behind = __ballot_sync(NONE, end_octet > octet);
        if (ends_behind != 0) {
            u32 at = __ffs(ends_behind) - 1;
            expert = of + at;
            of_expert = octet - __shfl_sync(NONE, end_octet - octets, at);
            break;
        }
        before = __shfl_sync(NONE, end_octet, 31);
    }
    if (expert == NONE) return;
    if (sorted && thread < 8) {
        u32 at = args.offsets[expert] + of_expert * 8 + thread;
        if (at < args.offsets[expert + 1]) entries[thread] = args.entries[at];
    }
    u32 equal = 0;
    for (u32 i = first; i < end; i += 4) {
        uint4 e = four_experts(args.experts, args.n_entries, i);
        equal += (e.x == expert) + (e.y == expert) + (e.z == expert) + (e.w == expert);
    }
    u32 sum = sum_of_lanes_to(equal);
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    // Of the expert's entries the thread's next one is so many behind the octet's first; below it
    // the number is greater than any.
    u32 token = sum - equal - of_expert * 8;
    for (u32 w = 0; w < warp; w++) token += sums[w];
    auto place = [&](u32 of, u32 entry) {
        if (of != expert) return;
        if (token < 8) entries[token] = entry;
        token++;
    };
    for (u32 i = first; i < end && equal > 0; i += 4) {
        uint4 e = four_experts(args.experts, args.n_entries, i);
        place(e.x, i);
        place(e.y, i + 1);
        place(e.z, i + 2);
        place(e.w, i + 3);
    }
    __syncthreads();
    // Eight threads bring a token's 64 k, 64 an octet's.
    u32 chunk = thread % 8;
    token = thread / 8 % 8;
    u32 entry = entries[token];
    if (blockIdx.y == 0 && thread < 8) args.places[octet * 8 + thread] = entries[thread];
    if (entry == NONE) return;
    const u16* row = args.t + (u64)(entry / args.k) * args.n_k;
    u32 first_group = blockIdx.y * GATHERED_GROUPS + thread / 64;
    uint4 values[GATHERED_GROUPS / 4];
    #pragma unroll
    for (u32 i = 0; i < GATHERED_GROUPS / 4; i++) {
        u32 k = (first_group + i * 4) * 64 + chunk * 8;
        values[i] = k < args.n_k ? *(const uint4*)(row + k) : uint4{0, 0, 0, 0};
    }
    #pragma unroll
    for (u32 i = 0; i < GATHERED_GROUPS / 4; i++) {
        u32 group = first_group + i * 4;
        if (group * 64 >= args.n_k) return;
        *(uint4*)(args.tiles + chunk_at((u64)group * args.n_octets + octet, token, chunk)) = values[i];
    }
}
