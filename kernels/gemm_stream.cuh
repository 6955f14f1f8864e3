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
// FILLERS warps fill, of the first of which each lane has a part: one, or a warpgroup, which gives its
// registers to those that multiply.
//
// A block takes items of the work, a tile of outputs each: one, or one behind the other.
//
// Split k (gemm.cuh) comes in two ways: SPREAD over a cluster of SPLITS blocks along the grid's z, each
// with a run, which leave each other their sums and then keep some octets each; or one block has all
// runs, one behind the other.
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

// Items that a block's warps have been told of: more than stages, so that one's place is not another's
// while it is needed.
#define TOLD_ITEMS 16

// A tile of outputs: tiles first_tile.. of the matrix that `weights` is, times tokens.
template <class Tokens> struct StreamItem {
    const u8* weights;
    int first_tile;
    Tokens tokens;
    bool exists;
};

// WGS warpgroups with MT blocks of 64 features each, NT octets of tokens, BLOCKS a multiprocessor.
// Where a block has one item, tokens of NARROW octets at most are multiplied as so many.
template <Format FORMAT, int WGS, int MT, int NT, int BLOCKS, int FILLERS, int NARROW = NT, int SPLITS = 1, bool SPREAD = (SPLITS > 1)>
struct StreamGemm : WarpgroupTiles<FORMAT, WGS, MT, NT, BLOCKS> {
    typedef WarpgroupTiles<FORMAT, WGS, MT, NT, BLOCKS> Tiles;
    using Tiles::WORKERS, Tiles::TILE_BYTES, Tiles::BLOCK_BYTES, Tiles::TOKEN_BYTES, Tiles::WEIGHT_BYTES, Tiles::STAGES;
    static constexpr int THREADS = WORKERS + 32 * FILLERS;
    static constexpr bool STREAMS = true;
    // Parts of a stage: the tokens, which are part 0, and blocks of weights.
    static constexpr int PARTS = 1 + WGS * MT;
    static_assert(PARTS <= 32 && (FILLERS == 1 || FILLERS == 4), "a part has its lane");

    // What a thread knows of its block.
    struct Block {
        u8* shared;
        u32 tokens, full, empty;
        // Groups of a tile, those of them that are the block's, and the first of these.
        int all_groups, n_groups, first_group;
        int n_tiles;
        // Where blocks of a cluster leave sums for each other.
        float4* exchange;

        // Blocks of 64 features of an item.
        template <class Item> __device__ __forceinline__ int n_blocks(const Item& item) const {
            int left = (n_tiles - item.first_tile + BLOCK_TILES - 1) / BLOCK_TILES;
            return left < WGS * MT ? left : WGS * MT;
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

    // A lane that fills its part of an item's stages. A stage is full when all parts' bytes, or that there
    // are none, are told, and those have come.
    template <class Item> struct Filling {
        const Item& item;
        u32 full, to, step;
        int part, first_group;
        // Of weights that are there.
        bool has;
        const u8* weights;

        __device__ __forceinline__ Filling(const Block& block, const Item& item, int part) : item(item), part(part) {
            full = block.full;
            to = part == 0 ? block.tokens : block.tokens + STAGES * TOKEN_BYTES + (part - 1) * BLOCK_BYTES;
            step = part == 0 ? TOKEN_BYTES : WEIGHT_BYTES;
            first_group = block.first_group;
            has = part <= block.n_blocks(item);
            u64 of_block = (u64)(item.first_tile / BLOCK_TILES + part - 1) * block.all_groups;
            weights = item.weights + (of_block + first_group) * BLOCK_BYTES;
        }
        __device__ __forceinline__ void fill(int stage, int group) const {
            u32 barrier = full + 8 * stage;
            if (part == 0) {
                barrier_expect(barrier, item.tokens.n_bytes());
                item.tokens.fill(to + stage * step, first_group + group, barrier);
            } else if (has) {
                barrier_expect(barrier, BLOCK_BYTES);
                copy_bulk(to + stage * step, weights + (u64)group * BLOCK_BYTES, BLOCK_BYTES, barrier);
            } else {
                barrier_arrive(barrier);
            }
        }
    };

    // Adds groups first..end of the block's, for the first M blocks of each warpgroup and the first N octets.
    template <int M, int N> __device__ static __forceinline__ void multiply_run(
        const Block& block, Place& place, int first, int end, float (&acc)[M][N][4]
    ) {
        int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
        u32 fragments[2][2][M][4];
        int left_behind = 0;
        const u8* of_warp = block.shared + STAGES * TOKEN_BYTES + warp * TILE_BYTES;
        u32 of_tokens = Tiles::token_matrices(block.tokens);
        for (int group = first; group < end; group++) {
            barrier_wait(block.full + 8 * place.stage, place.parity);
            const u8* tiles = of_warp + place.stage * WEIGHT_BYTES;
            u64 b = Tiles::token_matrix(of_tokens, place.stage * TOKEN_BYTES);
            Tile<FORMAT> packed[M];
            #pragma unroll
            for (int m = 0; m < M; m++) packed[m].load(tiles + m * WGS * BLOCK_BYTES, lane);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                // The multiplications that read this half's fragments are over.
                wgmma_wait<1>();
                // With them, in the second half, all of the stage before.
                if (half == 1) barrier_arrive_if(block.empty + 8 * left_behind, lane == 0 & group > first);
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
                        // A k-step is 32 bytes further in each row.
                        wgmma_bf16(acc[m], fragments[half][i][m], b + (half * 2 + i) * 2, 1);
                    }
                }
                wgmma_commit();
            }
            left_behind = place.stage;
            place.advance();
        }
        wgmma_wait<0>();
        Tiles::settle(acc);
        barrier_arrive_if(block.empty + 8 * left_behind, lane == 0 & end > first);
    }

    // All that the block has of an item's K.
    template <int M, int N> __device__ static __forceinline__ void multiply(const Block& block, Place& place, float (&acc)[M][N][4]) {
        clear(acc);
        if constexpr (SPLITS == 1) {
            multiply_run(block, place, 0, block.n_groups, acc);
        } else if constexpr (SPREAD) {
            multiply_run(block, place, 0, block.n_groups, acc);
            join_cluster(block, acc);
        } else {
            #pragma unroll 1
            for (int split = 0; split < SPLITS; split++) {
                int first = ::first_group<SPLITS>(split, block.n_groups), end = ::first_group<SPLITS>(split + 1, block.n_groups);
                if (first == end) continue;
                float sums[M][N][4];
                clear(sums);
                multiply_run(block, place, first, end, sums);
                join_run(acc, sums);
            }
        }
    }

    // The first octet of N that block `split` keeps, and whether this block keeps octet n.
    __device__ static constexpr int first_kept(int split, int n_octets) { return (split * n_octets + SPLITS - 1) / SPLITS; }
    __device__ static __forceinline__ bool keeps(int n) { return !SPREAD || n * SPLITS / NT == (int)blockIdx.z; }
    // The columns of the octets that it keeps, and how many there are at most.
    static constexpr int MOST_COLUMNS = SPREAD ? (NT + SPLITS - 1) / SPLITS * 8 : NT * 8;
    __device__ static __forceinline__ u32 first_column() { return SPREAD ? 8 * first_kept((int)blockIdx.z, NT) : 0; }
    __device__ static __forceinline__ u32 end_column() { return SPREAD ? 8 * first_kept((int)blockIdx.z + 1, NT) : NT * 8; }

    // Of the octets that the block keeps, the sums of all blocks of the cluster: each leaves its own of the
    // others' octets in memory, that is in L2 (shared memory of another block takes them at a tenth of that
    // rate, kernels/NOTES.md). The threads that fill come to sync_cluster, too.
    template <int M, int N> __device__ static __forceinline__ void join_cluster(const Block& block, float (&acc)[M][N][4]) {
        constexpr int MOST = (N + SPLITS - 1) / SPLITS;
        int rank = (int)blockIdx.z;
        auto at = [&](int keeper, int split, int m, int n) {
            u32 of_run = (blockIdx.x * SPLITS + keeper) * SPLITS + split;
            return block.exchange + (u64)((of_run * M + m) * MOST + n - first_kept(keeper, N)) * WORKERS + threadIdx.x;
        };
        #pragma unroll
        for (int n = 0; n < N; n++) {
            int keeper = n * SPLITS / N;
            if (keeper == rank) continue;
            #pragma unroll
            for (int m = 0; m < M; m++) *at(keeper, rank, m, n) = *(const float4*)acc[m][n];
        }
        sync_cluster();
        #pragma unroll
        for (int n = 0; n < N; n++) {
            int keeper = n * SPLITS / N;
            if (keeper != rank) continue;
            #pragma unroll
            for (int m = 0; m < M; m++) {
                float4 runs[SPLITS];
                #pragma unroll
                for (int split = 0; split < SPLITS; split++) {
                    runs[split] = split == rank ? *(const float4*)acc[m][n] : load_l2(at(keeper, split, m, n));
                }
                float4 total = {0.0f, 0.0f, 0.0f, 0.0f};
                #pragma unroll
                for (int split = 0; split < SPLITS; split++) {
                    total.x += runs[split].x;
                    total.y += runs[split].y;
                    total.z += runs[split].z;
                    total.w += runs[split].w;
                }
                *(float4*)acc[m][n] = total;
            }
        }
    }

    // The block as all its threads know it. Its barriers are ready for the warp that made them, which is
    // the one that fills; others meet it first.
    template <class Work> __device__ static __forceinline__ Block begin(u8* dynamic, int n_tiles, int n_groups, const Work& work) {
        __shared__ __align__(8) u64 barriers[2][STAGES];
        int split = SPREAD ? (int)blockIdx.z : 0, split_end = SPREAD ? split + 1 : SPLITS;
        Block block;
        block.shared = dynamic + (0 - shared_address(dynamic) & 1023);
        block.tokens = shared_address(block.shared);
        block.full = shared_address(barriers[0]);
        block.empty = shared_address(barriers[1]);
        block.all_groups = n_groups;
        block.first_group = ::first_group<SPLITS>(split, n_groups);
        block.n_groups = ::first_group<SPLITS>(split_end, n_groups) - block.first_group;
        block.n_tiles = n_tiles;
        if constexpr (SPREAD) block.exchange = work.args.exchange;
        if (threadIdx.x == WORKERS) {
            for (int stage = 0; stage < STAGES; stage++) {
                barrier_init(block.full + 8 * stage, PARTS);
                barrier_init(block.empty + 8 * stage, WGS * 4);
            }
            fence_matrix_units();
        }
        __syncwarp();
        return block;
    }

    // One item, that with the block's number, of a work on matrices of n_tiles:
    //
    //   find(i)             item i, if it exists
    //   begin()             waits for what was before; weights are under way already
    //   prepare(item)       what is known of an item before it is multiplied, to store its sums
    //   store(item, prepared, shared, acc)
    template <class Work> __device__ static __forceinline__ void run(u8* dynamic, int n_tiles, int n_groups, const Work& work) {
        const auto item = work.find(blockIdx.x);
        if (!item.exists) {
            // Or kernels behind would think that all before has been waited for.
            work.begin();
            return;
        }
        Block block = begin(dynamic, n_tiles, n_groups, work);
        int part = (int)threadIdx.x - WORKERS;
        bool fills = part >= 0 && part < PARTS;
        const Filling<decltype(item)> filling(block, item, fills ? part : 0);
        int ahead = block.n_groups < STAGES ? block.n_groups : STAGES;
        if (fills && part > 0) {
            for (int group = 0; group < ahead; group++) filling.fill(group, group);
        }
        work.begin();
        if (part == 0) {
            for (int group = 0; group < ahead; group++) filling.fill(group, group);
        }
        const auto prepared = work.prepare(item);
        __syncthreads();
        if (part >= 0) {
            if (FILLERS == 4) give_registers<56>();
            Place place = {0, 0};
            for (int group = STAGES; fills && group < block.n_groups; group++) {
                barrier_wait(block.empty + 8 * place.stage, place.parity);
                filling.fill(place.stage, group);
                place.advance();
            }
            if (SPREAD) sync_cluster();
            return;
        }
        if (FILLERS == 4) take_registers<224>();
        Place place = {0, 0};
        if (MT > 1 && NT >= 8 && block.n_blocks(item) <= WGS) {
            // The matrix ends with half a block of rows.
            float acc[1][NT][4];
            multiply(block, place, acc);
            work.store(item, prepared, block.shared, acc);
        } else if (NARROW < NT && item.tokens.n_bytes() <= NARROW * 1024) {
            float acc[MT][NARROW][4];
            multiply(block, place, acc);
            work.store(item, prepared, block.shared, acc);
        } else {
            float acc[MT][NT][4];
            multiply(block, place, acc);
            work.store(item, prepared, block.shared, acc);
        }
    }

    // All items that are gridDim.x apart, from that with the block's number on: the stages of the next are
    // filled while the sums of one are stored. Beside `run`'s a work has
    //
    //   wait_for_tokens()   until tokens may be read, for the thread that fills them
    //   Told, tell(n, item) leaves in shared memory, from `told`, what the block's n-th item is, or that there
    //                       is none: threads that multiply know it when its first stage is full
    //   told(n)             the item as they know it
    //
    // They multiply in one way, for several in this loop would have too few registers.
    template <class Work> __device__ static __forceinline__ void run_all(u8* dynamic, int n_tiles, int n_groups, const Work& work) {
        static_assert(TOLD_ITEMS > STAGES && !SPREAD, "an item's place is not another's while it is needed");
        Block block = begin(dynamic, n_tiles, n_groups, work);
        __syncthreads();
        int part = (int)threadIdx.x - WORKERS;
        if (part >= 0) {
            if (FILLERS == 4) give_registers<56>();
            if (part >= PARTS) return;
            // The stages are empty at first, as if a phase before had ended.
            Place place = {0, 1};
            if (part == 0) work.wait_for_tokens();
            for (u32 i = blockIdx.x, n = 0;; i += gridDim.x, n++) {
                const auto item = work.find(i);
                if (part == 0) work.tell(n, item);
                if (!item.exists) break;
                const Filling<decltype(item)> filling(block, item, part);
                for (int group = 0; group < block.n_groups; group++) {
                    barrier_wait(block.empty + 8 * place.stage, place.parity);
                    filling.fill(place.stage, group);
                    place.advance();
                }
            }
            // One more stage tells those that multiply that there is no item.
            barrier_wait(block.empty + 8 * place.stage, place.parity);
            barrier_arrive(block.full + 8 * place.stage);
            return;
        }
        if (FILLERS == 4) take_registers<224>();
        work.begin();
        Place place = {0, 0};
        #pragma unroll 1
        for (u32 n = 0;; n++) {
            barrier_wait(block.full + 8 * place.stage, place.parity);
            const auto item = work.told(n);
            if (!item.exists) return;
            const auto prepared = work.prepare(item);
            float acc[MT][NT][4];
            multiply(block, place, acc);
            // Told once more, so that it need not be kept in registers meanwhile.
            asm volatile("" : "+r"(n));
            work.store(work.told(n), prepared, block.shared, acc);
        }
    }
};
