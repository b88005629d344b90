#include "../cells/gru.h"
#include "kernels.h"
#include "launch.cuh"

namespace fusedrnn::cuda {
FUSEDRNN_INSTANTIATE(GRU)
}  // namespace fusedrnn::cuda
