// The CPU kernels for AVX-512 (F, BW, DQ, VL).
#define FUSEDRNN_ISA avx512
#define FUSEDRNN_VECTOR_BYTES 64
#include "instantiate.h"
