// The product of gemm.cuh with one token, by warps that take their weights through shared memory:
// every warp has stages of its own there, so nobody waits for another, and a product's first
// weights may be on their way long before what they are multiplied by is known.
//
//   memory -> STAGES stages of some groups of 64 k -> registers, a group ahead -> mma
//
// A stage is filled again when its last group is in registers. How many groups a stage has is the
// caller's choice: a warp alone needs more bytes under way than one of many. The same chain of sums
// as Gemm, so the same bits.

// src/engine/cuda/layer_step.rs has the same number.
constexpr int STAGES = 4;

// A tile in the registers of its warp, brought from shared memory.
template <Format FORMAT> struct Held : Tile<FORMAT> {};
template <> struct Held<BF16> : Fetched<BF16> {
    __device__ __forceinline__ void load(const u8* tile, int lane) {
        #pragma unroll
        for (int step = 0; step < 4; step++) steps[step] = *(const uint4*)(tile + step * 512 + lane * 16);
    }
};

// A warp's stages of a region, and the weights that go through them.
template <Format FORMAT> struct Stream {
    static constexpr int TILE_BYTES = Tile<FORMAT>::BYTES;
    // Large tiles by one bulk copy a group; small ones, of which there would be very many, by cp.async.
#if __CUDA_ARCH__ >= 900
    static constexpr bool BULK = TILE_BYTES >= 1024;
#else
    static constexpr bool BULK = false;
#endif

    // A stage's barrier completes a phase when it has been filled: the n-th filling of all stages,
    // whatever the product, is phase n / STAGES of barrier n % STAGES. `used` were before this tile.
    u32 barriers;
    u32 used;
    u8* stages;
    const u8* weights;
    int n_groups, stage_groups, n_stages;

    __device__ __forceinline__ void begin_barriers(u64* of_warp) {
        barriers = shared_address(of_warp);
        used = 0;
        if (threadIdx.x % 32 == 0) {
            for (int i = 0; i < STAGES; i++) barrier_init(barriers + i * 8, BULK ? 1 : 32);
#if __CUDA_ARCH__ >= 900
            fence_matrix_units();
#endif
        }
        __syncwarp();
    }

    // For a product with K of n_k, groups_a_stage of 64 k at a time.
    __device__ __forceinline__ void cut(u8* region, u32 n_k, u32 groups_a_stage) {
        n_groups = (int)(n_k + GROUP_K - 1) / GROUP_K;
        stage_groups = (int)groups_a_stage;
        n_stages = (n_groups + stage_groups - 1) / stage_groups;
        stages = region + threadIdx.x / 32 * (STAGES * stage_groups * TILE_BYTES);
    }

    __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
    __device__ __forceinline__ u8* place(int stage) const {
        return stages + (used + stage) % STAGES * (stage_groups * TILE_BYTES);
    }

    __device__ __forceinline__ void fill(int stage) const {
        if (stage >= n_stages) return;
        u32 barrier = barriers + (used + stage) % STAGES * 8;
        u32 to = shared_address(place(stage));
        int first = stage * stage_groups, left = n_groups - first;
        int n = left < stage_groups ? left : stage_groups;
        const u8* from = weights + (u64)first * (BLOCK_TILES * TILE_BYTES);
        if constexpr (BULK) {
            if (lane() == 0) barrier_expect(barrier, n * TILE_BYTES);
            __syncwarp();
            if (lane() < n) {
                copy_bulk(to + lane() * TILE_BYTES, from + lane() * (BLOCK_TILES * TILE_BYTES), TILE_BYTES, barrier);
            }
        } else {
            #pragma unroll 1
            for (int i = 0; i < n; i++) {
                #pragma unroll
                for (int at = 0; at < TILE_BYTES; at += 512) {
                    int byte = at + lane() * 16;
                    if (at + 512 <= TILE_BYTES || byte < TILE_BYTES) copy_async16(to + byte, from + byte, true);
                }
                to += TILE_BYTES;
                from += BLOCK_TILES * TILE_BYTES;
            }
            copy_async_arrive(barrier);
        }
    }

    // Asks for the first weights of tile `tile` of a matrix.
    __device__ __forceinline__ void begin(const u8* matrix, u32 tile) {
        weights = matrix + ((u64)(tile / BLOCK_TILES) * n_groups * BLOCK_TILES + tile % BLOCK_TILES) * TILE_BYTES;
        #pragma unroll 1
        for (int stage = 0; stage < STAGES; stage++) fill(stage);
    }

    // c = the tile's product with what lies in shared memory at `tokens`. A group is read into
    // registers while the one before it is multiplied.
    __device__ __forceinline__ void multiply(const u8* tokens, float (&c)[4]) {
        // The matrices' eight rows are all the one that there is.
        u32 row = shared_address(tokens) + lane() / 8 * 16;
        Held<FORMAT> next;
        u32 next_tokens[2][4];
        const u8* at;
        auto wait = [&](int stage) {
            barrier_wait(barriers + (used + stage) % STAGES * 8, (used + stage) / STAGES & 1);
            at = place(stage);
        };
        auto read = [&](int group) {
            next.load(at, lane());
            at += TILE_BYTES;
            load_matrix_x4(next_tokens[0], row + group * (GROUP_K * 2));
            load_matrix_x4(next_tokens[1], row + group * (GROUP_K * 2) + 64);
        };
        #pragma unroll
        for (int i = 0; i < 4; i++) c[i] = 0.0f;
        int stage = 0, left = stage_groups;
        wait(0);
        read(0);
        // Codes take instructions to unpack; bf16 only waits for the sums before.
        constexpr int UNROLL = FORMAT == BF16 ? 1 : 2;
        #pragma unroll UNROLL
        for (int group = 0; group < n_groups; group++) {
            Held<FORMAT> held = next;
            u32 b[2][4];
            #pragma unroll
            for (int i = 0; i < 8; i++) b[i / 4][i % 4] = next_tokens[i / 4][i % 4];
            if (group + 1 < n_groups) {
                if (--left == 0) {
                    left = stage_groups;
                    // All lanes have read it.
                    __syncwarp();
                    fill(stage + STAGES);
                    stage++;
                    wait(stage);
                }
                read(group + 1);
            }
            #pragma unroll
            for (int step = 0; step < 4; step++) {
                u32 a[4];
                held.fragment(0, lane(), step, a);
                mma_bf16(c, a, b[step / 2][step % 2 * 2], b[step / 2][step % 2 * 2 + 1]);
            }
        }
        used += n_stages;
        // The next tile's weights overwrite the last stages.
        __syncwarp();
    }
};
