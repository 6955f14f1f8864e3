// A layer of a decode step of one row, but for its attention: what is between the attention of one
// layer and that of the next in one launch, so that weights are on their way while sums are waited
// for. The same bits as matmul_add, route, gate_up, down, moe_combine and matmul_qkv.
//
//   attended bf16 [q_width], x f32 [hidden]                           of the kernel before
//     out      mid = x + W_out attended + bias                        a warp a tile
//   ~ all blocks
//     norm     t = rmsnorm(mid), in the order of route                every block for itself
//     logits   of 8 experts, as keys                                  a few blocks
//   ~ all blocks wait for the keys
//     choose   experts and gates                                      every block for itself
//     gate_up  act[rank] = bf16(swiglu(W_gate_up t))                  a warp a tile
//   ~ all blocks
//     down     y[rank] = bf16(W_down act[rank] + bias)                a warp a tile
//   ~ all blocks
//     combine  x = mid + sum of gate y; t = rmsnorm(x)                every block for itself
//     qkv      of the next layer: rotated, rounded, k and v cached    a warp a tile
//
// Behind the last layer there is no qkv: t goes to memory, normed for the lm head.
//
// Grid: one block a multiprocessor, all of them running at once, for they wait for each other.
// That they do, because a launch that may overlap begins to wait only when all before it is done,
// and the next one begins when all blocks of this one have. Block 512: sixteen warps, of which each
// takes the tiles warp * grid + block, and so on by 16 * grid.
//
// Weights go through the stages of gemm_row.cuh, in two regions of shared memory: one for out and
// qkv, one for the experts. A region is cut anew for each product: few tiles a block have large
// stages, so that as many bytes are under way. Asked for early:
//
//   out      before the kernel before is done       gate_up  when the experts are known
//   qkv      when the block has done its out        down     when the block has done its gate_up
//
// Dynamic shared memory: the input of the product at hand, bf16, whole groups of 64 (of down: one
// behind the other for all ranks); both norms' scales; a key an expert; the dense region; the experts' region.
//
// What blocks tell each other by is zero before and after a launch, but for arrived[2], which the
// next one takes back: nobody waits for it any more then.

struct LayerStepArgs {
    // x attended, out the residual x.
    MatmulArgs out;
    // x mid; t where the last norm goes.
    RouteArgs route;
    MoeArgs gate_up;
    MoeArgs down;
    // weights NULL behind the last layer.
    MatmulArgs qkv;
    const vector_t* next_norm;
    // f32 [hidden]: another buffer than x, so that one block may write x while others read.
    float* mid;
    // Blocks that have done out, gate_up, down.
    u32* arrived;
    // [n_experts]: 2^32 and an expert's key, or 0 while it is not known.
    u64* keys;
    // Groups of 64 k of a stage, 32 at most.
    u32 out_groups;
    u32 gate_up_groups;
    u32 down_groups;
    u32 qkv_groups;
    // Where in shared memory norms, keys and regions begin.
    u32 norms_at;
    u32 keys_at;
    u32 dense_at;
    u32 experts_at;
};

// Experts of a block that makes keys: half of a tile, whose weights fit in registers.
constexpr u32 KEYS = 8;

// n_rows rows of n values (a multiple of 8) to shared memory, and zeros to the end of each one's
// last group.
__device__ __forceinline__ void take_tokens(u8* to, const u16* from, u32 n_rows, u32 n) {
    // Loads of a thread before the first store.
    constexpr u32 MANY = 4;
    u32 chunks = (n + GROUP_K - 1) / GROUP_K * 8;
    for (u32 first = threadIdx.x; first < n_rows * chunks; first += MANY * WARPS * 32) {
        uint4 v[MANY];
        #pragma unroll
        for (u32 m = 0; m < MANY; m++) {
            u32 i = first + m * WARPS * 32, row = i / chunks, at = i % chunks * 8;
            const uint4 zero = {0, 0, 0, 0};
            v[m] = row < n_rows && at < n ? *(const uint4*)(from + (u64)row * n + at) : zero;
        }
        #pragma unroll
        for (u32 m = 0; m < MANY; m++) {
            u32 i = first + m * WARPS * 32;
            if (i < n_rows * chunks) ((uint4*)to)[i] = v[m];
        }
    }
}
__device__ __forceinline__ void end_tokens(u8* tokens) {
    if (HIDDEN % GROUP_K != 0 && threadIdx.x < GROUP_K - HIDDEN % GROUP_K) ((u16*)tokens)[HIDDEN + threadIdx.x] = 0;
}

// All that the block has written is there for those that wait.
__device__ __forceinline__ void tell_all(u32* arrived) {
    __syncthreads();
    if (threadIdx.x == 0) add_release(arrived);
}
__device__ __forceinline__ void wait_for_all(const u32* arrived) {
    if (threadIdx.x == 0) {
        while (load_acquire(arrived) != gridDim.x) {}
    }
    __syncthreads();
}

// The normed row in shared memory; keys of KEYS experts by the blocks at the grid's end, of which
// most have one tile of out less. As route_rows (topk_routing.cu) with one row; a warp has its
// sixteenth of k.
__device__ __forceinline__ void norm_and_rate(const LayerStepArgs& args, const vector_t* norm, u8* tokens) {
    __shared__ __align__(16) float squares[WARPS];
    __shared__ float sums[WARPS][KEYS];
    const RouteArgs& route = args.route;
    u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    u32 first_k = warp * 32 + t * 8;
    auto has = [&](int i) { return N_PIECES % WARPS == 0 || i + 1 < PIECES || i * WARPS + (int)warp < N_PIECES; };
    u32 first_expert = (gridDim.x - 1 - blockIdx.x) * KEYS;
    bool rates = first_expert < route.n_experts;
    uint4 weights[PIECES];
    float bias = 0.0f;
    u32 expert = first_expert + g;
    #pragma unroll
    for (int i = 0; i < PIECES; i++) {
        weights[i] = {0, 0, 0, 0};
        if (rates && has(i) && expert < route.n_experts) {
            weights[i] = load_once((const u8*)(route.weights + (u64)expert * HIDDEN + first_k + i * STEP));
        }
    }
    if (rates && thread < KEYS && first_expert + thread < route.n_experts) {
        bias = vector_at(route.bias, first_expert + thread);
    }
    wait_for_all(&args.arrived[0]);

    auto load_piece = [&](int i, float4 (&v)[2]) {
        const float4* piece = (const float4*)(route.x + first_k + i * STEP);
        v[0] = piece[0];
        v[1] = piece[1];
    };
    float4 x[PIECES][2] = {};
    #pragma unroll
    for (int i = 0; i < PIECES; i++) {
        if (has(i)) load_piece(i, x[i]);
    }
    float sum[2] = {0.0f, 0.0f};
    #pragma unroll
    for (int i = 0; i < PIECES; i++) add_squares(x[i], sum);
    float of_warp = squares_of_warp(sum);
    if (lane == 0) squares[warp] = of_warp;
    __syncthreads();
    float factor = factor_of_row(squares, t, route.eps);
    // Of which four of a lane's eights.
    float c[2][4] = {};
    #pragma unroll
    for (int i = 0; i < PIECES; i++) {
        if (!has(i)) continue;
        // Read again, from the nearest cache: kept, they would take too many registers.
        float4 v[2];
        load_piece(i, v);
        uint4 eight = norm_eight(v, factor, *(const Scales*)(norm + first_k + i * STEP));
        if (g == 0) *(uint4*)(tokens + (first_k + i * STEP) * 2) = eight;
        if (!rates) continue;
        const u32 low[4] = {weights[i].x, 0, weights[i].y, 0}, high[4] = {weights[i].z, 0, weights[i].w, 0};
        mma_bf16(c[0], low, eight.x, eight.y);
        mma_bf16(c[1], high, eight.z, eight.w);
    }
    end_tokens(tokens);
    if (!rates) return;
    if (t == 0) sums[warp][g] = c[0][0] + c[1][0];
    __syncthreads();
    if (thread < KEYS && first_expert + thread < route.n_experts) {
        float of_warps[WARPS];
        #pragma unroll
        for (int i = 0; i < WARPS; i++) of_warps[i] = sums[i][thread];
        store_relaxed(args.keys + first_expert + thread, 1ull << 32 | key_of(sum_of_warps(of_warps) + bias));
    }
}

// The row's experts and gates by one warp, when all keys are there.
__device__ __forceinline__ void choose(const LayerStepArgs& args, u32* keys, bool padding, u32* experts, float* gates) {
    RouteArgs route = args.route;
    route.experts = experts;
    route.gates = gates;
    Best best;
    for (u32 expert = threadIdx.x; expert < route.n_experts; expert += 32) {
        u64 told;
        do told = load_relaxed(args.keys + expert);
        while (told == 0);
        keys[expert] = (u32)told;
        best.offer(expert, (u32)told);
    }
    __syncwarp();
    choose_experts(route, 0, padding, best, keys);
}

// More threads than there are, where registers allow it: that leaves some to a block of attention.
#if __CUDA_ARCH__ >= 900
constexpr int BOUND = EXPERTS == MXFP4 && DENSE != MXINT8 ? 544 : 512;
#else
constexpr int BOUND = 512;
#endif

extern "C" __global__ void __launch_bounds__(BOUND, 1) layer_step(const LayerStepArgs args) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ __align__(8) u64 barriers[2][WARPS][STAGES];
    __shared__ float scratch[8];
    __shared__ u32 experts[TOP_K];
    __shared__ float gates[TOP_K];
    u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    // The warp's tiles.
    u32 first = warp * gridDim.x + blockIdx.x, step = WARPS * gridDim.x;
    // Of column 0 of the sums, the one token.
    bool has_token = lane % 4 == 0;
    float c[4];
    u8* tokens = shared;

    Stream<DENSE> dense;
    Stream<EXPERTS> sparse;
    dense.begin_barriers(barriers[0][warp]);
    sparse.begin_barriers(barriers[1][warp]);
    dense.cut(shared + args.dense_at, args.out.n_k, args.out_groups);
    if (first < args.out.n_tiles) dense.begin(args.out.weights, first);
    vector_t* norms = (vector_t*)(shared + args.norms_at);
    constexpr u32 CHUNK = 16 / sizeof(vector_t);
    for (u32 i = thread; i < HIDDEN / CHUNK; i += WARPS * 32) {
        ((uint4*)norms)[i] = ((const uint4*)args.route.norm)[i];
        ((uint4*)(norms + HIDDEN))[i] = ((const uint4*)args.next_norm)[i];
    }
    // The router's weights are read by a few blocks: a line of them a thread.
    u32 n_threads = gridDim.x * WARPS * 32;
    for (u32 i = blockIdx.x * WARPS * 32 + thread; i < args.route.n_experts * HIDDEN / 64; i += n_threads) {
        prefetch_l2(args.route.weights + i * 64);
    }
    follow_previous();
    if (blockIdx.x == 0 && thread == 0) args.arrived[2] = 0;
    Row place = args.route.rows[0];
    bool padding = place.sequence == NONE;

    take_tokens(tokens, args.out.x, 1, args.out.n_k);
    __syncthreads();
    for (u32 tile = first; tile < args.out.n_tiles; tile += step) {
        if (tile != first) dense.begin(args.out.weights, tile);
        Add<1> to(args.out, Add<1>::first(tile) + lane / 4);
        Floats<1> joined[2];
        to.load(args.out, 0, place, joined);
        dense.multiply(tokens, c);
        const Floats<1> sums[2] = {{{c[0]}}, {{c[2]}}};
        to.out = args.mid;
        if (has_token) to.store(args.out, 0, place, sums, joined);
    }
    tell_all(&args.arrived[0]);

    bool has_next = args.qkv.weights != 0;
    if (has_next) {
        dense.cut(shared + args.dense_at, args.qkv.n_k, args.qkv_groups);
        if (first < args.qkv.n_tiles) dense.begin(args.qkv.weights, first);
    }
    norm_and_rate(args, norms, tokens);
    if (warp == 0) choose(args, (u32*)(shared + args.keys_at), padding, experts, gates);
    __syncthreads();
    if (blockIdx.x == 0 && thread < TOP_K) {
        args.route.experts[thread] = experts[thread];
        args.route.gates[thread] = gates[thread];
    }

    // A unit is a tile of the expert of a rank; padding has no experts.
    auto experts_of = [&](const MoeArgs& of, u32 unit) {
        u64 tiles = (of.n_tiles + BLOCK_TILES - 1) / BLOCK_TILES * BLOCK_TILES;
        return of.weights + experts[unit / of.n_tiles] * tiles * sparse.n_groups * Tile<EXPERTS>::BYTES;
    };
    u32 n_units = padding ? 0 : TOP_K * args.gate_up.n_tiles;
    sparse.cut(shared + args.experts_at, args.gate_up.n_k, args.gate_up_groups);
    for (u32 unit = first; unit < n_units; unit += step) {
        u32 rank = unit / args.gate_up.n_tiles, tile = unit % args.gate_up.n_tiles;
        sparse.begin(experts_of(args.gate_up, unit), tile);
        const GateUp to(args.gate_up, experts[rank], tile, lane / 4);
        sparse.multiply(tokens, c);
        if (has_token) to.store(rank, c[0], c[2]);
    }
    tell_all(&args.arrived[1]);

    n_units = padding ? 0 : TOP_K * args.down.n_tiles;
    sparse.cut(shared + args.experts_at, args.down.n_k, args.down_groups);
    if (first < n_units) sparse.begin(experts_of(args.down, first), first % args.down.n_tiles);
    wait_for_all(&args.arrived[1]);
    take_tokens(tokens, args.down.x, TOP_K, args.down.n_k);
    __syncthreads();
    u32 act_bytes = sparse.n_groups * (GROUP_K * 2);
    for (u32 unit = first; unit < n_units; unit += step) {
        u32 rank = unit / args.down.n_tiles, tile = unit % args.down.n_tiles;
        if (unit != first) sparse.begin(experts_of(args.down, unit), tile);
        const Down to(args.down, experts[rank], tile, lane / 4);
        sparse.multiply(tokens + rank * act_bytes, c);
        if (has_token) to.store(rank, c[0], c[2]);
    }
    tell_all(&args.arrived[2]);

    // The last norm is one block's.
    if (!has_next && blockIdx.x != 0) return;
    wait_for_all(&args.arrived[2]);
    if (blockIdx.x == 0) {
        // All have left the first two waits, and have read the keys.
        if (thread < 2) args.arrived[thread] = 0;
        for (u32 i = thread; i < args.route.n_experts; i += WARPS * 32) args.keys[i] = 0;
    }
    if (thread < 256) {
        RowValues values;
        values.load(args.mid);
        values.add_outputs(args.down.y, gates);
        if (blockIdx.x == 0) values.store(args.out.out);
        values.normalize(norms + HIDDEN, args.route.eps, has_next ? (u16*)tokens : args.route.t, scratch);
    } else {
        // The two barriers of its sum.
        __syncthreads();
        __syncthreads();
    }
    if (!has_next) return;
    end_tokens(tokens);
    __syncthreads();
    for (u32 tile = first; tile < args.qkv.n_tiles; tile += step) {
        if (tile != first) dense.begin(args.qkv.weights, tile);
        const Qkv<1> to(args.qkv, Qkv<1>::first(tile) + lane / 4);
        Floats<1> joined[2];
        to.load(args.qkv, 0, place, joined);
        dense.multiply(tokens, c);
        const Floats<1> sums[2] = {{{c[0]}}, {{c[2]}}};
        if (has_token) to.store(args.qkv, 0, place, sums, joined);
    }
}
