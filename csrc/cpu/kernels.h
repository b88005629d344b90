// The table of CPU kernels of each instruction set.
#pragma once

#include "../curvature.h"
#include "params.h"
#include "plan.h"

namespace fusedrnn {

enum class CellKind { rnn_tanh, rnn_relu, lstm, gru };
constexpr int cell_kinds = 4;

template <class S>
struct LayerKernels {
  // All directions of a layer, on up to `threads` threads.
  void (*forward)(const Forward<S>* directions, int count, int threads);
  void (*backward)(const Backward<S>* directions, int count, int threads);
  // The derivative of `forward`; not for bfloat16.
  void (*tangent)(const Forward<S>* directions, int count, int threads);
  void (*curvature)(const Curvature<S>& steps, int threads);  // nor this
  // What `forward` would do without saving, for so many directions like this one.
  ForwardPlan (*plan)(const Forward<S>& direction, int count, int threads);
};

// An instruction set's; each is [cell_kinds].
struct Kernels {
  const LayerKernels<float>* f32;
  const LayerKernels<double>* f64;
  const LayerKernels<bf16>* b16;

  template <class S>
  const LayerKernels<S>& of(CellKind cell) const {
    if constexpr (std::is_same_v<S, float>)
      return f32[int(cell)];
    else if constexpr (std::is_same_v<S, double>)
      return f64[int(cell)];
    else
      return b16[int(cell)];
  }
};

// Defined in each kernels_<instruction set>.cpp.
#define FUSEDRNN_KERNELS                             \
  extern const LayerKernels<float> f32[cell_kinds];  \
  extern const LayerKernels<double> f64[cell_kinds]; \
  extern const LayerKernels<bf16> b16[cell_kinds];
namespace baseline {
FUSEDRNN_KERNELS
}
namespace avx2 {
FUSEDRNN_KERNELS
}
namespace avx512 {
FUSEDRNN_KERNELS
}
#undef FUSEDRNN_KERNELS
// What these add is for bfloat16 alone.
namespace avx512_bf16 {
extern const LayerKernels<bf16> b16[cell_kinds];
}
namespace amx {
extern const LayerKernels<bf16> b16[cell_kinds];
}

// The kernels in use: of the best instruction set that this processor has, unless set_cpu_capability chose a lower one.
const Kernels& cpu_kernels();

}  // namespace fusedrnn
