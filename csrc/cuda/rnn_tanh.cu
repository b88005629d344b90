#include "../cells/rnn.h"
#include "kernels.h"
#include "launch.cuh"

namespace fusedrnn::cuda {
FUSEDRNN_INSTANTIATE(RNNTanh)
}  // namespace fusedrnn::cuda
