#include "plan.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <stdexcept>

namespace fusedrnn::cuda {
namespace {

constexpr int block_units = 16;
constexpr int64_t vector_bytes = 16;
constexpr int64_t fragment_bytes = 1024;  // 16 rows of one block of k

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t k_block(const PlanRequest& r) { return 4 * vector_bytes / r.element; }

// A block's partial sums, with what blocks that divide k send each other, and the weights that are not in its
// registers.
int64_t sums_bytes(const PlanRequest& r, TileShape shape, int divide_k) {
  const int64_t accumulator = std::max<int64_t>(r.element, 4), pitch = sums_pitch(r.rows() * divide_k * block_units);
  return accumulator * (block_warps / shape.n_warps) * shape.columns() * pitch +
         split_inbox_bytes(divide_k, shape.columns());
}
int64_t weights_bytes(const PlanRequest& r, TileShape shape, int divide_k) {
  const int k_warps = block_warps / shape.n_warps, near = resident_fragments(shape.n_tiles);
  const int tiles = r.rows() * divide_k;
  const int64_t k_blocks = ceil_div(ceil_div(r.K(), k_block(r)), divide_k);
  return k_warps * far_fragments(k_blocks, k_warps, near, tiles, tiles) * fragment_bytes;
}

// The division among about so many blocks; shared_bytes is 0 where their threads are too few.
ClusterShape cluster_shape(const PlanRequest& r, int64_t blocks) {
  const int64_t groups_of_all = std::max<int64_t>(ceil_div(r.H, block_units), 1);
  ClusterShape c{};
  c.groups = int(ceil_div(groups_of_all, blocks));
  c.blocks = int(ceil_div(groups_of_all, c.groups));               // none without units
  constexpr int group_warps = cluster_columns * block_units / 32;  // a thread for each unit and batch entry
  if (c.groups * group_warps > cluster_warps) return c;
  int64_t inbox, outbox, sums = 0;
  if (r.backward) {
    c.tiles = int(ceil_div(groups_of_all, cluster_warps));
    if (c.tiles > many_tiles) return c;
    c.m_warps = std::max(int(ceil_div(groups_of_all, c.tiles)), c.groups * group_warps), c.k_warps = 1;
    c.k_blocks = int(ceil_div(r.gates * c.groups * block_units, k_block(r)));
    c.far_fragments = far_fragments(c.k_blocks, 1, backward_near, most_tiles(c.tiles), c.tiles);
    inbox = 2 * c.blocks * c.groups * block_units * cluster_columns * int64_t(sizeof(float));
    outbox = 2 * c.k_blocks * (fragment_bytes / 2);
  } else {
    c.tiles = r.gates, c.m_warps = c.groups;
    c.k_blocks = int(ceil_div(r.H, k_block(r)));
    c.k_warps = std::clamp(c.k_blocks, group_warps, cluster_warps / c.groups);
    c.far_fragments = far_fragments(c.k_blocks, c.k_warps, forward_near, c.tiles, c.tiles);
    inbox = 2 * c.k_blocks * (fragment_bytes / 2);
    outbox = cluster_columns * c.groups * block_units * r.element;
    sums = c.k_warps * cluster_columns * gates_pitch(c.groups, r.gates) * gate_floats(r.gates) * int64_t(sizeof(float));
  }
  c.inbox = mailboxes_bytes, c.outbox = c.inbox + inbox, c.sums = c.outbox + outbox, c.far = c.sums + sums;
  c.shared_bytes = c.far + c.warps() * c.far_fragments * fragment_bytes;
  return c;
}

// The largest cluster such that all run at the same time, and of those the one with the fewest batch entries: its
// blocks exchange the least. Without one the name stays empty and the reason says why; then, if it is forced, clusters
// may also run one after another.
Plan cluster_plan(const PlanRequest& r, const Device& device, bool forced) {
  Plan plan{};
  const auto clusters = [&](int64_t columns) { return ceil_div(r.N, columns) * r.directions * r.together; };
  // Where layers run at the same time, so do the projections of their next steps: a quarter is for those.
  const int64_t processors = r.together > 1 ? device.processors * 3 / 4 : device.processors;
  ClusterShape fits{};
  bool at_once = false;
  for (int blocks = device.cluster_blocks; blocks > 0 && !at_once; --blocks) {
    const ClusterShape shape = cluster_shape(r, blocks);
    if (shape.shared_bytes == 0 || shape.shared_bytes > device.shared_bytes) continue;
    const int64_t known_room = device.room(device.clusters, shape.blocks);
    if (known_room == 0) continue;
    const int64_t room = std::min(known_room, processors / shape.blocks);
    fits = shape, fits.columns = least_columns;
    while (fits.columns < cluster_columns && clusters(fits.columns) > room) fits.columns *= 2;
    at_once = clusters(fits.columns) <= room;
  }
  if (device.cluster_blocks == 0)
    plan.reason = device.refused.empty() ? "the device has no clusters" : device.refused;
  else if (!r.tensor_cores)
    plan.reason = "only tensor cores' weights stay on the chip";
  else if (r.projected)
    plan.reason = "a cluster has no projection";
  else if (fits.blocks == 0)
    plan.reason = "the weights are too large for a cluster";
  else if (!at_once && !forced)
    plan.reason = std::to_string(clusters(fits.columns)) + " clusters of " + std::to_string(fits.blocks) +
                  " blocks are too many to run at the same time";
  else
    plan.name = "cluster", plan.reason = forced ? "this plan was asked for" : "the weights fit in a cluster";
  if (device.cluster_blocks > 0 && !device.refused.empty()) plan.reason = device.refused + "; " + plan.reason;
  plan.cluster = fits, plan.blocks_x = fits.blocks, plan.blocks_y = ceil_div(r.N, fits.columns);
  return plan;
}

int64_t blocks_of(const PlanRequest& r, const Plan& plan) { return plan.blocks_x * plan.blocks_y * r.directions; }

bool run_together(const PlanRequest& r, const Device& device, const Plan& plan) {
  return blocks_of(r, plan) / plan.divide_k <= device.room(device.splits, plan.divide_k);
}

// The smallest tile whose blocks all run at the same time, else the largest; so many blocks of a cluster divide k.
Plan tiles_of(const PlanRequest& r, const Device& device, int divide_k) {
  Plan plan{};
  plan.divide_k = divide_k;
  plan.blocks_x = ceil_div(ceil_div(std::max(r.H, r.P), block_units), divide_k) * divide_k;
  const int first = divide_k > 1 ? least_split_shape : 0;
  for (int i = first; i < int(std::size(tile_shapes)); ++i) {
    const int64_t sums = sums_bytes(r, tile_shapes[i], divide_k);
    if (i > first && (sums > device.shared_bytes || tile_shapes[i - 1].columns() >= r.N)) break;
    plan.shape = i, plan.sums_bytes = sums;
    plan.blocks_y = ceil_div(r.N, tile_shapes[i].columns());
    if (run_together(r, device, plan)) break;
  }
  plan.weights_bytes = weights_bytes(r, tile_shapes[plan.shape], divide_k);
  return plan;
}

// stepwise, loop or grid.
Plan tiled_plan(const PlanRequest& r, const Device& device) {
  Plan plan = tiles_of(r, device, 1);
  const int64_t shared = plan.sums_bytes + plan.weights_bytes, blocks = blocks_of(r, plan);
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
  return plan;
}

// The tiles of clusters that divide k, of as many blocks as possible. Without those the name stays empty and the reason
// says why.
Plan split_plan(const PlanRequest& r, const Device& device) {
  Plan plan{};
  if (!r.backward)
    plan.reason = "only the backward pass has that much to divide";
  else if (device.cluster_blocks == 0)
    plan.reason = "the device has no clusters";
  else if (!r.tensor_cores)
    plan.reason = "only tensor cores' weights stay on the chip";
  for (int divide_k = most_split; divide_k >= least_split && plan.reason.empty(); divide_k /= 2) {
    Plan split = tiles_of(r, device, divide_k);
    const int64_t shared = split.sums_bytes + split.weights_bytes;
    if (divide_k > device.cluster_blocks || !run_together(r, device, split) || shared > device.shared_bytes) continue;
    split.name = "split", split.reason = "the weights fit on the chip, and the blocks of a cluster divide the sums";
    return split;
  }
  if (plan.reason.empty()) plan.reason = "blocks that divide the sums don't fit on the chip";
  return plan;
}

// What a block of `grid` reads of each step's gate gradients.
int64_t operand_bytes(const PlanRequest& r, const Plan& grid) {
  return std::min<int64_t>(r.N, grid.columns()) * r.K() * r.element;
}

constexpr const char* names[] = {"", "stepwise", "loop", "grid", "split", "cluster"};
std::atomic<const char*> forced_name{""};  // of names; set while other threads read it

}  // namespace

Plan make_plan(const PlanRequest& r, const Device& device, const std::string& forced) {
  constexpr int64_t worth_dividing = 128 * 1024;
  const std::string asked_for = "this plan was asked for";
  Plan plan = tiled_plan(r, device);
  if (forced == "stepwise" || forced == "loop" || forced == "grid") {
    if (forced == "stepwise" || forced == plan.name || (forced == "loop" && plan.name == "grid"))
      plan.name = forced, plan.reason = asked_for;
    return plan;
  }
  const Plan split = split_plan(r, device);
  if (forced == "split") {
    const std::string refused = device.refused.empty() ? "" : device.refused + "; ";
    if (split.is_split())
      plan = split, plan.reason = refused + asked_for;
    else
      plan.reason = refused + split.reason + "; " + plan.reason;
    return plan;
  }
  const Plan cluster = cluster_plan(r, device, forced == "cluster");
  if (cluster.is_cluster()) return cluster;
  if (forced.empty() && r.backward && operand_bytes(r, plan) >= worth_dividing) {
    if (split.is_split())
      plan = split;
    else if (split.reason != cluster.reason && split.reason != plan.reason)
      plan.reason = split.reason + "; " + plan.reason;
  }
  if (cluster.reason != plan.reason) plan.reason = cluster.reason + "; " + plan.reason;
  return plan;
}

std::string forced_plan() { return forced_name.load(); }

void force_plan(const std::string& name) {
  const auto known = std::find(std::begin(names), std::end(names), name);
  if (known == std::end(names)) {
    throw std::invalid_argument("plan '" + name +
                                "' is unknown: expected stepwise, loop, grid, split, cluster or '' (automatic)");
  }
  forced_name = *known;
}

}  // namespace fusedrnn::cuda
