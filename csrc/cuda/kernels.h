// The time loop of each cell and way to multiply, instantiated in lstm.cu, gru.cu and rnn.cu.
#pragma once

#include "params.h"
#include "tile.cuh"

namespace fusedrnn::cuda {

template <class Cell, class Math>
void run_forward(const Forward<typename Math::Storage>& p, const PlanRequest& request, Stream stream);
template <class Cell, class Math>
void run_backward(const Backward<typename Math::Storage>& p, const PlanRequest& request, Stream stream);

#define FUSEDRNN_INSTANTIATE_MATH(Cell, Math)                                                                \
  template void run_forward<Cell, Math>(const Forward<typename Math::Storage>&, const PlanRequest&, Stream); \
  template void run_backward<Cell, Math>(const Backward<typename Math::Storage>&, const PlanRequest&, Stream);

#define FUSEDRNN_INSTANTIATE(Cell)                    \
  FUSEDRNN_INSTANTIATE_MATH(Cell, TensorCores<bf16>)  \
  FUSEDRNN_INSTANTIATE_MATH(Cell, TensorCores<half>)  \
  FUSEDRNN_INSTANTIATE_MATH(Cell, TensorCores<float>) \
  FUSEDRNN_INSTANTIATE_MATH(Cell, Fma<float>)         \
  FUSEDRNN_INSTANTIATE_MATH(Cell, Fma<double>)

}  // namespace fusedrnn::cuda
