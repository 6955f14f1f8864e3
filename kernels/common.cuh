// Conversions, reductions of one fixed order, and the records shared with the host. Nothing of
// the model. Put in front of every kernel, behind `ptx.cuh`.

#define NONE 0xFFFFFFFFu
#define NEG_INFINITY __int_as_float(0xFF800000)

// Norms, biases and sinks: bf16 as released, f32 where the checkpoint holds f32.
#ifdef VECTORS_F32
typedef float vector_t;
__device__ __forceinline__ float vector_at(const vector_t* v, u64 i) { return v[i]; }
#else
typedef u16 vector_t;
__device__ __forceinline__ float vector_at(const vector_t* v, u64 i) {
    return __int_as_float((int)((u32)v[i] << 16));
}
#endif

__device__ __forceinline__ float bf16_to_f32(u16 bits) {
    return __int_as_float((int)((u32)bits << 16));
}

// e^x through the base-2 unit.
__device__ __forceinline__ float exp_fast(float x) {
    return exp2_approx(x * 1.44269504088896341f);
}

// A row of a pass. All fields are indices; `sequence` is NONE for padding.
struct Row {
    u32 sequence;
    u32 position;
    // First row of its segment (consecutive positions of one sequence) and the row behind it.
    u32 segment_row;
    u32 segment_end;
};

// Past the multiprocessor's own cache: where a kernel reads before it waits for the one before it, an earlier
// step may have left its own there.
__device__ __forceinline__ Row load_row(const Row* row) {
    uint4 v = load_l2((const uint4*)row);
    return {v.x, v.y, v.z, v.w};
}

// Tokens as tiles, the way products that stream read them: for each 64 k, octets of tokens; a
// token's 64 k are eight chunks of 16 bytes, swizzled by its number in the octet.
//
//   tiles  bf16 [groups of 64 k][octets][8 tokens][8 chunks], zeros behind the last k
//
// So 64 k of any run of octets are one run of bytes, and lie as the matrix units want them.
#define OCTET_BYTES 1024

// Where a chunk of a token is, in bytes; `octet` counts those of the groups before, too.
__device__ __forceinline__ u64 chunk_at(u64 octet, u32 token, u32 chunk) {
    return octet * OCTET_BYTES + token * 128 + (chunk ^ token) * 16;
}

// Octets first.. of the tokens of an expert, whose last octet is before `end`: as many as a block
// takes. `expert` is NONE for no tile.
struct __align__(16) TokenTile {
    u32 expert;
    u32 first;
    u32 end;
    u32 padding;
};

__device__ __forceinline__ TokenTile load_token_tile(const TokenTile* tile) {
    uint4 v = load_l2((const uint4*)tile);
    return {v.x, v.y, v.z, v.w};
}

// A matrix of rows in memory, as the tensor copies know it: CUtensorMap of the driver.
struct __align__(64) TensorMap { u64 opaque[16]; };

// A slot as it decodes; the same layout as `Slot` in src/engine/cuda/decode.rs.
struct Slot {
    u64 seed;
    u64 row_hash;
    // top-p as a share of 2^53.
    u64 top_p_share;
    u32 live;
    u32 token;
    u32 position;
    u32 n_generated;
    u32 max_new_tokens;
    u32 sample;
    float temperature;
    u32 top_k;
    u32 keeps_p;
    u32 n_stop;
    u32 stop[32];
};

// Orders as the number does, above 0; -0 equals +0.
__device__ __forceinline__ u32 order_key(float x) {
    u32 bits = (u32)__float_as_int(x + 0.0f);
    u32 sign = (u32)((int)bits >> 31);
    return bits ^ (sign | 0x80000000u);
}
__device__ __forceinline__ float value_of_key(u32 key) {
    return __int_as_float((int)(key & 0x80000000u ? key ^ 0x80000000u : ~key));
}

__device__ __forceinline__ float warp_sum(float x) {
    for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(NONE, x, mask);
    return x;
}

// Sum over a block of 256 threads: warps by butterfly, then the eight warps in order.
__device__ __forceinline__ float block_sum_256(float x, float* scratch) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = scratch[0];
    for (int warp = 1; warp < 8; warp++) sum += scratch[warp];
    __syncthreads();
    return sum;
}

#ifdef HIDDEN
// A row of the residual in the registers of a block of 256 threads, four values at a time.
struct RowValues {
    static constexpr int N = (HIDDEN / 4 + 255) / 256;
    float4 v[N];

    // Whether the thread has an n-th four, and where it begins.
    __device__ static __forceinline__ bool has(int n) {
        return HIDDEN / 4 % 256 == 0 || n + 1 < N || n * 256 + (int)threadIdx.x < HIDDEN / 4;
    }
    __device__ static __forceinline__ int at(int n) { return (n * 256 + (int)threadIdx.x) * 4; }

    __device__ __forceinline__ void load(const float* x) {
        #pragma unroll
        for (int n = 0; n < N; n++) {
            if (has(n)) v[n] = load_l2((const float4*)(x + at(n)));
        }
    }

    // The norm's scale, four for four.
    struct __align__(4 * sizeof(vector_t)) Four { vector_t v[4]; };
    struct Scale { Four of[N]; };
    __device__ static __forceinline__ Scale load_scale(const vector_t* scale) {
        Scale loaded = {};
        #pragma unroll
        for (int n = 0; n < N; n++) {
            if (has(n)) loaded.of[n] = *(const Four*)(scale + at(n));
        }
        return loaded;
    }

    __device__ __forceinline__ void store(float* x) const {
        #pragma unroll
        for (int n = 0; n < N; n++) {
            if (has(n)) *(float4*)(x + at(n)) = v[n];
        }
    }

    // t = bf16(x / sqrt(mean(x^2) + eps) * scale).
    __device__ __forceinline__ void normalize(const Scale& scale, float eps, u16* t, float* scratch) const {
        float sum = 0.0f;
        #pragma unroll
        for (int n = 0; n < N; n++) {
            if (!has(n)) continue;
            sum = __fmaf_rn(v[n].x, v[n].x, sum);
            sum = __fmaf_rn(v[n].y, v[n].y, sum);
            sum = __fmaf_rn(v[n].z, v[n].z, sum);
            sum = __fmaf_rn(v[n].w, v[n].w, sum);
        }
        sum = block_sum_256(sum, scratch);
        float factor = 1.0f / __fsqrt_rn(sum / (float)HIDDEN + eps);
        #pragma unroll
        for (int n = 0; n < N; n++) {
            if (!has(n)) continue;
            const vector_t* s = scale.of[n].v;
            uint2 four;
            four.x = f32x2_to_bf16x2(v[n].x * factor * vector_at(s, 0), v[n].y * factor * vector_at(s, 1));
            four.y = f32x2_to_bf16x2(v[n].z * factor * vector_at(s, 2), v[n].w * factor * vector_at(s, 3));
            *(uint2*)(t + at(n)) = four;
        }
    }
};
#endif
