// moe_matmul.cuh on MXINT8 weights: 8.25 bits a weight from memory to registers, where 8 codes
// become four bf16 pairs in 14 instructions, exactly. Expected error: as matmul_bf16.

VARIANTS(MXINT8, gate_up, GateUp, GateUpTiles, 8, 3, 2, 3, 1, 6)
VARIANTS(MXINT8, down, Down, DownRows, 8, 3, 2, 3, 1, 6)
