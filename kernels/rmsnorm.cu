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
    const RowValues::Scale scales = RowValues::load_scale(scale);
    // The first layer's qkv product, which follows, reads rows before it waits: `embed_step` has written them.
    follow_previous();
    u64 row = blockIdx.x;
    RowValues values;
    values.load(x + row * HIDDEN);
    values.normalize(scales, eps, t + row * HIDDEN, scratch);
}

extern "C" __global__ void __launch_bounds__(256, 2) moe_combine(
    float* x, const u16* y, const float* gates, const vector_t* scale, u16* t, float eps
) {
    __shared__ float scratch[8];
    let_next_start();
    u64 row = blockIdx.x;
    x += row * HIDDEN;
    y += row * TOP_K * HIDDEN;
    gates += row * TOP_K;
    // The kernel before writes y alone; residual and gates are complete before it starts.
    const RowValues::Scale scales = RowValues::load_scale(scale);
    RowValues values;
    values.load(x);
    float of_ranks[TOP_K];
    #pragma unroll
    for (int rank = 0; rank < TOP_K; rank++) of_ranks[rank] = load_l2(gates + rank);
    wait_for_previous();
    // All are asked for before the first is used.
    const u16* first = y + RowValues::at(0);
    uint2 outputs[RowValues::N][TOP_K];
    #pragma unroll
    for (int n = 0; n < RowValues::N; n++) {
        #pragma unroll
        for (int rank = 0; rank < TOP_K; rank++) {
            if (RowValues::has(n)) outputs[n][rank] = load_l2((const uint2*)(first + rank * HIDDEN + n * 1024));
        }
    }
    #pragma unroll
    for (int n = 0; n < RowValues::N; n++) {
        if (!RowValues::has(n)) continue;
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
        #pragma unroll
        for (int rank = 0; rank < TOP_K; rank++) {
            uint2 of_rank = outputs[n][rank];
            float gate = of_ranks[rank];
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
    values.normalize(scales, eps, t + row * HIDDEN, scratch);
}
