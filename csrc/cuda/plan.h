// How a layer's time loop runs on a GPU: a pure function of the shape and the device. Results may differ between plans
// only by the order of sums.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "cluster_shape.h"

namespace fusedrnn::cuda {

struct PlanRequest {
  int64_t N, H, P;  // P: the size of h
  int directions, gates;
  bool backward;
  int64_t element;    // bytes of a weight
  bool tensor_cores;  // TF32, bf16, fp16
  bool projected;
  int together = 1;  // layers that are to run at the same time

  // Of a block's recurrent product: rows of W_hh per unit, and what it sums over.
  int rows() const { return backward ? 1 : gates; }
  int64_t K() const { return backward ? gates * H : P; }
};

struct Device {
  int processors;                        // streaming multiprocessors
  int64_t shared_bytes;                  // shared memory that one block can have
  int cluster_blocks;                    // of the largest cluster; 0 where there are none
  std::map<int, int64_t> clusters = {};  // of so many blocks, that it runs at the same time, where it was asked
  std::map<int, int64_t> splits = {};    // the same of the plan `split`
  std::string refused = {};              // what it didn't run of a faster plan, in words

  // Clusters of `clusters` or `splits` that it may run at the same time, as far as is known.
  int64_t room(const std::map<int, int64_t>& known, int blocks) const {
    const auto asked = known.find(blocks);
    return asked != known.end() ? asked->second : processors / blocks;
  }
};

// Tiles come in these sizes: rows of the batch, and how a block's warps divide it.
constexpr int block_warps = 8;
struct TileShape {
  int n_tiles, n_warps;  // n_tiles * 8 rows a warp, n_warps groups of warps
  int columns() const { return 8 * n_tiles * n_warps; }
};
// Where the weights stay on the chip: those that a warp has in registers, of 16 rows and one block of k each.
constexpr int resident_fragments(int n_tiles) { return n_tiles <= 2 ? 12 : 4; }
constexpr TileShape tile_shapes[] = {{1, 1}, {2, 1}, {4, 1}, {4, 2}};
// The tiles of blocks that divide k are from this one on, and so many blocks do.
constexpr int least_split_shape = 1, most_split = 4, least_split = 2;

struct Plan {
  // stepwise: a launch a step. loop: one launch for all steps, whose blocks wait for each other between steps.
  // grid: that, and the recurrent weights stay in registers and shared memory. split: that, and the blocks of a cluster
  // divide the sums over k. cluster: one launch, the blocks of a cluster have all weights of a direction and exchange h
  // among themselves.
  std::string name;
  std::string reason;  // why not a faster one
  int shape;           // index in tile_shapes
  int divide_k = 1;    // so many blocks of a cluster do
  int64_t blocks_x, blocks_y;
  int64_t sums_bytes, weights_bytes;  // shared memory of a block
  ClusterShape cluster;               // if that is the plan
  int together = 1;                   // layers that run at the same time

  bool is_cluster() const { return name == "cluster"; }
  bool one_launch() const { return name != "stepwise"; }
  bool is_split() const { return name == "split"; }
  bool resident() const { return name == "grid" || is_split(); }
  int units() const { return is_cluster() ? 16 * cluster.groups : 16; }  // of a block
  int columns() const { return is_cluster() ? cluster.columns : tile_shapes[shape].columns(); }
  int64_t shared_bytes() const {
    return is_cluster() ? cluster.shared_bytes : sums_bytes + (resident() ? weights_bytes : 0);
  }
};

// `forced` is a plan's name, or empty: the fastest that the shape allows. A forced plan that it doesn't allow falls
// back to the next of grid, loop and stepwise, and `reason` says why.
__attribute__((visibility("default"))) Plan make_plan(const PlanRequest& request, const Device& device,
                                                      const std::string& forced);

// The plan of a stack of layers. Clusters of several layers may run at the same time, as they never wait for each
// other; all other plans have the GPU for themselves. `find(together)` is a plan for so many layers at the same time.
template <class Find>
Plan widest_plan(int layers, Find find) {
  for (int groups = 1;; ++groups) {
    const int together = (layers + groups - 1) / groups;
    Plan plan = find(together);
    plan.together = together;
    if (together == 1 || plan.is_cluster()) return plan;
  }
}

// The plan that ops are made to use (empty: their own choice), of this process.
__attribute__((visibility("default"))) std::string forced_plan();
__attribute__((visibility("default"))) void force_plan(const std::string& name);

}  // namespace fusedrnn::cuda
