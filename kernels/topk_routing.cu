// route: t = rmsnorm(x); logits = t W^T + bias in f32; the k greatest logits in order, ties to
// the lower expert; softmax over those k.
// group: entries (row * k + rank) sorted by expert, in order.
//
//   x        f32 [n_rows, hidden];  t bf16 [n_rows, hidden], written
//   weights  bf16 [n_experts, hidden], bias [n_experts]
//   experts  u32 [n_rows * k], NONE for padding rows;  gates f32 [n_rows * k]
//   offsets  u32 [n_experts + 1];  entries u32 [n_rows * k]
//
// route: grid (n_rows) or, route_8, (n_rows / 8), block 256, shared HIDDEN bf16 and n_experts
// floats a row. One warp an expert: the lanes' sums over k = 8 lane.., then a butterfly: one order
// whatever the batch.
// group: grid (n_experts), block 256.

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
};

// The k greatest of a row's logits and their softmax, by one warp; `logits` is used up.
__device__ __forceinline__ void choose_experts(const RouteArgs& args, u64 row, float* logits) {
    u32 lane = threadIdx.x % 32;
    u32* experts = args.experts + row * args.k;
    float* gates = args.gates + row * args.k;
    bool padding = args.rows[row].sequence == NONE;
    float greatest = 0.0f, gate_sum = 0.0f;
    for (u32 rank = 0; rank < args.k; rank++) {
        // Greatest first, the lower expert among equals; a NaN is never chosen before a number.
        float best = NEG_INFINITY;
        u32 at = NONE;
        for (u32 expert = lane; expert < args.n_experts; expert += 32) {
            float logit = logits[expert];
            if (logit > best || (at == NONE && logit == best)) {
                best = logit;
                at = expert;
            }
        }
        for (int mask = 16; mask > 0; mask >>= 1) {
            float other = __shfl_xor_sync(NONE, best, mask);
            u32 other_at = __shfl_xor_sync(NONE, at, mask);
            if (other_at != NONE && (at == NONE || other > best || (other == best && other_at < at))) {
                best = other;
                at = other_at;
            }
        }
        // All are NaN: any expert not chosen yet; the row's logits will not be finite.
        bool nan_row = at == NONE;
        if (nan_row) {
            at = rank;
            best = __int_as_float(0x7FC00000);
        }
        if (rank == 0) greatest = best;
        float gate = exp_fast(best - greatest);
        gate_sum += gate;
        if (lane == 0) {
            if (!nan_row) logits[at] = __int_as_float(0x7FC00000);
            experts[rank] = padding ? NONE : at;
            gates[rank] = gate;
        }
        __syncwarp();
    }
    for (u32 rank = lane; rank < args.k; rank += 32) gates[rank] = gates[rank] / gate_sum;
}

template <int ROWS> __device__ __forceinline__ void route_rows(const RouteArgs& args) {
    extern __shared__ __align__(16) u16 normed[];
    float* logits = (float*)(normed + ROWS * HIDDEN);
    __shared__ float scratch[8];
    u64 first_row = (u64)blockIdx.x * ROWS;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // One block brings the weights to L2 while the kernel before runs.
    if (first_row == 0) {
        for (u32 i = threadIdx.x; i < args.n_experts * HIDDEN / 64; i += 256) prefetch_l2(args.weights + i * 64);
    }
    follow_between();
    int n_rows = args.n_rows - first_row < ROWS ? (int)(args.n_rows - first_row) : ROWS;
    if constexpr (ROWS == 1) {
        RowValues values;
        values.load(args.x + first_row * HIDDEN);
        values.normalize(args.norm, args.eps, args.t + first_row * HIDDEN, normed, scratch);
    } else {
        static_assert(ROWS == 8, "a warp a row");
        u64 row = first_row + warp;
        if ((int)warp < n_rows) normalize_by_warp(args.x + row * HIDDEN, args.norm, args.eps, args.t + row * HIDDEN, normed + warp * HIDDEN);
    }
    __syncthreads();
    // Four experts at a time, so that many loads are under way. Past the last expert the last one
    // is read again; rows past the last are not told.
    for (u32 first = warp * 4; first < args.n_experts; first += 32) {
        float dots[ROWS][4];
        const u16* w[4];
        #pragma unroll
        for (u32 e = 0; e < 4; e++) {
            u32 expert = first + e < args.n_experts ? first + e : args.n_experts - 1;
            w[e] = args.weights + (u64)expert * HIDDEN;
            #pragma unroll
            for (int r = 0; r < ROWS; r++) dots[r][e] = 0.0f;
        }
        auto add = [&](u32 i) {
            uint4 a[4];
            #pragma unroll
            for (u32 e = 0; e < 4; e++) a[e] = *(const uint4*)(w[e] + i);
            #pragma unroll
            for (int r = 0; r < ROWS; r++) {
                uint4 b = *(const uint4*)(normed + r * HIDDEN + i);
                u32 tb[4] = {b.x, b.y, b.z, b.w};
                #pragma unroll
                for (u32 e = 0; e < 4; e++) {
                    u32 wa[4] = {a[e].x, a[e].y, a[e].z, a[e].w};
                    #pragma unroll
                    for (int j = 0; j < 4; j++) {
                        dots[r][e] = __fmaf_rn(__int_as_float((int)(wa[j] << 16)), __int_as_float((int)(tb[j] << 16)), dots[r][e]);
                        dots[r][e] = __fmaf_rn(__int_as_float((int)(wa[j] & 0xFFFF0000u)), __int_as_float((int)(tb[j] & 0xFFFF0000u)), dots[r][e]);
                    }
                }
            }
        };
        constexpr int AHEAD = ROWS == 1 ? 4 : 1;
        #pragma unroll AHEAD
        for (u32 chunk = 0; chunk < HIDDEN / 256; chunk++) add(chunk * 256 + lane * 8);
        if (HIDDEN % 256 != 0 && HIDDEN / 256 * 256 + lane * 8 < HIDDEN) add(HIDDEN / 256 * 256 + lane * 8);
        #pragma unroll
        for (int r = 0; r < ROWS; r++) {
            #pragma unroll
            for (u32 e = 0; e < 4; e++) {
                float dot = warp_sum(dots[r][e]);
                if (lane == 0 && first + e < args.n_experts) {
                    logits[r * args.n_experts + first + e] = dot + vector_at(args.bias, first + e);
                }
            }
        }
    }
    __syncthreads();
    if ((int)warp < n_rows) choose_experts(args, first_row + warp, logits + warp * args.n_experts);
}

extern "C" __global__ void __launch_bounds__(256) route(const RouteArgs args) { route_rows<1>(args); }

// Many rows: the weights are read once for eight of them.
extern "C" __global__ void __launch_bounds__(256) route_8(const RouteArgs args) { route_rows<8>(args); }

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
    // What is behind the last entry is no expert.
    auto four_at = [&](u32 i) {
        if (i + 4 <= n_entries) return *(const uint4*)(experts + i);
        uint4 four = {experts[i], NONE, NONE, NONE};
        if (i + 1 < n_entries) four.y = experts[i + 1];
        if (i + 2 < n_entries) four.z = experts[i + 2];
        return four;
    };
    #pragma unroll 4
    for (u32 i = first; i < end; i += 4) {
        uint4 e = four_at(i);
        less += (e.x < expert) + (e.y < expert) + (e.z < expert) + (e.w < expert);
        equal += (e.x == expert) + (e.y == expert) + (e.z == expert) + (e.w == expert);
    }
    u32 equal_before = equal;
    for (int step = 1; step < 32; step *= 2) {
        u32 other = __shfl_up_sync(NONE, equal_before, step);
        if ((int)lane >= step) equal_before += other;
    }
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
        uint4 e = four_at(i);
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
