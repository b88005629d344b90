#include "plan.h"

#include <algorithm>
#include <stdexcept>

namespace fusedrnn::cuda {
namespace {

constexpr int block_warps = 8, block_units = 16;
constexpr int64_t vector_bytes = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tile::sums_bytes and Tile::weights_bytes of tile.cuh.
int64_t sums_bytes(const PlanRequest& r, TileShape shape) {
  const int64_t accumulator = std::max<int64_t>(r.element, 4);
  return accumulator * (block_warps / shape.n_warps) * shape.columns() * (block_units * r.gates + 4);
}
int64_t weights_bytes(const PlanRequest& r) {
  const int64_t k_block = 4 * vector_bytes / r.element;
  return ceil_div(r.K, k_block) * k_block * r.element * block_units * r.gates;
}

std::string forced_name;

}  // namespace

Plan make_plan(const PlanRequest& r, const PlanDevice& device, const std::string& forced) {
  Plan plan{};
  plan.blocks_x = ceil_div(std::max(r.H, r.P), block_units);
  plan.weights_bytes = r.tensor_cores ? weights_bytes(r) : 0;

  // The smallest tile whose blocks all run at the same time, else the largest.
  int64_t blocks = 0;
  for (int i = 0; i < int(std::size(tile_shapes)); ++i) {
    const int64_t sums = sums_bytes(r, tile_shapes[i]);
    if (i > 0 && (sums > device.shared_bytes || tile_shapes[i - 1].columns() >= r.N)) break;
    plan.shape = i, plan.sums_bytes = sums;
    plan.blocks_y = ceil_div(r.N, tile_shapes[i].columns());
    blocks = plan.blocks_x * plan.blocks_y * r.directions;
    if (blocks <= device.processors) break;
  }

  const int64_t shared = plan.sums_bytes + plan.weights_bytes;
  if (blocks > device.processors)
    plan.name = "stepwise", plan.reason = std::to_string(blocks) + " blocks are more than the device's " +
                                          std::to_string(device.processors) + " processors";
  else if (!r.tensor_cores)
    plan.name = "loop", plan.reason = "only tensor cores' weights stay on the chip";
  else if (shared > device.shared_bytes)
    plan.name = "loop", plan.reason = "a block's weights and sums take " + std::to_string(shared) +
                                      " bytes of shared memory, it has " + std::to_string(device.shared_bytes);
  else
    plan.name = "grid", plan.reason = "the weights fit on the chip";

  if (forced == "stepwise" || (forced == "loop" && plan.name == "grid"))
    plan.name = forced, plan.reason = "this plan was asked for";
  return plan;
}

const std::string& forced_plan() { return forced_name; }

void force_plan(const std::string& name) {
  if (name != "" && name != "stepwise" && name != "loop" && name != "grid") {
    throw std::invalid_argument("plan '" + name + "' is unknown: expected stepwise, loop, grid or '' (automatic)");
  }
  forced_name = name;
}

}  // namespace fusedrnn::cuda
