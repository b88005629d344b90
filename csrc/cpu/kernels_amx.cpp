// The CPU kernels for AMX tiles of bfloat16, beside AVX-512 with bfloat16 dot products.
#define FUSEDRNN_ISA amx
#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_ONLY_BF16
#include "instantiate.h"
