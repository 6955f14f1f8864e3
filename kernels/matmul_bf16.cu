// out = x W^T (+ bias) for the dense projections, with what follows them fused.
//
//   x        bf16 [n_rows, n_k]
//   weights  bf16 tiles (gemm.cuh), n_tiles of them
//   qkv      rotates q and k, rounds q, k, v to bf16, writes them to `qkv` [n_rows, qkv_width]
//            and k, v to the cache
//   add      x_out[n_rows, n_out] f32 += product + bias
//   logits   out[n_rows, n_out] f32 = product
//
// Grid (tiles / (WM MT), rows / (WN NT 8)), block 32 WM WN, dynamic shared memory
// STAGES * STAGE_BYTES. Expected error: f32 sums of bf16 products, about 1e-6 relative.

struct MatmulArgs {
    const u8* weights;
    const vector_t* bias;
    const u16* x;
    float* out;
    u16* qkv;
    const Row* rows;
    // cos | sin of the pairs, f32 [max_context, HEAD_DIM].
    const float* rope;
    // Where the layer's keys and values go: pages or rings, NULL for nowhere.
    u16* cache;
    const u32* page_table;
    u32 n_rows;
    u32 n_out;
    u32 n_k;
    u32 n_tiles;
    u32 first_tile;
    u32 n_heads;
    u32 n_kv_heads;
    // Index of the layer among those of its kind, and how many there are.
    u32 layer;
    u32 n_layers;
    // Pages of a sequence's table; 0 when the cache is rings of `ring` positions.
    u32 max_pages;
    u32 ring;
};

// Where position `position` of a sequence's keys (then values) of a head lies.
__device__ __forceinline__ u16* cache_row(
    u16* cache, const u32* page_table, u32 max_pages, u32 ring, u32 layer, u32 n_layers,
    u32 n_kv_heads, u32 sequence, u32 head, u32 is_value, u32 position
) {
    u64 holder = max_pages != 0 ? page_table[(u64)sequence * max_pages + position / 256] : sequence;
    u32 n_positions = max_pages != 0 ? 256 : ring;
    u64 of_head = (holder * n_layers + layer) * n_kv_heads + head;
    return cache + ((of_head * 2 + is_value) * n_positions + position % n_positions) * HEAD_DIM;
}

struct Add {
    __device__ static __forceinline__ void store(const MatmulArgs& args, u32 tile, int g, u32 row, float low, float high) {
        u32 m = tile * TILE_M + g;
        float* out = args.out + (u64)row * args.n_out;
        if (m < args.n_out) out[m] = out[m] + (low + vector_at(args.bias, m));
        if (m + 8 < args.n_out) out[m + 8] = out[m + 8] + (high + vector_at(args.bias, m + 8));
    }
};

struct Logits {
    __device__ static __forceinline__ void store(const MatmulArgs& args, u32 tile, int g, u32 row, float low, float high) {
        u32 m = tile * TILE_M + g;
        float* out = args.out + (u64)row * args.n_out;
        if (m < args.n_out) out[m] = low;
        if (m + 8 < args.n_out) out[m + 8] = high;
    }
};

// A tile holds dims p..p+8 of a head above dims p + HEAD_DIM/2..: a rotary pair is one thread's.
struct Qkv {
    __device__ static __forceinline__ void store(const MatmulArgs& args, u32 tile, int g, u32 row, float low, float high) {
        constexpr u32 TILES_A_HEAD = HEAD_DIM / TILE_M;
        u32 head = tile / TILES_A_HEAD;
        u32 dim = tile % TILES_A_HEAD * 8 + g;
        u64 m = (u64)head * HEAD_DIM + dim;
        Row at = args.rows[row];
        low += vector_at(args.bias, m);
        high += vector_at(args.bias, m + HEAD_DIM / 2);
        u32 kv_head = head - args.n_heads;
        if (head < args.n_heads + args.n_kv_heads) {
            const float* turn = args.rope + (u64)at.position * HEAD_DIM + dim;
            float cos = turn[0], sin = turn[HEAD_DIM / 2];
            float first = low * cos - high * sin;
            high = high * cos + low * sin;
            low = first;
        } else {
            kv_head -= args.n_kv_heads;
        }
        u16 low_bits = f32_to_bf16(low), high_bits = f32_to_bf16(high);
        u32 width = (args.n_heads + 2 * args.n_kv_heads) * HEAD_DIM;
        u16* out = args.qkv + (u64)row * width + m;
        out[0] = low_bits;
        out[HEAD_DIM / 2] = high_bits;
        if (args.cache != 0 && head >= args.n_heads && at.sequence != NONE) {
            u16* to = cache_row(args.cache, args.page_table, args.max_pages, args.ring, args.layer, args.n_layers,
                                args.n_kv_heads, at.sequence, kv_head, head >= args.n_heads + args.n_kv_heads, at.position);
            to[dim] = low_bits;
            to[dim + HEAD_DIM / 2] = high_bits;
        }
    }
};

template <class Store, int WM, int WN, int MT, int NT, int STAGES>
__device__ __forceinline__ void matmul(const MatmulArgs& args) {
    typedef Gemm<BF16, WM, WN, MT, NT, STAGES> G;
    extern __shared__ __align__(16) u8 shared[];
    __shared__ int columns[G::COLUMNS];
    u32 first_row = blockIdx.y * G::COLUMNS;
    for (int c = threadIdx.x; c < G::COLUMNS; c += G::THREADS) {
        columns[c] = first_row + c < args.n_rows ? (int)(first_row + c) : -1;
    }
    __syncthreads();
    u32 first_tile = args.first_tile + blockIdx.x * G::TILES;
    int n_groups = (int)(args.n_k + GROUP_K - 1) / GROUP_K;
    float acc[MT][NT][4];
    const u8* weights = args.weights + (u64)first_tile * n_groups * G::TILE_BYTES;
    int n_tiles = (int)(args.n_tiles - first_tile);
    G::run(acc, shared, weights, n_tiles, n_groups, args.x, args.n_k, (int)args.n_k, columns);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    #pragma unroll
    for (int m = 0; m < MT; m++) {
        int tile = (warp % WM) * MT + m;
        if (tile >= n_tiles) continue;
        #pragma unroll
        for (int n = 0; n < NT; n++) {
            u32 row = first_row + ((warp / WM) * NT + n) * 8 + lane % 4 * 2;
            float* c = acc[m][n];
            if (row < args.n_rows) Store::store(args, first_tile + tile, lane / 4, row, c[0], c[2]);
            if (row + 1 < args.n_rows) Store::store(args, first_tile + tile, lane / 4, row + 1, c[1], c[3]);
        }
    }
}

// Variants by how many rows there are; src/engine/cuda/launch.rs has the same numbers.
#define VARIANTS(NAME, STORE) \
    extern "C" __global__ void __launch_bounds__(32) NAME##_8(const MatmulArgs args) { matmul<STORE, 1, 1, 1, 1, 16>(args); } \
    extern "C" __global__ void __launch_bounds__(64) NAME##_16(const MatmulArgs args) { matmul<STORE, 2, 1, 1, 2, 10>(args); } \
    extern "C" __global__ void __launch_bounds__(64) NAME##_32(const MatmulArgs args) { matmul<STORE, 2, 1, 1, 4, 8>(args); } \
    extern "C" __global__ void __launch_bounds__(128) NAME##_64(const MatmulArgs args) { matmul<STORE, 4, 1, 1, 8, 4>(args); } \
    extern "C" __global__ void __launch_bounds__(256, BIG_BLOCKS) NAME##_128(const MatmulArgs args) { matmul<STORE, 4, 2, 2, 8, BIG_STAGES>(args); }

VARIANTS(matmul_qkv, Qkv)
VARIANTS(matmul_add, Add)
VARIANTS(matmul_logits, Logits)

// Copies the newest keys and values of each segment to its sequence's ring, after the layer's
// attention has read the older ones. Grid (n_rows), block 128.
extern "C" __global__ void __launch_bounds__(128) ring_append(const MatmulArgs args) {
    u32 r = blockIdx.x;
    Row row = args.rows[r];
    if (row.sequence == NONE || row.segment_end - r > args.ring) return;
    u32 width = (args.n_heads + 2 * args.n_kv_heads) * HEAD_DIM;
    const u16* from = args.qkv + (u64)r * width + args.n_heads * HEAD_DIM;
    for (u32 i = threadIdx.x; i < 2 * args.n_kv_heads * HEAD_DIM; i += 128) {
        u32 head = i / HEAD_DIM;
        u32 is_value = head >= args.n_kv_heads;
        u16* to = cache_row(args.cache, 0, 0, args.ring, args.layer, args.n_layers, args.n_kv_heads,
                            row.sequence, is_value ? head - args.n_kv_heads : head, is_value, row.position);
        to[i % HEAD_DIM] = from[i];
    }
}
