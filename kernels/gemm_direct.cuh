// The product of gemm.cuh for few tokens, where nothing but the weights' way from memory counts.
// Every warp has one tile of 16 out features and goes along K without waiting for another:
//
//   weights  memory -> registers, DEPTH groups of 64 k ahead, the first before the kernel that
//            writes x is done
//   tokens   all of K in shared memory, rows of n_k and 16 bytes, so that the eight rows of a
//            matrix lie in different banks; those that do not exist are not read
//
// With split k each run of a tile has a warp; the first of them adds all.
//
// The same chains of sums as Gemm, so the same bits.

// 16 bytes that are read once.
__device__ __forceinline__ uint4 load_once(const u8* global) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(global));
    return v;
}
__device__ __forceinline__ u32 load_once4(const u8* global) {
    u32 v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(global));
    return v;
}

// A packed tile on its way from memory, all of it in registers.
template <Format FORMAT> struct Fetched;

template <> struct Fetched<MXFP4> : Tile<MXFP4> {
    __device__ __forceinline__ void fetch(const u8* tile, int lane) {
        codes = load_once(tile + lane * 16);
        scales = load_once4(tile + 512 + lane / 4 * 4);
    }
};

template <> struct Fetched<MXINT8> : Tile<MXINT8> {
    __device__ __forceinline__ void fetch(const u8* tile, int lane) {
        codes[0] = load_once(tile + lane * 16);
        codes[1] = load_once(tile + 512 + lane * 16);
        scales = load_once4(tile + 1024 + lane / 4 * 4);
    }
};

template <> struct Fetched<BF16> {
    uint4 steps[4];

    __device__ __forceinline__ void fetch(const u8* tile, int lane) {
        #pragma unroll
        for (int step = 0; step < 4; step++) steps[step] = load_once(tile + step * 512 + lane * 16);
    }
    __device__ __forceinline__ void fragment(const u8* tile, int lane, int step, u32 (&a)[4]) const {
        a[0] = steps[step].x;
        a[1] = steps[step].y;
        a[2] = steps[step].z;
        a[3] = steps[step].w;
    }
};

// A block's tokens: `count` rows of x from the first on, or those that are listed.
struct DirectTokens {
    const u16* x;
    u32 x_stride;
    int n_k;
    int count;
    int first;
    // NULL for none.
    const int* listed;

    __device__ __forceinline__ const u8* row(int token) const {
        u64 row = listed == 0 ? first + token : listed[token];
        return (const u8*)(x + row * x_stride);
    }
};

template <Format FORMAT, int WARPS, int NT, int DEPTH, int SPLITS = 1> struct DirectGemm {
    static constexpr int THREADS = 32 * WARPS * SPLITS, WORKERS = THREADS;
    static constexpr int M_TILES = 1, N_TILES = NT;
    static constexpr bool STREAMS = false, DIRECT = true;
    static constexpr int TILES = WARPS;
    static constexpr int COLUMNS = NT * 8;
    static constexpr int TILE_BYTES = Tile<FORMAT>::BYTES;

    // Which of the block's tiles accumulators [0] are, and which tokens [n].
    __device__ static __forceinline__ void sync_workers() { __syncthreads(); }
    __device__ static __forceinline__ bool keeps(int n) { return true; }
    __device__ static __forceinline__ int tile(int m) { return (int)threadIdx.x / 32 % WARPS; }
    __device__ static __forceinline__ int column(int n) { return n * 8; }

    // Where a warp's weights begin; for a tile behind the matrix's n_tiles the last is read.
    __device__ static __forceinline__ const u8* weights_of_warp(const u8* matrix, int first_tile, int n_tiles, int n_groups) {
        int of_matrix = first_tile + tile(0) < n_tiles ? first_tile + tile(0) : n_tiles - 1;
        return matrix + ((u64)(of_matrix / BLOCK_TILES) * n_groups * BLOCK_TILES + of_matrix % BLOCK_TILES) * TILE_BYTES;
    }

    // Groups first..end of all tokens, to be waited for as one. The first product waits for this, so what it
    // takes to find a row's addresses is kept short.
    __device__ static __forceinline__ void copy_tokens(u32 shared, int row_bytes, const DirectTokens& tokens, int first, int end) {
        for (int token = 0; token < tokens.count; token++) {
            int i = first * 8 + (int)threadIdx.x;
            const u8* from = tokens.row(token) + i * 16;
            u32 to = shared + token * row_bytes + i * 16;
            #pragma unroll 4
            for (; i < end * 8; i += THREADS) {
                copy_async16(to, from, i * 8 < tokens.n_k);
                from += THREADS * 16;
                to += THREADS * 16;
            }
        }
        copy_async_commit();
    }

    // As Gemm::run, but what `outputs` does with the sums is in three, so that it is short behind the wait for
    // the kernel before: it finds where they belong, joins what it needs beside them, and finishes. The
    // first two are before that wait, which `prepare` has; it gives the tokens.
    template <class Prepare, class Outputs> __device__ static __forceinline__ void run(
        u8* dynamic, const u8* matrix, int first_tile, int n_tiles, int n_groups, Prepare prepare, Outputs outputs
    ) {
        int lane = threadIdx.x % 32;
        u32 shared = shared_address(dynamic);
        int row_bytes = n_groups * (GROUP_K * 2) + 16;
        int split = (int)threadIdx.x / 32 / WARPS;
        const auto places = outputs.find();
        int begin = first_group<SPLITS>(split, n_groups), end = first_group<SPLITS>(split + 1, n_groups);
        const u8* weights = weights_of_warp(matrix, first_tile, n_tiles, n_groups) + begin * (BLOCK_TILES * TILE_BYTES);
        Fetched<FORMAT> ahead[DEPTH];
        #pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            if (begin + i < end) ahead[i].fetch(weights + i * BLOCK_TILES * TILE_BYTES, lane);
        }
        const auto joined = outputs.join(places);
        const DirectTokens tokens = prepare();
        // Where all of K is not one warp's, all tokens are waited for at once.
        int n_first = SPLITS == 1 && DEPTH < n_groups ? DEPTH : n_groups;
        copy_tokens(shared, row_bytes, tokens, 0, n_first);
        copy_tokens(shared, row_bytes, tokens, n_first, n_groups);
        // The lane's rows of the matrices: a token that does not exist reads as the first.
        constexpr int MATRICES = NT == 1 ? 1 : NT / 2;
        u32 rows[MATRICES];
        #pragma unroll
        for (int pair = 0; pair < MATRICES; pair++) {
            int c = NT == 1 ? lane % 8 : (pair * 2 + lane / 16) * 8 + lane % 8;
            if (c >= tokens.count) c = 0;
            rows[pair] = shared + c * row_bytes + (NT == 1 ? lane / 8 : lane / 8 % 2) * 16;
        }
        float acc[1][NT][4];
        clear(acc);
        if (SPLITS > 1) {
            copy_async_wait<0>();
            __syncthreads();
        }
        for (int first = begin; first < end; first += DEPTH) {
            if (SPLITS == 1 && first == 0) {
                copy_async_wait<1>();
                __syncthreads();
            } else if (SPLITS == 1 && first == DEPTH) {
                copy_async_wait<0>();
                __syncthreads();
            }
            #pragma unroll
            for (int i = 0; i < DEPTH; i++) {
                int group = first + i;
                if (group >= end) break;
                u32 q[4];
                #pragma unroll
                for (int step = 0; step < 4; step++) {
                    u32 a[4];
                    ahead[i].fragment(0, lane, step, a);
                    u32 k = group * (GROUP_K * 2) + step * 32;
                    if constexpr (NT == 1) {
                        // One load serves two steps.
                        if (step % 2 == 0) load_matrix_x4(q, rows[0] + k);
                        mma_bf16(acc[0][0], a, q[step % 2 * 2], q[step % 2 * 2 + 1]);
                    } else {
                        #pragma unroll
                        for (int pair = 0; pair < MATRICES; pair++) {
                            load_matrix_x4(q, rows[pair] + k);
                            mma_bf16(acc[0][pair * 2], a, q[0], q[1]);
                            mma_bf16(acc[0][pair * 2 + 1], a, q[2], q[3]);
                        }
                    }
                }
                int next = group + DEPTH;
                if (next < end) ahead[i].fetch(weights + (next - begin) * (BLOCK_TILES * TILE_BYTES), lane);
            }
        }
        if constexpr (SPLITS > 1) {
            // All have left the tokens behind: their place is the sums'.
            __syncthreads();
            float4* sums = (float4*)dynamic + tile(0) * NT * 32 + lane;
            if (split > 0) {
                #pragma unroll
                for (int n = 0; n < NT; n++) {
                    const float* c = acc[0][n];
                    sums[((split - 1) * WARPS * NT + n) * 32] = make_float4(c[0], c[1], c[2], c[3]);
                }
            }
            __syncthreads();
            if (split > 0) return;
            float total[1][NT][4];
            clear(total);
            join_run(total, acc);
            #pragma unroll
            for (int n = 0; n < NT; n++) {
                #pragma unroll
                for (int other = 0; other < SPLITS - 1; other++) {
                    float4 c = sums[(other * WARPS * NT + n) * 32];
                    total[0][n][0] += c.x;
                    total[0][n][1] += c.y;
                    total[0][n][2] += c.z;
                    total[0][n][3] += c.w;
                }
            }
            outputs.finish(total, places, joined);
        } else {
            outputs.finish(acc, places, joined);
        }
    }
};
