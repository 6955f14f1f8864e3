// The product of gemm_wgmma.cuh with tokens that come as ready tiles: a stage is filled by a few
// bulk copies, one for the tokens and one for each block of weights, each asked for by a thread of
// its own that counts its bytes at the stage's barrier `full`. The warps that multiply wait for it,
// unpack, multiply and tell at `empty` that they have left the stage behind; they copy nothing, and
// nothing holds the block together, so one warpgroup unpacks while the other multiplies.
//
//   filling thread   wait empty | its part of a stage | wait empty | ..
//   warpgroup        wait full | unpack half 0 | unpack half 1, tell empty | wait full | ..
//   matrix units                       half 0         half 1
//
// FILLERS warps fill, of the first of which each lane has a part: one; a warpgroup, which gives its
// registers to those that multiply; or none where registers are short: then the first lanes of the
// warps that multiply do it, some stages behind their own multiplications so that they need not wait.
//
// The same chains of sums, so the same bits.

// Tokens that are rows `first`.. of x: 64 k of NT octets of them, swizzled by the copy. What lies
// behind the matrix's rows or k is zeros.
template <int NT> struct RowTokens {
    const TensorMap* x;
    int first;

    __device__ __forceinline__ u32 n_bytes() const { return NT * 8 * 128; }
    __device__ __forceinline__ void fill(u32 shared, int group, u32 barrier) const {
        copy_tensor(shared, x, group * GROUP_K, first, barrier);
    }
};

// WGS warpgroups with MT blocks of 64 features each, NT octets of tokens, BLOCKS a multiprocessor.
// Tokens of NARROW octets at most are multiplied as so many.
template <Format FORMAT, int WGS, int MT, int NT, int BLOCKS, int FILLERS, int NARROW = NT>
struct StreamGemm : WarpgroupTiles<FORMAT, WGS, MT, NT, BLOCKS> {
    typedef WarpgroupTiles<FORMAT, WGS, MT, NT, BLOCKS> Tiles;
    using Tiles::WORKERS, Tiles::TILE_BYTES, Tiles::BLOCK_BYTES, Tiles::TOKEN_BYTES, Tiles::WEIGHT_BYTES, Tiles::STAGES;
    static constexpr int THREADS = WORKERS + 32 * FILLERS;
    static constexpr bool STREAMS = true;
    // The thread that fills in the tokens.
    static constexpr int FILLING = FILLERS == 0 ? 0 : WORKERS;
    // How many groups behind its multiplications a warp fills.
    static constexpr int LAG = STAGES > 5 ? 3 : 2;
    static_assert(WGS * MT < (FILLERS == 0 ? WGS * 4 : 32), "a part has its thread");

    // What a thread knows of its block, and which part of each stage it fills: the tokens, which are
    // part 0, a block of weights, or none.
    struct Block {
        u8* shared;
        u32 tokens, full, empty;
        int n_groups, part;
        bool fills;
        // Of its part.
        const u8* weights;

        // The stage is full when all have told their parts' bytes and those have come.
        template <class Tokens> __device__ __forceinline__ void fill(const Tokens& of, int stage, int group) const {
            u32 barrier = full + 8 * stage;
            if (part == 0) {
                barrier_expect(barrier, of.n_bytes());
                of.fill(tokens + stage * TOKEN_BYTES, group, barrier);
            } else {
                barrier_expect(barrier, BLOCK_BYTES);
                u32 to = tokens + STAGES * TOKEN_BYTES + stage * WEIGHT_BYTES + (part - 1) * BLOCK_BYTES;
                copy_bulk(to, weights + (u64)group * BLOCK_BYTES, BLOCK_BYTES, barrier);
            }
        }
        // The first STAGES groups.
        template <class Tokens> __device__ __forceinline__ void begin(const Tokens& of) const {
            for (int stage = 0; stage < STAGES && stage < n_groups; stage++) fill(of, stage, stage);
        }
    };

    // Where a walk along K is: a stage, and the parity of its barriers' phase.
    struct Place {
        int stage;
        u32 parity;

        __device__ __forceinline__ void advance() {
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
    };

    // The stage at `place`, once all have left it, gets `group`.
    template <class Tokens> __device__ static __forceinline__ void refill(
        const Block& block, const Tokens& tokens, const Place& place, int group
    ) {
        barrier_wait(block.empty + 8 * place.stage, place.parity);
        block.fill(tokens, place.stage, group);
    }

    // All of K, for the first M blocks of each warpgroup and the first N octets.
    template <int M, int N, class Tokens> __device__ static __forceinline__ void multiply(
        const Block& block, const Tokens& tokens, float (&acc)[M][N][4]
    ) {
        int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
        u32 fragments[2][2][M][4];
        Place place = {0, 0}, behind = {0, 0};
        int left_behind = STAGES - 1;
        const u8* of_warp = block.shared + STAGES * TOKEN_BYTES + warp * TILE_BYTES;
        for (int group = 0; group < block.n_groups; group++) {
            if (FILLERS == 0 && group >= LAG) {
                int next = group - LAG + STAGES;
                if (block.fills && next < block.n_groups) refill(block, tokens, behind, next);
                behind.advance();
            }
            barrier_wait(block.full + 8 * place.stage, place.parity);
            const u8* tiles = of_warp + place.stage * WEIGHT_BYTES;
            u64 b = Tiles::token_matrix(block.tokens + place.stage * TOKEN_BYTES);
            Tile<FORMAT> packed[M];
            #pragma unroll
            for (int m = 0; m < M; m++) packed[m].load(tiles + m * WGS * BLOCK_BYTES, lane);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                // The multiplications that read this half's fragments are over.
                wgmma_wait<1>();
                // With them, in the second half, all of the stage before.
                if (half == 1) barrier_arrive_if(block.empty + 8 * left_behind, lane == 0 & group > 0);
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
            left_behind = place.stage;
            place.advance();
        }
        wgmma_wait<0>();
        Tiles::settle(acc);
    }

    // The block's sums: tiles first_tile.., a multiple of BLOCK_TILES, of a matrix of n_tiles, times
    // tokens that may be read once `prepare` is through. What `outputs` does with them follows.
    template <class Tokens, class Prepare, class Outputs> __device__ static __forceinline__ void run(
        u8* dynamic, const u8* matrix, int first_tile, int n_tiles, int n_groups,
        const Tokens& tokens, Prepare prepare, const Outputs& outputs
    ) {
        __shared__ __align__(8) u64 barriers[2][STAGES];
        Block block;
        block.shared = dynamic + (0 - shared_address(dynamic) & 1023);
        block.tokens = shared_address(block.shared);
        block.full = shared_address(barriers[0]);
        block.empty = shared_address(barriers[1]);
        block.n_groups = n_groups;
        int n_blocks = (n_tiles - first_tile + BLOCK_TILES - 1) / BLOCK_TILES;
        int n_parts = 1 + (n_blocks < WGS * MT ? n_blocks : WGS * MT);
        int thread = (int)threadIdx.x;
        block.part = FILLERS == 0 ? thread / 32 : thread - WORKERS;
        block.fills = block.part < n_parts && (FILLERS == 0 ? thread % 32 == 0 : thread >= WORKERS);
        block.weights = matrix + (u64)(first_tile / BLOCK_TILES + block.part - 1) * n_groups * BLOCK_BYTES;
        if (thread == FILLING) {
            for (int stage = 0; stage < STAGES; stage++) {
                barrier_init(block.full + 8 * stage, n_parts);
                barrier_init(block.empty + 8 * stage, WGS * 4);
            }
            fence_matrix_units();
        }
        __syncthreads();
        // Weights are under way before the kernel that writes the tokens is done.
        if (block.fills && block.part > 0) block.begin(tokens);
        prepare();
        __syncthreads();
        if (thread == FILLING) block.begin(tokens);
        if (threadIdx.x >= WORKERS) {
            if (FILLERS == 4) give_registers<40>();
            Place place = {0, 0};
            for (int group = STAGES; block.fills && group < n_groups; group++) {
                refill(block, tokens, place, group);
                place.advance();
            }
        } else {
            if (FILLERS == 4) take_registers<232>();
            if (MT > 1 && NT >= 8 && n_blocks <= WGS) {
                // The matrix ends with half a block of rows.
                float acc[1][NT][4];
                multiply(block, tokens, acc);
                outputs(acc);
            } else if (NARROW < NT && tokens.n_bytes() <= NARROW * 1024) {
                float acc[MT][NARROW][4];
                multiply(block, tokens, acc);
                outputs(acc);
            } else {
                float acc[MT][NT][4];
                multiply(block, tokens, acc);
                outputs(acc);
            }
        }
    }
};
