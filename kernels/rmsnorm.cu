// t = bf16(x / sqrt(mean(x^2) + eps) * scale); with `moe_combine`, first x += sum of the experts'
// outputs: x + (((w0 y0 + w1 y1) + w2 y2) + w3 y3) in rank order.
//
//   x        f32 [n_rows, hidden], updated by moe_combine
//   y        bf16 [n_rows * k, hidden]; gates f32 [n_rows * k]
//   scale    [hidden]
//   t        bf16 [n_rows, hidden]
//
// Grid (n_rows), block 256: one block shape whatever the batch, so one order of the sum.
// Expected error: one rounding to bf16.

extern "C" __global__ void __launch_bounds__(256) rmsnorm(const float* x, const vector_t* scale, u16* t, float eps) {
    __shared__ float scratch[8];
    // The first layer's qkv product, which follows, reads rows before it waits: `embed_step` has written them.
    follow_previous();
    u64 row = blockIdx.x;
    RowValues values;
    values.load(x + row * HIDDEN);
    values.normalize(scale, eps, t + row * HIDDEN, scratch);
}

extern "C" __global__ void __launch_bounds__(256) moe_combine(
    float* x, const u16* y, const float* gates, const vector_t* scale, u16* t, float eps
) {
    __shared__ float scratch[8];
    follow_between();
    u64 row = blockIdx.x;
    x += row * HIDDEN;
    y += row * TOP_K * HIDDEN;
    gates += row * TOP_K;
    RowValues values;
    values.load(x);
    #pragma unroll
    for (int n = 0; n < RowValues::N; n++) {
        if (!RowValues::has(n)) continue;
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
        #pragma unroll
        for (int rank = 0; rank < TOP_K; rank++) {
            uint2 of_rank = *(const uint2*)(y + (u64)rank * HIDDEN + RowValues::at(n));
            float gate = gates[rank];
            sum.x = __fmaf_rn(gate, bf16_to_f32((u16)of_rank.x), sum.x);
            sum.y = __fmaf_rn(gate, bf16_to_f32((u16)(of_rank.x >> 16)), sum.y);
            sum.z = __fmaf_rn(gate, bf16_to_f32((u16)of_rank.y), sum.z);
            sum.w = __fmaf_rn(gate, bf16_to_f32((u16)(of_rank.y >> 16)), sum.w);
        }
        values.v[n].x += sum.x;
        values.v[n].y += sum.y;
        values.v[n].z += sum.z;
        values.v[n].w += sum.w;
    }
    values.store(x);
    values.normalize(scale, eps, t + row * HIDDEN, scratch);
}
