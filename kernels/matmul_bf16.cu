// matmul.cuh on bf16 weights.

MATMULS(BF16)
