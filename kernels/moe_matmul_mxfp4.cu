// moe_matmul.cuh on MXFP4 weights: 4.25 bits a weight from memory to registers, where 8 codes
// become four bf16 pairs in 14 instructions, exactly. Expected error: as matmul_bf16.

VARIANTS(MXFP4, gate_up, GateUp, GateUpTiles, 8, 3, 2, 3, 2, 12)
VARIANTS(MXFP4, down, Down, DownRows, 8, 3, 2, 3, 2, 12)
