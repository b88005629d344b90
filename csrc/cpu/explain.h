// What the CPU kernels would do for a padded layer, for people to read.
#pragma once

#include <cstdint>
#include <string>

#include "plan.h"

namespace fusedrnn {

struct CpuLayer {
  std::string cell, dtype;  // as in the ops' names; "float32", "float64", "bfloat16", "float16"
  int64_t T, N, I, H, P;
  int directions;
  bool projected;
};

struct CpuExplanation {
  int threads, max_threads;  // used, there
  double multiply_adds;
  ForwardPlan plan;
};

// Raises std::invalid_argument for a cell or dtype that doesn't exist, or no rows.
__attribute__((visibility("default"))) CpuExplanation explain_cpu(const CpuLayer& layer);

}  // namespace fusedrnn
