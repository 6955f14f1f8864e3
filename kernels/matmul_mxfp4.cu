// matmul.cuh on MXFP4 weights: 4.25 bits a weight. Expected error: as matmul_bf16 on the same values.

MATMULS(MXFP4)
