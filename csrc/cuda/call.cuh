// What is the same in both passes of a layer.
#pragma once

#include <vector>

#include "plan.h"
#include "products.cuh"
#include "rows.cuh"

namespace fusedrnn::cuda {

// One of each direction's weights, one below the other, each padded to `rows`.
inline Tensor stacked(const Layer& l, const std::vector<Tensor>& weights, int64_t index, int64_t rows) {
  const Tensor& first = weights[index];
  if (l.directions == 1 && first.size(0) == rows) return first;
  std::vector<int64_t> shape(first.sizes().begin(), first.sizes().end());
  shape[0] = l.directions * rows;
  const Tensor all = zeros(shape, l.dtype, first);
  for (int64_t d = 0; d < l.directions; ++d) {
    Tensor to = fusedrnn::narrow(all, 0, d * rows, first.size(0));
    stable::copy_(to, weights[d * l.weights_per_direction + index]);
  }
  return all;
}

template <class Math>
PlanRequest request(const Layer& l, bool backward) {
  constexpr int64_t element = sizeof(typename Math::Storage);
  return {l.N, l.H, l.P, int(l.directions), int(l.gates), backward, element, Math::resident, l.projected};
}

// What both passes of a layer need on their device.
struct Call {
  const Layer& l;
  Tensor offsets;   // of packed rows
  Tensor arrivals;  // [D, batch tiles of the smallest size * counter_pitch]

  Call(const Layer& layer, const Tensor& x, Stream stream) : l(layer) {
    arrivals = zeros({l.directions, tiles() * counter_pitch}, ScalarType::Int, x);
    if (!l.packed) return;
    offsets = empty({l.T + 1}, ScalarType::Long, x);
    for (int64_t from = 0; from <= l.T; from += Numbers::most) {
      Numbers numbers{};
      numbers.count = int(std::min<int64_t>(Numbers::most, l.T + 1 - from));
      std::copy_n(l.offset.begin() + from, numbers.count, numbers.value);
      numbers.to = data<int64_t>(offsets) + from;
      launch(write_numbers, {.grid = {}, .threads = row_threads}, stream, numbers);
    }
  }

  int64_t tiles() const { return round_up(l.N, tile_shapes[0].columns()) / tile_shapes[0].columns(); }
  Steps steps(int64_t d) const { return {l.T, l.N, l.packed ? data<const int64_t>(offsets) : nullptr, d == 1}; }
  uint32_t* arrivals_of(int64_t d) const { return data<uint32_t>(arrivals) + d * tiles() * counter_pitch; }

  // Every direction's W of [D * rows] weights, as the tile reads it.
  template <class S, class Function>
  std::vector<Tensor> weights_of(const std::vector<Tensor>& weights, int64_t index, Function function) const {
    std::vector<Tensor> found;
    for (int64_t d = 0; d < l.directions; ++d)
      found.push_back(tiled<S>(function(weights[d * l.weights_per_direction + index])));
    return found;
  }
};

}  // namespace fusedrnn::cuda
