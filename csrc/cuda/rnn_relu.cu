#include "../cells/rnn.h"
#include "kernels.h"
#include "launch.cuh"

namespace fusedrnn::cuda {
FUSEDRNN_INSTANTIATE(RNNRelu)
}  // namespace fusedrnn::cuda
