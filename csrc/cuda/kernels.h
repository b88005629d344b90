// The time loop of each cell and way to multiply, instantiated in <cell>.cu.
#pragma once

#include "params.h"
#include "tile.cuh"

namespace fusedrnn::cuda {

// What the current device can run, of a stack of so many equal layers as many as possible at the same time.
template <class Cell, class Math>
Plan find_plan(const PlanRequest& request, int layers);

// Steps first .. last - 1, backward from the last to the first: all of them, or with the plan `cluster` some after
// others. Backward, step -1 gives dh0 and dc0.
template <class Cell, class Math>
void run_forward(const Forward<typename Math::Storage>& p, const Plan& plan, const PlanRequest& request, int64_t first,
                 int64_t last, Stream stream);
template <class Cell, class Math>
void run_backward(const Backward<typename Math::Storage>& p, const Plan& plan, const PlanRequest& request,
                  int64_t first, int64_t last, Stream stream);

// The derivative of all steps of forward; of float and double alone.
template <class Cell, class Math>
void run_tangent(const Forward<typename Math::Storage>& p, PlanRequest request, int64_t steps, Stream stream);

#define FUSEDRNN_INSTANTIATE_MATH(Cell, Math)                                                                      \
  template Plan find_plan<Cell, Math>(const PlanRequest&, int);                                                    \
  template void run_forward<Cell, Math>(const Forward<typename Math::Storage>&, const Plan&, const PlanRequest&,   \
                                        int64_t, int64_t, Stream);                                                 \
  template void run_backward<Cell, Math>(const Backward<typename Math::Storage>&, const Plan&, const PlanRequest&, \
                                         int64_t, int64_t, Stream);

#define FUSEDRNN_INSTANTIATE_TANGENT(Cell, Math) \
  template void run_tangent<Cell, Math>(const Forward<typename Math::Storage>&, PlanRequest, int64_t, Stream);

#define FUSEDRNN_INSTANTIATE(Cell)                       \
  FUSEDRNN_INSTANTIATE_MATH(Cell, TensorCores<bf16>)     \
  FUSEDRNN_INSTANTIATE_MATH(Cell, TensorCores<half>)     \
  FUSEDRNN_INSTANTIATE_MATH(Cell, TensorCores<float>)    \
  FUSEDRNN_INSTANTIATE_MATH(Cell, Fma<float>)            \
  FUSEDRNN_INSTANTIATE_MATH(Cell, Fma<double>)           \
  FUSEDRNN_INSTANTIATE_TANGENT(Cell, TensorCores<float>) \
  FUSEDRNN_INSTANTIATE_TANGENT(Cell, Fma<float>)         \
  FUSEDRNN_INSTANTIATE_TANGENT(Cell, Fma<double>)

}  // namespace fusedrnn::cuda
