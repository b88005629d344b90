// What a block does with the sums of a recurrent product: the cell, element by element. A thread has the same elements
// in every step, so c and its gradient stay in its registers.
#pragma once

#include "../cells/cell.h"
#include "params.h"

namespace fusedrnn::cuda {

constexpr int units = 16;  // a group of hidden units, side by side in a half of a warp

// An element: the unit and the batch entry, the same counted from the block's corner, and its number in the thread.
struct Element {
  int unit, n;
  int m, column, i;
};

// What a block computes: `groups` of 16 units (or outputs of the projection) from `unit`, `columns` entries of the
// batch from `row`, at most `most_columns`; at most `count` elements a thread. The halves of a warp have batch entries
// that are `apart`.
template <int most_columns, int count_, int apart>
struct Place {
  static_assert(apart == 1 || apart == 4);
  static constexpr int count = count_;
  int direction, groups, columns;
  int unit, row;

  // How many of its batch entries are before rows_end.
  FUSEDRNN_DEVICE int columns_before(int rows_end) const { return rows_end - row < columns ? rows_end - row : columns; }

  // Calls f(element) for the thread's elements with unit < units_end and n < rows_end.
  template <class F>
  FUSEDRNN_DEVICE void each(int units_end, int rows_end, F f) const {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int e = thread_index() + i * block_threads(), j = e / units % most_columns;
      const int column = j / 8 * 8 + j % 2 * apart + j % 8 / 2 * (apart == 1 ? 2 : 1);
      const int m = e / (units * most_columns) * units + e % units;
      if (m < groups * units && unit + m < units_end && column < columns_before(rows_end))
        f(Element{unit + m, row + column, m, column, i});
    }
  }
};

template <class S>
FUSEDRNN_DEVICE Accumulator<S> value(const S* p, int64_t i) {
  return p ? Accumulator<S>(widen(p[i])) : Accumulator<S>(0);
}

// The forward pass of a thread's elements.
template <class Cell, class Math, class Place>
struct ForwardCells {
  using S = typename Math::Storage;
  using A = Accumulator<S>;
  using Number = typename Math::Number;
  static constexpr int gates = Cell::gates;

  const Forward<S>& p;
  const ForwardDirection<S>& d;
  const Place& at;
  int64_t s, first_row;  // of the step that was fetched
  int batch, next_batch;
  S wx[Place::count][gates] = {}, h[Place::count] = {}, saved[Place::count][Cell::saved + 1];
  A c[Place::count] = {};
  A bias[gates] = {}, b_hh[gates] = {};  // of the thread's one unit; b_hh is in bias where the sum will do

  // `first` is the launch's first step.
  FUSEDRNN_DEVICE ForwardCells(const Forward<S>& p, const ForwardDirection<S>& d, const Place& at, int64_t first)
      : p(p), d(d), at(at) {
    at.each(p.H, d.steps.N, [&](const Element& e) {
      if constexpr (Cell::reads_h) h[e.i] = d.h[first % 2].at(e.n)[e.unit];
      if constexpr (Cell::has_c) c[e.i] = d.c[e.n * p.H + e.unit];
#pragma unroll
      for (int g = 0; g < gates; ++g) {
        bias[g] = value(d.b_ih, g * p.H + e.unit), b_hh[g] = value(d.b_hh, g * p.H + e.unit);
        if (g < Cell::shared) bias[g] += b_hh[g];
      }
    });
    fetch(first);
  }
  // For the next launch.
  FUSEDRNN_DEVICE void store() const {
    at.each(p.H, d.steps.N, [&](const Element& e) {
      if constexpr (Cell::has_c) d.c[e.n * p.H + e.unit] = c[e.i];
    });
  }

  // Loads what a step needs beside h: to be called before its h is waited for.
  FUSEDRNN_DEVICE void fetch(int64_t step) {
    const StepRows rows = d.steps.rows(step);
    s = step, first_row = rows.first, batch = rows.batch, next_batch = rows.batch_after;
    at.each(p.H, batch, [&](const Element& e) {
#pragma unroll
      for (int g = 0; g < gates; ++g) wx[e.i][g] = d.wx.at(first_row + e.n)[g * p.H + e.unit];
    });
  }

  // An element's h (before the projection); `sums` gives the recurrent sums of its gates, W_hh h.
  template <class Sums>
  FUSEDRNN_DEVICE S step(const Element& e, Sums sums) {
    A sum[gates];
    sums(sum);
    Number x[gates], rh[gates], saved[Cell::saved + 1];
#pragma unroll
    for (int g = 0; g < gates; ++g) {
      x[g] = widen(wx[e.i][g]) + bias[g];
      rh[g] = g < Cell::shared ? sum[g] : sum[g] + b_hh[g];
    }
    State<Number> prev{};
    if constexpr (Cell::reads_h) prev.h = widen(h[e.i]);
    if constexpr (Cell::has_c) prev.c = c[e.i];
    const State<Number> state = Cell::forward(x, rh, prev, saved);
#pragma unroll
    for (int i = 0; i < Cell::saved; ++i) this->saved[e.i][i] = narrow<S>(A(saved[i]));
    if constexpr (Cell::has_c) c[e.i] = A(state.c);
    return h[e.i] = narrow<S>(A(state.h));
  }

  // An element's h after the projection.
  FUSEDRNN_DEVICE S projected(const Element&, A sum) const { return narrow<S>(sum); }

  // What backward needs of the step, and its c_n: for nobody to wait for.
  FUSEDRNN_DEVICE void save(const Element& e) const {
    const int64_t r = first_row + e.n;
    if (d.gates) {
#pragma unroll
      for (int i = 0; i < Cell::saved; ++i) d.gates.at(r)[i * p.H + e.unit] = saved[e.i][i];
      if (p.projected) d.gates.at(r)[Cell::saved * p.H + e.unit] = h[e.i];
    }
    if constexpr (Cell::has_c) {
      if (d.cells) d.cells.at(r)[e.unit] = c[e.i];
      if (e.n >= next_batch) d.c_n[e.n * p.H + e.unit] = narrow<S>(c[e.i]);
    }
  }

  // The layer's outputs; unit is one of p.P.
  FUSEDRNN_DEVICE void output(int64_t unit, int64_t n, S value) const {
    d.y.at(first_row + n)[unit] = value;
    if (n >= next_batch) d.h_n[n * p.P + unit] = value;
  }
};

// The elements that a forward kernel of a cell has.
template <class Cell, class Math, class Place>
struct ElementsOf {
  using Type = ForwardCells<Cell, Math, Place>;
};

// The backward pass of a thread's elements. Rows come in at their last step, with dh_n and dc_n, and leave one step
// before their first, with dh0 and dc0. `writes_states`: to memory too, where dh and dc_all aren't null; that takes
// registers.
template <class Cell, class Math, class Place, bool writes_states>
struct BackwardCells {
  using S = typename Math::Storage;
  using A = Accumulator<S>;
  using Number = typename Math::Number;
  static constexpr int gates = Cell::gates;

  const Backward<S>& p;
  const BackwardDirection<S>& d;
  const Place& at;
  int64_t s, first_row;         // of the step that was fetched
  int batch, next_batch, rows;  // the last: those that it concerns
  struct {
    S saved[Cell::saved + 1], h, h_prev, dy;
    A c, c_prev, dcells;
  } of[Place::count];
  S drh[Place::count][gates], dwx[Place::count][gates];
  A dc[Place::count], dh_direct[Place::count];

  // `last` is the launch's last step, its first one here.
  FUSEDRNN_DEVICE BackwardCells(const Backward<S>& p, const BackwardDirection<S>& d, const Place& at, int64_t last)
      : p(p), d(d), at(at) {
    at.each(p.H, d.steps.N, [&](const Element& e) {
      if constexpr (Cell::carries_h) dh_direct[e.i] = d.dh_direct[e.n * p.H + e.unit];
      if constexpr (Cell::has_c) dc[e.i] = d.dc[e.n * p.H + e.unit];
    });
    fetch(last);
  }
  // For the next launch.
  FUSEDRNN_DEVICE void store() const {
    at.each(p.H, d.steps.N, [&](const Element& e) {
      if constexpr (Cell::carries_h) d.dh_direct[e.n * p.H + e.unit] = dh_direct[e.i];
      if constexpr (Cell::has_c) d.dc[e.n * p.H + e.unit] = dc[e.i];
    });
  }

  // Loads what a step needs beside the next one's drh: to be called before that is waited for.
  FUSEDRNN_DEVICE void fetch(int64_t step) {
    const StepRows of_step = d.steps.rows(step);
    s = step, first_row = of_step.first, batch = of_step.batch, next_batch = of_step.batch_after;
    rows = batch > next_batch ? batch : next_batch;
    at.each(p.P, batch, [&](const Element& e) {
      if (d.dy) of[e.i].dy = d.dy.at(first_row + e.n)[e.unit];
    });
    at.each(p.H, batch, [&](const Element& e) {
      auto& to = of[e.i];
      const int64_t r = first_row + e.n, r_prev = of_step.first_before + e.n;
      const bool starts = e.n >= of_step.batch_before;
#pragma unroll
      for (int i = 0; i < Cell::saved; ++i) to.saved[i] = d.gates.at(r)[i * p.H + e.unit];
      if constexpr (Cell::reads_h) {
        to.h = d.y.at(r)[e.unit];
        to.h_prev = starts ? (d.h0 ? d.h0[e.n * p.P + e.unit] : S{}) : d.y.at(r_prev)[e.unit];
      }
      if constexpr (Cell::has_c) {
        to.c = d.cells.at(r)[e.unit];
        to.c_prev = starts ? value(d.c0, e.n * p.H + e.unit) : d.cells.at(r_prev)[e.unit];
        to.dcells = d.dcells ? d.dcells.at(r)[e.unit] : A(0);
      }
    });
  }

  // dL/dh of an element's step, beside dy; `sum` is its drh W_hh, of the next step.
  template <class Sum>
  FUSEDRNN_DEVICE A dh(const Element& e, Sum sum) const {
    if (e.n >= next_batch) return value(d.dh_n, e.n * p.P + e.unit);
    if constexpr (Cell::carries_h) return sum() + dh_direct[e.i];
    return sum();
  }
  FUSEDRNN_DEVICE A dy(const Element& e) const { return d.dy ? A(widen(of[e.i].dy)) : A(0); }

  FUSEDRNN_DEVICE void initial_h(const Element& e, A dh) const {
    if (d.dh0) d.dh0[e.n * p.P + e.unit] = narrow<S>(dh);
  }
  FUSEDRNN_DEVICE void initial_c(const Element& e) const {
    if constexpr (Cell::has_c) {
      if (d.dc0) d.dc0[e.n * p.H + e.unit] = narrow<S>(dc[e.i]);
    }
  }

  // The cell's derivative: an element's gradients from dL/dh (before the projection).
  FUSEDRNN_DEVICE void step(const Element& e, A dh) {
    const auto& from = of[e.i];
    Number saved[Cell::saved + 1], dwx[gates], drh[gates];
#pragma unroll
    for (int i = 0; i < Cell::saved; ++i) saved[i] = widen(from.saved[i]);
    State<Number> prev{}, now{}, upstream{dh, A(0)};
    if constexpr (Cell::reads_h) prev.h = widen(from.h_prev), now.h = widen(from.h);
    if constexpr (Cell::has_c) {
      prev.c = from.c_prev, now.c = from.c;
      upstream.c = (e.n < next_batch ? dc[e.i] : value(d.dc_n, e.n * p.H + e.unit)) + from.dcells;
      if constexpr (writes_states) {
        if (d.dc_all) d.dc_all.at(first_row + e.n)[e.unit] = A(upstream.c);
      }
    }
    if constexpr (writes_states) {
      if (d.dh && !p.projected) d.dh.at(first_row + e.n)[e.unit] = narrow<S>(dh);
    }
    const State<Number> dprev = Cell::backward(saved, prev, now, upstream, dwx, drh);
#pragma unroll
    for (int g = 0; g < gates; ++g) {
      this->drh[e.i][g] = narrow<S>(A(drh[g]));
      if (g >= Cell::shared) this->dwx[e.i][g] = narrow<S>(A(dwx[g]));
    }
    if constexpr (Cell::carries_h) dh_direct[e.i] = A(dprev.h);
    if constexpr (Cell::has_c) dc[e.i] = A(dprev.c);
  }

  // The gates' gradients, for the products over all rows; and for the next step, where blocks read them from memory.
  FUSEDRNN_DEVICE void save(const Element& e) const {
    const int64_t r = first_row + e.n;
#pragma unroll
    for (int g = 0; g < gates; ++g) {
      d.drh.at(r)[g * p.H + e.unit] = drh[e.i][g];
      if (d.dwx) d.dwx.at(r)[g * p.H + e.unit] = g < Cell::shared ? drh[e.i][g] : dwx[e.i][g];
    }
  }
};

}  // namespace fusedrnn::cuda
