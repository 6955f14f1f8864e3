// What the dense products are told, and what becomes of their sums: added to the residual, stored as
// logits of which the greatest is told, or turned and cached. matmul.cuh tells their layouts.

struct MatmulArgs {
    // x for the tensor copies, where the variant streams its tokens.
    TensorMap x_map;
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
    // Logits: keys of the rows' greatest so far (order_key), which the product's raise; or NULL.
    u32* maxima;
    // Where blocks of a cluster leave sums for each other: exchange_len of src/engine/cuda/variants.rs.
    float4* exchange;
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
    // Grid (row blocks, tile blocks) in place of (tile blocks, row blocks).
    u32 rows_first;
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

// W features of a token that follow each other.
template <int W> struct __align__(4 * W) Floats { float v[W]; };

template <int W> __device__ __forceinline__ void store_bf16(u16* to, const Floats<W>& x) {
    static_assert(W == 1 || W == 4, "one, or 8 bytes of them");
    if constexpr (W == 1) *to = f32_to_bf16(x.v[0]);
    else *(uint2*)to = make_uint2(f32x2_to_bf16x2(x.v[0], x.v[1]), f32x2_to_bf16x2(x.v[2], x.v[3]));
}

// What becomes of sums. A thread has two runs of W features of a token, APART features apart: W is 1
// where they are a tile's rows g and g + 8, 4 where they come by way of shared memory, if a block
// is whole UNITs of features. `first` is the feature of a tile's row 0. `load` reads what is joined
// to the sums, for many tokens before the first is stored.
template <int W> struct Add {
    static constexpr u32 APART = W == 1 ? 8 : 32, UNIT = 64;
    static constexpr bool AT_ROWS = false, HAS_MAXIMA = false, JOINS = true;
    Floats<W> bias[2];
    float* out;
    u32 n_out;
    // Features of the runs; of one that is not there, any.
    u32 at[2];
    bool has[2];

    __device__ static __forceinline__ u32 first(u32 tile) { return tile * TILE_M; }
    // n_out is a multiple of 4.
    __device__ __forceinline__ Add(const MatmulArgs& args, u32 feature) {
        out = args.out;
        n_out = args.n_out;
        #pragma unroll
        for (int run = 0; run < 2; run++) {
            has[run] = feature + run * APART < n_out;
            at[run] = has[run] ? feature + run * APART : 0;
            #pragma unroll
            for (int i = 0; i < W; i++) bias[run].v[i] = vector_at(args.bias, at[run] + i);
        }
    }
    __device__ __forceinline__ void load(const MatmulArgs& args, u32 row, const Row& place, Floats<W> (&joined)[2]) const {
        #pragma unroll
        for (int run = 0; run < 2; run++) {
            const float* from = out + (u64)row * n_out + at[run];
            if constexpr (W == 1) joined[run].v[0] = load_l2(from);
            else joined[run] = *(const Floats<W>*)from;
        }
    }
    __device__ __forceinline__ void store(
        const MatmulArgs& args, u32 row, const Row& place, const Floats<W> (&sums)[2], const Floats<W> (&joined)[2]
    ) const {
        #pragma unroll
        for (int run = 0; run < 2; run++) {
            Floats<W> x;
            #pragma unroll
            for (int i = 0; i < W; i++) x.v[i] = joined[run].v[i] + (sums[run].v[i] + bias[run].v[i]);
            if (has[run]) *(Floats<W>*)(out + (u64)row * n_out + at[run]) = x;
        }
    }
};

// Not by way of shared memory: a vocabulary is of any size.
template <int W> struct Logits {
    static constexpr u32 APART = 8, UNIT = 0;
    static constexpr bool AT_ROWS = false, HAS_MAXIMA = true, JOINS = false;
    float* out;
    u32 n_out;
    bool has[2];

    __device__ static __forceinline__ u32 first(u32 tile) { return tile * TILE_M; }
    __device__ __forceinline__ Logits(const MatmulArgs& args, u32 feature) {
        n_out = args.n_out;
        out = args.out + feature;
        has[0] = feature < n_out;
        has[1] = feature + APART < n_out;
    }
    __device__ __forceinline__ void load(const MatmulArgs& args, u32 row, const Row& place, Floats<W> (&joined)[2]) const {}
    __device__ __forceinline__ void store(
        const MatmulArgs& args, u32 row, const Row& place, const Floats<W> (&sums)[2], const Floats<W> (&joined)[2]
    ) const {
        float* to = out + (u64)row * n_out;
        if (has[0]) *(Floats<W>*)to = sums[0];
        if (has[1]) *(Floats<W>*)(to + APART) = sums[1];
    }
};

// A tile holds dims p..p+8 of a head above dims p + HEAD_DIM/2..: a rotary pair is one thread's.
template <int W> struct Qkv {
    static constexpr u32 APART = HEAD_DIM / 2, UNIT = HEAD_DIM;
    static constexpr bool AT_ROWS = true, HAS_MAXIMA = false, JOINS = false;
    Floats<W> bias[2];
    u32 head, dim;

    __device__ static __forceinline__ u32 first(u32 tile) {
        constexpr u32 TILES_A_HEAD = HEAD_DIM / TILE_M;
        return tile / TILES_A_HEAD * HEAD_DIM + tile % TILES_A_HEAD * 8;
    }
    __device__ __forceinline__ Qkv(const MatmulArgs& args, u32 feature) {
        head = feature / HEAD_DIM;
        dim = feature % HEAD_DIM;
        if (head >= args.n_heads + 2 * args.n_kv_heads) return;
        #pragma unroll
        for (int run = 0; run < 2; run++) {
            #pragma unroll
            for (int i = 0; i < W; i++) bias[run].v[i] = vector_at(args.bias, feature + run * APART + i);
        }
    }
    // Cosines and sines.
    __device__ __forceinline__ void load(const MatmulArgs& args, u32 row, const Row& place, Floats<W> (&joined)[2]) const {
        const float* turn = args.rope + (u64)place.position * HEAD_DIM + dim;
        joined[0] = *(const Floats<W>*)turn;
        joined[1] = *(const Floats<W>*)(turn + APART);
    }
    __device__ __forceinline__ void store(
        const MatmulArgs& args, u32 row, const Row& place, const Floats<W> (&sums)[2], const Floats<W> (&joined)[2]
    ) const {
        u32 n_heads = args.n_heads + 2 * args.n_kv_heads;
        if (head >= n_heads) return;
        bool turns = head < args.n_heads + args.n_kv_heads;
        Floats<W> x[2];
        #pragma unroll
        for (int i = 0; i < W; i++) {
            float low = sums[0].v[i] + bias[0].v[i], high = sums[1].v[i] + bias[1].v[i];
            float cos = joined[0].v[i], sin = joined[1].v[i];
            x[0].v[i] = turns ? low * cos - high * sin : low;
            x[1].v[i] = turns ? high * cos + low * sin : high;
        }
        u16* out = args.qkv + ((u64)row * n_heads + head) * HEAD_DIM + dim;
        store_bf16(out, x[0]);
        store_bf16(out + APART, x[1]);
        if (args.cache != 0 && head >= args.n_heads && place.sequence != NONE) {
            u32 kv_head = head - args.n_heads;
            u32 is_value = kv_head >= args.n_kv_heads;
            if (is_value) kv_head -= args.n_kv_heads;
            u16* to = cache_row(args.cache, args.page_table, args.max_pages, args.ring, args.layer, args.n_layers,
                                args.n_kv_heads, place.sequence, kv_head, is_value, place.position);
            store_bf16(to + dim, x[0]);
            store_bf16(to + dim + APART, x[1]);
        }
    }
};

// What becomes of a thread's sums.
template <class G, template <int> class Store> struct DenseOutputs {
    const MatmulArgs& args;
    const Row* rows;
    u32 first_row;
    int first_tile, n_tiles;
    // The stages.
    u8* shared;
    // Keys of the block's greatest of each token, zeros so far.
    u32* maxima;

    template <int M> __device__ __forceinline__ void operator()(float (&acc)[M][G::N_TILES][4]) const {
        constexpr u32 UNIT = Store<4>::UNIT;
        if constexpr (G::N_TILES > 8 && UNIT != 0 && G::TILES * TILE_M % (UNIT + (UNIT == 0)) == 0) by_rows(acc);
        else from_registers(acc);
        if constexpr (Store<1>::HAS_MAXIMA) raise_maxima(acc);
    }

    // Column `column` or, behind the rows, the last.
    __device__ __forceinline__ u32 inside(u32 column) const {
        u32 last = args.n_rows - 1 - first_row;
        return column < last ? column : last;
    }
    __device__ __forceinline__ const Row& place(u32 column) const { return rows[Store<1>::AT_ROWS ? column : 0]; }

    template <int M> __device__ __forceinline__ void from_registers(float (&acc)[M][G::N_TILES][4]) const {
        int lane = threadIdx.x % 32;
        #pragma unroll
        for (int m = 0; m < M; m++) {
            int tile = first_tile + G::tile(m);
            if (tile >= n_tiles) continue;
            const Store<1> to(args, Store<1>::first(tile) + lane / 4);
            Floats<1> joined[G::N_TILES][2][2];
            #pragma unroll
            for (int n = 0; n < G::N_TILES; n++) {
                if (!G::keeps(n)) continue;
                #pragma unroll
                for (int i = 0; i < 2; i++) {
                    u32 column = inside(G::column(n) + lane % 4 * 2 + i);
                    to.load(args, first_row + column, place(column), joined[n][i]);
                }
            }
            #pragma unroll
            for (int n = 0; n < G::N_TILES; n++) {
                if (!G::keeps(n)) continue;
                #pragma unroll
                for (int i = 0; i < 2; i++) {
                    u32 column = G::column(n) + lane % 4 * 2 + i;
                    const Floats<1> sums[2] = {{{acc[m][n][i]}}, {{acc[m][n][2 + i]}}};
                    if (first_row + column < args.n_rows) to.store(args, first_row + column, place(column), sums, joined[n][i]);
                }
            }
        }
    }

    // The same in three, for a warp of few tokens (gemm_direct.cuh). The kernel before writes none of what the
    // first two read: rows, angles, and the residual, which is complete when the kernels of the layer's
    // attention start.
    struct Places { Row of[G::N_TILES][2]; };
    struct Joined {
        Store<1> to;
        Floats<1> values[G::N_TILES][2][2];
    };
    __device__ __forceinline__ u32 row_inside(int n, int i) const {
        return first_row + inside(G::column(n) + threadIdx.x % 4 * 2 + i);
    }
    __device__ __forceinline__ Places find() const {
        Places places;
        #pragma unroll
        for (int n = 0; n < G::N_TILES; n++) {
            #pragma unroll
            for (int i = 0; i < 2; i++) {
                if (Store<1>::AT_ROWS) places.of[n][i] = load_row(args.rows + row_inside(n, i));
            }
        }
        return places;
    }
    // Behind the tiles, of the last.
    __device__ __forceinline__ Joined join(const Places& places) const {
        int tile = first_tile + G::tile(0) < n_tiles ? first_tile + G::tile(0) : n_tiles - 1;
        Joined joined = {Store<1>(args, Store<1>::first(tile) + threadIdx.x % 32 / 4)};
        #pragma unroll
        for (int n = 0; n < G::N_TILES; n++) {
            #pragma unroll
            for (int i = 0; i < 2; i++) joined.to.load(args, row_inside(n, i), places.of[n][i], joined.values[n][i]);
        }
        return joined;
    }
    __device__ __forceinline__ void finish(
        float (&acc)[1][G::N_TILES][4], const Places& places, const Joined& joined
    ) const {
        #pragma unroll
        for (int n = 0; n < G::N_TILES; n++) {
            #pragma unroll
            for (int i = 0; i < 2; i++) {
                u32 row = first_row + G::column(n) + threadIdx.x % 4 * 2 + i;
                const Floats<1> sums[2] = {{{acc[0][n][i]}}, {{acc[0][n][2 + i]}}};
                if (first_tile + G::tile(0) < n_tiles && row < args.n_rows) {
                    joined.to.store(args, row, places.of[n][i], sums, joined.values[n][i]);
                }
            }
        }
        if constexpr (Store<1>::HAS_MAXIMA) raise_maxima(acc);
    }

    // The eight lanes that have a token's features join theirs: each step halves the tokens of a lane.
    template <int M> __device__ __forceinline__ void raise_maxima(const float (&acc)[M][G::N_TILES][4]) const {
        if (args.maxima == 0) return;
        // A few octets at a time, for their greatest are held beside all sums.
        constexpr int OCTETS = G::N_TILES < 8 ? G::N_TILES : 8;
        #pragma unroll
        for (int octet = 0; octet < G::N_TILES; octet += OCTETS) raise_maxima<OCTETS>(acc, octet);
        G::sync_workers();
        for (u32 column = threadIdx.x; column < G::COLUMNS && first_row + column < args.n_rows; column += G::WORKERS) {
            atomicMax(&args.maxima[first_row + column], maxima[column]);
        }
    }
    template <int OCTETS, int M> __device__ __forceinline__ void raise_maxima(const float (&acc)[M][G::N_TILES][4], int octet) const {
        constexpr int N = 2 * OCTETS;
        int lane = threadIdx.x % 32;
        // Token G::column(octet + i / 2) + lane % 4 * 2 + i % 2.
        float greatest[N];
        #pragma unroll
        for (int i = 0; i < N; i++) greatest[i] = NEG_INFINITY;
        #pragma unroll
        for (int m = 0; m < M; m++) {
            int tile = first_tile + G::tile(m);
            u32 feature = Store<1>::first(tile) + lane / 4;
            #pragma unroll
            for (int run = 0; run < 2; run++) {
                if (tile >= n_tiles || feature + run * Store<1>::APART >= args.n_out) continue;
                #pragma unroll
                for (int i = 0; i < N; i++) greatest[i] = fmaxf(greatest[i], acc[m][octet + i / 2][run * 2 + i % 2]);
            }
        }
        int first = 0, n = N;
        #pragma unroll
        for (int mask = 16; mask >= 4; mask /= 2) {
            bool upper = (lane & mask) != 0;
            if (n > 1) {
                n /= 2;
                if (upper) first += n;
                #pragma unroll
                for (int i = 0; i < n; i++) {
                    float kept = upper ? greatest[i + n] : greatest[i], given = upper ? greatest[i] : greatest[i + n];
                    greatest[i] = fmaxf(kept, __shfl_xor_sync(NONE, given, mask));
                }
            } else {
                greatest[0] = fmaxf(greatest[0], __shfl_xor_sync(NONE, greatest[0], mask));
            }
        }
        #pragma unroll
        for (int i = 0; i < n; i++) {
            int at = first + i;
            atomicMax(&maxima[G::column(octet + at / 2) + lane % 4 * 2 + at % 2], order_key(greatest[i]));
        }
    }

    // By way of shared memory, whose stages are free: there a token's sums lie in a row, and what
    // is read and written in memory is 16 bytes (8 of bf16) a thread, side by side.
    template <int M> __device__ __forceinline__ void by_rows(float (&acc)[M][G::N_TILES][4]) const {
        typedef Store<1> From;
        typedef Store<4> To;
        // Four floats more than there are, so that what a warp writes at once is in 32 banks.
        constexpr u32 PITCH = G::TILES * TILE_M + 4;
        static_assert(G::COLUMNS * PITCH * 4 <= G::STAGES * (G::TOKEN_BYTES + G::WEIGHT_BYTES), "stages hold all sums");
        int lane = threadIdx.x % 32;
        float* all = (float*)shared;
        G::sync_workers();
        #pragma unroll
        for (int m = 0; m < M; m++) {
            float* of_tile = all + From::first(G::tile(m)) + lane / 4;
            #pragma unroll
            for (int n = 0; n < G::N_TILES; n++) {
                if (!G::keeps(n)) continue;
                float* to = of_tile + (G::column(n) + lane % 4 * 2) * PITCH;
                to[0] = acc[m][n][0];
                to[PITCH] = acc[m][n][1];
                to[From::APART] = acc[m][n][2];
                to[PITCH + From::APART] = acc[m][n][3];
            }
        }
        G::sync_workers();
        constexpr u32 THREADS_A_TOKEN = G::TILES * TILE_M / 8, STEP = G::WORKERS / THREADS_A_TOKEN;
        // Tokens of a thread at a time.
        constexpr u32 ALL = (G::MOST_COLUMNS + STEP - 1) / STEP, MANY = ALL < 8 ? ALL : 8;
        u32 i = threadIdx.x % THREADS_A_TOKEN, of_run = To::APART / 4;
        u32 feature = i / of_run * 2 * To::APART + i % of_run * 4;
        const To to(args, first_tile * TILE_M + feature);
        u32 begin = G::first_column(), end = G::end_column();
        #pragma unroll 1
        for (u32 first = begin + threadIdx.x / THREADS_A_TOKEN; first < end; first += MANY * STEP) {
            Floats<4> joined[MANY][2];
            #pragma unroll
            for (u32 n = 0; n < MANY; n++) {
                u32 column = inside(first + n * STEP < end ? first + n * STEP : end - 1);
                to.load(args, first_row + column, place(column), joined[n]);
            }
            #pragma unroll
            for (u32 n = 0; n < MANY; n++) {
                u32 column = first + n * STEP;
                if (column >= end) continue;
                const float* from = all + column * PITCH + feature;
                const Floats<4> sums[2] = {*(const Floats<4>*)from, *(const Floats<4>*)(from + To::APART)};
                if (first_row + column < args.n_rows) to.store(args, first_row + column, place(column), sums, joined[n]);
            }
        }
    }
};
