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
    follow_between();
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
    RowValues values;
    values.load(x);
    values.add_outputs(y + row * TOP_K * HIDDEN, gates + row * TOP_K);
    values.store(x);
    values.normalize(scale, eps, t + row * HIDDEN, scratch);
}
