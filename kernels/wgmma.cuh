// The instructions of sm_90a that multiply by warpgroups, copy in bulk and count bytes: one small
// function each. Behind `ptx.cuh`, before `gemm_wgmma.cuh`.

// A warpgroup's product with a token tile of 8, 16, .. 128.
#define R4(a, b, c, d) "%" #a ", %" #b ", %" #c ", %" #d
#define R8 R4(0, 1, 2, 3) ", " R4(4, 5, 6, 7)
#define R16 R8 ", " R4(8, 9, 10, 11) ", " R4(12, 13, 14, 15)
#define R24 R16 ", " R4(16, 17, 18, 19) ", " R4(20, 21, 22, 23)
#define R32 R24 ", " R4(24, 25, 26, 27) ", " R4(28, 29, 30, 31)
#define R44 R32 ", " R4(32, 33, 34, 35) ", " R4(36, 37, 38, 39) ", " R4(40, 41, 42, 43)
#define R48 R32 ", " R4(32, 33, 34, 35) ", " R4(36, 37, 38, 39) ", " R4(40, 41, 42, 43) ", " R4(44, 45, 46, 47)
#define R64 R48 ", " R4(48, 49, 50, 51) ", " R4(52, 53, 54, 55) ", " R4(56, 57, 58, 59) ", " R4(60, 61, 62, 63)
#define C1(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define C2(n) C1(n), C1(n + 1)
#define C4(n) C2(n), C2(n + 2)
#define C8(n) C4(n), C4(n + 4)
#define WGMMA(N, D, A, B, P, ...) \
    asm volatile("{.reg .pred p; setp.ne.u32 p, %" #P ", 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" D "}, {" A "}, %" #B ", p, 1, 1, 0;}" \
                 : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds))

// c += a b, or c = a b where not `adds`. The registers belong to the instruction until the group
// that holds it is waited for.
template <int NT> __device__ __forceinline__ void wgmma_bf16(float (&c)[NT][4], const u32 (&a)[4], u64 b, u32 adds) {
    if constexpr (NT == 1) WGMMA(8, R4(0, 1, 2, 3), R4(4, 5, 6, 7), 8, 9, C1(0));
    else if constexpr (NT == 2) WGMMA(16, R8, R4(8, 9, 10, 11), 12, 13, C2(0));
    else if constexpr (NT == 4) WGMMA(32, R16, R4(16, 17, 18, 19), 20, 21, C4(0));
    else if constexpr (NT == 6) WGMMA(48, R24, R4(24, 25, 26, 27), 28, 29, C4(0), C2(4));
    else if constexpr (NT == 8) WGMMA(64, R32, R4(32, 33, 34, 35), 36, 37, C8(0));
    else if constexpr (NT == 11) WGMMA(88, R44, R4(44, 45, 46, 47), 48, 49, C8(0), C2(8), C1(10));
    else if constexpr (NT == 16) WGMMA(128, R64, R4(64, 65, 66, 67), 68, 69, C8(0), C8(8));
    else static_assert(NT == 1, "no such token tile");
}

// Orders registers written by the thread before the multiplications that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `PENDING` of the warpgroup's latest groups are under way.
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
}

// Makes shared memory that this thread wrote visible to the matrix units.
__device__ __forceinline__ void fence_matrix_units() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void barrier_init(u32 barrier, u32 n_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(n_arrivals) : "memory");
}
// Arrives, and lets the phase wait for so many bytes of bulk copies.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 n_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(n_bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
// The same where `told`, without a branch: one between multiplications would keep them apart.
__device__ __forceinline__ void barrier_arrive_if(u32 barrier, u32 told) {
    asm volatile("{.reg .pred told; setp.ne.u32 told, %1, 0;\n"
                 "@told mbarrier.arrive.shared::cta.b64 _, [%0];}" :: "r"(barrier), "r"(told) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile("{.reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;}" :: "r"(barrier), "r"(parity) : "memory");
}
// Copies a run of bytes (a multiple of 16) to shared memory; the barrier counts them.
__device__ __forceinline__ void copy_bulk(u32 shared, const void* global, u32 n_bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared), "l"(global), "r"(n_bytes), "r"(barrier) : "memory");
}
// Copies what a map of a matrix calls a box, from element `k` of row `row` on; the barrier counts all
// of its bytes, also those of rows and elements that are not there and become zeros.
__device__ __forceinline__ void copy_tensor(u32 shared, const void* map, int k, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 :: "r"(shared), "l"(map), "r"(k), "r"(row), "r"(barrier) : "memory");
}
__device__ __forceinline__ void prefetch_map(const void* map) {
    asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");
}

// All threads of the cluster's blocks come here before one goes on, and see what the others wrote.
__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release;\n"
                 "barrier.cluster.wait.acquire;" ::: "memory");
}

// Registers of a warpgroup's threads from here on; all its warps say the same.
template <int N> __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N)); }
template <int N> __device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N)); }
