// t = bf16(x / sqrt(mean(x^2) + eps) * scale); with `moe_combine`, first x += sum of the experts'
// outputs: x + (((w0 y0 + w1 y1) + w2 y2) + w3 y3) in rank order.
//
//   x        f32 [n_rows, hidden], updated by moe_combine
//   y        f32 [n_rows * k, hidden]; weights f32 [n_rows * k]
//   scale    [hidden]
//   t        bf16 [n_rows, hidden]
//
// Grid (n_rows), block 256: one block shape whatever the batch, so one order of the sum.
// Expected error: one rounding to bf16.

__device__ __forceinline__ void normalize(
    const float* x, const vector_t* scale, float eps, u32 hidden, u16* t, float* scratch
) {
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < hidden; i += 256) sum = __fmaf_rn(x[i], x[i], sum);
    sum = block_sum_256(sum, scratch);
    float factor = 1.0f / __fsqrt_rn(sum / (float)hidden + eps);
    for (u32 i = threadIdx.x; i < hidden; i += 256) {
        t[i] = f32_to_bf16(x[i] * factor * vector_at(scale, i));
    }
}

extern "C" __global__ void __launch_bounds__(256) rmsnorm(
    const float* x, const vector_t* scale, u16* t, u32 hidden, float eps
) {
    __shared__ float scratch[8];
    u64 row = blockIdx.x;
    normalize(x + row * hidden, scale, eps, hidden, t + row * hidden, scratch);
}

extern "C" __global__ void __launch_bounds__(256) moe_combine(
    float* x, const float* y, const float* weights, const vector_t* scale, u16* t,
    u32 hidden, u32 k, float eps
) {
    __shared__ float scratch[8];
    u64 row = blockIdx.x;
    x += row * hidden;
    y += row * k * hidden;
    weights += row * k;
    for (u32 i = threadIdx.x; i < hidden; i += 256) {
        float sum = 0.0f;
        for (u32 rank = 0; rank < k; rank++) {
            sum = __fmaf_rn(weights[rank], y[(u64)rank * hidden + i], sum);
        }
        x[i] = x[i] + sum;
    }
    // A thread reads back only what it wrote.
    normalize(x, scale, eps, hidden, t + row * hidden, scratch);
}
