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
// Greatest scale byte in the kernels' narrow form, and what is added to it there (pack.rs).
#define MXFP4_GREATEST 128u
#define MXFP4_BIAS 126u
#define MXINT8_GREATEST 253u
#define MXINT8_BIAS 1u

// Smallest and greatest scale byte of an MXINT8 block; the exponent of its step is 133 less.
#define INT8_SCALE_MIN 1u
#define INT8_SCALE_MAX 254u

// As `RepackArgs` in src/engine/cuda/repack.rs.
struct RepackArgs {
    const u8* values;
    const u8* scales;
    // Of the whole tensor: [experts][blocks of 4 tiles][groups][4 tiles][bytes of a tile].
    u8* tiles;
    // The least (block of the tensor << 8 | scale byte) that cannot be held.
    u64* bad;
    // The greatest scale byte above the narrow form's greatest.
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

// Bits of the largest magnitude of a block of bf16 values; tells of one that is not finite.
template <Stored STORED>
__device__ __forceinline__ u32 largest_of(const RepackArgs& a, u32 expert, u32 row, u32 block, bool tells) {
    const u16* values = (const u16*)a.values;
    u32 largest = 0;
    // All four blocks of a lane at once would take more registers than there are.
    #pragma unroll 4
    for (u32 i = 0; i < BLOCK; i++) {
        u32 magnitude = values[element<STORED>(a, expert, row, block * BLOCK + i)] & 0x7FFFu;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (tells && largest >= 0x7F80u) report(a, expert, row, block, 0);
    return largest;
}

// Scale byte that `mxfp4::pack` gives a block of bf16 values.
template <Stored STORED>
__device__ __forceinline__ u32 chosen_scale(const RepackArgs& a, u32 expert, u32 row, u32 block, bool tells) {
    u32 largest = largest_of<STORED>(a, expert, row, block, tells);
    if (largest == 0) return 127;
    // E2M1's own greatest exponent is 2.
    int exponent = (int)(largest >> 7) - 2;
    if (exponent < (int)SCALE_MIN) return SCALE_MIN;
    return exponent > (int)SCALE_MAX ? SCALE_MAX : (u32)exponent;
}

// 2^exponent.
__device__ __forceinline__ double power_of_two(int exponent) {
    return __longlong_as_double((long long)(1023 + exponent) << 52);
}

// The nearest E2M1 code of a value over its scale: ties to the code with an even mantissa bit.
__device__ __forceinline__ u32 nearest_code(u32 bits, u32 scale) {
    // Powers of two in f64: the product is exact.
    double x = (double)bf16_to_f32((u16)(bits & 0x7FFFu)) * power_of_two(127 - (int)scale);
    u32 code = (x > 0.25) + (x >= 0.75) + (x > 1.25) + (x >= 1.75) + (x > 2.5) + (x >= 3.5) + (x > 5.0);
    return code | (bits >> 12 & 8u);
}

// A code's bits where the kernels' `unpack_mxfp4` looks for the low one of pair j; for the high one it
// looks in the other half of each.
__device__ __forceinline__ u32 place_code(u32 code, u32 j) {
    u32 sign = code >> 3, rest = code & 7;
    if (j == 0) return sign << 15 | rest << 6;
    if (j == 1) return sign << 5 | rest << 28;
    if (j == 2) return sign << 9 | rest;
    return sign << 11 | (rest >> 1) << 3 | (rest & 1) << 10;
}

__device__ __forceinline__ u32 other_half(u32 word) { return word << 16 | word >> 16; }

// A lane's part of an MXFP4 tile: [32 lanes][4 steps] words of 8 codes, then [8 g][2 rows][2 halves] scales, as
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
                if (scale > MXFP4_GREATEST) atomicMax(a.greatest, (u64)scale);
                out[TILE_M * GROUP_K / 2 + g * 4 + high * 2 + half] = (u8)(scale + MXFP4_BIAS);
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
                words[half * 2 + step] |= place_code(low, j) | other_half(place_code(next, j));
            }
        }
    }
    u32* to = (u32*)out + lane * 4;
    for (u32 step = 0; step < 4; step++) to[step] = words[step];
}

// The nearest MXINT8 code of a value, ties to even, at most 127.
__device__ __forceinline__ double nearest_int8(double value, u32 scale) {
    double code = rint(value * power_of_two(133 - (int)scale));
    return code > 127.0 ? 127.0 : code < -127.0 ? -127.0 : code;
}

// The sum of squared errors under a scale, in the order of the elements.
template <Stored STORED>
__device__ __forceinline__ double int8_error(const RepackArgs& a, u32 expert, u32 row, u32 block, u32 scale) {
    const u16* values = (const u16*)a.values;
    double step = power_of_two((int)scale - 133), sum = 0.0;
    #pragma unroll 4
    for (u32 i = 0; i < BLOCK; i++) {
        double value = (double)bf16_to_f32(values[element<STORED>(a, expert, row, block * BLOCK + i)]);
        double error = value - nearest_int8(value, scale) * step;
        sum += error * error;
    }
    return sum;
}

// Scale byte that `mxint8::pack` gives a block of bf16 values: the next where that errs less.
template <Stored STORED>
__device__ __forceinline__ u32 int8_scale(const RepackArgs& a, u32 expert, u32 row, u32 block, bool tells) {
    u32 largest = largest_of<STORED>(a, expert, row, block, tells);
    if (largest == 0) return 127;
    u32 scale = largest >> 7;
    scale = scale < INT8_SCALE_MIN ? INT8_SCALE_MIN : scale > INT8_SCALE_MAX ? INT8_SCALE_MAX : scale;
    double near = int8_error<STORED>(a, expert, row, block, scale);
    if (near == 0.0 || scale == INT8_SCALE_MAX) return scale;
    return int8_error<STORED>(a, expert, row, block, scale + 1) < near ? scale + 1 : scale;
}

// The greatest magnitude among the codes of an MXFP4 block.
__device__ __forceinline__ u32 largest_code(const RepackArgs& a, u32 expert, u32 row, u32 block) {
    const u8* codes = a.values + block_at(a, expert, row, block) * (BLOCK / 2);
    u32 largest = 0;
    #pragma unroll 4
    for (u32 i = 0; i < BLOCK / 2; i++) {
        u32 low = codes[i] & 7u, high = codes[i] >> 4 & 7u;
        u32 larger = low > high ? low : high;
        largest = larger > largest ? larger : largest;
    }
    return largest;
}

// `mxint8::from_mxfp4` of a code, in a block whose largest value is 2^(binade - 1) or one and a
// half times that: sign and magnitude.
__device__ __forceinline__ u32 int8_of_code(u32 code, u32 binade) {
    u32 magnitude = code & 7;
    // Twice the value: 0, 1, 2, 3, 4, 6, 8, 12.
    u32 doubled = magnitude < 2 ? magnitude : (2 + (magnitude & 1)) << (magnitude / 2 - 1);
    doubled <<= 6 - binade;
    // An integer's zero has no sign.
    return doubled == 0 ? 0 : (code >> 3) << 7 | doubled;
}

// A code's bits where the kernels' `unpack_mxint8` looks in the low half of a word: its sign is in
// the other byte.
__device__ __forceinline__ u32 place_int8(u32 code, u32 high) {
    u32 sign = code >> 7, magnitude = code & 127;
    return high ? magnitude << 8 | sign << 7 : sign << 15 | magnitude;
}

// A lane's part of an MXINT8 tile: [2 halves][32 lanes][2 steps] two words of 4 codes, then
// [8 g][2 rows][2 halves] scales, in the narrow form.
template <Stored STORED>
__device__ __forceinline__ void to_mxint8(const RepackArgs& a, u32 expert, u32 tile, u32 group, u32 lane, u8* out) {
    u32 g = lane / 4, t = lane % 4;
    bool tells = t == 0;
    for (u32 half = 0; half < 2; half++) {
        // Of the steps, near and far.
        u32 words[4] = {0, 0, 0, 0};
        for (u32 high = 0; high < 2; high++) {
            u32 row = row_of(a.order, tile, g + high * 8);
            u32 block = group * 2 + half;
            bool inside = row < a.n_out && block * BLOCK < a.n_k;
            u32 scale = 127, binade = 0;
            if (inside && STORED == MXFP4) {
                u32 largest = largest_code(a, expert, row, block);
                binade = largest / 2;
                scale = stored_scale(a, expert, row, block, tells);
                if (largest != 0) scale = scale + binade - 1;
            } else if (inside) {
                scale = int8_scale<STORED>(a, expert, row, block, tells);
            }
            if (tells) {
                if (scale > MXINT8_GREATEST) atomicMax(a.greatest, (u64)scale);
                out[TILE_M * GROUP_K + g * 4 + high * 2 + half] = (u8)(scale + MXINT8_BIAS);
            }
            if (!inside) continue;
            for (u32 i = 0; i < 4; i++) {
                u32 k = i / 2 * 16 + i % 2 * 8 + t * 2;
                u32 codes[2];
                for (u32 n = 0; n < 2; n++) {
                    if (STORED == MXFP4) {
                        u32 byte = a.values[block_at(a, expert, row, block) * (BLOCK / 2) + k / 2];
                        codes[n] = int8_of_code(byte >> (n * 4) & 15u, binade);
                    } else {
                        u16 bits = ((const u16*)a.values)[element<STORED>(a, expert, row, block * BLOCK + k + n)];
                        int code = (int)nearest_int8((double)bf16_to_f32(bits), scale);
                        codes[n] = code < 0 ? 128u | (u32)-code : (u32)code;
                    }
                }
                words[i] |= place_int8(codes[0], high) | place_int8(codes[1], high) << 16;
            }
        }
        u32* to = (u32*)out + half * 128 + lane * 4;
        for (u32 i = 0; i < 4; i++) to[i] = words[i];
    }
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

enum Held { TO_MXFP4, TO_MXINT8, TO_BF16 };

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
    else if (HELD == TO_MXINT8) to_mxint8<STORED>(a, expert, tile, group, lane, a.tiles + index * 1056);
    else to_bf16<STORED>(a, expert, tile, group, lane, a.tiles + index * 2048);
}

#define REPACK(name, stored, held) \
    extern "C" __global__ void __launch_bounds__(256) name(const RepackArgs a) { repack<stored, held>(a); }

REPACK(mxfp4_to_mxfp4, MXFP4, TO_MXFP4)
REPACK(mxfp4_to_mxint8, MXFP4, TO_MXINT8)
REPACK(mxfp4_to_bf16, MXFP4, TO_BF16)
REPACK(bf16_to_mxfp4, BF16, TO_MXFP4)
REPACK(bf16_to_mxint8, BF16, TO_MXINT8)
REPACK(bf16_to_bf16, BF16, TO_BF16)
REPACK(bf16_transposed_to_mxfp4, BF16_TRANSPOSED, TO_MXFP4)
REPACK(bf16_transposed_to_mxint8, BF16_TRANSPOSED, TO_MXINT8)
REPACK(bf16_transposed_to_bf16, BF16_TRANSPOSED, TO_BF16)

// Scale bytes of tiles for the kernels built with WIDE_SCALES: without the bias, of which the
// addition may have wrapped. They are a tile's last 32. Grid: a thread a scale byte, 256 a block.
extern "C" __global__ void __launch_bounds__(256) widen(u8* tiles, u64 n_tiles, u32 tile_bytes, u32 bias) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= n_tiles * 32) return;
    u8* scale = tiles + (i / 32 + 1) * tile_bytes - 32 + i % 32;
    *scale = (u8)(*scale - bias);
}
