// moe_matmul.cuh on bf16 weights. A stage of 128 tokens takes 42 KB.

VARIANTS(BF16, gate_up, GateUp, GateUpTiles, 4, BIG_STAGES, 1, 2, 1, 6)
VARIANTS(BF16, down, Down, DownRows, 4, BIG_STAGES, 1, 2, 1, 6)
