// The product of gemm_wgmma.cuh with a division of labour, for large token tiles: two warpgroups
// multiply, four warps fill the stages. A stage's barrier `full` counts the bytes of its weights
// and is told of its tokens; `empty` is told by each multiplying warp that it has left the stage
// behind. No other barrier holds a block together, so one warpgroup unpacks while the other
// multiplies. The same chains of sums, so the same bits.

template <Format FORMAT, int MT, int NT> struct SplitGemm : WarpgroupTiles<FORMAT, 2, MT, NT, 1> {
    static constexpr int WGS = 2, FILLERS = 4;
    typedef WarpgroupTiles<FORMAT, WGS, MT, NT, 1> Tiles;
    using Tiles::WORKERS, Tiles::COLUMNS, Tiles::TILE_BYTES, Tiles::BLOCK_BYTES, Tiles::TOKEN_BYTES, Tiles::WEIGHT_BYTES, Tiles::STAGES;
    // 168 registers each, moved from those that fill to those that multiply.
    static constexpr int THREADS = WORKERS + 32 * FILLERS;

    // What a thread knows of its block.
    struct Block {
        u8* shared;
        u32 tokens, full, empty;
        const u8* weights;
        const u16* x;
        int n_blocks, n_groups, n_k;

        __device__ __forceinline__ void fill_weights(int stage, int group) const {
            u32 barrier = full + 8 * stage;
            barrier_expect(barrier, n_blocks * BLOCK_BYTES);
            u32 to = tokens + STAGES * TOKEN_BYTES + stage * WEIGHT_BYTES;
            for (int i = 0; i < n_blocks; i++) {
                copy_bulk(to + i * BLOCK_BYTES, weights + ((u64)i * n_groups + group) * BLOCK_BYTES, BLOCK_BYTES, barrier);
            }
        }
    };

    // The filling threads: all stages of all of K. The first STAGES of the weights are under way.
    __device__ static __forceinline__ void fill(const Block& block, u32 x_stride, const int* columns) {
        constexpr int FILLING = 32 * FILLERS;
        constexpr int N_CHUNKS = COLUMNS * 8 / FILLING;
        static_assert(COLUMNS * 8 % FILLING == 0, "each filling thread has as many chunks");
        // Stages whose copies may be under way while the next is begun.
        constexpr int LAG = STAGES / 2;
        int thread = (int)threadIdx.x - WORKERS;
        // The same 16-byte chunk of tokens 16 apart.
        u32 chunks[N_CHUNKS];
        #pragma unroll
        for (int n = 0; n < N_CHUNKS; n++) {
            int row = columns[(n * FILLING + thread) / 8];
            chunks[n] = row >= 0 ? (u32)row * (x_stride / 8) + thread % 8 : NONE;
        }
        u32 at = block.tokens + thread / 8 * 128 + ((thread ^ (thread / 8)) & 7) * 16;
        auto landed = [&](int group) {
            fence_matrix_units();
            __syncwarp();
            if (thread % 32 == 0) barrier_arrive(block.full + 8 * (group % STAGES));
        };
        int stage = 0;
        u32 parity = 1;
        for (int group = 0; group < block.n_groups; group++) {
            if (group >= STAGES) {
                barrier_wait(block.empty + 8 * stage, parity);
                if (thread == 0) block.fill_weights(stage, group);
            }
            bool inside = group * GROUP_K + thread % 8 * 8 < block.n_k;
            #pragma unroll
            for (int n = 0; n < N_CHUNKS; n++) {
                const u16* from = block.x + (u64)(chunks[n] + group * 8) * 8;
                copy_async16(at + stage * TOKEN_BYTES + n * (FILLING / 8) * 128, from, inside && chunks[n] != NONE);
            }
            copy_async_commit();
            if (group >= LAG) {
                copy_async_wait<LAG>();
                landed(group - LAG);
            }
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
        copy_async_wait<0>();
        for (int group = block.n_groups > LAG ? block.n_groups - LAG : 0; group < block.n_groups; group++) landed(group);
    }

    // All of K, for the first M blocks of each warpgroup.
    template <int M> __device__ static __forceinline__ void multiply(const Block& block, float (&acc)[M][NT][4]) {
        int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
        // Fragments of so many k-steps, twice.
        constexpr int STEPS = 2;
        u32 fragments[2][STEPS][M][4];
        int stage = 0, left_behind = STAGES - 1;
        u32 parity = 0;
        const u8* of_warp = block.shared + STAGES * TOKEN_BYTES + warp * TILE_BYTES;
        for (int group = 0; group < block.n_groups; group++) {
            barrier_wait(block.full + 8 * stage, parity);
            const u8* tiles = of_warp + stage * WEIGHT_BYTES;
            u64 b = Tiles::token_matrix(block.tokens + stage * TOKEN_BYTES);
            Tile<FORMAT> packed[M];
            #pragma unroll
            for (int m = 0; m < M; m++) packed[m].load(tiles + m * WGS * BLOCK_BYTES, lane);
            #pragma unroll
            for (int part = 0; part < 4 / STEPS; part++) {
                // The multiplications that read these fragments are over.
                wgmma_wait<1>();
                // With them, in the second part, all of the stage before.
                if (part == 1) barrier_arrive_if(block.empty + 8 * left_behind, lane == 0 & group > 0);
                #pragma unroll
                for (int m = 0; m < M; m++) {
                    #pragma unroll
                    for (int i = 0; i < STEPS; i++) {
                        packed[m].fragment(tiles + m * WGS * BLOCK_BYTES, lane, part * STEPS + i, fragments[part % 2][i][m]);
                    }
                }
                wgmma_fence();
                #pragma unroll
                for (int i = 0; i < STEPS; i++) {
                    int step = part * STEPS + i;
                    #pragma unroll
                    for (int m = 0; m < M; m++) {
                        // A k-step is 32 bytes further in each row. The first one of all begins the sums.
                        wgmma_bf16(acc[m], fragments[part % 2][i][m], b + step * 2, step > 0 ? 1 : group);
                    }
                }
                wgmma_commit();
            }
            left_behind = stage;
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
        wgmma_wait<0>();
        Tiles::settle(acc);
    }

    // As Gemm::run; first_tile is a multiple of BLOCK_TILES.
    template <class Prepare, class Outputs> __device__ static __forceinline__ void run(
        u8* dynamic, const u8* matrix, int first_tile, int n_tiles, int n_groups,
        const u16* x, u32 x_stride, int n_k, const int* columns, Prepare prepare, const Outputs& outputs
    ) {
        __shared__ __align__(8) u64 barriers[2][STAGES];
        Block block;
        block.shared = dynamic + (0 - shared_address(dynamic) & 1023);
        block.tokens = shared_address(block.shared);
        block.full = shared_address(barriers[0]);
        block.empty = shared_address(barriers[1]);
        block.weights = matrix + (u64)(first_tile / BLOCK_TILES) * n_groups * BLOCK_BYTES;
        block.x = x;
        block.n_groups = n_groups;
        block.n_k = n_k;
        int n_blocks = (n_tiles - first_tile + BLOCK_TILES - 1) / BLOCK_TILES;
        block.n_blocks = n_blocks < WGS * MT ? n_blocks : WGS * MT;
        if (threadIdx.x == WORKERS) {
            for (int stage = 0; stage < STAGES; stage++) {
                barrier_init(block.full + 8 * stage, FILLERS + 1);
                barrier_init(block.empty + 8 * stage, WGS * 4);
            }
            fence_matrix_units();
            // Weights are under way before the kernel that writes x is done.
            for (int stage = 0; stage < STAGES && stage < n_groups; stage++) block.fill_weights(stage, stage);
        }
        prepare();
        __syncthreads();
        if (threadIdx.x >= WORKERS) {
            give_registers<40>();
            fill(block, x_stride, columns);
        } else {
            take_registers<232>();
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
    }
};
