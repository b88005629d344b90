// The curvature op: rows of steps that have nothing to do with each other, and nothing but elements.
#pragma once

#include "../cells/dual.h"
#include "../curvature.h"
#include "recurrence.h"

namespace fusedrnn::FUSEDRNN_ISA {

template <class Cell, class S>
void curvature(const Curvature<S>& p, int threads) {
  using V = AccVec<S>;
  constexpr int w = lanes<S>, G = Cell::gates;
  const int64_t H = p.H;
  const auto row = [&](int64_t r, int64_t unit, auto valid) __attribute__((always_inline)) {
    const auto dual = [&](const S* value, const S* change, int64_t at) __attribute__((always_inline)) {
      return Dual<V>{value ? load(value + at, valid) : V{}, change ? load(change + at, valid) : V{}};
    };
    const auto write = [&](S* to, int64_t at, V value) __attribute__((always_inline)) {
      if (to) store(to + at, value, valid);
    };
    const int64_t at = r * H + unit;
    Dual<V> wx[G], rh[G];
    for (int g = 0; g < G; ++g) {
      const int64_t of_gate = (r * G + g) * H + unit;
      wx[g] = dual(p.wx, p.dwx, of_gate), rh[g] = dual(p.rh, p.drh, of_gate);
    }
    const State<Dual<V>> prev{dual(p.h, p.dh, at), dual(p.c, p.dc, at)};
    const State<Dual<V>> upstream{dual(p.upstream_h, p.dupstream_h, at), dual(p.upstream_c, nullptr, at)};
    const StepGradients<Cell, V> found(wx, rh, prev, upstream);
    for (int g = 0; g < G; ++g) {
      const int64_t of_gate = (r * G + g) * H + unit;
      write(p.by_wx, of_gate, found.dwx[g].change), write(p.by_rh, of_gate, found.drh[g].change);
    }
    write(p.by_h, at, found.dprev.h.change), write(p.by_c, at, found.dprev.c.change);
    write(p.dh_after, at, found.h.change);
  };
  run_team(threads, [&](Member me) {
    const Range rows = part_of(p.rows, me.id, me.size);
    for (int64_t r = rows.begin; r < rows.end; ++r)
      for (int64_t unit = 0; unit < H; unit += w)
        with_lanes<w>(H - unit, [&](auto valid) __attribute__((always_inline)) { row(r, unit, valid); });
  });
}

}  // namespace fusedrnn::FUSEDRNN_ISA
