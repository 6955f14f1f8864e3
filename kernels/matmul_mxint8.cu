// matmul.cuh on MXINT8 weights: 8.25 bits a weight. Expected error: as matmul_bf16 on the same values.

MATMULS(MXINT8)
