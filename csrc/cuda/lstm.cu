#include "../cells/lstm.h"
#include "kernels.h"
#include "launch.cuh"

namespace fusedrnn::cuda {
FUSEDRNN_INSTANTIATE(LSTM)
}  // namespace fusedrnn::cuda
