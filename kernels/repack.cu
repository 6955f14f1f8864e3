// Weights as stored to weights as the kernels read them: tiles of 16 out features x 64 k in the
// order in which the lanes of mma.m16n8k16 hold them. Byte for byte what the functions of
// src/engine/cuda/pack.rs make; no error is expected.
//
// A launch takes a piece of a matrix, staged on the device as the file has it: some experts whole,
// or some tiles of one expert, or some groups of 64 k of one.
//
//   MXFP4            values u8 [n_experts, n_rows, n_k / 32, 16], scales u8 [n_experts, n_rows, n_k / 32]
//   BF16             values u16 [n_experts, n_rows, n_k]
//   BF16_TRANSPOSED  values u16 [n_experts, n_staged_k, n_out]
//
// Grid: a warp a tile, 8 of them a block of 256 threads; no shared memory. A lane gathers what its
// own places of the tile hold and speaks with no other: loads of neighbours come out of L1, and
// the link to the host is slower by far. That also lets the text be compiled for a CPU and be
// compared there (tests/repack.rs), so it keeps to plain C++ and a few names.

#define TILE_M 16
#define GROUP_K 64
#define BLOCK_TILES 4
#define BLOCK 32

// Smallest and greatest scale byte of a block that is not all zeros.
#define SCALE_MIN 2u
#define SCALE_MAX 252u
// Greatest scale byte whose product with 2^126 is a bf16; the bias of that product's exponent.
#define GREATEST_NARROW 128u
#define NARROW_BIAS 126u

// As `RepackArgs` in src/engine/cuda/repack.rs.
struct RepackArgs {
    const u8* values;
    const u8* scales;
    // Of the whole tensor: [experts][blocks of 4 tiles][groups][4 tiles][bytes of a tile].
    u8* tiles;
    // The least (block of the tensor << 8 | scale byte) that cannot be held.
    u64* bad;
    // The greatest scale byte above GREATEST_NARROW.
    u64* greatest;
    u32 n_out;
    u32 n_k;
    // Which row of the matrix is which row of a tile: 0 natural, 1 gate and up, else the dims of
    // a head for rotary pairs.
    u32 order;
    // The piece.
    u32 first_expert;
    u32 n_experts;
    u32 first_tile;
    u32 n_tiles;
    u32 first_group;
    u32 n_groups;
    u32 first_row;
    u32 n_rows;
    u32 first_k;
    u32 n_staged_k;
};

enum Stored { MXFP4, BF16, BF16_TRANSPOSED };

// `RowOrder::row` of pack.rs.
__device__ __forceinline__ u32 row_of(u32 order, u32 tile, u32 r) {
    u32 half = r / 8, g = r % 8;
    if (order == 0) return tile * TILE_M + r;
    if (order == 1) return 2 * (tile * 8 + g) + half;
    u32 tiles = order / TILE_M;
    return tile / tiles * order + tile % tiles * 8 + g + half * (order / 2);
}

// Index in the piece of a bf16 value; `expert` counts from the piece's first.
template <Stored STORED>
__device__ __forceinline__ u64 element(const RepackArgs& a, u32 expert, u32 row, u32 k) {
    if (STORED == BF16_TRANSPOSED) return ((u64)expert * a.n_staged_k + (k - a.first_k)) * a.n_out + row;
    return ((u64)expert * a.n_rows + (row - a.first_row)) * a.n_k + k;
}

// Index in the piece of an MXFP4 block.
__device__ __forceinline__ u64 block_at(const RepackArgs& a, u32 expert, u32 row, u32 block) {
    return ((u64)expert * a.n_rows + (row - a.first_row)) * (a.n_k / BLOCK) + block;
}

__device__ __forceinline__ void report(const RepackArgs& a, u32 expert, u32 row, u32 block, u32 byte) {
    u64 index = ((u64)(a.first_expert + expert) * a.n_out + row) * (a.n_k / BLOCK) + block;
    atomicMin(a.bad, index << 8 | byte);
}

// Scale byte of an MXFP4 block; 127 where all codes are zeros, whatever is stored.
__device__ __forceinline__ u32 stored_scale(const RepackArgs& a, u32 expert, u32 row, u32 block, bool tells) {
    u64 at = block_at(a, expert, row, block);
    u32 byte = a.scales[at];
    const u32* codes = (const u32*)(a.values + at * (BLOCK / 2));
    bool zeros = ((codes[0] | codes[1] | codes[2] | codes[3]) & 0x77777777u) == 0;
    if (tells && (byte == 255 || (!zeros && (byte < SCALE_MIN || byte > SCALE_MAX)))) {
        report(a, expert, row, block, byte);
    }
    return zeros ? 127 : byte;
}

// Scale byte that `mxfp4::pack` gives a block of bf16 values.
template <Stored STORED>
__device__ __forceinline__ u32 chosen_scale(const RepackArgs& a, u32 expert, u32 row, u32 block, bool tells) {
    const u16* values = (const u16*)a.values;
    u32 largest = 0;
    // All four blocks of a lane at once would take more registers than there are.
    #pragma unroll 4
    for (u32 i = 0; i < BLOCK; i++) {
        u32 magnitude = values[element<STORED>(a, expert, row, block * BLOCK + i)] & 0x7FFFu;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (tells && largest >= 0x7F80u) report(a, expert, row, block, 0);
    if (largest == 0) return 127;
    // E2M1's own greatest exponent is 2.
    int exponent = (int)(largest >> 7) - 2;
    if (exponent < (int)SCALE_MIN) return SCALE_MIN;
    return exponent > (int)SCALE_MAX ? SCALE_MAX : (u32)exponent;
}

// The nearest E2M1 code of a value over its scale: ties to the code with an even mantissa bit.
__device__ __forceinline__ u32 nearest_code(u32 bits, u32 scale) {
    // Powers of two in f64: the product is exact.
    double inverse = __longlong_as_double((long long)(1023 + 127 - (int)scale) << 52);
    double x = (double)bf16_to_f32((u16)(bits & 0x7FFFu)) * inverse;
    u32 code = (x > 0.25) + (x >= 0.75) + (x > 1.25) + (x >= 1.75) + (x > 2.5) + (x >= 3.5) + (x > 5.0);
    return code | (bits >> 12 & 8u);
}

// A code's bits where the kernels' `unpack_mxfp4` looks for pair j of a word's low half.
__device__ __forceinline__ u32 place_code(u32 code, u32 j) {
    u32 sign = code >> 3, rest = code & 7;
    if (j == 0) return sign << 15 | rest << 6;
    if (j == 1) return sign << 12 | rest << 3;
    if (j == 2) return sign << 9 | rest;
    return sign << 14 | (rest >> 1) << 10 | (rest & 1) << 13;
}

// A lane's part of an MXFP4 tile: [32 lanes][4 steps] words of 8 codes, then [8 g][4] scales, as
// the kernels built for scales up to 2 want them; `widen` makes those for all out of them.
template <Stored STORED>
__device__ __forceinline__ void to_mxfp4(const RepackArgs& a, u32 expert, u32 tile, u32 group, u32 lane, u8* out) {
    u32 g = lane / 4, t = lane % 4;
    bool tells = t == 0;
    u32 words[4] = {0, 0, 0, 0};
    for (u32 high = 0; high < 2; high++) {
        u32 row = row_of(a.order, tile, g + high * 8);
        for (u32 half = 0; half < 2; half++) {
            u32 block = group * 2 + half;
            bool inside = row < a.n_out && block * BLOCK < a.n_k;
            u32 scale = 127;
            if (inside) {
                if (STORED == MXFP4) scale = stored_scale(a, expert, row, block, tells);
                else scale = chosen_scale<STORED>(a, expert, row, block, tells);
            }
            if (tells) {
                if (scale > GREATEST_NARROW) atomicMax(a.greatest, (u64)scale);
                out[TILE_M * GROUP_K / 2 + g * 4 + half * 2 + high] = (u8)(scale + NARROW_BIAS);
            }
            if (!inside) continue;
            for (u32 i = 0; i < 4; i++) {
                u32 step = i / 2, far = i % 2, k = step * 16 + far * 8 + t * 2;
                u32 low, next;
                if (STORED == MXFP4) {
                    u32 byte = a.values[block_at(a, expert, row, block) * (BLOCK / 2) + k / 2];
                    low = byte & 15;
                    next = byte >> 4;
                } else {
                    const u16* values = (const u16*)a.values;
                    low = nearest_code(values[element<STORED>(a, expert, row, block * BLOCK + k)], scale);
                    next = nearest_code(values[element<STORED>(a, expert, row, block * BLOCK + k + 1)], scale);
                }
                u32 j = high + far * 2;
                words[half * 2 + step] |= place_code(low, j) | place_code(next, j) << 16;
            }
        }
    }
    u32* to = (u32*)out + lane * 4;
    for (u32 step = 0; step < 4; step++) to[step] = words[step];
}

// bf16 bits of a stored value, which are exact.
template <Stored STORED>
__device__ __forceinline__ u32 stored_bits(const RepackArgs& a, u32 expert, u32 row, u32 k) {
    if (STORED != MXFP4) return ((const u16*)a.values)[element<STORED>(a, expert, row, k)];
    u64 block = block_at(a, expert, row, k / BLOCK);
    u32 code = a.values[block * (BLOCK / 2) + k % BLOCK / 2] >> (k % 2 * 4) & 15u;
    u32 sign = code >> 3 << 15, magnitude = code & 7;
    // A block of zeros may have any scale.
    if (magnitude == 0) return sign;
    // 1 is one half; the others are 1 or 1.5 times 2^(magnitude / 2 - 1).
    u32 exponent = a.scales[block] + magnitude / 2 - 1;
    u32 mantissa = magnitude > 1 ? (magnitude & 1) << 6 : 0;
    return sign | (exponent & 255u) << 7 | mantissa;
}

// A lane's part of a bf16 tile: [4 steps][32 lanes][a0 a1 a2 a3].
template <Stored STORED>
__device__ __forceinline__ void to_bf16(const RepackArgs& a, u32 expert, u32 tile, u32 group, u32 lane, u8* out) {
    u32 g = lane / 4, t = lane % 4;
    if (STORED == MXFP4 && t == 0) {
        for (u32 i = 0; i < 4; i++) {
            u32 row = row_of(a.order, tile, g + i % 2 * 8), block = group * 2 + i / 2;
            if (row < a.n_out && block * BLOCK < a.n_k) stored_scale(a, expert, row, block, true);
        }
    }
    for (u32 step = 0; step < 4; step++) {
        for (u32 j = 0; j < 4; j++) {
            u32 row = row_of(a.order, tile, g + j % 2 * 8);
            u32 k = group * GROUP_K + step * 16 + t * 2 + j / 2 * 8;
            u32 word = 0;
            if (row < a.n_out && k < a.n_k) word = stored_bits<STORED>(a, expert, row, k);
            if (row < a.n_out && k + 1 < a.n_k) word |= stored_bits<STORED>(a, expert, row, k + 1) << 16;
            ((u32*)out)[step * 128 + lane * 4 + j] = word;
        }
    }
}

enum Held { TO_MXFP4, TO_BF16 };

template <Stored STORED, Held HELD> __device__ __forceinline__ void repack(const RepackArgs& a) {
    u32 i = blockIdx.x * 8 + threadIdx.x / 32;
    u32 lane = threadIdx.x % 32;
    u32 group = a.first_group + i % a.n_groups;
    u32 tile = a.first_tile + i / a.n_groups % a.n_tiles;
    u32 expert = i / a.n_groups / a.n_tiles;
    if (expert >= a.n_experts) return;
    u64 n_blocks = (a.n_out + TILE_M * BLOCK_TILES - 1) / (TILE_M * BLOCK_TILES);
    u64 n_groups = (a.n_k + GROUP_K - 1) / GROUP_K;
    u64 block = (u64)(a.first_expert + expert) * n_blocks + tile / BLOCK_TILES;
    u64 index = (block * n_groups + group) * BLOCK_TILES + tile % BLOCK_TILES;
    if (HELD == TO_MXFP4) to_mxfp4<STORED>(a, expert, tile, group, lane, a.tiles + index * 544);
    else to_bf16<STORED>(a, expert, tile, group, lane, a.tiles + index * 2048);
}

#define REPACK(name, stored, held) \
    extern "C" __global__ void __launch_bounds__(256) name(const RepackArgs a) { repack<stored, held>(a); }

REPACK(mxfp4_to_mxfp4, MXFP4, TO_MXFP4)
REPACK(mxfp4_to_bf16, MXFP4, TO_BF16)
REPACK(bf16_to_mxfp4, BF16, TO_MXFP4)
REPACK(bf16_to_bf16, BF16, TO_BF16)
REPACK(bf16_transposed_to_mxfp4, BF16_TRANSPOSED, TO_MXFP4)
REPACK(bf16_transposed_to_bf16, BF16_TRANSPOSED, TO_BF16)

// Scale bytes of MXFP4 tiles for the kernels built with WIDE_SCALES: without the bias, of which
// the addition may have wrapped. Grid: a thread a scale byte, 256 a block.
extern "C" __global__ void __launch_bounds__(256) widen(u8* tiles, u64 n_tiles) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= n_tiles * 32) return;
    u8* scale = tiles + i / 32 * 544 + TILE_M * GROUP_K / 2 + i % 32;
    *scale = (u8)(*scale - NARROW_BIAS);
}
