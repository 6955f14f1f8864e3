// What the kernels that route share (topk_routing.cu, layer_step.cu): how a row of the residual is
// cut among sixteen warps, the order of their sums, the choice of the greatest logits.

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

// The k greatest (32 at most) of a row's logits and their softmax, by one warp; `keys` are used up.
__device__ __forceinline__ void choose_experts(const RouteArgs& args, u64 row, bool padding, Best best, u32* keys) {
    u32 lane = threadIdx.x % 32;
    float greatest = 0.0f, gate_sum = 0.0f, own = 0.0f;
    u32 own_expert = 0;
    for (u32 rank = 0; rank < args.k; rank++) {
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
        float logit = key == 0 ? __int_as_float(0x7FC00000) : logit_of(key);
        if (rank == 0) greatest = logit;
        float gate = exp_fast(logit - greatest);
        gate_sum += gate;
        if (lane == rank) {
            own = gate;
            own_expert = at;
        }
    }
    if (lane < args.k) {
        args.experts[row * args.k + lane] = padding ? NONE : own_expert;
        args.gates[row * args.k + lane] = __fdividef(own, gate_sum);
    }
}

// What eight values of a row add to the sums of squares of its lane's first and second fours.
__device__ __forceinline__ void add_squares(const float4 (&v)[2], float (&sums)[2]) {
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        sums[half] = __fmaf_rn(v[half].x, v[half].x, sums[half]);
        sums[half] = __fmaf_rn(v[half].y, v[half].y, sums[half]);
        sums[half] = __fmaf_rn(v[half].z, v[half].z, sums[half]);
        sums[half] = __fmaf_rn(v[half].w, v[half].w, sums[half]);
    }
}
// The warp's sum of a row's squares, of those of its lanes t.
__device__ __forceinline__ float squares_of_warp(const float (&sums)[2]) {
    float of_warp = sums[0] + sums[1];
    of_warp += __shfl_xor_sync(NONE, of_warp, 1);
    return of_warp + __shfl_xor_sync(NONE, of_warp, 2);
}
// What a row is multiplied by to be normed, of the sums of squares of the warps; t = lane % 4.
__device__ __forceinline__ float factor_of_row(const float* squares, u32 t, float eps) {
    float4 four = *(const float4*)&squares[t * 4];
    float sum = (four.x + four.y) + (four.z + four.w);
    sum += __shfl_xor_sync(NONE, sum, 1);
    sum += __shfl_xor_sync(NONE, sum, 2);
    return rsqrt_approx(sum * (1.0f / HIDDEN) + eps);
}
// Eight values normed and rounded.
__device__ __forceinline__ uint4 norm_eight(const float4 (&v)[2], float factor, const Scales& s) {
    auto pair = [&](float low, float high, int at) {
        return f32x2_to_bf16x2(low * factor * vector_at(s.v, at), high * factor * vector_at(s.v, at + 1));
    };
    return {pair(v[0].x, v[0].y, 0), pair(v[0].z, v[0].w, 2), pair(v[1].x, v[1].y, 4), pair(v[1].z, v[1].w, 6)};
}
