// What all attention kernels have in common: their arguments, and the arithmetic of a query, which
// is the same to the bit in all of them (attention.cu tells its order). Behind `common.cuh`.

#define TILE 64
#define SPLIT_TILES 4

// A run of pages and rows that all see it whole: SharedItem in src/engine/cuda/sharing.rs.
struct SharedItem {
    u32 sequence;
    u32 first_split;
    u32 n_splits;
    // The splits are folded into the last one's place of `partial`.
    u32 folded;
    u32 n_rows;
    u32 rows[16];
};

struct AttentionArgs {
    // Shared items by warpgroups: the cache as rows of a position's key or value of a head.
    TensorMap cache_map;
    const u16* qkv;
    u16* out;
    const Row* rows;
    // First row and number of rows of each block; NULL: one row a block.
    const uint2* blocks;
    const vector_t* sinks;
    const u16* cache;
    const u32* page_table;
    float* partial;
    // Decode steps of rows that share pages, else NULL: items, their number; of each row how many
    // splits are in items, and its first place of `partial`.
    const SharedItem* items;
    const u32* n_items;
    const uint2* shared;
    u32 n_heads;
    u32 n_kv_heads;
    u32 layer;
    u32 n_layers;
    u32 max_pages;
    u32 ring;
    u32 window;
    u32 max_splits;
    float scale;
};

// FULL and WINDOW: all keys of a block of rows. SPLITS: every so many splits of one row, beginning
// behind those that are shared. SHARED: an item.
enum Mode { FULL, WINDOW, SPLITS, SHARED };

// Scores are kept as exponents of 2: times log2(e).
#define LOG2_E 1.44269504088896341f

// Maximum and denominator of a query.
struct State {
    float max;
    float sum;
};

// Folds `next` into `so_far`; gives the factors of the outputs of the two. A state without keys
// changes nothing.
__device__ __forceinline__ float2 fold(State& so_far, State next) {
    if (next.max == NEG_INFINITY) return make_float2(1.0f, 0.0f);
    float max = so_far.max > next.max ? so_far.max : next.max;
    float2 factors = make_float2(exp2_approx(so_far.max - max), exp2_approx(next.max - max));
    so_far.sum = __fmaf_rn(next.sum, factors.y, so_far.sum * factors.x);
    so_far.max = max;
    return factors;
}

__device__ __forceinline__ float fold_output(float so_far, float next, float2 factors) {
    return __fmaf_rn(next, factors.y, so_far * factors.x);
}

// The sink is a key of score `sink` without a value.
__device__ __forceinline__ float finish_factor(State& state, float sink) {
    State last = {sink * LOG2_E, 1.0f};
    return fold(state, last).x;
}

// Scores of keys from `position` on that a lane's two queries do not see become those of no key.
__device__ __forceinline__ void hide(float (&s)[TILE / 8][4], int position, const int (&low)[2], const int (&high)[2]) {
    #pragma unroll
    for (int n = 0; n < TILE / 8; n++) {
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            int at = position + n * 8 + i % 2;
            bool seen = at >= low[i / 2] && at <= high[i / 2];
            s[n][i] = seen ? s[n][i] : NEG_INFINITY;
        }
    }
}

// The greatest score of a tile for query `i` of a lane's two.
__device__ __forceinline__ float greatest_score(const float (&s)[TILE / 8][4], int i) {
    float max = NEG_INFINITY;
    #pragma unroll
    for (int n = 0; n < TILE / 8; n++) {
        #pragma unroll
        for (int j = 0; j < 2; j++) max = fmaxf(s[n][2 * i + j], max);
    }
    // The four lanes of a query.
    #pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) max = fmaxf(__shfl_xor_sync(NONE, max, mask), max);
    return max;
}

// What exponents are subtracted from: without a key so far nothing may be.
__device__ __forceinline__ float exponent_base(float max) { return max == NEG_INFINITY ? 0.0f : max; }

// What outputs of the maximum so far are to be multiplied with where `max` takes its place.
__device__ __forceinline__ float decay_to(float so_far, float max) {
    float decay = exp2_approx(so_far - exponent_base(max));
    return so_far == max ? 1.0f : decay;
}

// Scores of query `i` of a lane's two become exponentials; gives their sum.
__device__ __forceinline__ float exponentials(float (&s)[TILE / 8][4], int i, float base, float scale) {
    float sum = 0.0f;
    #pragma unroll
    for (int n = 0; n < TILE / 8; n++) {
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            float p = exp2_approx(__fmaf_rn(s[n][2 * i + j], scale, -base));
            s[n][2 * i + j] = p;
            sum += p;
        }
    }
    #pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) sum += __shfl_xor_sync(NONE, sum, mask);
    return sum;
}

// A tile of the online softmax: scores of query `i` of a lane's two become exponentials; gives what
// the outputs so far are to be multiplied with.
__device__ __forceinline__ float soften(float (&s)[TILE / 8][4], int i, State& state, float scale) {
    // The scale is positive: the greatest product is the greatest score.
    float max = fmaxf(state.max, greatest_score(s, i) * scale);
    float decay = decay_to(state.max, max);
    float sum = exponentials(s, i, exponent_base(max), scale);
    state.sum = __fmaf_rn(state.sum, decay, sum);
    state.max = max;
    return decay;
}

// Exponentials of 16 keys as the A operand of the product with their values.
__device__ __forceinline__ void pack_exponentials(u32 (&p)[4], const float (&s)[TILE / 8][4], int step) {
    p[0] = f32x2_to_bf16x2(s[2 * step][0], s[2 * step][1]);
    p[1] = f32x2_to_bf16x2(s[2 * step][2], s[2 * step][3]);
    p[2] = f32x2_to_bf16x2(s[2 * step + 1][0], s[2 * step + 1][1]);
    p[3] = f32x2_to_bf16x2(s[2 * step + 1][2], s[2 * step + 1][3]);
}
