// The product of gemm.cuh by the warpgroup instructions of sm_90a: the same packed weights, the
// same accumulator chain of ascending k16 steps for each output, so the same bits.
//
// A block takes WGS x MT blocks of 64 out features and NT x 8 tokens. Weights are the A operand:
// a warp of a warpgroup holds 16 of its 64 rows, in the order in which mma.m16n8k16 does, so a
// packed tile is one warp's. Tokens are the B operand, in shared memory: 64 k of a token are one
// row of 128 bytes whose eight 16-byte chunks are swizzled by its number.
//
//   stage   tokens [NT 8][128 bytes], weights [WGS MT][4 tiles], STAGES of each
//
// Weights come by one bulk copy for each 64 features, which counts its bytes at the stage's
// mbarrier; tokens, which are gathered, by cp.async. Fragments are unpacked into two buffers of
// two k-steps, while the multiplication of the other is under way:
//
//   unpack half 0 | unpack half 1 | barrier, unpack half 0 | ...
//       wgmma half 1   | wgmma half 0     | wgmma half 1
//
// A stage is filled when all have passed the barrier behind the one that follows it: STAGES - 2
// stages are under way.

// Stages of the variants: what `BLOCKS` blocks a multiprocessor leave room for, 8 at most;
// src/engine/cuda/variants.rs computes the same.
__device__ constexpr int warpgroup_stages(int blocks, int stage_bytes) {
    int room = (228 * 1024 / blocks - 5 * 1024) / stage_bytes;
    return room < 8 ? room : 8;
}

// What both kinds of blocks have in common: WGS x MT blocks of 64 features, NT octets of tokens.
template <Format FORMAT, int WGS, int MT, int NT, int BLOCKS> struct WarpgroupTiles {
    static constexpr int WORKERS = 128 * WGS;
    static constexpr int M_TILES = MT, N_TILES = NT;
    static constexpr int TILES = WGS * MT * BLOCK_TILES;
    static constexpr int COLUMNS = NT * 8;
    static constexpr int TILE_BYTES = Tile<FORMAT>::BYTES;
    static constexpr int BLOCK_BYTES = BLOCK_TILES * TILE_BYTES;
    static constexpr int TOKEN_BYTES = COLUMNS * 128;
    static constexpr int WEIGHT_BYTES = WGS * MT * BLOCK_BYTES;
    static constexpr int STAGES = warpgroup_stages(BLOCKS, TOKEN_BYTES + WEIGHT_BYTES);
    static_assert(STAGES >= 4, "at least two stages are under way");
    // Whether tokens come as tiles (gemm_stream.cuh).
    static constexpr bool STREAMS = false;

    // Which of the block's tiles accumulators [m] are, and which tokens [n].
    __device__ static __forceinline__ int tile(int m) {
        int warp = threadIdx.x / 32;
        return (m * WGS + warp / 4) * BLOCK_TILES + warp % 4;
    }
    __device__ static __forceinline__ int column(int n) { return n * 8; }

    // A barrier of the threads that multiply.
    __device__ static __forceinline__ void sync_workers() { asm volatile("bar.sync 1, %0;" :: "n"(WORKERS) : "memory"); }

    // Sums may be read from here on, not before.
    template <int M> __device__ static __forceinline__ void settle(float (&acc)[M][NT][4]) {
        #pragma unroll
        for (int m = 0; m < M; m++)
            #pragma unroll
            for (int n = 0; n < NT; n++)
                #pragma unroll
                for (int i = 0; i < 4; i++) asm volatile("" : "+f"(acc[m][n][i]) :: "memory");
    }

    // Address and strides of a token tile for the matrix units: rows of 128 bytes, swizzled, eight
    // of them 1024 bytes.
    __device__ static __forceinline__ u64 token_matrix(u32 address) {
        return (u64)(address >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62;
    }
};

template <Format FORMAT, int WGS, int MT, int NT, int BLOCKS>
struct WarpgroupGemm : WarpgroupTiles<FORMAT, WGS, MT, NT, BLOCKS> {
    typedef WarpgroupTiles<FORMAT, WGS, MT, NT, BLOCKS> Tiles;
    using Tiles::WORKERS, Tiles::COLUMNS, Tiles::TILE_BYTES, Tiles::BLOCK_BYTES, Tiles::TOKEN_BYTES, Tiles::WEIGHT_BYTES, Tiles::STAGES;
    static constexpr int THREADS = WORKERS;

    // What a thread keeps of its block.
    struct Block {
        u8* shared;
        u32 tokens, full;
        const u8* weights;
        const u16* x;
        int n_blocks, n_groups, n_k;
        static constexpr int N_TOKENS = (COLUMNS * 8 + THREADS - 1) / THREADS;
        // The same 16-byte chunk of every token is this thread's, for THREADS is a multiple of 64.
        u32 chunks[N_TOKENS];
        u32 tokens_at;

        __device__ __forceinline__ void fill_weights(int stage, int group) const {
            int lane = (int)threadIdx.x;
            if (lane >= n_blocks) return;
            u32 barrier = full + 8 * stage;
            if (lane == 0) barrier_expect(barrier, n_blocks * BLOCK_BYTES);
            const u8* from = weights + ((u64)lane * n_groups + group) * BLOCK_BYTES;
            copy_bulk(tokens + STAGES * TOKEN_BYTES + stage * WEIGHT_BYTES + lane * BLOCK_BYTES, from, BLOCK_BYTES, barrier);
        }

        __device__ __forceinline__ void find_tokens(u32 x_stride, const int* columns) {
            int thread = (int)threadIdx.x;
            #pragma unroll
            for (int n = 0; n < N_TOKENS; n++) {
                int i = n * THREADS + thread;
                int row = i < COLUMNS * 8 ? columns[i / 8] : -1;
                chunks[n] = row >= 0 ? (u32)row * (x_stride / 8) + thread % 8 : NONE;
            }
            tokens_at = tokens + thread / 8 * 128 + ((thread ^ (thread / 8)) & 7) * 16;
        }

        __device__ __forceinline__ void fill_tokens(int stage, int group) const {
            int thread = (int)threadIdx.x;
            bool inside = group * GROUP_K + thread % 8 * 8 < n_k;
            #pragma unroll
            for (int n = 0; n < N_TOKENS; n++) {
                if ((n + 1) * THREADS <= COLUMNS * 8 || n * THREADS + thread < COLUMNS * 8) {
                    const u16* from = x + (u64)(chunks[n] + group * 8) * 8;
                    copy_async16(tokens_at + stage * TOKEN_BYTES + n * (THREADS / 8) * 128, from, inside && chunks[n] != NONE);
                }
            }
        }
    };

    // All of K, for the first M blocks of each warpgroup.
    template <int M> __device__ static __forceinline__ void multiply(const Block& block, float (&acc)[M][NT][4]) {
        int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
        u32 fragments[2][2][M][4];
        int from = 0, to = STAGES - 2;
        u32 parity = 0;
        for (int group = 0; group < block.n_groups; group++) {
            copy_async_wait<STAGES - 3>();
            fence_matrix_units();
            barrier_wait(block.full + 8 * from, parity);
            __syncthreads();
            int next = group + STAGES - 2;
            if (next < block.n_groups) {
                block.fill_weights(to, next);
                block.fill_tokens(to, next);
            }
            copy_async_commit();
            const u8* tiles = block.shared + STAGES * TOKEN_BYTES + from * WEIGHT_BYTES + warp * TILE_BYTES;
            u64 b = Tiles::token_matrix(block.tokens + from * TOKEN_BYTES);
            Tile<FORMAT> packed[M];
            #pragma unroll
            for (int m = 0; m < M; m++) packed[m].load(tiles + m * WGS * BLOCK_BYTES, lane);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                // The multiplications that read this half's fragments are over.
                wgmma_wait<1>();
                #pragma unroll
                for (int m = 0; m < M; m++) {
                    #pragma unroll
                    for (int i = 0; i < 2; i++) {
                        packed[m].fragment(tiles + m * WGS * BLOCK_BYTES, lane, half * 2 + i, fragments[half][i][m]);
                    }
                }
                wgmma_fence();
                #pragma unroll
                for (int i = 0; i < 2; i++) {
                    #pragma unroll
                    for (int m = 0; m < M; m++) {
                        // A k-step is 32 bytes further in each row. The first one of all begins the sums.
                        wgmma_bf16(acc[m], fragments[half][i][m], b + (half * 2 + i) * 2, half + i > 0 ? 1 : group);
                    }
                }
                wgmma_commit();
            }
            to = to + 1 == STAGES ? 0 : to + 1;
            if (++from == STAGES) {
                from = 0;
                parity ^= 1;
            }
        }
        wgmma_wait<0>();
        copy_async_wait<0>();
        Tiles::settle(acc);
    }

    // As Gemm::run; first_tile is a multiple of BLOCK_TILES.
    template <class Prepare, class Outputs> __device__ static __forceinline__ void run(
        u8* dynamic, const u8* matrix, int first_tile, int n_tiles, int n_groups,
        const u16* x, u32 x_stride, int n_k, const int* columns, Prepare prepare, Outputs outputs
    ) {
        __shared__ __align__(8) u64 barriers[STAGES];
        Block block;
        block.shared = dynamic + (0 - shared_address(dynamic) & 1023);
        block.tokens = shared_address(block.shared);
        block.full = shared_address(barriers);
        block.weights = matrix + (u64)(first_tile / BLOCK_TILES) * n_groups * BLOCK_BYTES;
        block.x = x;
        block.n_groups = n_groups;
        block.n_k = n_k;
        int n_blocks = (n_tiles - first_tile + BLOCK_TILES - 1) / BLOCK_TILES;
        block.n_blocks = n_blocks < WGS * MT ? n_blocks : WGS * MT;
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < STAGES; stage++) barrier_init(block.full + 8 * stage, 1);
            fence_matrix_units();
        }
        __syncthreads();
        // Weights are there before the kernel that writes x is done.
        for (int stage = 0; stage < STAGES - 2; stage++) {
            if (stage < n_groups) block.fill_weights(stage, stage);
        }
        prepare();
        __syncthreads();
        block.find_tokens(x_stride, columns);
        for (int stage = 0; stage < STAGES - 2; stage++) {
            if (stage < n_groups) block.fill_tokens(stage, stage);
            copy_async_commit();
        }
        if (MT > 1 && NT >= 8 && n_blocks <= WGS) {
            // The matrix ends with half a block of rows.
            float acc[1][NT][4];
            multiply(block, acc);
            outputs(acc);
        } else {
            float acc[MT][NT][4];
            multiply(block, acc);
            outputs(acc);
        }
    }
};
