// The derivative of the forward pass along a direction: the forward kernels with the change of the cell in the cell's
// place. Then h, c and y in ForwardDirection are the changes of those.
#pragma once

#include "../cells/tangent.h"
#include "elements.cuh"

namespace fusedrnn::cuda {

// What stands for a cell in the kernels.
template <class Cell>
struct Tangent {
  static constexpr int gates = Cell::gates;
};

// The change of a thread's elements.
template <class Cell, class Math, class Place>
struct TangentCells {
  using S = typename Math::Storage;
  using A = Accumulator<S>;
  static constexpr int gates = Cell::gates;
  static_assert(std::is_same_v<S, A>);

  const Forward<S>& p;
  const ForwardDirection<S>& d;
  const Place& at;
  int64_t s, first_row;  // of the step that was fetched
  int batch, next_batch;
  A h[Place::count] = {}, c[Place::count] = {};  // changes
  struct {
    A saved[Cell::saved + 1], dwx[gates], drh[gates], dy;
    State<A> before, now;
  } of[Place::count];

  FUSEDRNN_DEVICE TangentCells(const Forward<S>& p, const ForwardDirection<S>& d, const Place& at, int64_t first)
      : p(p), d(d), at(at) {
    at.each(p.H, d.steps.N, [&](const Element& e) {
      if constexpr (Cell::carries_h) h[e.i] = d.h[first % 2].at(e.n)[e.unit];
      if constexpr (Cell::has_c) c[e.i] = d.c[e.n * p.H + e.unit];
    });
    fetch(first);
  }
  FUSEDRNN_DEVICE void store() const {
    at.each(p.H, d.steps.N, [&](const Element& e) {
      if constexpr (Cell::has_c) d.c[e.n * p.H + e.unit] = c[e.i];
    });
  }

  FUSEDRNN_DEVICE void fetch(int64_t step) {
    const StepRows rows = d.steps.rows(step);
    const TangentDirection<S>& t = d.tangent;
    s = step, first_row = rows.first, batch = rows.batch, next_batch = rows.batch_after;
    at.each(p.P, batch, [&](const Element& e) { of[e.i].dy = t.dy ? t.dy.at(first_row + e.n)[e.unit] : A(0); });
    at.each(p.H, batch, [&](const Element& e) {
      auto& to = of[e.i];
      const int64_t r = first_row + e.n, r_before = rows.first_before + e.n;
      const bool starts = e.n >= rows.batch_before;
#pragma unroll
      for (int i = 0; i < Cell::saved; ++i) to.saved[i] = t.gates.at(r)[i * p.H + e.unit];
#pragma unroll
      for (int g = 0; g < gates; ++g) {
        to.dwx[g] = t.dwx ? t.dwx.at(r)[g * p.H + e.unit] : A(0);
        to.drh[g] = t.drh ? t.drh.at(r)[g * p.H + e.unit] : A(0);
      }
      to.before = to.now = {};
      if constexpr (Cell::reads_h) {
        to.now.h = t.y.at(r)[e.unit];
        to.before.h = starts ? value(t.h0, e.n * p.P + e.unit) : t.y.at(r_before)[e.unit];
      }
      if constexpr (Cell::has_c) {
        to.now.c = t.cells.at(r)[e.unit];
        to.before.c = starts ? value(t.c0, e.n * p.H + e.unit) : t.cells.at(r_before)[e.unit];
      }
    });
  }

  template <class Sums>
  FUSEDRNN_DEVICE S step(const Element& e, Sums sums) {
    auto& from = of[e.i];
    A rh[gates];
    sums(rh);
#pragma unroll
    for (int g = 0; g < gates; ++g) from.drh[g] += rh[g];
    const State<A> change = tangent<Cell>(from.saved, from.before, from.now, from.dwx, from.drh, {h[e.i], c[e.i]});
    c[e.i] = change.c;
    return h[e.i] = p.projected ? change.h : change.h + from.dy;
  }
  FUSEDRNN_DEVICE S projected(const Element& e, A sum) const { return sum + of[e.i].dy; }

  FUSEDRNN_DEVICE void save(const Element& e) const {
#pragma unroll
    for (int g = 0; g < gates; ++g) d.tangent.drh_out.at(first_row + e.n)[g * p.H + e.unit] = of[e.i].drh[g];
    if constexpr (Cell::has_c) {
      d.cells.at(first_row + e.n)[e.unit] = c[e.i];
      if (e.n >= next_batch) d.c_n[e.n * p.H + e.unit] = c[e.i];
    }
  }
  FUSEDRNN_DEVICE void output(int64_t unit, int64_t n, S value) const {
    d.y.at(first_row + n)[unit] = value;
    if (n >= next_batch) d.h_n[n * p.P + unit] = value;
  }
};

template <class Cell, class Math, class Place>
struct ElementsOf<Tangent<Cell>, Math, Place> {
  using Type = TangentCells<Cell, Math, Place>;
};

}  // namespace fusedrnn::cuda
