// The experts' products, for weights of either format (moe_matmul_mxfp4.cu, moe_matmul_bf16.cu).
//
//   gate_up  act[entry, f] = bf16(swiglu(gate f, up f)) of x[entry / k]; a tile holds the gates of
//            8 features above their ups, so both are one thread's
//   down     y[entry, m] = product + bias, of act[entry]
//
//   weights  tiles (gemm.cuh), an expert's behind the other's
//   offsets  u32 [n_experts + 1], entries u32: the entries (row * k + rank) of expert e are
//            entries[offsets[e]..offsets[e + 1]]
//
// Grid (tiles of an expert / (WM MT), most token tiles), block 32 WM WN: token tile y belongs to
// the expert that a scan of the counts finds; tiles past the last do nothing. Entries of one
// expert are read together once for every COLUMNS of them.

struct MoeArgs {
    const u8* weights;
    const vector_t* bias;
    const u16* x;
    u16* act;
    float* y;
    const u32* offsets;
    const u32* entries;
    u32 n_experts;
    u32 k;
    u32 n_k;
    // Tiles of an expert.
    u32 n_tiles;
    // Outputs of an expert: features of gate_up, or rows of down.
    u32 n_out;
    float limit;
};

// gate * sigmoid(1.702 gate) * (up + 1), the gate clamped from above, up on both sides
// (gpt_oss/torch/model.py, swiglu).
__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
    // Written so that NaN stays NaN.
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up;
    up = up < -limit ? -limit : up;
    float gated = gate / (1.0f + exp_fast(-1.702f * gate));
    return (up + 1.0f) * gated;
}

struct GateUp {
    __device__ static __forceinline__ void store(const MoeArgs& args, u32 expert, u32 tile, int g, u32 entry, float low, float high) {
        u32 f = tile * 8 + g;
        const vector_t* bias = args.bias + (u64)expert * 2 * args.n_out;
        float gate = low + vector_at(bias, 2 * f), up = high + vector_at(bias, 2 * f + 1);
        args.act[(u64)entry * args.n_out + f] = f32_to_bf16(swiglu(gate, up, args.limit));
    }
    static constexpr bool OF_ROWS = true;
};

struct Down {
    __device__ static __forceinline__ void store(const MoeArgs& args, u32 expert, u32 tile, int g, u32 entry, float low, float high) {
        u32 m = tile * TILE_M + g;
        const vector_t* bias = args.bias + (u64)expert * args.n_out;
        float* y = args.y + (u64)entry * args.n_out;
        y[m] = low + vector_at(bias, m);
        y[m + 8] = high + vector_at(bias, m + 8);
    }
    static constexpr bool OF_ROWS = false;
};

template <Format FORMAT, class Store, int WM, int WN, int MT, int NT, int STAGES>
__device__ __forceinline__ void moe_matmul(const MoeArgs& args) {
    typedef Gemm<FORMAT, WM, WN, MT, NT, STAGES> G;
    extern __shared__ __align__(16) u8 shared[];
    __shared__ int columns[G::COLUMNS];
    __shared__ u32 found[3];
    // The expert and the first of its entries, by one warp.
    if (threadIdx.x < 32) {
        if (threadIdx.x == 0) found[0] = NONE;
        __syncwarp();
        u32 before = 0;
        for (u32 first = 0; first < args.n_experts; first += 32) {
            u32 expert = first + threadIdx.x;
            u32 start = 0, end = 0;
            if (expert < args.n_experts) {
                start = args.offsets[expert];
                end = args.offsets[expert + 1];
            }
            u32 n_tiles = (end - start + G::COLUMNS - 1) / G::COLUMNS;
            u32 sum = n_tiles;
            for (int step = 1; step < 32; step *= 2) {
                u32 other = __shfl_up_sync(NONE, sum, step);
                if ((int)threadIdx.x >= step) sum += other;
            }
            u32 first_tile = before + sum - n_tiles;
            if (blockIdx.y >= first_tile && blockIdx.y < first_tile + n_tiles) {
                found[0] = expert;
                found[1] = start + (blockIdx.y - first_tile) * G::COLUMNS;
                found[2] = end;
            }
            before += __shfl_sync(NONE, sum, 31);
            if (before > blockIdx.y) break;
        }
    }
    __syncthreads();
    u32 expert = found[0];
    if (expert == NONE) return;
    u32 first = found[1], end = found[2];
    for (int c = threadIdx.x; c < G::COLUMNS; c += G::THREADS) {
        int row = -1;
        if (first + c < end) {
            u32 entry = args.entries[first + c];
            row = (int)(Store::OF_ROWS ? entry / args.k : entry);
        }
        columns[c] = row;
    }
    __syncthreads();
    u32 first_tile = blockIdx.x * G::TILES;
    int n_groups = (int)(args.n_k + GROUP_K - 1) / GROUP_K;
    const u8* weights = args.weights + ((u64)expert * args.n_tiles + first_tile) * n_groups * G::TILE_BYTES;
    int n_tiles = (int)(args.n_tiles - first_tile);
    float acc[MT][NT][4];
    G::run(acc, shared, weights, n_tiles, n_groups, args.x, args.n_k, (int)args.n_k, columns);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    #pragma unroll
    for (int n = 0; n < NT; n++) {
        u32 at = first + ((warp / WM) * NT + n) * 8 + lane % 4 * 2;
        u32 entry0 = at < end ? args.entries[at] : NONE;
        u32 entry1 = at + 1 < end ? args.entries[at + 1] : NONE;
        #pragma unroll
        for (int m = 0; m < MT; m++) {
            int tile = (warp % WM) * MT + m;
            if (tile >= n_tiles) continue;
            float* c = acc[m][n];
            if (entry0 != NONE) Store::store(args, expert, first_tile + tile, lane / 4, entry0, c[0], c[2]);
            if (entry1 != NONE) Store::store(args, expert, first_tile + tile, lane / 4, entry1, c[1], c[3]);
        }
    }
}

// Variants by how many tokens an expert has; src/engine/cuda/launch.rs has the same numbers.
// 192 rows divide 2880 and 5760. At 128 tokens two blocks share a multiprocessor.
#define VARIANTS(FORMAT, NAME, STORE, SMALL, BIG, BLOCKS) \
    extern "C" __global__ void __launch_bounds__(128) NAME##_8(const MoeArgs args) { moe_matmul<FORMAT, STORE, 4, 1, 1, 1, SMALL>(args); } \
    extern "C" __global__ void __launch_bounds__(128) NAME##_16(const MoeArgs args) { moe_matmul<FORMAT, STORE, 4, 1, 1, 2, SMALL>(args); } \
    extern "C" __global__ void __launch_bounds__(128) NAME##_32(const MoeArgs args) { moe_matmul<FORMAT, STORE, 4, 1, 3, 4, 3>(args); } \
    extern "C" __global__ void __launch_bounds__(128) NAME##_48(const MoeArgs args) { moe_matmul<FORMAT, STORE, 4, 1, 3, 6, BIG>(args); } \
    extern "C" __global__ void __launch_bounds__(128, BLOCKS + 1) NAME##_64(const MoeArgs args) { moe_matmul<FORMAT, STORE, 4, 1, 3, 8, BIG>(args); } \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS) NAME##_128(const MoeArgs args) { moe_matmul<FORMAT, STORE, 4, 2, 2, 8, BIG>(args); }
