// How blocks of the warpgroup instructions of sm_90a (gemm_stream.cuh) lie: the packed weights of
// gemm.cuh, and its accumulator chain of ascending k16 steps for each output, so the same bits.
//
// A block takes WGS x MT blocks of 64 out features and NT x 8 tokens. Weights are the A operand:
// a warp of a warpgroup holds 16 of its 64 rows, in the order in which mma.m16n8k16 does, so a
// packed tile is one warp's. Tokens are the B operand, in shared memory: 64 k of a token are one
// row of 128 bytes whose eight 16-byte chunks are swizzled by its number.
//
//   stage   tokens [NT 8][128 bytes], weights [WGS MT][4 tiles], STAGES of each
//
// Weights come by one bulk copy for each 64 features, which counts its bytes at the stage's
// mbarrier. Fragments are unpacked into two buffers of two k-steps, while the multiplication of the
// other is under way.

// Stages of the variants: what `BLOCKS` blocks a multiprocessor leave room for, 9 at most;
// src/engine/cuda/variants.rs computes the same.
__device__ constexpr int warpgroup_stages(int blocks, int stage_bytes) {
    int room = (228 * 1024 / blocks - 5 * 1024) / stage_bytes;
    return room < 9 ? room : 9;
}

// WGS x MT blocks of 64 features, NT octets of tokens.
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

    // Which of the block's tiles accumulators [m] are, and which tokens [n].
    __device__ static __forceinline__ int tile(int m) {
        int warp = threadIdx.x / 32;
        return (m * WGS + warp / 4) * BLOCK_TILES + warp % 4;
    }
    __device__ static __forceinline__ int column(int n) { return n * 8; }

    // A barrier of the threads that multiply.
    __device__ static __forceinline__ void sync_workers() { asm volatile("bar.sync 1, %0;" :: "n"(WORKERS) : "memory"); }

    // Sums may be read from here on, not before.
    template <int M, int N> __device__ static __forceinline__ void settle(float (&acc)[M][N][4]) {
        #pragma unroll
        for (int m = 0; m < M; m++)
            #pragma unroll
            for (int n = 0; n < N; n++)
                #pragma unroll
                for (int i = 0; i < 4; i++) asm volatile("" : "+f"(acc[m][n][i]) :: "memory");
    }

    // Address and strides of a token tile for the matrix units: rows of 128 bytes, swizzled, eight
    // of them 1024 bytes. Its low half is computed once for all stages: the compiler would do it anew.
    __device__ static __forceinline__ u32 token_matrices(u32 address) {
        u32 low = address >> 4 | 1u << 16;
        asm volatile("" : "+r"(low));
        return low;
    }
    __device__ static __forceinline__ u64 token_matrix(u32 low, u32 offset) {
        return (u64)(low + offset / 16) | 64ull << 32 | 1ull << 62;
    }
};
