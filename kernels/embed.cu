// x[r] = embedding[token[r]], and on decode steps the rows themselves from the slots.
//
//   embedding  bf16 [n_vocab, hidden]
//   x          f32 [n_rows, hidden], written
//   embed_step: rows[r], and the step counter goes up by one
//
// Grid (n_rows), block 256. One load a value, no arithmetic: exact.

__device__ __forceinline__ void copy_row(const u16* from, float* x, u32 hidden) {
    for (u32 i = threadIdx.x * 4; i < hidden; i += 256 * 4) {
        uint2 four = *(const uint2*)(from + i);
        float4 out;
        out.x = __int_as_float((int)(four.x << 16));
        out.y = __int_as_float((int)(four.x & 0xFFFF0000u));
        out.z = __int_as_float((int)(four.y << 16));
        out.w = __int_as_float((int)(four.y & 0xFFFF0000u));
        *(float4*)(x + i) = out;
    }
}

extern "C" __global__ void __launch_bounds__(256) embed(
    const u16* embedding, const u32* tokens, float* x, u32 hidden
) {
    follow_between();
    u64 row = blockIdx.x;
    copy_row(embedding + (u64)tokens[row] * hidden, x + row * hidden, hidden);
}

// slot_of [n_rows]: a row's slot, NONE for padding; a slot that has stopped is padding, too.
extern "C" __global__ void __launch_bounds__(256) embed_step(
    const u16* embedding, const Slot* slots, const u32* slot_of, Row* rows, u32* step, float* x, u32 hidden
) {
    follow_between();
    u64 r = blockIdx.x;
    u32 slot = slot_of[r];
    bool live = slot != NONE && slots[slot].live != 0;
    if (threadIdx.x == 0) {
        Row row;
        row.sequence = live ? slot : NONE;
        row.position = live ? slots[slot].position : 0;
        row.segment_row = (u32)r;
        row.segment_end = (u32)r + 1;
        rows[r] = row;
        // Read by the step's last kernel alone.
        if (r == 0) *step += 1;
    }
    u32 token = live ? slots[slot].token : 0;
    copy_row(embedding + (u64)token * hidden, x + r * hidden, hidden);
}

// Makes a slot live.
extern "C" __global__ void start_slot(Slot* slots, u32 slot, const Slot start) {
    slots[slot] = start;
}
