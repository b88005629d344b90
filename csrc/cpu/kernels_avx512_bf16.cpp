// The CPU kernels for AVX-512 with bfloat16 dot products.
#define FUSEDRNN_ISA avx512_bf16
#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_ONLY_BF16
#include "instantiate.h"
