// The instructions that CUDA C++ has no word for, one small function each. Put in front of
// `common.cuh`, which is put in front of every kernel; no header is needed.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Address of shared memory as PTX wants it.
__device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}

// Copies 16 bytes to shared memory behind the thread's back; writes zeros where not `valid` (the
// source is not read then, and may be no address). Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async16(u32 shared, const void* global, bool valid) {
    // cg: through L2 alone; the operand after 16 is how many bytes are read.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared), "l"(global), "r"(valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `PENDING` of the thread's latest groups are under way.
template <int PENDING> __device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}

// A kernel may be launched while the one before it still runs. It lets the next one begin to
// start, and waits for all that the one before has written, before it reads or writes anything
// but weights.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// In this order, or kernels further on would take the room of those before them.
__device__ __forceinline__ void follow_previous() {
    wait_for_previous();
    let_next_start();
}
// For the kernels of few instructions between two products: the product behind may take its place,
// and ask for its weights, while the one before still runs.
__device__ __forceinline__ void follow_between() {
    let_next_start();
    wait_for_previous();
}

// Asks for the 128 bytes at `global` to be brought to L2.
__device__ __forceinline__ void prefetch_l2(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" :: "l"(global));
}

// The same for a run of bytes, a multiple of 16.
__device__ __forceinline__ void prefetch_l2(const void* global, u32 n_bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(global), "r"(n_bytes) : "memory");
#endif
}

// Past the multiprocessor's own cache, which may hold what an earlier kernel has left there.
__device__ __forceinline__ u32 load_l2(const u32* global) {
    u32 v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(global));
    return v;
}
__device__ __forceinline__ float load_l2(const float* global) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(global));
    return v;
}
__device__ __forceinline__ uint2 load_l2(const uint2* global) {
    uint2 v;
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(global));
    return v;
}
__device__ __forceinline__ uint4 load_l2(const uint4* global) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(global));
    return v;
}

__device__ __forceinline__ float4 load_l2(const float4* global) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(global));
    return v;
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8
// and gets elements (l / 4, 2 (l % 4)) and the next of each.
__device__ __forceinline__ void load_matrix_x4(u32 (&r)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row));
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_matrix_x4_transposed(u32 (&r)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row));
}

// An 8x8 matrix of 16-bit elements in a warp's registers, transposed: lane l has elements
// (l / 4, 2 (l % 4)) and the next, before and after.
__device__ __forceinline__ u32 turn_matrix(u32 two) {
    u32 d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(two));
    return d;
}

// c += a b for bf16 a [16, 16] and b [16, 8], f32 c [16, 8]. With g = lane / 4, t = lane % 4:
// a0 = (g, 2t..), a1 = (g + 8, 2t..), a2 = (g, 2t + 8..), a3 = (g + 8, 2t + 8..);
// b0 = (2t.., g), b1 = (2t + 8.., g); c0, c1 = (g, 2t..), c2, c3 = (g + 8, 2t..).
__device__ __forceinline__ void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a b + c of bf16 pairs, rounded once; subnormal numbers are kept.
__device__ __forceinline__ u32 fma_bf16x2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// Products of two bf16 pairs. sm_80 has no multiplication of pairs, so it is a fused
// multiply-add with -0, which changes no product.
__device__ __forceinline__ u32 mul_bf16x2(u32 a, u32 b) { return fma_bf16x2(a, b, 0x80008000u); }

// NaN where one of both is.
__device__ __forceinline__ float min_or_nan(float a, float b) {
    float d;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
}
__device__ __forceinline__ float max_or_nan(float a, float b) {
    float d;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
}

// A pair whose halves are both the low, or both the high one of `a`. An instruction on pairs reads
// its operand so by itself.
__device__ __forceinline__ u32 both_low(u32 a) {
    u32 d;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {low, low};}" : "=r"(d) : "r"(a));
    return d;
}
__device__ __forceinline__ u32 both_high(u32 a) {
    u32 d;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {high, high};}" : "=r"(d) : "r"(a));
    return d;
}

// Rounds to nearest, ties to even.
__device__ __forceinline__ u16 f32_to_bf16(float x) {
    u16 d;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(x));
    return d;
}

// A pair of bf16, `low` in the low half.
__device__ __forceinline__ u32 f32x2_to_bf16x2(float low, float high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// 2^x to about 2 units in the last place; exactly 1 at 0, 0 at -infinity.
__device__ __forceinline__ float exp2_approx(float x) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

// 1 / sqrt(x) to about 2 units in the last place.
__device__ __forceinline__ float rsqrt_approx(float x) {
    float d;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}
