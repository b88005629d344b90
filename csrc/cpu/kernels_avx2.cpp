// The CPU kernels for AVX2 and FMA.
#define FUSEDRNN_ISA avx2
#define FUSEDRNN_VECTOR_BYTES 32
#include "instantiate.h"
