// The product of gemm_wgmma.cuh by pairs of blocks that share their weights: a cluster of two has
// the same features and neighbouring token tiles. Each block brings every second 64 features of a
// stage, to both blocks' shared memory at once, so that of a stage
//
//             weights of block 0's share   of block 1's share   tokens
//   block 0   reads, sends to both         gets                 reads its own
//   block 1   gets                         reads, sends         reads its own
//
// half the weights less go through L2, which is the limit of large dense products.
//
// One thread of a warp of its own brings weights; the warps that multiply bring tokens. A stage's
// barrier `full` counts the bytes of all its weights that land in its own block, whoever sent them.
// Those of the other block may come before this block expects them: the phase stays open until it
// does. `empty` is told by each multiplying warp of both blocks that it has left the stage behind,
// so a stage is filled in both or in none. The same chains of sums, so the same bits.

// Row pairs that follow each other before the next features do: what runs at a time then is about
// as many weights as tokens.
#define PAIRS_A_BAND 8

// Which block of features and which row block a thread block of a grid of pairs has.
__device__ __forceinline__ void place_of_pair(u32 m_blocks, u32 n_pairs, u32& m_block, u32& row_block) {
    u32 pair = blockIdx.x / 2;
    u32 first = pair / (PAIRS_A_BAND * m_blocks) * PAIRS_A_BAND;
    u32 in_band = n_pairs - first < PAIRS_A_BAND ? n_pairs - first : PAIRS_A_BAND;
    u32 i = pair - first * m_blocks;
    m_block = i / in_band;
    row_block = (first + i % in_band) * 2 + blockIdx.x % 2;
}

template <Format FORMAT, int MT, int NT> struct PairGemm : WarpgroupGemm<FORMAT, 2, MT, NT, 1> {
    static constexpr int WGS = 2, FILLERS = 4;
    typedef WarpgroupGemm<FORMAT, WGS, MT, NT, 1> Single;
    using Single::WORKERS, Single::TILE_BYTES, Single::BLOCK_BYTES, Single::TOKEN_BYTES, Single::WEIGHT_BYTES, Single::STAGES;
    // 168 registers each, moved from the filling warps, of which one fills, to those that multiply:
    // so many can be moved by whole warpgroups alone.
    static constexpr int THREADS = WORKERS + 32 * FILLERS;
    static constexpr bool PAIRS = true;

    // What a thread knows of its block.
    struct Block : Single::Block {
        u32 empty;

        // This block's share of a stage's weights, to both blocks.
        __device__ __forceinline__ void fill_weights(int stage, int group) const {
            u32 barrier = this->full + 8 * stage;
            barrier_expect(barrier, this->n_blocks * BLOCK_BYTES);
            u32 to = this->tokens + STAGES * TOKEN_BYTES + stage * WEIGHT_BYTES;
            #pragma unroll
            for (int share = 0; share < WGS * MT; share += 2) {
                int i = share + (int)blockIdx.x % 2;
                if (i >= this->n_blocks) break;
                const u8* from = this->weights + ((u64)i * this->n_groups + group) * BLOCK_BYTES;
                copy_bulk_to_pair(to + i * BLOCK_BYTES, from, BLOCK_BYTES, barrier);
            }
        }
    };

    // The filling thread: the weights of all of K. The first STAGES are under way.
    __device__ static __forceinline__ void fill(const Block& block) {
        int stage = 0;
        u32 parity = 0;
        for (int group = STAGES; group < block.n_groups; group++) {
            barrier_wait(block.empty + 8 * stage, parity);
            block.fill_weights(stage, group);
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
    }

    // All of K, for the first M blocks of each warpgroup.
    template <int M> __device__ static __forceinline__ void multiply(const Block& block, float (&acc)[M][NT][4]) {
        int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
        // Lanes 0 and 1 tell blocks 0 and 1.
        u32 empty = address_in_cluster(block.empty, lane % 2);
        u32 fragments[2][2][M][4];
        int from = 0, to = STAGES - 2, left_behind = STAGES - 1;
        u32 parity = 0;
        for (int group = 0; group < block.n_groups; group++) {
            copy_async_wait<STAGES - 3>();
            fence_matrix_units();
            barrier_wait(block.full + 8 * from, parity);
            Single::sync_workers();
            int next = group + STAGES - 2;
            if (next < block.n_groups) block.fill_tokens(to, next);
            copy_async_commit();
            const u8* tiles = block.shared + STAGES * TOKEN_BYTES + from * WEIGHT_BYTES + warp * TILE_BYTES;
            u64 b = Single::token_matrix(block.tokens + from * TOKEN_BYTES);
            Tile<FORMAT> packed[M];
            #pragma unroll
            for (int m = 0; m < M; m++) packed[m].load(tiles + m * WGS * BLOCK_BYTES, lane);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                // The multiplications that read this half's fragments are over.
                wgmma_wait<1>();
                // With them, in the second half, all of the stage before.
                if (half == 1) barrier_arrive_cluster_if(empty + 8 * left_behind, lane < 2 & group > 0);
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
            left_behind = from;
            to = to + 1 == STAGES ? 0 : to + 1;
            if (++from == STAGES) {
                from = 0;
                parity ^= 1;
            }
        }
        wgmma_wait<0>();
        copy_async_wait<0>();
        // Nothing of this block's is told to the other from here on.
        cluster_arrive();
        Single::settle(acc);
    }

    // As Gemm::run; first_tile is a multiple of BLOCK_TILES. A block without tokens takes part.
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
                barrier_init(block.full + 8 * stage, 1);
                barrier_init(block.empty + 8 * stage, 2 * WGS * 4);
            }
            fence_matrix_units();
            fence_barriers_of_cluster();
        }
        // The other block is there, and its barriers are.
        cluster_arrive();
        cluster_wait();
        if (threadIdx.x == WORKERS) {
            // Weights are under way before the kernel that writes x is done.
            for (int stage = 0; stage < STAGES && stage < n_groups; stage++) block.fill_weights(stage, stage);
        }
        prepare();
        __syncthreads();
        if (threadIdx.x >= WORKERS) {
            give_registers<40>();
            if (threadIdx.x == WORKERS) fill(block);
            cluster_arrive();
        } else {
            take_registers<232>();
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
        // Shared memory stays until the other block sends and tells nothing more.
        cluster_wait();
    }
};
