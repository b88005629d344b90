// From a plan to launches of the time loop.
#pragma once

#include <algorithm>

#include "plan.h"
#include "stepwise.cuh"

namespace fusedrnn::cuda {

// Runs steps first .. last - 1 (backward from the last to the first): in one launch if the plan says so and all blocks
// can run at the same time, else in a launch a step, or two with a projection.
template <class Params>
void run_steps(void (*kernel)(Params), Params p, const Plan& plan, int directions, int64_t first, int64_t last,
               bool ascending, Stream stream) {
  const Grid grid{unsigned(plan.blocks_x), unsigned(plan.blocks_y), unsigned(directions)};
  Launch l{grid, block_size, size_t(plan.shared_bytes()), true};
  if (plan.one_launch() && resident_blocks(kernel, l) >= grid.blocks()) {
    p.range = {first, last, true, p.projected, plan.resident()};
    launch(kernel, l, stream, p);
    return;
  }
  l.cooperative = false, l.shared_bytes = size_t(plan.sums_bytes);
  for (int64_t i = 0; i < last - first; ++i) {
    const int64_t s = ascending ? first + i : last - 1 - i;
    p.range = {s, s + 1, true, false, false};
    launch(kernel, l, stream, p);
    if (!p.projected) continue;
    p.range = {s, s + 1, false, true, false};
    launch(kernel, l, stream, p);
  }
}

template <class Cell, class Math>
void run_forward(const Forward<typename Math::Storage>& p, const Plan& plan, int directions, Stream stream) {
  using Params = Forward<typename Math::Storage>;
  void (*const kernels[])(Params) = {forward_kernel<Cell, Math, 1, 1>, forward_kernel<Cell, Math, 2, 1>,
                                     forward_kernel<Cell, Math, 4, 1>, forward_kernel<Cell, Math, 4, 2>};
  run_steps(kernels[plan.shape], p, plan, directions, 0, p.direction[0].steps.T, true, stream);
}

template <class Cell, class Math>
void run_backward(const Backward<typename Math::Storage>& p, const Plan& plan, int directions, Stream stream) {
  using Params = Backward<typename Math::Storage>;
  void (*const kernels[])(Params) = {backward_kernel<Cell, Math, 1, 1>, backward_kernel<Cell, Math, 2, 1>,
                                     backward_kernel<Cell, Math, 4, 1>, backward_kernel<Cell, Math, 4, 2>};
  const auto& d = p.direction[0];
  run_steps(kernels[plan.shape], p, plan, directions, d.dh0 || d.dc0 ? -1 : 0, d.steps.T, false, stream);
}

}  // namespace fusedrnn::cuda
