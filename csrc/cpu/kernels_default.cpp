// The CPU kernels for the target's baseline.
#define FUSEDRNN_ISA baseline
#define FUSEDRNN_VECTOR_BYTES 16
#include "instantiate.h"
