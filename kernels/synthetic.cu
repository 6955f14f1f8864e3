// Random weights made in place: a pure function of (seed, index), so a shape needs no file.
//
//   fill_bf16    out bf16 [n]: mean + spread * uniform(-1, 1)
//   fill_f32     the same in f32
//   fill_blocks  packed MXFP4 or MXINT8 tiles (gemm.cuh): codes of random bits, scale bytes base or
//                base + 1
//
// Grid-stride, block 256. fill_blocks counts 16-byte chunks.

__device__ __forceinline__ u64 random_word(u64 seed, u64 index) {
    u64 word = seed ^ (index * 0x9e3779b97f4a7c15ull);
    word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9ull;
    word = (word ^ (word >> 27)) * 0x94d049bb133111ebull;
    return word ^ (word >> 31);
}

__device__ __forceinline__ float random_value(u64 seed, u64 index, float mean, float spread) {
    // 24 bits to [0, 1).
    float u = (float)(u32)(random_word(seed, index) >> 40) * 5.9604644775390625e-8f;
    return mean + spread * (2.0f * u - 1.0f);
}

extern "C" __global__ void __launch_bounds__(256) fill_bf16(u16* out, u64 n, u64 seed, float mean, float spread) {
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < n; i += (u64)gridDim.x * 256) {
        out[i] = f32_to_bf16(random_value(seed, i, mean, spread));
    }
}

extern "C" __global__ void __launch_bounds__(256) fill_f32(float* out, u64 n, u64 seed, float mean, float spread) {
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < n; i += (u64)gridDim.x * 256) {
        out[i] = random_value(seed, i, mean, spread);
    }
}

extern "C" __global__ void __launch_bounds__(256) fill_blocks(uint4* out, u64 n, u32 tile_chunks, u64 seed, u32 base) {
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < n; i += (u64)gridDim.x * 256) {
        u64 a = random_word(seed, 2 * i), b = random_word(seed, 2 * i + 1);
        uint4 words = make_uint4((u32)a, (u32)(a >> 32), (u32)b, (u32)(b >> 32));
        // The last two chunks of a tile are scales.
        if (i % tile_chunks >= tile_chunks - 2) {
            u32 bases = base * 0x01010101u;
            words.x = bases + (words.x & 0x01010101u);
            words.y = bases + (words.y & 0x01010101u);
            words.z = bases + (words.z & 0x01010101u);
            words.w = bases + (words.w & 0x01010101u);
        }
        out[i] = words;
    }
}
