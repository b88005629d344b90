// Defines the tables of kernels of one instruction set. Included once by each kernels_<instruction set>.cpp.
#pragma once

#include <optional>

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "backward.h"
#include "curvature.h"
#include "forward.h"
#include "kernels.h"

namespace fusedrnn::FUSEDRNN_ISA {

// Calls run(pass, its team's member) for each direction: both at once on half of the team each, or one after the other.
template <class Pass, class Run>
void run_directions(std::optional<Pass>* passes, int count, const Member& me, Barrier* half_barriers, Run run) {
  if (both_at_once(count, me.size)) {
    const int half = me.size / 2, direction = me.id / half;
    run(*passes[direction], Member{me.id % half, half, half_barriers + direction});
  } else {
    for (int d = 0; d < count; ++d) run(*passes[d], me);
  }
}

template <class Cell, class S, Purpose purpose>
void forward_directions(const Forward<S>* p, int count, int threads) {
  using Pass = ForwardPass<Cell, S, purpose>;
  std::optional<Pass> passes[2];
  Barrier half_barriers[2];
  for (int d = 0; d < count; ++d) passes[d].emplace(p[d], threads);
  run_team(threads, [&](Member me) {
    [[maybe_unused]] const MatrixUnit<S> in_use;
    run_directions(passes, count, me, half_barriers, [](Pass& pass, const Member& member) { pass.run(member); });
  });
}

template <class Cell, class S>
void forward(const Forward<S>* p, int count, int threads) {
  if (p->save)
    forward_directions<Cell, S, Purpose::training>(p, count, threads);
  else
    forward_directions<Cell, S, Purpose::inference>(p, count, threads);
}

template <class Cell, class S>
void backward(const Backward<S>* p, int count, int threads) {
  using Pass = BackwardPass<Cell, S>;
  std::optional<Pass> passes[2];
  Barrier half_barriers[2];
  int64_t chunks = 0;
  for (int d = 0; d < count; ++d) {
    passes[d].emplace(p[d], threads);
    chunks = std::max(chunks, passes[d]->chunks());
  }
  run_team(threads, [&](Member me) {
    [[maybe_unused]] const MatrixUnit<S> in_use;
    for (int64_t i = 0; i < chunks; ++i) {
      run_directions(passes, count, me, half_barriers,
                     [i](Pass& pass, const Member& member) { pass.steps(member, i); });
      for (int d = 0; d < count; ++d) {
        me.meet();  // both directions may add to the same rows of dx
        passes[d]->products(me, i);
      }
      me.meet();
    }
    for (int d = 0; d < count; ++d) passes[d]->finish(me);
  });
}

template <class Cell, class S>
ForwardPlan plan(const Forward<S>& p, int count, int threads) {
  const bool both = both_at_once(count, threads);
  ForwardPlan plan = ForwardPass<Cell, S, Purpose::inference>(p, threads).plan(both ? threads / 2 : threads);
  plan.both_at_once = both;
  return plan;
}

template <class Cell, class S>
constexpr LayerKernels<S> kernels_of() {
  LayerKernels<S> kernels{forward<Cell, S>, backward<Cell, S>, nullptr, nullptr, plan<Cell, S>};
  if constexpr (std::is_same_v<S, Acc<S>>) {
    kernels.tangent = forward_directions<Cell, S, Purpose::tangent>;
    kernels.curvature = curvature<Cell, S>;
  }
  return kernels;
}
template <class Cell, class S>
inline constexpr LayerKernels<S> layer_kernels = kernels_of<Cell, S>();

#define FUSEDRNN_CELLS(S) \
  {layer_kernels<RNNTanh, S>, layer_kernels<RNNRelu, S>, layer_kernels<LSTM, S>, layer_kernels<GRU, S>}
#ifndef FUSEDRNN_ONLY_BF16
extern const LayerKernels<float> f32[cell_kinds] = FUSEDRNN_CELLS(float);
extern const LayerKernels<double> f64[cell_kinds] = FUSEDRNN_CELLS(double);
#endif
extern const LayerKernels<bf16> b16[cell_kinds] = FUSEDRNN_CELLS(bf16);
#undef FUSEDRNN_CELLS

}  // namespace fusedrnn::FUSEDRNN_ISA
