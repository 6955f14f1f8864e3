// One matrix product for all weights: out features are the rows (M) of mma.m16n8k16, tokens its
// columns (N). Put in front of the kernels named matmul.
//
// Weights are packed at load into tiles of 16 out features x 64 k, in the order in which lanes
// hold them (src/engine/cuda/pack.rs):
//
//   bf16    2048 bytes: [4 k-steps][32 lanes][a0 a1 a2 a3]
//   mxint8  1056 bytes: [2 halves of k][32 lanes][2 k-steps] two words of 4 codes, then [8 g] scales
//   mxfp4    544 bytes: [32 lanes][4 k-steps] words of 8 codes, then [8 g] scales
//
//   scales  of a g: [rows g, g + 8][2 halves of k] bytes
//
//   matrix  [blocks of 64 out features][groups of 64 k][4 tiles]: 64 k of a block are one run
//
// A block takes WM x MT tiles and WN x NT x 8 tokens, and goes along k with STAGES stages of
// 64 k in shared memory, filled by cp.async:
//
//            tokens  WN x NT x 8
//          +---------+---------+
//     MT   | warp 0  | warp WM |     every warp walks all of K by itself:
//          +---------+---------+     one f32 accumulator chain for each output,
//     MT   | warp 1  |   ...   |     k16 steps ascending, whatever WM, WN, MT, NT
//          +---------+---------+
//
// So an output's bits do not depend on the variant that computes it, nor on the other tokens.
//
// Split k: an output of some products is the sum of SPLITS such chains, each of a run of groups,
// added in order. Which warp or block has a run is the variant's affair.

#define TILE_M 16
#define GROUP_K 64
#define BLOCK_TILES 4
// Bytes of a token's 64 k in shared memory: 16 more than there are, so that the eight rows of a
// matrix lie in different banks.
#define COLUMN_BYTES 144

// Stages of the variants whose stage is large: GPUs of 99 KB a block hold two.
#ifdef SMALL_SHARED
#define BIG_STAGES 2
#else
#define BIG_STAGES 3
#endif

enum Format { BF16, MXINT8, MXFP4 };

// First group of run `split`; of few groups some runs have none. src/engine/cuda/variants.rs
// computes the same.
template <int SPLITS> __device__ __forceinline__ int first_group(int split, int n_groups) {
    return n_groups * split / SPLITS;
}
// Whether a run ends with `group`.
template <int SPLITS> __device__ __forceinline__ bool ends_run(int group, int n_groups) {
    return ((group + 1) * SPLITS - 1) / n_groups != ((group + 2) * SPLITS - 1) / n_groups;
}

// The sums of a run join those before it, which begin as zeros.
template <int M, int N> __device__ __forceinline__ void join_run(float (&total)[M][N][4], const float (&sums)[M][N][4]) {
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int n = 0; n < N; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++) total[m][n][i] += sums[m][n][i];
}
template <int M, int N> __device__ __forceinline__ void clear(float (&sums)[M][N][4]) {
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int n = 0; n < N; n++)
            #pragma unroll
            for (int i = 0; i < 4; i++) sums[m][n][i] = 0.0f;
}

// Words with codes' bits at 15, 8, 7, 6 of both halves: sign, exponent and mantissa of a bf16
// that is 2^126 too small.
#define CODE_BITS 0x81C081C0u

// 8 codes to bf16, times their rows' scales (`of_rows`: row g's in the low half, row g + 8's in the
// high one). What shifts and masks have half the rate of what multiplies, so the codes' bits lie for
// few of those: one pair needs a mask, two a shift and a mask, the last two of each. The second pair's
// signs lie in one half and its other bits in the other; a rotation brings them together.
__device__ __forceinline__ void unpack_mxfp4(u32 word, u32 of_rows, u32 (&a)[4]) {
    a[0] = word & CODE_BITS;
    a[1] = __funnelshift_l(word, word, 10) & CODE_BITS;
    a[2] = (word << 6) & CODE_BITS;
    a[3] = ((word << 4) & 0x81808180u) | ((word >> 4) & 0x00400040u);
#ifdef WIDE_SCALES
    // A scale above 2 and 2^126 are no bf16 together: two products.
    for (int i = 0; i < 4; i++) a[i] = mul_bf16x2(a[i], 0x7E807E80u);
#endif
    a[0] = mul_bf16x2(a[0], both_low(of_rows));
    a[1] = mul_bf16x2(a[1], both_high(of_rows));
    a[2] = mul_bf16x2(a[2], both_low(of_rows));
    a[3] = mul_bf16x2(a[3], both_high(of_rows));
}

// 4 codes to bf16, times their rows' scales, in 7 instructions. A half of the word holds a code of
// row g, its sign at bit 15 and its magnitude m in bits 0 to 6, and one of row g + 8 at the same
// places of the half with its bytes swapped. With an exponent above it m reads as 1 + m / 128, so
// for the scale s of 128 steps
//
//   (1 + m / 128) s - s = m steps, or with both signs turned -m,
//
// exact, for bf16 holds every product of a code and a step. Zero is +0 whatever its sign.
__device__ __forceinline__ u32 unpack_mxint8(u32 word, u32 scale) {
    u32 significands = (word & 0x807F807Fu) | 0x3F803F80u;
#ifdef WIDE_SCALES
    // The greatest scale has no bf16 of 128 steps, only of 64: in units of those, then their product.
    u32 values = fma_bf16x2(significands, 0x40004000u, (~word & 0x80008000u) | 0x40004000u);
    return mul_bf16x2(values, scale);
#else
    return fma_bf16x2(significands, scale, (~word & 0x80008000u) | scale);
#endif
}

// Both bytes of each half in each other's place.
__device__ __forceinline__ u32 swap_bytes(u32 word) { return __byte_perm(word, 0, 0x2301); }

// The scales of rows g and g + 8 for a half of a tile's k: packed bytes `half` and 2 + `half` are
// biased exponents.
__device__ __forceinline__ u32 scales_of_rows(u32 scales, int half) {
    return (half == 0 ? scales << 7 : scales >> 1) & 0x7F807F80u;
}

// A packed tile as a lane reads it: what it keeps of the tile for all four k-steps, and the
// fragment of each.
template <Format FORMAT> struct Tile;

template <> struct Tile<MXFP4> {
    static constexpr int BYTES = 544;
    uint4 codes;
    u32 scales;

    __device__ __forceinline__ void load(const u8* tile, int lane) {
        codes = *(const uint4*)(tile + lane * 16);
        scales = *(const u32*)(tile + 512 + lane / 4 * 4);
    }
    // `step` is known to the compiler.
    __device__ __forceinline__ void fragment(const u8* tile, int lane, int step, u32 (&a)[4]) const {
        u32 word = step == 0 ? codes.x : step == 1 ? codes.y : step == 2 ? codes.z : codes.w;
        unpack_mxfp4(word, scales_of_rows(scales, step / 2), a);
    }
};

template <> struct Tile<MXINT8> {
    static constexpr int BYTES = 1056;
    uint4 codes[2];
    u32 scales;

    __device__ __forceinline__ void load(const u8* tile, int lane) {
        codes[0] = *(const uint4*)(tile + lane * 16);
        codes[1] = *(const uint4*)(tile + 512 + lane * 16);
        scales = *(const u32*)(tile + 1024 + lane / 4 * 4);
    }
    __device__ __forceinline__ void fragment(const u8* tile, int lane, int step, u32 (&a)[4]) const {
        const uint4& of_half = codes[step / 2];
        u32 near = step % 2 == 0 ? of_half.x : of_half.z, far = step % 2 == 0 ? of_half.y : of_half.w;
        u32 of_rows = scales_of_rows(scales, step / 2);
        u32 scale_g = both_low(of_rows), scale_g8 = both_high(of_rows);
        a[0] = unpack_mxint8(near, scale_g);
        a[1] = unpack_mxint8(swap_bytes(near), scale_g8);
        a[2] = unpack_mxint8(far, scale_g);
        a[3] = unpack_mxint8(swap_bytes(far), scale_g8);
    }
};

template <> struct Tile<BF16> {
    static constexpr int BYTES = 2048;

    __device__ __forceinline__ void load(const u8* tile, int lane) {}
    __device__ __forceinline__ void fragment(const u8* tile, int lane, int step, u32 (&a)[4]) const {
        uint4 four = *(const uint4*)(tile + step * 512 + lane * 16);
        a[0] = four.x;
        a[1] = four.y;
        a[2] = four.z;
        a[3] = four.w;
    }
};

template <Format FORMAT, int WM, int WN, int MT, int NT, int STAGES, int SPLITS = 1> struct Gemm {
    static constexpr int THREADS = 32 * WM * WN, WORKERS = THREADS;
    static constexpr int M_TILES = MT, N_TILES = NT;
    static constexpr int TILES = WM * MT;
    static constexpr int COLUMNS = WN * NT * 8;
    static constexpr bool STREAMS = false, DIRECT = false;
    static constexpr int TILE_BYTES = Tile<FORMAT>::BYTES;
    static constexpr int A_BYTES = TILES * TILE_BYTES;
    static constexpr int STAGE_BYTES = A_BYTES + COLUMNS * COLUMN_BYTES;

    // Which of the block's tiles accumulators [m] are, and which tokens [n].
    __device__ static __forceinline__ void sync_workers() { __syncthreads(); }
    __device__ static __forceinline__ bool keeps(int n) { return true; }
    __device__ static __forceinline__ int tile(int m) { return (int)threadIdx.x / 32 % WM * MT + m; }
    __device__ static __forceinline__ int column(int n) { return ((int)threadIdx.x / 32 / WM * NT + n) * 8; }

    // What a thread copies of each stage: its chunks' places in weights, tokens and the stage.
    // Computed once, so that a stage costs few instructions beside the copies themselves.
    struct Copies {
        static constexpr int TILE_CHUNKS = TILE_BYTES / 16;
        static constexpr int N_WEIGHTS = (TILES * TILE_CHUNKS + THREADS - 1) / THREADS;
        static constexpr int N_TOKENS = (COLUMNS * 8 + THREADS - 1) / THREADS;

        // In chunks of 16 bytes, from the matrix and from x; NONE for no token.
        u32 weights[N_WEIGHTS];
        u32 tokens[N_TOKENS];
        // Places in a stage of the thread's first copies.
        u32 weights_at;
        u32 tokens_at;
        // The same chunk of every token's 64 k, for THREADS is a multiple of 8.
        int k;

        // For tiles behind the matrix's n_tiles the last is copied.
        __device__ __forceinline__ Copies(u32 shared, int first_tile, int n_tiles, int n_groups) {
            int thread = (int)threadIdx.x;
            #pragma unroll
            for (int n = 0; n < N_WEIGHTS; n++) {
                int i = n * THREADS + thread;
                int tile = first_tile + i / TILE_CHUNKS;
                if (tile >= n_tiles) tile = n_tiles - 1;
                int of_matrix = tile / BLOCK_TILES * n_groups * BLOCK_TILES + tile % BLOCK_TILES;
                weights[n] = (u32)(of_matrix * TILE_CHUNKS + i % TILE_CHUNKS);
            }
            k = thread % 8 * 8;
            weights_at = shared + thread * 16;
            tokens_at = shared + A_BYTES + thread / 8 * COLUMN_BYTES + thread % 8 * 16;
        }

        // columns[c]: the row of x that is token c, negative for none; x has rows of x_stride.
        __device__ __forceinline__ void find_tokens(u32 x_stride, const int* columns) {
            int thread = (int)threadIdx.x;
            #pragma unroll
            for (int n = 0; n < N_TOKENS; n++) {
                int i = n * THREADS + thread;
                int row = i < COLUMNS * 8 ? columns[i / 8] : -1;
                tokens[n] = row >= 0 ? (u32)row * (x_stride / 8) + thread % 8 : NONE;
            }
        }

        __device__ __forceinline__ void fill_weights(int stage, int group, const u8* matrix) const {
            u32 to = weights_at + stage * STAGE_BYTES;
            #pragma unroll
            for (int n = 0; n < N_WEIGHTS; n++) {
                if ((n + 1) * THREADS <= TILES * TILE_CHUNKS || n * THREADS + (int)threadIdx.x < TILES * TILE_CHUNKS) {
                    const u8* from = matrix + (u64)(weights[n] + group * BLOCK_TILES * TILE_CHUNKS) * 16;
                    copy_async16(to + n * THREADS * 16, from, true);
                }
            }
        }

        __device__ __forceinline__ void fill_tokens(int stage, int group, const u16* x, int n_k) const {
            bool inside = group * GROUP_K + k < n_k;
            u32 to = tokens_at + stage * STAGE_BYTES;
            #pragma unroll
            for (int n = 0; n < N_TOKENS; n++) {
                if ((n + 1) * THREADS <= COLUMNS * 8 || n * THREADS + (int)threadIdx.x < COLUMNS * 8) {
                    const u16* from = x + (u64)(tokens[n] + group * 8) * 8;
                    copy_async16(to + n * (THREADS / 8) * COLUMN_BYTES, from, inside && tokens[n] != NONE);
                }
            }
        }
    };

    __device__ static __forceinline__ void multiply(float (&acc)[MT][NT][4], const u8* stage) {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const u8* tiles = stage + (warp % WM) * MT * TILE_BYTES;
        u32 tokens = shared_address(stage) + A_BYTES + (warp / WM) * NT * 8 * COLUMN_BYTES;
        Tile<FORMAT> packed[MT];
        #pragma unroll
        for (int m = 0; m < MT; m++) packed[m].load(tiles + m * TILE_BYTES, lane);
        u32 q[4];
        #pragma unroll
        for (int step = 0; step < 4; step++) {
            u32 b[NT][2];
            if constexpr (NT == 1) {
                // One load serves two steps.
                if (step % 2 == 0) {
                    load_matrix_x4(q, tokens + lane % 8 * COLUMN_BYTES + (step * 2 + lane / 8) * 16);
                }
                b[0][0] = q[step % 2 * 2];
                b[0][1] = q[step % 2 * 2 + 1];
            } else {
                #pragma unroll
                for (int n = 0; n < NT; n += 2) {
                    int column = (n + lane / 16) * 8 + lane % 8;
                    load_matrix_x4(q, tokens + column * COLUMN_BYTES + (step * 2 + lane / 8 % 2) * 16);
                    b[n][0] = q[0];
                    b[n][1] = q[1];
                    b[n + 1][0] = q[2];
                    b[n + 1][1] = q[3];
                }
            }
            #pragma unroll
            for (int m = 0; m < MT; m++) {
                u32 a[4];
                packed[m].fragment(tiles + m * TILE_BYTES, lane, step, a);
                #pragma unroll
                for (int n = 0; n < NT; n++) mma_bf16(acc[m][n], a, b[n][0], b[n][1]);
            }
        }
    }

    // The block's sums: tiles first_tile.. of a matrix of n_tiles, times the tokens of x that
    // `columns` tells after it was prepared by `prepare`, which waits for the kernel before. What
    // `outputs` does with them follows.
    template <class Prepare, class Outputs> __device__ static __forceinline__ void run(
        u8* shared, const u8* matrix, int first_tile, int n_tiles, int n_groups,
        const u16* x, u32 x_stride, int n_k, const int* columns, Prepare prepare, Outputs outputs
    ) {
        float acc[MT][NT][4], total[MT][NT][4];
        clear(acc);
        clear(total);
        Copies copies(shared_address(shared), first_tile, n_tiles, n_groups);
        // Weights are there before the kernel that writes x is done.
        for (int stage = 0; stage < STAGES - 1; stage++) {
            if (stage < n_groups) copies.fill_weights(stage, stage, matrix);
        }
        prepare();
        __syncthreads();
        copies.find_tokens(x_stride, columns);
        for (int stage = 0; stage < STAGES - 1; stage++) {
            if (stage < n_groups) copies.fill_tokens(stage, stage, x, n_k);
            copy_async_commit();
        }
        int from = 0, to = STAGES - 1;
        for (int group = 0; group < n_groups; group++) {
            copy_async_wait<STAGES - 2>();
            __syncthreads();
            // The stage that all threads have left behind.
            int next = group + STAGES - 1;
            if (next < n_groups) {
                copies.fill_weights(to, next, matrix);
                copies.fill_tokens(to, next, x, n_k);
            }
            copy_async_commit();
            multiply(acc, shared + from * STAGE_BYTES);
            if (SPLITS > 1 && ends_run<SPLITS>(group, n_groups)) {
                join_run(total, acc);
                clear(acc);
            }
            from = from + 1 == STAGES ? 0 : from + 1;
            to = to + 1 == STAGES ? 0 : to + 1;
        }
        copy_async_wait<0>();
        outputs(SPLITS > 1 ? total : acc);
    }
};
