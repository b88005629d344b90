// From a plan to launches of the time loop.
#pragma once

#include <array>

#include "cluster.cuh"
#include "stepwise.cuh"

namespace fusedrnn::cuda {

// The kernels of a pass; those of stepwise.cuh by Plan::shape, and whether the weights stay on the chip.
template <class Params>
struct Kernels {
  using Kernel = void (*)(Params);
  Kernel cluster;
  std::array<Kernel, 4> resident, tiled;
};

// Steps first .. last - 1 (backward from the last to the first): in one launch if the plan says so and all blocks can
// run at the same time, else in a launch a step, or two with a projection.
template <class Params>
void run_tiled(const Kernels<Params>& kernels, Params p, const Plan& plan, const PlanRequest& request, int64_t first,
               int64_t last, Stream stream) {
  const Grid grid{unsigned(plan.blocks_x), unsigned(plan.blocks_y), unsigned(request.directions)};
  Launch l{grid, block_size, size_t(plan.shared_bytes()), true};
  const auto all_steps = (plan.resident() ? kernels.resident : kernels.tiled)[plan.shape];
  if (plan.one_launch() && resident_blocks(all_steps, l) >= grid.blocks()) {
    p.range = {first, last, true, p.projected};
    launch(all_steps, l, stream, p);
    return;
  }
  l.cooperative = false, l.shared_bytes = size_t(plan.sums_bytes);
  for (int64_t i = 0; i < last - first; ++i) {
    const int64_t s = request.backward ? last - 1 - i : first + i;
    p.range = {s, s + 1, true, false};
    launch(kernels.tiled[plan.shape], l, stream, p);
    if (!p.projected) continue;
    p.range = {s, s + 1, false, true};
    launch(kernels.tiled[plan.shape], l, stream, p);
  }
}

inline Launch cluster_launch(const Plan& plan, const PlanRequest& request) {
  const Grid grid{unsigned(plan.blocks_x), unsigned(plan.blocks_y), unsigned(request.directions)};
  return {grid, plan.cluster.warps() * warp_size, size_t(plan.shared_bytes()), false, plan.cluster.blocks};
}

// A plan that the device can run: all clusters at the same time, unless the plan is forced.
template <class Params>
Plan find_plan(const Kernels<Params>& kernels, PlanRequest request, int layers) {
  return widest_plan(layers, [&](int together) {
    request.together = together;
    Device device = device_facts();
    while (true) {
      const Plan plan = make_plan(request, device, forced_plan());
      const int64_t enough = forced_plan().empty() ? plan.blocks_y * request.directions * together : 1;
      if (!plan.is_cluster() || resident_clusters(kernels.cluster, cluster_launch(plan, request)) >= enough) {
        return plan;
      }
      device.cluster_blocks = plan.cluster.blocks > 8 ? 8 : 0;  // what every device with clusters can run, else none
    }
  });
}

// Steps first .. last - 1 of a direction. Those that aren't all of it are for clusters alone.
template <class Params>
void run(const Kernels<Params>& kernels, Params p, const Plan& plan, const PlanRequest& request, int64_t first,
         int64_t last, Stream stream) {
  if (!plan.is_cluster()) return run_tiled(kernels, p, plan, request, first, last, stream);
  p.range = {first, last, true, false}, p.cluster = plan.cluster;
  launch(kernels.cluster, cluster_launch(plan, request), stream, p);
}

template <class Cell, class Math>
Kernels<Forward<typename Math::Storage>> forward_kernels() {
  Kernels<Forward<typename Math::Storage>> kernels{};
  kernels.tiled = {forward_kernel<Cell, Math, 1, 1, false>, forward_kernel<Cell, Math, 2, 1, false>,
                   forward_kernel<Cell, Math, 4, 1, false>, forward_kernel<Cell, Math, 4, 2, false>};
  if constexpr (Math::resident) {
    kernels.cluster = forward_cluster<Cell, Math>;
    kernels.resident = {forward_kernel<Cell, Math, 1, 1, true>, forward_kernel<Cell, Math, 2, 1, true>,
                        forward_kernel<Cell, Math, 4, 1, true>, forward_kernel<Cell, Math, 4, 2, true>};
  }
  return kernels;
}

template <class Cell, class Math>
Kernels<Backward<typename Math::Storage>> backward_kernels() {
  Kernels<Backward<typename Math::Storage>> kernels{};
  kernels.tiled = {backward_kernel<Cell, Math, 1, 1, false>, backward_kernel<Cell, Math, 2, 1, false>,
                   backward_kernel<Cell, Math, 4, 1, false>, backward_kernel<Cell, Math, 4, 2, false>};
  if constexpr (Math::resident) {
    kernels.cluster = backward_cluster<Cell, Math>;
    kernels.resident = {backward_kernel<Cell, Math, 1, 1, true>, backward_kernel<Cell, Math, 2, 1, true>,
                        backward_kernel<Cell, Math, 4, 1, true>, backward_kernel<Cell, Math, 4, 2, true>};
  }
  return kernels;
}

template <class Cell, class Math>
Plan find_plan(const PlanRequest& request, int layers) {
  if (request.backward) return find_plan(backward_kernels<Cell, Math>(), request, layers);
  return find_plan(forward_kernels<Cell, Math>(), request, layers);
}

template <class Cell, class Math>
void run_forward(const Forward<typename Math::Storage>& p, const Plan& plan, const PlanRequest& request, int64_t first,
                 int64_t last, Stream stream) {
  run(forward_kernels<Cell, Math>(), p, plan, request, first, last, stream);
}

template <class Cell, class Math>
void run_backward(const Backward<typename Math::Storage>& p, const Plan& plan, const PlanRequest& request,
                  int64_t first, int64_t last, Stream stream) {
  run(backward_kernels<Cell, Math>(), p, plan, request, first, last, stream);
}

}  // namespace fusedrnn::cuda
