// How one direction of a layer is divided among threads. Pure functions of the shape; they never change results.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fusedrnn {

// Row groups share nothing. The members of a row group divide the hidden units and meet once a step.
struct Split {
  int row_groups, unit_groups;
  int threads() const { return row_groups * unit_groups; }
};

// The split with the least estimated time for one step of `batch` rows (on average), `panels` panels of the recurrent
// matrix with `panel_bytes` each; `packings` matrices like it are packed for every step (a fraction, if once for many).
// The constants are rough figures of a current core: only their ratios matter.
inline Split plan_split(int threads, double batch, int64_t panels, double panel_bytes, double packings) {
  constexpr double ns_per_byte_row = 1.0 / 450;  // one row times one panel byte, at full FMA rate
  constexpr double ns_per_byte_l2 = 1.0 / 140, ns_per_byte_l3 = 1.0 / 60, l2_bytes = 768 * 1024;
  constexpr double ns_per_byte_shared = 1.0 / 16;  // from the cache of the core that has just written it
  constexpr double barrier_ns = 400;
  Split best{1, 1};
  double best_ns = 1e300;
  for (int rows = 1; rows <= threads && rows <= std::max(1.0, batch); ++rows) {
    const int units = int(std::clamp<int64_t>(panels, 1, threads / rows));
    const double bytes = double((panels + units - 1) / units) * panel_bytes;
    const double compute = std::max(1.0, batch / rows) * bytes * ns_per_byte_row;
    const double memory = bytes * ns_per_byte_l2 + std::max(0.0, bytes - l2_bytes) * ns_per_byte_l3;
    const double shared = packings * bytes * (1 - 1.0 / rows) * ns_per_byte_shared;
    const double ns =
        std::max(compute, memory) + 0.25 * std::min(compute, memory) + shared + (units > 1 ? barrier_ns : 0);
    if (ns < best_ns) best_ns = ns, best = {rows, units};
  }
  return best;
}

// Of a layer's matrix products, forward.
inline double layer_multiply_adds(int64_t rows, int64_t directions, int64_t gates, int64_t H, int64_t I, int64_t P) {
  return double(rows) * directions * gates * H * (I + P);
}

// Threads worth waking for an op of this much work.
constexpr double multiply_adds_per_thread = 150e3;
inline int plan_threads(int available, double multiply_adds) {
  return int(std::clamp(multiply_adds / multiply_adds_per_thread, 1.0, double(available)));
}

// Whether a layer's directions run at the same time, each on half of the threads.
constexpr bool both_at_once(int directions, int threads) { return directions == 2 && threads % 2 == 0; }

// How the forward pass of a direction runs.
struct ForwardPlan {
  Split split;
  bool packed;  // the weights are rewritten in panels
  bool both_at_once = false;
};

}  // namespace fusedrnn
