// The curvature op's kernel: a thread an element.
#pragma once

#include <algorithm>

#include "../cells/dual.h"
#include "../curvature.h"
#include "device.cuh"

namespace fusedrnn::cuda {

constexpr int curvature_threads = 256;

template <class Cell, class S>
FUSEDRNN_KERNEL(curvature_threads)
curvature(const Curvature<S> p) {
  constexpr int G = Cell::gates;
  const auto dual = [](const S* value, const S* change, int64_t at) {
    return Dual<S>{value ? value[at] : S(0), change ? change[at] : S(0)};
  };
  const auto write = [](S* to, int64_t at, S value) {
    if (to) to[at] = value;
  };
  const int64_t first = int64_t(block_index().x) * curvature_threads + thread_index();
  for (int64_t at = first; at < p.rows * p.H; at += int64_t(grid_size().x) * curvature_threads) {
    const int64_t r = at / p.H, unit = at % p.H;
    Dual<S> wx[G], rh[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const int64_t of_gate = (r * G + g) * p.H + unit;
      wx[g] = dual(p.wx, p.dwx, of_gate), rh[g] = dual(p.rh, p.drh, of_gate);
    }
    const State<Dual<S>> prev{dual(p.h, p.dh, at), dual(p.c, p.dc, at)};
    const State<Dual<S>> upstream{dual(p.upstream_h, p.dupstream_h, at), dual(p.upstream_c, nullptr, at)};
    const StepGradients<Cell, S> found(wx, rh, prev, upstream);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const int64_t of_gate = (r * G + g) * p.H + unit;
      write(p.by_wx, of_gate, found.dwx[g].change), write(p.by_rh, of_gate, found.drh[g].change);
    }
    write(p.by_h, at, found.dprev.h.change), write(p.by_c, at, found.dprev.c.change);
    write(p.dh_after, at, found.h.change);
  }
}

template <class Cell, class S>
void launch_curvature(const Curvature<S>& p, Stream stream) {
  const int64_t blocks = (p.rows * p.H + curvature_threads - 1) / curvature_threads;
  launch(curvature<Cell, S>, {.grid = {unsigned(std::min<int64_t>(blocks, 1 << 16))}, .threads = curvature_threads},
         stream, p);
}

}  // namespace fusedrnn::cuda
