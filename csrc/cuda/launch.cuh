// From a plan to launches of the time loop.
#pragma once

#include <array>
#include <stdexcept>
#include <string>

#include "cluster.cuh"
#include "stepwise.cuh"
#include "tangent.cuh"

namespace fusedrnn::cuda {

// The kernels of a pass; those of stepwise.cuh by Plan::shape, and whether the weights stay on the chip and k is
// divided.
template <class Params>
struct Kernels {
  using Kernel = void (*)(Params);
  Kernel cluster, cluster_of_many;  // the second is for warps of many_tiles
  std::array<Kernel, 4> split_in_4, split_in_2, resident, tiled;
};

inline Grid grid_of(const Plan& plan, const PlanRequest& request) {
  return {unsigned(plan.blocks_x), unsigned(plan.blocks_y), unsigned(request.directions)};
}
inline Launch cluster_launch(const Plan& plan, const PlanRequest& request) {
  return {grid_of(plan, request), plan.cluster.warps() * warp_size, size_t(plan.shared_bytes()), false,
          plan.cluster.blocks};
}
inline Launch tiled_launch(const Plan& plan, const PlanRequest& request) {
  return {grid_of(plan, request), block_size, size_t(plan.shared_bytes()), plan.one_launch(),
          plan.is_split() ? plan.divide_k : 0};
}
template <class Params>
auto cluster_kernel(const Kernels<Params>& kernels, const Plan& plan) {
  return most_tiles(plan.cluster.tiles) == many_tiles ? kernels.cluster_of_many : kernels.cluster;
}
template <class Params>
auto tiled_kernel(const Kernels<Params>& kernels, const Plan& plan) {
  if (plan.is_split()) return (plan.divide_k == most_split ? kernels.split_in_4 : kernels.split_in_2)[plan.shape];
  return (plan.resident() ? kernels.resident : kernels.tiled)[plan.shape];
}

// Steps first .. last - 1 (backward from the last to the first): in one launch, or in a launch a step, two with a
// projection.
template <class Params>
void run_tiled(const Kernels<Params>& kernels, Params p, const Plan& plan, const PlanRequest& request, int64_t first,
               int64_t last, Stream stream) {
  const Launch l = tiled_launch(plan, request);
  const auto kernel = tiled_kernel(kernels, plan);
  if (plan.one_launch()) {
    p.range = {first, last, true, p.projected};
    launch(kernel, l, stream, p);
    return;
  }
  for (int64_t i = 0; i < last - first; ++i) {
    const int64_t s = request.backward ? last - 1 - i : first + i;
    p.range = {s, s + 1, true, false};
    launch(kernel, l, stream, p);
    if (!p.projected) continue;
    p.range = {s, s + 1, false, true};
    launch(kernel, l, stream, p);
  }
}

constexpr int64_t most_blocks_y = 65535;

inline std::string refusal(int64_t most, int64_t wanted, const std::string& of) {
  return "the device has room for " + std::to_string(most) + " of " + std::to_string(wanted) + " " + of +
         " at the same time";
}

// A plan that the device can run: what waits for each other at the same time, and all clusters of the plan `cluster`,
// unless it is forced.
template <class Params>
Plan find_plan(const Kernels<Params>& kernels, PlanRequest request, int layers) {
  return widest_plan(layers, [&](int together) {
    request.together = together;
    Device device = device_facts();
    while (true) {
      Plan plan = make_plan(request, device, forced_plan());
      if (plan.blocks_y > most_blocks_y)
        throw std::runtime_error("fusedrnn: " + std::to_string(request.N) +
                                 " batch entries are too many, a GPU takes " +
                                 std::to_string(most_blocks_y * plan.columns()));
      if (plan.is_cluster()) {
        const int blocks = plan.cluster.blocks;
        const auto clusters = [&](int64_t batch_tiles) { return batch_tiles * request.directions * together; };
        const int64_t most = resident_clusters(cluster_kernel(kernels, plan), cluster_launch(plan, request));
        if (most >= (forced_plan().empty() ? clusters(plan.blocks_y) : 1)) return plan;
        device.clusters[blocks] = most;
        const int64_t fewest = clusters((request.N + cluster_columns - 1) / cluster_columns);
        if (most < fewest) device.refused = refusal(most, fewest, "clusters of " + std::to_string(blocks) + " blocks");
        continue;
      }
      const Launch l = tiled_launch(plan, request);
      if (plan.is_split()) {
        const int64_t most = resident_clusters(tiled_kernel(kernels, plan), l), all = l.grid.blocks() / plan.divide_k;
        if (most >= all) return plan;
        device.splits[plan.divide_k] = most;
        if (!device.refused.empty()) device.refused += "; ";
        device.refused += refusal(most, all, "clusters of " + std::to_string(plan.divide_k) + " blocks");
        continue;
      }
      if (plan.one_launch()) {
        const int64_t most = resident_blocks(tiled_kernel(kernels, plan), l);
        if (most < l.grid.blocks()) {
          plan.name = "stepwise", plan.reason = refusal(most, l.grid.blocks(), "blocks");
          if (!device.refused.empty()) plan.reason = device.refused + "; " + plan.reason;
        }
      }
      return plan;
    }
  });
}

// Steps first .. last - 1 of a direction. Those that aren't all of it are for clusters alone.
template <class Params>
void run(const Kernels<Params>& kernels, Params p, const Plan& plan, const PlanRequest& request, int64_t first,
         int64_t last, Stream stream) {
  if (!plan.is_cluster()) return run_tiled(kernels, p, plan, request, first, last, stream);
  p.range = {first, last, true, false}, p.cluster = plan.cluster;
  launch(cluster_kernel(kernels, plan), cluster_launch(plan, request), stream, p);
}

template <class Cell, class Math>
Kernels<Forward<typename Math::Storage>> forward_kernels() {
  Kernels<Forward<typename Math::Storage>> kernels{};
  kernels.tiled = {forward_kernel<Cell, Math, 1, 1, false>, forward_kernel<Cell, Math, 2, 1, false>,
                   forward_kernel<Cell, Math, 4, 1, false>, forward_kernel<Cell, Math, 4, 2, false>};
  if constexpr (Math::resident) {
    kernels.cluster = kernels.cluster_of_many = forward_cluster<Cell, Math>;
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
    kernels.cluster = backward_cluster<Cell, Math, few_tiles>;
    kernels.cluster_of_many = backward_cluster<Cell, Math, many_tiles>;
    kernels.resident = {backward_kernel<Cell, Math, 1, 1, true>, backward_kernel<Cell, Math, 2, 1, true>,
                        backward_kernel<Cell, Math, 4, 1, true>, backward_kernel<Cell, Math, 4, 2, true>};
    static_assert(least_split_shape == 1 && most_split == 4 && least_split == 2);
    kernels.split_in_4 = {nullptr, backward_kernel<Cell, Math, 2, 1, true, 4>,
                          backward_kernel<Cell, Math, 4, 1, true, 4>, backward_kernel<Cell, Math, 4, 2, true, 4>};
    kernels.split_in_2 = {nullptr, backward_kernel<Cell, Math, 2, 1, true, 2>,
                          backward_kernel<Cell, Math, 4, 1, true, 2>, backward_kernel<Cell, Math, 4, 2, true, 2>};
  }
  return kernels;
}

template <class Cell, class Math>
void run_tangent(const Forward<typename Math::Storage>& p, PlanRequest request, int64_t steps, Stream stream) {
  using T = Tangent<Cell>;
  Kernels<Forward<typename Math::Storage>> kernels{};
  kernels.tiled = {forward_kernel<T, Math, 1, 1, false>, forward_kernel<T, Math, 2, 1, false>,
                   forward_kernel<T, Math, 4, 1, false>, forward_kernel<T, Math, 4, 2, false>};
  request.tensor_cores = false;  // what the other kernels need
  run_tiled(kernels, p, find_plan(kernels, request, 1), request, 0, steps, stream);
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
